"""The values that cross a stage boundary: their structure, their shapes, their tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from dora.errors import PartitionError


@dataclass(frozen=True)
class LeafSpec:
    """Shape, dtype and device of a tensor, and whether a gradient comes back for it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def empty(self) -> torch.Tensor:
        """Returns an uninitialised CPU tensor to receive into."""
        return torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class BoundarySpec:
    """A nested value in which every tensor is replaced by its LeafSpec."""

    tree: TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> BoundarySpec:
        """Describes a nested value of real or fake tensors; other leaves are kept as they are."""
        leaves, tree = tree_flatten(value)
        return cls(
            tree,
            tuple(
                LeafSpec(x.shape, x.dtype, x.device, x.requires_grad)
                if isinstance(x, torch.Tensor)
                else x
                for x in leaves
            ),
        )

    @cached_property
    def tensors(self) -> tuple[LeafSpec, ...]:
        """The tensor leaves in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, LeafSpec))

    @cached_property
    def returned(self) -> tuple[LeafSpec, ...]:
        """What comes back: the gradients, and of several, which of them are none."""
        leaves = tuple(leaf for leaf in self.tensors if leaf.requires_grad)
        if len(leaves) < 2:
            return leaves
        flags = LeafSpec(torch.Size([len(leaves)]), torch.uint8, torch.device("cpu"), False)
        return (*leaves, flags)

    def check(self, tensors: list[torch.Tensor], action: str) -> None:
        """Raises PartitionError if tensors differ in shape from what the peer expects."""
        given, expected = [x.shape for x in tensors], [leaf.shape for leaf in self.tensors]
        if given != expected:
            raise PartitionError(
                f"{action}: given shapes {[tuple(x) for x in given]}, allowed "
                f"{[tuple(x) for x in expected]}: what crosses stages may depend on the shapes of "
                "the inputs, not on their values"
            )

    def fill(self, tensors: list[torch.Tensor]) -> Any:
        """Returns the nested value with these tensors in place of the specs."""
        if self.tree.is_leaf() and tensors:
            return tensors[0]
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(x, LeafSpec) else x for x in self.leaves]
        return tree_unflatten(leaves, self.tree)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Returns the tensor leaves of a nested value in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what determines the shapes inside a model: input shapes, values, autograd mode."""
    leaves, tree = tree_flatten((args, kwargs))
    described = tuple(
        (tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else repr(x)
        for x in leaves
    )
    cast = tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    )
    return (described, str(tree), torch.is_grad_enabled(), cast)


def digest(value: object) -> int:
    """Returns a 62-bit hash of `repr(value)` that is equal on all ranks."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 2


class _Arrived(torch.autograd.Function):
    """Passes a received leaf on as a tensor that in-place modules may overwrite."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:  # noqa: D102
        alias = leaf.new_empty(0)
        return alias.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return grad


def arrived(leaf: torch.Tensor) -> torch.Tensor:
    """Returns an alias of a received tensor; its gradient accumulates in `leaf.grad`."""
    if not leaf.requires_grad:
        return leaf
    out: torch.Tensor = _Arrived.apply(leaf)  # type: ignore[no-untyped-call]
    return out
