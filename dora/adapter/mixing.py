"""Chooses a mix of plans for a QoE that is read as an average or a percentile."""

from __future__ import annotations

from collections.abc import Sequence

from dora.adapter.compose import Mix, Toll, compose
from dora.adapter.rules import MemoryOf, Price, Rules, Standing
from dora.adapter.score import MEDIAN, Score
from dora.spec import Conditions, Decision
from dora.spec.decision import DecisionKind


def mix(
    scores: dict[int, Score],
    standing: Standing,
    price: Price,
    scenarios: Sequence[Conditions],
    rules: Rules,
    memory_of: MemoryOf | None,
    toll: Toll,
) -> tuple[Decision, Standing] | None:
    """Returns the best mix, if it differs from what runs by enough; None to go on as for one."""
    toll = Toll(toll.excess + rules.reserve, toll.value)
    able = [s for s in scores.values() if s.median is not None]
    found = _compose(able, rules, memory_of, toll)
    if found is None:
        return None
    here = [s for s in able if s.plan in standing.plans]
    same = _compose(here, rules, memory_of, toll)
    if same is not None and same.value - found.value <= rules.least_gain * same.value:
        # Other shares of what runs move nothing, and what has run is known better.
        able, found = here, same
    plans = tuple(able[i].plan for i, _ in found.shares)
    weights = tuple(w for _, w in found.shares)
    before = _value(scores, standing, rules)
    ways = [price(standing.plans, plan, scenarios[MEDIAN]) for plan in plans]
    keeps = before is not None and before[1] <= 1 - rules.reserve / 2
    saves = before is not None and before[0] - found.value > rules.least_gain * before[0]
    if keeps and not saves:
        return Decision(kind="keep", reason="the mix is as good as any"), standing
    pause_s = sum(way.pause_s for way in ways)
    if keeps and not _pays(before, found, pause_s, rules):
        return Decision(kind="keep", reason="no mix is worth a switch"), standing
    kind: DecisionKind = "mix" if len(plans) > 1 else "switch"
    shown = " + ".join(f"{w:.2f}" for w in weights)
    reason = f"{shown} of {len(plans)} plans keep the average at {found.value:.3g} per item"
    chosen = standing._replace(plans=plans, weights=weights, candidate=None, wins=0)
    return Decision(kind=kind, reason=reason, plans=plans, weights=weights), chosen


def _compose(
    able: Sequence[Score], rules: Rules, memory_of: MemoryOf | None, toll: Toll
) -> Mix | None:
    is_percentile = rules.reading == "percentile"
    return compose(
        [s.median for s in able],
        rules.objective,
        late=[s.late for s in able] if is_percentile else None,
        percentile=rules.percentile if is_percentile else None,
        battery_j=rules.battery_j,
        memory=memory_of([s.plan for s in able]) if memory_of else None,
        toll=toll,
    )


def _value(
    scores: dict[int, Score], standing: Standing, rules: Rules
) -> tuple[float, float] | None:
    """Returns (value, excess) of what runs, on average; None if it can not run."""
    total, excess = 0.0, 0.0
    for plan, weight in zip(standing.plans, standing.weights, strict=True):
        found = scores[id(plan)].median
        if found is None:
            return None
        total += weight * found.value(rules.objective)
        excess += weight * found.worst
    return total, excess


def _pays(before: tuple[float, float] | None, found: Mix, pause_s: float, rules: Rules) -> bool:
    assert before is not None
    period_s = max(rules.period_s, pause_s, 1e-6)
    items = rules.horizon_s / period_s
    return items * (before[0] - found.value) > (1 + rules.margin) * before[0] * pause_s / period_s
