"""Plays a schedule on a cluster and returns the Timeline that the runtime would return.

Discrete events for what ranks do, fluid rates for what media carry (`csrc/simulation`,
`csrc/fluid`). The Action lists and Transfers are the very ones that the runtime walks::

    timeline = simulate(plan, schedule, costs, cluster)

A rank walks its list: F and B take time, and wait for the message that they need; SEND and RECV
post without waiting, and a message moves once both are posted. Transfers on one medium go by
priority, as the engine's arbiters make them, or share it fairly (`discipline="fair"`), as other
transports do. A ring all-reduce is played round by round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from dora import _C
from dora.errors import ScheduleError
from dora.simulator.dynamics import Dynamics
from dora.simulator.energy import device_j
from dora.spec import (
    Action,
    Cluster,
    DeviceMemory,
    Energy,
    Plan,
    Schedule,
    Timeline,
)


class StepCosts(NamedTuple):
    """What the actions of one plan take, by rank and stage.

    Attributes:
        compute_s: (rank, 'F' or 'B') -> seconds of one micro-batch.
        send_bytes: (stage, 'SEND_F' or 'SEND_B') -> bytes of one micro-batch.
        reductions: (ranks, bytes) of each gradient all-reduce, in order.
        fixed_bytes: Per rank, memory that is held all the time.
        kept_bytes: Per rank, memory of one micro-batch from its F to its B.
        power_factors: Per rank, of its power mode.
        source: Rank where the inputs are, None if that is wherever the first stage is.
        input_bytes: Of one micro-batch.
        rests: Per rank, (seconds of work that a rest saves, speed meanwhile); () for none.
    """

    compute_s: Mapping[tuple[int, str], float]
    send_bytes: Mapping[tuple[int, str], float]
    reductions: tuple[tuple[tuple[int, ...], float], ...]
    fixed_bytes: tuple[float, ...]
    kept_bytes: tuple[float, ...]
    power_factors: tuple[float, ...]
    source: int | None = None
    input_bytes: float = 0.0
    rests: tuple[tuple[float, float], ...] = ()


class Compiled(NamedTuple):
    """A program, and which action each of its parts stands for.

    Attributes:
        computes: Per rank, (position in its list, action, transfer that it waits for or -1).
        sends: Per transfer of a pipeline, by its number, the action that sends it; rounds of
            reductions have none.
        inputs: Per transfer from the source, its micro-batch.
    """

    program: _C.Program
    computes: tuple[tuple[tuple[int, Action, int], ...], ...]
    sends: Mapping[int, Action]
    inputs: Mapping[int, int]


def simulate(
    plan: Plan,
    schedule: Schedule,
    costs: StepCosts,
    cluster: Cluster,
    *,
    discipline: str = "priority",
    dynamics: Dynamics | None = None,
    arrivals_s: Sequence[float] = (),
    start_s: float = 0.0,
) -> Timeline:
    """Returns when everything happens, the energy of each device and its peak memory.

    Args:
        plan: Routes and devices.
        schedule: Of all ranks; what its transfers do not name is as urgent as its tail is long.
        costs: Seconds and bytes of the plan's actions.
        cluster: With the plan's devices.
        discipline: 'priority', or 'fair' for transports without priorities.
        dynamics: Rates and speeds over time.
        arrivals_s: Per micro-batch, when its input is there, on the clock of `dynamics`; () means
            at the start.
        start_s: On the clock of `dynamics`; the timeline keeps that clock.

    Raises:
        ScheduleError: A rank never ends; the message names a device that has gone, if one has,
            and otherwise the first one that waits.
        ValueError: No link joins two devices that exchange messages.
    """
    compiled = compile_step(
        plan,
        schedule,
        costs,
        cluster,
        discipline=discipline,
        dynamics=dynamics,
        arrivals_s=arrivals_s,
        start_s=start_s,
    )
    _prioritise(compiled, schedule)
    played = compiled.program.play()
    if played.stuck >= 0:
        name = plan.devices[played.stuck]
        raise ScheduleError(f"rank {played.stuck} ({name}) never ends: it or its network has gone")
    # Spans are checked all together: one by one that takes twice as long, and is half of all time.
    return Timeline.model_validate(
        {
            "source": "predicted",
            "num_ranks": len(plan.devices),
            "spans": _spans(compiled, played, plan, costs, start_s),
            "energy": _energy(plan, costs, cluster, played, start_s),
            "memory": _memory(plan, schedule, costs),
        }
    )


def network_of(
    cluster: Cluster, names: Sequence[str], rests: Sequence[tuple[float, float]] = ()
) -> _C.Network:
    """Returns the links between those devices, by their position, for a program.

    Args:
        cluster: With those devices.
        names: Of the devices.
        rests: See `StepCosts`.
    """
    network = _C.Network(len(names))
    for device, rest in enumerate(rests):
        network.set_rest(device, *rest)
    media = {
        medium.name: network.add_medium(medium.rate_bytes_per_s, medium.contention)
        for medium in cluster.media
    }
    latency_s = {medium.name: medium.latency_s for medium in cluster.media}
    position = {name: i for i, name in enumerate(names)}
    for link in cluster.links:
        if link.src in position and link.dst in position:
            network.connect(
                position[link.src],
                position[link.dst],
                [media[name] for name in link.media],
                sum(latency_s[name] for name in link.media),
            )
    return network


def compile_step(
    plan: Plan,
    schedule: Schedule,
    costs: StepCosts,
    cluster: Cluster,
    *,
    discipline: str = "priority",
    dynamics: Dynamics | None = None,
    arrivals_s: Sequence[float] = (),
    start_s: float = 0.0,
) -> Compiled:
    """Returns the program of a schedule; see `simulate`."""
    program = _C.Program(network_of(cluster, plan.devices, costs.rests), discipline, start_s)
    for change in dynamics.changes(plan.devices, cluster) if dynamics else ():
        add = program.change_rate if change.is_medium else program.change_speed
        add(change.at_s, change.position, change.factor)
    transfers = _add_transfers(program, plan, schedule, costs, start_s)
    inputs = _add_inputs(program, plan, costs, arrivals_s)
    awaited = {(s, k, m): t for sent in (transfers, inputs) for (s, k, m), t in sent.items()}
    computes = tuple(
        _add_rank(program, rank, actions, costs, awaited, arrivals_s)
        for rank, actions in enumerate(schedule.actions_by_rank)
    )
    for ranks, num_bytes in costs.reductions:
        program.all_reduce(ranks, num_bytes)
    return Compiled(
        program,
        computes,
        sends={t: action for action, t in transfers.items()},
        inputs={t: action.microbatch for action, t in inputs.items()},
    )


def _add_rank(
    program: _C.Program,
    rank: int,
    actions: Sequence[Action],
    costs: StepCosts,
    transfers: Mapping[tuple[int, str, int], int],
    arrivals_s: Sequence[float],
) -> tuple[tuple[int, Action, int], ...]:
    computes = []
    for action in actions:
        stage, kind, m = action
        if kind in ("F", "B"):
            after = transfers.get(_awaited(action), -1)
            ready_s = arrivals_s[m] if arrivals_s and stage == 0 and kind == "F" else 0.0
            position = program.compute(rank, costs.compute_s[rank, kind], after, ready_s)
            computes.append((position, action, after))
        elif kind.startswith("SEND"):
            program.send(rank, transfers[action])
        elif kind.startswith("RECV"):
            program.receive(rank, transfers[_awaited(action)])
    return tuple(computes)


def _awaited(action: Action) -> tuple[int, str, int]:
    """Returns the send whose message F, B, RECV_F or RECV_B needs, whether or not it exists."""
    # As a plain tuple, which equals the Action and is made eight times as fast.
    stage, kind, m = action
    return (stage - 1, "SEND_F", m) if kind.endswith("F") else (stage + 1, "SEND_B", m)


def _add_transfers(
    program: _C.Program, plan: Plan, schedule: Schedule, costs: StepCosts, start_s: float
) -> dict[Action, int]:
    given = {transfer.action: transfer for transfer in schedule.transfers}
    ranks = [plan.ranks(stage.index) for stage in plan.stages]
    transfers = {}
    for src, actions in enumerate(schedule.actions_by_rank):
        for action in actions:
            stage, kind, m = action
            if not kind.startswith("SEND"):
                continue
            to = stage + 1 if kind == "SEND_F" else stage - 1
            dst, wish = ranks[to][plan.routes[m][to]], given.get(action)
            transfers[action] = program.transfer(
                src,
                dst,
                costs.send_bytes[stage, kind],
                wish.priority if wish else 0.0,
                (wish.pace_bytes_per_s or 0.0) if wish else 0.0,
                start_s + wish.not_before_s if wish else 0.0,
            )
    return transfers


def _add_inputs(
    program: _C.Program, plan: Plan, costs: StepCosts, arrivals_s: Sequence[float]
) -> dict[Action, int]:
    """Adds what the source sends to the first stage, as if a stage before it did."""
    inputs = {}
    ranks = plan.ranks(0)
    for m, route in enumerate(plan.routes if costs.source is not None else ()):
        dst = ranks[route[0]]
        if costs.source is not None and dst != costs.source:
            inputs[Action(-1, "SEND_F", m)] = program.transfer(
                costs.source,
                dst,
                costs.input_bytes,
                not_before_s=arrivals_s[m] if arrivals_s else 0.0,
                is_input=True,
            )
    return inputs


def _prioritise(compiled: Compiled, schedule: Schedule) -> None:
    """Gives every transfer that the schedule does not name its tail as priority.

    Gradients go behind all that: the engine sends them in a class below activations.
    """
    priorities = compiled.program.priorities()
    given = {transfer.action: transfer.priority for transfer in schedule.transfers}
    for t, action in compiled.sends.items():
        priorities[t] = given.get(action, priorities[t])
    compiled.program.prioritise(priorities)


def _spans(
    compiled: Compiled, played: _C.Played, plan: Plan, costs: StepCosts, begin_s: float
) -> Iterator[dict[str, Any]]:
    """Yields the fields of each Span."""
    for rank, computes in enumerate(compiled.computes):
        ops, free_s = played.ops(rank), None
        for position, action, after in computes:
            (start_s, end_s), label = ops[position], repr(action)
            if after >= 0 and free_s is not None and start_s > free_s:
                yield _span(rank, "wait", label, free_s, start_s)
            yield _span(rank, "compute", label, start_s, end_s)
            free_s = end_s
    ranks, moved = [plan.ranks(stage.index) for stage in plan.stages], played.transfers()
    for t, action in compiled.sends.items():
        src = ranks[action.stage][plan.routes[action.microbatch][action.stage]]
        yield _span(src, "network", repr(action), *moved[t])
    for t, m in compiled.inputs.items():
        yield _span(costs.source, "network", f"input {m}", *moved[t])
    yield from _reduction_spans(compiled, played, plan, begin_s)


def _span(rank: int | None, lane: str, label: str, start_s: float, end_s: float) -> dict[str, Any]:
    return {"rank": rank, "lane": lane, "label": label, "start_s": start_s, "end_s": end_s}


def _reduction_spans(
    compiled: Compiled, played: _C.Played, plan: Plan, begin_s: float
) -> Iterator[dict[str, Any]]:
    """Yields one network span per rank that reduces gradients, from its last compute on."""
    for rank, computes in enumerate(compiled.computes):
        placement, ops = plan.placement(rank), played.ops(rank)
        first = computes[-1][0] + 1 if computes else 0
        start_s = ops[first - 1][1] if computes else begin_s
        end_s = max((end_s for _, end_s in ops[first:]), default=start_s)
        if placement is not None and end_s > start_s:
            yield _span(rank, "network", repr(Action(placement[0], "REDUCE_GRAD")), start_s, end_s)


def _energy(
    plan: Plan, costs: StepCosts, cluster: Cluster, played: _C.Played, start_s: float
) -> tuple[Energy, ...]:
    found = []
    for rank, name in enumerate(plan.devices):
        is_used = plan.placement(rank) is not None
        joules = device_j(
            cluster.device(name),
            busy_s=played.busy_s[rank],
            # A device that only sends its inputs is not kept waiting for the rest.
            total_s=played.end_s - start_s if is_used else 0.0,
            sent_bytes=played.sent_bytes[rank],
            received_bytes=played.received_bytes[rank],
            power_factor=costs.power_factors[rank],
        )
        found.append(Energy(device=name, joules=joules, provenance="modelled"))
    return tuple(found)


_HELD = {"F": 1, "B": -1}  # micro-batches more that a rank keeps


def _memory(plan: Plan, schedule: Schedule, costs: StepCosts) -> tuple[DeviceMemory, ...]:
    peaks = []
    for rank, name in enumerate(plan.devices):
        if plan.placement(rank) is None:
            continue
        held = accumulate(_HELD.get(kind, 0) for _, kind, _ in schedule.actions_by_rank[rank])
        num_bytes = costs.fixed_bytes[rank] + costs.kept_bytes[rank] * max(held, default=0)
        peaks.append(DeviceMemory(device=name, peak_bytes=int(num_bytes)))
    return tuple(peaks)


def memory_over_time(timeline: Timeline, costs: StepCosts) -> list[list[tuple[float, float]]]:
    """Returns, per rank, (second, bytes held from then on) at every change."""
    steps: list[list[tuple[float, float]]] = []
    for rank in range(timeline.num_ranks):
        changes = []
        for span in timeline.spans:
            if span.rank == rank and span.lane == "compute":
                kind = Action.from_str(span.label).kind
                changes.append((span.start_s, 1) if kind == "F" else (span.end_s, -1))
        held, row = 0, [(0.0, costs.fixed_bytes[rank])]
        for at_s, change in sorted(changes):
            held += change
            row.append((at_s, costs.fixed_bytes[rank] + held * costs.kept_bytes[rank]))
        steps.append(row)
    return steps
