"""How often the ranks of a job tell each other, and decide: as a share of its time pays for.

Telling is cheap, and shows that something has changed; deciding is dear. Each has its account.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

# What noting, telling and deciding may take of the time of all calls; half of it each.
SHARE = 0.01
# A device that has slowed down is worth knowing soon, but what one exchange takes is not known yet.
FIRST_CALLS = 3
# Of what exchanges took, what the next one will take is the mean: the first finds cold caches.
_GAIN = 0.3
# A change that matters is worth knowing within minutes.
MOST_CALLS = 1000
# Exchanges after an alarm that come call by call, whatever they cost: a jump is certain after two
# or three, and the plan that follows it has to be judged.
HOT_EXCHANGES = 6
# Alarms are false where calls are unsteady: then they wait until what they cost is nearly earned.
MOST_DEBT_S = 30.0


class Account:
    """What was spent is earned before more is."""

    def __init__(self) -> None:
        self._lacking_s, self._usual_s = 0.0, 0.0

    def work(self, seconds: float) -> None:
        """Earns a share of the time of calls."""
        self._lacking_s -= SHARE / 2 * seconds

    def pay(self, cost_s: float) -> None:
        """Spends."""
        self._lacking_s += cost_s
        self._usual_s += (_GAIN if self._usual_s else 1.0) * (cost_s - self._usual_s)

    @property
    def wait_s(self) -> float:
        """Seconds of calls until the next one is earned."""
        return max(self._lacking_s + self._usual_s, 0.0) / (SHARE / 2)


class Plea(NamedTuple):
    """What the rank that decides wants: calls until the next exchange, and whether it decides."""

    left: int
    is_due: bool


class Pace:
    """Keeps the accounts.

    Args:
        every: Calls between two exchanges, each of which decides; None keeps account.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._telling, self._deciding = Account(), Account()
        self._hot, self._has_decided = 0, False

    def alarm(self) -> None:
        """Something has changed, or is about to: the next exchanges come soon, and decide."""
        if self._deciding.wait_s <= MOST_DEBT_S:
            self._hot = HOT_EXCHANGES

    def next(self, worked_s: float, calls: float) -> Plea:
        """Returns what is wanted after so many calls.

        Args:
            worked_s: Seconds of the calls since the last exchange.
            calls: Number of them.
        """
        if self._every is not None:
            return Plea(self._every, True)
        self._telling.work(worked_s)
        self._deciding.work(worked_s)
        if not calls or not worked_s:
            return Plea(FIRST_CALLS, True)
        if self._hot:
            self._hot -= 1
            return Plea(1, True)
        left = ceil(self._telling.wait_s / (worked_s / calls))
        return Plea(min(max(left, 1), MOST_CALLS), self._deciding.wait_s <= 0)

    def pay(self, cost_s: float, *, has_decided: bool) -> None:
        """Notes what an exchange took, and noting before it."""
        (self._deciding if has_decided else self._telling).pay(cost_s)
