"""The state of one search: chains by their bounds, layouts that were played, what became of all.

Effort is counted in played actions, not in seconds: the same input and seed give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, log2

import numpy as np

from dora.planner.chains import Chain, Chains, shared_media, shares, twins
from dora.planner.codecs import CODECS, boundary_codecs, gradient_codecs, smallest
from dora.planner.improve import Move, all_modes, changes, descend, regrouped
from dora.planner.layouts import layouts
from dora.planner.limits import Limit, broken
from dora.planner.predict import (
    NO_CODEC,
    Group,
    Layout,
    Setting,
    as_step,
    evaluate,
    is_linked,
    largest_share,
    peak_bytes,
)
from dora.planner.select import Candidate
from dora.spec import Cluster

OBJECTIVES = ("time", "energy")
# Devices of which all chains are enumerated: a few ten thousand.
MAX_COMPLETE = 5
# Relative difference below which two predictions are equal.
TOLERANCE = 1e-9
# Chains of each number of micro-batches that are played before their bounds decide.
FIRST_WALKS = 12
# Chains at one depth are played at the other ones, and in other power modes, if they are within
# this factor of the best.
DEPTH_FACTOR = 1.5
# Layouts that are improved, of different stages each.
NUM_STARTS = 6
# Exponents of energy, against time, by which the power modes of a front are chosen.
FRONT_WEIGHTS = (0.3, 0.6, 1.0)

# Seconds that finding and playing a layout take on one core of a 2020s server, measured: 220 us in
# Python and 0.3 us per action.
CALL_S, ACTION_S = 220e-6, 0.3e-6


class Exploration:
    """State of one search: what was found, and what was rejected without being played.

    Attributes:
        found: Every layout that was played and has the memory.
        seen: The same by layout; None where memory or a link is missing.
        unfit: Placement -> why it can not run.
        unwalked: Placement -> (least time, least energy) of every chain that was bounded.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        cluster: Cluster,
        wanted: tuple[Limit, ...],
        max_loss: float,
        seed: int,
    ) -> None:
        """Starts with nothing found."""
        self.wanted, self.max_loss, self.seed = wanted, max_loss, seed
        self.cluster = cluster
        others = ~np.eye(len(settings[0].devices), dtype=bool)
        self.is_meshed = bool(np.isfinite(settings[0].links.latency_s[others]).all())
        self.media = shared_media(cluster, settings[0].devices)
        # A good plan, found early, cuts off most of the rest: it often has about two micro-batches
        # for each device.
        guess = 2 * min(len(settings[0].devices), 8)
        self.settings = sorted(settings, key=lambda k: abs(log2(k.num_microbatches / guess)))
        self.by_size = {known.num_microbatches: known for known in settings}
        self.twin_of = twins(settings[0], self.media)
        self.found: list[Candidate] = []
        self.seen: dict[Layout, Candidate | None] = {}
        self.unfit: dict[tuple[tuple[int, ...], ...], str] = {}
        self.unwalked: dict[tuple[tuple[int, ...], ...], tuple[float, float]] = {}
        self.best = {"time": inf, "energy": inf}
        self.chains: list[Chain] = []
        self.front: list[tuple[float, float]] = []
        self.spent_s = 0.0
        self.num_chains = 0

    def walk_whole(self) -> None:
        """Plays the whole model on every single device, and on the fastest ones as replicas."""
        for known in self.settings:
            whole = known.costs.forward_s[:, 0, -1] + known.costs.backward_s[:, 0, -1]
            fast = [int(d) for d in np.argsort(whole, kind="stable")]
            most = 1 if known.decode else min(len(fast), known.num_microbatches)
            teams = [tuple(sorted(fast[:k])) for k in range(2, most + 1)]
            for devices in [*((d,) for d in fast), *teams]:
                groups = (Group(0, known.costs.num_blocks, devices),)
                counts = shares(groups, known)
                if 0 not in counts[0]:
                    self.play(layouts(groups, counts, known)[0], known)

    def play(self, layout: Layout, known: Setting) -> Candidate | None:
        """Returns a layout with its prediction, None if memory or a link is missing."""
        if layout in self.seen:
            return self.seen[layout]
        self.seen[layout] = None
        self.spent_s += CALL_S + ACTION_S * layout.num_microbatches * len(layout.groups) * 6
        placement = tuple(group.devices for group in layout.groups)
        step = as_step(layout, known, known.costs)
        peaks = peak_bytes(layout, known, step)
        share, text = largest_share(layout, known, peaks)
        if share > 1:
            self.unfit.setdefault(placement, text)
            return None
        if not self.is_meshed and not is_linked(layout.groups, known):
            self.unfit.setdefault(placement, "no link between devices that exchange data")
            return None
        prediction = evaluate(layout, known, step, peaks)
        failed = broken(self.wanted, layout, prediction, known)
        candidate = Candidate(layout, prediction, known, failed, share)
        self.seen[layout] = candidate
        self.found.append(candidate)
        if not failed:
            self._keep(candidate.value("time"), candidate.value("energy"))
        return candidate

    def _keep(self, time_s: float, energy_j: float) -> None:
        self.best["time"] = min(self.best["time"], time_s)
        self.best["energy"] = min(self.best["energy"], energy_j)
        if not self.is_dominated(time_s, energy_j):
            rest = [(t, e) for t, e in self.front if t < time_s or e < energy_j]
            self.front = [*rest, (time_s, energy_j)]

    def is_dominated(self, time_s: float, energy_j: float) -> bool:
        """Returns whether a plan within the limits is at least as good in both."""
        return any(t <= time_s and e <= energy_j for t, e in self.front)

    def walk_chains(self, objective: str, stop_s: float) -> float:
        """Plays chains in the order of their bounds, until none can be better or effort is spent.

        Returns:
            What no chain can beat: the least bound of those that were not played, or the best.
        """
        chains, floor = self._enumerate(objective, stop_s)
        for chain in chains:
            bound = chain.bound(objective)
            if bound >= self.best[objective] * (1 - TOLERANCE):
                break
            if self.spent_s > stop_s:
                floor = min(floor, bound)
                break
            self.walk(chain, objective)
        return min(floor, self.best[objective])

    def _enumerate(self, objective: str, stop_s: float) -> tuple[list[Chain], float]:
        """Returns chains by their bounds, and the least bound of those that were left out."""
        chains: list[Chain] = []
        width, per_state, num_settings = _width(len(self.settings[0].devices))
        if self.chains and num_settings < len(self.settings):
            num_settings = 1  # the other objective has seen what this number has to offer
        spaces = self._spaces()
        dropped = min((space.least(objective) for space in spaces[num_settings:]), default=inf)
        for space in spaces[:num_settings]:
            cutoff_s, cutoff_j = self._cutoffs(objective)
            found, least = space.enumerate(
                objective, cutoff_s=cutoff_s, cutoff_j=cutoff_j, width=width, per_state=per_state
            )
            dropped = min(dropped, least)
            self.num_chains += len(found)
            for chain in found:
                self._remember(chain)
            for chain in found[:FIRST_WALKS]:
                if self.spent_s < stop_s:
                    self.walk(chain, objective)
            chains += found
        self.chains += chains
        return sorted(chains, key=lambda c: c.bound(objective)), dropped

    def _spaces(self) -> list[Chains]:
        return [Chains(k, self.media, self.twin_of, self.max_loss) for k in self.settings]

    def _cutoffs(self, objective: str) -> tuple[float, float]:
        """Returns what the bounds of a chain must be below to be of use."""
        cutoff = {"time": inf, "energy": inf}
        if isfinite(self.best[objective]):
            cutoff[objective] = self.best[objective] * (1 - TOLERANCE)
            for limit in self.wanted:
                if limit.field in ("latency_s", "step_s"):
                    cutoff["time"] = min(cutoff["time"], limit.allowed * (1 + TOLERANCE))
                if limit.field == "energy_j":
                    cutoff["energy"] = min(cutoff["energy"], limit.allowed * (1 + TOLERANCE))
        return cutoff["time"], cutoff["energy"]

    def _remember(self, chain: Chain) -> None:
        placement = tuple(group.devices for group in chain.groups)
        old_s, old_j = self.unwalked.get(placement, (inf, inf))
        self.unwalked[placement] = min(old_s, chain.bound_s), min(old_j, chain.bound_j)

    def walk(self, chain: Chain, objective: str) -> None:
        """Plays a chain at one depth, and if it is near the best at others and in other modes."""
        made = self._variants(chain)
        first = self.play(made[min(1, len(made) - 1)], chain.known)
        if first and first.value(objective) > DEPTH_FACTOR * self.best[objective]:
            made = [first.layout]
        # A deeper window costs nothing in time, and may be what a slower mode needs.
        for layout in made:
            self._tune(self.play(layout, chain.known), objective)

    def _tune(self, start: Candidate | None, objective: str, weight: float | None = None) -> None:
        """Changes power modes while that helps."""

        def rank(candidate: Candidate | None) -> float:
            if weight is None or candidate is None or candidate.failed:
                return self._rank(candidate, objective)
            return float(
                candidate.value("time") ** (1 - weight) * candidate.value("energy") ** weight
            )

        here = start
        while here is not None:
            options = [
                self.play(layout, here.known) for layout in all_modes(here.layout, here.known)
            ]
            best = min(options, key=rank, default=None)
            if best is None or rank(best) >= rank(here) * (1 - TOLERANCE):
                return
            here = best

    def walk_front(self, stop_s: float) -> None:
        """Plays chains whose bounds no plan found so far beats in both time and energy."""
        if not self.front:
            return
        cutoff_s = max(t for t, _ in self.front) * (1 + TOLERANCE)
        cutoff_j = max(e for _, e in self.front) * (1 + TOLERANCE)
        width, per_state, _ = _width(len(self.settings[0].devices))
        chains = self.chains
        if len(self.settings[0].devices) <= MAX_COMPLETE:
            chains = [
                chain
                for space in self._spaces()
                for chain in space.enumerate(
                    "time", cutoff_s=cutoff_s, cutoff_j=cutoff_j, width=width, per_state=per_state
                )[0]
            ]
        for chain in sorted(chains, key=lambda c: c.bound_s * c.bound_j):
            if self.spent_s > stop_s:
                return
            if not self.is_dominated(chain.bound_s, chain.bound_j):
                self._walk_all(chain)

    def _walk_all(self, chain: Chain) -> None:
        """Plays a chain at all depths, and in the modes that several weights of energy prefer."""
        played = [self.play(layout, chain.known) for layout in self._variants(chain)]
        fit = [c for c in played if c and not c.failed]
        fastest = min(fit, key=lambda c: c.value("time"), default=None)
        for weight in FRONT_WEIGHTS:
            self._tune(fastest, "time", weight)

    def _variants(self, chain: Chain) -> list[Layout]:
        known = chain.known
        made = layouts(chain.groups, chain.counts, known)
        coded = [self._coded(one, known) for one in made]
        return made + [one for one in coded if one not in made]

    def _coded(self, layout: Layout, known: Setting) -> Layout:
        """Returns a layout with the smallest codecs everywhere, as far as they are allowed."""
        if self.max_loss <= 0:
            return layout
        allowed = boundary_codecs(self.max_loss, training=known.training)
        codec = min(allowed, key=lambda one: CODECS[one.forward].bits)
        if codec != NO_CODEC and len(layout.groups) > 1:
            layout = layout._replace(codecs=(codec,) * (len(layout.groups) - 1))
        name = smallest(gradient_codecs(self.max_loss), self.max_loss)
        if name == "none" or not known.training:
            return layout
        names = tuple(name if len(g.devices) > 1 else "none" for g in layout.groups)
        return layout._replace(gradient_codecs=names) if name in names else layout

    def improve(self, objective: str, stop_s: float) -> None:
        """Descends from the best layouts of different stages, one after the other."""
        starts = self._starts(objective)
        for i, start in enumerate(starts):
            share_s = self.spent_s + (stop_s - self.spent_s) / (len(starts) - i)

            def value_of(layout: Layout, share_s: float = share_s) -> float:
                if self.spent_s > share_s:
                    return -inf
                known = self.by_size[layout.num_microbatches]
                return self._rank(self.play(layout, known), objective)

            descend(start.layout, value_of, self._moves, self._apply, seed=self.seed + i)

    def _moves(self, layout: Layout) -> list[Move]:
        known = self.by_size[layout.num_microbatches]
        others = [k for k in self.settings if k is not known]
        return [*changes(layout, known, self.twin_of, self.max_loss), *others]

    def _apply(self, layout: Layout, move: Move) -> Layout | None:
        if isinstance(move, Layout):
            return move
        if isinstance(move, Setting):
            return regrouped(layout, layout.groups, move)
        return regrouped(layout, move, self.by_size[layout.num_microbatches])

    def _starts(self, objective: str) -> list[Candidate]:
        ranked = sorted(self.found, key=lambda c: self._rank(c, objective))
        starts: dict[tuple[tuple[int, ...], ...], Candidate] = {}
        for candidate in ranked:
            if len(starts) < NUM_STARTS:
                starts.setdefault(candidate.placement, candidate)
        return list(starts.values())

    def _rank(self, candidate: Candidate | None, objective: str) -> float:
        """Returns what to minimise: the objective, or how badly a limit is broken."""
        if candidate is None:
            return inf
        if candidate.failed:
            return 1e12 * candidate.excess
        return candidate.value(objective)


def _width(num_devices: int) -> tuple[int, int, int]:
    """Returns how many chains to keep per block, of those that go on alike, and for how many M.

    Of a few devices nothing has to be cut off; of more, memory and time bound what is kept.
    """
    if num_devices <= MAX_COMPLETE:
        return 40_000, 40_000, 7
    if num_devices <= 8:
        return 400, 8, 7
    return (100, 5, 2) if num_devices <= 64 else (40, 3, 1)
