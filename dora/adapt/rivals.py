"""What the adapter is compared with: one plan for all times, planning anew, and an oracle.

`best_static`: the plan that would have been best, known afterwards. `play_replanning`: searches at
every change, stops, and moves all weights. `play_oracle`: knows the whole trace, has all weights in
place before they are needed where they do not change, and switches where that is best.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from dora.adapt.forecast import Predictor, block_bytes
from dora.adapt.machine import Machine, Residence
from dora.adapt.play import PLANNING_S, Played, Senses, estimated, searcher
from dora.adapt.tally import Totals, late_share_at
from dora.adapt.world import Segment
from dora.adapter.migrate import BARRIER_S, migration, placed
from dora.adapter.rules import Rules
from dora.spec import Conditions, Plan

Array = NDArray[np.float64]


def play_static(predict: Predictor, plan: Plan, parts: Sequence[Segment], rules: Rules) -> Totals:
    """Returns what one plan makes of a trace, whatever happens."""
    machine = Machine(predict, plan, period_s=rules.period_s, pause_of=lambda _, __: 0.0)
    gone: set[str] = set()
    for part in parts:
        away = {name for name, factor in part.conditions.factors if factor <= 0}
        for name in away - gone:
            machine.lose(name)
        gone = away
        machine.work(part)
    return machine.totals()


def best_static(
    predict: Predictor, bank: Sequence[Plan], parts: Sequence[Segment], rules: Rules
) -> tuple[Plan, Totals]:
    """Returns the plan that attains most, and of equal ones has the least of the objective.

    Attainments that differ by less than half a percent are equal.
    """
    runs = [(plan, play_static(predict, plan, parts, rules)) for plan in bank]
    most = max(totals.attained for _, totals in runs)
    good = [run for run in runs if run[1].attained >= most - 0.005]
    return min(good, key=lambda run: _value(run[1], rules))


def _value(totals: Totals, rules: Rules) -> float:
    return totals.energy_j if rules.objective == "energy" else totals.time_s


def play_replanning(
    predict: Predictor,
    plan: Plan,
    parts: Sequence[Segment],
    rules: Rules,
    *,
    seed: int = 0,
    effort_s: float = 0.2,
    searched: dict[Conditions, list[Plan]] | None = None,
) -> Played:
    """Returns what planning from scratch at each change makes of a trace.

    Args:
        predict: What plans take.
        plan: The first one.
        parts: The trace.
        rules: Objective and period.
        seed: Of the noise of measurements.
        effort_s: Of each search.
        searched: Remembers searches from one trace to the next.
    """
    senses, residence = Senses(predict, seed), Residence(predict, (plan,))
    machine = Machine(predict, plan, period_s=rules.period_s, pause_of=residence.pause_s)
    search_in = searcher(predict, effort_s, searched)
    search: tuple[float, Conditions] | None = None
    replans = 0
    for part in parts:
        for name in senses.leave_and_join(part):
            machine.lose(name)
        residence.lose(senses.gone)
        if search is not None and search[0] <= part.start_s:
            found, search = search_in(search[1]), None
            replans += 1
            if found and not _is_same(found[0], machine.plans[0]):
                machine.switch((found[0],))
        before = machine.plans
        machine.work(part)
        if machine.plans is not before:
            # Weights that are not at work are not kept.
            residence = Residence(predict, machine.plans)
            residence.lose(senses.gone)
            machine.pause_of = residence.pause_s
        view = senses.observe(part, machine.plans)
        if view.changed and search is None:
            search = view.at_s + PLANNING_S, estimated(view)
    return Played(machine.totals(replans=replans), (), machine.plans)


def _is_same(a: Plan, b: Plan) -> bool:
    return (a.stages, a.routes, a.warmup) == (b.stages, b.routes, b.warmup)


def play_oracle(
    predict: Predictor, bank: Sequence[Plan], parts: Sequence[Segment], rules: Rules
) -> Totals:
    """Returns what the best sequence of plans makes of a trace, by dynamic programming.

    It does not pay for moving weights that do not change, since it knows what it will need; when
    training, it pays for each move. The sequence minimises what the policy minimises.
    """
    order = best_sequence(predict, bank, parts, rules)
    pauses = _pauses(predict, bank)
    at = {id(plan): i for i, plan in enumerate(bank)}
    machine = Machine(
        predict,
        bank[order[0]],
        period_s=rules.period_s,
        pause_of=lambda plans, _: float(pauses[at[id(machine.plans[0])], at[id(plans[0])]]),
    )
    gone: set[str] = set()
    current = order[0]
    for pick, part in zip(order, parts, strict=True):
        away = {name for name, factor in part.conditions.factors if factor <= 0}
        for name in away - gone:
            machine.lose(name)
        gone = away
        if pick != current:
            machine.switch((bank[pick],))
            current = pick
        machine.work(part)
    return machine.totals()


def best_sequence(
    predict: Predictor, bank: Sequence[Plan], parts: Sequence[Segment], rules: Rules
) -> list[int]:
    """Returns the plan of each segment, as positions in the bank."""
    costs, ways = _costs(predict, bank, parts, rules)
    total = costs[0]
    came = np.zeros((len(parts), len(bank)), dtype=int)
    for t in range(1, len(parts)):
        through = total[:, None] + ways
        came[t] = through.argmin(axis=0)
        total = through.min(axis=0) + costs[t]
    order = [int(total.argmin())]
    for t in range(len(parts) - 1, 0, -1):
        order.append(int(came[t][order[-1]]))
    return order[::-1]


def _costs(
    predict: Predictor, bank: Sequence[Plan], parts: Sequence[Segment], rules: Rules
) -> tuple[Array, Array]:
    """Returns [segment, plan] costs of working, and [from, to] costs of switching.

    Cost is in seconds: a second of the best plan costs one, a late one the policy's penalty more.
    """
    found = [[predict(plan, part.conditions) for plan in bank] for part in parts]
    values = np.array([[f.value(rules.objective) if f else inf for f in row] for row in found])
    excess = np.array([[f.worst if f else inf for f in row] for row in found])
    if not rules.period_s:
        excess = _over_items(excess, parts, predict.usual_s)
    good = np.isfinite(values) & (excess <= 1)
    unit = values[good].min() if good.any() else values[np.isfinite(values)].min(initial=1.0)
    relative = np.minimum(values / unit, rules.penalty)  # what has gone is not worse than late
    lengths = np.array([part.length_s for part in parts])[:, None]
    late = np.vectorize(late_share_at)(excess)
    costs: Array = (relative + rules.penalty * late) * lengths
    pauses = _pauses(predict, bank)
    item_s = predict.usual_s if np.isfinite(predict.usual_s) else 1.0
    slack_s = item_s * (1 - np.median(np.minimum(excess, 1.0), axis=0))
    hurts = pauses > np.maximum(slack_s, max(rules.period_s - item_s, 0.0))[None, :]
    # Going there and back between equals gains nothing.
    ways: Array = np.where(hurts, rules.penalty * np.maximum(pauses, item_s), pauses) + 1e-3
    np.fill_diagonal(ways, 0.0)
    return costs, ways


def _over_items(excess: Array, parts: Sequence[Segment], item_s: float) -> Array:
    """Returns the excess of an item that starts in each segment and lasts about `item_s`.

    Progress adds up: 1 / excess is averaged over time.
    """
    lengths = np.array([part.length_s for part in parts])
    if not np.isfinite(item_s) or item_s <= lengths.min():
        return excess
    with np.errstate(divide="ignore"):
        speed = 1 / excess
    sums = np.vstack([np.zeros(excess.shape[1]), np.cumsum(speed * lengths[:, None], axis=0)])
    starts = [part.start_s for part in parts] + [parts[-1].end_s]
    ends = [min(bisect_left(starts, s + item_s), len(parts)) for s in starts[:-1]]
    means = np.array([(sums[e] - sums[i]) / (starts[e] - starts[i]) for i, e in enumerate(ends)])
    with np.errstate(divide="ignore"):
        averaged: Array = 1 / means
    return averaged


def _pauses(predict: Predictor, bank: Sequence[Plan]) -> Array:
    """Returns [from, to] seconds of a switch, on the network as given."""
    pauses = np.full((len(bank), len(bank)), BARRIER_S)
    if predict.workload.kind != "train":
        return pauses
    sizes = block_bytes(predict.profile, predict.workload)
    spots = [placed(plan) for plan in bank]
    kinds = {
        repr(sorted((n, min(b), max(b)) for n, b in s.items())): i for i, s in enumerate(spots)
    }
    names = [kinds[repr(sorted((n, min(b), max(b)) for n, b in s.items()))] for s in spots]
    known = {
        (a, b): migration(spots[a], bank[b], sizes, predict.cluster).transfer_s
        for a in set(names)
        for b in set(names)
        if a != b
    }
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            pauses[i, j] += known.get((a, b), 0.0)
    return pauses
