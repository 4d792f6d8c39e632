"""Predicts time, energy and peak memory of one placement by playing its schedule.

Assumptions: the input is where the first stage is, unless the workload names its source, and the
labels are where the last one is; gradients are reduced after the last backward; an optimizer step,
which runs on every device by itself, is not part of the step; a device in no stage costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dora import _C
from dora.planner.added import Overheads, added_s, rests_of
from dora.planner.codecs import Rates, wire_ratio
from dora.planner.cost import (
    Array,
    Links,
    StageCosts,
    costs_at_size,
    links,
    stage_costs,
)
from dora.scheduler import DEFAULT_PREFETCH
from dora.simulator import device_j, network_of
from dora.spec import (
    BoundaryCodec,
    Cluster,
    Device,
    ModelProfile,
    Workload,
    routes_from_shares,
)

NO_CODEC = BoundaryCodec()


class Group(NamedTuple):
    """Blocks `first` to `end - 1` on those devices, by index in the cluster."""

    first: int
    end: int
    devices: tuple[int, ...]


class Layout(NamedTuple):
    """A plan reduced to what its cost depends on.

    Attributes:
        counts: Per stage, the micro-batches of each replica.
        modes: (device, name of its power mode) where that is not the default.
        codecs: Per boundary; () sends all of them as they are.
        gradient_codecs: Per stage, of the sums of its replicas; () sums them as they are.
    """

    groups: tuple[Group, ...]
    counts: tuple[tuple[int, ...], ...]
    warmup: tuple[int, ...]
    kind: str
    modes: tuple[tuple[int, str], ...] = ()
    codecs: tuple[BoundaryCodec, ...] = ()
    gradient_codecs: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices used, in stage order."""
        return tuple(d for group in self.groups for d in group.devices)

    @property
    def num_microbatches(self) -> int:
        """Of one step or request."""
        return sum(self.counts[0])

    @property
    def routes(self) -> tuple[tuple[int, ...], ...]:
        """Per micro-batch, the replica of each stage."""
        return tuple(zip(*(_column(counts) for counts in self.counts), strict=True))


@lru_cache(maxsize=4096)
def _column(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the replica of each micro-batch at one stage."""
    m = sum(counts)
    return tuple(r for (r,) in routes_from_shares([[count / m for count in counts]], m))


class Prediction(NamedTuple):
    """What a layout costs; the tuples follow `Layout.devices`.

    Attributes:
        interval_s: Shortest time between requests that every device and medium can sustain.
        source_j: Of the radio of a source that is in no stage.
        ttft_s, tpot_s: For 'generate', otherwise 0.
    """

    makespan_s: float
    interval_s: float
    energy_j: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    source_j: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0

    @property
    def total_j(self) -> float:
        """Joules of all devices."""
        return sum(self.energy_j) + self.source_j


class Setting(NamedTuple):
    """Everything that the layouts of one number of micro-batches share.

    Attributes:
        network: Of the devices, to play on.
        dtype: Of what is sent.
        source: Device that has the inputs, None for wherever the first stage is.
        decode: For 'generate', what one pass over one token per sequence costs.
        new_tokens: For 'generate'.
        rates: Of codecs, as measured.
        overheads: As measured, by the device's name.
    """

    devices: tuple[Device, ...]
    costs: StageCosts
    links: Links
    training: bool
    num_microbatches: int
    network: _C.Network
    dtype: str = "float32"
    source: int | None = None
    decode: StageCosts | None = None
    new_tokens: int = 0
    rates: Rates | None = None
    overheads: Overheads = {}


def setting(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    num_microbatches: int,
    devices: Sequence[Device] | None = None,
    *,
    like: Setting | None = None,
) -> Setting:
    """Collects the costs of a search; `devices` restricts it to some of the cluster.

    What does not depend on the number of micro-batches is taken from `like`, if that is given.

    Raises:
        ValueError: A block has no timing for one of the devices, or the source is not a device.
    """
    chosen = tuple(cluster.devices if devices is None else devices)
    names = [device.name for device in chosen]
    if workload.source is not None and workload.source not in names:
        raise ValueError(f"workload.source: given {workload.source!r}, allowed: {names}")
    is_generating = workload.kind == "generate"
    overheads = {overhead.device: overhead for overhead in profile.overheads}
    return Setting(
        devices=chosen,
        costs=stage_costs(profile, chosen, workload, num_microbatches),
        links=like.links if like else links(cluster, chosen),
        training=workload.kind == "train",
        num_microbatches=num_microbatches,
        network=like.network if like else network_of(cluster, names, rests_of(names, overheads)),
        dtype=profile.dtype,
        source=None if workload.source is None else names.index(workload.source),
        decode=costs_at_size(profile, chosen, workload, workload.batch_size)
        if is_generating
        else None,
        new_tokens=workload.new_tokens if is_generating else 0,
        rates={(rate.device, rate.codec): rate for rate in profile.codec_rates},
        overheads=overheads,
    )


def evaluate(
    layout: Layout,
    known: Setting,
    step: _C.Step | None = None,
    peaks: tuple[float, ...] | None = None,
) -> Prediction:
    """Returns the cost of a layout: its schedule played on the contended network.

    Args:
        layout: What to price.
        known: Its setting.
        step: The layout in numbers, if they are known already.
        peaks: Its peak memory, if it is known already.

    Raises:
        ValueError: No link joins two devices that exchange messages.
    """
    step = step or as_step(layout, known, known.costs)
    price = step.price(known.network)
    peaks = peaks or peak_bytes(layout, known, step)
    prediction = _prediction(layout, known, price, peaks)
    if known.decode is None:
        return prediction
    return _with_tokens(prediction, layout, known, known.decode)


def _prediction(
    layout: Layout, known: Setting, price: _C.Price, peaks: tuple[float, ...]
) -> Prediction:
    factors = {d: known.devices[d].power_mode(name).power_factor for d, name in layout.modes}
    energy = tuple(
        device_j(
            known.devices[d],
            busy_s=busy_s,
            total_s=price.makespan_s,
            sent_bytes=sent,
            received_bytes=received,
            power_factor=factors.get(d, 1.0),
        )
        for d, busy_s, sent, received in _rows(layout, price)
    )
    source_j = 0.0
    if known.source is not None and known.source not in layout.devices:
        source_j = price.sent_bytes[known.source] * known.devices[known.source].tx_j_per_byte
    return Prediction(price.makespan_s, price.interval_s, energy, peaks, source_j)


def _rows(layout: Layout, price: _C.Price) -> list[tuple[int, float, float, float]]:
    busy, sent, received = price.busy_s, price.sent_bytes, price.received_bytes
    return [(d, busy[d], sent[d], received[d]) for d in layout.devices]


def _with_tokens(
    prefill: Prediction, layout: Layout, known: Setting, decode: StageCosts
) -> Prediction:
    """Adds the tokens after the first, each one pass of one token per sequence.

    The id of a token returns from the last stage to the first before the next one can start.
    """
    single = layout._replace(counts=tuple((1, *[0] * (len(c) - 1)) for c in layout.counts))
    # What follows the prompt does not come from the source.
    price = as_step(single, known._replace(source=None), decode).price(known.network)
    step = _prediction(layout, known, price, prefill.peak_bytes)
    first, last = layout.groups[0].devices[0], layout.groups[-1].devices[0]
    back_s = float(known.links.latency_s[last, first]) if first != last else 0.0
    tpot_s, after = price.makespan_s + back_s, max(known.new_tokens - 1, 0)
    energy = zip(prefill.energy_j, step.energy_j, strict=True)
    return prefill._replace(
        makespan_s=prefill.makespan_s + after * tpot_s,
        interval_s=prefill.interval_s + after * price.interval_s,
        energy_j=tuple(a + after * b for a, b in energy),
        ttft_s=prefill.makespan_s,
        tpot_s=tpot_s,
    )


def as_step(layout: Layout, known: Setting, costs: StageCosts) -> _C.Step:
    """Returns the layout in numbers, to be priced."""
    speeds = {d: known.devices[d].power_mode(name).speed_factor for d, name in layout.modes}
    forward = [_stage_s(costs.forward_s, g, speeds) for g in layout.groups]
    backward = [_stage_s(costs.backward_s, g, speeds) for g in layout.groups]
    down = [float(costs.boundary_bytes[group.first]) for group in layout.groups[1:]]
    up = list(down)
    if layout.codecs or layout.gradient_codecs or known.overheads:
        for s, group in enumerate(layout.groups):
            for r in range(len(group.devices)):
                forward_s, backward_s = added_s(layout, known, costs, s, r)
                forward[s][r] += forward_s
                backward[s][r] += backward_s
    for s, codec in enumerate(layout.codecs):
        up[s] *= wire_ratio(codec.backward, known.dtype)
        down[s] *= wire_ratio(codec.forward, known.dtype)
    return _C.Step(
        devices=[group.devices for group in layout.groups],
        forward_s=forward,
        backward_s=backward,
        down_bytes=down,
        up_bytes=up,
        routes=layout.routes,
        warmup=layout.warmup,
        kind=layout.kind,
        reductions=reductions(layout, costs, known.dtype) if known.training else (),
        source=-1 if known.source is None else known.source,
        input_bytes=float(costs.boundary_bytes[0]),
        prefetch=DEFAULT_PREFETCH,
    )


def _stage_s(times: Array, group: Group, speeds: dict[int, float]) -> list[float]:
    return [float(times[d, group.first, group.end]) / speeds.get(d, 1.0) for d in group.devices]


def reductions(
    layout: Layout, costs: StageCosts, dtype: str = "float32"
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Returns (devices, bytes) of each gradient all-reduce, in order.

    Copies of a tied parameter on several stages are summed once the stages have reduced their own.
    They travel by the codec of their stages if all have the same one.
    """
    names = layout.gradient_codecs or ("none",) * len(layout.groups)
    found = [
        (
            group.devices,
            float(costs.gradient_bytes[group.first, group.end]) * wire_ratio(name, dtype),
        )
        for group, name in zip(layout.groups, names, strict=True)
        if len(group.devices) > 1
    ]
    for blocks, gradient in costs.tied_bytes:
        holders = [
            (group, name)
            for group, name in zip(layout.groups, names, strict=True)
            if any(group.first <= b < group.end for b in blocks)
        ]
        if len(holders) > 1:
            used = {name for _, name in holders}
            ratio = wire_ratio(used.pop(), dtype) if len(used) == 1 else 1.0
            found.append(
                (tuple(d for group, _ in holders for d in group.devices), gradient * ratio)
            )
    return tuple((devices, num_bytes) for devices, num_bytes in found if num_bytes)


def peak_bytes(layout: Layout, known: Setting, step: _C.Step) -> tuple[float, ...]:
    """Returns the peak memory of each device, in the order of `layout.devices`."""
    peaks = []
    for group, held in zip(layout.groups, step.in_flight(), strict=True):
        span = group.first, group.end
        fixed = known.costs.state_bytes[span] + known.costs.buffer_bytes[span]
        kept = known.costs.activation_bytes[span]
        peaks += [float(fixed + kept * count) for count in held]
    return tuple(peaks)


def memory_share(layout: Layout, known: Setting, step: _C.Step) -> tuple[float, str]:
    """Returns the largest share of any device's memory that is needed, and which device's."""
    return largest_share(layout, known, peak_bytes(layout, known, step))


def largest_share(layout: Layout, known: Setting, peaks: Sequence[float]) -> tuple[float, str]:
    """Returns the same where the peak memory of each device is known."""
    needs = [
        (peak / known.devices[d].memory_bytes, peak, known.devices[d])
        for d, peak in zip(layout.devices, peaks, strict=True)
    ]
    share, peak, device = max(needs, key=lambda need: need[0])
    has = device.memory_bytes
    return share, f"memory: {device.name} needs {peak / 1e9:.3g} GB, has {has / 1e9:.3g} GB"


def is_linked(groups: Sequence[Group], known: Setting) -> bool:
    """Returns whether links join all devices that would exchange messages."""
    latency = known.links.latency_s
    pairs = [(d, e) for a, b in pairwise(groups) for d in a.devices for e in b.devices]
    if known.training:
        pairs += [(e, d) for d, e in pairs]
        for devices, _ in reductions(Layout(tuple(groups), (), (), ""), known.costs):
            pairs += [(d, devices[(i + 1) % len(devices)]) for i, d in enumerate(devices)]
    first, last = groups[0].devices[0], groups[-1].devices[0]
    if known.decode is not None and first != last:
        pairs.append((last, first))  # the id of each token returns
    if known.source is not None:
        pairs += [(known.source, d) for d in groups[0].devices if d != known.source]
    return bool(np.isfinite([latency[pair] for pair in pairs]).all())
