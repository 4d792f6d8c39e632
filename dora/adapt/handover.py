"""What plans that run in turn, or in another order of transfers, need: memory, phases, an order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf, isfinite

from dora.adapt.forecast import Predictor, block_bytes, under
from dora.adapter import Memory, Toll, placed
from dora.adapter.migrate import BARRIER_S
from dora.judge import case_of, play
from dora.planner.layouts import costs_of, layout_of
from dora.scheduler import schedule_network
from dora.scheduler.network import CLEAR_GAIN
from dora.spec import Conditions, Plan

# Handing weights over and back may take that share of a cycle's time.
TOLL_SHARE = 0.02
MOST_STEPS = 2000
# Simulations of one step, some milliseconds in all.
_PLAYS = 20


def memory_of(predict: Predictor) -> Callable[[Sequence[Plan]], Memory]:
    """Returns what tells whether plans fit together: weights of all, and the work of one."""
    sizes = block_bytes(predict.profile, predict.workload)
    capacity = {d.name: float(d.memory_bytes) for d in predict.cluster.devices}

    def memory(plans: Sequence[Plan]) -> Memory:
        held = [placed(plan) for plan in plans]
        working = [
            {
                name: max(need - sum(sizes[b] for b in mine.get(name, ())), 0.0)
                for name, need in predict.memory_bytes(plan).items()
            }
            for plan, mine in zip(plans, held, strict=True)
        ]
        return Memory(held, working, sizes, capacity)

    return memory


def fit_together(plans: Sequence[Plan], predict: Predictor) -> bool:
    """Returns whether every device has the memory for all of them, each with all that it needs."""
    needs = [predict.memory_bytes(plan) for plan in plans]
    return all(
        sum(need.get(device.name, 0.0) for need in needs) <= device.memory_bytes
        for device in predict.cluster.devices
    )


def _pause_s(predict: Predictor) -> float:
    """Returns the longest that handing over may take: all blocks, over the slowest medium."""
    slowest = min((m.rate_bytes_per_s for m in predict.cluster.media), default=inf)
    return BARRIER_S + sum(block_bytes(predict.profile, predict.workload)) / slowest


def cycle_of(predict: Predictor) -> int:
    """Returns the steps of a cycle of two phases whose pauses take no more than `TOLL_SHARE`."""
    usual_s = predict.usual_s
    if not isfinite(usual_s):
        return MOST_STEPS
    return min(max(ceil(2 * _pause_s(predict) / (TOLL_SHARE * usual_s)), 2), MOST_STEPS)


def toll_of(predict: Predictor, cycle: int) -> Toll:
    """Returns the pauses of a cycle per step: of the time bound, and the joules of waiting."""
    pauses_s = 2 * _pause_s(predict)
    idle_w = sum(device.idle_w for device in predict.cluster.devices)
    is_energy = predict.qoe.objective == "energy"
    value = pauses_s * idle_w if is_energy else pauses_s
    usual_s = predict.usual_s
    return Toll(pauses_s / (cycle * usual_s) if isfinite(usual_s) else 0.0, value / cycle)


def reordered(plan: Plan, predict: Predictor, now: Conditions) -> Plan | None:
    """Returns the plan with transfers in the order that is best now; None if that gains little."""
    training = predict.workload.kind == "train"
    case = case_of(predict.profile, under(predict.cluster, now), predict.workload, predict.qoe)
    known = case.setting_of(plan.num_microbatches)
    costs = costs_of(layout_of(plan, known), known, plan)
    bare = plan.model_copy(update={"transfers": ()})
    found = schedule_network(bare, costs, case.cluster, training=training, max_plays=_PLAYS)
    other = plan.model_copy(update={"transfers": found.transfers})
    gain = 1 - play(other, case).makespan_s / play(plan, case).makespan_s
    return other if gain > CLEAR_GAIN else None
