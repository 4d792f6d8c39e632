"""What the policy goes by: its rules, and what it remembers from one decision to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Literal, NamedTuple

from dora.adapter.compose import Memory
from dora.spec import Conditions, Plan, QoE, SwitchCost

# What it costs to go from what runs to a plan under those conditions.
Price = Callable[[tuple[Plan, ...], Plan, Conditions], SwitchCost]
# What plans need when they are in place together; for mixes.
MemoryOf = Callable[[Sequence[Plan]], Memory]


class Rules(NamedTuple):
    """How the policy weighs things.

    Attributes:
        objective: 'energy' or 'time', inside the QoE.
        reading: Whether each item has to keep the bounds, their average, or a percentile of them.
        percentile: Of 'percentile'.
        battery_j: Average of each item from batteries, for mixes.
        period_s: Between requests; 0: one after the other.
        penalty: What an item that breaks a bound costs, over the value of a good one.
        budget: Share of the time that switches may pause, while no more items than that are late:
            what a switch pauses within it counts as not done, instead of as late.
        horizon_s: The longest time that a switch may take to pay; the budget is a share of it.
        margin: By how much the gain has to exceed the cost, as a share.
        least_gain: Below this share of an item's cost plans count as equal.
        caution: Weight of what a switch may lose in the scenarios in which it is wrong.
        confirm: Decisions in a row that a plan has to win without a change.
        shortlist: Plans that are looked at in all scenarios.
        reserve: Mixes aim at averages that far below their bounds: what estimates miss by.
        replan_s: Least time between searches; it doubles while they do not help.
    """

    objective: Literal["time", "energy"] = "energy"
    reading: Literal["each", "average", "percentile"] = "each"
    percentile: float = 50.0
    battery_j: float | None = None
    period_s: float = 0.0
    penalty: float = 20.0
    budget: float = 0.02
    horizon_s: float = 600.0
    margin: float = 0.25
    least_gain: float = 0.05
    caution: float = 0.5
    confirm: int = 3
    shortlist: int = 8
    reserve: float = 0.02
    replan_s: float = 10.0

    @classmethod
    def of(cls, qoe: QoE, *, period_s: float = 0.0) -> Rules:
        """Returns the rules for a QoE whose bounds hold for each item."""
        return cls(objective=qoe.objective, percentile=qoe.percentile, period_s=period_s)


class Standing(NamedTuple):
    """What the policy remembers from one decision to the next.

    Attributes:
        plans, weights: What runs.
        candidate, wins: The plan that would be better, and how often in a row.
        paused_s, switched_s: Of the budget, how much was used when the last switch was decided, and
            when that was; of the first decision, all of it.
        failed: Devices and media that were left because items were late, each with when.
        gone: Devices that were away at the last decision.
        replanned_s, patience_s: Of the last search, and how long until the next one.
    """

    plans: tuple[Plan, ...]
    weights: tuple[float, ...] = (1.0,)
    candidate: Plan | None = None
    wins: int = 0
    paused_s: float = 0.0
    switched_s: float = -inf
    failed: tuple[tuple[str, float], ...] = ()
    gone: frozenset[str] = frozenset()
    replanned_s: float = -inf
    patience_s: float = 0.0
