"""What a device does at once after a rest: a quota that has not been used, for example.

A share of a processor comes in periods. Who has waited has a whole one left, computes at full
speed until it is used up, and only then falls back to its share. A stage that mostly waits is
done much earlier than its share says.
"""

from __future__ import annotations

import time
from statistics import fmean, median
from typing import NamedTuple

import torch

from dora.profiler.probes import OWN_SHARE

# Long enough for many periods of 10 ms, and for some of the usual 100 ms.
_STEADY_S = 1.0
_REST_S = 0.1
# How far a burst is followed; what is saved shows at all points behind the first.
_BURST_S, _FIRST_S = 0.08, 0.02
_BURSTS = 8
_MATMUL = 64


class Rest(NamedTuple):
    """What a rest is good for.

    Attributes:
        saved_s: Seconds of work, at the steady speed, that a rested device is ahead.
        sprint: Its speed while it gets ahead, over the steady one.
    """

    saved_s: float = 0.0
    sprint: float = 1.0


def measure_rest() -> Rest:
    """Returns what a rest is good for on this CPU; takes 1 to 2.5 s where the CPU is shared."""
    trace = _trace(_STEADY_S / 10)
    if trace[-1][1] > OWN_SHARE * trace[-1][0]:
        return Rest()
    bursts = []
    for limit_s in (_STEADY_S, *[_BURST_S] * _BURSTS):
        time.sleep(_REST_S)
        bursts.append([point for point in _trace(limit_s) if point[0] > _FIRST_S])
    # What else runs comes and goes: the steady speed is that of all bursts once they are used up.
    ends = [(burst[0], burst[-1]) for burst in bursts if burst]
    steady = sum(b[1] - a[1] for a, b in ends) / sum(b[0] - a[0] for a, b in ends)
    ahead_s = [fmean(cpu / steady - wall for wall, cpu in burst) for burst in bursts[1:] if burst]
    return Rest(max(median(ahead_s), 0.0), max(1 / steady, 1.0))


def _trace(limit_s: float) -> list[tuple[float, float]]:
    """Computes; returns (seconds, processor seconds) so far after every few microseconds of it."""
    a, trace = torch.rand(_MATMUL, _MATMUL), []
    start_s, start_cpu_s = time.perf_counter(), time.thread_time()
    while True:
        a @ a
        trace.append((time.perf_counter() - start_s, time.thread_time() - start_cpu_s))
        if trace[-1][0] >= limit_s:
            return trace
