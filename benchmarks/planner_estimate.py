"""What each freedom of a plan is worth on a home network: the estimate of the design, repeated.

Random clusters of four devices on one Wi-Fi channel, six uneven blocks, training with six
micro-batches. Every plan is played on the true, contended cluster. Gains are ratios of step times:
above 1 means that the planner's choice is the faster one.
"""

from __future__ import annotations

from typing import NamedTuple

from planner_brute import Brute
from planner_instances import Instance, as_if_private, home

from dora.planner import predict, search, step_costs
from dora.planner.layouts import layouts
from dora.scheduler import build_schedule, lower_bound_s, schedule_network
from dora.scheduler.network import first_come
from dora.simulator import compile_step, simulate
from dora.spec import BoundaryCodec, Cluster, Plan, QoE

# The default for four devices; with 0.1 one choice in forty was worse than a contention-blind one.
EFFORT_S = 0.4
MAX_LOSS = 0.11
CODEC = BoundaryCodec(forward="int4", backward="int4")
# Plays of the network scheduler for one plan.
MAX_PLAYS = 60

LABELS = {
    "over_blind": "choice, over the contention-blind one",
    "over_unrelayed": "choice, over one blind to the relay too",
    "over_single": "choice, over the best single device",
    "over_both": "choice, over the better of both",
    "tails_over_first_come": "order alone: tails over first come",
    "tails_over_fair": "order alone: tails over fair sharing",
    "scheduler_over_first_come": "order alone: scheduler over first come",
    "depth": "depth alone",
    "microbatches": "number of micro-batches alone",
    "codecs": "codecs alone",
    "together": "depth, micro-batches and codecs together",
}


class Times(NamedTuple):
    """Step times of one plan by the order of its transfers.

    Attributes:
        least_s: What no order can beat.
    """

    tails_s: float
    first_come_s: float
    fair_s: float
    scheduler_s: float
    least_s: float


def gains(seed: int) -> dict[str, float]:
    """Returns the gains on one cluster, by the keys of `LABELS`, its ratio, and the order's gap."""
    one, ratio = home(seed)
    aware, single = choose(one)
    aware_s, single_s = seconds(aware), seconds(single)
    blind_s = believing_s(one, as_if_private(one.cluster))
    unrelayed_s = believing_s(one, as_if_private(one.cluster, relayed=False))
    order = orders(one, aware)
    free = one._replace(workload=one.workload.model_copy(update={"num_microbatches": None}))
    together_s = seconds(choose(free, QoE(max_accuracy_loss=MAX_LOSS))[0])
    shallow_s = exact_s(one)
    return {
        "over_blind": blind_s / aware_s,
        "over_unrelayed": unrelayed_s / aware_s,
        "over_single": single_s / aware_s,
        "over_both": min(blind_s, single_s) / aware_s,
        "tails_over_first_come": order.first_come_s / order.tails_s,
        "tails_over_fair": order.fair_s / order.tails_s,
        "scheduler_over_first_come": order.first_come_s / order.scheduler_s,
        "depth": shallow_s / aware_s,
        "microbatches": shallow_s / exact_s(free),
        "codecs": shallow_s / exact_s(one, codec=CODEC),
        "together": shallow_s / together_s,
        "ratio": ratio,
        "gap": order.scheduler_s / order.least_s - 1,
        "num_stages": len(aware.stages),
    }


def choose(one: Instance, qoe: QoE | None = None) -> tuple[Plan, Plan]:
    """Returns the planner's choice and its best single device."""
    found = search(one.profile, one.cluster, one.workload, qoe, effort_s=EFFORT_S)
    assert found.best_single is not None, "memory does not limit these clusters"
    return found.plans[0], found.best_single


def believing_s(one: Instance, cluster: Cluster) -> float:
    """Returns the true step time of what is chosen for another cluster."""
    plan, _ = choose(one._replace(cluster=cluster))
    return seconds(predict(one.profile, one.cluster, one.workload, plan))


def seconds(plan: Plan) -> float:
    assert plan.cost is not None
    return plan.cost.makespan_s


def exact_s(one: Instance, codec: BoundaryCodec | None = None) -> float:
    """Returns the least step time of all plans with the shallowest windows."""
    brute = Brute(
        one.profile,
        one.cluster,
        one.workload,
        windows=lambda groups, counts, known: layouts(groups, counts, known)[:1],
        codec=codec,
        max_loss=MAX_LOSS if codec else 0.0,
    )
    return brute.least("time")


def orders(one: Instance, plan: Plan) -> Times:
    """Plays one plan with different orders of its transfers."""
    costs = step_costs(one.profile, one.cluster, one.workload, plan)
    schedule = build_schedule(plan)
    compiled = compile_step(plan, schedule, costs, one.cluster)
    compiled.program.prioritise(first_come(compiled))
    first_come_s = compiled.program.play().end_s
    compiled.program.prioritise(compiled.program.priorities())
    tails_s = compiled.program.play().end_s
    fair_s = (
        compile_step(plan, schedule, costs, one.cluster, discipline="fair").program.play().end_s
    )
    decided = schedule_network(plan, costs, one.cluster, max_plays=MAX_PLAYS)
    scheduler_s = simulate(plan, decided, costs, one.cluster).makespan_s
    least_s = lower_bound_s(plan, schedule, costs, one.cluster)
    return Times(tails_s, first_come_s, fair_s, scheduler_s, least_s)
