"""Runs plans through a trace for whoever decides: items, switches, and what lies where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf

from dora.adapt.forecast import Predictor, block_bytes
from dora.adapt.tally import Tally, Totals
from dora.adapt.world import Segment
from dora.adapter.compose import next_turn
from dora.adapter.migrate import BARRIER_S, migration, placed
from dora.spec import Conditions, Forecast, Plan

PauseOf = Callable[[Sequence[Plan], Conditions], float]


class Machine:
    """Works through segments with one plan, or several in turn; switches when told to.

    Args:
        predict: What plans take.
        plan: The first one.
        period_s: Between requests.
        pause_of: Seconds in which nothing runs when these plans take over.
    """

    def __init__(
        self, predict: Predictor, plan: Plan, *, period_s: float, pause_of: PauseOf
    ) -> None:
        self._predict, self._period_s = predict, period_s
        self.pause_of = pause_of
        self.plans: tuple[Plan, ...] = (plan,)
        self._weights: tuple[float, ...] = (1.0,)
        self._counts, self._turn = [0], 0
        self._next: tuple[tuple[Plan, ...], tuple[float, ...]] | None = None
        self._pause_s, self.switches = 0.0, 0
        self.tally = Tally(period_s, predict.usual_s)

    @property
    def is_switching(self) -> bool:
        """Whether other plans wait to take over, or have not begun to work."""
        return self._next is not None or self._pause_s > 0

    def switch(self, plans: tuple[Plan, ...], weights: tuple[float, ...] = (1.0,)) -> None:
        """Goes over to these plans when the item at work is done, or sooner if that is better."""
        self._next = plans, weights

    def lose(self, name: str) -> None:
        """Loses a device, and with it the item that it worked on."""
        if any(name in placed(plan) for plan in self.plans):
            self.tally.restart()

    def work(self, part: Segment) -> None:
        """Passes through one segment."""
        found = [self._predict(plan, part.conditions) for plan in self.plans]
        left_s = part.length_s
        while left_s > 1e-9:
            if self._pause_s > 0:
                step_s = min(self._pause_s, left_s)
                self._pause_s -= step_s
                self.tally.pause(step_s)
            elif self._next is not None and self._is_free(found, part.conditions):
                self._take_over(part.conditions)
                found = [self._predict(plan, part.conditions) for plan in self.plans]
                step_s = 0.0
            else:
                step_s = self._work_for(found, left_s)
            left_s -= step_s

    def _is_free(self, found: Sequence[Forecast | None], conditions: Conditions) -> bool:
        """Returns whether to go over now, which loses an item that would take too long to end."""
        assert self._next is not None
        pause_s = self.pause_of(self._next[0], conditions)
        if self.tally.is_between or pause_s == inf:
            return pause_s < inf
        new = self._predict(self._next[0][0], conditions)
        again_s = inf if new is None else new.time_s + pause_s
        if self.tally.rest_s(found[self._turn]) <= again_s:
            return False
        self.tally.restart()
        return True

    def _take_over(self, conditions: Conditions) -> None:
        assert self._next is not None
        self._pause_s = self.pause_of(self._next[0], conditions)
        (self.plans, self._weights), self._next = self._next, None
        self._counts, self._turn = [0] * len(self.plans), 0
        self.switches += 1

    def _work_for(self, found: Sequence[Forecast | None], most_s: float) -> float:
        """Works and returns for how long: an item, if the next one may be another plan's."""
        if len(self.plans) > 1 and self.tally.is_between:
            self._turn = next_turn(self._counts, self._weights)
            self._counts[self._turn] += 1
        now, step_s = found[self._turn], most_s
        if now is not None and self._next is not None:
            step_s = min(self.tally.rest_s(now), most_s)
        elif now is not None and len(self.plans) > 1:
            rest_s = self.tally.rest_s(now)
            idle_s = max(self._period_s - now.time_s, 0.0)
            step_s = min(rest_s + idle_s, most_s)
        self.tally.run(now, step_s)
        return step_s

    def totals(self, *, replans: int = 0) -> Totals:
        """Returns what it came to."""
        return self.tally.totals(switches=self.switches, replans=replans)


class Residence:
    """Which blocks lie on which devices: what runs, and what was put there for later.

    Training changes weights at every step, so that only what runs counts. What nobody has any more
    comes from the origin, the source of the inputs or else the first device: it has all weights on
    its disk, or their last snapshot.
    """

    def __init__(self, predict: Predictor, plans: Iterable[Plan]) -> None:
        self._sizes = block_bytes(predict.profile, predict.workload)
        self._capacity = {d.name: d.memory_bytes for d in predict.cluster.devices}
        self._predict, self._is_live = predict, predict.workload.kind == "train"
        self._running: tuple[Plan, ...] = tuple(plans)
        self._kept: dict[str, set[int]] = {}
        self._origin = predict.workload.source or predict.cluster.devices[0].name
        self.gone: frozenset[str] = frozenset()

    def held(self) -> dict[str, frozenset[int]]:
        """Returns the blocks on each device."""
        have = {name: set(blocks) for name, blocks in self._kept.items()}
        for plan in self._running:
            for name, blocks in placed(plan).items():
                have.setdefault(name, set()).update(blocks)
        have = {name: blocks for name, blocks in have.items() if name not in self.gone}
        every = set(range(len(self._sizes)))
        lost = every.difference(*have.values()) if self._is_live else every
        have.setdefault(self._origin, set()).update(lost)
        return {name: frozenset(blocks) for name, blocks in have.items()}

    def run(self, plans: Sequence[Plan]) -> None:
        """Changes what runs; serving, what ran before stays while there is room."""
        before, self._running = self._running, tuple(plans)
        for plan in () if self._is_live else before:
            self.keep(plan)

    def keep(self, plan: Plan, share: float = 1.0) -> None:
        """Keeps the first blocks of a plan on each device, where they fit beside what runs."""
        working = [self._predict.memory_bytes(p) for p in (*self._running, plan)]
        for name, blocks in placed(plan).items():
            if name in self.gone:
                continue
            room = self._capacity[name] - max(need.get(name, 0.0) for need in working)
            kept = self._kept.setdefault(name, set())
            total = sum(self._sizes[b] for b in kept)
            for block in sorted(blocks)[: int(share * len(blocks))]:
                if block not in kept and total + self._sizes[block] <= room:
                    kept.add(block)
                    total += self._sizes[block]

    def lose(self, gone: frozenset[str]) -> None:
        """Forgets what devices held that have gone."""
        self.gone = gone
        for name in gone:
            self._kept.pop(name, None)

    def pause_s(self, plans: Sequence[Plan], conditions: Conditions) -> float:
        """Returns how long nothing runs: the barrier, and all that is not in place yet."""
        held = self.held()
        found = [
            migration(held, p, self._sizes, self._predict.cluster, conditions=conditions)
            for p in plans
        ]
        return BARRIER_S + max(m.transfer_s for m in found)
