"""What a switch gains and what it costs, and which one pays most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple

from dora.adapter.monitor import View
from dora.adapter.rules import Price, Rules, Standing
from dora.adapter.score import MEDIAN, WEIGHTS, Score
from dora.spec import Conditions, Plan, SwitchCost

# Even in a storm the next few seconds are much like the last.
LEAST_HORIZON_S = 5.0


class Switch(NamedTuple):
    """The switch that pays most: to what, why, and how long no item can be on time."""

    to: Score
    reason: str
    pause_s: float


def best_switch(
    scores: dict[int, Score],
    standing: Standing,
    now: float,
    scenarios: Sequence[Conditions],
    price: Price,
    rules: Rules,
    view: View,
) -> Switch | None:
    """Returns the switch that pays most; None if none pays.

    Args:
        scores: Of the plans to choose from and of what runs, by id.
        standing: What runs.
        now: What an item costs with it.
        scenarios: Conditions in which the scores were found.
        price: What a switch costs.
        rules: See `Rules`.
        view: From the monitor.
    """
    running = [scores[id(plan)] for plan in standing.plans]
    horizon_s = min(max(view.calm_s, rules.period_s, LEAST_HORIZON_S), rules.horizon_s)
    best, best_net = None, 0.0
    free_s = _free_s(standing, view, rules)
    is_dead = any(s.median is None for s in running)
    step_s = max(rules.period_s, _time_s(scores.values() if is_dead else running))
    for each in scores.values():
        if each.median is None or each.plan in standing.plans:
            continue
        gain = now - each.cost
        if gain <= rules.least_gain * now:
            continue
        regret = _regret(each, running, standing.weights)
        way = price(standing.plans, each.plan, scenarios[MEDIAN])
        # What has lasted for that long also outlasts the way there with this probability (Gott,
        # Implications of the Copernican principle for our future prospects, Nature 1993).
        # Who runs nothing meanwhile feels it even where less than one item is in the horizon.
        lasts = horizon_s / (horizon_s + way.background_s)
        items = max(lasts * horizon_s / max(step_s, 1e-6), lasts if is_dead else 1.0)
        late_s = _late_s(way, each)
        usual_s = step_s if rules.period_s else max(step_s, _bound_s(each))
        cost = _cost_of(way, each, rules) + rules.penalty * _relapse(each.plan, standing)
        missed = max(late_s / usual_s, 1.0) if late_s else 0.0
        cost += missed * (1 if late_s <= free_s else rules.penalty)
        net = items * (gain - rules.caution * regret) - (1 + rules.margin) * cost
        if net > best_net or (is_dead and best is None):
            best_net = net
            reason = (
                f"saves {gain:.3g} of {now:.3g} per item over {items:.3g} items, "
                f"the way costs {cost:.3g} ({way.pause_s:.3g} s)"
            )
            best = Switch(each, reason, late_s)
    return best


def _time_s(running: Iterable[Score]) -> float:
    """Returns the seconds of an item of the fastest of those plans, or what bounds them.

    An item that is late counts as all that should have been done meanwhile.
    """
    able = [s for s in running if s.median]
    return min((min(s.median.time_s, _bound_s(s)) for s in able if s.median), default=1.0)


def _regret(each: Score, running: Sequence[Score], weights: Sequence[float]) -> float:
    """Returns what a plan costs more in the scenarios in which it is the worse one."""
    total = 0.0
    for k, weight in enumerate(WEIGHTS):
        current = sum(w * s.costs[k] for w, s in zip(weights, running, strict=True))
        total += weight * max(0.0, each.costs[k] - current)
    return total


def _cost_of(way: SwitchCost, each: Score, rules: Rules) -> float:
    """Returns what a switch costs by itself, in units."""
    assert each.median is not None
    value = each.median.value(rules.objective) or 1.0
    return (way.energy_j if rules.objective == "energy" else way.pause_s) / value


def _relapse(plan: Plan, standing: Standing) -> float:
    """Returns how probably what a plan brings back into use, and has failed before, fails again.

    That costs an item at least. Without it, a job on a radio that vanished for a second or two
    again and again went back to it each time, for a few percent of energy.
    """
    failed = Counter(name for name, _ in standing.failed)
    back = failed.keys() & names_of(plan) - names_in_use(standing) if failed else ()
    times = max((failed[name] for name in back), default=0)
    return times / (times + 1)


def _bound_s(each: Score) -> float:
    """Returns in which time an item has to be done; inf if nothing bounds it."""
    assert each.median is not None
    return each.median.time_s / each.median.worst if each.median.worst else inf


def _late_s(way: SwitchCost, each: Score) -> float:
    """Returns how long no item can be on time: all of a pause that its bounds leave no room for."""
    assert each.median is not None
    return way.pause_s if way.pause_s > _bound_s(each) - each.median.time_s else 0.0


def _free_s(standing: Standing, view: View, rules: Rules) -> float:
    """Returns how long a switch may pause within the budget, which late items use up."""
    if view.late > rules.budget:
        return 0.0
    return budget_s(rules) - used_s(standing, view, rules)


def budget_s(rules: Rules) -> float:
    """Returns how long switches may pause in a horizon."""
    return rules.budget * rules.horizon_s


def used_s(standing: Standing, view: View, rules: Rules) -> float:
    """Returns how much of the budget earlier switches have used; it comes back with time."""
    return max(standing.paused_s - rules.budget * (view.at_s - standing.switched_s), 0.0)


def names_in_use(standing: Standing) -> set[str]:
    """Returns the devices and media of what runs."""
    return {name for plan in standing.plans for name in names_of(plan)}


def names_of(plan: Plan) -> set[str]:
    """Returns the devices that a plan uses, and the media that its links name."""
    devices = {r.device for stage in plan.stages for r in stage.replicas}
    media = {m for link in plan.links if {link.src, link.dst} & devices for m in link.media}
    return devices | media
