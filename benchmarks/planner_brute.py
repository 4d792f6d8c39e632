"""The best plans of a small problem, by trying all of them under the simulator that we plan with.

All ordered partitions of subsets of the devices into stages, all splits of the blocks, all numbers
of micro-batches, windows and power modes that the planner knows; replicas share micro-batches by
their speed. A chain of stages is passed over only if a plan that was played beats its lower bound
in time and in energy; `every_value` passes over none, to check those bounds.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise, product
from math import inf
from typing import NamedTuple

from dora import _C
from dora.planner.chains import Chains, shared_media, shares, twins
from dora.planner.layouts import layouts
from dora.planner.predict import (
    Group,
    Layout,
    Setting,
    as_step,
    evaluate,
    is_linked,
    memory_share,
    setting,
)
from dora.planner.search import microbatch_choices
from dora.spec import BoundaryCodec, Cluster, ModelProfile, Workload

Value = tuple[float, float]
Windows = Callable[[Sequence[Group], Sequence[Sequence[int]], Setting], list[Layout]]
UNBOUNDED = 10**9
# Bounds are lowered by this share before they exclude anything, should they be too high.
DISTRUST = 0.02


class Chain(NamedTuple):
    """Stages with their lower bounds; `groups` and `ends` are those of `_C.enumerate_chains`."""

    bound_s: float
    bound_j: float
    groups: tuple[int, ...]
    ends: tuple[int, ...]
    space: int  # index of its number of micro-batches


class Front:
    """Pairs (seconds, joules) that no other one beats, in ascending order of time."""

    def __init__(self) -> None:
        self.values: list[Value] = []

    def add(self, value: Value) -> None:
        if not self.beats(value):
            self.values = [v for v in self.values if not (v[0] >= value[0] and v[1] >= value[1])]
            insort(self.values, value)

    def beats(self, value: Value, slack: float = 0.0) -> bool:
        """Returns whether an entry is as good in both, or worse by less than `slack`."""
        limit = value[0] * (1 + slack), value[1] * (1 + slack)
        i = bisect_right(self.values, (limit[0], inf))
        return i > 0 and self.values[i - 1][1] <= limit[1]

    def least(self, objective: str, most_s: float = inf, most_j: float = inf) -> float:
        """Returns the least time or energy within both limits."""
        kept = [v for v in self.values if v[0] <= most_s and v[1] <= most_j]
        return min((v[objective == "energy"] for v in kept), default=inf)


def hypervolume(values: Iterable[Value], reference: Value) -> float:
    """Returns the area that is beaten by `values` and not by the reference."""
    area, ceiling = 0.0, reference[1]
    for seconds, joules in sorted(values):
        if seconds < reference[0] and joules < ceiling:
            area += (reference[0] - seconds) * (ceiling - joules)
            ceiling = joules
    return area


class Brute:
    """All plans of one problem, played when they are asked for.

    Args:
        choices: Numbers of micro-batches; None: those that the planner tries.
        windows: Gives the layouts of one placement.
        codec: Tried on all boundaries, beside none.
    """

    def __init__(
        self,
        profile: ModelProfile,
        cluster: Cluster,
        workload: Workload,
        *,
        choices: Sequence[int] | None = None,
        windows: Windows = layouts,
        codec: BoundaryCodec | None = None,
        max_loss: float = 0.0,
    ) -> None:
        self.settings = [
            setting(profile, cluster, workload, m) for m in choices or microbatch_choices(workload)
        ]
        self.windows, self.codec = windows, codec
        self.chains: list[Chain] = []
        self.groups: list[tuple[int, ...]] = []
        self.front = Front()
        self.layout_of: dict[Value, Layout] = {}
        self.played: set[Chain] = set()
        self.num_played = 0
        self.worst_bound = 0.0  # largest bound over value of any plan: above 1 if bounds are wrong
        self._modes: dict[tuple[int, ...], list[tuple[tuple[int, str], ...]]] = {}
        media = shared_media(cluster, cluster.devices)
        twin_of = twins(self.settings[0], media)
        spaces = [Chains(known, media, twin_of, max_loss) for known in self.settings]
        self.spaces = spaces
        for i, space in enumerate(spaces):
            found, dropped = _C.enumerate_chains(
                space.problem, False, inf, inf, UNBOUNDED, UNBOUNDED
            )
            assert dropped == inf, "a chain was left out"
            self.chains += [
                Chain(s * (1 - DISTRUST), j * (1 - DISTRUST), tuple(g), tuple(e), i)
                for s, j, g, e in found
            ]

    def least(self, objective: str, most_s: float = inf, most_j: float = inf) -> float:
        """Returns the least time or energy of any plan within both limits, infinite if none is."""
        which = objective == "energy"
        for chain in sorted(self.chains, key=lambda c: c[which]):
            best = self.front.least(objective, most_s, most_j)
            if chain[which] >= best:
                break
            if chain.bound_s <= most_s and chain.bound_j <= most_j:
                self.play(chain)
        return self.front.least(objective, most_s, most_j)

    def complete(self, tolerance: float = 0.0) -> Front:
        """Returns the whole front; plans that gain less than `tolerance` may be missing."""
        least_s, least_j = self.least("time"), self.least("energy")
        for chain in sorted(self.chains, key=lambda c: c.bound_s / least_s + c.bound_j / least_j):
            if not self.front.beats(chain[:2], tolerance):
                self.play(chain)
        return self.front

    def play(self, chain: Chain) -> None:
        if chain in self.played:
            return
        self.played.add(chain)
        known, groups = self.settings[chain.space], self._stages(chain)
        for layout in self.windows(groups, shares(groups, known), known):
            for one in self._coded(layout):
                for modes in self._modes_of(one.devices, known):
                    value = self._value(one._replace(modes=modes), known)
                    if value is not None:
                        bound = max(a / b for a, b in zip(chain[:2], value, strict=True) if b > 0)
                        self.worst_bound = max(self.worst_bound, bound / (1 - DISTRUST))

    def _stages(self, chain: Chain) -> tuple[Group, ...]:
        known = self.spaces[chain.space].groups
        firsts = (0, *chain.ends[:-1])
        return tuple(
            Group(first, end, known[g])
            for first, end, g in zip(firsts, chain.ends, chain.groups, strict=True)
        )

    def _coded(self, layout: Layout) -> Iterator[Layout]:
        yield layout
        if self.codec is not None and len(layout.groups) > 1:
            yield layout._replace(codecs=(self.codec,) * (len(layout.groups) - 1))

    def _modes_of(
        self, devices: tuple[int, ...], known: Setting
    ) -> list[tuple[tuple[int, str], ...]]:
        if devices not in self._modes:
            self._modes[devices] = mode_choices(devices, known)
        return self._modes[devices]

    def _value(self, layout: Layout, known: Setting) -> Value | None:
        step = as_step(layout, known, known.costs)
        if memory_share(layout, known, step)[0] > 1 or not is_linked(layout.groups, known):
            return None
        prediction = evaluate(layout, known, step)
        self.num_played += 1
        value = prediction.makespan_s, prediction.total_j
        if not self.front.beats(value):
            self.layout_of[value] = layout
        self.front.add(value)
        return value


def mode_choices(devices: Iterable[int], known: Setting) -> list[tuple[tuple[int, str], ...]]:
    """Returns all choices of power modes of those devices, as in a `Layout`."""
    options = [
        [(), *(((d, mode.name),) for mode in known.devices[d].power_modes)] for d in sorted(devices)
    ]
    return [tuple(one for chosen in choice for one in chosen) for choice in product(*options)]


# ------------------------------------------------------------ without any bound


def every_value(
    profile: ModelProfile, cluster: Cluster, workload: Workload, *, all_shares: bool = False
) -> Iterator[Value]:
    """Yields (seconds, joules) of every plan, with `all_shares` for all ways to share."""
    for m in microbatch_choices(workload):
        known = setting(profile, cluster, workload, m)
        for order in groupings(range(len(known.devices))):
            for edges in cuts(known.costs.num_blocks, len(order)) if order else ():
                groups = tuple(Group(*s) for s in zip(edges, edges[1:], order, strict=False))
                if not is_linked(groups, known):
                    continue
                given = [shares(groups, known)]
                if all_shares:
                    given = list(product(*(compositions(m, len(g.devices)) for g in groups)))
                for counts in given:
                    if all(min(stage) > 0 for stage in counts):
                        yield from _values(groups, counts, known)


def _values(
    groups: tuple[Group, ...], counts: Sequence[Sequence[int]], known: Setting
) -> Iterator[Value]:
    for layout in layouts(groups, counts, known):
        for modes in mode_choices(layout.devices, known):
            one = layout._replace(modes=modes)
            step = as_step(one, known, known.costs)
            if memory_share(one, known, step)[0] <= 1:
                prediction = evaluate(one, known, step)
                yield prediction.makespan_s, prediction.total_j


def groupings(devices: Iterable[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yields every list of disjoint non-empty groups of some of the devices."""
    left = tuple(devices)
    yield ()
    for size in range(1, len(left) + 1):
        for group in combinations(left, size):
            rest = [d for d in left if d not in group]
            yield from ((group, *others) for others in groupings(rest))


def cuts(num_blocks: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for inner in combinations(range(1, num_blocks), num_stages - 1):
        yield (0, *inner, num_blocks)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields all ways to write `total` as a sum of that many positive numbers."""
    for inner in combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in pairwise((0, *inner, total)))
