"""Who is still there: every rank hears from every other one, and they agree on who goes on.

A rank that meets a failure tells all others that it joins the next round; whoever hears of it, or
sees a connection die, gives up what it is doing and joins too. The lowest rank that has joined
decides, from what all have said, once everybody has joined, is lost, or has been silent for too
long. If it fails before everybody knows its decision, the next round begins; so ranks may act on
different decisions of one round for a while, and their messages carry the one they belong to.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from dora.errors import PeerLostError
from dora.runtime.communicator import Communicator
from dora.runtime.pending import Pending
from dora.runtime.priority import URGENT

_PATIENT_S = 1e6
_NOTE_TAG, _BODY_TAG = 0, 1
JOIN, DECISION, FAILURE = 1, 2, 3


class GivenUpError(PeerLostError):
    """The job can not go on, for this rank or for all."""


# What the engine says of a process that has ended in an orderly way.
_HAS_ENDED = "that process has ended"
# And of one that it has not heard from; a process that dies closes its connections instead.
_NO_SIGN = "no sign of life"


class Watch:
    """Notes between all ranks, beside the messages of steps.

    Args:
        communicator: Connects the ranks.
        group: Number that keeps the notes apart from other messages.
        on_alarm: Called, on another thread, with the reason to give up the call in progress.
        members: Ranks that take part.

    Attributes:
        members: Ranks that take part.
        round: Of the last decision that this rank has acted on.
        position: Collective calls that this rank has ended; its owner counts them.
        lost: Rank -> how its connection was lost.
        failure: What another rank says has gone wrong for good.
    """

    def __init__(
        self,
        communicator: Communicator,
        group: int,
        on_alarm: Callable[[str], None],
        members: Collection[int],
    ) -> None:
        self.rank = communicator.rank
        self.members = frozenset(members)
        self.round = 0
        self.position = 0
        self.lost: dict[int, str] = {}
        self.failure: str | None = None
        self._communicator = communicator
        self._group = group
        self._on_alarm = on_alarm
        self._joins: dict[int, dict[int, Any]] = {}
        self._decisions: dict[int, Any] = {}
        self._due: dict[int, int] = {}  # round -> calls that this rank ends before it joins
        self._changed = threading.Condition()
        self._listening: dict[int, Pending] = {}
        self._is_closed = False
        for peer in sorted(self.members - {self.rank}):
            self._listen(peer)

    # ------------------------------------------------------------ notes

    def _tell(self, dst: int, kind: int, number: int, body: Any, due: int) -> None:
        """Sends a note; a rank that is lost gets none."""
        data = bytearray(json.dumps(body).encode())
        head = torch.tensor([kind, number, due, len(data)])
        try:
            for tag, tensor in (
                (_NOTE_TAG, head),
                (_BODY_TAG, torch.frombuffer(data, dtype=torch.uint8)),
            ):
                self._communicator.send(
                    tensor, dst, group=self._group, tag=tag, priority=URGENT, action="note"
                )
        except PeerLostError:  # this rank has closed its connections
            return

    def tell_all(self, kind: int, number: int, body: Any, due: int = 0) -> None:
        """Sends a note to all members.

        Args:
            kind: JOIN, DECISION or FAILURE.
            number: Of the round.
            body: For JSON.
            due: Calls that the receiver is to end before it heeds the note.
        """
        for peer in sorted(self.members - {self.rank} - set(self.lost)):
            self._tell(peer, kind, number, body, due)

    def moved(self, group: int, members: Collection[int]) -> Watch:
        """Returns one that goes on over the communicator's new connections; close this before."""
        other = Watch(self._communicator, group, self._on_alarm, members)
        other.round, other.position = self.round, self.position
        return other

    def close(self) -> None:
        """Hears nothing any more."""
        self._is_closed = True
        for pending in self._listening.values():
            pending.cancel()

    def _listen(self, peer: int) -> None:
        head = torch.zeros(4, dtype=torch.long)

        def heard() -> None:
            kind, number, due, size = head.tolist()
            body = torch.empty(size, dtype=torch.uint8)

            def read() -> None:
                self._listen(peer)
                self._note(peer, kind, number, due, json.loads(body.numpy().tobytes()))

            self._receive(body, peer, _BODY_TAG, read)

        self._receive(head, peer, _NOTE_TAG, heard)

    def _receive(self, tensor: torch.Tensor, peer: int, tag: int, then: Callable[[], None]) -> None:
        try:
            pending = self._listening[peer] = self._communicator.receive(
                tensor, peer, group=self._group, tag=tag, timeout_s=_PATIENT_S, action="note"
            )
        except PeerLostError:  # this rank has closed its connections
            return

        def over() -> None:
            error = pending.error()
            if error is not None:
                self._lost(peer, str(error))
            elif not self._is_closed:
                then()

        pending.on_done(over)

    def _note(self, src: int, kind: int, number: int, due: int, body: Any) -> None:
        with self._changed:
            if src not in self.members:
                return
            if kind == JOIN:
                self._joins.setdefault(number, {})[src] = body
                self._due[number] = min(due, self._due.get(number, due))
            elif kind == DECISION:
                self._decisions.setdefault(number, body)
            else:
                self.failure = self.failure or body
            self._changed.notify_all()
        self.sound()

    def _lost(self, peer: int, reason: str) -> None:
        if self._is_closed:
            return
        with self._changed:
            self.lost[peer] = reason
            self._changed.notify_all()
        self.sound()

    # ------------------------------------------------------------ alarms

    def alarm(self) -> str | None:
        """Returns why the members must agree anew; None if all is well."""
        if self.failure is not None:
            return self.failure
        for peer in self._has_crashed():
            return f"rank {peer} is lost: {self.lost[peer]}"
        due = self._due
        newer = [n for n in self._joins if n > self.round and due.get(n, 0) <= self.position]
        newer += [n for n in self._decisions if n > self.round]
        return f"round {max(newer)} of agreeing on the members has begun" if newer else None

    def _has_crashed(self) -> list[int]:
        """Returns the members that are lost for a reason.

        Who has ended may have done its part; who waits for it in vain will notice.
        """
        return [r for r, why in self.lost.items() if r in self.members and _HAS_ENDED not in why]

    def silent(self) -> list[int]:
        """Returns the members that may be there, though no link leads to them any more."""
        return [r for r in self.members if _NO_SIGN in self.lost.get(r, "")]

    def sound(self) -> None:
        """Gives the alarm, if there is reason."""
        reason = self.alarm()
        if reason is not None and not self._is_closed:
            self._on_alarm(reason)

    # ------------------------------------------------------------ agreement

    def agree(
        self,
        mine: Any,
        decide: Callable[[dict[int, Any]], Any],
        *,
        patience_s: float,
        is_polite: bool = False,
    ) -> tuple[int, Any]:
        """Joins the next round and returns (its number, what was decided).

        Args:
            mine: What this rank tells the others.
            decide: Makes the decision from what each rank has told, on one of them.
            patience_s: For ranks that are connected but silent.
            is_polite: The others may end the calls that this rank has ended.

        Raises:
            GivenUpError: A rank has failed for good.
        """
        with self._changed:
            number = max([self.round + 1, *self._joins, *self._decisions])
            self._joins.setdefault(number, {})[self.rank] = mine
            # Whoever joins because of somebody who leaves is as polite.
            due = self.position if is_polite else self._due.get(number, 0)
            due = 0 if self._has_crashed() else due
        self.tell_all(JOIN, number, mine, due)
        deadline_s = time.monotonic() + patience_s
        silent: set[int] = set()
        while True:
            with self._changed:
                self._wait(lambda: self._is_settled(number, silent), deadline_s)
                if self.failure is not None:
                    raise GivenUpError(f"rank {self.rank}: {self.failure}")
                newer = max([number, *self._joins, *self._decisions])
                if newer > number:
                    break
                decision = self._decisions.get(number)
                joined = {
                    rank: body
                    for rank, body in self._joins[number].items()
                    if rank not in self.lost and rank not in silent
                }
            decider = min(joined)
            if decision is None and decider == self.rank:
                decision = decide(joined)
                self.tell_all(DECISION, number, decision)
            if decision is not None:
                self.round = number
                return number, decision
            # The one that is to decide has joined; it gets as long again.
            deadline_s = time.monotonic() + patience_s
            with self._changed:
                self._wait(lambda rank=decider: self._has_moved(number, rank), deadline_s)  # type: ignore[misc]
                if not self._has_moved(number, decider):
                    silent.add(decider)
        return self.agree(mine, decide, patience_s=patience_s, is_polite=is_polite)

    def settle(self, members: frozenset[int]) -> None:
        """Goes on with these members; forgets what is over."""
        with self._changed:
            self.members = members
            for notes in (self._joins, self._decisions):
                for number in [n for n in notes if n <= self.round]:
                    del notes[number]

    def _wait(self, is_over: Callable[[], bool], deadline_s: float) -> None:
        while not is_over() and time.monotonic() < deadline_s:
            self._changed.wait(min(0.5, max(0.0, deadline_s - time.monotonic())))

    def _has_moved(self, number: int, decider: int) -> bool:
        newer = max([number, *self._joins, *self._decisions]) > number
        return newer or number in self._decisions or decider in self.lost or bool(self.failure)

    def _is_settled(self, number: int, silent: set[int]) -> bool:
        """Tells whether nobody has to be waited for before somebody decides."""
        missing = self.members - set(self.lost) - set(self._joins[number]) - silent
        newer = max([number, *self._joins, *self._decisions]) > number
        return not missing or newer or number in self._decisions or self.failure is not None
