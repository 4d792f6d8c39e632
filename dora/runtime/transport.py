"""Moves tensors between ranks: what the executor needs, and gloo's way to do it.

The engine's way is in `engine_transport.py`. `GlooTransport` works on process groups of its own, so
that closing them after a failure wakes every peer at once and leaves the user's groups alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dora.errors import PeerLostError
from dora.runtime.frames import Frame
from dora.runtime.priority import Priority
from dora.runtime.rendezvous import Links


class Pending(Protocol):
    """A transfer or reduction under way."""

    def wait(self, timeout_s: float) -> None:
        """Blocks until done; raises PeerLostError that names rank, peer and action."""


class Transport(Protocol):
    """What the executor needs from a communication library; all calls return at once.

    A priority of None is that of the kind: activations for messages, gradients for reductions.
    """

    def send(
        self,
        tensor: torch.Tensor,
        dst: int,
        tag: int,
        action: str,
        *,
        priority: Priority | None = None,
    ) -> Pending:
        """Starts sending a contiguous CPU tensor; keep it unchanged until done."""

    def receive(self, tensor: torch.Tensor, src: int, tag: int, action: str) -> Pending:
        """Posts a receive into a contiguous CPU tensor."""

    def all_reduce(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        action: str,
        *,
        priority: Priority | None = None,
    ) -> Pending:
        """Starts summing `tensor` over `ranks`, in place; same order of calls on all of them."""

    def broadcast(
        self,
        tensor: torch.Tensor,
        src: int,
        ranks: Sequence[int],
        action: str,
        *,
        priority: Priority | None = None,
    ) -> None:
        """Copies `tensor` from rank `src` to `ranks` and waits for it."""

    def add_groups(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Makes sets of ranks able to reduce together; collective, same sets on all ranks."""

    def share_media(self, links: Links) -> None:
        """Learns which senders share a medium."""

    def frames(self) -> Sequence[Frame]:
        """Returns the latest frames; nothing if the transport keeps no log."""

    def close(self) -> None:
        """Drops all connections; peers that wait for this rank fail at once."""


class GlooPending:
    """A gloo operation; keeps its tensor alive."""

    def __init__(self, work: Any, tensor: torch.Tensor, rank: int, peer: str, action: str) -> None:
        self._work = work
        self._tensor = tensor
        self._rank = rank
        self._peer = peer
        self._action = action

    def wait(self, timeout_s: float) -> None:
        """Blocks until done; raises PeerLostError that names rank, peer and action."""
        try:
            self._work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise lost(self._rank, self._peer, self._action, error, timeout_s) from None


def lost(rank: int, peer: str, action: str, error: RuntimeError, timeout_s: float) -> PeerLostError:
    """Returns an error that says whether the peer was silent or its connection broke."""
    text = str(error)
    reason = (
        f"no answer within {timeout_s:g} s (timeout_s)"
        if "imed out" in text
        else "the connection was closed; that process has failed or was killed"
        if "losed" in text or "reset" in text
        else text.splitlines()[0]
    )
    return PeerLostError(f"rank {rank}: {action} with {peer} failed: {reason}")


class GlooTransport:
    """torch.distributed's gloo backend.

    Creating it is a collective call of all ranks of the default group.

    Args:
        timeout_s: For waits inside gloo itself.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self._timeout_s = timeout_s
        self._groups: dict[tuple[int, ...], Any] = {}
        everyone = tuple(range(dist.get_world_size()))
        self.add_groups([everyone])
        self._world = self._groups[everyone]

    def share_media(self, links: Links) -> None:
        """Does nothing: gloo leaves shared media to the network."""

    def frames(self) -> Sequence[Frame]:
        """See Transport; gloo keeps no log."""
        return ()

    def add_groups(self, groups: Iterable[tuple[int, ...]]) -> None:
        """See Transport."""
        timeout = timedelta(seconds=self._timeout_s)
        for ranks in groups:
            if ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=timeout, backend="gloo")

    def send(
        self,
        tensor: torch.Tensor,
        dst: int,
        tag: int,
        action: str,
        *,
        priority: Priority | None = None,
    ) -> GlooPending:
        """See Transport; gloo knows no priorities."""
        return self._start(
            lambda: self._world.send([tensor], dst, tag), tensor, f"rank {dst}", action
        )

    def receive(self, tensor: torch.Tensor, src: int, tag: int, action: str) -> GlooPending:
        """See Transport."""
        return self._start(
            lambda: self._world.recv([tensor], src, tag), tensor, f"rank {src}", action
        )

    def all_reduce(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        action: str,
        *,
        priority: Priority | None = None,
    ) -> GlooPending:
        """See Transport; gloo knows no priorities."""
        group = self._groups[tuple(ranks)]
        peers = f"ranks {[r for r in ranks if r != self.rank]}"
        return self._start(
            lambda: dist.all_reduce(tensor, group=group, async_op=True), tensor, peers, action
        )

    def broadcast(
        self,
        tensor: torch.Tensor,
        src: int,
        ranks: Sequence[int],
        action: str,
        *,
        priority: Priority | None = None,
    ) -> None:
        """See Transport."""
        group = self._groups[tuple(ranks)]
        pending = self._start(
            lambda: dist.broadcast(tensor, src, group=group, async_op=True),
            tensor,
            f"rank {src}",
            action,
        )
        pending.wait(self._timeout_s)

    def close(self) -> None:
        """See Transport."""
        del self._world
        for group in self._groups.values():
            if isinstance(group, dist.ProcessGroup):
                dist.destroy_process_group(group)
        self._groups.clear()

    def _start(self, begin: Any, tensor: torch.Tensor, peer: str, action: str) -> GlooPending:
        try:
            return GlooPending(begin(), tensor, self.rank, peer, action)
        except RuntimeError as error:
            raise lost(self.rank, peer, action, error, self._timeout_s) from None
