"""Reads a cluster file that names devices and networks of the catalogue.

::

    name = "home"
    [[network]]
    name = "wifi"
    network = "wifi6_80_2ss"     # of the catalogue; or rate_bytes_per_s = 8e7 by hand
    [[device]]
    name = "phone"
    device = "iphone-15-pro"     # of the catalogue; or every field by hand
    network = "wifi"             # or a list; the fastest path between two devices is taken
    memory_bytes = 3_000_000_000 # any field of `Device` can be overridden

On a shared network (Wi-Fi, BLE, Thread) all devices use one medium, called like the network. On
any other (Ethernet, cellular, WAN) each device has its own full-duplex port, the media
`DEVICE.up` and `DEVICE.down` (`DEVICE.NETWORK.up` if it has several). Networks are bridged to
each other, except that those named by an `[[uplink]]` reach the rest of the world through the
media `UPLINK.up` and `UPLINK.down`, which all of their devices share:

    phone -> phone on one Wi-Fi     wifi, wifi         (the access point sends it again)
    phone -> desktop on Ethernet    wifi, desktop.down
    camera -> server elsewhere      wifi, street.up, server.down

A `[[link]]` with src, dst and media replaces the generated one; a `[[medium]]` adds a medium.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dora import files
from dora.catalog import tables
from dora.catalog.devices import device, device_names
from dora.catalog.networks import Network, as_medium, network, network_names
from dora.errors import SpecError
from dora.spec import Cluster, Device, Link, Medium, Spec
from dora.spec.base import Fraction, Name, NonNegative, Positive


class NetworkEntry(Spec):
    """A `[[network]]` table; what it does not give comes from the catalogue.

    Attributes:
        network: Catalogue name.
        rate_bytes_per_s: Goodput of one flow; towards the device if `up_rate_bytes_per_s` differs.
        latency_s: One-way delay of one crossing.
        shared: True: one medium for all devices. False: a full-duplex port for each.
    """

    name: Name
    network: Name | None = None
    rate_bytes_per_s: Positive | None = None
    up_rate_bytes_per_s: Positive | None = None
    latency_s: NonNegative | None = None
    contention: Annotated[tuple[Fraction, ...], Field(min_length=1)] | None = None
    shared: bool | None = None


class UplinkEntry(NetworkEntry):
    """An `[[uplink]]` table: the access link that the devices of `networks` share."""

    networks: Annotated[tuple[Name, ...], Field(min_length=1)]


class ClusterFile(Spec):
    """The tables of a cluster file; devices are checked when they are merged."""

    name: str = "cluster"
    network: tuple[NetworkEntry, ...] = ()
    uplink: tuple[UplinkEntry, ...] = ()
    device: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    link: tuple[Link, ...] = ()
    medium: tuple[Medium, ...] = ()


class _Attached(Spec):
    """A device and the media of each network it is on: (towards the network, from it)."""

    device: Device
    media: dict[str, tuple[str, str]]


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Reads a cluster from a TOML file with catalogue names, or from a whole `Cluster`.

    Args:
        path: `.toml` with `[[device]]` tables (see above), or `.toml` / `.json` of a `Cluster`
            with `devices`, `media` and `links`.

    Raises:
        SpecError: One line with file, table, what was given and the closest allowed names.
    """
    if Path(path).suffix != ".toml":
        return files.load(Cluster, path)
    data = files.read_toml(path)
    if "devices" in data:
        return files.validate(Cluster, data, source=str(path))
    content = files.validate(ClusterFile, data, source=str(path))
    try:
        return _resolve(content, str(path))
    except SpecError as error:
        message = str(error)
        raise SpecError(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from None


def _resolve(content: ClusterFile, source: str) -> Cluster:
    """Replaces catalogue names by values and generates the links."""
    networks = {entry.name: _network(entry) for entry in content.network}
    uplinks = _uplinks(content.uplink, networks)
    attached = [_attached(table, networks, source) for table in content.device]
    media = {m.name: m for m in _shared_media(networks, content.uplink)}
    media.update({m.name: m for a in attached for m in _port_media(a, networks)})
    media.update({m.name: m for m in content.medium})
    links = {(link.src, link.dst): link for link in _links(attached, networks, uplinks, media)}
    links.update({(link.src, link.dst): link for link in content.link})
    used = {name for link in links.values() for name in link.media}
    return files.validate(
        Cluster,
        {
            "name": content.name,
            "devices": tuple(a.device for a in attached),
            "media": tuple(m for m in media.values() if m.name in used),
            "links": tuple(links.values()),
        },
        source=source,
    )


def _network(entry: NetworkEntry) -> Network:
    """Returns the catalogue network of an entry with the entry's own values on top."""
    if entry.network is not None:
        base = network(entry.network)
    elif entry.rate_bytes_per_s is not None:
        rate = entry.rate_bytes_per_s
        base = Network(entry.name, "by hand", rate, rate, 0.0, (1.0,), True, 0.0, 0.0)
    else:
        raise SpecError(
            f"network {entry.name}: given neither network nor rate_bytes_per_s, "
            f"allowed: network = one of {', '.join(network_names())}"
        )
    given: dict[str, Any] = {
        "rate_bytes_per_s": entry.rate_bytes_per_s,
        "up_rate_bytes_per_s": entry.up_rate_bytes_per_s or entry.rate_bytes_per_s,
        "latency_s": entry.latency_s,
        "contention": entry.contention,
        "is_shared": entry.shared,
    }
    return base._replace(
        name=entry.name, **{key: value for key, value in given.items() if value is not None}
    )


def _attached(table: Mapping[str, Any], networks: Mapping[str, Network], source: str) -> _Attached:
    """Merges one `[[device]]` table with the catalogue and the networks it is on."""
    where = f"{source}: device {table.get('name', '?')}"
    own = {key: value for key, value in table.items() if key not in ("device", "network")}
    names = _network_names(table.get("network", list(networks)[:1]), networks, where)
    merged: dict[str, Any] = {}
    if "device" in table:
        if table["device"] not in device_names():
            raise SpecError(
                f"{where}.device: given {table['device']!r}, "
                f"{tables.closest(str(table['device']), device_names())}"
            )
        merged = device(table["device"]).model_dump(exclude={"name"})
    if names and networks[names[0]].kind != "by hand":
        radio = networks[names[0]]
        merged |= {"tx_j_per_byte": radio.tx_j_per_byte, "rx_j_per_byte": radio.rx_j_per_byte}
    found = files.validate(Device, merged | own, source=where)
    ports = [name for name in names if not networks[name].is_shared]
    media = {}
    for name in names:
        port = found.name if len(ports) == 1 else f"{found.name}.{name}"
        media[name] = (name, name) if networks[name].is_shared else (f"{port}.up", f"{port}.down")
    return _Attached(device=found, media=media)


def _network_names(given: Any, networks: Mapping[str, Network], where: str) -> list[str]:
    """Returns the networks that a device names, checked."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"{where}.network: given {given!r}, allowed: a name or a list of names")
    for name in names:
        if name not in networks:
            raise SpecError(f"{where}.network: given {name!r}, {tables.closest(name, networks)}")
    return names


def _uplinks(given: Sequence[UplinkEntry], networks: Mapping[str, Network]) -> dict[str, str]:
    """Returns the uplink of each network that is behind one."""
    behind: dict[str, str] = {}
    for uplink in given:
        for name in uplink.networks:
            if name not in networks or name in behind:
                free = [known for known in networks if known not in behind]
                raise SpecError(
                    f"uplink {uplink.name}.networks: given {name!r}, {tables.closest(name, free)}"
                )
            behind[name] = uplink.name
    return behind


def _shared_media(networks: Mapping[str, Network], uplinks: Sequence[UplinkEntry]) -> list[Medium]:
    """Returns the channels, and both directions of the uplinks."""
    shared = [as_medium(net.name, net) for net in networks.values() if net.is_shared]
    for uplink in uplinks:
        access = _network(uplink)
        shared += [as_medium(f"{uplink.name}.up", access, up=True)]
        shared += [as_medium(f"{uplink.name}.down", access)]
    return shared


def _port_media(attached: _Attached, networks: Mapping[str, Network]) -> list[Medium]:
    """Returns both directions of every port that a device has for itself."""
    ports = [(networks[n], m) for n, m in attached.media.items() if not networks[n].is_shared]
    return [
        medium
        for net, (up, down) in ports
        for medium in (as_medium(up, net, up=True), as_medium(down, net))
    ]


def _links(
    attached: list[_Attached],
    networks: Mapping[str, Network],
    uplinks: Mapping[str, str],
    media: Mapping[str, Medium],
) -> list[Link]:
    """Returns one link per ordered pair of devices that some networks connect."""
    links = []
    for src, dst in permutations(attached, 2):
        paths = [
            _path(a, up, b, down, uplinks)
            for a, (up, _) in src.media.items()
            for b, (_, down) in dst.media.items()
        ]
        if paths:
            best = min(paths, key=lambda path: _slowness(path, media))
            links.append(Link(src=src.device.name, dst=dst.device.name, media=best))
    return links


def _path(a: str, up: str, b: str, down: str, uplinks: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the media from a device on network `a` to one on network `b`."""
    if uplinks.get(a) == uplinks.get(b):
        return (up, down)
    leave = (f"{uplinks[a]}.up",) if a in uplinks else ()
    enter = (f"{uplinks[b]}.down",) if b in uplinks else ()
    return (up, *leave, *enter, down)


def _slowness(path: tuple[str, ...], media: Mapping[str, Medium]) -> tuple[float, float]:
    """Orders paths: highest rate of a lone flow first, then shortest delay."""
    rate = min(media[name].rate_bytes_per_s / path.count(name) for name in path)
    return -rate, sum(media[name].latency_s for name in path)
