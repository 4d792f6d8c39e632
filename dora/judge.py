"""Executes plans alike, whoever made them, and says what they really take on one cluster.

What a planner believes about its plan does not count here: a plan is checked against the memory of
the devices, played by the simulator on the cluster at the QoE's percentile, and judged by the QoE's
bounds. It runs under both disciplines of the network, priority by tails and fair sharing, and in
the order of its own transfers if it has some; the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

from dora.planner.layouts import cost, costs_of, layout_of
from dora.planner.limits import Limit, at_percentile, broken, limits
from dora.planner.predict import (
    Layout,
    Prediction,
    Setting,
    as_step,
    evaluate,
    is_linked,
    memory_share,
    setting,
)
from dora.scheduler import build_schedule
from dora.simulator import simulate
from dora.spec import Cluster, ModelProfile, Plan, QoE, Spec, Timeline, Workload


class Case(NamedTuple):
    """What plans are judged by: the cluster at the QoE's percentile, and the bounds."""

    cluster: Cluster
    workload: Workload
    qoe: QoE
    wanted: tuple[Limit, ...]
    setting_of: Callable[[int], Setting]


class Entry(Spec):
    """What one planner answers, and what its plan takes.

    Attributes:
        plan: With its true cost if it can run; None if the planner finds none.
        problem: Why nothing can run; '' otherwise.
        discipline: How the network is shared where the plan is fastest.
        broken: Bounds that it breaks and the values that break them.
        excess: By which factor it breaks the worst one; at most 1 if it keeps all.
        gain: Its value of the objective over that of Dora's plan, if both can run.
    """

    planner: str
    plan: Plan | None = None
    problem: str = ""
    discipline: Literal["priority", "fair", "scheduled"] = "priority"
    broken: tuple[str, ...] = ()
    excess: float = 0.0
    planning_s: float = 0.0
    gain: float | None = None

    @property
    def can_run(self) -> bool:
        """Whether there is a plan, and it fits the memory and the links."""
        return not self.problem

    @property
    def meets_qoe(self) -> bool:
        """Whether it can run and keeps every bound."""
        return self.can_run and not self.broken

    def value(self, objective: str) -> float:
        """Returns the seconds or joules of a plan that can run."""
        assert self.plan is not None and self.plan.cost is not None
        given = self.plan.cost
        return given.makespan_s if objective == "time" else given.energy_j


def case_of(profile: ModelProfile, cluster: Cluster, workload: Workload, qoe: QoE) -> Case:
    """Returns what plans are judged by."""
    network = at_percentile(cluster, qoe.percentile) if qoe.percentile != 50 else cluster

    @lru_cache(maxsize=None)
    def setting_of(num_microbatches: int) -> Setting:
        return setting(profile, network, workload, num_microbatches)

    return Case(network, workload, qoe, limits(workload, qoe), setting_of)


def judge(entry: Entry, case: Case, *, fair_only: bool = False) -> Entry:
    """Returns an entry with the true cost of its plan, or with the reason why it can not run.

    Args:
        entry: With a plan.
        case: What it is judged by.
        fair_only: Takes a network that knows no priorities.
    """
    assert entry.plan is not None
    known = case.setting_of(entry.plan.num_microbatches)
    layout = layout_of(entry.plan, known)
    if not is_linked(layout.groups, known):
        return entry.model_copy(update={"problem": "no link between devices that exchange data"})
    step = as_step(layout, known, known.costs)
    share, text = memory_share(layout, known, step)
    if share > 1:
        return entry.model_copy(update={"problem": text})
    prediction = evaluate(layout, known, step)
    times = {"fair": step.price(known.network, "fair").makespan_s}
    if not fair_only:
        times["priority"] = prediction.ttft_s or prediction.makespan_s
        if entry.plan.transfers and known.decode is None:
            times["scheduled"] = play(entry.plan, case).makespan_s
    # Of equal ones the plainest.
    name = min(times, key=lambda key: (float(f"{times[key]:.9g}"), key != "priority"))
    prediction = _ending_at(times[name], prediction, layout, known)
    failed = broken(case.wanted, layout, prediction, known)
    return entry.model_copy(
        update={
            "plan": entry.plan.model_copy(update={"cost": cost(layout, prediction, known)}),
            "discipline": name,
            "broken": tuple(f"{limit}: {value:.4g}" for limit, value in failed),
            "excess": max((limit.excess(value) for limit, value in failed), default=0.0),
        }
    )


def play(plan: Plan, case: Case, *, discipline: str = "priority") -> Timeline:
    """Returns what happens in one step or request of a plan, in its own order of transfers.

    Args:
        plan: With devices of the case's cluster.
        case: What is known.
        discipline: 'fair' for transports without priorities.
    """
    known = case.setting_of(plan.num_microbatches)
    schedule = build_schedule(plan, training=known.training)
    if plan.transfers:
        schedule = schedule.model_copy(update={"transfers": plan.transfers})
    costs = costs_of(layout_of(plan, known), known, plan)
    return simulate(plan, schedule, costs, case.cluster, discipline=discipline)


def _ending_at(
    makespan_s: float, prediction: Prediction, layout: Layout, known: Setting
) -> Prediction:
    """Returns the prediction of a step, or prompt, that ends at another time: only waiting differs.

    Every device computes, sends and receives as much as before.
    """
    more_s = makespan_s - (prediction.ttft_s or prediction.makespan_s)
    energy = zip(layout.devices, prediction.energy_j, strict=True)
    return prediction._replace(
        makespan_s=prediction.makespan_s + more_s,
        ttft_s=prediction.ttft_s + more_s if prediction.ttft_s else 0.0,
        energy_j=tuple(joules + more_s * known.devices[d].idle_w for d, joules in energy),
    )
