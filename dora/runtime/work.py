"""Operations as torch.distributed knows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import Work

from dora.runtime.pending import Pending, Together


class DoraWork(Work):
    """A torch.distributed Work over an operation of the communicator.

    `is_completed` turns true without `wait`, and `get_future` works on every kind of operation.

    Args:
        pending: The operation.
        tensors: What `result` returns and the future yields.
        rank_of: Turns the communicator's number of a sender into that of the group.
    """

    def __init__(
        self,
        pending: Pending | Together,
        tensors: Sequence[torch.Tensor] = (),
        rank_of: Callable[[int], int] = int,
    ) -> None:
        super().__init__()
        self._pending = pending
        self._tensors = list(tensors)
        self._rank_of = rank_of
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Blocks until done; without a timeout, the one of the group holds."""
        self._pending.wait(timeout.total_seconds() or None)
        return True

    def is_completed(self) -> bool:
        """Whether it is over, well or not."""
        return self._pending.is_completed()

    def is_success(self) -> bool:
        """Whether it is over and went well."""
        return self.is_completed() and self._pending.error() is None

    def exception(self) -> Exception | None:
        """Returns why it failed."""
        return self._pending.error() if self.is_completed() else None

    def result(self) -> list[torch.Tensor]:
        """Returns the tensors that it filled."""
        return self._tensors

    def synchronize(self) -> None:
        """Blocks until done."""
        self.wait()

    def source_rank(self) -> int:
        """Returns the group's rank that sent, after a receive."""
        return self._rank_of(self._pending.source())

    def _source_rank(self) -> int:
        return self.source_rank()

    def abort(self) -> None:
        """Gives the operation up, here and at the peer."""
        self._pending.cancel()

    def get_future(self) -> torch.futures.Future[Any]:
        """Returns a future of the tensors; callbacks run on a thread of the communicator."""
        if self._future is None:
            devices = {tensor.device for tensor in self._tensors if tensor.is_cuda}
            over: torch.futures.Future[None] = torch.futures.Future(devices=[*devices])
            # A failure must reach C++ waiters too, as DDP's; only a callback can raise there.
            self._future = over.then(lambda _: self._value())
            self._pending.on_done(lambda: over.set_result(None))
        return self._future

    def _value(self) -> list[torch.Tensor]:
        error = self._pending.error()
        if error is not None:
            raise error
        return self._tensors
