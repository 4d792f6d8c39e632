"""How conditions change over time, from the traces that `dora.simulator.dynamics` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dora.simulator import Dynamics
from dora.spec import Conditions


class Segment(NamedTuple):
    """Conditions that hold from one time to another."""

    start_s: float
    end_s: float
    conditions: Conditions

    @property
    def length_s(self) -> float:
        """Seconds."""
        return self.end_s - self.start_s


def segments(dynamics: Dynamics, end_s: float, *, tick_s: float = 1.0) -> list[Segment]:
    """Returns the stretches between changes up to `end_s`.

    Long ones are cut: in the first ten ticks after a change one a tick, later ever longer pieces,
    since nothing more is to be seen; hours of a quiet trace are few pieces.
    """
    factors: dict[str, float] = {}
    found: list[Segment] = []
    changes = _grouped(dynamics.entries)
    times = [at_s for at_s, _ in changes if at_s < end_s]
    for (at_s, changed), until_s in zip(changes, [*times[1:], end_s], strict=False):
        factors.update(changed)
        conditions = Conditions.of(factors)
        for a, b in _pieces(at_s, until_s, tick_s):
            found.append(Segment(a, b, conditions))
    return found


def _grouped(
    entries: Iterable[tuple[float, str, float]],
) -> list[tuple[float, dict[str, float]]]:
    """Returns the changes of each time; the first time is 0."""
    grouped: dict[float, dict[str, float]] = {0.0: {}}
    for at_s, name, factor in entries:
        grouped.setdefault(at_s, {})[name] = factor
    return sorted(grouped.items())


def _pieces(start_s: float, end_s: float, tick_s: float) -> Iterator[tuple[float, float]]:
    at_s, length_s, count = start_s, tick_s, 0
    while at_s < end_s - 1e-9:
        until_s = min(at_s + length_s, end_s)
        yield at_s, until_s
        at_s, count = until_s, count + 1
        if count >= 10:
            length_s = min(1.5 * length_s, 60 * tick_s)


def merged(parts: Sequence[Dynamics]) -> Dynamics:
    """Returns traces of different media and devices as one."""
    entries = sorted((e for part in parts for e in part.entries), key=lambda e: e[0])
    return Dynamics(tuple(entries))
