"""Lets the adapter's own policy live through a trace, in the simulator: hours in seconds.

What a plan takes in each segment comes from `Predictor`; the monitor sees it with noise, as it
would see a real run, and knows nothing else; `decide` is the code that runs beside a real model.
Modelled are: switches at the end of an item, weights that move in the background at what the
network carries now (training: while nothing runs), and the time until a lost device is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, inf
from random import Random
from typing import NamedTuple

from dora.adapt.bank import plans_for
from dora.adapt.forecast import Predictor, pricer
from dora.adapt.machine import Machine, Residence
from dora.adapt.tally import NOISE, Totals
from dora.adapt.world import Segment
from dora.adapter.events import Event, event
from dora.adapter.migrate import placed
from dora.adapter.monitor import PROBE_S, Monitor, View
from dora.adapter.policy import decide
from dora.adapter.rules import Rules, Standing
from dora.spec import Conditions, Decision, Plan, SwitchCost

# Noise of one second's measurements of a rate by the engine's statistics.
RATE_NOISE = 0.05
# A device that dies is missed after that: a few heartbeats of half a second are late.
DETECTION_S = 2.0
# Seconds of searching for plans in the background.
PLANNING_S = 3.0
# The bank grows by plans of searches in the background, up to this.
MOST_PLANS = 60


class Played(NamedTuple):
    """What came of a run, what was decided, what ran in the end, and what there was to choose."""

    totals: Totals
    events: tuple[Event, ...]
    plans: tuple[Plan, ...]
    bank: tuple[Plan, ...] = ()


class Fetch(NamedTuple):
    """Weights of a plan on their way, in the background."""

    plan: Plan
    start_s: float
    end_s: float

    def share(self, now_s: float) -> float:
        """Returns how much has arrived."""
        return min((now_s - self.start_s) / max(self.end_s - self.start_s, 1e-9), 1.0)


class Senses:
    """Shows a monitor what a real run would show it of a segment: with noise, and what is used."""

    def __init__(self, predict: Predictor, seed: int) -> None:
        self._predict, self._random = predict, Random(seed)
        self._media = [m.name for m in predict.cluster.media]
        self._devices = [d.name for d in predict.cluster.devices]
        self.monitor = Monitor(self._media, self._devices)
        self.gone: frozenset[str] = frozenset()
        self._missed_s: dict[str, float] = {}
        self._probed_s = 0.0

    def leave_and_join(self, part: Segment) -> frozenset[str]:
        """Returns the devices that died just now; the monitor hears of them a little later."""
        factors = dict(part.conditions.factors)
        gone = frozenset(name for name in self._devices if factors.get(name, 1.0) <= 0)
        died = gone - self.gone
        self._missed_s |= {name: part.start_s + DETECTION_S for name in died}
        for name in self.gone - gone:
            self._missed_s.pop(name, None)
            self.monitor.alive(name, part.start_s)
        self.gone = gone
        return died

    def observe(self, part: Segment, plans: Sequence[Plan]) -> View:
        """Returns what is known at the end of a segment."""
        now_s = part.end_s
        touched = set().union(*(self._predict.touched(plan) for plan in plans))
        if now_s - self._probed_s >= PROBE_S:
            self._probed_s = now_s
            touched |= set(self.monitor.unseen(now_s))
        factors = dict(part.conditions.factors)
        for name in touched.intersection(self._media):
            self.monitor.rate(name, factors.get(name, 1.0) * self._noise(RATE_NOISE), now_s)
        for name in touched.intersection(self._devices) - self.gone:
            self.monitor.speed(name, factors.get(name, 1.0) * self._noise(NOISE), now_s)
        for name in [n for n, at_s in self._missed_s.items() if at_s <= now_s]:
            self.monitor.lost(name, now_s)
            del self._missed_s[name]
        return self.monitor.view(now_s)

    def _noise(self, sigma: float) -> float:
        return exp(self._random.gauss(0, sigma))


class _Run:
    """One trace being lived through under the policy."""

    def __init__(
        self,
        predict: Predictor,
        bank: Sequence[Plan],
        rules: Rules,
        seed: int,
        search: Callable[[Conditions], list[Plan]],
    ) -> None:
        self.predict, self.rules, self.bank, self.search_in = predict, rules, list(bank), search
        self.is_live = predict.workload.kind == "train"
        self.senses = Senses(predict, seed)
        self.standing = Standing((bank[0],))
        self.residence = Residence(predict, (bank[0],))
        self.price = pricer(predict, self.residence.held)
        self.machine = Machine(
            predict, bank[0], period_s=rules.period_s, pause_of=self.residence.pause_s
        )
        # Under way; of switches and searches: (done at, what).
        self.switch: tuple[float, Decision] | None = None
        self.moves: list[Fetch] = []
        self.search: tuple[float, Conditions] | None = None
        self.events: list[Event] = []
        self.replans, self.is_fresh = 0, False

    def segment(self, part: Segment) -> None:
        """Works, observes and decides."""
        for name in self.senses.leave_and_join(part):
            self.machine.lose(name)
        self.residence.lose(self.senses.gone)
        self._end_what_is_done(part.start_s)
        before, (items, late) = self.machine.plans, self.machine.tally.counts
        self.machine.work(part)
        more, later = self.machine.tally.counts
        if self.machine.plans is not before:
            self.residence.run(self.machine.plans)
            self.senses.monitor.switched()
            self.is_fresh = True
        elif not self.is_fresh:
            self.senses.monitor.items(more - items, later - late)
        elif more > items:  # the first item waited for the switch, and says nothing
            self.is_fresh = False
        self._decide(self.senses.observe(part, self.machine.plans), part)

    def _end_what_is_done(self, now_s: float) -> None:
        for fetch in self.moves:
            self.residence.keep(fetch.plan, fetch.share(now_s))
        self.moves = [fetch for fetch in self.moves if fetch.end_s > now_s]
        if self.switch is not None and self.switch[0] <= now_s:
            decision, self.switch = self.switch[1], None
            self.machine.switch(decision.plans, decision.weights or (1.0,))
        if self.search is not None and self.search[0] <= now_s:
            world, self.search = self.search[1], None
            self._extend(world)

    def _extend(self, world: Conditions) -> None:
        """Adds the plans of a search to the bank."""
        self.replans += 1
        have = {(p.stages, p.routes, p.warmup) for p in self.bank}
        found = self.search_in(world)
        new = [p for p in found if (p.stages, p.routes, p.warmup) not in have]
        self.bank += new[: MOST_PLANS - len(self.bank)]

    def _decide(self, view: View, part: Segment) -> None:
        is_dead = any(view.gone & set(placed(plan)) for plan in self.standing.plans)
        if (self.switch is not None or self.machine.is_switching) and not is_dead:
            return
        outcome = decide(self.bank, self.standing, view, self.predict, self.price, self.rules)
        decision = outcome.decision
        ways = [self.price(self.machine.plans, p, part.conditions) for p in decision.plans]
        if any(way.pause_s + way.background_s == inf for way in ways):
            return  # weights are out of reach: decides again
        self.standing = outcome.standing
        if decision.is_replanning and self.search is None:
            self.search = view.at_s + PLANNING_S, estimated(view)
        if decision.plans:
            self._start(decision, ways, part)
        elif not self.is_live:
            self._prepare(decision.prepare, part)
        if decision.kind != "keep":
            done = int(self.machine.tally.counts[0])
            self.events.append(event(decision, view, step=done, forecast=outcome.forecast))

    def _start(self, decision: Decision, ways: Sequence[SwitchCost], part: Segment) -> None:
        """Begins to move what serving needs; training, and what stands still, moves at the end."""
        ready_s = part.end_s
        stands = any(self.predict(p, part.conditions) is None for p in self.machine.plans)
        if not self.is_live and not stands:
            ready_s += max(way.background_s for way in ways)
            self.moves += [Fetch(plan, part.end_s, ready_s) for plan in decision.plans]
        self.switch = ready_s, decision

    def _prepare(self, plans: Sequence[Plan], part: Segment) -> None:
        """Moves the weights of one plan at a time, at half of the rate."""
        for plan in plans:
            if self.moves:
                return
            way = self.price(self.machine.plans, plan, part.conditions)
            if 0 < way.background_s < inf:
                end_s = part.end_s + 2 * way.background_s
                self.moves.append(Fetch(plan, part.end_s, end_s))


def searcher(
    predict: Predictor, effort_s: float, found: dict[Conditions, list[Plan]] | None = None
) -> Callable[[Conditions], list[Plan]]:
    """Returns what searches a world, or one much like it that was searched before.

    Args:
        predict: Knows the cluster.
        effort_s: Of each search.
        found: Remembers searches from one trace to the next.
    """
    known = {} if found is None else found

    def search(world: Conditions) -> list[Plan]:
        coarse = coarsened(world)
        if coarse not in known:
            known[coarse] = plans_for(predict, coarse, effort_s=effort_s)
        return known[coarse]

    return search


def coarsened(world: Conditions) -> Conditions:
    """Returns conditions in steps of a quarter, at least a tenth: what is worth another search."""
    return Conditions(
        tuple((n, max(round(4 * f) / 4, 0.1) if f > 0 else 0.0) for n, f in world.factors)
    )


def estimated(view: View) -> Conditions:
    """Returns the medians of a view."""
    factors = {n: e.factor for n, e in view.estimates.items() if e.num_seen}
    return Conditions.of(factors | dict.fromkeys(view.gone, 0.0))


def play_adapter(
    predict: Predictor,
    bank: Sequence[Plan],
    parts: Sequence[Segment],
    rules: Rules,
    *,
    seed: int = 0,
    effort_s: float = 0.2,
    searched: dict[Conditions, list[Plan]] | None = None,
) -> Played:
    """Returns what the policy makes of a trace.

    Args:
        predict: What plans take.
        bank: Plans; the first one runs at first.
        parts: The trace.
        rules: Of the policy.
        seed: Of the noise of measurements.
        effort_s: Of each search in the background.
        searched: Remembers searches from one trace to the next.
    """
    run = _Run(predict, bank, rules, seed, searcher(predict, effort_s, searched))
    for part in parts:
        run.segment(part)
    return Played(
        run.machine.totals(replans=run.replans),
        tuple(run.events),
        run.machine.plans,
        tuple(run.bank),
    )
