"""The executor's tensors over the communication engine."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from dora._C import Engine
from dora.errors import DoraError, PeerLostError, ProtocolError
from dora.runtime.communicator import Communicator
from dora.runtime.frames import Frame
from dora.runtime.group import Group
from dora.runtime.pending import CLOSED, Pending, no_answer
from dora.runtime.priority import ACTIVATION, GRADIENT, WEIGHTS, Priority
from dora.runtime.rendezvous import Links

# Of the engine; what counts is the limit of each wait, and receives are posted long before.
_PATIENT_S = 1e6
# What a peer sent before it closed has arrived after so long.
_GRACE_S = 0.2
# Others may still pass on what that peer has sent them.
_GROUP_GRACE_S = 5.0
# Of a timeline: some hundred megabytes at 100 Mbit/s.
_LOG_FRAMES = 20_000
_GOODBYE_TAG = (1 << 31) - 1


class EnginePending:
    """An operation of the engine.

    Args:
        transport: Knows which peers have closed theirs.
        pending: The operation.
        peers: Ranks that take part.
    """

    def __init__(self, transport: EngineTransport, pending: Pending, peers: frozenset[int]) -> None:
        self._transport = transport
        self._pending = pending
        self.peers = peers

    def wait(self, timeout_s: float) -> None:
        """Blocks until done; raises PeerLostError that names rank, peer and action."""
        is_over = self._pending.wait_until_over(self._patience_s(timeout_s))
        if self._transport.interruption is not None and self._pending.error() is not None:
            raise self._pending.failed(self._transport.interruption)
        if not is_over:
            self._pending.cancel()
            reason = CLOSED if self._is_forsaken() else no_answer(timeout_s)
            raise self._pending.failed(reason)
        error = self._pending.error()
        if error is None:
            return
        is_given_up = type(error) is DoraError or "the peer has cancelled" in str(error)
        if self._is_forsaken() or (isinstance(error, ProtocolError) and is_given_up):
            raise self._pending.failed(CLOSED)
        raise error

    def give_up(self) -> None:
        """Wakes whoever waits for it."""
        self._pending.cancel()

    def has_lost_all(self) -> bool:
        """Tells whether every peer of it has closed."""
        return self.peers <= self._transport.gone

    def _is_forsaken(self) -> bool:
        return not self.peers.isdisjoint(self._transport.gone)

    def _patience_s(self, timeout_s: float) -> float:
        if not self._is_forsaken():
            return timeout_s
        return min(timeout_s, _GRACE_S if self.has_lost_all() else _GROUP_GRACE_S)


class EngineTransport:
    """Messages and reductions by priority.

    It shares the connections of the default process group if that one is "dora", so that all
    traffic of a process is in one order, and makes its own otherwise. Creating it is a collective
    call of all ranks of the default group.

    Args:
        timeout_s: Of waits that have no limit of their own.
        options: Of `Communicator.create`, for connections of its own.
    """

    def __init__(self, *, timeout_s: float, **options: Any) -> None:
        self.rank = dist.get_rank()
        self.gone: set[int] = set()
        self._timeout_s = timeout_s
        self._is_closed = False
        default = dist.group.WORLD
        self._is_owner = not isinstance(default, Group)
        if isinstance(default, Group):
            self.communicator = default.communicator
        else:
            store = PrefixStore("dora/transport", dist.distributed_c10d._get_default_store())
            options = {"timeout_s": timeout_s, "log_frames": _LOG_FRAMES, **options}
            self.communicator = Communicator.create(
                store, self.rank, dist.get_world_size(), **options
            )
        self.interruption: str | None = None
        self._turn = f"{self.communicator.next_turn()}"
        self._messages = self.number("messages")
        self._lock = threading.Lock()
        self._live: weakref.WeakSet[EnginePending] = weakref.WeakSet()
        if not self._is_owner:
            self._hear_goodbyes()

    def frames(self) -> Sequence[Frame]:
        """See Transport."""
        return [Frame(*row) for row in self.communicator.engine.log()]

    def add_groups(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Does nothing: any set of ranks can reduce together."""

    def share_media(self, links: Links) -> None:
        """See Transport: from now on bulk crosses a shared medium in one order of all senders."""
        self.communicator.engine.connect({}, media=links.media, arbiters=links.arbiters)

    def send(
        self,
        tensor: torch.Tensor,
        dst: int,
        tag: int,
        action: str,
        *,
        priority: Priority | None = None,
    ) -> EnginePending:
        """See Transport."""
        pending = self.communicator.send(
            tensor,
            dst,
            group=self._messages,
            tag=tag,
            priority=priority or ACTIVATION,
            timeout_s=_PATIENT_S,
            action=action,
        )
        return self._track(pending, [dst])

    def receive(self, tensor: torch.Tensor, src: int, tag: int, action: str) -> EnginePending:
        """See Transport."""
        pending = self.communicator.receive(
            tensor, src, group=self._messages, tag=tag, timeout_s=_PATIENT_S, action=action
        )
        return self._track(pending, [src])

    def all_reduce(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        action: str,
        *,
        priority: Priority | None = None,
    ) -> EnginePending:
        """See Transport."""
        pending = self.communicator.all_reduce(
            tensor,
            ranks,
            group=self.number(ranks),
            priority=priority or GRADIENT,
            timeout_s=_PATIENT_S,
            action=action,
        )
        return self._track(pending, ranks)

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
        pending = self.communicator.broadcast(
            tensor,
            src,
            ranks,
            group=self.number(ranks),
            priority=priority or WEIGHTS,
            timeout_s=_PATIENT_S,
            action=action,
        )
        self._track(pending, ranks).wait(self._timeout_s)

    def close(self) -> None:
        """See Transport; shared connections stay open."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_owner:
            self.communicator.close()
            return
        self._goodbyes.cancel()
        for pending in self._under_way():
            pending.give_up()
        for peer in range(self.communicator.world_size):
            # The last in line: what was sent before must not be taken for lost.
            if peer != self.rank:
                self._say_goodbye(peer)

    def interrupt(self, reason: str) -> None:
        """Fails all that is under way and all that comes, until `renew`; from any thread."""
        self.interruption = self.interruption or reason
        for pending in self._under_way():
            pending.give_up()

    def renew(self, name: str) -> None:
        """Starts anew, with messages that nobody takes for those before.

        Args:
            name: Of the new beginning, equal on all ranks that go on.
        """
        if not self._is_owner:
            self._goodbyes.cancel()
        self._begin(f"{self.turn} {name}")

    def move(self, engine: Engine, epoch: int, world_size: int) -> Callable[[], None]:
        """Goes over to other connections; call `interrupt` before, and `join` after it.

        Args:
            engine: With these connections.
            epoch: Of them.
            world_size: Ranks that there may be.

        Returns:
            What closes the connections before.
        """
        if not self._is_owner:
            self._goodbyes.cancel()
        return self.communicator.move(engine, epoch, world_size)

    def join(self, turn: str, epoch: int) -> None:
        """Starts to exchange messages over other connections.

        Args:
            turn: `turn` of the others.
            epoch: Of the connections.
        """
        self.gone.clear()
        self._begin(f"{turn} joined {epoch}")

    @property
    def turn(self) -> str:
        """Which user of its communicator this transport is."""
        return self._turn.split()[0]

    def _begin(self, turn: str) -> None:
        self._turn = turn
        self._messages = self.number("messages")
        if not self._is_owner:
            self._hear_goodbyes()
        self.interruption = None

    def _track(self, pending: Pending, ranks: Sequence[int]) -> EnginePending:
        tracked = EnginePending(self, pending, frozenset(ranks) - {self.rank})
        with self._lock:
            self._live.add(tracked)
        if self.interruption is not None:
            tracked.give_up()
        return tracked

    def _under_way(self) -> list[EnginePending]:
        with self._lock:
            return [*self._live]

    def number(self, what: str | Sequence[int]) -> int:
        """Returns what keeps messages of this transport apart from all others."""
        key = what if isinstance(what, str) else list(what)
        return zlib.crc32(f"transport {self._turn}: {key}".encode())

    def _say_goodbye(self, peer: int) -> None:
        try:
            self.communicator.send(
                torch.empty(0), peer, group=self._messages, tag=_GOODBYE_TAG, priority=WEIGHTS
            )
        except PeerLostError:  # it is gone already
            return

    def _hear_goodbyes(self) -> None:
        """Fails what is under way with a peer once it has said that it has closed.

        What it sent before has arrived by then or soon, and a group may do without it: a peer that
        closes after its part of an all-reduce must not fail the others'.
        """
        goodbyes = self._goodbyes = self.communicator.receive(
            torch.empty(0),
            None,
            group=self._messages,
            tag=_GOODBYE_TAG,
            timeout_s=_PATIENT_S,
            action="goodbye",
        )

        def heard() -> None:
            if self._is_closed or goodbyes.error() is not None:
                return
            peer = goodbyes.source()
            self.gone.add(peer)
            for grace_s in (_GRACE_S, _GROUP_GRACE_S):
                timer = threading.Timer(grace_s, self._give_up, (peer, grace_s))
                timer.daemon = True
                timer.start()
            self._hear_goodbyes()

        goodbyes.on_done(heard)

    def _give_up(self, peer: int, grace_s: float) -> None:
        for pending in self._under_way():
            is_over = grace_s == _GROUP_GRACE_S or pending.has_lost_all()
            if peer in pending.peers and is_over:
                pending.give_up()
