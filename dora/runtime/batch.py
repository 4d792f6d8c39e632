"""Cuts a batch into micro-batches and puts outputs of micro-batches together again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from dora.runtime.boundary import tensors_of


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns inputs as the (args, kwargs) of the module's forward."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dim: int = 0) -> int:
    """Returns the size of the first tensor along `batch_dim`; ValueError if there is none."""
    for tensor in tensors_of((args, dict(kwargs))):
        if tensor.dim() > batch_dim:
            return tensor.shape[batch_dim]
    raise ValueError("inputs: given no tensor with a batch dimension, allowed: at least one")


def microbatch_sizes(size: int, count: int) -> list[int]:
    """Returns `count` sizes that add up to `size` and differ by at most one, larger first."""
    if not 1 <= count <= size:
        raise ValueError(
            f"batch: given {size} samples, allowed at least {count}: one per micro-batch"
        )
    return [size // count + (i < size % count) for i in range(count)]


def split(tree: Any, sizes: Sequence[int], batch_dim: int = 0) -> list[Any]:
    """Cuts every tensor that has the batch size along `batch_dim`; others go to every piece."""
    leaves, spec = tree_flatten(tree)
    total = sum(sizes)
    columns = [
        leaf.split(list(sizes), batch_dim)
        if isinstance(leaf, torch.Tensor)
        and leaf.dim() > batch_dim
        and leaf.shape[batch_dim] == total
        else [leaf] * len(sizes)
        for leaf in leaves
    ]
    return [tree_unflatten([column[i] for column in columns], spec) for i in range(len(sizes))]


def split_inputs(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sizes: Sequence[int],
    batch_dim: int,
    whole: Collection[str],
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Cuts the inputs of a model, except the keyword inputs named in `whole`."""
    kept = {name: value for name, value in kwargs.items() if name in whole}
    cut = {name: value for name, value in kwargs.items() if name not in whole}
    pieces = split((args, cut), sizes, batch_dim)
    return [(piece_args, {**piece_kwargs, **kept}) for piece_args, piece_kwargs in pieces]


def merge(outputs: Sequence[Any], sizes: Sequence[int], batch_dim: int = 0) -> Any:
    """Inverse of `split` for outputs; scalars become their mean weighted by sample."""
    flat = [tree_flatten(output) for output in outputs]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [_merge_leaf(column, sizes, batch_dim) for column in columns]
    return tree_unflatten(leaves, flat[0][1])


def _merge_leaf(column: Sequence[Any], sizes: Sequence[int], batch_dim: int) -> Any:
    first = column[0]
    if not isinstance(first, torch.Tensor) or len(column) == 1:
        return first
    if first.dim() == 0:
        weighted = sum(x.double() * n for x, n in zip(column, sizes, strict=True))
        return (weighted / sum(sizes)).to(first.dtype)
    if first.dim() > batch_dim and all(
        x.shape[batch_dim] == n for x, n in zip(column, sizes, strict=True)
    ):
        return torch.cat(list(column), batch_dim)
    if all(torch.equal(first, other) for other in column[1:]):
        return first
    raise ValueError(
        f"output: given shapes {[tuple(x.shape) for x in column]} for micro-batches of "
        f"{list(sizes)} samples, allowed: the batch in dimension {batch_dim} (batch_dim), so that "
        "they can be joined"
    )
