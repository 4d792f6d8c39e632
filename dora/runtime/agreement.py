"""Small facts that all ranks must share: checks, seeds, byte strings. Collective calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dora.runtime.priority import GRADIENT, URGENT
from dora.runtime.transport import Transport


class Agreement:
    """Exchanges a few numbers or bytes between all ranks.

    Args:
        transport: Connects all ranks.
        rank: This process.
        members: The ranks that take part.
        timeout_s: Limit of every wait.
    """

    def __init__(
        self, transport: Transport, rank: int, members: Sequence[int], timeout_s: float
    ) -> None:
        self.members = tuple(members)
        self._transport = transport
        self._rank = rank
        self._timeout_s = timeout_s

    def rows(self, row: Sequence[float], action: str) -> list[list[float]]:
        """Returns the row of every member, in their order; integers are exact below 2**53."""
        return self.start_rows(row, action)()

    def start_rows(self, row: Sequence[float], action: str) -> Callable[[], list[list[float]]]:
        """Starts `rows`; returns what waits for them."""
        table = torch.zeros(len(self.members), len(row), dtype=torch.float64)
        table[self.members.index(self._rank)] = torch.tensor(row, dtype=torch.float64)
        pending = self._transport.all_reduce(table, self.members, action, priority=URGENT)

        def finish() -> list[list[float]]:
            pending.wait(self._timeout_s)
            rows: list[list[float]] = table.tolist()
            return rows

        return finish

    def from_first(self, number: int, action: str) -> int:
        """Returns the number of the first member, below 2**62."""
        value = torch.tensor(number & (2**62 - 1))
        self._transport.broadcast(value, self.members[0], self.members, action, priority=GRADIENT)
        return int(value)

    def gather(self, data: bytes, action: str) -> list[bytes]:
        """Returns the bytes of every member, in their order; they go before snapshots."""
        sizes = [int(row[0]) for row in self.rows([len(data)], action)]
        parts = []
        for rank, size in zip(self.members, sizes, strict=True):
            part = torch.empty(size, dtype=torch.uint8)
            if rank == self._rank and size:
                part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if size:
                self._transport.broadcast(part, rank, self.members, action, priority=GRADIENT)
            parts.append(part.numpy().tobytes())
        return parts
