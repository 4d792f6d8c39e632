"""Which rank holds which tensor of the module, and how a rank drops the ones it does not run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dora.partition import Chain
from dora.spec import Plan


def holders(users: Mapping[str, tuple[int, ...]], plan: Plan) -> dict[str, tuple[int, ...]]:
    """Returns the ranks, ascending, that run a block which uses each tensor.

    Args:
        users: Tensor name -> blocks, as in `Chain.parameters.blocks`.
        plan: The placement.
    """
    ranks_of_block = {
        block: plan.ranks(stage.index)
        for stage in plan.stages
        for block in range(stage.first_block, stage.last_block + 1)
    }
    return {
        name: tuple(sorted({rank for block in blocks for rank in ranks_of_block[block]}))
        for name, blocks in users.items()
    }


def drop_remote(chain: Chain, local: set[str]) -> None:
    """Frees every parameter and buffer of `chain` that is not named in `local`.

    Each becomes one zero, repeated: code between blocks may still ask for its shape, dtype or
    device, and may compute with it on the way to a result that is thrown away.
    """
    for first, names in {**chain.parameters.names, **chain.buffers.names}.items():
        if first in local:
            continue
        for name in names:
            path, _, attribute = name.rpartition(".")
            _replace(chain.module.get_submodule(path), attribute)


def _replace(owner: nn.Module, attribute: str) -> None:
    tensor = getattr(owner, attribute)
    zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(zero, requires_grad=tensor.requires_grad)
    else:
        owner._buffers[attribute] = zero
