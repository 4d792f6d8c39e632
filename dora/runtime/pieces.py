"""The pieces that collectives of torch.distributed consist of: reductions, lists, rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import ReduceOp

from dora.runtime.tensors import check_sizes, checked_tensor

_OPS = {
    ReduceOp.SUM: "sum",
    ReduceOp.AVG: "sum",  # of shares, or divided afterwards
    ReduceOp.PRODUCT: "product",
    ReduceOp.MIN: "min",
    ReduceOp.MAX: "max",
}


def reduction(opts: Any, tensor: torch.Tensor) -> tuple[str, bool]:
    """Returns the engine's name of a reduction, and whether it is an average."""
    op: Any = ReduceOp(ReduceOp.SUM) if opts is None else opts.reduceOp
    name = next((name for known, name in _OPS.items() if op == known), None)
    if name is None:
        raise ValueError(f"op: given {op.op}, allowed: SUM, AVG, PRODUCT, MIN or MAX")
    is_average = op == ReduceOp.AVG
    if is_average and not tensor.is_floating_point():
        raise ValueError(f"op: given AVG of {tensor.dtype}, allowed: SUM, then divide")
    if tensor.dtype is torch.bool:  # a sum of truths is true if any is
        name = {"sum": "max", "product": "min"}.get(name, name)
    return name, is_average


def only(items: Sequence[Any]) -> Any:
    """Returns the only item; torch passes one tensor per device, and a rank has one."""
    if len(items) != 1:
        raise ValueError(f"tensors: given {len(items)} of this rank, allowed: 1")
    return items[0]


def whole_of(
    parts: Sequence[torch.Tensor], like: torch.Tensor, count: int, what: str
) -> torch.Tensor:
    """Returns memory for all parts of a list, which must be alike."""
    if len(parts) != count:
        raise ValueError(f"{what}: given {len(parts)} tensors, allowed: {count}, one per rank")
    for part in parts:
        check_sizes(part, like, 1, what)
        checked_tensor(part)
    return torch.empty((count, *like.shape), dtype=like.dtype, device=like.device)


def unpacking(whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Returns a function that copies a gathered tensor into a list of its parts."""

    def unpack() -> None:
        with torch.no_grad():
            for source, part in zip(whole, parts, strict=True):
                part.copy_(source.reshape(part.shape))
        _finish_on_gpu(whole)

    return unpack


def divide(tensor: torch.Tensor, count: int) -> None:
    """Divides in place and waits for it."""
    with torch.no_grad():
        tensor.div_(count)
    _finish_on_gpu(tensor)


def _finish_on_gpu(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:  # the user's stream knows nothing of this thread's
        torch.cuda.current_stream(tensor.device).synchronize()


def rows_of(tensor: torch.Tensor, sizes: Sequence[int], count: int) -> list[torch.Tensor]:
    """Cuts a tensor along its first dimension; no sizes: into equal parts."""
    checked_tensor(tensor)
    rows = tensor.shape[0]
    if not sizes and rows % count:
        raise ValueError(f"all_to_all_single: given {rows} rows, allowed: a multiple of {count}")
    sizes = list(sizes) or [rows // count] * count
    if len(sizes) != count or sum(sizes) != rows:
        raise ValueError(
            f"all_to_all_single: given sizes {sizes}, allowed: {count} that sum to {rows}"
        )
    return list(tensor.split(sizes))
