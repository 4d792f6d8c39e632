"""Watches a run: what media and devices deliver, over what the plan was made with.

The engine's statistics give `rate` and `delay`, measured Timelines give `step`, the operating
system gives `battery`. An observation costs about a microsecond, so that a step of a millisecond
may bring a few without costing one percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from statistics import median
from typing import NamedTuple

from dora.adapter.arrivals import Arrivals
from dora.adapter.estimate import Estimate, Tracker
from dora.spec import Timeline

# Noise to expect before any is seen. Rates of Wi-Fi differ by a third from second to second
# (benchmarks/traces/SOURCES.md), computing by a few percent.
RATE_SPREAD, SPEED_SPREAD, DELAY_SPREAD = 0.3, 0.05, 0.3
# What a second without news adds: the standard deviation of a rate doubles its logarithm's after
# minutes (at a lag of 60 s the traces are uncorrelated), a device's speed stays.
RATE_DRIFT, SPEED_DRIFT = 0.03, 0.005
# What was late is remembered for about that many items.
MEMORY_ITEMS = 100.0
# What is not used has to be probed that often to know when it is good again.
PROBE_S = 2.0


class View(NamedTuple):
    """All that is known at one time.

    Attributes:
        estimates: By name of medium or device, of rate and speed. Of a device that has not been
            seen: slower than given by what all have in common that were.
        delays: By name of medium, of its latency.
        changed: Names that jumped since the last view.
        gone: Devices that left or failed.
        calm_s: How long the present is likely to last: the mean time between changes, or the time
            since the last one, what is longer.
        num_items, late: Items of the plan that runs, since it began or something changed, and the
            share of them that broke a bound.
        batteries_s: Seconds until the battery of a device is empty at what it draws now.
    """

    at_s: float
    estimates: Mapping[str, Estimate]
    delays: Mapping[str, Estimate] = {}
    changed: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    calm_s: float = 0.0
    num_items: float = 0.0
    late: float = 0.0
    batteries_s: Mapping[str, float] = {}


class Monitor:
    """Collects observations of one run; all times on one clock, in seconds.

    Args:
        media: Names of the media.
        devices: Names of the devices, in rank order.
        spreads: Expected noise of media or devices, where it is known.
    """

    def __init__(
        self,
        media: Iterable[str],
        devices: Sequence[str],
        *,
        spreads: Mapping[str, float] | None = None,
    ) -> None:
        given = spreads or {}
        self._devices = tuple(devices)
        self._trackers = {
            name: Tracker(spread=given.get(name, RATE_SPREAD), drift=RATE_DRIFT) for name in media
        }
        self._delays = {name: Tracker(spread=DELAY_SPREAD) for name in self._trackers}
        self._trackers |= {
            name: Tracker(spread=given.get(name, SPEED_SPREAD), drift=SPEED_DRIFT)
            for name in devices
        }
        self._arrivals = {name: Arrivals() for name in devices}
        self._levels: dict[str, tuple[float, float]] = {}
        self._draws_w: dict[str, float] = {}
        self._changed: set[str] = set()
        self._gone: set[str] = set()
        self._first_s, self._last_change_s, self._num_changes = inf, -inf, 0
        self._num_items = self._num_late = 0.0

    def rate(self, medium: str, factor: float, at_s: float) -> None:
        """Adds what a medium carried while it was busy, over its rate in the cluster."""
        self._observe(self._trackers[medium], medium, factor, at_s)

    def delay(self, medium: str, factor: float, at_s: float) -> None:
        """Adds a round trip without load, over what the cluster gives."""
        self._observe(self._delays[medium], medium, factor, at_s)

    def speed(self, device: str, factor: float, at_s: float) -> None:
        """Adds how fast a device computed, over what the profile says."""
        self._observe(self._trackers[device], device, factor, at_s)

    def step(self, predicted: Timeline, measured: Timeline, at_s: float) -> None:
        """Adds the speeds that one step's Timeline shows; what it lacks is left as it is."""
        for rank, factor in speeds(predicted, measured).items():
            self.speed(self._devices[rank], factor, at_s)

    def items(self, num_items: float, num_late: float = 0.0) -> None:
        """Adds steps or requests of the plan that runs, and how many of them broke a bound."""
        fade = MEMORY_ITEMS / (MEMORY_ITEMS + num_items)
        self._num_items = fade * self._num_items + num_items
        self._num_late = fade * self._num_late + num_late

    def switched(self) -> None:
        """Forgets the items so far: another plan runs."""
        self._num_items = self._num_late = 0.0

    def battery(self, device: str, level_j: float, at_s: float) -> None:
        """Adds what is left in a battery."""
        before = self._levels.get(device)
        self._levels[device] = (level_j, at_s)
        if before is not None and at_s > before[1]:
            drawn_w = (before[0] - level_j) / (at_s - before[1])
            known_w = self._draws_w.get(device, drawn_w)
            self._draws_w[device] = known_w + 0.2 * (drawn_w - known_w)

    def alive(self, device: str, at_s: float) -> None:
        """Adds a sign of life; a device that was gone is back."""
        if device in self._gone:
            self._gone.discard(device)
            self._note(device, at_s)
            self._arrivals[device] = Arrivals()
            self._trackers[device] = Tracker(spread=SPEED_SPREAD, drift=SPEED_DRIFT)
        self._arrivals[device].observe(at_s)

    def lost(self, device: str, at_s: float) -> None:
        """Takes a device for gone: it said so, its connection broke, or it is late."""
        if device not in self._gone:
            self._gone.add(device)
            self._note(device, at_s)

    def late(self, at_s: float) -> tuple[str, ...]:
        """Returns devices that are silent for longer than their own history explains."""
        return tuple(
            name
            for name in self._devices
            if name not in self._gone and self._arrivals[name].is_late(at_s)
        )

    def unseen(self, at_s: float) -> tuple[str, ...]:
        """Returns media and devices without a recent observation, to be probed."""
        return tuple(
            name
            for name, tracker in self._trackers.items()
            if name not in self._gone and tracker.estimate(at_s).age_s >= PROBE_S
        )

    @property
    def has_news(self) -> bool:
        """Whether something has changed, come or gone since the last view."""
        return bool(self._changed)

    def view(self, at_s: float) -> View:
        """Returns all that is known; the next view tells of changes after this one only."""
        changed, self._changed = frozenset(self._changed), set()
        delays = {n: t.estimate(at_s) for n, t in self._delays.items() if t.num_seen}
        first_s = min(self._first_s, at_s)
        lasted_s = at_s - max(self._last_change_s, first_s)
        calm_s = max((at_s - first_s) / (self._num_changes + 1), lasted_s)
        return View(
            at_s=at_s,
            estimates=self._estimates(at_s),
            delays=delays,
            changed=changed,
            gone=frozenset(self._gone),
            calm_s=calm_s,
            num_items=self._num_items,
            late=self._num_late / self._num_items if self._num_items else 0.0,
            batteries_s={
                name: level_j / self._draws_w[name] if self._draws_w.get(name, 0.0) > 0 else inf
                for name, (level_j, _) in self._levels.items()
            },
        )

    def _estimates(self, at_s: float) -> dict[str, Estimate]:
        """Returns what is known of all; without doubt in what is idle, it would always look best.

        On a machine that was busier than at the time of the profile, a job left the device that it
        knew to be at 0.78 for one at as much that it did not know.
        """
        found = {name: tracker.estimate(at_s) for name, tracker in self._trackers.items()}
        seen = [found[name].factor for name in self._devices if found[name].num_seen]
        common = min(max(seen), 1.0) if len(seen) > 1 else 1.0
        unseen = [name for name in self._devices if not found[name].num_seen]
        return found | {name: found[name]._replace(factor=common) for name in unseen}

    def _observe(self, tracker: Tracker, name: str, factor: float, at_s: float) -> None:
        self._first_s = min(self._first_s, at_s)
        if tracker.observe(factor, at_s):
            self._note(name, at_s)

    def _note(self, name: str, at_s: float) -> None:
        self._changed.add(name)
        self._num_changes += 1
        self._last_change_s = at_s
        self.switched()


def speeds(predicted: Timeline, measured: Timeline) -> dict[int, float]:
    """Returns how fast each rank computed over its prediction: the median over its actions.

    The median, because the first action of a step finds cold caches and the last ones may share
    the processor with the reduction of gradients.
    """
    expected = {
        (s.rank, s.label): s.end_s - s.start_s for s in predicted.spans if s.lane == "compute"
    }
    found: dict[int, list[float]] = {}
    for span in measured.spans:
        wanted_s = expected.get((span.rank, span.label))
        if span.lane == "compute" and wanted_s and span.end_s > span.start_s:
            found.setdefault(span.rank, []).append(wanted_s / (span.end_s - span.start_s))
    return {rank: median(ratios) for rank, ratios in found.items()}
