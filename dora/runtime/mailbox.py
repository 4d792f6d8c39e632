"""The messages of a step: what is on its way to and from this rank, and waiting for it.

Tensors leave and arrive under the tags of `tags.py`; the pieces of one tensor have one tag and are
matched in order. Every wait has a timeout and fails with rank, peer and action.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dora.runtime.compress import Arrival, Encoder
from dora.runtime.handshake import Handshake
from dora.runtime.priority import Priority
from dora.runtime.tags import first_tag
from dora.runtime.transport import Pending, Transport

Span = tuple[str, str, float, float]  # lane, label, start, end


class Mailbox:
    """Sends and receives the tensors of boundaries.

    Args:
        transport: Carries the messages.
        rank: This process.
        timeout_s: Limit of every single wait.

    Attributes:
        spans: What this rank has waited for, encoded and decoded; the executor adds its own.
    """

    def __init__(self, transport: Transport, rank: int, timeout_s: float) -> None:
        self.transport = transport
        self.timeout_s = timeout_s
        self.handshake = Handshake(transport, rank, timeout_s)
        self.spans: list[Span] = []
        self._receives: dict[tuple[int, int], list[tuple[Arrival, list[Pending]]]] = {}
        self._sends: dict[tuple[int, int], list[Pending]] = {}

    def send(
        self,
        tensors: Sequence[torch.Tensor],
        encoders: Sequence[Encoder],
        dst: int,
        direction: int,
        m: int,
        *,
        action: str,
        priority: Priority,
    ) -> None:
        """Starts sending the tensors of micro-batch `m`; each part leaves once it is encoded."""
        started = self._sends.setdefault((direction, m), [])
        tag, start_s = first_tag(direction, m), time.perf_counter()
        for i, (x, encoder) in enumerate(zip(tensors, encoders, strict=True)):
            in_tiles = priority._replace(unit_bytes=encoder.unit_bytes)
            for part in encoder.parts(x):
                started.append(self.transport.send(part, dst, tag + i, action, priority=in_tiles))
        if any(encoder.format for encoder in encoders):
            self.spans.append(("compute", f"encode {action}", start_s, time.perf_counter()))

    def receive(
        self, arrivals: Sequence[Arrival], src: int, direction: int, m: int, action: str
    ) -> None:
        """Posts receives of the tensors of micro-batch `m`."""
        self.handshake.check(src)
        tag = first_tag(direction, m)
        self._receives[direction, m] = [
            (
                arrival,
                [self.transport.receive(part, src, tag + i, action) for part in arrival.parts],
            )
            for i, arrival in enumerate(arrivals)
        ]

    def wait(self, direction: int, m: int, label: str) -> list[torch.Tensor]:
        """Returns the tensors of a receive; decodes each part while later ones arrive."""
        received = self._receives.pop((direction, m))
        start_s = time.perf_counter()
        for arrival, operations in received:
            for part, operation in enumerate(operations):
                operation.wait(self.timeout_s)
                arrived_s = time.perf_counter()
                arrival.decode(part)
                if arrival.format is not None:
                    self.spans.append(("wait", label, start_s, arrived_s))
                    start_s = time.perf_counter()
                    self.spans.append(("compute", f"decode {label}", arrived_s, start_s))
        self.spans.append(("wait", label, start_s, time.perf_counter()))
        return [arrival.tensor for arrival, _ in received]

    def timed(self, label: str, work: Callable[[], Any]) -> None:
        """Waits for `work` and notes how long."""
        start = time.perf_counter()
        work()
        self.spans.append(("wait", label, start, time.perf_counter()))

    def finish(self, operations: Iterable[Pending]) -> None:
        """Waits for each."""
        for operation in operations:
            operation.wait(self.timeout_s)

    def keep(self, send: Pending) -> None:
        """Remembers a send that was started elsewhere."""
        self._sends.setdefault((-1, 0), []).append(send)

    def sending(self, direction: int) -> list[int]:
        """Returns the micro-batches whose sends nobody has waited for, oldest first."""
        return [m for d, m in self._sends if d == direction]

    def finish_sends_of(self, direction: int, m: int) -> None:
        """Waits until the tensors of that micro-batch have left."""
        self.finish(self._sends.pop((direction, m), ()))

    def finish_sends(self) -> None:
        """Waits until everything has left."""
        for direction, m in list(self._sends):
            self.finish_sends_of(direction, m)
        self.handshake.finish()
