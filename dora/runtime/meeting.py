"""Connects the ranks of a job: all of them at its start, or one that comes to a job that runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch._C._distributed_c10d import Store

from dora._C import Engine
from dora.errors import PeerLostError
from dora.runtime.door import Notice, entrance, has_notice, read_notice
from dora.runtime.rendezvous import (
    Board,
    Links,
    Membership,
    connect,
    exchange_addresses,
    join,
    rejoin,
)

_CONNECT_S = 30.0  # of the handshakes, after all ranks have said where they are

# Communicators of this process: the n-th of a newcomer is the n-th of those that were there before.
_numbers = itertools.count(1)


class Place(NamedTuple):
    """Where this rank is in its job, and what it needs to connect once more.

    Attributes:
        membership: Secret and addresses.
        epoch: Of the connections.
        store: Where newcomers knock.
        options: Of the engine.
        notice: Of a job that runs and has not taken this rank in yet.
    """

    membership: Membership
    epoch: int
    store: Store
    options: Mapping[str, Any]
    notice: Notice | None = None

    def engine(self, rank: int, epoch: int) -> Engine:
        """Returns an engine that listens for connections of an epoch."""
        membership = self.membership
        return Engine(
            rank,
            membership.key,
            job=membership.job,
            epoch=epoch,
            host=membership.listen,
            **self.options,
        )


def meet(
    store: Store,
    rank: int,
    world_size: int,
    *,
    key: bytes | None,
    host: str | None,
    timeout_s: float,
    epoch: int,
    links: Links,
    options: Mapping[str, Any],
) -> tuple[Engine, Place]:
    """Connects all ranks; see `Communicator.create`.

    Returns:
        The engine; one without peers if there is a job that runs. And what made it.
    """
    chosen = {"connect_timeout_s": min(timeout_s, _CONNECT_S), **options}
    door = entrance(store, next(_numbers))
    if has_notice(door):
        notice = read_notice(door)
        if notice is None:
            raise PeerLostError(f"rank {rank}: joining failed: the job has ended")
        membership = rejoin(notice, store, key=key, host=host)
        place = Place(membership, notice.epoch + 1, door, chosen, notice)
        return place.engine(rank, place.epoch), place
    board = Board(store, rank, world_size, epoch=epoch, timeout_s=timeout_s)
    place = Place(join(board, store, key=key, host=host), epoch, door, chosen)
    engine = place.engine(rank, epoch)
    try:
        peers = exchange_addresses(board, place.membership, engine.port)
        connect(engine, rank, peers, links, chosen["connect_timeout_s"])
    except BaseException:
        engine.close(0.0)
        raise
    return engine, place
