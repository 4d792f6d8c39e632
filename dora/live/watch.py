"""Writes the status of a rank from time to time, in a thread that costs next to nothing."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Any

from dora.errors import SpecError
from dora.files import save
from dora.live.metrics import serve
from dora.live.recorder import Call, Recorder, Span
from dora.live.relay import Relay
from dora.live.snapshot import Observer
from dora.spec import QoE, Status

PERIOD_S = 1.0
# What writing may take of the time. It takes 1 ms of a free core, and longer of one that is busy or
# slow: a phone with a sixth of a core writes every two seconds.
SHARE = 0.003
# Statuses of some kilobytes cross the network for `dora top` only that often.
_RELAY_S = 5.0


def watching(
    model: Any,
    *,
    folder: str | os.PathLike[str] | None = None,
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
    qoe: QoE | None = None,
    adapter: Any = None,
) -> Watch:
    """Tells how a model is doing, from now until it is closed.

    Args:
        model: A `DoraParallel`; each rank watches its own.
        folder: Gets rank-N.json; None writes none.
        metrics_port: Rank N answers Prometheus at this port + N; None: at none.
        metrics_host: Address to answer at; the default is for this machine alone.
        qoe: Bounds to compare with; None takes those of the adapter.
        adapter: Of the model; says what a call should take where the plan does not.

    Raises:
        SpecError: The folder can not be made, the port is taken, or prometheus-client is missing.
    """
    place = Path(folder) if folder is not None else None
    if place is not None:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(f"status: {place} can not be made: {error.strerror}") from None
    watch = Watch(model, qoe or getattr(adapter, "qoe", None) or QoE(), place, adapter)
    if metrics_port is not None:
        watch.server = serve(watch.now, watch.recorder, metrics_host, metrics_port + model.rank)
    watch.start()
    model.watch = watch
    return watch


class Watch:
    """Watches one model; see `watching`.

    Args:
        model: Is not kept alive.
        qoe: Bounds that calls have to keep.
        folder: Gets the file of this rank; None: there is none.
        adapter: Of the model.

    Attributes:
        recorder: What is noted of calls.
        server: That answers Prometheus.
    """

    def __init__(self, model: Any, qoe: QoE, folder: Path | None, adapter: Any = None) -> None:
        self.recorder = Recorder(qoe)
        self.server: Any = None
        self._model = weakref.ref(model)
        self._observer = Observer(self.recorder, qoe, adapter)
        self._relay = Relay(model.rank, self._observer.host)
        self._relayed_s = 0.0
        self._folder, self._process = folder, os.getpid()
        self._period_s = PERIOD_S
        self._problem: str | None = None
        self._stop, self._writing = Event(), RLock()
        self._thread = Thread(target=self._run, name="dora-status", daemon=True)

    def start(self) -> None:
        """Begins to write."""
        atexit.register(self.close)
        self.write()
        self._thread.start()

    def began(self) -> None:
        """A step or request begins."""
        self.recorder.began()

    def ended(self, call: Call, spans: Sequence[Span]) -> None:
        """A step or request has ended; `spans` is what this rank did in it."""
        model = self._model()
        self.recorder.ended(call, id(model.plan) if model is not None else 0, spans)

    def now(self) -> Status | None:
        """Returns how the rank is doing; None once nobody has the model any more."""
        model = self._model()
        if model is None:
            return None
        with self._writing:
            return self._observer.status(model, period_s=self._period_s, problem=self._problem)

    def close(self, problem: str = "") -> None:
        """Says that the model was closed, and why if it failed; may be repeated."""
        if self._stop.is_set() or os.getpid() != self._process:
            return
        self._problem = problem
        self._stop.set()
        atexit.unregister(self.close)
        self.write()
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s) and self._model() is not None:
            start_s = time.perf_counter()
            status = self.write()
            self._period_s = max(PERIOD_S, (time.perf_counter() - start_s) / SHARE)
            if status is not None and time.monotonic() > self._relayed_s + _RELAY_S:
                self._relayed_s = time.monotonic()
                for other in self._relay.exchange(status):
                    self._save(other)

    def write(self) -> Status | None:
        """Writes how this rank is doing, where there is a folder for it."""
        with self._writing:
            status = self.now() if self._folder is not None else None
            if status is not None:
                self._save(status)
            return status

    def _save(self, status: Status) -> None:
        assert self._folder is not None
        with suppress(OSError):  # a full disk is no reason to stop the job
            save(status, self._folder / f"rank-{status.rank}.json")
