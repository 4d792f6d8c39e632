"""The kernels for a CPU, compiled from csrc/quantize; each does what `reference` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dora import _C
from dora.kernels.format import Format, wire_bytes
from dora.kernels.reference import check_finite

# Best first, all with the same results.
INSTRUCTION_SETS = tuple(_C.instruction_sets())
_BEST = INSTRUCTION_SETS[0]
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


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
    instruction_set: str = _BEST,
) -> torch.Tensor:
    """Does what `reference.quantize_pack` does; `error` and `out` have to be contiguous."""
    x = x.detach().contiguous()
    factors = None if factors is None else factors.contiguous()
    if out is None:
        out = torch.empty(wire_bytes(x.numel(), format), dtype=torch.uint8)
    is_finite = _C.quantize_pack(
        values=x.data_ptr(),
        dtype=_DTYPES[x.dtype],
        count=x.numel(),
        wire=out.data_ptr(),
        codes=format.name,
        group=format.group,
        is_stochastic=format.stochastic,
        seed=seed & 0xFFFFFFFF,
        first_index=first_index,
        error=_address(error),
        factors=_address(factors),
        num_channels=0 if factors is None else factors.numel(),
        instruction_set=instruction_set,
    )
    check_finite(is_finite, name)
    return out


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
    instruction_set: str = _BEST,
) -> torch.Tensor:
    """Does what `reference.unpack_dequantize` does; all tensors have to be contiguous."""
    factors = None if factors is None else factors.contiguous()
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype)
    _C.unpack_dequantize(
        wire=wire.data_ptr(),
        count=out.numel(),
        out=out.data_ptr(),
        dtype=_DTYPES[dtype],
        codes=format.name,
        group=format.group,
        first_index=first_index,
        add=_address(add),
        add_dtype=_DTYPES[dtype if add is None else add.dtype],
        factors=_address(factors),
        num_channels=0 if factors is None else factors.numel(),
        instruction_set=instruction_set,
    )
    return out


def channel_factors(x: torch.Tensor, *, instruction_set: str = _BEST) -> torch.Tensor:
    """Does what `reference.channel_factors` does."""
    x, channels = x.detach().contiguous(), x.shape[-1]
    factors = torch.empty(channels, dtype=torch.bfloat16)
    _C.channel_factors(
        values=x.data_ptr(),
        dtype=_DTYPES[x.dtype],
        num_rows=x.numel() // channels if channels else 0,
        num_channels=channels,
        factors=factors.data_ptr(),
        instruction_set=instruction_set,
    )
    return factors


def dequantize_reduce_requantize(
    wires: Sequence[torch.Tensor],
    weights: Sequence[float],
    numel: int,
    format: Format,
    *,
    seed: int = 0,
    name: str = "sum",
    instruction_set: str = _BEST,
) -> torch.Tensor:
    """Does what `reference.dequantize_reduce_requantize` does, tile by tile."""
    out = torch.empty_like(wires[0])
    is_finite = _C.reduce_wires(
        wires=[wire.data_ptr() for wire in wires],
        weights=weights,
        count=numel,
        wire=out.data_ptr(),
        codes=format.name,
        group=format.group,
        is_stochastic=format.stochastic,
        seed=seed & 0xFFFFFFFF,
        instruction_set=instruction_set,
    )
    check_finite(is_finite, name)
    return out


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
