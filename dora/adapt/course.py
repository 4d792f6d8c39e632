"""Whose turn it is, of plans that take turns: the same on all ranks, without a message."""

from __future__ import annotations

from collections.abc import Sequence

from dora.adapter import next_turn, phases
from dora.spec import Plan


class Course:
    """Goes through the calls of a model.

    Args:
        plans: That take turns.
        weights: Share of each.
        cycle: Calls in which each of them comes once, in one piece, where going from one to the
            next moves weights; 1 lets every call go to the plan that is furthest behind.
    """

    def __init__(self, plans: Sequence[Plan], weights: Sequence[float], cycle: int = 1) -> None:
        self.plans, self.weights, self.cycle = tuple(plans), tuple(weights), cycle
        self._counts = [0] * len(self.plans)
        self._order = [turn for turn, calls in phases(self.weights, cycle) for _ in range(calls)]

    def next(self) -> Plan:
        """Returns the plan of the next call."""
        if self.cycle > 1:
            turn = self._order[sum(self._counts) % self.cycle]
        else:
            turn = next_turn(self._counts, self.weights)
        self._counts[turn] += 1
        return self.plans[turn]
