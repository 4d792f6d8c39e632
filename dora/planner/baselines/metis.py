"""A Metis-like planner: orders of device types, power-of-two groups, micro-batch counts.

Source: Um et al., Metis: Fast Automatic Distributed Training on Heterogeneous GPUs, USENIX ATC
2024, and what its planner (github.com/SamsungLabs/Metis) computes: it enumerates orders of device
types, groups of a power of two devices that follow that order and use all devices, and numbers of
micro-batches; balances layers by measured speed, with uneven batches inside mixed groups; and adds
(m - 1) times the slowest stage, the sum of the stages, the data-parallel synchronisation, and the
boundary bytes over the slowest link, counted once and not per micro-batch. Nothing overlaps.

Our reading: devices of one `kind` are a type; balancing minimises the slowest stage under memory by
dynamic programming; a group splits each micro-batch by speed; the synchronisation is that of the
stage where it takes longest; no tensor parallelism, which our runtime does not have; the numbers of
micro-batches are the divisors of the batch nearest to powers of two, as far as the workload does
not name one; as a `Plan` hands micro-batches to replicas whole, one with replicas gets at least
`microbatches` of its widest group. Of more than `MAX_TYPES` types, four orders are tried (by speed
and by memory, both ways), and of more than `MAX_GROUPS` groups only the two sorted arrangements:
the planner prunes such permutations too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from dora.planner.baselines.problem import (
    Problem,
    compute_s,
    divisors,
    is_stage,
    microbatches,
    problem,
    to_plan,
)
from dora.planner.cost import Array, StageCosts
from dora.planner.predict import Group
from dora.spec import Cluster, ModelProfile, Plan, Workload

MAX_TYPES = 3
MAX_GROUPS = 4


def metis_like(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the candidate of least cost.

    Raises:
        InfeasiblePlanError: No candidate fits the memory.
    """
    given = problem(profile, cluster, workload)
    best_s, best = np.inf, None
    for m in microbatch_choices(workload):
        costs = given.costs(m)
        for order in device_orders(given, compute_s(costs)[:, 0, -1]):
            ranges = Ranges(given, costs, order)
            for sizes in group_sizes(given):
                bounds = ranges.balanced(sizes)
                cost_s = ranges.cost_s(sizes, bounds, m) if bounds else np.inf
                if cost_s < best_s:
                    best_s, best = cost_s, (m, ranges, sizes, bounds)
    if best is None:
        raise given.no_plan("metis-like", "no candidate of all devices fits the memory")
    m, ranges, sizes, bounds = best
    groups, shares = ranges.placement(sizes, bounds)
    widest = max(sizes)
    if widest > 1:
        m = max(m, microbatches(workload, widest))
    return to_plan("metis-like", given, groups, num_microbatches=m, shares=shares)


def microbatch_choices(workload: Workload) -> list[int]:
    """Returns the numbers of micro-batches to try."""
    if workload.kind == "generate":
        return [1]
    if workload.num_microbatches is not None:
        return [workload.num_microbatches]
    options = divisors(workload.batch_size)
    return sorted({min(options, key=lambda m: (abs(m - 2**p), m)) for p in range(8)})


def device_orders(given: Problem, model_s: Array) -> list[list[int]]:
    """Returns the devices sorted by type, for each order of types."""
    devices = given.cluster.devices
    kinds = list(dict.fromkeys(d.kind for d in devices))
    of_kind = {k: [i for i, d in enumerate(devices) if d.kind == k] for k in kinds}
    if len(kinds) <= MAX_TYPES:
        orders = [list(order) for order in permutations(kinds)]
    else:
        by_speed = sorted(kinds, key=lambda k: float(np.mean(model_s[of_kind[k]])))
        by_memory = sorted(kinds, key=lambda k: float(np.mean(given.memory_bytes[of_kind[k]])))
        orders = [by_speed, by_speed[::-1], by_memory, by_memory[::-1]]
    return [[d for kind in order for d in of_kind[kind]] for order in orders]


def group_sizes(given: Problem) -> Iterator[tuple[int, ...]]:
    """Yields arrangements of powers of two that sum to the number of devices."""
    largest = 1 << min(given.num_devices, given.max_replicas).bit_length() - 1
    for sizes in _descending(given.num_devices, largest):
        if len(sizes) <= min(given.num_blocks, MAX_GROUPS):
            yield from dict.fromkeys(permutations(sizes))
        elif len(sizes) <= given.num_blocks:
            yield from dict.fromkeys([sizes, sizes[::-1]])


def _descending(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Yields the ways to write a number as powers of two up to `largest`, descending."""
    if total == 0:
        yield ()
    while largest:
        if largest <= total:
            for rest in _descending(total - largest, largest):
                yield (largest, *rest)
        largest >>= 1


class Ranges:
    """Stages on runs of consecutive devices of one order, kept once computed."""

    def __init__(self, given: Problem, costs: StageCosts, order: Sequence[int]) -> None:
        """Starts with none computed."""
        self.given, self.costs, self.order = given, costs, order
        self.times_s = compute_s(costs)
        self.stage_s: dict[tuple[int, int], Array] = {}
        self.slow: dict[tuple[int, int, int], float] = {}

    def of(self, start: int, size: int) -> Array:
        """Returns `[first, end]` seconds of a micro-batch split by speed over a run of devices."""
        if (start, size) not in self.stage_s:
            members = list(self.order[start : start + size])
            with np.errstate(divide="ignore"):
                shared_s = 1 / np.sum(1 / self.times_s[members], axis=0)
            held = self.costs.state_bytes + self.costs.activation_bytes / size
            fit = held <= self.given.memory_bytes[members].min()
            self.stage_s[start, size] = np.where(fit & is_stage(self.costs), shared_s, np.inf)
        return self.stage_s[start, size]

    def balanced(self, sizes: Sequence[int]) -> list[int]:
        """Returns the ends of the stages with the least slowest stage; [] if none fit."""
        width = self.costs.num_blocks + 1
        best, picks, columns = np.full(width, np.inf), [], np.arange(width)
        best[0] = 0.0
        start = 0
        for size in sizes:
            slowest = np.maximum(best[:, None], self.of(start, size))
            picks.append(np.argmin(slowest, axis=0))
            best = slowest[picks[-1], columns]
            start += size
        if not np.isfinite(best[-1]):
            return []
        ends = [width - 1]
        for pick in reversed(picks[1:]):
            ends.append(int(pick[ends[-1]]))
        return ends[::-1]

    def cost_s(self, sizes: Sequence[int], ends: Sequence[int], num_microbatches: int) -> float:
        """Returns the planner's estimate of a step."""
        stages, reduces, hops, start, previous = [], [0.0], 0.0, 0, 0
        for first, end, size in zip([0, *ends], ends, sizes, strict=False):
            stages.append(float(self.of(start, size)[first, end]))
            traffic = 2 * (size - 1) / size * float(self.costs.gradient_bytes[first, end])
            if traffic:
                reduces.append(traffic * self._slowest(start, start, start + size))
            if first:
                sent = float(self.costs.boundary_bytes[first]) * (1 + self.given.training)
                hops += sent * self._slowest(previous, start, start + size)
            previous, start = start, start + size
        return (num_microbatches - 1) * max(stages) + sum(stages) + max(reduces) + hops

    def _slowest(self, start: int, middle: int, stop: int) -> float:
        """Returns the most seconds per byte between the runs start..middle and middle..stop.

        With an empty first run: inside the second.
        """
        key = start, middle, stop
        if key not in self.slow:
            right = list(self.order[middle:stop])
            left = list(self.order[start:middle]) or right
            links = self.given.links.s_per_byte
            pairs = [(a, b) for a in left for b in right if a != b]
            both = max(max(links[a, b], links[b, a]) for a, b in pairs)
            one = max(links[a, b] for a, b in pairs)
            self.slow[key] = float(both if self.given.training else one)
        return self.slow[key]

    def placement(
        self, sizes: Sequence[int], ends: Sequence[int]
    ) -> tuple[list[Group], list[list[float]]]:
        """Returns the stages and the shares of their devices."""
        groups, shares, start = [], [], 0
        for first, end, size in zip([0, *ends], ends, sizes, strict=False):
            members = list(self.order[start : start + size])
            speed = 1 / np.maximum(self.times_s[members, first, end], 1e-12)
            groups.append(Group(first, end, tuple(members)))
            shares.append([float(share) for share in speed / speed.sum()])
            start += size
        return groups, shares
