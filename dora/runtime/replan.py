"""Plans for those who are left, when nobody else makes one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dora.errors import InfeasiblePlanError
from dora.partition import Chain
from dora.runtime.checks import check_plan, memory_bytes
from dora.spec import Plan, Replica, Stage

# Device -> bytes that a plan needs on it, and those that it has.
Needs = Callable[[Plan, str], int]


class Policy(NamedTuple):
    """What to do after a loss.

    Attributes:
        snapshot_interval: Optimizer steps between snapshots; 0 takes none.
        replan: Returns the plan without the devices that are gone; None finds one.
        bank: Plans to try first.
        rescue_dir: Where to write what is left when it is not enough.
    """

    snapshot_interval: int
    replan: Callable[[tuple[str, ...]], Plan] | None
    bank: tuple[Plan, ...]
    rescue_dir: Path


def num_seats(plan: Plan, world_size: int, policy: Policy | None) -> int:
    """Returns how many ranks there may be: those of a job that goes on may come later."""
    return world_size if policy is None else max(world_size, len(plan.devices))


def choose_plan(
    plan: Plan, chain: Chain, gone: tuple[str, ...], limits: Mapping[str, int], policy: Policy
) -> Plan:
    """Returns the plan to go on with.

    Args:
        plan: The current one; stays if it uses none of the devices that are gone.
        chain: The model.
        gone: Devices.
        limits: Device -> bytes that it has.
        policy: The user's wishes.

    Raises:
        InfeasiblePlanError: There is none.
    """
    rank_of = {name: rank for rank, name in enumerate(plan.devices)}
    chosen = plan
    if not is_without(plan, gone) and policy.replan is not None:
        chosen = policy.replan(gone)
    elif not is_without(plan, gone):
        chosen = plan_without(
            plan,
            gone,
            policy.bank,
            need_bytes=lambda candidate, device: memory_bytes(candidate, chain, rank_of[device]),
            limit_bytes=limits.__getitem__,
        )
    check_plan(chosen, chain, len(plan.devices))
    if not is_without(chosen, gone):
        raise InfeasiblePlanError(f"plan: given by replan{gone!r}, uses a device that is gone")
    return chosen


def is_without(plan: Plan, lost: Collection[str]) -> bool:
    """Tells whether a plan uses none of the lost devices."""
    return not any(r.device in lost for stage in plan.stages for r in stage.replicas)


def plan_without(
    plan: Plan,
    lost: Collection[str],
    bank: Sequence[Plan],
    *,
    need_bytes: Needs,
    limit_bytes: Callable[[str], int],
) -> Plan:
    """Returns a plan that avoids the lost devices and fits the memory of the others.

    The first of the bank that does; else the current plan with a replica fewer, with a device that
    was left out in place of the lost one, or with its blocks given to the neighbours.

    Args:
        plan: The current one.
        lost: Devices that are gone.
        bank: Plans to try first, the best first.
        need_bytes: Of a plan on a device.
        limit_bytes: Of a device.

    Raises:
        InfeasiblePlanError: Nothing fits.
    """

    def excess(candidate: Plan) -> float:
        """Returns by which factor the fullest device is filled."""
        used = {r.device for stage in candidate.stages for r in stage.replicas}
        return max(need_bytes(candidate, d) / limit_bytes(d) for d in used)

    for candidate in bank:
        if is_without(candidate, lost) and excess(candidate) <= 1:
            return candidate
    made = sorted(_repaired(plan, lost), key=excess)
    if not made or excess(made[0]) > 1:
        raise InfeasiblePlanError(
            f"plan: without {', '.join(sorted(lost))} the model does not fit the memory of the "
            "devices that are left"
        )
    return made[0]


def _repaired(plan: Plan, lost: Collection[str]) -> Iterator[Plan]:
    """Yields the ways to do without the lost devices, one stage after the other."""
    broken = next((s for s in plan.stages if any(r.device in lost for r in s.replicas)), None)
    if broken is None:
        yield plan
        return
    left = [replica for replica in broken.replicas if replica.device not in lost]
    for changed in [_with_replicas(plan, broken, left)] if left else _emptied(plan, broken, lost):
        yield from _repaired(changed, lost)


def _emptied(plan: Plan, stage: Stage, lost: Collection[str]) -> Iterator[Plan]:
    used = {r.device for other in plan.stages for r in other.replicas}
    idle = [device for device in plan.devices if device not in used and device not in lost]
    for device in idle:
        yield _with_replicas(plan, stage, [Replica(device=device)])
    if not idle and len(plan.stages) > 1:
        for split in _splits(plan, stage):
            yield _without_stage(plan, stage, split)


def _splits(plan: Plan, stage: Stage) -> Iterable[int]:
    """Yields the first block that the next stage takes over."""
    if stage.index == 0:
        return [stage.first_block]
    if stage.index == len(plan.stages) - 1:
        return [stage.last_block + 1]
    return range(stage.first_block, stage.last_block + 2)


def _with_replicas(plan: Plan, stage: Stage, replicas: Sequence[Replica]) -> Plan:
    total = sum(replica.share for replica in replicas)
    shared = tuple(r.model_copy(update={"share": r.share / total}) for r in replicas)
    stages = [*plan.stages]
    stages[stage.index] = stage.model_copy(update={"replicas": shared})
    return _renewed(plan, stages, plan.codecs, plan.gradient_codecs)


def _without_stage(plan: Plan, stage: Stage, split: int) -> Plan:
    stages: list[Stage] = []
    for other in plan.stages:
        blocks = other.first_block, other.last_block
        if other.index == stage.index - 1:
            blocks = other.first_block, split - 1
        if other.index == stage.index + 1:
            blocks = split, other.last_block
        if other.index != stage.index:
            fields = {"index": len(stages), "first_block": blocks[0], "last_block": blocks[1]}
            stages.append(other.model_copy(update=fields))
    boundary = max(0, stage.index - 1)
    return _renewed(
        plan,
        stages,
        plan.codecs[:boundary] + plan.codecs[boundary + 1 :],
        plan.gradient_codecs[: stage.index] + plan.gradient_codecs[stage.index + 1 :],
    )


def _renewed(plan: Plan, stages: Sequence[Stage], codecs: object, sums: object) -> Plan:
    """Returns the plan with other stages, without what was computed for the old ones."""
    fields = plan.model_dump(exclude={"routes", "warmup", "cost", "transfers"})
    fields["stages"] = [stage.model_dump() for stage in stages]
    return Plan.model_validate({**fields, "codecs": codecs, "gradient_codecs": sums})
