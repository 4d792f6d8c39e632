"""Plans to choose from while running: the Pareto set, and plans for worlds that may come.

Oobleck (Jang et al., Oobleck: Resilient Distributed Training of Large Models Using Pipeline
Templates, SOSP 2023) keeps templates for every number of machines, so that a failure finds its plan
ready. Here machines differ, so there is one search for each world that is worth preparing for: slow
networks, each device gone, each device slowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import inf

from dora.adapt.forecast import Predictor, scaled_profile, under
from dora.adapt.tally import late_share_at
from dora.adapter.migrate import placed
from dora.adapter.rules import Rules
from dora.adapter.score import unit_of
from dora.planner import search
from dora.spec import Cluster, Conditions, Plan, QoE

# Networks to prepare for, over the given rate: what Wi-Fi falls below a tenth of the time, and next
# to nothing (the rates of benchmarks/traces/SOURCES.md).
SLOW_NETWORKS = (0.3, 0.03)
# Of a device that runs hot or is shared.
SLOW_DEVICE = 0.4
# What `decide` may look at within its 10 ms.
MAX_PLANS = 50


def make_bank(
    predict: Predictor,
    *,
    effort_s: float = 0.3,
    max_worlds: int = 16,
    max_plans: int = MAX_PLANS,
) -> list[Plan]:
    """Returns plans: first what to begin with, then those for the cluster as given.

    A plan that keeps its bounds by a hair breaks them with every other item, since items vary.

    Args:
        predict: Knows profile, cluster, workload and QoE.
        effort_s: Of each search.
        max_worlds: Searches; devices of the best plan are prepared for first.
        max_plans: Of all of them together.
    """
    first = plans_for(predict, Conditions(), effort_s=effort_s)
    found = [first]
    for world in _worlds(predict, first, max_worlds - 1):
        found.append(plans_for(predict, world, effort_s=effort_s))
    plans = _merged(found, max_plans)
    begin = _first(plans, predict)
    return [begin, *(plan for plan in plans if plan is not begin)]


def _first(plans: Sequence[Plan], predict: Predictor) -> Plan:
    """Returns the plan whose items cost least, late ones as the policy counts them."""
    rules = Rules.of(predict.qoe)
    found = {id(plan): predict(plan, Conditions()) for plan in plans}
    unit = unit_of(found, rules.objective)

    def cost(plan: Plan) -> float:
        forecast = found[id(plan)]
        if forecast is None:
            return inf
        value = forecast.value(rules.objective) / unit
        return value + rules.penalty * late_share_at(forecast.worst)

    return min(plans, key=cost)


def plans_for(predict: Predictor, world: Conditions, *, effort_s: float = 0.3) -> list[Plan]:
    """Returns the plans of a search in another world, as plans of the given cluster.

    Where nothing keeps the QoE, the best without its bounds: something has to run.
    """
    factors = dict(world.factors)
    gone = {name for name, factor in factors.items() if factor <= 0}
    source = predict.workload.source
    if source in gone or len(gone) >= len(predict.cluster.devices):
        return []
    cluster = _without(under(predict.cluster, world), gone)
    profile = scaled_profile(predict.profile, {n: f for n, f in factors.items() if f > 0})
    result = search(profile, cluster, predict.workload, predict.qoe, effort_s=effort_s)
    plans = result.plans
    if not plans:
        qoe = QoE(
            objective="time",
            percentile=predict.qoe.percentile,
            max_accuracy_loss=predict.qoe.max_accuracy_loss,
        )
        plans = search(profile, cluster, predict.workload, qoe, effort_s=effort_s).plans
    single = [result.best_single] if result.best_single is not None else []
    return [_restored(plan, predict.cluster) for plan in (*plans, *single)]


def _without(cluster: Cluster, gone: set[str]) -> Cluster:
    return cluster.model_copy(
        update={
            "devices": tuple(d for d in cluster.devices if d.name not in gone),
            "links": tuple(n for n in cluster.links if not {n.src, n.dst} & gone),
        }
    )


def _restored(plan: Plan, cluster: Cluster) -> Plan:
    """Returns a plan of some devices as a plan of all; its transfers named other ranks."""
    names = tuple(device.name for device in cluster.devices)
    update = {"devices": names, "links": cluster.links}
    return plan.model_copy(update=update if plan.devices == names else {**update, "transfers": ()})


def _worlds(predict: Predictor, first: Sequence[Plan], most: int) -> Iterator[Conditions]:
    """Yields worlds, those of the plans that would run first."""
    cluster, source = predict.cluster, predict.workload.source
    used = list(dict.fromkeys(name for plan in first for name in placed(plan)))
    media = [medium.name for medium in cluster.media]
    worlds = [Conditions.of(dict.fromkeys(media, factor)) for factor in SLOW_NETWORKS]
    for name in used:
        if name != source:
            worlds.append(Conditions.of({name: 0.0}))
        worlds.append(Conditions.of({name: SLOW_DEVICE}))
    if source is not None:  # whatever happens to all the others
        others = {d.name: 0.0 for d in cluster.devices if d.name != source}
        worlds.insert(0, Conditions.of(others))
    yield from worlds[:most]


def _merged(found: Iterable[Sequence[Plan]], most: int) -> list[Plan]:
    """Returns the plans of all worlds without doubles, taking from each in turn."""
    lists = [list(plans) for plans in found]
    merged: dict[object, Plan] = {}
    for rank in range(max(map(len, lists), default=0)):
        for plans in lists:
            if rank < len(plans) and len(merged) < most:
                plan = plans[rank]
                key = (plan.stages, plan.routes, plan.warmup, plan.codecs)
                merged.setdefault(key, plan)
    return list(merged.values())
