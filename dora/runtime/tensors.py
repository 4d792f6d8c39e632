"""What a tensor must be to travel as the bytes that it consists of."""

from __future__ import annotations

import torch

# What the engine can reduce, by the names that it has for them.
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
}


def checked_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor` if its memory can travel as it is; raises ValueError else."""
    if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"tensor: given {tensor.layout} on {tensor.device}, allowed: dense, on cpu or cuda"
        )
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"tensor: given shape {tuple(tensor.shape)} with strides {tensor.stride()}, allowed: "
            "contiguous; pass tensor.contiguous(), or receive into such a tensor and copy"
        )
    return tensor


def dtype_name(tensor: torch.Tensor) -> str:
    """Returns the engine's name of the dtype; raises ValueError if it can not be reduced."""
    if tensor.dtype not in _DTYPES:
        names = ", ".join(_DTYPES.values())
        raise ValueError(f"dtype: given {tensor.dtype}, allowed in a reduction: {names}")
    return _DTYPES[tensor.dtype]


def check_sizes(whole: torch.Tensor, part: torch.Tensor, count: int, what: str) -> None:
    """Raises ValueError unless `whole` holds `count` tensors like `part`."""
    if whole.numel() != part.numel() * count or whole.dtype != part.dtype:
        raise ValueError(
            f"{what}: given {whole.numel()} elements of {whole.dtype}, allowed: {count} times "
            f"{part.numel()} of {part.dtype}"
        )


def check_tag(tag: int) -> None:
    """Raises ValueError for a negative tag; those belong to the engine."""
    if tag < 0:
        raise ValueError(f"tag: given {tag}, allowed: 0 or more")
