"""What a plan is worth when rates and speeds are known by median and spread only.

Every plan is looked at in a few scenarios, in each of which all media and devices are as much
better or worse than their medians as their spreads say. All of them together, because what slows
one link of a home, a busy channel, slows the others too; where that is wrong it is cautious.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import erf, exp, log, sqrt
from typing import NamedTuple

from dora.adapter.monitor import View
from dora.spec import Conditions, Forecast, Plan, Predict

# Standard deviations from the median, worst first, and the probability that each stands for.
NODES = (-2.0, -1.0, 0.0, 1.0)
WEIGHTS = (0.07, 0.24, 0.38, 0.31)
MEDIAN = NODES.index(0.0)
# A device that left computes nothing; a medium without any rate is as good as gone.
LEAST_FACTOR = 1e-3


class Score(NamedTuple):
    """One plan in all scenarios.

    Attributes:
        forecasts: By scenario; a plan that was looked at in the median one only has it in all.
        late: Share of items that break a bound.
        costs: Per scenario, what an item costs: 1 is the value of the best plan.
    """

    plan: Plan
    forecasts: tuple[Forecast | None, ...]
    late: float
    costs: tuple[float, ...]
    cost: float

    @property
    def median(self) -> Forecast | None:
        """What it takes in the median scenario."""
        return self.forecasts[MEDIAN]


def conditions(view: View, node: float, ahead_s: float = 0.0) -> Conditions:
    """Returns what media and devices do that many standard deviations from their medians.

    Args:
        view: Estimates.
        node: Negative is worse.
        ahead_s: Follows clear trends, such as a device that gets hot, that far.
    """
    factors = {name: 0.0 for name in view.gone}
    for name, e in view.estimates.items():
        if name not in factors and (e.num_seen or node or e.factor != 1.0):
            level = e.factor * exp(node * e.spread + e.slope_per_s * ahead_s)
            factors[name] = max(level, LEAST_FACTOR)
    delays = {name: e.factor * exp(-node * e.spread) for name, e in view.delays.items()}
    return Conditions.of(factors, delays)


def forecasts(
    plan: Plan, scenarios: Sequence[Conditions], predict: Predict
) -> tuple[Forecast | None, ...]:
    """Returns what a plan takes in each scenario."""
    return tuple(predict(plan, scenario) for scenario in scenarios)


def score(
    plan: Plan,
    found: tuple[Forecast | None, ...],
    *,
    objective: str,
    unit: float,
    penalty: float,
) -> Score:
    """Returns the score of a plan.

    Args:
        plan: Any.
        found: Its forecasts, in the order of `NODES`.
        objective: 'time' or 'energy'.
        unit: Value of the best plan.
        penalty: What an item that breaks a bound costs, in units.
    """
    values = [f.value(objective) / unit if f else 0.0 for f in found]
    broken = [f is None or f.worst > 1 for f in found]
    costs = tuple(v + penalty * b for v, b in zip(values, broken, strict=True))
    late = late_share(found)
    if found[MEDIAN] is None:  # whatever runs is better
        return Score(plan, found, late, costs, 10 * penalty)
    mean = sum(w * v for w, v in zip(WEIGHTS, values, strict=True))
    return Score(plan, found, late, costs, mean + penalty * late)


def late_share(found: Sequence[Forecast | None]) -> float:
    """Returns the share of items over a bound: where the excess crosses 1 between scenarios.

    The logarithm of the excess is taken for linear in between; beyond the ends it goes on.
    """
    if any(f is None for f in found):
        return 1.0
    excess = [log(max(f.worst, 1e-9)) for f in found if f is not None]
    points = list(zip(NODES, excess, strict=True))
    for (a, high), (b, low) in zip(points, points[1:], strict=False):
        if high > 0 >= low:
            return _below(a + (b - a) * high / (high - low))
    if excess[-1] > 0:
        return 1.0
    if excess[0] <= excess[1] + 1e-9:  # it does not depend on what varies
        return 0.0
    slope = (excess[0] - excess[1]) / (NODES[1] - NODES[0])
    return _below(NODES[0] + excess[0] / slope)


def _below(node: float) -> float:
    return 0.5 * (1 + erf(node / sqrt(2)))


def unit_of(found: Mapping[int, Forecast | None], objective: str) -> float:
    """Returns the least value of the plans that keep the QoE, of all if none does."""
    able = [f for f in found.values() if f is not None]
    good = [f.value(objective) for f in able if f.worst <= 1]
    return min(good or [f.value(objective) for f in able], default=1.0) or 1.0
