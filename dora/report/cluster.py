"""Draws the cluster: every device as a card that hangs from the medium which it shares.

A medium that several devices are on is a bar with its devices below it; devices with ports of
their own hang from a dashed bar, which stands for a switch, each on a line with its own rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dora.report.markup import Markup, joined, note, tag
from dora.report.plan import badge
from dora.report.quantities import digits, num_bytes, percent, rate, seconds, with_unit
from dora.spec import Cluster, Device, Medium, Run

# In a cluster of more devices, those that are left out are drawn smaller.
_MANY = 12


class Hub(NamedTuple):
    """What devices hang from.

    Attributes:
        media: That they share; () for a switch, where each has its own.
        devices: Drawn here.
        guests: On it too, and drawn at another hub.
    """

    media: tuple[Medium, ...]
    devices: tuple[str, ...]
    guests: tuple[str, ...] = ()


def access(cluster: Cluster) -> dict[str, list[str]]:
    """Returns for each device the media on which its own traffic begins or ends."""
    found: dict[str, dict[str, None]] = {device.name: {} for device in cluster.devices}
    for link in cluster.links:
        found[link.src][link.media[0]] = None
        found[link.dst][link.media[-1]] = None
    return {name: list(media) for name, media in found.items()}


def hubs(cluster: Cluster) -> list[Hub]:
    """Returns the shared media, then the switch of the rest, then those with no link."""
    by_device = access(cluster)
    members: dict[tuple[str, ...], list[Medium]] = {}
    for medium in cluster.media:
        on_it = tuple(name for name, media in by_device.items() if medium.name in media)
        if len(on_it) > 1:
            members.setdefault(on_it, []).append(medium)
    found: list[Hub] = []
    drawn: set[str] = set()
    for on_it, media in members.items():
        own = tuple(name for name in on_it if name not in drawn)
        guests = tuple(name for name in on_it if name in drawn)
        found.append(Hub(tuple(media), own, guests))
        drawn.update(own)
    rest = tuple(name for name in by_device if name not in drawn)
    return [*found, Hub((), rest)] if rest else found


def cluster_drawing(run: Run) -> Markup:
    """Returns the drawing, and the media that are between networks or unused."""
    cluster = run.cluster
    by_device, groups = access(cluster), hubs(cluster)
    drawn = {name for media in by_device.values() for name in media}
    linked = {name for link in cluster.links for name in link.media}
    between = [m for m in cluster.media if m.name in linked - drawn]
    parts = [_between(between)] if between else []
    parts += [_hub(hub, run, by_device) for hub in groups]
    unused = [medium.name for medium in cluster.media if medium.name not in linked]
    joint = " joined" if _are_joined(groups, cluster) else ""
    drawn_parts = tag("div", parts, class_=f"cluster{joint}")
    return joined(drawn_parts, note(f"On no link: {', '.join(unused)}.") if unused else "")


def _are_joined(groups: Sequence[Hub], cluster: Cluster) -> bool:
    """Tells whether links lead from one group of devices to another."""
    place = {name: i for i, hub in enumerate(groups) for name in hub.devices}
    return any(place[link.src] != place[link.dst] for link in cluster.links)


def _between(media: Sequence[Medium]) -> Markup:
    items = (tag("li", tag("b", m.name), f" {_medium_text(m)}") for m in media)
    head = tag("p", "Between networks, shared by all who cross")
    return tag("div", head, tag("ul", items), class_="between")


def _hub(hub: Hub, run: Run, by_device: dict[str, list[str]]) -> Markup:
    shared = {medium.name for medium in hub.media}
    cards = [_card(run, n, _own_media(run.cluster, by_device[n], shared)) for n in hub.devices]
    cards += [tag("div", tag("p", name, class_="name"), class_="card guest") for name in hub.guests]
    cells = (tag("div", card, class_="cell") for card in cards)
    return tag(
        "div",
        tag("div", _bar_text(hub, run.cluster), class_="bus" if hub.media else "bus switch"),
        tag("div", cells, class_="cells" if run.cluster.links else "cells apart"),
        class_="hub",
    )


def _bar_text(hub: Hub, cluster: Cluster) -> Iterator[str]:
    if not cluster.links:
        yield "No network: nothing links these devices"
        return
    if not hub.media:
        yield tag("b", "Ports of their own")
        yield " each device has a line for itself, and shares it with nobody"
        return
    count = len(hub.devices) + len(hub.guests)
    for i, medium in enumerate(hub.media):
        yield tag("br") if i else ""
        yield tag("b", medium.name)
        yield f" {_medium_text(medium)}, shared by {count} devices"


def _medium_text(medium: Medium) -> str:
    text = rate(medium.rate_bytes_per_s)
    low, high = medium.rate_p10_bytes_per_s, medium.rate_p90_bytes_per_s
    # A port that varies by a percent does not vary.
    if low and high and high / low > 1.05:
        text += f" ({rate(low)} to {rate(high)} for 80% of the time)"
    if medium.latency_s:
        text += f", {seconds(medium.latency_s)} delay"
    if len(medium.contention) > 1 and medium.contention[-1] < 1:
        flows = len(medium.contention)
        text += f", {percent(medium.contention[-1])} of that with {flows} flows"
    return text


def _own_media(cluster: Cluster, names: Iterable[str], shared: set[str]) -> list[Medium]:
    """Returns the media of a device that the bar above it does not stand for."""
    wanted = set(names) - shared
    return [medium for medium in cluster.media if medium.name in wanted]


def _card(run: Run, name: str, media: Sequence[Medium]) -> Markup:
    device = run.cluster.device(name)
    place = next(
        ((s, r) for s in run.plan.stages for r in s.replicas if r.device == name), None
    )  # fmt: skip
    stage = place[0].index if place else None
    parts = [tag("p", device.name, class_="name"), tag("p", device.kind, class_="kind")]
    if stage is None and len(run.cluster.devices) > _MANY:
        parts.append(tag("p", "left out; ", ", ".join(_abilities(device))))
    else:
        parts.append(tag("p", _role(run, name), class_="role"))
        parts.append(tag("ul", (tag("li", item) for item in _abilities(device))))
    if media:
        parts.append(tag("ul", _ports(media), class_="ports"))
    class_ = "card out" if stage is None else f"card stage s{stage % 6}"
    return tag("div", *parts, class_=class_)


def _role(run: Run, name: str) -> Markup:
    parts: list[str] = []
    for stage in run.plan.stages:
        for replica in stage.replicas:
            if replica.device == name:
                parts += [badge(stage.index), f" blocks {stage.first_block}-{stage.last_block}"]
                if len(stage.replicas) > 1:
                    parts.append(f", {percent(replica.share)}")
    if run.workload.source == name:
        parts.append(", has the inputs" if parts else "has the inputs, computes nothing")
    return joined(*parts) if parts else joined("left out")


def _abilities(device: Device) -> Iterator[str]:
    yield f"{with_unit(device.flops_per_s, 'FLOP/s')} peak"
    yield f"{num_bytes(device.memory_bytes)} memory"
    if device.busy_w:
        yield f"{digits(device.idle_w)} W idle, {digits(device.busy_w)} W busy"
    battery_j = device.battery_j
    yield f"battery {digits(battery_j / 3600)} Wh" if battery_j else "mains power"


def _ports(media: Sequence[Medium]) -> Iterator[Markup]:
    """Yields the ports of a device, those that are alike in one line."""
    alike: dict[str, list[str]] = {}
    for medium in media:
        alike.setdefault(_medium_text(medium), []).append(medium.name)
    for text, names in alike.items():
        yield tag("li", tag("b", ", ".join(names)), f" {'each ' * (len(names) > 1)}{text}")
