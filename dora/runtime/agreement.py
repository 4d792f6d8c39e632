"""Small facts that all ranks must share: checks, seeds, byte strings. Collective calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dora.runtime.transport import Transport


class Agreement:
    """Exchanges a few numbers or bytes between all ranks.

    Args:
        transport: Connects all ranks.
        rank: This process.
        world_size: Number of ranks.
        timeout_s: Limit of every wait.
    """

    def __init__(self, transport: Transport, rank: int, world_size: int, timeout_s: float) -> None:
        self._transport = transport
        self._rank = rank
        self._everyone = tuple(range(world_size))
        self._timeout_s = timeout_s

    def rows(self, row: Sequence[float], action: str) -> list[list[float]]:
        """Returns every rank's row; integers are exact below 2**53."""
        table = torch.zeros(len(self._everyone), len(row), dtype=torch.float64)
        table[self._rank] = torch.tensor(row, dtype=torch.float64)
        self._transport.all_reduce(table, self._everyone, action).wait(self._timeout_s)
        rows: list[list[float]] = table.tolist()
        return rows

    def from_rank_0(self, number: int, action: str) -> int:
        """Returns rank 0's number, below 2**62."""
        value = torch.tensor(number & (2**62 - 1))
        self._transport.broadcast(value, 0, self._everyone, action)
        return int(value)

    def gather(self, data: bytes, action: str) -> list[bytes]:
        """Returns the bytes of every rank."""
        sizes = [int(row[0]) for row in self.rows([len(data)], action)]
        parts = []
        for rank, size in enumerate(sizes):
            part = torch.empty(size, dtype=torch.uint8)
            if rank == self._rank and size:
                part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if size:
                self._transport.broadcast(part, rank, self._everyone, action)
            parts.append(part.numpy().tobytes())
        return parts
