"""A send, receive or collective of tensors under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dora._C import Operation
from dora.errors import DoraError, PeerLostError, ProtocolError
from dora.runtime.staging import Launch

if TYPE_CHECKING:
    from dora.runtime.communicator import Communicator

# A wait inside the engine notices no Ctrl-C; so it comes back this often.
_SLICE_S = 0.5

CLOSED = "the connection was closed; that process has failed or was killed"


class Pending:
    """One operation of the engine; keeps its tensors alive, also when it is dropped.

    Args:
        communicator: Runs it.
        started: The operation, or its launch once the GPU is ready.
        tensors: What the engine reads and writes.
        action: What it does, for messages.
        peer: With whom, for messages.
        timeout_s: Limit of the engine.
        finish: Called once after success, before anybody is told.
    """

    def __init__(
        self,
        communicator: Communicator,
        started: Operation | Launch,
        tensors: Sequence[Any],
        *,
        action: str,
        peer: str,
        timeout_s: float,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._communicator = communicator
        # Those of the operation: the communicator may go over to others meanwhile.
        self._engine, self._completions = communicator.engine, communicator.completions
        self._started = started
        self._tensors = tensors
        self._finish = finish
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._is_over = False
        self.action = action
        self.peer = peer
        self.timeout_s = timeout_s

    def is_completed(self) -> bool:
        """Whether it is over, well or not; needs no `wait`."""
        if not self._is_over and self._is_done():
            self._settle()
        return self._is_over

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until done.

        Args:
            timeout_s: Cancels it after so long; None leaves it to the operation's own limit.

        Raises:
            PeerLostError: The peer was lost or silent; names rank, peer and action.
            ProtocolError: The peer disagrees about the message, or gave it up.
        """
        if not self.wait_until_over(timeout_s):
            self.cancel()
            raise self.failed(no_answer(self.timeout_s if timeout_s is None else timeout_s))
        if self._error is not None:
            raise self._error

    def wait_until_over(self, timeout_s: float | None) -> bool:
        """Blocks until it is over or `timeout_s` has passed; returns whether it is over."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_completed():
            self._communicator.check_process()
            slice_s = _SLICE_S
            if deadline is not None:
                slice_s = min(slice_s, deadline - time.monotonic())
                if slice_s <= 0:
                    return False
            self._wait_slice(slice_s)
        return True

    def error(self) -> Exception | None:
        """Returns why it failed; None while under way or when it went well."""
        return self._error

    def source(self) -> int:
        """Returns the rank that sent, after a receive from any source."""
        operation = self._operation()
        return -1 if operation is None else operation.source

    def cancel(self) -> None:
        """Gives it up, here and at the peer."""
        launch = self._started
        if isinstance(launch, Launch):
            launch.then(self._cancel_operation)
        else:
            self._cancel_operation()

    def on_done(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once when it is over, on the thread of the communicator."""

        def then() -> None:
            self._settle()
            callback()

        def watch() -> None:
            operation = self._operation()
            if operation is None:
                then()
            else:
                self._completions.watch(operation, then)

        if isinstance(self._started, Launch):
            self._started.then(watch)
        else:
            watch()

    def __del__(self) -> None:
        # The engine still reads and writes the memory of an operation that nobody waits for.
        if not getattr(self, "_is_over", True):
            self._communicator.keep(self._started, self._completions, self._tensors, self._finish)

    # ------------------------------------------------------------ the operation

    def _operation(self) -> Operation | None:
        return self._started.operation if isinstance(self._started, Launch) else self._started

    def _is_done(self) -> bool:
        if isinstance(self._started, Launch) and self._started.error is not None:
            return True
        operation = self._operation()
        return operation is not None and operation.is_done()

    def _wait_slice(self, timeout_s: float) -> None:
        if isinstance(self._started, Launch) and not self._started.wait(timeout_s):
            return
        operation = self._operation()
        if operation is not None:
            operation.wait(timeout_s)

    def _cancel_operation(self) -> None:
        operation = self._operation()
        if operation is not None:
            self._engine.cancel(operation)

    def _settle(self) -> None:
        """Does what follows the end of the operation, once."""
        with self._lock:
            if self._is_over:
                return
            try:
                self._error = self._outcome()
                if self._error is None and self._finish is not None:
                    self._finish()
            except Exception as error:
                self._error = error
            self._finish = None
            self._tensors = ()
            self._is_over = True

    def _outcome(self) -> Exception | None:
        operation = self._operation()
        if operation is None:
            assert isinstance(self._started, Launch)
            return self._started.error
        outcome = operation.outcome
        text = operation.error.removeprefix(f"rank {self._communicator.rank}: ")
        if outcome == "done":
            return None
        reason = {
            "timed_out": no_answer(self.timeout_s),
            "peer_lost": f"{CLOSED} ({text})",
            "protocol": text,
            "closed": "this rank closed its connections",
            "cancelled": "it was cancelled",
        }[outcome]
        kinds = {"protocol": ProtocolError, "cancelled": DoraError}
        return self.failed(reason, kinds.get(outcome, PeerLostError))

    def failed(self, reason: str, kind: type[DoraError] = PeerLostError) -> DoraError:
        """Returns an error that names rank, action and peer."""
        rank = self._communicator.rank
        return kind(f"rank {rank}: {self.action} with {self.peer} failed: {reason}")


class Together:
    """Several operations that make one: over when all are.

    Args:
        pendings: Its parts.
        finish: Called once after success of all.
    """

    def __init__(
        self, pendings: Sequence[Pending | Together], finish: Callable[[], None] | None = None
    ) -> None:
        self._pendings = list(pendings)
        self._finish = finish
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._is_over = False

    def is_completed(self) -> bool:
        """See Pending."""
        if not self._is_over and all(pending.is_completed() for pending in self._pendings):
            self._settle()
        return self._is_over

    def wait(self, timeout_s: float | None = None) -> None:
        """See Pending; the limit holds for all parts together."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for pending in self._pendings:
            pending.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._settle()
        if self._error is not None:
            raise self._error

    def error(self) -> Exception | None:
        """See Pending."""
        return self._error

    def source(self) -> int:
        """See Pending."""
        return -1

    def cancel(self) -> None:
        """See Pending."""
        for pending in self._pendings:
            pending.cancel()

    def on_done(self, callback: Callable[[], None]) -> None:
        """See Pending."""
        unfinished = [pending for pending in self._pendings if not pending.is_completed()]
        if unfinished:
            unfinished[0].on_done(lambda: self.on_done(callback))
        else:
            self._settle()
            callback()

    def _settle(self) -> None:
        with self._lock:
            if self._is_over:
                return
            errors = [p.error() for p in self._pendings if p.error() is not None]
            self._error = errors[0] if errors else None
            try:
                if self._error is None and self._finish is not None:
                    self._finish()
            except Exception as error:
                self._error = error
            self._finish = None
            self._is_over = True


def no_answer(timeout_s: float) -> str:
    """Says that a peer was silent."""
    return f"no answer within {timeout_s:g} s (timeout_s)"
