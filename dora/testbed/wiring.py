"""How a cluster's media are laid out as network devices; pure.

Every device has a cable to a bridge; devices that reach one another over at most two media are one
site, with one bridge. A packet crosses a medium by passing its queue, and there are four places for
a queue on the way of a packet:

    device --cable--> [entering] bridge of its site --trunk--> [trunk] bridge of the other site
                                                               [leaving] --cable--> device

Devices on one Wi-Fi channel enter and leave through the same queue, as they do through a relaying
access point.
"""

from __future__ import annotations

from typing import NamedTuple

from dora.errors import SpecError
from dora.spec import Cluster

_MAX_TRUNK = 2  # a queue at either end


class Wiring(NamedTuple):
    """Positions of devices and media are those in the cluster.

    Attributes:
        site_of: Site of every device.
        entering: Medium that a packet for `dst` crosses when it leaves the cable of `src`.
        leaving: Medium that a packet from `src` crosses before the cable of `dst`.
        trunks: Media between two sites, in order.
    """

    site_of: tuple[int, ...]
    entering: dict[tuple[int, int], int]
    leaving: dict[tuple[int, int], int]
    trunks: dict[tuple[int, int], tuple[int, ...]]

    @property
    def num_sites(self) -> int:
        """How many bridges there are."""
        return max(self.site_of) + 1


def wire(cluster: Cluster) -> Wiring:
    """Returns where a packet of each link passes which medium.

    Raises:
        SpecError: A link crosses more than four media, or two links between the same sites differ.
    """
    device = {d.name: i for i, d in enumerate(cluster.devices)}
    medium = {m.name: i for i, m in enumerate(cluster.media)}
    paths = {
        (device[link.src], device[link.dst]): [medium[name] for name in link.media]
        for link in cluster.links
    }
    site_of = _sites(len(cluster.devices), [ends for ends, p in paths.items() if len(p) <= 2])
    trunks: dict[tuple[int, int], tuple[int, ...]] = {}
    for (src, dst), path in paths.items():
        sites, between = (site_of[src], site_of[dst]), tuple(path[1:-1])
        if sites[0] == sites[1] and not between:
            continue
        known = trunks.setdefault(sites, between)
        if sites[0] == sites[1] or known != between or len(between) > _MAX_TRUNK:
            names = [cluster.media[m].name for m in path]
            raise SpecError(
                f"link {cluster.devices[src].name} -> {cluster.devices[dst].name}: given media "
                f"{names}, which the testbed can not lay out, allowed: at most four, and the same "
                "in the middle for all links between two sites"
            )
    return Wiring(
        site_of=site_of,
        entering={ends: path[0] for ends, path in paths.items()},
        leaving={ends: path[-1] for ends, path in paths.items() if len(path) > 1},
        trunks=trunks,
    )


def _sites(num_devices: int, near: list[tuple[int, int]]) -> tuple[int, ...]:
    """Numbers the groups of devices that are joined by `near`, from 0."""
    group = list(range(num_devices))
    for a, b in near:
        old, new = max(group[a], group[b]), min(group[a], group[b])
        group = [new if g == old else g for g in group]
    numbers = {g: i for i, g in enumerate(sorted(set(group)))}
    return tuple(numbers[g] for g in group)
