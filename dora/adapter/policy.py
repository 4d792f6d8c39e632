"""Decides what to run next. Pure: the same view and standing give the same decision.

    decision, standing = decide(bank, standing, view, predict, price, rules)

A switch has to pay: what it gains over the horizon, less what it may lose if the estimates are
wrong, has to exceed what the way there costs, with a margin; and unless something has clearly
changed, the same plan has to win more than once. That is the hysteresis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, log
from typing import NamedTuple

from dora.adapter.compose import Toll
from dora.adapter.migrate import placed
from dora.adapter.mixing import mix
from dora.adapter.monitor import View
from dora.adapter.rules import MemoryOf, Price, Rules, Standing
from dora.adapter.score import (
    MEDIAN,
    NODES,
    Score,
    conditions,
    forecasts,
    score,
    unit_of,
)
from dora.adapter.shares import reshared
from dora.adapter.switch import Switch, best_switch, budget_s, names_in_use, names_of, used_s
from dora.spec import Conditions, Decision, Forecast, Plan, Predict
from dora.spec.decision import DecisionKind

# Predictions count as that many items beside those that were seen to keep the bounds or not.
PREDICTED_ITEMS = 5.0
# A plan that is predicted that far over its bound is left without waiting for more.
CLEARLY = 1.5
# And one that has broken its bound more often than not, in so many items or more.
FAILING = 2
# Plans of one placement whose predicted excesses differ by less have the same fate: predictions are
# some percent off. Without it, a job under other traffic on the testbed first went over to such a
# plan, and left its devices only 4 s later.
ALIKE = 1.15
# What has failed is forgotten after so many horizons.
MEMORY_HORIZONS = 6
# Before that many observations, noise is guessed: no reason to leave a plan that does so far.
KNOWN = 8


class Outcome(NamedTuple):
    """A decision, what to remember of it, and what the chosen plan is expected to take."""

    decision: Decision
    standing: Standing
    forecast: Forecast | None


def decide(
    bank: Sequence[Plan],
    standing: Standing,
    view: View,
    predict: Predict,
    price: Price,
    rules: Rules,
    *,
    memory_of: MemoryOf | None = None,
    toll: Toll = Toll(),  # noqa: B008, immutable
) -> Outcome:
    """Returns what to do now. Not to be asked while a switch is under way, unless it is dead.

    Args:
        bank: Plans to choose from.
        standing: From the last decision; at first `Standing((plan,))`.
        view: From the monitor.
        predict: What a plan takes under some conditions.
        price: What a switch costs.
        rules: See `Rules`.
        memory_of: Keeps mixes within the memory.
        toll: Of handing over between the plans of a mix.
    """
    if standing.switched_s == -inf:  # there is no budget before anything has gone well
        standing = standing._replace(paused_s=budget_s(rules), switched_s=view.at_s)
    since_s = view.at_s - MEMORY_HORIZONS * rules.horizon_s
    standing = standing._replace(failed=tuple(f for f in standing.failed if f[1] >= since_s))
    scenarios = [conditions(view, node) for node in NODES]
    scores = _scores(bank, standing, view, scenarios, predict, rules)
    if len(standing.plans) == 1 and view.num_items:
        experienced(scores, scores[id(standing.plans[0])], view, rules)
    running = [scores[id(plan)] for plan in standing.plans]
    now = sum(w * s.cost for w, s in zip(standing.weights, running, strict=True))
    best = best_switch(scores, standing, now, scenarios, price, rules, view)
    is_new_world = view.gone != standing.gone
    is_replanning = _should_replan(scores, standing, view, is_new_world, rules)
    mixed = None
    if rules.reading != "each":
        mixed = mix(scores, standing, price, scenarios, rules, memory_of, toll)
    if mixed is not None:
        decision, chosen = mixed
    else:
        decision, chosen = _act(best, standing, view, rules, running)
    decision = decision.model_copy(
        update={
            "prepare": _ways_out(scores, chosen, scenarios),
            "is_replanning": is_replanning,
            "kind": "replan" if is_replanning and decision.kind == "keep" else decision.kind,
        }
    )
    chosen = chosen._replace(gone=view.gone)
    if is_replanning:
        patience_s = (
            rules.replan_s if is_new_world else max(2 * standing.patience_s, rules.replan_s)
        )
        chosen = chosen._replace(replanned_s=view.at_s, patience_s=patience_s)
    first = scores.get(id(chosen.plans[0]))
    return Outcome(decision, chosen, first.median if first else None)


def experienced(scores: dict[int, Score], own: Score, view: View, rules: Rules) -> None:
    """Adds the late items that were seen to those predicted, of what runs and of its rivals.

    More than predicted of a plan that a storm can break were a storm, of which rivals would have
    had their share; of any other plan they are its own, and of those that are much like it.
    """
    total = PREDICTED_ITEMS + view.num_items
    more = view.num_items * (view.late - own.late) / total
    worst = own.forecasts[0]
    depends = _dependence(own) if worst is None or worst.worst > 1 else 0.0
    for key, each in scores.items():
        share = float(each is own or (more > 0 and _are_alike(each, own)))
        if not share and more > 0 and depends > 0:
            share = min(_dependence(each) / depends, 1.0)
        late = min(each.late + share * more, 1.0)
        scores[key] = each._replace(late=late, cost=each.cost + rules.penalty * (late - each.late))


def _are_alike(each: Score, own: Score) -> bool:
    """Returns whether a plan is not clearly better than another of the same placement."""
    if each.median is None or own.median is None or placed(each.plan) != placed(own.plan):
        return False
    return each.median.worst * ALIKE > own.median.worst


def _dependence(each: Score) -> float:
    """Returns by how much a plan's excess grows from the median to the worst scenario."""
    worst, median = each.forecasts[0], each.median
    if worst is None or median is None:
        return inf
    return log(max(worst.worst, 1e-9) / max(median.worst, 1e-9))


def _scores(
    bank: Sequence[Plan],
    standing: Standing,
    view: View,
    scenarios: Sequence[Conditions],
    predict: Predict,
    rules: Rules,
) -> dict[int, Score]:
    """Returns the scores of the promising plans, and of what runs, by id."""
    plans = {id(plan): plan for plan in (*bank, *standing.plans)}
    for plan in standing.plans:
        other = reshared(plan, {name: e.factor for name, e in view.estimates.items()})
        if other is not None:
            plans[id(other)] = other
    medians = {key: predict(plan, scenarios[MEDIAN]) for key, plan in plans.items()}
    unit = unit_of(medians, rules.objective)
    # A mix may need plans that are too slow by themselves; its averages need medians alone.
    chosen = plans if rules.reading != "each" else _shortlist(plans, medians, standing, rules)

    def seen(key: int) -> tuple[Forecast | None, ...]:
        if medians[key] is None or rules.reading == "average":
            return (medians[key],) * len(NODES)
        return forecasts(plans[key], scenarios, predict)

    return {
        key: score(
            plans[key], seen(key), objective=rules.objective, unit=unit, penalty=rules.penalty
        )
        for key in chosen
    }


def _shortlist(
    plans: Mapping[int, Plan],
    medians: Mapping[int, Forecast | None],
    standing: Standing,
    rules: Rules,
) -> dict[int, None]:
    """Returns the ids of the plans that are worth a look in all scenarios."""
    able = {key: f for key, f in medians.items() if f is not None}

    def rank(key: int) -> tuple[bool, float]:
        found = able[key]
        is_late = found.worst > 1
        return is_late, found.worst if is_late else found.value(rules.objective)

    order = sorted(able, key=rank)
    # Beside the best ones those with the most room below the bounds: they may keep them in storms.
    half = rules.shortlist // 2
    roomy = sorted(able, key=lambda key: able[key].worst)
    chosen = [*order[: rules.shortlist - half], *roomy[:half], *map(id, standing.plans)]
    # And for every device at work the best plan that does without it.
    for name in {name for plan in standing.plans for name in placed(plan)}:
        chosen += [key for key in order if not _uses(plans[key], name)][:1]
    return dict.fromkeys(chosen)


def _uses(plan: Plan, name: str) -> bool:
    return any(r.device == name for stage in plan.stages for r in stage.replicas)


def _act(
    best: Switch | None,
    standing: Standing,
    view: View,
    rules: Rules,
    running: Sequence[Score],
) -> tuple[Decision, Standing]:
    """Switches if the plan has won often enough; else keeps, or orders transfers anew."""
    used = names_in_use(standing)
    has_changed = bool(view.changed & used)
    is_bad = any(s.median is None or s.median.worst > CLEARLY for s in running)
    is_bad = is_bad or (view.num_items >= FAILING and view.late > 0.5)
    is_known = all(
        e.num_seen >= KNOWN for name, e in view.estimates.items() if name in used and e.num_seen
    )
    is_known = is_known or (view.num_items >= KNOWN and view.late > rules.budget)
    if best is not None and (is_known or is_bad):
        plan, reason = best.to.plan, best.reason
        wins = standing.wins + 1 if plan == standing.candidate else 1
        if has_changed or is_bad or wins >= rules.confirm:
            kind: DecisionKind = "shift" if _is_shift(standing.plans, plan) else "switch"
            has_failed = any(s.late > 0.5 for s in running) and not view.gone & used
            left = sorted(used - names_of(plan)) if has_failed else ()
            chosen = standing._replace(
                plans=(plan,),
                weights=(1.0,),
                candidate=None,
                wins=0,
                paused_s=min(used_s(standing, view, rules) + best.pause_s, budget_s(rules)),
                switched_s=view.at_s,
                failed=(*standing.failed, *((name, view.at_s) for name in left)),
            )
            return Decision(kind=kind, reason=reason, plans=(plan,)), chosen
        chosen = standing._replace(candidate=plan, wins=wins)
        return Decision(kind="keep", reason=f"win {wins} of {rules.confirm}: {reason}"), chosen
    chosen = standing._replace(candidate=None, wins=0)
    names = sorted(view.changed & used)
    if names and any(len(plan.stages) > 1 for plan in standing.plans):
        return Decision(kind="reschedule", reason=f"changed: {', '.join(names)}"), chosen
    return Decision(kind="keep", reason="no plan is worth a switch"), chosen


def _is_shift(before: Sequence[Plan], after: Plan) -> bool:
    return len(before) == 1 and placed(before[0]) == placed(after)


def _should_replan(
    scores: dict[int, Score], standing: Standing, view: View, is_new_world: bool, rules: Rules
) -> bool:
    """Returns whether the bank is worn out: a device came or went, or nothing keeps the QoE."""
    if is_new_world:
        return True
    if view.at_s - standing.replanned_s < max(standing.patience_s, rules.replan_s):
        return False
    return all(s.median is None or s.median.worst > 1 for s in scores.values())


def _ways_out(
    scores: dict[int, Score], chosen: Standing, scenarios: Sequence[Conditions]
) -> tuple[Plan, ...]:
    """Returns the plans to have in place: for a storm, and for the loss of each device."""
    able = [s for s in scores.values() if s.median is not None]
    if not able:
        return ()
    wanted = [min(able, key=lambda s: s.costs[0]).plan]
    running = {name for plan in chosen.plans for name in placed(plan)}
    for name in sorted(running):
        without = [s for s in able if not _uses(s.plan, name)]
        if without:
            wanted.append(min(without, key=lambda s: s.cost).plan)
    unique = {id(plan): plan for plan in wanted if plan not in chosen.plans}
    return tuple(unique.values())[:3]
