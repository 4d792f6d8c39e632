"""Gives torch.distributed's own backends, gloo and NCCL, the engine's order of sends."""

from __future__ import annotations

import atexit
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dora.runtime.chunk_link import FOREVER, LINGER_S, ChunkedPending, Link, Message, Wire
from dora.runtime.frames import Frame
from dora.runtime.priority import ACTIVATION, Priority, checked
from dora.runtime.rendezvous import Links
from dora.runtime.transport import GlooPending, GlooTransport

_NEVER_SENT = 1  # a gloo tag; notes and chunks have tag 0


class _GlooWire:
    def __init__(self, group: Any, peer: int) -> None:
        self._group = group
        self._peer = peer

    def send(self, data: torch.Tensor, ready: Any) -> Callable[[], object]:
        return partial(self._group.send([data], self._peer, 0).wait, FOREVER)

    def receive(self, data: torch.Tensor, ready: Any) -> Callable[[], object]:
        return partial(self._group.recv([data], self._peer, 0).wait, FOREVER)

    def abort(self) -> None:
        """Does nothing: gloo itself fails the operations with a lost peer."""


class _NcclWire:
    """One communicator and one stream per direction, so that neither waits for the other."""

    def __init__(self, outward: Any, inward: Any, peer_index: int) -> None:
        self._outward, self._inward, self._peer_index = outward, inward, peer_index
        self._out_stream, self._in_stream = torch.cuda.Stream(), torch.cuda.Stream()

    def send(self, data: torch.Tensor, ready: Any) -> Callable[[], object]:
        return self._run(self._out_stream, ready, self._outward.send, data)

    def receive(self, data: torch.Tensor, ready: Any) -> Callable[[], object]:
        return self._run(self._in_stream, ready, self._inward.recv, data)

    def abort(self) -> None:
        """Ends kernels that wait for the peer; NCCL does not notice that it is gone."""
        for group in (self._outward, self._inward):
            with suppress(RuntimeError):
                group.abort()

    def _run(self, stream: Any, ready: Any, begin: Any, data: torch.Tensor) -> Callable[[], object]:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            begin([data], self._peer_index, 0).wait()  # the stream waits, not this thread
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        return done.synchronize


class _NcclCollectives(GlooTransport):
    """The same calls on NCCL groups, for CUDA tensors."""

    def add_groups(self, groups: Iterable[tuple[int, ...]]) -> None:
        timeout = timedelta(seconds=self._timeout_s)
        for ranks in groups:
            if ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=timeout, backend="nccl")


def _nccl_wires(rank: int, world_size: int, timeout: timedelta) -> dict[int, _NcclWire]:
    """Connects every pair of ranks twice; collective.

    Communicators come up with their first transfer, which both ends must reach: here, in one
    order for all ranks, rather than in threads.
    """
    pairs = list(itertools.permutations(range(world_size), 2))
    groups = {p: dist.new_group(list(p), timeout=timeout, backend="nccl") for p in pairs}
    byte = torch.zeros(1, dtype=torch.uint8, device="cuda")
    for (src, dst), group in groups.items():
        if rank == src:
            group.send([byte], int(dst > src), 0).wait()
        elif rank == dst:
            group.recv([byte], int(src > dst), 0).wait()
    torch.cuda.synchronize()
    peers = [peer for peer in range(world_size) if peer != rank]
    return {p: _NcclWire(groups[rank, p], groups[p, rank], int(p > rank)) for p in peers}


class ChunkedTransport:
    """torch.distributed's gloo or NCCL, with sends in order of priority, chunk by chunk.

    Creating it is a collective call of all ranks of the default group. Reductions and broadcasts
    are the backend's own: they have no priority and are not cut into chunks.

    An operation that timed out fails alone, but stays posted: its memory is in use until `close`.

    Args:
        timeout_s: For collectives inside gloo and NCCL themselves.
        backend: "gloo", or "nccl" for CUDA tensors beside CPU tensors, which go through gloo;
            NCCL needs a GPU per rank, set with torch.cuda.set_device before.
        chunk_bytes: What an urgent message may have to wait for, twice.
        aging_s: The first message of a class of which nothing leaves so long moves up one; see
            csrc/send_queue.h.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        backend: str = "gloo",
        chunk_bytes: int = 256 * 1024,
        aging_s: float = 2.0,
    ) -> None:
        if backend not in ("gloo", "nccl") or chunk_bytes < 1:
            raise ValueError(
                f"backend={backend!r}, chunk_bytes={chunk_bytes}: give gloo or nccl, and 1 or more"
            )
        self.rank = dist.get_rank()
        self._is_closed = False
        peers = [rank for rank in range(dist.get_world_size()) if rank != self.rank]
        timeout = timedelta(seconds=timeout_s)
        self._collectives = {"cpu": GlooTransport(timeout_s=timeout_s)}
        self._groups = [dist.new_group(timeout=timeout, backend="gloo") for _ in range(2)]
        notes, chunks = self._groups
        wires: dict[int, dict[str, Wire]] = {p: {"cpu": _GlooWire(chunks, p)} for p in peers}
        if backend == "nccl":
            self._collectives["cuda"] = _NcclCollectives(timeout_s=timeout_s)
            for peer, wire in _nccl_wires(self.rank, len(peers) + 1, timeout).items():
                wires[peer]["cuda"] = wire
        self._links = {p: Link(p, notes, wires[p], chunk_bytes, aging_s) for p in peers}
        atexit.register(self._disconnect)  # threads in gloo must not outlive the interpreter

    def share_media(self, links: Links) -> None:
        """Does nothing: the order is that of this sender alone."""

    def frames(self) -> Sequence[Frame]:
        """See Transport; it keeps no log."""
        return ()

    def add_groups(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Makes sets of ranks able to reduce together; collective, same sets on all ranks."""
        groups = list(groups)
        for transport in self._collectives.values():
            transport.add_groups(groups)

    def send(
        self,
        tensor: torch.Tensor,
        dst: int,
        tag: int,
        action: str,
        *,
        priority: Priority | None = None,
    ) -> ChunkedPending:
        """See Transport; the tensor may also be a CUDA tensor, with backend="nccl"."""
        message = self._message(tensor, dst, tag, action)
        self._links[dst].send(message, checked(priority or ACTIVATION))
        return message.pending

    def receive(self, tensor: torch.Tensor, src: int, tag: int, action: str) -> ChunkedPending:
        """See Transport; the tensor may also be a CUDA tensor, with backend="nccl"."""
        message = self._message(tensor, src, tag, action)
        self._links[src].receive(message)
        return message.pending

    def all_reduce(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        action: str,
        *,
        priority: Priority | None = None,
    ) -> GlooPending:
        """See Transport; the backend's own, without priority."""
        return self._collectives[self._device(tensor)].all_reduce(tensor, ranks, action)

    def broadcast(
        self,
        tensor: torch.Tensor,
        src: int,
        ranks: Sequence[int],
        action: str,
        *,
        priority: Priority | None = None,
    ) -> None:
        """See Transport; without priority."""
        self._collectives[self._device(tensor)].broadcast(tensor, src, ranks, action)

    def close(self) -> None:
        """See Transport; acknowledgements still leave, unfinished operations fail."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self._disconnect)
        self._disconnect()
        for group in self._groups:
            dist.destroy_process_group(group)
        for transport in self._collectives.values():
            transport.close()

    def _message(self, tensor: torch.Tensor, peer: int, tag: int, action: str) -> Message:
        if peer not in self._links:
            raise ValueError(f"{action}: peer {peer} given, allowed: {sorted(self._links)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{action}: the tensor is not contiguous; pass tensor.contiguous()")
        ready = (
            torch.cuda.current_stream().record_event() if self._device(tensor) == "cuda" else None
        )
        data = tensor.detach().reshape(-1).view(torch.uint8)
        return Message(tag, data, ready, ChunkedPending(tensor, self.rank, peer, action))

    def _device(self, tensor: torch.Tensor) -> str:
        if tensor.device.type not in self._collectives:
            raise ValueError(f"a tensor on {tensor.device}, allowed: {[*self._collectives]}")
        return tensor.device.type

    def _disconnect(self) -> None:
        """Ends all threads and wakes the peers' threads."""
        for link in self._links.values():
            link.leave()
        deadline_s = time.monotonic() + LINGER_S
        for link in self._links.values():
            link.wait_parted(deadline_s)
        for group, peer in itertools.product(self._groups, self._links):
            with suppress(RuntimeError):  # the first that times out closes all
                never = group.recv([torch.zeros(1)], peer, _NEVER_SENT)
                never.wait(timedelta(milliseconds=1))
        for link in self._links.values():
            link.join()
