"""How the ranks of a job find one another: addresses and the secret, over a c10d Store.

The store itself is neither encrypted nor authenticated. So a secret passes through it only where
it protects nothing but ports of one machine's loopback, which nobody else can reach.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from dora._C import Engine
from dora.errors import PeerLostError, SpecError
from dora.keys import HOW_TO_SET, new_key
from dora.runtime.door import Notice, proof

_LOOPBACK = "127.0.0.1"
_ANY = ("0.0.0.0", "::")


class Board:
    """Notes of all ranks under one prefix of a store.

    Every creation gets keys of its own, so that a job may connect again over the same store.

    Args:
        store: Shared by all ranks.
        rank: This process.
        world_size: Number of ranks.
        epoch: Of the membership.
        timeout_s: Limit of every wait.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, *, epoch: int, timeout_s: float
    ) -> None:
        turn = PrefixStore(f"dora/{epoch}", store).add(f"turn/{rank}", 1)
        self._store = PrefixStore(f"dora/{epoch}/{turn}", store)
        self.rank = rank
        self.world_size = world_size
        self._timeout_s = timeout_s

    def tell(self, topic: str, note: dict[str, Any]) -> None:
        """Publishes a note of this rank."""
        self._store.set(f"{topic}/{self.rank}", json.dumps(note))

    def ask(self, topic: str, ranks: range) -> list[dict[str, Any]]:
        """Waits for the notes of `ranks`."""
        keys = [f"{topic}/{rank}" for rank in ranks]
        try:
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            missing = list(ranks)
            with suppress(RuntimeError):  # the store may have died with its host
                missing = [r for r, key in zip(ranks, keys, strict=True) if not self._has(key)]
            raise PeerLostError(
                f"rank {self.rank}: rendezvous with ranks {missing} failed: no answer within "
                f"{self._timeout_s:g} s (timeout_s): {str(error).splitlines()[0]}"
            ) from None
        return [json.loads(self._store.get(key)) for key in keys]

    def _has(self, key: str) -> bool:
        return self._store.check([key])


@dataclass(frozen=True)
class Membership:
    """What this rank needs to connect.

    Attributes:
        key: The shared secret.
        job: A number that tells this job from others.
        listen: The address to listen on.
        address: The address that others reach this rank by; empty if none is known.
        machine: That all ranks share; empty if they are on several.
        made_key: The secret, if it was made for this job since no rank had one.
    """

    key: bytes
    job: int
    listen: str
    address: str
    machine: str = ""
    made_key: str = ""


@dataclass(frozen=True)
class Links:
    """What is known of the paths from this rank; see `dora._C.Engine.connect`."""

    media: Mapping[int, Sequence[int]] = field(default_factory=dict)
    arbiters: Mapping[int, int] = field(default_factory=dict)
    rates: Mapping[int, float] = field(default_factory=dict)


def join(board: Board, store: Store, *, key: bytes | None, host: str | None) -> Membership:
    """Agrees with all ranks on secret and job, and picks the own address.

    Args:
        board: For the notes of the job.
        store: Tells by its host which network the ranks share.
        key: The secret of this rank, if it has one.
        host: Address to listen on; None finds one.

    Raises:
        SpecError: Ranks on several machines have no secret, or only some have one.
    """
    listen = None if host is None else _numeric(host)
    is_any = listen is None or listen in _ANY
    own = _towards(_store_host(store)) if is_any else str(listen)
    machine = _machine()
    board.tell(
        "place",
        {"machine": machine, "listen": listen, "address": own, "has_key": key is not None},
    )
    places = board.ask("place", range(board.world_size))
    is_local = all(place["machine"] == machine for place in places)
    if is_any and is_local:
        own = _LOOPBACK
    elif not is_local and _is_loopback(own):
        own = _towards_peer(places)
    is_safe = is_local and all(_is_loopback(place["listen"] or _LOOPBACK) for place in places)
    _check_keys([place["has_key"] for place in places], is_safe)
    if board.rank == 0:
        shared = "" if key is not None else new_key()
        board.tell("job", {"job": secrets.randbits(62) + 1, "key": shared})
    note = board.ask("job", range(1))[0]
    return Membership(
        key=key if key is not None else note["key"].encode(),
        job=note["job"],
        listen=own if listen is None else listen,
        address=own,
        machine=machine if is_local else "",
        made_key=note["key"],
    )


def rejoin(notice: Notice, store: Store, *, key: bytes | None, host: str | None) -> Membership:
    """Returns what a newcomer needs to connect to a job that runs.

    Args:
        notice: Of the job.
        store: Tells by its host which network the ranks share.
        key: The secret of this rank, if it has one.
        host: Address to listen on; None finds one.

    Raises:
        SpecError: The secret is missing or another one, or the job can not be reached from here.
    """
    machine = _machine()
    if notice.machine and notice.machine != machine:
        raise SpecError(
            "this job's ranks share one machine's loopback, given a rank on another machine, "
            "allowed: one on theirs; start the job with ranks on several machines for others"
        )
    known = notice.key.encode() if key is None else key
    if not known:
        raise SpecError(f"key: given none, the job that runs has one: {HOW_TO_SET}")
    if not hmac.compare_digest(proof(known, notice.job), notice.proof):
        raise SpecError(f"key: given another one than the job that runs has: {HOW_TO_SET}")
    listen = None if host is None else _numeric(host)
    is_any = listen is None or listen in _ANY
    own = _towards(_store_host(store)) if is_any else str(listen)
    if is_any and notice.machine:
        own = _LOOPBACK
    elif _is_loopback(own) and not notice.machine:
        own = _towards_peer([{"address": notice.address}])
    return Membership(
        known, notice.job, own if listen is None else listen, own, notice.machine, notice.key
    )


def exchange_addresses(
    board: Board, membership: Membership, port: int
) -> dict[int, tuple[str, int]]:
    """Returns where all other ranks listen.

    Raises:
        SpecError: A rank knows no address that others can reach it by.
    """
    board.tell("address", {"address": membership.address, "port": port})
    notes = board.ask("address", range(board.world_size))
    lost = [rank for rank, note in enumerate(notes) if not note["address"]]
    if lost:
        raise SpecError(
            f"ranks {lost}: no address is known by which other machines can reach them, allowed: "
            "a rendezvous host (MASTER_ADDR) that is no loopback address, or host='ADDRESS'"
        )
    return {
        rank: (note["address"], note["port"])
        for rank, note in enumerate(notes)
        if rank != board.rank
    }


def connect(
    engine: Engine, rank: int, peers: dict[int, tuple[str, int]], links: Links, timeout_s: float
) -> None:
    """Connects to all peers; raises PeerLostError that says which ones failed, and why."""
    engine.connect(peers, media=links.media, arbiters=links.arbiters, rates=links.rates)
    missing = engine.wait_connected(timeout_s)
    if missing:
        reasons = {text: None for kind, _, text in engine.events() if kind != "connected"}
        raise PeerLostError(
            f"rank {rank}: connecting to ranks {missing} failed within {timeout_s:g} s"
            + "".join(f"; {text}" for text in reasons)
        )


def _check_keys(has_key: list[bool], is_safe: bool) -> None:
    without = [rank for rank, has in enumerate(has_key) if not has]
    if without and len(without) < len(has_key):
        raise SpecError(f"key: ranks {without} have none, the others do: {HOW_TO_SET}")
    if without and not is_safe:
        raise SpecError(
            f"key: given none, allowed only where all ranks share one machine's loopback: "
            f"{HOW_TO_SET}"
        )


def _machine() -> str:
    """Names what shares one loopback: a booted kernel and a network namespace of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:  # no /proc: nothing is known, so nothing is shared
        return secrets.token_hex(16)


def _store_host(store: Store) -> str:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store.host if isinstance(store, TCPStore) else _LOOPBACK


def _towards(host: str) -> str:
    """Returns the local address from which `host` is reached, without sending anything."""
    found: list[Any] = []
    with suppress(OSError):
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    for family, kind, _, _, target in sorted(found, key=lambda f: f[0] != socket.AF_INET):
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    return _LOOPBACK


def _towards_peer(places: list[dict[str, Any]]) -> str:
    """Returns the address towards the first rank that has a routable one; empty if none has."""
    for place in places:
        if not _is_loopback(place["address"]):
            own = _towards(place["address"])
            return "" if _is_loopback(own) else own
    return ""


def _numeric(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise SpecError(
            f"host: given {host!r}, which is unknown ({error}), allowed: an address or name of "
            "this machine"
        ) from None


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address).is_loopback
