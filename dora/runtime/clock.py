"""Puts the clocks of all ranks on the clock of rank 0."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from dora.runtime.priority import URGENT
from dora.runtime.transport import Transport

_TAG, _ROUNDS = 0, 8


def clock_offset_s(
    transport: Transport, rank: int, peers: Iterable[int], timeout_s: float, *, server: int = 0
) -> float:
    """Returns what to add to this rank's `time.perf_counter()` to get the server's.

    It answers each peer in turn; the round with the shortest trip decides (Cristian,
    Probabilistic clock synchronization, 1989). Error: at most half of that trip.
    """
    best = (float("inf"), 0.0)
    for peer in peers:
        for _ in range(_ROUNDS):
            stamp = torch.zeros((), dtype=torch.float64)
            if rank == server:
                transport.receive(stamp, peer, _TAG, "clock").wait(timeout_s)
                stamp.fill_(time.perf_counter())
                transport.send(stamp, peer, _TAG, "clock", priority=URGENT).wait(timeout_s)
            elif rank == peer:
                start = time.perf_counter()
                transport.send(stamp, server, _TAG, "clock", priority=URGENT).wait(timeout_s)
                transport.receive(stamp, server, _TAG, "clock").wait(timeout_s)
                end = time.perf_counter()
                best = min(best, (end - start, stamp.item() - (start + end) / 2))
    return best[1]
