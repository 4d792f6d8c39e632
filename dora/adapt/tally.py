"""Counts items, steps or requests, that pass through changing conditions, without playing each.

Inside a segment every item of one plan takes the same, so that thousands of short ones are one
addition. An item that spans segments makes progress in each at the rate of that segment, which
makes its time right under any change; what else it takes is the mean over its progress.

Items of one plan are not equally long, though: they vary as the speeds do that a monitor sees. So
of those that should end close to a bound a share is late.
"""

from __future__ import annotations

from math import erf, inf, log, sqrt
from typing import NamedTuple

from dora.spec import Forecast

# Standard deviation of the logarithm of an item's time, and of a device's speed as measured; what
# is further away than so many of them does not happen.
NOISE, _MOST_DEVIATIONS = 0.03, 3.0


class Totals(NamedTuple):
    """What a run came to.

    Attributes:
        attained: Share of items within all bounds. A late item counts as all that should have been
            done in its time, so that an outage weighs as much as it lasts.
        energy_j, time_s, excess: Means of an item; `excess` of its worst bound.
        late_s: Seconds of items that were over a bound.
        paused_s: Seconds in which nothing could run.
    """

    items: float
    attained: float
    energy_j: float
    time_s: float
    excess: float
    late_s: float
    paused_s: float
    switches: int = 0
    replans: int = 0


class Tally:
    """Adds up one run.

    Args:
        period_s: Between requests; 0: each starts when the one before ends.
        usual_s: In which an item should be done: the period, or what bounds its time.
    """

    def __init__(self, period_s: float = 0.0, usual_s: float = inf) -> None:
        self._period_s, self._usual_s = period_s, period_s or usual_s
        self._items = self._weight = self._good = self._energy_j = self._time_s = 0.0
        self._excess_sum = self._late_s = self._paused_s = 0.0
        # Of the item at work: progress, seconds, joules, seconds of pauses, excesses by progress.
        self.progress = self._spent_s = self._spent_j = self._stood_s = 0.0
        self._excess: tuple[float, ...] = ()
        # Until the next request comes. Requests are out of step with the trace.
        self._wait_s = 0.4 * period_s

    @property
    def counts(self) -> tuple[float, float]:
        """Items that have ended, and those of them that broke a bound."""
        return self._items, self._items - self._good

    @property
    def is_between(self) -> bool:
        """Whether no item is at work."""
        return self.progress <= 0

    def rest_s(self, found: Forecast | None) -> float:
        """Returns how long the item at work goes on under conditions in which it takes `found`."""
        return inf if found is None else (1 - self.progress) * found.time_s

    def run(self, found: Forecast | None, length_s: float) -> None:
        """Lets a plan work for a while under conditions in which it takes `found`."""
        if found is None:
            self.pause(length_s)
            return
        left_s = self._waited(length_s)
        if not self.is_between or self._stood_s:
            rest_s = self.rest_s(found)
            if rest_s > left_s:
                self._advance(found, left_s)
                return
            self._advance(found, rest_s)
            self._finish()
            left_s = self._waited(left_s - rest_s)
        whole = int(left_s / max(found.time_s, self._period_s) + 1e-9)
        self._count(whole, found.time_s, found.energy_j, max(found.excess, default=0.0))
        left_s -= whole * max(found.time_s, self._period_s)
        if left_s >= found.time_s:
            self._advance(found, found.time_s)
            self._finish()
            self._waited(left_s - found.time_s)
        elif left_s > 1e-9:
            self._advance(found, left_s)

    def pause(self, length_s: float) -> None:
        """Lets time pass without work; the item at work, or the next one, waits."""
        self._paused_s += length_s
        # What ends before the next request comes hurts nobody.
        stood_s = length_s - min(self._wait_s, length_s)
        self._waited(length_s)
        self._stood_s += stood_s
        self._spent_s += stood_s

    def restart(self) -> None:
        """Loses the progress of the item at work, not its time and energy."""
        self._stood_s = self._spent_s
        self.progress, self._excess = 0.0, ()

    def _waited(self, length_s: float) -> float:
        waited_s = min(self._wait_s, length_s)
        self._wait_s -= waited_s
        return length_s - waited_s

    def _advance(self, found: Forecast, length_s: float) -> None:
        share = length_s / found.time_s if found.time_s > 0 else 1.0
        before = self._excess or (0.0,) * len(found.excess)
        self._excess = tuple(e + share * f for e, f in zip(before, found.excess, strict=True))
        self.progress += share
        self._spent_s += length_s
        self._spent_j += share * found.energy_j

    def _finish(self) -> None:
        work_s = self._spent_s - self._stood_s
        # A pause stretches whatever the bounds are about.
        stretch = self._spent_s / work_s if work_s > 0 else 1.0
        self._count(1, self._spent_s, self._spent_j, max(self._excess, default=0.0) * stretch)
        # The next request comes a period after this one came.
        self._wait_s = max(0.0, self._period_s - self._spent_s)
        self.progress = self._spent_s = self._spent_j = self._stood_s = 0.0
        self._excess = ()

    def _count(self, n: int, time_s: float, energy_j: float, worst: float) -> None:
        late = late_share_at(worst)
        self._items += n
        self._weight += n * (1 - late + late * max(1.0, time_s / self._usual_s))
        self._good += n * (1 - late)
        self._energy_j += n * energy_j
        self._time_s += n * time_s
        self._excess_sum += n * worst
        self._late_s += n * late * time_s

    def totals(self, *, switches: int = 0, replans: int = 0) -> Totals:
        """Returns what it came to; an item that is late before it ends counts already."""
        is_stuck = self._spent_s > self._usual_s
        weight = self._weight + (self._spent_s / self._usual_s if is_stuck else 0.0)
        n = max(self._items, 1e-9)
        return Totals(
            items=self._items,
            attained=self._good / weight if weight else 0.0,
            energy_j=self._energy_j / n,
            time_s=self._time_s / n,
            excess=self._excess_sum / n,
            late_s=self._late_s + (self._spent_s if is_stuck else 0.0),
            paused_s=self._paused_s,
            switches=switches,
            replans=replans,
        )


def late_share_at(worst: float) -> float:
    """Returns the share of items over a bound, of which they should take `worst`."""
    deviations = log(max(worst, 1e-9)) / NOISE
    if abs(deviations) > _MOST_DEVIATIONS:
        return float(deviations > 0)
    return 0.5 * (1 + erf(deviations / sqrt(2)))
