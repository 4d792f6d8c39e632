"""Walks the forwards and backwards of a pipeline in their order and returns when each ends.

The order on a replica of stage s with window W is fixed by the plan: F(m) comes before B(j)
exactly when m < j + W, in micro-batch indices of the whole step. Transfers run beside the
compute; each directed link carries one at a time, in the order in which they are ready::

    stage 0   F0 F1 .. B0 F2 B1 .. B2        W = 2
    stage 1   .. F0 B0 F1 B1 F2 B2           W = 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dora.errors import ScheduleError

Grid = Sequence[Sequence[float]]


class Wire(NamedTuple):
    """Seconds that a message occupies its link, and seconds until it arrives after that."""

    busy_s: float
    latency_s: float


class PipelineTimes(NamedTuple):
    """Seconds of every piece of a step.

    Attributes:
        forward_s, backward_s: `[stage][replica]` for one micro-batch.
        down: `[stage][replica][replica of the next stage]` for the activations.
        up: `[stage][replica of the next stage][replica]` for their gradients.
    """

    forward_s: Grid
    backward_s: Grid
    down: Sequence[Sequence[Sequence[Wire]]]
    up: Sequence[Sequence[Sequence[Wire]]]


def replica_order(microbatches: Sequence[int], window: int, kind: str) -> list[tuple[bool, int]]:
    """Returns the (is_forward, micro-batch) pairs of one replica in order.

    Args:
        microbatches: Those routed to this replica, ascending.
        window: W of its stage.
        kind: 'gpipe' runs all forwards first, 'wavefront' only forwards, '1f1b' the window.
    """
    if kind == "wavefront":
        return [(True, m) for m in microbatches]
    if kind == "gpipe":
        return [(True, m) for m in microbatches] + [(False, m) for m in microbatches]
    # B(j) comes right after F(j + W - 1), the last forward that it has to wait for.
    order = [(m, False, m) for m in microbatches]
    order += [(m + window - 1, True, m) for m in microbatches]
    return [(not is_backward, m) for _, is_backward, m in sorted(order)]


def finish_times_s(
    times: PipelineTimes,
    routes: Sequence[Sequence[int]],
    warmup: Sequence[int],
    kind: str,
) -> list[list[float]]:
    """Returns when each replica of each stage ends its last forward or backward.

    Raises:
        ScheduleError: The orders of the replicas wait for each other.
    """
    num_stages, last = len(times.forward_s), len(times.forward_s) - 1
    replicas = [(s, r) for s in range(num_stages) for r in range(len(times.forward_s[s]))]
    orders = {
        (s, r): replica_order([m for m, route in enumerate(routes) if route[s] == r], w, kind)
        for s, w in enumerate(warmup)
        for r in range(len(times.forward_s[s]))
    }
    arrived = [
        [[0.0] * len(routes) if s == 0 else [-1.0] * len(routes), [-1.0] * len(routes)]
        for s in range(num_stages)
    ]
    now = dict.fromkeys(replicas, 0.0)
    position = dict.fromkeys(replicas, 0)
    free: dict[tuple[int, int, int, bool], float] = {}
    work = list(replicas)
    while work:
        s, r = work.pop()
        order, i = orders[s, r], position[s, r]
        while i < len(order):
            is_forward, m = order[i]
            ready = arrived[s][not is_forward][m]
            if ready < 0:
                break
            i += 1
            own = times.forward_s[s][r] if is_forward else times.backward_s[s][r]
            end = now[s, r] = max(now[s, r], ready) + own
            if is_forward and s == last:
                arrived[s][1][m] = end
            elif is_forward or s > 0:
                t = s + 1 if is_forward else s - 1
                q = routes[m][t]
                wire = times.down[s][r][q] if is_forward else times.up[t][r][q]
                start = max(end, free.get((s, r, q, is_forward), 0.0))
                free[s, r, q, is_forward] = start + wire.busy_s
                arrived[t][not is_forward][m] = start + wire.busy_s + wire.latency_s
                work.append((t, q))
        position[s, r] = i
    if any(position[key] < len(orders[key]) for key in replicas):
        raise ScheduleError(f"deadlock: warmup {tuple(warmup)} with routes {tuple(routes)}")
    return [[now[s, r] for r in range(len(times.forward_s[s]))] for s in range(num_stages)]
