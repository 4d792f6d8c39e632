"""What the first device tells the others to run, one small message per order and device."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch


class Kind(IntEnum):
    """What an order asks for."""

    PREFILL = 0  # run one chunk of a prompt
    DECODE = 1  # run the newest token of every request of a group
    FREE = 2  # drop the cache of a slot
    BEAT = 3  # nothing: there is no work at the moment
    STOP = 4  # there will be no more; the results follow


class Order(NamedTuple):
    """One thing that all stages of a route run in turn.

    Attributes:
        kind: What to do.
        slot: Names the order's messages and its cache: one per request in flight, for its
            prefill, then one per group of requests that are decoded together.
        route: Index of the route that it takes.
        start: Position of the first token of a chunk.
        size: Tokens of a chunk; of STOP, bytes of the results.
        is_last: A prompt ends with this chunk, so that a token comes of it.
        rows: (request, its newest token), one per row of the batch.
    """

    kind: Kind
    slot: int = 0
    route: int = 0
    start: int = 0
    size: int = 1
    is_last: bool = True
    rows: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        """Says for messages what it is."""
        requests = ", ".join(str(request) for request, _ in self.rows)
        if self.kind is Kind.PREFILL:
            return f"prefill of request {requests}, tokens {self.start} to {self.end - 1}"
        return f"{self.kind.name.lower()} of requests {requests}"

    @property
    def end(self) -> int:
        """Position after the last token of a chunk."""
        return self.start + self.size

    @property
    def requests(self) -> tuple[int, ...]:
        """The request of every row."""
        return tuple(request for request, _ in self.rows)

    def to_tensor(self, max_rows: int) -> torch.Tensor:
        """Returns the order as numbers; equally many for all orders."""
        flat = [number for row in self.rows for number in row]
        padding = [0] * (2 * (max_rows - len(self.rows)))
        return torch.tensor([*self[:-1], len(self.rows), *flat, *padding], dtype=torch.int64)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> Order:
        """Inverse of `to_tensor`."""
        kind, slot, route, start, size, is_last, num_rows, *flat = tensor.tolist()
        rows = tuple((flat[2 * i], flat[2 * i + 1]) for i in range(num_rows))
        return cls(Kind(kind), slot, route, start, size, bool(is_last), rows)


def empty_order(max_rows: int) -> torch.Tensor:
    """Returns memory for the numbers of an order."""
    return torch.empty(len(Order._fields) + 2 * max_rows, dtype=torch.int64)
