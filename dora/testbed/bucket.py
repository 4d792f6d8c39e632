"""A cluster's network without root: media that the communication engine keeps to by itself.

All processes map one file, in which every medium has a rate and what is booked on it; an engine
that finds the file (see `dora.runtime.buckets`) sends each chunk when the media of its path would
have carried it. So rates, sharing and relaying are real, between real processes; what differs from
a network is said here:

- Only messages of the engine are slow. Programs that use gloo or sockets of their own have no
  limit, and so have the rendezvous and pairs of devices without a link.
- Payloads take their time; the engine's own frames (grants, acknowledgements, heartbeats) do not,
  except that nothing passes a medium that is down.
- Media have no latency, and several senders on one lose nothing to each other.
- Where one device has several peers, a chunk to each of them may be waiting at a time.
- That a connection was closed is seen at once, even where the medium is down.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from dora import _C
from dora.runtime.buckets import BUCKETS_VARIABLE
from dora.spec import Cluster


class BucketFile:
    """The media of a cluster, for the engines of processes that are started with `environment`.

    It lives in memory and goes with the process that made it, however that ends. Engines that use
    it already go on with the rates as they are.

    Args:
        cluster: As emulated; its rates are what the media carry.
        ranks: Names of the devices in the order of ranks; None takes the cluster's order.
    """

    def __init__(self, cluster: Cluster, ranks: Sequence[str] | None = None) -> None:
        names = [d.name for d in cluster.devices] if ranks is None else list(ranks)
        self._rates = [medium.rate_bytes_per_s for medium in cluster.media]
        self._num_devices = len(names)
        # A file without a folder: nothing is left when this process is killed.
        self._file = os.memfd_create("dora-buckets")
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        _C.Buckets.create(self.path, len(names), self._rates, _paths(cluster, names))
        self._buckets = _C.Buckets(self.path)

    def __enter__(self) -> BucketFile:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def close(self) -> None:
        """Closes the file, after which no more programs can join; may be repeated."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    @property
    def environment(self) -> Mapping[str, str]:
        """What tells a program's engine of this network."""
        return {BUCKETS_VARIABLE: self.path}

    def set_rate(self, medium: int, factor: float) -> None:
        """Sets a medium to a multiple of its rate; 0 takes it down."""
        self._buckets.set_rate(medium, self._rates[medium] * factor)

    def connect(self, device: int, is_connected: bool) -> None:
        """Plugs the cable of a device in or out."""
        self._buckets.set_connected(device, is_connected)

    def have_joined(self) -> bool:
        """Tells whether every device has reached another one."""
        return all(map(self._buckets.has_joined, range(self._num_devices)))

    def bytes_of_devices(self) -> list[tuple[int, int]]:
        """Returns the payload (sent, received) by every device so far."""
        buckets = self._buckets
        return [
            (buckets.sent_bytes(i), buckets.received_bytes(i)) for i in range(self._num_devices)
        ]

    def bytes_of_media(self) -> list[int]:
        """Returns the payload that every medium has carried so far, once per crossing."""
        return [self._buckets.carried_bytes(i) for i in range(len(self._rates))]


def _paths(cluster: Cluster, ranks: Sequence[str]) -> dict[tuple[int, int], list[int]]:
    """Returns the numbers of the media between ranks, as often as they are crossed."""
    rank_of = {name: rank for rank, name in enumerate(ranks)}
    number_of = {medium.name: number for number, medium in enumerate(cluster.media)}
    return {
        (rank_of[link.src], rank_of[link.dst]): [number_of[name] for name in link.media]
        for link in cluster.links
        if link.src in rank_of and link.dst in rank_of
    }
