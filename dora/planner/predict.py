"""Predicts time, energy and peak memory of one placement by walking its schedule.

Assumptions: the input is where the first stage is and the labels where the last one is; gradients
are reduced after the last backward; an optimizer step, which runs on every device by itself, is
not part of the step; a device in no stage costs nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from dora.planner.cost import (
    Array,
    Links,
    StageCosts,
    links,
    ring_bytes,
    ring_s,
    stage_costs,
)
from dora.planner.makespan import PipelineTimes, Wire, finish_times_s
from dora.spec import (
    Cluster,
    Cost,
    Device,
    DeviceMemory,
    ModelProfile,
    Plan,
    Replica,
    Stage,
    Workload,
    routes_from_shares,
    warmup_for,
)

# Micro-batches in flight per boundary beyond what hides no latency; the last choice is all of them.
EXTRA_WARMUP = (0, 1, 3)


class Group(NamedTuple):
    """Blocks `first` to `end - 1` on those devices, by index in the cluster."""

    first: int
    end: int
    devices: tuple[int, ...]


class Layout(NamedTuple):
    """A plan reduced to the numbers that its cost depends on."""

    groups: tuple[Group, ...]
    routes: tuple[tuple[int, ...], ...]
    warmup: tuple[int, ...]
    kind: str

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices used, in stage order."""
        return tuple(d for group in self.groups for d in group.devices)

    def microbatches(self, stage: int, replica: int) -> list[int]:
        """Returns the micro-batches routed to that replica, ascending."""
        return [m for m, route in enumerate(self.routes) if route[stage] == replica]


class Prediction(NamedTuple):
    """What a layout costs; the tuples follow `Layout.devices`.

    Attributes:
        interval_s: Shortest time between requests that every device and link can sustain.
    """

    makespan_s: float
    interval_s: float
    energy_j: tuple[float, ...]
    peak_bytes: tuple[float, ...]

    @property
    def total_j(self) -> float:
        """Joules of all devices."""
        return sum(self.energy_j)


class Setting(NamedTuple):
    """Everything that the layouts of one number of micro-batches share."""

    devices: tuple[Device, ...]
    costs: StageCosts
    links: Links
    training: bool
    num_microbatches: int


def setting(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    num_microbatches: int,
    devices: Sequence[Device] | None = None,
) -> Setting:
    """Collects the costs of a search; `devices` restricts it to some of the cluster.

    Raises:
        ValueError: A block has no timing for one of the devices.
    """
    chosen = tuple(cluster.devices if devices is None else devices)
    return Setting(
        devices=chosen,
        costs=stage_costs(profile, chosen, workload, num_microbatches),
        links=links(cluster, chosen),
        training=workload.kind == "train",
        num_microbatches=num_microbatches,
    )


def predict(profile: ModelProfile, cluster: Cluster, workload: Workload, plan: Plan) -> Plan:
    """Returns `plan` with its predicted cost, for example after it was edited by hand.

    Raises:
        ValueError: A block has no timing for a device of the plan, the plan is for another
            number of blocks, a link is missing, or the plan has a codec, which this version
            does not price.
    """
    if plan.num_blocks != len(profile.blocks):
        raise ValueError(f"plan: given {plan.num_blocks} blocks, allowed {len(profile.blocks)}")
    if any(codec.forward != "none" or codec.backward != "none" for codec in plan.codecs):
        raise ValueError("plan.codecs: given a codec, allowed: 'none' in this version")
    used = [cluster.device(r.device) for stage in plan.stages for r in stage.replicas]
    known = setting(profile, cluster, workload, plan.num_microbatches, used)
    index = iter(range(len(used)))
    groups = tuple(
        Group(stage.first_block, stage.last_block + 1, tuple(next(index) for _ in stage.replicas))
        for stage in plan.stages
    )
    _check_links(groups, known)
    layout = Layout(groups, plan.routes, plan.warmup, plan.schedule_kind)
    prediction = evaluate(layout, known)
    if not np.isfinite(prediction.makespan_s):
        raise ValueError("cluster has no link between devices that share gradients")
    return plan.model_copy(update={"cost": cost(layout, prediction, known)})


def _check_links(groups: Sequence[Group], known: Setting) -> None:
    """Raises ValueError for neighbours in the pipeline that no link connects."""
    for a, b in pairwise(groups):
        for src, dst in [(d, e) for d in a.devices for e in b.devices]:
            for i, j in ((src, dst), (dst, src)) if known.training else ((src, dst),):
                if not np.isfinite(known.links.latency_s[i, j]):
                    names = known.devices[i].name, known.devices[j].name
                    raise ValueError(f"cluster has no link {names[0]} -> {names[1]}")


def evaluate(layout: Layout, known: Setting) -> Prediction:
    """Returns the exact cost of a layout on private links."""
    times = _pipeline_times(layout, known)
    ends = finish_times_s(times, layout.routes, layout.warmup, layout.kind)
    makespan_s = max(max(stage) for stage in ends)
    reduced_s, reduced_bytes = _reductions(layout, known, ends)
    makespan_s = max(makespan_s, reduced_s)
    busy, sent, received, link_s = _loads(layout, known, times)
    energy = []
    for d, device in enumerate(known.devices[d] for d in layout.devices):
        radio = (sent[d] + reduced_bytes[d]) * device.tx_j_per_byte
        radio += (received[d] + reduced_bytes[d]) * device.rx_j_per_byte
        idle_s = makespan_s - busy[d]
        energy.append(busy[d] * device.busy_w + idle_s * device.idle_w + radio)
    return Prediction(
        makespan_s=float(makespan_s),
        interval_s=float(max([*busy, *link_s])),
        energy_j=tuple(float(e) for e in energy),
        peak_bytes=peak_bytes(layout, known),
    )


def peak_bytes(layout: Layout, known: Setting) -> tuple[float, ...]:
    """Returns the peak memory of each device, in the order of `layout.devices`."""
    peaks = []
    for s, group in enumerate(layout.groups):
        span = group.first, group.end
        fixed = known.costs.state_bytes[span] + known.costs.buffer_bytes[span]
        kept = known.costs.activation_bytes[span]
        for r in range(len(group.devices)):
            peaks.append(float(fixed + kept * in_flight(layout, s, r)))
    return tuple(peaks)


def in_flight(layout: Layout, stage: int, replica: int) -> int:
    """Returns how many micro-batches that replica holds at most between forward and backward."""
    own = layout.microbatches(stage, replica)
    if layout.kind == "wavefront":
        return 0
    if layout.kind == "gpipe":
        return len(own)
    window = layout.warmup[stage]
    return max((bisect_left(own, j + window) - i for i, j in enumerate(own)), default=0)


def cost(layout: Layout, prediction: Prediction, known: Setting) -> Cost:
    """Returns the prediction as part of a `Plan`."""
    memory = tuple(
        DeviceMemory(device=known.devices[d].name, peak_bytes=int(peak))
        for d, peak in zip(layout.devices, prediction.peak_bytes, strict=True)
    )
    return Cost(makespan_s=prediction.makespan_s, energy_j=prediction.total_j, memory=memory)


def to_plan(layout: Layout, prediction: Prediction, known: Setting, names: Sequence[str]) -> Plan:
    """Returns the layout as a plan of the devices `names`, with its cost filled."""
    stages = []
    for s, group in enumerate(layout.groups):
        replicas = tuple(
            Replica(
                device=known.devices[d].name,
                share=len(layout.microbatches(s, r)) / len(layout.routes),
            )
            for r, d in enumerate(group.devices)
        )
        stages.append(
            Stage(index=s, first_block=group.first, last_block=group.end - 1, replicas=replicas)
        )
    return Plan(
        devices=tuple(names),
        stages=tuple(stages),
        num_microbatches=len(layout.routes),
        routes=layout.routes,
        warmup=layout.warmup,
        schedule_kind=layout.kind,
        cost=cost(layout, prediction, known),
    )


def layouts(
    groups: Sequence[Group], counts: Sequence[Sequence[int]], known: Setting
) -> list[Layout]:
    """Returns the layouts of one placement that differ in how many micro-batches are in flight.

    Deeper windows hide slow links and cost memory; they come in ascending order.

    Args:
        groups: The stages.
        counts: Micro-batches per stage and replica.
        known: With the number of micro-batches, which each stage's counts sum to.
    """
    m = known.num_microbatches
    shares = [[count / m for count in stage] for stage in counts]
    routes = routes_from_shares(shares, m)
    # The least that avoids idle replicas if all are equally fast, and the least memory.
    least = tuple(accumulate(len(stage) for stage in reversed(shares)))[::-1]
    if not known.training:
        return [Layout(tuple(groups), routes, least, "wavefront")]
    deeper = [warmup_for(shares, extra=extra) for extra in (*EXTRA_WARMUP, m)]
    # A window beyond the step runs all forwards first.
    capped = {tuple(min(window, m) for window in warmup) for warmup in [least, *deeper]}
    return [Layout(tuple(groups), routes, warmup, "1f1b") for warmup in sorted(capped)]


def _pipeline_times(layout: Layout, known: Setting) -> PipelineTimes:
    forward = [_stage_s(known.costs.forward_s, g) for g in layout.groups]
    backward = [_stage_s(known.costs.backward_s, g) for g in layout.groups]
    boundaries = list(pairwise(layout.groups))
    sizes = [known.costs.boundary_bytes[b.first] for _, b in boundaries]
    down = [
        [[_wire(known.links, d, e, size) for e in b.devices] for d in a.devices]
        for (a, b), size in zip(boundaries, sizes, strict=True)
    ]
    up = [
        [[_wire(known.links, e, d, size) for d in a.devices] for e in b.devices]
        for (a, b), size in zip(boundaries, sizes, strict=True)
    ]
    return PipelineTimes(forward, backward, down, up)


def _stage_s(times: Array, group: Group) -> list[float]:
    return [float(times[d, group.first, group.end]) for d in group.devices]


def _wire(links: Links, src: int, dst: int, num_bytes: float) -> Wire:
    return Wire(float(num_bytes * links.s_per_byte[src, dst]), float(links.latency_s[src, dst]))


def _reductions(
    layout: Layout, known: Setting, ends: Sequence[Sequence[float]]
) -> tuple[float, list[float]]:
    """Returns when the last gradient is reduced, and the bytes that each device sends for it."""
    position = {d: i for i, d in enumerate(layout.devices)}
    num_bytes = [0.0] * len(position)
    end_s = 0.0
    for group, stage_ends in zip(layout.groups, ends, strict=True):
        gradient = float(known.costs.gradient_bytes[group.first, group.end])
        end_s = max(end_s, max(stage_ends) + float(ring_s(group.devices, gradient, known.links)))
        for d in group.devices:
            num_bytes[position[d]] += ring_bytes(len(group.devices), gradient)
    for blocks, gradient in known.costs.tied_bytes:
        holders = [g for g in layout.groups if any(g.first <= b < g.end for b in blocks)]
        if len(holders) > 1 and gradient:
            # Copies on several stages are summed once the stages have reduced their own.
            ring = tuple(d for group in holders for d in group.devices)
            end_s += float(ring_s(ring, gradient, known.links))
            for d in ring:
                num_bytes[position[d]] += ring_bytes(len(ring), gradient)
    return end_s, num_bytes


def _loads(
    layout: Layout, known: Setting, times: PipelineTimes
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Returns busy seconds, bytes sent and received per device, and busy seconds per link."""
    position = {d: i for i, d in enumerate(layout.devices)}
    busy, sent, received = ([0.0] * len(position) for _ in range(3))
    link_s: dict[tuple[int, int], float] = {}
    for s, group in enumerate(layout.groups):
        for r, count in Counter(route[s] for route in layout.routes).items():
            own_s = times.forward_s[s][r] + times.backward_s[s][r]
            busy[position[group.devices[r]]] += count * own_s
    for s, (a, b) in enumerate(pairwise(layout.groups)):
        size = float(known.costs.boundary_bytes[b.first])
        for (r, q), count in Counter(route[s : s + 2] for route in layout.routes).items():
            ends = a.devices[r], b.devices[q]
            for src, dst in (ends, ends[::-1]) if known.training else (ends,):
                sent[position[src]] += count * size
                received[position[dst]] += count * size
                message_s = size * float(known.links.s_per_byte[src, dst])
                link_s[src, dst] = count * message_s
    return busy, sent, received, list(link_s.values())
