"""Takes CUDA tensors over the network: copies in pinned host memory, and no wait for the GPU.

What a send reads is copied on the stream that computes it. The send is posted when that copy is
done, by a thread, so that neither the user's thread nor the engine waits for the GPU.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from dora._C import Operation


class Staging:
    """The host side of one operation's tensors: the tensors themselves if they are on the CPU.

    Attributes:
        event: When the copies to the host are done; None if there are none.
    """

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None
        self._back: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._device: torch.device | None = None

    def reads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what the engine reads instead of `tensor`."""
        host = self._host(tensor)
        if host is not tensor:
            host.copy_(tensor.detach(), non_blocking=True)
            self._record(tensor.device)
        return host

    def writes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what the engine writes instead of `tensor`; `finish` copies it back."""
        host = self._host(tensor)
        if host is not tensor:
            self._back.append((tensor, host))
            self._record(tensor.device)
        return host

    def updates(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what the engine reads and writes instead of `tensor`."""
        host = self.reads(tensor)
        if host is not tensor:
            self._back.append((tensor, host))
        return host

    def finish(self) -> None:
        """Copies back what was written, after all earlier work on the tensors; waits for it."""
        if not self._back:
            return
        assert self.event is not None and self._device is not None
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self.event)
        with torch.cuda.stream(stream), torch.no_grad():
            for tensor, host in self._back:
                tensor.copy_(host, non_blocking=True)
        stream.synchronize()
        self._back.clear()

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def _record(self, device: torch.device) -> None:
        self._device = device
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(device))


class Launch:
    """An operation that is posted when its event is done."""

    def __init__(self, begin: Callable[[], Operation], event: torch.cuda.Event | None) -> None:
        self.operation: Operation | None = None
        self.error: Exception | None = None
        self._begin = begin
        self._event = event
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def is_over(self) -> bool:
        """Whether it was posted, or could not be."""
        return self.operation is not None or self.error is not None

    def wait(self, timeout_s: float) -> bool:
        """Blocks until it was posted or `timeout_s` has passed; returns `is_over`."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_over, timeout_s)

    def then(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when it is over, at once if it is already."""
        with self._changed:
            if not self.is_over:
                self._callbacks.append(callback)
                return
        callback()

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self._event is not None:
            self._event.synchronize()

    def run(self, refused: Exception | None = None) -> None:
        """Posts it, unless `refused` says why not."""
        try:
            if refused is not None:
                raise refused
            operation, error = self._begin(), None
        except Exception as failure:
            operation, error = None, failure
        with self._changed:
            self.operation, self.error = operation, error
            self._changed.notify_all()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Launcher:
    """Posts operations in the order in which they are given, each when its event is done."""

    def __init__(self) -> None:
        self._queue: deque[Launch] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="dora-launcher", daemon=True)
        self._thread.start()

    def post(
        self, begin: Callable[[], Operation], event: torch.cuda.Event | None
    ) -> Operation | Launch:
        """Calls `begin` at once if nothing waits before it and `event` is done, else later."""
        with self._changed:
            if not self._queue and (event is None or event.query()):
                return begin()
            launch = Launch(begin, event)
            self._queue.append(launch)
            self._changed.notify_all()
            return launch

    def close(self) -> None:
        """Refuses what has not been posted yet."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    break
                launch = self._queue[0]
            launch.synchronize()
            launch.run()
            with self._changed:
                self._queue.popleft()  # only now: what comes after must not overtake it
        for launch in self._queue:
            launch.run(RuntimeError("the communicator was closed before the GPU was done"))
