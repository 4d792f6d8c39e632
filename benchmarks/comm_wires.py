"""The contenders of bench_comm.py on one rank: gloo, raw TCP and Dora's engine behind one seam.

Each in its leanest form: gloo through its process group rather than `dist.isend`, the engine
through `dora._C`. Raw TCP is one connection of Python sockets with blocks of 1 MiB: it is the
limit at 100 Mbit and 1 Gbit; on loopback a C program would come a little higher.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from netns import Node

from dora._C import Engine

WAIT_S = 60.0  # of every single wait for a peer
KEY = bytes(range(32))
URGENT, BULK = 1, 3  # traffic classes: what a user waits for, and gradients
_BLOCK_BYTES = 1 << 20

Wait = Callable[[], None]  # blocks until an operation is done; raises if it failed


class Wire(Protocol):
    """A way to move bytes and to sum float32; memory stays untouched until the wait returns."""

    def send(self, tensor: torch.Tensor, dst: int, tag: int, is_urgent: bool) -> Wait: ...

    def receive(self, tensor: torch.Tensor, src: int, tag: int, is_urgent: bool) -> Wait: ...

    def all_reduce(self, tensor: torch.Tensor) -> Wait: ...


# ------------------------------------------------------------ gloo


class Gloo:
    """torch.distributed's gloo; `urgent_group` carries urgent messages over connections apart."""

    def __init__(self, group: Any, urgent_group: Any) -> None:
        self._group = group
        self._urgent_group = urgent_group

    def _for(self, is_urgent: bool) -> Any:
        return self._urgent_group if is_urgent else self._group

    def send(self, tensor: torch.Tensor, dst: int, tag: int, is_urgent: bool) -> Wait:
        return self._wait(self._for(is_urgent).send([tensor], dst, tag))

    def receive(self, tensor: torch.Tensor, src: int, tag: int, is_urgent: bool) -> Wait:
        return self._wait(self._for(is_urgent).recv([tensor], src, tag))

    def all_reduce(self, tensor: torch.Tensor) -> Wait:
        return self._wait(self._group.allreduce([tensor]))

    @staticmethod
    def _wait(work: Any) -> Wait:
        return partial(work.wait, timedelta(seconds=WAIT_S))


def start_gloo(nodes: Sequence[Node], rank: int, port: int) -> dict[str, Wire]:
    """Joins all ranks over a store on `port` of rank 0; collective."""
    os.environ["GLOO_SOCKET_IFNAME"] = nodes[rank].interface
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{nodes[0].address}:{port}",
        rank=rank,
        world_size=len(nodes),
        timeout=timedelta(seconds=WAIT_S),
    )
    groups = [dist.new_group(list(range(len(nodes)))) for _ in range(2)]
    return {"gloo": Gloo(groups[0], groups[0]), "gloo, second group": Gloo(*groups)}


# ------------------------------------------------------------ raw TCP


class Raw:
    """One TCP connection between ranks 0 and 1, in order, without any framing."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(WAIT_S)
        self._connection = connection

    def send(self, tensor: torch.Tensor, dst: int, tag: int, is_urgent: bool) -> Wait:
        with _bytes_of(tensor) as data:
            for at in range(0, len(data), _BLOCK_BYTES):
                self._connection.sendall(data[at : at + _BLOCK_BYTES])
        return lambda: None

    def receive(self, tensor: torch.Tensor, src: int, tag: int, is_urgent: bool) -> Wait:
        return partial(self._fill, tensor)

    def all_reduce(self, tensor: torch.Tensor) -> Wait:
        raise NotImplementedError("raw TCP does not reduce")

    def _fill(self, tensor: torch.Tensor) -> None:
        with _bytes_of(tensor) as data:
            at = 0
            while at < len(data):
                num_bytes = self._connection.recv_into(data[at : at + _BLOCK_BYTES])
                if num_bytes == 0:
                    raise ConnectionError("raw TCP: the peer has closed the connection")
                at += num_bytes


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy())


def listen_raw(node: Node) -> socket.socket:
    return socket.create_server((node.address, 0))


def connect_raw(rank: int, server: socket.socket, address: tuple[str, int]) -> dict[str, Wire]:
    """Joins ranks 0 and 1: rank 0 calls `address`; others keep out."""
    server.settimeout(WAIT_S)
    if rank > 1:
        return {}
    connection = socket.create_connection(address, WAIT_S) if rank == 0 else server.accept()[0]
    return {"raw TCP": Raw(connection)}


def congestion_control() -> str:
    """Returns the algorithm that new connections get: the machine's default."""
    with socket.socket() as probe:
        name = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


# ------------------------------------------------------------ Dora


class Dora:
    """The engine."""

    def __init__(self, engine: Engine, num_ranks: int) -> None:
        self._engine = engine
        self._ranks = range(num_ranks)

    def send(self, tensor: torch.Tensor, dst: int, tag: int, is_urgent: bool) -> Wait:
        traffic_class = URGENT if is_urgent else BULK
        return self._wait(
            self._engine.send(
                tensor.data_ptr(), tensor.nbytes, dst, tag=tag, traffic_class=traffic_class
            )
        )

    def receive(self, tensor: torch.Tensor, src: int, tag: int, is_urgent: bool) -> Wait:
        return self._wait(self._engine.receive(tensor.data_ptr(), tensor.nbytes, src, tag=tag))

    def all_reduce(self, tensor: torch.Tensor) -> Wait:
        return self._wait(
            self._engine.all_reduce(
                tensor.data_ptr(), tensor.numel(), "float32", "sum", self._ranks
            )
        )

    @staticmethod
    def _wait(operation: Any) -> Wait:
        def wait() -> None:
            operation.wait(WAIT_S)
            if operation.outcome != "done":
                raise RuntimeError(f"{operation.outcome}: {operation.error}")

        return wait


def start_engines(rank: int, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Engine]:
    """Starts an engine for each name, with these options."""
    return {name: Engine(rank, KEY, **more) for name, more in options.items()}


def connect_engine(
    engine: Engine, rank: int, addresses: Sequence[tuple[str, int]], *, is_medium_shared: bool
) -> Dora:
    """Joins an engine with its peers: `addresses` by rank; rank 0 lends the medium, if any."""
    peers = {peer: address for peer, address in enumerate(addresses) if peer != rank}
    media = {peer: [0] for peer in peers} if is_medium_shared else {}
    arbiters = {0: 0} if is_medium_shared else {}
    engine.connect(peers, media=media, arbiters=arbiters)
    missing = engine.wait_connected(WAIT_S)
    if missing:
        raise ConnectionError(f"rank {rank}: not connected to ranks {missing}: {engine.events()}")
    return Dora(engine, len(addresses))
