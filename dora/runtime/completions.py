"""Calls back when operations of the engine are over, on one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from dora._C import CompletionQueue, Engine, Operation

_Callback = Callable[[], None]
_FOREVER_S = 3600.0


class Completions:
    """Operations that somebody wants to hear of.

    Thread safety: all methods; also where a garbage collection calls them inside one another.
    """

    def __init__(self) -> None:
        self._is_closed = False
        self._lock = threading.RLock()
        self._callbacks: dict[int, list[_Callback]] = {}
        self._queue = CompletionQueue()
        self._thread = threading.Thread(target=self._run, name="dora-completions", daemon=True)
        self._thread.start()

    def watch(self, operation: Operation, callback: _Callback) -> None:
        """Calls `callback` once when `operation` is over; at once after `close`."""
        with self._lock:
            is_closed, is_known = self._is_closed, operation.id in self._callbacks
            if not is_closed:
                self._callbacks.setdefault(operation.id, []).append(callback)
        if is_closed:
            callback()
        elif not is_known:
            operation.notify(self._queue)

    def close_with(self, engine: Engine, linger_s: float) -> None:
        """Closes the engine whose operations these are, and then this."""
        engine.close(linger_s)
        self.close()

    def close(self) -> None:
        """Makes all calls that are due; call it when all operations are over."""
        with self._lock:
            self._is_closed = True
        self._queue.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._call([*self._callbacks])

    def _run(self) -> None:
        while not self._queue.is_closed:
            self._call(self._queue.take(_FOREVER_S))

    def _call(self, ids: Sequence[int]) -> None:
        for number in ids:
            with self._lock:
                callbacks = self._callbacks.pop(number, [])
            for callback in callbacks:
                callback()
