"""Gives replicas that became faster more micro-batches: no weights move."""

from __future__ import annotations

from collections.abc import Mapping

from dora.spec import Plan, Stage


def reshared(plan: Plan, factors: Mapping[str, float]) -> Plan | None:
    """Returns the plan with shares that follow the devices' speeds, None if none changes.

    Args:
        plan: With the shares that fit its devices as given.
        factors: Speed of each device over what it was given with.
    """
    n = plan.num_microbatches
    stages = tuple(_reshared(stage, factors, n) for stage in plan.stages)
    if stages == plan.stages:
        return None
    fresh = plan.model_dump(exclude={"stages", "routes", "warmup", "transfers", "cost"})
    try:
        return Plan(stages=stages, **fresh)
    except ValueError:  # shares that ask for deeper windows than descend along the stages
        return None


def _reshared(stage: Stage, factors: Mapping[str, float], n: int) -> Stage:
    if len(stage.replicas) == 1 or n < len(stage.replicas):
        return stage
    wanted = [r.share * max(factors.get(r.device, 1.0), 1e-3) for r in stage.replicas]
    counts = _rounded([n * w / sum(wanted) for w in wanted], n)
    if counts == _rounded([n * r.share for r in stage.replicas], n):
        return stage
    replicas = tuple(
        r.model_copy(update={"share": c / n}) for r, c in zip(stage.replicas, counts, strict=True)
    )
    return stage.model_copy(update={"replicas": replicas})


def _rounded(wanted: list[float], n: int) -> list[int]:
    """Returns whole numbers of at least 1 that sum to n, by largest remainders."""
    counts = [max(int(w), 1) for w in wanted]
    while sum(counts) > n:
        most = [i for i, c in enumerate(counts) if c > 1]
        counts[max(most, key=lambda i: counts[i] - wanted[i])] -= 1
    order = sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i])
    for k in range(n - sum(counts)):
        counts[order[k % len(order)]] += 1
    return counts
