"""Chooses among predicted placements, and says in words what became of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dora.planner.codecs import loss
from dora.planner.layouts import to_plan
from dora.planner.limits import Limit
from dora.planner.predict import Group, Layout, Prediction, Setting
from dora.spec import Device, Plan

# A preview has to fit a screen.
MAX_PLANS = 12
MAX_REJECTED = 40

Placement = tuple[tuple[int, ...], ...]


class Candidate(NamedTuple):
    """A layout with its exact prediction.

    Attributes:
        failed: Limits that it breaks and the values that break them, worst first.
        memory_share: Largest share of any device's memory that it needs.
    """

    layout: Layout
    prediction: Prediction
    known: Setting
    failed: tuple[tuple[Limit, float], ...]
    memory_share: float

    @property
    def placement(self) -> Placement:
        """The devices of each stage."""
        return tuple(group.devices for group in self.layout.groups)

    @property
    def excess(self) -> float:
        """By which factor the worst limit is broken; 0 if none is."""
        return max((limit.excess(value) for limit, value in self.failed), default=0.0)

    def value(self, objective: str) -> float:
        """Returns seconds or joules."""
        if objective == "time":
            return self.prediction.makespan_s
        return self.prediction.total_j

    def order(self, objective: str) -> tuple[object, ...]:
        """Sorts by objective, then by the other criteria, then by what never ties.

        Nine digits: sums in another order differ in the last bits, which must not decide.
        """
        other = "energy" if objective == "time" else "time"
        criteria = (self.value(objective), self.value(other), self.memory_share)
        groups, counts, warmup, _, modes, codecs, sums = self.layout
        names = tuple((codec.forward, codec.backward) for codec in codecs)
        rounded = (float(f"{value:.9g}") for value in criteria)
        lost = loss(codecs, sums)  # of two that are as small, the better one
        return (*rounded, lost, groups, counts, warmup, modes, names, sums)


def best_single(found: Sequence[Candidate], objective: str) -> Candidate | None:
    """Returns the best candidate on one device, preferring those that keep the limits."""
    singles = [c for c in found if len(c.layout.devices) == 1]
    return min(singles, key=lambda c: (bool(c.failed), c.order(objective)), default=None)


def kept(found: Sequence[Candidate], objective: str, single: Candidate | None) -> list[Candidate]:
    """Returns at most `MAX_PLANS` candidates that no other one beats, best first.

    Of a larger front the extremes stay, and those that cover most between them. The best single
    device is added unless it breaks a limit: it is what every plan is compared with.
    """
    front = pareto([c for c in found if not c.failed], objective)
    extremes = [
        min(front, key=lambda c, key=key: key(c), default=None)  # type: ignore[misc]
        for key in (
            lambda c: c.order(objective),
            lambda c: c.order("energy" if objective == "time" else "time"),
            lambda c: (c.memory_share, c.order(objective)),
        )
    ]
    chosen = [c for c in [*extremes, single] if c is not None and not c.failed]
    distinct = {c.layout: c for c in chosen}
    while front and len(distinct) < min(MAX_PLANS, len(front)):
        rest = [c for c in front if c.layout not in distinct]
        covered = [*distinct.values()]
        best = max(rest, key=lambda c: covered_area([*covered, c], front), default=None)
        if best is None:
            break
        distinct[best.layout] = best
    return sorted(distinct.values(), key=lambda c: c.order(objective))


def covered_area(chosen: Iterable[Candidate], front: Iterable[Candidate]) -> float:
    """Returns the area of time x energy that is worse than some of `chosen`: the hypervolume.

    Up to 1.1 times the worst of `front`, so that its ends count too. See Zitzler and Thiele,
    Multiobjective evolutionary algorithms, IEEE Transactions on Evolutionary Computation 1999.
    """
    points = [(c.value("time"), c.value("energy")) for c in front]
    worst_s, worst_j = (1.1 * max(values) for values in zip(*points, strict=True))
    area, least_j = 0.0, worst_j
    for time_s, energy_j in sorted((c.value("time"), c.value("energy")) for c in chosen):
        if energy_j < least_j:
            area += (worst_s - time_s) * (least_j - energy_j)
            least_j = energy_j
    return area


def pareto(found: Iterable[Candidate], objective: str) -> list[Candidate]:
    """Returns the candidates that none beats in time, energy and memory, best first.

    Of several that are equal in all three, the first one in order stays.
    """
    front: list[Candidate] = []
    values: list[tuple[object, ...]] = []
    for candidate in sorted(found, key=lambda c: c.order(objective)):
        # In this order a later one never beats an earlier one in the objective.
        own = candidate.order(objective)[:3]
        if not any(all(a <= b for a, b in zip(v, own, strict=True)) for v in values):  # type: ignore[operator]
            front.append(candidate)
            values.append(own)
    return front


def to_plans(chosen: Iterable[Candidate], names: Sequence[str]) -> list[Plan]:
    """Returns the candidates as plans of a cluster with devices `names`."""
    return [to_plan(c.layout, c.prediction, c.known, names) for c in chosen]


def describe(groups: Sequence[Group], devices: Sequence[Device], num_microbatches: int) -> str:
    """Returns for example 'phone[0-3] | laptop+hub[4-11] x8'."""
    stages = (
        f"{'+'.join(devices[d].name for d in g.devices)}[{g.first}-{g.end - 1}]" for g in groups
    )
    return f"{' | '.join(stages)} x{num_microbatches}"


def rejections(
    found: Sequence[Candidate],
    chosen: Sequence[Candidate],
    unfit: Mapping[Placement, str],
    unwalked: Mapping[Placement, tuple[float, float]],
    devices: Sequence[Device],
    *,
    is_optimal: bool,
) -> list[tuple[str, str]]:
    """Returns what was not kept and why: one entry per order of devices, fastest first."""
    done = {c.placement for c in chosen}
    entries: list[tuple[float, str, str]] = []
    for candidate in sorted(found, key=lambda c: (bool(c.failed), c.order("time"))):
        if candidate.placement not in done:
            done.add(candidate.placement)
            layout = candidate.layout
            text = describe(layout.groups, devices, layout.num_microbatches)
            entries.append((candidate.value("time"), text, _why(candidate, chosen)))
    unknown = dict.fromkeys(unfit, (float("inf"), float("inf")))
    for placement, (bound_s, bound_j) in {**unknown, **unwalked}.items():
        if placement not in done:
            text = " | ".join("+".join(devices[d].name for d in g) for g in placement)
            reason = unfit.get(placement) or f"takes at least {bound_s:.4g} s and {bound_j:.4g} J"
            # Without any room there is no time to sort by; a device that can not do it alone is
            # what the user wants to know first.
            is_alone = len(placement) == len(placement[0]) == 1
            none = 0.0 if is_alone else float("inf")
            entries.append((bound_s if np.isfinite(bound_s) else none, text, reason))
    entries.sort(key=lambda entry: entry[:2])
    shown = [(text, reason) for _, text, reason in entries[:MAX_REJECTED]]
    why = "their bounds exceed the plans kept or the QoE"
    rest = why if is_optimal else f"{why}, or no effort was left for them"
    return [*shown, ("all others", rest)]


def _why(candidate: Candidate, chosen: Sequence[Candidate]) -> str:
    """Returns why a walked candidate is not among the chosen."""
    if candidate.failed:
        return "breaks " + ", ".join(f"{limit}: {value:.4g}" for limit, value in candidate.failed)
    figures = f"{candidate.value('time'):.4g} s, {candidate.value('energy'):.4g} J"
    better = next(
        (
            c
            for c in chosen
            if c.value("time") <= candidate.value("time")
            and c.value("energy") <= candidate.value("energy")
            and c.memory_share <= candidate.memory_share
        ),
        None,
    )
    if better is None:
        return f"{figures}: no better than the plans kept around it"
    text = describe(better.layout.groups, better.known.devices, better.layout.num_microbatches)
    return f"{figures}: worse than {text}"


def nearest_text(found: Sequence[Candidate], unfit: Mapping[Placement, str]) -> str:
    """Returns in one line which bound no plan keeps, and the plan that comes nearest."""
    if not found:
        reasons = "; ".join(sorted(set(unfit.values()))[:3])
        return f"no placement can run: {reasons}" if reasons else "no placement exists"
    nearest = min(found, key=lambda c: (c.excess, c.order("time")))
    text = describe(nearest.layout.groups, nearest.known.devices, nearest.layout.num_microbatches)
    names = ", ".join(f"{limit} (it reaches {value:.4g})" for limit, value in nearest.failed)
    return (
        f"no plan keeps {names}; nearest: {text} takes "
        f"{nearest.value('time'):.4g} s and {nearest.value('energy'):.4g} J"
    )
