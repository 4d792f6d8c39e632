"""Checks a plan against the job, the model and the devices before anything is moved."""

from __future__ import annotations

import psutil

from dora.errors import InfeasiblePlanError, ProtocolError
from dora.partition import Chain
from dora.runtime.agreement import Agreement
from dora.runtime.boundary import digest
from dora.runtime.placement import holders
from dora.spec import Plan


def check_plan(plan: Plan, chain: Chain, world_size: int) -> None:
    """Raises InfeasiblePlanError if the plan is for other devices or blocks."""
    if len(plan.devices) != world_size:
        raise InfeasiblePlanError(
            f"plan: made for {len(plan.devices)} devices {list(plan.devices)}, given {world_size} "
            f"ranks: start torchrun with --nproc-per-node or --nnodes for {len(plan.devices)}"
        )
    if plan.num_blocks != chain.num_blocks:
        raise InfeasiblePlanError(
            f"plan: covers {plan.num_blocks} blocks, given a model of {chain.num_blocks}: plan it "
            "again for this model"
        )


def check_agreed(
    plan: Plan, chain: Chain, rank: int, memory_limit_bytes: int | None, agreement: Agreement
) -> None:
    """Compares plan and memory of all ranks, so that all of them fail together.

    Raises:
        ProtocolError: Ranks hold different plans.
        InfeasiblePlanError: A stage does not fit its device.
    """
    limit = memory_limit_bytes or psutil.virtual_memory().total
    row = [digest(plan.to_json()) >> 12, memory_bytes(plan, chain, rank), limit]
    rows = agreement.rows(row, "check of the plan")
    table = zip(agreement.members, rows, strict=True)
    for other, (plan_digest, need_bytes, limit_bytes) in table:
        if plan_digest != rows[0][0]:
            raise ProtocolError(
                f"plan: rank {other} was given another plan than rank 0, allowed: the same on all"
            )
        if need_bytes > limit_bytes:
            raise InfeasiblePlanError(
                f"plan: device {plan.devices[other]} (rank {other}) needs at least "
                f"{need_bytes / 1e6:.1f} MB, allowed {limit_bytes / 1e6:.1f} MB: give it fewer "
                "blocks or raise memory_limit_bytes"
            )


def memory_bytes(plan: Plan, chain: Chain, rank: int) -> int:
    """Returns the plan's predicted peak of a device, or its parameters and gradients."""
    for memory in plan.cost.memory if plan.cost else ():
        if memory.device == plan.devices[rank]:
            return memory.peak_bytes
    named = dict(chain.module.named_parameters(remove_duplicate=False))
    return sum(
        named[name].nbytes * (2 if named[name].requires_grad else 1)
        for name, ranks in holders(chain.parameters.blocks, plan).items()
        if rank in ranks
    )
