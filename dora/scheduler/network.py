"""Decides how the network treats every transfer: who goes first, and in what pieces.

A transfer has a release, when its producer ends, and a tail, the longest path that remains once it
has arrived. On one shared medium with preemption, largest tail first is optimal (Jackson's
preemptive rule; Carlier, The one-machine sequencing problem, EJOR 1982), so the tail is the
priority that everything starts from. Several media, links and ranks at once make it a heuristic:
the best of a few orders is improved by swapping neighbours while that helps in the simulator.
`dora.scheduler.bound` says how far from optimal the result can be at most.

The engine enacts the result: strict priority per peer, and per medium by its arbiter, which lets no
two senders fight for one channel. The pace is the engine's own: it follows the rate that it
measures, not one that a plan was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from dora import _C
from dora.scheduler.pipeline import build_schedule
from dora.simulator import Compiled, StepCosts, compile_step
from dora.spec import Cluster, Plan, Schedule, Transfer

# About 2 ms of wire time, inside what the engine allows (csrc/rate.h): long enough that headers
# cost nothing, short enough that an urgent message waits for no more than that.
CHUNK_S = 2e-3
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 16 * 1024, 1024 * 1024
# An order that fits exact times fits real ones less: in five cells of bench_e2e.py orders that were
# predicted 0 to 1 % better than by consumer took 5 to 14 % longer, in twelve direct turns 2 %.
CLEAR_GAIN = 0.02


def schedule_network(
    plan: Plan,
    costs: StepCosts,
    cluster: Cluster,
    *,
    training: bool = True,
    max_plays: int = 100,
    seed: int = 0,
    clear_gain: float = CLEAR_GAIN,
) -> Schedule:
    """Returns what every rank does, with a transfer for every message.

    ::

        schedule = schedule_network(plan, step_costs(profile, cluster, workload, plan), cluster)

    Args:
        plan: Routes, windows and devices.
        costs: Of its actions.
        cluster: Links and media.
        training: False gives forwards only.
        max_plays: Times that the schedule is simulated to improve its order.
        seed: Of the order in which swaps are tried; the same seed gives the same schedule.
        clear_gain: What an order has to gain over that by consumer to be taken instead.

    Raises:
        ValueError: No link joins two devices that exchange messages.
    """
    schedule = build_schedule(plan, training=training)
    compiled = compile_step(plan, schedule, costs, cluster)
    priorities = best_order(compiled, max_plays=max_plays, seed=seed, clear_gain=clear_gain)
    transfers = [
        _transfer(compiled, t, priority, plan, costs, cluster)
        for t, priority in enumerate(priorities)
        if t in compiled.sends
    ]
    return schedule.model_copy(update={"transfers": tuple(transfers)})


def best_order(
    compiled: Compiled, *, max_plays: int, seed: int = 0, clear_gain: float = CLEAR_GAIN
) -> list[float]:
    """Returns the priority of every transfer: by consumer, or what beats that clearly.

    Rounds of reductions and inputs are in no plan: they keep `Program.priorities`.

    Args:
        compiled: Its program is left with these priorities.
        max_plays: Orders that are tried.
        seed: Of the order in which swaps are tried.
        clear_gain: See `schedule_network`.
    """
    program = compiled.program
    plain = _by_consumer(compiled)
    orders = [plain, program.priorities(), first_come(compiled)]
    values = [_play(program, order).end_s for order in orders]
    value = min(values)
    best = list(orders[values.index(value)])
    random, plays = Random(seed), len(orders)
    while plays < max_plays:
        swaps = [pair for pair in _swaps(program, best) if compiled.sends.keys() >= set(pair)]
        random.shuffle(swaps)
        for a, b in swaps[: max_plays - plays]:
            plays += 1
            option = list(best)
            option[a], option[b] = option[b], option[a]
            found = _play(program, option).end_s
            if found < value * (1 - 1e-9):
                best, value = option, found
                break
        else:
            break
    if value > values[0] * (1 - clear_gain):
        best = plain
    program.prioritise(best)
    return best


def _play(program: _C.Program, priorities: Sequence[float]) -> _C.Played:
    program.prioritise(priorities)
    return program.play()


def first_come(compiled: Compiled) -> list[float]:
    """Returns the priorities that serve messages in the order in which they are ready."""
    return _planned(compiled, [0.0] * compiled.program.num_transfers)


def _planned(compiled: Compiled, order: Sequence[float]) -> list[float]:
    """Returns that order for what a plan carries, and the default for the rest."""
    default = compiled.program.priorities()
    return [p if t in compiled.sends else default[t] for t, p in enumerate(order)]


def _by_consumer(compiled: Compiled) -> list[float]:
    """Returns when each consumer starts if messages go first come first served, negated."""
    program = compiled.program
    starts = [0.0] * program.num_transfers
    played = _play(program, first_come(compiled))
    for rank, computes in enumerate(compiled.computes):
        ops = played.ops(rank)
        for position, _, after in computes:
            if after >= 0:
                starts[after] = -ops[position][0]
    return _planned(compiled, starts)


def _swaps(program: _C.Program, priorities: Sequence[float]) -> list[tuple[int, int]]:
    """Returns pairs of transfers that are under way at the same time, neighbours in priority first.

    Others never meet: swapping them changes nothing.
    """
    spans = _play(program, priorities).transfers()
    ranked = sorted(range(len(spans)), key=lambda t: -priorities[t])
    pairs = []
    for i, a in enumerate(ranked):
        for b in ranked[i + 1 : i + 6]:
            overlaps = spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]
            if overlaps and priorities[a] != priorities[b]:
                pairs.append((a, b))
    return pairs


def _transfer(
    compiled: Compiled, t: int, priority: float, plan: Plan, costs: StepCosts, cluster: Cluster
) -> Transfer:
    action = compiled.sends[t]
    stage, kind, m = action
    to = stage + 1 if kind == "SEND_F" else stage - 1
    src, dst = (plan.rank_of(s, plan.routes[m][s]) for s in (stage, to))
    path = cluster.path(plan.devices[src], plan.devices[dst])
    assert path is not None, "the program was compiled for this link"
    return Transfer(
        src=src,
        dst=dst,
        num_bytes=round(costs.send_bytes[stage, kind]),
        action=action,
        priority=priority,
        chunk_bytes=int(min(max(path[0] * CHUNK_S, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)),
    )
