"""Plans for tests, written as the replica shares of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dora.spec import Plan, Replica, Stage


def make_plan(
    num_blocks: int,
    shares: Sequence[Sequence[float]],
    *,
    cuts: Sequence[int] | None = None,
    idle: int = 0,
    num_microbatches: int = 4,
    **fields: Any,
) -> Plan:
    """Returns a plan with one stage per entry of `shares`.

    Args:
        num_blocks: Blocks of the model.
        shares: Share of each replica, by stage; devices are numbered in this order.
        cuts: First block of each stage after the first; None cuts evenly.
        idle: Devices that are left out, last in rank order.
        num_microbatches: Per step.
        fields: Further fields of Plan.
    """
    n = len(shares)
    edges = [0, *(cuts or [round(i * num_blocks / n) for i in range(1, n)]), num_blocks]
    names = iter(f"d{i}" for i in range(100))
    stages = tuple(
        Stage(
            index=i,
            first_block=edges[i],
            last_block=edges[i + 1] - 1,
            replicas=tuple(Replica(device=next(names), share=s / sum(row)) for s in row),
        )
        for i, row in enumerate(shares)
    )
    devices = tuple(f"d{i}" for i in range(sum(len(row) for row in shares) + idle))
    return Plan(devices=devices, stages=stages, num_microbatches=num_microbatches, **fields)
