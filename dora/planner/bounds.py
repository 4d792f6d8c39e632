"""Lower bounds on time and energy for every order of device groups, by dynamic programming.

For a given order of groups, `V[j]` is the least time in which the stages from one on can run
blocks j, j+1, ..., over all places to cut. Backwards from the last stage, with n micro-batches on
the slowest replica of a stage, forward plus backward t, transfer c and what follows D::

    V[j] = min over k of max( n t(j, k),                  the stage is busy all the time
                              n f + b + D, f + n b + D,   its last (first) micro-batch comes back
                              t(j, k) + c(k) + max(V'[k], D'[k] + (M - 1) w(k)) )

The last line is the pass of one micro-batch through this stage plus the rest at work, or a link
that is busy w seconds per micro-batch. Every term holds whatever the window is, so no schedule is
faster; a balanced pipeline on fast links reaches the bound. Orders that end in the same groups
share that part. Compare the pipeline planners of PipeDream (SOSP 2019) and Asteroid (2408.08015),
whose recurrences keep the bottleneck only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from math import inf, isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dora.planner.cost import Array, ring_s, share_microbatches
from dora.planner.predict import Setting

Worth = Callable[[float, float], bool]


class GroupBounds(NamedTuple):
    """What a stage on one group of devices costs at least, as `[first, end]` arrays.

    Where the group can not run those blocks, all but `counts` are infinite.

    Attributes:
        counts: Micro-batches of each replica; leading axis: replica.
        all_s: n t of the slowest replica.   one_s, one_forward_s: t and f of the fastest.
        waiting_s: The larger of n f + b and f + n b, of the slowest replica.
        reduced_s: n t, then the all-reduce of the gradients.
        work_j: What computing takes more than idling.
    """

    devices: tuple[int, ...]
    counts: NDArray[np.int64]
    all_s: Array
    one_s: Array
    one_forward_s: Array
    waiting_s: Array
    reduced_s: Array
    work_j: Array

    def masked(self, mask: Array) -> GroupBounds:
        """Returns the same bounds, infinite where `mask` is infinite instead of 0."""
        return GroupBounds(self.devices, self.counts, *(array + mask for array in self[2:]))


class Hop(NamedTuple):
    """Least costs of the boundary before block k between two groups, as `[k]` arrays."""

    down_s: Array
    round_s: Array
    occupied_s: Array
    radio_j: Array


class Suffix:
    """The groups from one stage to the last, and bounds for the blocks they run.

    Attributes:
        time_s: `[j]`, V above.       reduced_s: `[j]`, until the last gradient is reduced.
        pass_s: `[j]`, one micro-batch alone.      work_j: `[j]`, energy above idling.
        after_s, after_j: `[k]`, of one pass and of energy behind the first stage.
        idle_w: Of all of its devices.     window: Of its first stage at depth 1.
    """

    def __init__(self, devices: tuple[int, ...], rest: Suffix | None, bounds: Bounds) -> None:
        """Adds a stage on `devices` before the stages of `rest`."""
        self.rest = rest
        self.used: frozenset[int] = frozenset(devices) | (rest.used if rest else frozenset())
        self.window: int = len(devices) + (rest.window if rest else 0)
        self.idle_w = sum(bounds.known.devices[d].idle_w for d in self.used)
        self.group = bounds.fitting(devices, self.window, is_last=rest is None)
        self.after_s: Array = bounds.at_end
        self.after_j: Array = bounds.at_end
        self.hop: Hop | None = None
        if rest is not None:
            self.hop = bounds.hop(devices, rest.group.devices)
            self.after_s = self.hop.round_s + rest.pass_s
            self.after_j = self.hop.radio_j + rest.work_j
        self.time_s: Array = np.maximum(self.own_s(), self.tail_s()).min(axis=1)
        self.reduced_s: Array = np.maximum(self.group.reduced_s, self.reduced_tail_s()).min(axis=1)
        self.pass_s: Array = (self.group.one_s + self.after_s).min(axis=1)
        self.work_j: Array = (self.group.work_j + self.after_j).min(axis=1)

    def own_s(self) -> Array:
        """`[j, k]`: bounds of V by the first stage at work."""
        waiting: Array = self.group.waiting_s + self.after_s
        return np.maximum(self.group.all_s, waiting)

    def tail_s(self) -> Array:
        """`[j, k]`: bounds of V by the stages and links behind the first one."""
        if self.rest is None or self.hop is None:
            return self.group.one_s
        link_s = self.rest.pass_s + self.hop.occupied_s
        tail_s: Array = self.hop.round_s + np.maximum(self.rest.time_s, link_s)
        return self.group.one_s + tail_s

    def reduced_tail_s(self) -> Array:
        """`[j, k]`: as `tail_s`, until the gradients behind the first stage are reduced."""
        if self.rest is None or self.hop is None:
            return self.group.one_forward_s
        tail_s: Array = self.hop.down_s + self.rest.reduced_s
        return self.group.one_forward_s + tail_s

    @property
    def bound_s(self) -> float:
        """Least seconds of a step with these stages for all blocks."""
        return float(max(self.time_s[0], self.reduced_s[0]))

    @property
    def bound_j(self) -> float:
        """Least joules of a step with these stages for all blocks."""
        bound_s = self.bound_s
        return float(self.work_j[0]) + self.idle_w * bound_s if isfinite(bound_s) else inf

    @property
    def stages(self) -> list[Suffix]:
        """This suffix and all shorter ones, first stage first."""
        return [self, *(self.rest.stages if self.rest else [])]


class Bounds:
    """Bounds of all placements of one `Setting`, computed as they are needed."""

    def __init__(self, known: Setting, twins: dict[int, int]) -> None:
        """Prices every group of devices; `twins` maps each device to its class of equals."""
        self.known, self.twins = known, twins
        n, size = len(known.devices), known.costs.num_blocks + 1
        self.is_stage = np.arange(size)[:, None] < np.arange(size)[None, :]
        self.at_end = np.where(np.arange(size) == size - 1, 0.0, np.inf)
        most = min(n, known.num_microbatches)
        subsets = [s for k in range(1, most + 1) for s in combinations(range(n), k)]
        self.groups = {devices: self._group(devices) for devices in subsets}
        self._fitting: dict[tuple[tuple[int, ...], int, bool], GroupBounds] = {}
        self._hops: dict[tuple[tuple[int, ...], tuple[int, ...]], Hop] = {}
        self._prefix: dict[frozenset[int], tuple[Array, Array, Array]] = {}
        self._next: dict[frozenset[int], list[tuple[int, ...]]] = {}

    def suffixes(self, is_worth: Worth) -> Iterator[Suffix]:
        """Yields orders of disjoint groups, except those that extend one not worth extending.

        Args:
            is_worth: Told the least time and energy of all orders that end in some groups.
        """
        stack: list[Suffix | None] = [None]
        while stack:
            rest = stack.pop()
            if rest is not None:
                yield rest
            if rest is None or is_worth(*self._least(rest)):
                stack += [Suffix(devices, rest, self) for devices in self._next_groups(rest)]

    def _least(self, rest: Suffix) -> tuple[float, float]:
        """Returns the least time and energy of any order that ends in `rest`."""
        before_s, before_j, work_s = self._before(rest.used)
        bound_s = float(np.maximum(rest.time_s + before_s, work_s).min())
        if not isfinite(bound_s):
            return inf, inf
        return bound_s, float((rest.work_j + before_j).min()) + rest.idle_w * bound_s

    def _before(self, used: frozenset[int]) -> tuple[Array, Array, Array]:
        """Returns `[j]`: least pass and energy of blocks before j, and time at full use.

        No device does a block faster than `best_s` over its best share of that speed, so all of
        them together need at least the sum of `best_s` over the sum of those shares.
        """
        if used not in self._prefix:
            known, free = self.known, [d for d in range(len(self.known.devices)) if d not in used]
            if not free:
                only_none = np.where(np.arange(len(self.at_end)) == 0, 0.0, np.inf)
                self._prefix[used] = (only_none,) * 3
                return self._prefix[used]
            costs = known.costs
            block_s = np.diagonal(costs.forward_s + costs.backward_s, 1, axis1=1, axis2=2)[free]
            extra_w = np.array([known.devices[d].busy_w - known.devices[d].idle_w for d in free])
            best_s = block_s.min(axis=0)
            ratio = np.divide(best_s, block_s, out=np.ones_like(block_s), where=block_s > 0)
            speed = ratio.max(axis=1).sum()
            least_j = (block_s * extra_w[:, None]).min(axis=0) * known.num_microbatches
            before_s, before_j = ([0.0, *np.cumsum(values)] for values in (best_s, least_j))
            work_s = np.array(before_s) * known.num_microbatches / speed
            self._prefix[used] = np.array(before_s), np.array(before_j), work_s
        return self._prefix[used]

    def _next_groups(self, rest: Suffix | None) -> list[tuple[int, ...]]:
        """Returns the groups that may come before `rest`, one of each set of equals."""
        used: frozenset[int] = rest.used if rest else frozenset()
        if used not in self._next:
            self._next[used] = [
                devices
                for devices in self.groups
                if used.isdisjoint(devices) and self._is_canonical(devices, used)
            ]
        return self._next[used]

    def _is_canonical(self, devices: tuple[int, ...], used: frozenset[int]) -> bool:
        """Equal devices are used in the order of their index, so that none is tried twice."""
        return all(
            other in devices or other in used
            for d in devices
            for other in range(d)
            if self.twins[other] == self.twins[d]
        )

    def _group(self, devices: tuple[int, ...]) -> GroupBounds:
        costs, links = self.known.costs, self.known.links
        rows = list(devices)
        forward_s, backward_s = costs.forward_s[rows], costs.backward_s[rows]
        total_s = forward_s + backward_s
        counts = share_microbatches(total_s, self.known.num_microbatches)
        # A replica without any micro-batch belongs to another, smaller group.
        usable = np.where(self.is_stage & (counts > 0).all(axis=0), 0.0, np.inf)
        extra_w = np.array(
            [self.known.devices[d].busy_w - self.known.devices[d].idle_w for d in rows]
        )
        all_s = (counts * total_s).max(axis=0)
        waiting_s = np.maximum(counts * forward_s + backward_s, forward_s + counts * backward_s)
        return GroupBounds(
            devices=devices,
            counts=counts,
            all_s=all_s,
            one_s=total_s.min(axis=0),
            one_forward_s=forward_s.min(axis=0),
            waiting_s=waiting_s.max(axis=0),
            reduced_s=all_s + ring_s(devices, costs.gradient_bytes, links),
            work_j=np.tensordot(extra_w, counts * total_s, axes=1),
        ).masked(usable)

    def fitting(self, devices: tuple[int, ...], window: int, *, is_last: bool) -> GroupBounds:
        """Returns the bounds of a group, infinite where its memory can not suffice.

        The last stage has to end with the last block.
        """
        key = devices, window, is_last
        if key not in self._fitting:
            group = self.groups[devices]
            mask = self._memory_mask(group, window) + (self.at_end if is_last else 0.0)
            self._fitting[key] = group.masked(mask)
        return self._fitting[key]

    def _memory_mask(self, group: GroupBounds, window: int) -> Array:
        costs, m = self.known.costs, self.known.num_microbatches
        mask = np.where(self.is_stage, 0.0, np.inf)
        # Among M in a row, some `window` in a row hold at least this many of `counts`.
        rounds = -(-m // min(window, m))
        for counts, d in zip(group.counts, group.devices, strict=True):
            peak = costs.state_bytes + costs.buffer_bytes
            peak = peak + costs.activation_bytes * -(-counts // rounds)
            mask = np.where(peak <= self.known.devices[d].memory_bytes, mask, np.inf)
        return mask

    def hop(self, a: tuple[int, ...], b: tuple[int, ...]) -> Hop:
        """Returns the least costs of the boundary between two groups."""
        if (a, b) not in self._hops:
            self._hops[a, b] = self._hop(a, b)
        return self._hops[a, b]

    def _hop(self, a: tuple[int, ...], b: tuple[int, ...]) -> Hop:
        known, m = self.known, self.known.num_microbatches
        size = np.append(known.costs.boundary_bytes, np.inf)
        pairs = [(d, e) for d in a for e in b]
        down = [self._message_s(d, e, size) for d, e in pairs]
        up = [self._message_s(e, d, size) for d, e in pairs] if known.training else []
        # Replicas spread the messages over their links; the fullest has at least this many.
        others = -(-m // len(pairs)) - 1
        occupied = np.min([wire for wire, _ in down], axis=0)
        if up:
            occupied = np.maximum(occupied, np.min([wire for wire, _ in up], axis=0))
        down_s = np.min([wire + latency for wire, latency in down], axis=0)
        up_s = np.min([wire + latency for wire, latency in up], axis=0) if up else 0.0
        missing = not np.isfinite([latency for _, latency in down + up]).all()
        round_s = np.full_like(size, np.inf) if missing else down_s + up_s
        return Hop(down_s, round_s, others * occupied, self._radio_j(pairs, size))

    def _message_s(self, src: int, dst: int, size: Array) -> tuple[Array, float]:
        links = self.known.links
        latency = float(links.latency_s[src, dst])
        rate = links.s_per_byte[src, dst] if np.isfinite(latency) else 0.0
        return np.where(np.isfinite(size), size, 0.0) * rate, latency

    def _radio_j(self, pairs: list[tuple[int, int]], size: Array) -> Array:
        devices, m = self.known.devices, self.known.num_microbatches
        per_byte = []
        for d, e in pairs:
            there = devices[d].tx_j_per_byte + devices[e].rx_j_per_byte
            back = devices[e].tx_j_per_byte + devices[d].rx_j_per_byte
            per_byte.append(there + back * self.known.training)
        return np.where(np.isfinite(size), size, 0.0) * m * min(per_byte)


def twins(known: Setting) -> dict[int, int]:
    """Maps each device to the first one that it can not be told from by any cost."""
    first: dict[int, int] = {}
    for d in range(len(known.devices)):
        first[d] = next((e for e in range(d) if first[e] == e and _are_twins(known, d, e)), d)
    return first


def _are_twins(known: Setting, d: int, e: int) -> bool:
    a, b = (known.devices[i].model_copy(update={"name": ""}) for i in (d, e))
    swap = np.arange(len(known.devices))
    swap[[d, e]] = e, d
    tables = (known.links.latency_s, known.links.s_per_byte)
    return (
        a == b
        and np.array_equal(known.costs.forward_s[d], known.costs.forward_s[e])
        and np.array_equal(known.costs.backward_s[d], known.costs.backward_s[e])
        and all(np.array_equal(t, t[np.ix_(swap, swap)]) for t in tables)
    )
