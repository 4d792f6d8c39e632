"""How long to wait for something that usually comes: from when it came before, not a constant.

The idea of accrual failure detectors: silence is judged by the distribution of earlier intervals.
See Hayashibara et al., The phi accrual failure detector, SRDS 2004.
"""

from __future__ import annotations

from math import exp, inf, log, sqrt

# Standard deviations of the logarithm of intervals; on log-normal intervals one of 30,000 is later.
LATE = 4.0
# Intervals are rarely steadier than a scheduler's tick, and few of them show how unsteady they are.
LEAST_SPREAD = 0.15
_GAIN = 0.1


class Arrivals:
    """The intervals between heartbeats, results or steps of one peer.

    Args:
        first_s: How long to wait before anything is known.
        least_s: Never wait less; covers a round trip and a retransmission.
    """

    __slots__ = ("_count", "_first_s", "_last_s", "_least_s", "_mean", "_square")

    def __init__(self, *, first_s: float = 30.0, least_s: float = 0.2) -> None:
        self._first_s, self._least_s = first_s, least_s
        self._last_s, self._count, self._mean, self._square = -inf, 0, 0.0, LEAST_SPREAD**2

    def observe(self, at_s: float) -> None:
        """Adds an arrival; times never descend."""
        interval_s, self._last_s = at_s - self._last_s, at_s
        if interval_s == inf or interval_s <= 0:
            return
        x = log(interval_s)
        self._count += 1
        away = x - self._mean if self._count > 1 else 0.0
        gain = max(_GAIN, 1 / self._count)
        self._mean = self._mean + gain * away if self._count > 1 else x
        self._square += _GAIN * (away * away - self._square)

    @property
    def deadline_s(self) -> float:
        """The time at which silence means a failure; infinite before the first arrival."""
        if not self._count:
            return self._last_s + self._first_s if self._last_s > -inf else inf
        # Few intervals say little about how much they vary.
        spread = max(sqrt(self._square), LEAST_SPREAD) * sqrt(1 + 4 / self._count)
        return self._last_s + max(exp(self._mean + LATE * spread), self._least_s)

    def is_late(self, at_s: float) -> bool:
        """Returns whether the next one should have come by now."""
        return at_s > self.deadline_s
