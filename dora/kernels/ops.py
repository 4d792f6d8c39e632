"""The kernels as operators of torch, so that torch.compile and torch.export keep them whole.

Bytes carry no gradient, so `dora::quantize_pack` ends a graph and `dora::unpack_dequantize` passes
one on to `add` only. `dora::fake_quantize` joins the two: its result is what a receiver would see,
and its gradient goes straight through, as it is or as a sender of gradients would encode it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dora.kernels import quantize
from dora.kernels.format import Format, wire_bytes


@torch.library.custom_op("dora::quantize_pack", mutates_args=())
def quantize_pack(
    x: torch.Tensor,
    kind: str,
    group: int = 64,
    stochastic: bool = False,
    seed: int = 0,
    first_index: int = 0,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `dora.kernels.quantize_pack` of a format given by its parts."""
    format = Format(kind, group, stochastic, factors is not None)
    return quantize.quantize_pack(
        x, format, seed=seed, first_index=first_index, factors=factors, name="dora::quantize_pack"
    )


@quantize_pack.register_fake
def _(
    x: torch.Tensor,
    kind: str,
    group: int = 64,
    stochastic: bool = False,
    seed: int = 0,
    first_index: int = 0,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(wire_bytes(x.numel(), Format(kind, group)), dtype=torch.uint8)


@torch.library.custom_op("dora::unpack_dequantize", mutates_args=())
def unpack_dequantize(
    wire: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    group: int = 64,
    first_index: int = 0,
    add: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `dora.kernels.unpack_dequantize` of a format given by its parts."""
    format = Format(kind, group, smooth=factors is not None)
    return quantize.unpack_dequantize(
        wire, shape, dtype, format, first_index=first_index, add=add, factors=factors
    )


@unpack_dequantize.register_fake
def _(
    wire: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str,
    group: int = 64,
    first_index: int = 0,
    add: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    return wire.new_empty(shape, dtype=dtype)


def _remember_add(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    add = inputs[6]
    ctx.add = None if add is None else (add.shape, add.dtype)


def _to_add(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if ctx.add is None:
        return (None,) * 8
    shape, dtype = ctx.add
    return (None,) * 6 + (grad.reshape(shape).to(dtype), None)


unpack_dequantize.register_autograd(_to_add, setup_context=_remember_add)


@torch.library.custom_op("dora::fake_quantize", mutates_args=())
def _fake_quantize(
    x: torch.Tensor,
    kind: str,
    group: int,
    stochastic: bool,
    smooth: bool,
    backward_kind: str,
    backward_group: int,
    backward_stochastic: bool,
    backward_smooth: bool,
    seed: int,
) -> torch.Tensor:
    format = Format(kind, group, stochastic, smooth)
    factors = quantize.channel_factors(x) if smooth else None
    wire = quantize.quantize_pack(x, format, seed=seed, factors=factors, name="dora::fake_quantize")
    return quantize.unpack_dequantize(wire, x.shape, x.dtype, format, factors=factors)


@_fake_quantize.register_fake
def _(x: torch.Tensor, *formats: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.backward, ctx.seed = inputs[5:9], inputs[9]


def _straight_through(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if ctx.backward[0] != "none":
        grad = _fake_quantize(grad, *ctx.backward, "none", 64, False, False, ctx.seed)
    return (grad,) + (None,) * 9


_fake_quantize.register_autograd(_straight_through, setup_context=_remember_backward)


def fake_quantize(
    x: torch.Tensor, format: Format, *, gradient: Format | None = None, seed: int = 0
) -> torch.Tensor:
    """Returns `x` as its receiver would see it; the gradient takes no notice of the rounding.

    Args:
        x: float32, float16 or bfloat16, of any shape.
        format: Of the way there.
        gradient: Of the way back; None sends gradients as they are.
        seed: Of stochastic rounding, there and back.
    """
    back = ("none", 64, False, False) if gradient is None else _parts(gradient)
    return _fake_quantize(x, *_parts(format), *back, seed)  # type: ignore[no-any-return]


def _parts(format: Format) -> tuple[str, int, bool, bool]:
    return format.name, format.group, format.stochastic, format.smooth
