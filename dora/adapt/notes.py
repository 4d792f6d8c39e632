"""What a rank notes of its calls between two exchanges, and what all ranks' notes come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log
from statistics import median
from typing import NamedTuple

from dora.adapt.pace import Plea
from dora.spec import Timeline

# Plans of a mix: one more than bounds that bind, of which there are few.
MOST_TURNS = 4
# See `Noted`; then of each plan what `Lap` has.
NUM_OWN = 6
NUM_NOTED = NUM_OWN + 3 * MOST_TURNS
# What calls and computing may differ by, from one exchange to the next, without a reason: at least
# a fifth, where they are unsteady four times what they usually do.
_STEADY, _UNSTEADY = 0.2, 4.0
# Of few calls, until it is known.
_NOISE = 0.1
_GAIN = 0.2


class Lap(NamedTuple):
    """The calls of one plan: how many, how many of them late, and their seconds in all."""

    calls: float = 0.0
    late: float = 0.0
    seconds: float = 0.0

    @property
    def mean_s(self) -> float:
        """Of one call."""
        return self.seconds / self.calls if self.calls else 0.0


class Noted(NamedTuple):
    """What one rank tells of itself.

    Attributes:
        speed: Over what the profile says; 0 is not known.
        cost_s: Of the last exchange.
        seconds: Of all calls since.
        is_alarmed: Whether calls or computing take longer, or less, than before.
        left, is_due: What this rank would want, see `Plea`.
    """

    speed: float
    cost_s: float
    seconds: float
    is_alarmed: float
    left: float
    is_due: float


def noted(row: Sequence[float]) -> Noted:
    """Returns what a rank says of itself."""
    return Noted(*row[:NUM_OWN])


def is_alarmed(rows: Iterable[Sequence[float]]) -> bool:
    """Returns whether a rank has noticed something."""
    return any(noted(row).is_alarmed for row in rows)


def is_asked(rows: Sequence[Sequence[float]]) -> bool:
    """Returns whether the lowest rank decides: it wants to, or somebody has noticed something."""
    return bool(noted(rows[0]).is_due) or is_alarmed(rows)


class Notes:
    """Of one rank.

    Args:
        usual_s: What a call may take.
    """

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self.begin([{}])

    def begin(self, expected_s: Sequence[Mapping[str, float]]) -> None:
        """Forgets all; from now on these plans run.

        Args:
            expected_s: Of each plan, (action of this rank -> seconds) as predicted.
        """
        self._expected_s = expected_s
        self._usual: dict[str, tuple[float, float]] = {}  # logarithms: level, deviation
        self._fresh = set(range(len(expected_s)))
        self._clear()

    def _clear(self) -> None:
        self._laps = [Lap() for _ in self._expected_s]
        self._speeds: list[float] = []

    def add(self, turn: int, computed: Iterable[tuple[str, float]], seconds: float) -> None:
        """Adds a call; the first one of each plan finds the shapes and says nothing."""
        if turn in self._fresh:
            self._fresh.discard(turn)
            return
        expected_s = self._expected_s[turn]
        ratios = [
            expected_s[a] / took_s for a, took_s in computed if took_s > 0 and a in expected_s
        ]
        self._speeds += [median(ratios)] if ratios else []
        calls, late, total_s = self._laps[turn]
        self._laps[turn] = Lap(calls + 1, late + (seconds > self._usual_s), total_s + seconds)

    @property
    def worked(self) -> tuple[float, float]:
        """Seconds of the calls since the last exchange, and their number."""
        return sum(lap.seconds for lap in self._laps), sum(lap.calls for lap in self._laps)

    def row(self, cost_s: float, plea: Plea, *, is_watching: bool) -> list[float]:
        """Returns the notes as numbers, and starts anew.

        Args:
            cost_s: Of the last exchange.
            plea: Of this rank.
            is_watching: Whether this rank sees how long calls take.
        """
        laps = [*self._laps, *[Lap()] * MOST_TURNS][:MOST_TURNS]
        speed = median(self._speeds) if self._speeds else 0.0
        now = {f"{i}": lap.mean_s for i, lap in enumerate(laps) if is_watching}
        is_alarmed = self._is_other({**now, "speed": speed})
        seconds, _ = self.worked
        own = Noted(speed, cost_s, seconds, is_alarmed, plea.left, plea.is_due)
        self._clear()
        return [*map(float, own), *(value for lap in laps for value in lap)]

    def _is_other(self, now: Mapping[str, float]) -> bool:
        """Returns whether something is not what it was; from then on that is usual."""
        is_other = False
        for key, value in now.items():
            if value > 0:
                level, noise = self._usual.get(key, (log(value), _NOISE))
                away = log(value) - level
                is_jump = abs(away) > max(_STEADY, _UNSTEADY * noise)
                level += (1.0 if is_jump else _GAIN) * away
                self._usual[key] = level, noise + _GAIN * (abs(away) - noise)
                is_other = is_other or is_jump
        return is_other


def compute_s(timeline: Timeline, rank: int) -> dict[str, float]:
    """Returns what each action of a rank should take."""
    spans = (s for s in timeline.spans if s.rank == rank and s.lane == "compute")
    return {span.label: span.end_s - span.start_s for span in spans if span.end_s > span.start_s}


def laps_of(rows: Mapping[int, Sequence[float]], watchers: Sequence[Iterable[int]]) -> list[Lap]:
    """Returns the calls of each plan as those ranks saw them that know: the slowest of them.

    Args:
        rows: By rank.
        watchers: Of each plan, the ranks whose clocks count.
    """
    found = []
    for turn, ranks in enumerate(watchers):
        first = NUM_OWN + 3 * turn
        seen = [Lap(*rows[rank][first : first + 3]) for rank in ranks if rank in rows]
        worst = max(seen, key=lambda lap: lap.mean_s, default=Lap())
        found.append(worst._replace(late=max((lap.late for lap in seen), default=0.0)))
    return found
