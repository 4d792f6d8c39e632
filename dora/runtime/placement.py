"""Which rank holds which tensor of the module, and how a rank drops the ones it does not run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from dora.partition import Chain
from dora.spec import Plan


def holders(users: Mapping[str, tuple[int, ...]], *plans: Plan) -> dict[str, tuple[int, ...]]:
    """Returns the ranks, ascending, that run a block which uses each tensor, under any plan.

    Args:
        users: Tensor name -> blocks, as in `Chain.parameters.blocks`.
        plans: Placements that are held together.
    """
    ranks_of_block: dict[int, set[int]] = {}
    for plan in plans:
        for stage in plan.stages:
            for block in range(stage.first_block, stage.last_block + 1):
                ranks_of_block.setdefault(block, set()).update(plan.ranks(stage.index))
    return {
        name: tuple(sorted({rank for block in blocks for rank in ranks_of_block[block]}))
        for name, blocks in users.items()
    }


def drop_remote(chain: Chain, local: Collection[str]) -> None:
    """Frees every parameter and buffer of `chain` that is not named in `local`.

    Each becomes one zero, repeated: code between blocks may still ask for its shape, dtype or
    device, and may compute with it on the way to a result that is thrown away.
    """
    for first, names in {**chain.parameters.names, **chain.buffers.names}.items():
        if first not in local:
            for name in names:
                owner, attribute = _owner(chain, name)
                tensor = getattr(owner, attribute)
                zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
                setattr(owner, attribute, _like(tensor, zero.expand(tensor.shape)))


def put(chain: Chain, first: str, value: torch.Tensor) -> torch.Tensor:
    """Puts a value in the place of a tensor that was dropped, under all of its names.

    Returns:
        The new parameter or buffer.
    """
    names = {**chain.parameters.names, **chain.buffers.names}[first]
    owner, attribute = _owner(chain, names[0])
    placed = _like(getattr(owner, attribute), value)
    for name in names:
        owner, attribute = _owner(chain, name)
        setattr(owner, attribute, placed)
    return placed


def _owner(chain: Chain, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return chain.module.get_submodule(path), attribute


def _like(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns `value` as what `old` is: a buffer, or a parameter with the same marks on it."""
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new
