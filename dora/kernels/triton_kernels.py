"""The wire format on a GPU, one launch for each call; imported only where Triton is installed.

Under TRITON_INTERPRET=1 the same kernels run on a CPU, for tests. `triton_programs` has the
kernels, `triton_blocks` what they are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from dora.kernels.format import ALIGNMENT_BYTES, QMAX, TILE, Format, many_layout, wire_bytes
from dora.kernels.reference import check_finite
from dora.kernels.triton_programs import dequantize, quantize, quantize_many, reduce


class Launch(NamedTuple):
    """How much a program handles, and by how many warps."""

    tiles: int = 1
    warps: int = 4


def _launch(dtype: torch.dtype, format: Format) -> Launch:
    """Returns the fastest launch for inputs or outputs of a type.

    On an H100 (`benchmarks/compress_gpu.py --sweep`), GB/s of one tile by 4 warps, one by 2 and two
    by 2: float32 int8 3002, 2984, 2889; bfloat16 int8 2757, 2680, 2870, the same stochastic 2500,
    2618, 2468; `copy_` 3009 and 2977.
    """
    if dtype == torch.float32:
        return Launch()
    return Launch(2 if format.name == "int8" and not format.stochastic else 1, 2)


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
    """Does what `reference.quantize_pack` does, and waits for the GPU, since it may raise."""
    wire, is_bad = quantize_pack_unchecked(
        x, format, seed=seed, first_index=first_index, error=error, factors=factors, out=out
    )
    check_finite(not is_bad.item(), name)
    return wire


def quantize_pack_unchecked(
    x: torch.Tensor,
    format: Format,
    *,
    seed: int = 0,
    first_index: int = 0,
    error: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the wire bytes, and a number that is 1 if they are of no use; waits for nothing."""
    x = x.detach().contiguous()
    if out is None:
        out = torch.empty(wire_bytes(x.numel(), format), dtype=torch.uint8, device=x.device)
    is_bad = torch.zeros(1, dtype=torch.int32, device=x.device)
    launch = launch or _launch(x.dtype, format)
    if x.numel():
        with torch.cuda.device_of(x):
            quantize[_grid(x.numel(), launch)](
                x,
                out,
                is_bad,
                error,
                factors,
                None if factors is None else 1 / factors.float(),
                x.numel(),
                1 if factors is None else factors.numel(),
                first_index,
                _signed(seed),
                IN_STEP=_is_in_step(factors, first_index, format),
                **_encoding(x, format, has_error=error is not None),
                **_compiled(format, launch),
            )
    return out, is_bad


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
    launch: Launch | None = None,
) -> torch.Tensor:
    """Does what `reference.unpack_dequantize` does; waits for nothing."""
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=wire.device)
    launch = launch or _launch(out.dtype, format)
    if out.numel():
        with torch.cuda.device_of(wire):
            dequantize[_grid(out.numel(), launch)](
                _even(wire),
                out,
                None if add is None else add.detach().contiguous(),
                factors,
                out.numel(),
                1 if factors is None else factors.numel(),
                first_index,
                IN_STEP=_is_in_step(factors, first_index, format),
                **_compiled(format, launch),
            )
    return out


def quantize_pack_many(
    tensors: Sequence[torch.Tensor],
    format: Format,
    *,
    seed: int = 0,
    errors: Sequence[torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    names: Sequence[str] | None = None,
) -> torch.Tensor:
    """Returns one buffer laid out by `many_layout`, with one launch for each dtype in the list.

    Raises:
        ValueError: A tensor has infinite values or NaN.
    """
    flat = [x.detach().contiguous() for x in tensors]
    offsets, total = many_layout([x.shape for x in flat], format)
    out = torch.empty(total, dtype=torch.uint8, device=flat[0].device) if out is None else out
    are_bad = torch.zeros(len(flat), dtype=torch.int32, device=out.device)
    for dtype in dict.fromkeys(x.dtype for x in flat if x.numel()):
        launch = _launch(dtype, format)
        rows, programs = _table(flat, offsets, errors, dtype, launch)
        with torch.cuda.device_of(out):
            quantize_many[(programs.numel(),)](
                rows.to(out.device),
                programs.to(out.device),
                out,
                are_bad,
                _signed(seed),
                X_TYPE=_TYPES[dtype],
                HAS_ERROR=errors is not None,
                IS_ALIGNED=not bool((rows[:, :2] % 16).any()),
                **_encoding(out, format, has_error=errors is not None),
                **_compiled(format, launch),
            )
    for i in are_bad.nonzero().flatten().tolist():
        check_finite(False, names[i] if names else f"tensor {i}")
    return out


def dequantize_reduce_requantize(
    wires: Sequence[torch.Tensor],
    weights: Sequence[float],
    numel: int,
    format: Format,
    *,
    seed: int = 0,
    name: str = "sum",
) -> torch.Tensor:
    """Does what `reference.dequantize_reduce_requantize` does, in one pass over all `wires`."""
    out = torch.empty_like(wires[0])
    is_bad = torch.zeros(1, dtype=torch.int32, device=out.device)
    launch = Launch()
    if numel:
        with torch.cuda.device_of(out):
            reduce[_grid(numel, launch)](
                tuple(_even(wire) for wire in wires),
                tuple(float(weight) for weight in weights),
                out,
                is_bad,
                numel,
                _signed(seed),
                **_encoding(out, format),
                **_compiled(format, launch),
            )
    check_finite(not is_bad.item(), name)
    return out


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _table(
    flat: Sequence[torch.Tensor],
    offsets: Sequence[int],
    errors: Sequence[torch.Tensor] | None,
    dtype: torch.dtype,
    launch: Launch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a row per tensor for `_quantize_many`, and the tensor of each program."""
    rows, counts, first_index, first_program = [], [], 0, 0
    for i, x in enumerate(flat):
        error = errors[i].data_ptr() if errors else 0
        rows.append(
            (
                x.data_ptr(),
                error,
                x.numel(),
                offsets[i] // ALIGNMENT_BYTES,
                first_index,
                first_program,
            )
        )
        counts.append(_grid(x.numel(), launch)[0] if x.dtype == dtype else 0)
        first_index += x.numel()
        first_program += counts[-1]
    programs = torch.arange(len(flat)).repeat_interleave(torch.tensor(counts))
    return torch.tensor(rows, dtype=torch.int64), programs.to(torch.int32)


def _grid(numel: int, launch: Launch) -> tuple[int]:
    return (-(-numel // (TILE * launch.tiles)),)


def _compiled(format: Format, launch: Launch) -> dict[str, Any]:
    return {
        "KIND": format.name,
        "GROUP": format.group,
        "TILES": launch.tiles,
        "num_warps": launch.warps,
        "enable_fp_fusion": False,
    }


def _encoding(x: torch.Tensor, format: Format, *, has_error: bool = False) -> dict[str, Any]:
    # Where the values of converted codes are needed too, Triton 3.6 takes other ones on an H100.
    is_reliable = not (has_error and format.name == "fp8")
    return {
        "QMAX": float(QMAX[format.name]),
        "STOCHASTIC": format.stochastic,
        "NATIVE": x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
        and is_reliable,
    }


def _is_in_step(factors: torch.Tensor | None, first_index: int, format: Format) -> bool:
    return factors is not None and (factors.numel() % format.group, first_index % format.group) == (
        0,
        0,
    )


def _even(wire: torch.Tensor) -> torch.Tensor:
    """Returns a wire whose scales can be read as words."""
    return wire.clone() if wire.data_ptr() % 2 else wire


def _signed(seed: int) -> int:
    """Returns the last 32 bits of a seed, as Triton's first choice of an integer type."""
    return ((seed & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
