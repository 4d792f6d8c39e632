"""Finds the best plans over splits, subsets and orders of devices, replicas, windows and modes.

Two phases. First, chains of device groups are enumerated in the order of what they take at least
on a network where only the total load of each shared medium counts (`chains`). Then the promising
ones are played on the contended network, each transfer as urgent as its tail is long (`predict`),
and the best of them improved in small steps (`improve`).

The search ends when no chain is left whose bound is below the best plan, which proves that no other
chain is better, or when its effort is spent; `SearchResult.gap` bounds what is left to gain. Effort
is counted in played actions, not in seconds: the same input and seed give the same plans.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from dora.errors import InfeasiblePlanError, SpecError
from dora.planner.chains import MAX_DEVICES
from dora.planner.cost import microbatch_size
from dora.planner.exploration import MAX_COMPLETE, OBJECTIVES, TOLERANCE, Exploration
from dora.planner.layouts import costs_of
from dora.planner.limits import Limit, at_percentile, broken, limits
from dora.planner.predict import Prediction, setting
from dora.planner.select import Candidate, best_single, kept, nearest_text, rejections, to_plans
from dora.scheduler import schedule_network
from dora.scheduler.network import CLEAR_GAIN
from dora.simulator import simulate
from dora.spec import Cluster, ModelProfile, Plan, QoE, Workload

# Shares of the effort for chains and improving by the objective, then by the other one; the front
# between them gets the rest, and what the others did not need.
EFFORT_SHARES = (0.35, 0.25, 0.1, 0.05)

# Times that the order of a plan's transfers is tried; the order by tails is rarely beaten.
NETWORK_PLAYS = 20


class SearchResult(NamedTuple):
    """Everything that a search found out.

    Attributes:
        plans: Within the QoE, none worse than another in time, energy and memory; best first, but
            one device before several that are better by less than `CLEAR_GAIN`.
        rejected: (candidate, reason), nearest first.
        best_single: Best plan on one device, even if it breaks the QoE; None if none has the
            memory for the model.
        problem: Why `plans` is empty, in one line; '' otherwise.
        is_optimal: No chain of groups at the windows and shares tried is better than the best, as
            far as the search tells them apart: each with its transfers by their tails.
        gap: What any of those could still gain at most, as a share of the best one's value. That
            is of its own order of transfers, which is up to `CLEAR_GAIN` behind that by tails.
        num_placements: Chains of device groups that were bounded.
        num_evaluated: Layouts that were played.
    """

    plans: list[Plan]
    rejected: list[tuple[str, str]]
    best_single: Plan | None
    problem: str
    is_optimal: bool
    gap: float
    num_placements: int
    num_evaluated: int


def plan(
    profile: ModelProfile, cluster: Cluster, workload: Workload, qoe: QoE | None = None
) -> list[Plan]:
    """Returns the plans worth considering, best first, each with its predicted cost.

    ::

        best, *others = plan(profile, cluster, Workload(batch_size=32), QoE(step_s=0.5))

    Args:
        profile: With timings for every device; `dora.catalog.scale_profile` adds missing ones.
        cluster: Devices and links; any device may be left out of a plan.
        workload: Without `num_microbatches`, divisors of the batch are tried.
        qoe: Hard bounds and the objective; None minimises time.

    Raises:
        ValueError: A timing is missing.
        SpecError: The QoE has a bound that can not be judged.
        InfeasiblePlanError: No plan meets the bounds; names the bound and the nearest plan.
    """
    result = search(profile, cluster, workload, qoe)
    if not result.plans:
        raise InfeasiblePlanError(result.problem)
    return result.plans


def search(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    effort_s: float | None = None,
    seed: int = 0,
) -> SearchResult:
    """Returns the plans as `plan` does, and what became of the other candidates.

    An unreachable QoE is no error here: `plans` is empty and `problem` says why.

    Args:
        profile: See `plan`.
        cluster: See `plan`.
        workload: See `plan`.
        qoe: See `plan`.
        effort_s: About the seconds to spend on playing layouts; None: see
            `default_effort_s`.
        seed: Of the order in which changes are tried.

    Raises:
        ValueError: A timing is missing.
        SpecError: The QoE has a bound that can not be judged, or there are too many devices.
    """
    if len(cluster.devices) > MAX_DEVICES:
        raise SpecError(
            f"cluster: given {len(cluster.devices)} devices, allowed: at most {MAX_DEVICES}"
        )
    qoe = qoe or QoE()
    wanted = limits(workload, qoe)
    network = at_percentile(cluster, qoe.percentile) if qoe.percentile != 50 else cluster
    choices = microbatch_choices(workload)
    first = setting(profile, network, workload, choices[0])
    rest = (setting(profile, network, workload, m, like=first) for m in choices[1:])
    settings = [first, *rest]
    effort_s = default_effort_s(len(cluster.devices)) if effort_s is None else effort_s
    run = Exploration(settings, network, wanted, qoe.max_accuracy_loss, seed)
    run.walk_whole()
    stops = [effort_s * sum(EFFORT_SHARES[: i + 1]) for i in range(len(EFFORT_SHARES))]
    floor = run.walk_chains(qoe.objective, stops[0])
    run.improve(qoe.objective, stops[1])
    for other in OBJECTIVES:
        if other != qoe.objective:
            run.walk_chains(other, stops[2])
            run.improve(other, stops[3])
    run.walk_front(effort_s)
    return _result(run, qoe.objective, floor)


def _result(run: Exploration, objective: str, floor: float) -> SearchResult:
    network = run.cluster
    names = [device.name for device in network.devices]
    single = best_single(run.found, objective)
    chosen = kept(run.found, objective, single)
    problem = "" if chosen else nearest_text(run.found, run.unfit)
    best = chosen[0].value(objective) if chosen else inf
    is_optimal = bool(chosen) and floor >= best * (1 - TOLERANCE)
    plans = [
        guarded(scheduled(plan, candidate, network, run.wanted), run.max_loss)
        for plan, candidate in zip(to_plans(chosen, names), chosen, strict=True)
    ]
    plans.sort(key=lambda plan: _merit(plan, objective))  # the order of transfers may change it
    reached = min((_value(plan, objective) for plan in plans), default=0.0)
    return SearchResult(
        plans=plans,
        rejected=rejections(
            run.found, chosen, run.unfit, run.unwalked, network.devices, is_optimal=is_optimal
        ),
        best_single=to_plans([single], names)[0] if single else None,
        problem=problem,
        is_optimal=is_optimal,
        gap=max(0.0, 1 - floor / reached) if reached else 0.0,
        num_placements=run.num_chains,
        num_evaluated=len(run.seen),
    )


def guarded(plan: Plan, max_loss: float) -> Plan:
    """Returns a plan that tells the runtime how much its codecs may cost, if it has any."""
    if not plan.codecs and not plan.gradient_codecs:
        return plan
    return plan.model_copy(update={"max_accuracy_loss": max_loss})


def _value(plan: Plan, objective: str) -> float:
    """Returns seconds or joules."""
    assert plan.cost is not None
    return plan.cost.makespan_s if objective == "time" else plan.cost.energy_j


def _merit(plan: Plan, objective: str) -> float:
    """Returns what plans are sorted by: several devices have to be worth their trouble.

    They wait for each other, and each may fail; a gain that small is not seen on real devices.
    """
    is_alone = len(plan.stages) == len(plan.stages[0].replicas) == 1
    return _value(plan, objective) * (1 - CLEAR_GAIN if is_alone else 1)


def scheduled(
    plan: Plan, candidate: Candidate, cluster: Cluster, wanted: tuple[Limit, ...] = ()
) -> Plan:
    """Returns a plan with its transfers in the order that the network scheduler found for them.

    By consumer, unless that takes so much longer than another order that a limit breaks.
    """
    known = candidate.known
    if len(plan.stages) == 1 or known.decode is not None:
        return plan
    found = _ordered(plan, candidate, cluster, CLEAR_GAIN)
    if broken(wanted, candidate.layout, _delayed(candidate, found), known):
        found = _ordered(plan, candidate, cluster, 0.0)
    return found


def _ordered(plan: Plan, candidate: Candidate, cluster: Cluster, clear_gain: float) -> Plan:
    known = candidate.known
    costs = costs_of(candidate.layout, known, plan)
    schedule = schedule_network(
        plan,
        costs,
        cluster,
        training=known.training,
        max_plays=NETWORK_PLAYS,
        clear_gain=clear_gain,
    )
    timeline = simulate(plan, schedule, costs, cluster)
    assert plan.cost is not None
    better = {"makespan_s": timeline.makespan_s, "energy_j": timeline.energy_j}
    cost = plan.cost.model_copy(update=better)
    return plan.model_copy(update={"transfers": schedule.transfers, "cost": cost})


def _delayed(candidate: Candidate, plan: Plan) -> Prediction:
    """Returns the prediction of a candidate that takes as long as the plan, waiting meanwhile."""
    before, devices = candidate.prediction, candidate.known.devices
    more_s = _value(plan, "time") - before.makespan_s
    energy_j = (
        joules + devices[d].idle_w * more_s
        for d, joules in zip(candidate.layout.devices, before.energy_j, strict=True)
    )
    return before._replace(makespan_s=_value(plan, "time"), energy_j=tuple(energy_j))


def default_effort_s(num_devices: int) -> float:
    """Returns what to spend on a search: about a second for a home, fifteen for a campus.

    Of up to `MAX_COMPLETE` devices all chains are at hand, so that playing more of them pays: at
    0.6 one of 317 random problems was not solved, at 1.5 all were (`benchmarks/bench_planner.py`).
    """
    if num_devices <= MAX_COMPLETE:
        return 1.5
    return min(max(0.12 * num_devices, 0.6), 15.0)


def microbatch_choices(workload: Workload) -> list[int]:
    """Returns the workload's number of micro-batches, or divisors of the batch near 1, 2, 4..64."""
    if workload.num_microbatches is not None:
        return [workload.num_microbatches]
    size = microbatch_size(workload, 1)
    most = 3 if workload.kind == "generate" else 6
    divisors = [m for m in range(1, min(size, 64) + 1) if size % m == 0]
    return sorted({max(m for m in divisors if m <= 2**power) for power in range(most + 1)})
