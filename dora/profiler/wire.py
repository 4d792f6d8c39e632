"""Messages between two ranks that measure the link between them.

The source keeps the time, so clocks need not agree:

    source       payload -->             payload -->
    destination             <-- ack                 <-- ack (sent once the next receive is posted)

An exchange takes round trip + size / rate: one byte gives the latency, and the slope between
two large sizes the rate, free of every constant cost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from dora.errors import PeerLostError

_LATENCY_ROUNDS = 20
# A message that takes this long shows the rate to a per cent; larger ones only cost time.
_ENOUGH_S = 0.25
_CHUNK_BYTES = 64 << 10
_CHUNKS_IN_FLIGHT = 4
_CONTROL_TAG = 0


class Wire:
    """This rank's messages, each awaited with a deadline; failures name rank, peer and action.

    Thread safety: send, recv, post and wait may be called from several threads.
    """

    def __init__(self, group: dist.ProcessGroup | None, step_timeout_s: float) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.step_timeout_s = step_timeout_s
        self._group = group if group is not None else dist.distributed_c10d._get_default_group()
        self._deadline = 0.0

    def start_step(self) -> None:
        """Allows the waits from now on `step_timeout_s` in all."""
        self._deadline = time.monotonic() + self.step_timeout_s

    def post_send(self, x: torch.Tensor, peer: int, action: str, tag: int) -> Any:
        """Starts a send."""
        return self._post(dist.isend, x, peer, action, tag)

    def post_recv(self, x: torch.Tensor, peer: int, action: str, tag: int) -> Any:
        """Starts a receive."""
        return self._post(dist.irecv, x, peer, action, tag)

    def wait(self, work: Any, peer: int, action: str) -> None:
        """Waits for a posted message, at most until the deadline of the step."""
        left_s = max(1e-3, self._deadline - time.monotonic())
        try:
            work.wait(timedelta(seconds=left_s))
        except RuntimeError as error:
            raise self._lost(peer, action, error) from error

    def send(self, x: torch.Tensor, peer: int, action: str, tag: int = _CONTROL_TAG) -> None:
        """Sends and waits."""
        self.wait(self.post_send(x, peer, action, tag), peer, action)

    def recv(self, x: torch.Tensor, peer: int, action: str, tag: int = _CONTROL_TAG) -> None:
        """Receives and waits."""
        self.wait(self.post_recv(x, peer, action, tag), peer, action)

    def gather_sum(self, table: torch.Tensor, action: str) -> torch.Tensor:
        """Returns the sum of all ranks' tables; no rank leaves before all have come.

        By way of rank 0, so that a rank which does not come is known by its number. Waits
        twice the time of a step, since others may be in one.
        """
        self._deadline = time.monotonic() + 2 * self.step_timeout_s
        if self.rank:
            self.send(table, 0, action)
            total = torch.empty_like(table)
            self.recv(total, 0, action)
            return total
        total, other = table.clone(), torch.empty_like(table)
        for peer in range(1, self.world_size):
            self.recv(other, peer, action)
            total += other
        for peer in range(1, self.world_size):
            self.send(total, peer, action)
        return total

    def _post(
        self, start: Callable[..., Any], x: torch.Tensor, peer: int, action: str, tag: int
    ) -> Any:
        try:
            return start(x, dist.get_global_rank(self._group, peer), group=self._group, tag=tag)
        except RuntimeError as error:
            raise self._lost(peer, action, error) from error

    def _lost(self, peer: int, action: str, error: RuntimeError) -> PeerLostError:
        cause = str(error).strip().splitlines()[0]
        return PeerLostError(f"rank {self.rank}: lost rank {peer} while {action}: {cause}")


def measure(wire: Wire, peer: int, sizes: Sequence[int], repeats: int) -> tuple[float, float]:
    """Returns the rate (bytes per second) and latency (seconds) to `peer`, which answers."""
    _exchange(wire, peer, 1, 1)
    latency_s = median(_exchange(wire, peer, 1, _LATENCY_ROUNDS)) / 2
    share_s = wire.step_timeout_s / (2 * len(sizes))
    points: list[tuple[int, float]] = []
    for size in sizes:
        # The first message also opens the congestion window, so it is timed only if it is long.
        (first_s,) = _exchange(wire, peer, size, 1)
        rounds = min(repeats, int(share_s / first_s))
        points.append((size, median(_exchange(wire, peer, size, rounds)) if rounds else first_s))
        if len(points) >= 2 and points[-1][1] > _ENOUGH_S:
            break
    wire.send(torch.tensor([0, 0]), peer, "ending a link measurement")
    (small, small_s), (large, large_s) = points[-2:]
    if large_s > small_s:
        return (large - small) / (large_s - small_s), latency_s
    return large / large_s, latency_s


def _exchange(wire: Wire, peer: int, size: int, rounds: int) -> list[float]:
    """Sends `rounds` messages of `size` bytes, each after the last one's ack; returns seconds."""
    action = f"sending {size} bytes"
    payload, ack = torch.zeros(size, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    wire.send(torch.tensor([size, rounds]), peer, action)
    wire.recv(ack, peer, action)
    times = []
    for _ in range(rounds):
        reply = wire.post_recv(ack, peer, action, _CONTROL_TAG)
        start = time.perf_counter()
        sent = wire.post_send(payload, peer, action, _CONTROL_TAG)
        wire.wait(reply, peer, action)
        times.append(time.perf_counter() - start)
        wire.wait(sent, peer, action)
    return times


def answer(wire: Wire, peer: int) -> None:
    """Takes part in the exchanges that `peer` announces until it announces none."""
    header, ack = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8)
    while True:
        wire.recv(header, peer, "waiting for the next link measurement")
        size, rounds = header.tolist()
        if not rounds:
            return
        action = f"receiving {size} bytes"
        payload = torch.empty(size, dtype=torch.uint8)
        for _ in range(rounds):
            posted = wire.post_recv(payload, peer, action, _CONTROL_TAG)
            wire.send(ack, peer, action)
            wire.wait(posted, peer, action)
        wire.send(ack, peer, action)


def send_flow(wire: Wire, peer: int, tag: int, duration_s: float) -> float:
    """Keeps chunks in flight until the time is over; returns bytes per second."""
    action = "sending a concurrent flow"
    more, last = (
        torch.zeros(_CHUNK_BYTES, dtype=torch.uint8),
        torch.ones(_CHUNK_BYTES, dtype=torch.uint8),
    )
    in_flight: deque[tuple[Any, Any, torch.Tensor]] = deque()
    acked: list[float] = []

    def send(chunk: torch.Tensor) -> None:
        ack = torch.zeros(1, dtype=torch.uint8)
        reply = wire.post_recv(ack, peer, action, tag)
        in_flight.append((wire.post_send(chunk, peer, action, tag), reply, ack))

    def await_oldest() -> None:
        sent, reply, _ = in_flight.popleft()
        wire.wait(reply, peer, action)
        acked.append(time.perf_counter())
        wire.wait(sent, peer, action)

    start = time.perf_counter()
    while time.perf_counter() < start + duration_s:
        if len(in_flight) == _CHUNKS_IN_FLIGHT:
            await_oldest()
        send(more)
    # One last chunk for each receive that the other side has posted.
    for _ in range(_CHUNKS_IN_FLIGHT):
        if len(in_flight) == _CHUNKS_IN_FLIGHT:
            await_oldest()
        send(last)
    while in_flight:
        await_oldest()
    within = [at for at in acked if at <= start + duration_s]
    if len(within) < 2:
        return len(acked) * _CHUNK_BYTES / (acked[-1] - start)
    return (len(within) - 1) * _CHUNK_BYTES / (within[-1] - within[0])


def receive_flow(wire: Wire, peer: int, tag: int) -> None:
    """Receives chunks and acknowledges each, until every posted receive got a last one."""
    action = "receiving a concurrent flow"
    ack = torch.zeros(1, dtype=torch.uint8)
    posted: deque[tuple[Any, torch.Tensor]] = deque()
    for _ in range(_CHUNKS_IN_FLIGHT):
        chunk = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
        posted.append((wire.post_recv(chunk, peer, action, tag), chunk))
    while posted:
        work, chunk = posted.popleft()
        wire.wait(work, peer, action)
        if not chunk[0]:
            posted.append((wire.post_recv(chunk, peer, action, tag), chunk))
        wire.send(ack, peer, action, tag)
