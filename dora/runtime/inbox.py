"""Messages as they arrive, the most urgent first, over any transport.

A transport can wait for one message, not for whichever comes next. So a thread per sender and
urgency waits for its messages in turn, and what has arrived goes into one queue: a token overtakes
a prompt that is still on the wire.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from dora.runtime.transport import Pending

# Urgencies; a smaller number is taken first.
ORDERS, TOKENS, PROMPTS = 0, 1, 2
_FAILURE = -1


class _Ready(NamedTuple):
    urgency: int
    turn: int
    item: Any
    error: BaseException | None = None


_Lane = queue.SimpleQueue[tuple[Any, Sequence[Pending]] | None]


class Inbox:
    """Receives that are under way, and what has come of them.

    Args:
        timeout_s: Limit of every wait.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ready: queue.PriorityQueue[_Ready] = queue.PriorityQueue()
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._turns = itertools.count()

    def expect(self, urgency: int, src: int, item: Any, pending: Sequence[Pending]) -> None:
        """Makes `item` ready once all of `pending`, from rank `src`, have arrived.

        Items of one sender and urgency become ready in the order of these calls.
        """
        if (urgency, src) not in self._lanes:
            lane: _Lane = queue.SimpleQueue()
            self._lanes[urgency, src] = lane
            name = f"dora-inbox-{src}-{urgency}"
            threading.Thread(
                target=self._wait, args=(urgency, lane), name=name, daemon=True
            ).start()
        self._lanes[urgency, src].put((item, pending))

    def put(self, urgency: int, item: Any) -> None:
        """Makes `item` ready at once."""
        self._ready.put(_Ready(urgency, next(self._turns), item))

    def take(self, timeout_s: float | None = None) -> Any:
        """Returns the most urgent item; None if there is none after `timeout_s`.

        Raises:
            PeerLostError: A message did not come; names rank, peer and action.
        """
        try:
            ready = self._ready.get(timeout_s != 0, timeout_s)
        except queue.Empty:
            return None
        if ready.error is not None:
            raise ready.error
        return ready.item

    def close(self) -> None:
        """Ends the threads as soon as they have what they wait for."""
        for lane in self._lanes.values():
            lane.put(None)

    def _wait(self, urgency: int, lane: _Lane) -> None:
        while (entry := lane.get()) is not None:
            item, pending = entry
            try:
                for operation in pending:
                    operation.wait(self._timeout_s)
            except BaseException as error:
                self._ready.put(_Ready(_FAILURE, next(self._turns), None, error))
                return
            self.put(urgency, item)


class Outbox:
    """Sends that are under way; waits only for those that must have arrived.

    Args:
        limit: Of sends under one key that may be unfinished.
        timeout_s: Limit of every wait.
    """

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._sends: dict[Hashable, deque[Sequence[Pending]]] = {}

    def put(self, key: Hashable, pending: Sequence[Pending]) -> None:
        """Keeps sends, and waits for the ones of `limit` calls before under the same key."""
        sends = self._sends.setdefault(key, deque())
        sends.append(pending)
        while len(sends) > self._limit:
            self._finish_oldest(sends)

    def finish(self) -> None:
        """Waits for all."""
        for sends in self._sends.values():
            while sends:
                self._finish_oldest(sends)

    def _finish_oldest(self, sends: deque[Sequence[Pending]]) -> None:
        for operation in sends.popleft():
            operation.wait(self._timeout_s)
