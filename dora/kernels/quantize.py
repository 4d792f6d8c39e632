"""Encodes and decodes tensors where they are: C++ on a CPU, Triton on a GPU.

The bits are those of `reference`, which also stands in where a device has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from dora.kernels import native, reference
from dora.kernels.format import Format, many_layout, wire_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_pack(
    x: torch.Tensor,
    format: Format,
    *,
    seed: int = 0,
    first_index: int = 0,
    error: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    name: str = "tensor",
) -> torch.Tensor:
    """Returns the wire bytes of `x`, without a prefix.

    After an error, `error` and `out` hold nothing of use.

    Args:
        x: float32, float16 or bfloat16, of any shape.
        format: How to encode.
        seed: Of stochastic rounding.
        first_index: Index of x's first element in the whole of which it is a piece.
        error: float32, as many elements as x. Added to x; then set to what encoding has lost.
        factors: One per channel, from `channel_factors`. Element i of x is of channel
            (first_index + i) % channels.
        out: Bytes to write to.
        name: Of x, for the error message.

    Raises:
        ValueError: A value is infinite or not a number.
    """
    _check_dtype(name, x.dtype)
    _check_factors(factors, format)
    if out is None:
        out = torch.empty(wire_bytes(x.numel(), format), dtype=torch.uint8, device=x.device)
    _check_flat("out", out, wire_bytes(x.numel(), format), torch.uint8)
    if error is not None:
        _check_flat("error", error, x.numel(), torch.float32)
    wire: torch.Tensor = _kernels(x).quantize_pack(
        x,
        format,
        seed=seed,
        first_index=first_index,
        error=error,
        factors=factors,
        out=out,
        name=name,
    )
    return wire


def unpack_dequantize(
    wire: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    format: Format,
    *,
    first_index: int = 0,
    add: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the decoded tensor, plus `add` if given, rounded once to `dtype`.

    Args:
        wire: Bytes from `quantize_pack`.
        shape: Of the result.
        dtype: Of the result: float32, float16 or bfloat16.
        format: As it was encoded.
        first_index: As it was encoded; matters for `factors` only.
        add: Has as many elements as the result; may be `out`.
        factors: As it was encoded.
        out: Contiguous tensor with as many elements of that dtype, to write to.
    """
    _check_dtype("dtype", dtype)
    _check_factors(factors, format)
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=wire.device)
    numel = torch.Size(shape).numel()
    _check_flat("wire", wire, wire_bytes(numel, format), torch.uint8)
    _check_flat("out", out, numel, dtype)
    if add is not None:
        _check_dtype("add", add.dtype)
        add = add.detach().contiguous()
        _check_flat("add", add, numel, add.dtype)
    result: torch.Tensor = _kernels(wire).unpack_dequantize(
        wire,
        tuple(shape),
        dtype,
        format,
        first_index=first_index,
        add=add,
        factors=factors,
        out=out,
    )
    return result


def channel_factors(x: torch.Tensor) -> torch.Tensor:
    """Returns the largest magnitude of each channel, bfloat16 [C]; 1 for channels of zeros."""
    _check_dtype("tensor", x.dtype)
    if x.ndim == 0:
        raise ValueError("tensor: given no dimension, allowed: channels as the last one")
    return native.channel_factors(x) if x.device.type == "cpu" else reference.channel_factors(x)


def quantize_pack_many(
    tensors: Sequence[torch.Tensor],
    format: Format,
    *,
    seed: int = 0,
    errors: Sequence[torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    names: Sequence[str] | None = None,
) -> torch.Tensor:
    """Returns one buffer with the wire bytes of all tensors, laid out by `many_layout`.

    Stochastic rounding counts their elements through, so that no two get the same random number.
    """
    offsets, total = many_layout([x.shape for x in tensors], format)
    if out is None:
        device = tensors[0].device if tensors else torch.device("cpu")
        out = torch.zeros(total, dtype=torch.uint8, device=device)
    _check_flat("out", out, total, torch.uint8)
    for i, x in enumerate(tensors):
        _check_dtype(names[i] if names else f"tensor {i}", x.dtype)
        if errors is not None:
            _check_flat(f"error {i}", errors[i], x.numel(), torch.float32)
    if tensors and _has_triton(tensors[0]):
        from dora.kernels import triton_kernels

        return triton_kernels.quantize_pack_many(
            tensors, format, seed=seed, errors=errors, out=out, names=names
        )
    first_index = 0
    for i, (x, offset) in enumerate(zip(tensors, offsets, strict=True)):
        quantize_pack(
            x,
            format,
            seed=seed,
            first_index=first_index,
            error=errors[i] if errors else None,
            out=out[offset : offset + wire_bytes(x.numel(), format)],
            name=names[i] if names else f"tensor {i}",
        )
        first_index += x.numel()
    return out


def unpack_dequantize_many(
    wire: torch.Tensor,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    format: Format,
    *,
    outs: Sequence[torch.Tensor] | None = None,
    accumulate: bool = False,
) -> list[torch.Tensor]:
    """Returns the tensors of one buffer; with `accumulate`, added to what `outs` hold."""
    offsets, _ = many_layout(shapes, format)
    decoded = []
    for i, (shape, offset) in enumerate(zip(shapes, offsets, strict=True)):
        out = outs[i] if outs else None
        part = wire[offset : offset + wire_bytes(torch.Size(shape).numel(), format)]
        add = out if accumulate else None
        decoded.append(unpack_dequantize(part, shape, dtype, format, add=add, out=out))
    return decoded


def dequantize_reduce_requantize(
    wires: Sequence[torch.Tensor],
    weights: Sequence[float],
    numel: int,
    format: Format,
    *,
    seed: int = 0,
    name: str = "sum",
) -> torch.Tensor:
    """Returns the wire bytes of the weighted sum of what `wires` hold, in float32 and in order."""
    if len(wires) != len(weights) or not wires:
        raise ValueError(
            f"weights: given {len(weights)} for {len(wires)} wires, allowed: one each, at least one"
        )
    for wire in wires:
        _check_flat("wire", wire, wire_bytes(numel, format), torch.uint8)
    total: torch.Tensor = _kernels(wires[0]).dequantize_reduce_requantize(
        wires, weights, numel, format, seed=seed, name=name
    )
    return total


def _kernels(x: torch.Tensor) -> ModuleType:
    if x.device.type == "cpu":
        return native
    if _has_triton(x):
        from dora.kernels import triton_kernels

        return triton_kernels
    return reference


def _has_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and _is_triton_installed()


@cache
def _is_triton_installed() -> bool:
    return find_spec("triton") is not None


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{name}: given {dtype}, allowed: float32, float16, bfloat16")


def _check_flat(name: str, x: torch.Tensor, numel: int, dtype: torch.dtype) -> None:
    if x.numel() != numel or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(
            f"{name}: given {x.numel()} elements of {x.dtype} with strides {x.stride()}, "
            f"allowed: {numel} of {dtype}, contiguous"
        )


def _check_factors(factors: torch.Tensor | None, format: Format) -> None:
    if factors is not None and (factors.numel() == 0 or factors.numel() % format.group):
        raise ValueError(
            f"factors: given {factors.numel()} channels, allowed: a multiple of {format.group}"
        )
