"""What a rival planner is told, and how its answer becomes a `Plan`.

A rival sees times, bytes, memory and links as measured alone; what it makes of them (its cost and
memory model) is its own. Shared here is only what no paper fixes:

- The number of micro-batches where a paper leaves it open: `microbatches`.
- A `Plan` hands a micro-batch whole to one replica of a stage; a paper that splits each one over
  the devices of a stage becomes shares of that size.
- In training, a planner made for inference counts forward plus backward as its compute, bytes in
  both directions as its communication, and parameters, gradients, optimizer state and the
  activations of one micro-batch as its memory.
- For 'generate', times and bytes are those of a pass that decodes one token per sequence, and the
  cache of all tokens is part of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dora.errors import InfeasiblePlanError
from dora.planner.cost import Array, Links, StageCosts, costs_at_size, links, stage_costs
from dora.planner.predict import Group
from dora.spec import Cluster, ModelProfile, Plan, Replica, Stage, Workload


class Problem(NamedTuple):
    """A model, a cluster and a workload; devices go by their index in the cluster."""

    profile: ModelProfile
    cluster: Cluster
    workload: Workload
    links: Links

    @property
    def num_devices(self) -> int:
        """Devices in the cluster."""
        return len(self.cluster.devices)

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.profile.blocks)

    @property
    def training(self) -> bool:
        """Whether there is a backward pass."""
        return self.workload.kind == "train"

    @property
    def memory_bytes(self) -> Array:
        """Memory of each device."""
        return np.array([d.memory_bytes for d in self.cluster.devices], dtype=float)

    @property
    def source(self) -> int | None:
        """The device that has the inputs, if the workload names one."""
        names = [d.name for d in self.cluster.devices]
        return names.index(self.workload.source) if self.workload.source in names else None

    @property
    def max_replicas(self) -> int:
        """Devices that one stage can keep busy, as a plan hands micro-batches out whole."""
        if self.workload.kind == "generate":
            return 1
        return self.workload.num_microbatches or self.workload.batch_size

    def costs(self, num_microbatches: int) -> StageCosts:
        """Returns what every stage costs per micro-batch; for 'generate', per decoding pass."""
        devices = self.cluster.devices
        if self.workload.kind == "generate":
            return costs_at_size(self.profile, devices, self.workload, self.workload.batch_size)
        return stage_costs(self.profile, devices, self.workload, num_microbatches)

    def no_plan(self, rival: str, reason: str) -> InfeasiblePlanError:
        """Returns the error to raise when a rival finds nothing."""
        size = f"{self.num_blocks} blocks, {self.num_devices} devices"
        return InfeasiblePlanError(f"{rival} finds no plan for {size}: {reason}")


def problem(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Problem:
    """Collects what does not depend on the number of micro-batches."""
    return Problem(profile, cluster, workload, links(cluster, cluster.devices))


def divisors(number: int) -> list[int]:
    """Returns the divisors, ascending."""
    return [m for m in range(1, number + 1) if number % m == 0]


def microbatches(workload: Workload, width: int) -> int:
    """Returns the divisor of the batch nearest to 2 `width`, the larger of two equally near.

    Our reading where a paper leaves it open: two per stage fill a pipeline to 2/3 or better. A
    `Plan` does not split a micro-batch, so a stage with more replicas than there are stages needs
    two for each of those instead. The workload's own number goes first; 'generate' has one.

    Args:
        workload: With the batch.
        width: Stages, or the replicas of the widest stage if that is more.
    """
    if workload.kind == "generate":
        return 1
    if workload.num_microbatches is not None:
        return workload.num_microbatches
    return min(divisors(workload.batch_size), key=lambda m: (abs(m - 2 * width), -m))


def compute_s(costs: StageCosts) -> Array:
    """Returns `[device, first, end]` forward plus backward seconds, infinite for empty stages."""
    times = costs.forward_s + costs.backward_s
    return np.where(is_stage(costs), times, np.inf)


def is_stage(costs: StageCosts) -> Array:
    """Returns `[first, end]`: whether it holds a block."""
    index = np.arange(costs.num_blocks + 1)
    return np.asarray(index[:, None] < index[None, :])


def hop_s(given: Problem, costs: StageCosts) -> Array:
    """Returns `[block, src, dst]` seconds of the bytes sent into a block, without latency.

    In training the gradient comes back over the opposite direction. Infinite without a link.
    """
    there = given.links.s_per_byte
    s_per_byte = there + there.T if given.training else there
    connected = np.where(np.isfinite(s_per_byte), s_per_byte, 0.0)
    hops = costs.boundary_bytes[:, None, None] * connected
    return np.where(np.isfinite(s_per_byte), hops, np.inf)


def fits(given: Problem, needed_bytes: Array) -> Array:
    """Returns `[device, first, end]`: whether a stage that needs those bytes fits each device."""
    return np.asarray(needed_bytes <= given.memory_bytes[:, None, None])


def shortlists(
    given: Problem, model_s: Array, within_reach: Callable[[list[int]], bool]
) -> list[list[int]]:
    """Returns the device subsets to which an exponential planner is held, to be tried in order.

    All devices if they are within reach; else as many as are of the fastest, then of those with the
    most memory.
    """
    everyone = list(range(given.num_devices))
    if within_reach(everyone):
        return [everyone]
    orders = (
        sorted(everyone, key=lambda d: (model_s[d], d)),
        sorted(everyone, key=lambda d: (-given.memory_bytes[d], d)),
    )
    lengths = [max(n for n in everyone if within_reach(order[:n])) for order in orders]
    return [sorted(order[:n]) for order, n in zip(orders, lengths, strict=True)]


def proportional(weights: Array, total: int) -> list[int]:
    """Returns counts that sum to `total`, at least one each, by largest remainder."""
    exact = weights / weights.sum() * (total - len(weights))
    counts = np.floor(exact).astype(int)
    by_remainder = np.lexsort((np.arange(len(weights)), counts - exact))
    counts[by_remainder[: total - len(weights) - counts.sum()]] += 1
    return [int(count) + 1 for count in counts]


def in_order(devices: Sequence[int], counts: Sequence[int]) -> list[Group]:
    """Returns one stage per device with that many blocks; no blocks, no stage."""
    groups, first = [], 0
    for device, count in zip(devices, counts, strict=True):
        if count:
            groups.append(Group(first, first + count, (device,)))
        first += count
    return groups


def to_plan(
    rival: str,
    given: Problem,
    groups: Sequence[Group],
    *,
    num_microbatches: int | None = None,
    shares: Sequence[Sequence[float]] | None = None,
    warmup: Sequence[int] = (),
) -> Plan:
    """Returns the placement as a plan.

    Args:
        rival: For the error message.
        given: The problem.
        groups: The stages.
        num_microbatches: None takes `microbatches` of the widest extent.
        shares: Per stage and device; None gives equal ones.
        warmup: Per stage; () takes the plan's default.

    Raises:
        InfeasiblePlanError: Devices that have to talk have no link.
    """
    for a, b in _talks(given, groups):
        if not np.isfinite(given.links.latency_s[a, b]):
            names = given.cluster.devices[a].name, given.cluster.devices[b].name
            raise given.no_plan(rival, f"it needs a link {names[0]} -> {names[1]}")
    width = max(len(groups), *(len(group.devices) for group in groups))
    stages = tuple(
        Stage(
            index=s,
            first_block=group.first,
            last_block=group.end - 1,
            replicas=tuple(
                Replica(
                    device=given.cluster.devices[d].name,
                    share=shares[s][r] if shares else 1 / len(group.devices),
                )
                for r, d in enumerate(group.devices)
            ),
        )
        for s, group in enumerate(groups)
    )
    return Plan(
        devices=tuple(d.name for d in given.cluster.devices),
        stages=stages,
        num_microbatches=num_microbatches or microbatches(given.workload, width),
        schedule_kind="1f1b" if given.training else "wavefront",
        warmup=tuple(warmup),
        links=given.cluster.links,
    )


def _talks(given: Problem, groups: Sequence[Group]) -> list[tuple[int, int]]:
    """Returns the ordered pairs of devices between which the placement sends."""
    pairs = [(d, e) for a, b in pairwise(groups) for d in a.devices for e in b.devices]
    if not given.training:
        return pairs
    back = [(e, d) for d, e in pairs]
    rings = [(d, e) for g in groups for d in g.devices for e in g.devices if d != e]
    return [*pairs, *back, *rings]
