"""Measures the network between the ranks of a process group.

One pair of ranks at a time, all in one fixed order, so that measurements neither deadlock nor
disturb each other; wire.py has the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from dora.errors import SpecError
from dora.profiler.wire import Wire, answer, measure, receive_flow, send_flow
from dora.spec import Cluster, Device, Link, Medium, Spec
from dora.spec.base import Index, NonNegative, Positive

DEFAULT_SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)


class LinkRate(Spec):
    """What one flow alone gets from rank `src` to rank `dst`; latency is one way."""

    src: Index
    dst: Index
    rate_bytes_per_s: Positive
    latency_s: NonNegative


class FlowRate(Spec):
    """What a flow from rank `src` to rank `dst` gets while others run."""

    src: Index
    dst: Index
    rate_bytes_per_s: Positive


def measure_links(
    group: dist.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] = DEFAULT_SIZES,
    repeats: int = 5,
    timeout_s: float = 30.0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LinkRate, ...]:
    """Measures rate and latency of every ordered pair; all ranks of the group call it.

    Args:
        group: Carries CPU tensors, as gloo does; None is the default group.
        sizes: Message sizes in bytes, at least two; on slow links the largest are left out.
        repeats: Timed messages per size, fewer where `timeout_s` allows no more; medians count.
        timeout_s: Longest time that one pair may take; failures show within twice this.
        progress: Called with pairs done and pairs in all.

    Returns:
        One entry per ordered pair, the same on every rank, ordered by (src, dst).

    Raises:
        SpecError: A size or `repeats` is not positive, or there are fewer than two sizes.
        PeerLostError: A rank did not answer in time or closed its connection.
    """
    sizes = sorted(set(sizes))
    if len(sizes) < 2 or sizes[0] < 1 or repeats < 1 or timeout_s <= 0:
        raise SpecError(
            f"sizes, repeats, timeout_s: given {tuple(sizes)}, {repeats} and {timeout_s:g}, "
            "allowed: two or more positive sizes, at least 1, more than 0"
        )
    wire = Wire(group, timeout_s)
    n = wire.world_size
    pairs = [(src, dst) for src in range(n) for dst in range(n) if src != dst]
    table = torch.zeros(n, n, 2, dtype=torch.float64)
    for i, (src, dst) in enumerate(pairs):
        wire.gather_sum(torch.zeros(1), f"waiting for the start of link {src} -> {dst}")
        wire.start_step()
        if wire.rank == src:
            table[src, dst] = torch.tensor(measure(wire, dst, sizes, repeats))
        elif wire.rank == dst:
            answer(wire, src)
        if progress is not None:
            progress(i + 1, len(pairs))
    table = wire.gather_sum(table, "collecting the measured links")
    return tuple(
        LinkRate(
            src=src,
            dst=dst,
            rate_bytes_per_s=float(table[src, dst, 0]),
            latency_s=float(table[src, dst, 1]),
        )
        for src, dst in pairs
    )


def measure_concurrent(
    group: dist.ProcessGroup | None,
    flows: Sequence[tuple[int, int]],
    *,
    duration_s: float = 2.0,
    timeout_s: float = 30.0,
) -> tuple[FlowRate, ...]:
    """Runs flows (src, dst) all at once and returns the rate of each; all ranks call it.

    Every flow sends until `duration_s` is over, so that none finishes early and frees the
    medium for the others.

    Args:
        group: Carries CPU tensors, tags, and calls from several threads, as gloo does.
        flows: Ordered pairs of ranks, the same on every rank; no pair twice.
        duration_s: How long the flows run.
        timeout_s: Longest time for a flow beyond that; failures show within twice the sum.

    Returns:
        One rate per flow, in the order given, the same on every rank.

    Raises:
        SpecError: A flow is no pair of two ranks, or is given twice.
        PeerLostError: A rank did not answer in time or closed its connection.
    """
    wire = Wire(group, timeout_s + duration_s)
    for src, dst in flows:
        if src == dst or not {src, dst} <= set(range(wire.world_size)):
            raise SpecError(
                f"flows: given {src} -> {dst}, allowed: two ranks below {wire.world_size}"
            )
    if len(set(flows)) != len(flows):
        raise SpecError(f"flows: given {list(flows)}, allowed: each pair once")
    rates = torch.zeros(len(flows), dtype=torch.float64)
    wire.gather_sum(torch.zeros(1), f"waiting for the start of {len(flows)} flows")
    wire.start_step()
    with ThreadPoolExecutor(max_workers=2 * len(flows) + 1) as threads:
        sending = {
            i: threads.submit(send_flow, wire, dst, i + 1, duration_s)
            for i, (src, dst) in enumerate(flows)
            if wire.rank == src
        }
        receiving = [
            threads.submit(receive_flow, wire, src, i + 1)
            for i, (src, dst) in enumerate(flows)
            if wire.rank == dst
        ]
        for flow, rate in sending.items():
            rates[flow] = rate.result()
        for received in receiving:
            received.result()
    rates = wire.gather_sum(rates, "collecting the measured flows")
    return tuple(
        FlowRate(src=src, dst=dst, rate_bytes_per_s=rate)
        for (src, dst), rate in zip(flows, rates.tolist(), strict=True)
    )


def parallelism(links: Sequence[LinkRate], flows: Sequence[FlowRate]) -> float:
    """Returns the sum over concurrent flows of rate / rate alone.

    k flows on private media give k; flows that share one medium give its total efficiency,
    about 1 or less.

    Raises:
        SpecError: A flow's link was not measured.
    """
    alone = {(link.src, link.dst): link.rate_bytes_per_s for link in links}
    for flow in flows:
        if (flow.src, flow.dst) not in alone:
            raise SpecError(f"links: given none for {flow.src} -> {flow.dst}, allowed: all flows'")
    return sum(flow.rate_bytes_per_s / alone[flow.src, flow.dst] for flow in flows)


def contention(links: Sequence[LinkRate], runs: Sequence[Sequence[FlowRate]]) -> tuple[float, ...]:
    """Returns the total efficiency of a shared medium with 1, 2, ... flows, for `Medium`.

    Args:
        links: What each flow gets alone.
        runs: Concurrent flows over that medium: 2 of them, then 3, and so on.

    Raises:
        SpecError: The runs do not have 2, 3, ... flows, or a flow's link was not measured.
    """
    counts = [len(run) for run in runs]
    if counts != list(range(2, len(runs) + 2)):
        raise SpecError(f"runs: given {counts} flows, allowed: 2, 3, ... flows in this order")
    return (1.0, *(min(1.0, parallelism(links, run)) for run in runs))


def to_cluster(
    devices: Sequence[Device], links: Sequence[LinkRate], *, name: str = "cluster"
) -> Cluster:
    """Returns a cluster of these devices, in rank order, with one medium per measured link.

    Raises:
        SpecError: A link names a rank that has no device.
    """
    media, named = [], []
    for link in links:
        if max(link.src, link.dst) >= len(devices):
            raise SpecError(
                f"links: given {link.src} -> {link.dst}, allowed: ranks of {len(devices)} devices"
            )
        src, dst = devices[link.src].name, devices[link.dst].name
        medium = Medium(
            name=f"{src}->{dst}",
            rate_bytes_per_s=link.rate_bytes_per_s,
            latency_s=link.latency_s,
        )
        media.append(medium)
        named.append(Link(src=src, dst=dst, media=(medium.name,)))
    return Cluster(name=name, devices=tuple(devices), media=tuple(media), links=tuple(named))
