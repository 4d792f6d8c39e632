"""Checks a schedule against its plan before anything runs, and says where it goes wrong.

`validate` makes four passes, each of which may rely on the ones before:

1. presence: every rank has exactly the actions that the routes give it, each once;
2. tail: REDUCE_GRAD and OPT end the list of their rank, in this order;
3. dry run: all ranks advance together, and no progress means deadlock;
4. memory: in-flight micro-batches and posted receives stay within their bounds.

The first line of an error says what is wrong; the grid of all ranks follows, with
`<-- ERROR HERE` at the actions concerned.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import zip_longest
from typing import NoReturn

from dora.errors import ScheduleError
from dora.scheduler.pipeline import DEFAULT_PREFETCH, microbatches_of, receive_for
from dora.spec import Action, Plan, Schedule

Place = tuple[int, int]  # (rank, position in its action list)
_TAIL = ("REDUCE_GRAD", "OPT")
_TRAINING = ("B", "SEND_B", "RECV_B", *_TAIL)


def validate(
    schedule: Schedule,
    plan: Plan,
    *,
    max_in_flight: Sequence[int] | None = None,
    max_receives: int = DEFAULT_PREFETCH + 1,
) -> None:
    """Returns if the schedule does what the plan says, ends, and keeps its memory bounds.

    A schedule without any backward action is taken for inference.

    Args:
        schedule: From `build_schedule`, or edited by hand.
        plan: The routes and windows to hold it against.
        max_in_flight: Per rank, micro-batches whose activations it may hold; None takes the
            plan's windows.
        max_receives: Receives that any rank may have posted and not yet used; a schedule built
            with another `prefetch` needs `prefetch` + 1.

    Raises:
        ScheduleError: With the grid of all ranks and the place of the error in it.
    """
    num_ranks = len(schedule.actions_by_rank)
    if num_ranks != len(plan.devices):
        raise ScheduleError(f"schedule has {num_ranks} ranks, the plan {len(plan.devices)}")
    training = is_training(schedule)
    expected = [_expected(plan, rank, training) for rank in range(num_ranks)]
    tails = [_tail(plan, rank, training) for rank in range(num_ranks)]
    # What stands in a wrong place says more than what is missing in the right one: it goes first.
    for rank in range(num_ranks):
        _check_misplaced(schedule, plan, rank, expected[rank] | tails[rank][1])
    for rank in range(num_ranks):
        _check_missing(schedule, plan, rank, expected[rank] | tails[rank][0])
    for rank in range(num_ranks):
        _check_tail(schedule, rank)
    _dry_run(schedule, len(plan.stages) - 1)
    windows = in_flight_bounds(plan, training=training) if max_in_flight is None else max_in_flight
    _check_bound(schedule, "in-flight micro-batches", _in_flight, windows)
    _check_bound(schedule, "posted receives", _receives, [max_receives] * num_ranks)


def is_training(schedule: Schedule) -> bool:
    """Returns whether any rank runs a backward, a gradient reduction or an optimizer."""
    return any(a.kind in _TRAINING for actions in schedule.actions_by_rank for a in actions)


def needs(action: Action, last_stage: int) -> tuple[Action, ...]:
    """Returns what must have run on some rank before: the dependency rules of a pipeline.

    sFm <- sRECV_Fm, (s-1)SEND_Fm      sSEND_Fm <- sFm      sRECV_* <- nothing
    sBm <- sFm, sRECV_Bm, (s+1)SEND_Bm      sSEND_Bm <- sBm
    """
    stage, kind, m = action
    if kind.startswith("SEND_"):
        return (Action(stage, kind[-1], m),)
    own = (Action(stage, "F", m),) if kind == "B" else ()
    receive = receive_for(action, last_stage)
    return (*own, receive, _partner(receive)) if receive is not None else own


def _partner(action: Action) -> Action:
    """Returns the send of a receive, and the receive of a send."""
    stage, kind, m = action
    verb, direction = kind.split("_")
    is_upstream = (verb == "RECV") == (direction == "F")
    other = "SEND" if verb == "RECV" else "RECV"
    return Action(stage - 1 if is_upstream else stage + 1, f"{other}_{direction}", m)


def in_flight_bounds(plan: Plan, *, training: bool = True) -> tuple[int, ...]:
    """Returns per rank the most micro-batches whose activations its plan lets it hold.

    1F1B: the most that any W consecutive micro-batches give to the replica. GPipe: all of them.
    Inference: one, since nothing is kept for a backward.
    """
    bounds = [0] * len(plan.devices)
    for stage in plan.stages:
        for replica, rank in enumerate(plan.ranks(stage.index)):
            own = microbatches_of(plan, stage.index, replica)
            window = plan.warmup[stage.index] if plan.schedule_kind == "1f1b" else len(plan.routes)
            counts = [bisect_left(own, m + window) - i for i, m in enumerate(own)]
            most = max(counts, default=0)
            is_kept = training and plan.schedule_kind != "wavefront"
            bounds[rank] = most if is_kept else min(1, most)
    return tuple(bounds)


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Returns per rank the most micro-batches whose activations it holds at one time.

    From F to B in training; one at a time in inference, where nothing is kept.
    """
    return tuple(max(_in_flight(a), default=0) for a in schedule.actions_by_rank)


def peak_receives(schedule: Schedule) -> tuple[int, ...]:
    """Returns per rank the most receive buffers in use at one time.

    A buffer counts from its RECV until the F or B that needs it starts and takes it over.
    """
    return tuple(max(_receives(a), default=0) for a in schedule.actions_by_rank)


def _in_flight(actions: Sequence[Action]) -> Iterator[int]:
    """Yields the micro-batches in flight during each action."""
    is_kept = any(action.kind == "B" for action in actions)
    held = 0
    for _, kind, _ in actions:
        held += kind == "F"
        yield held
        held -= kind == ("B" if is_kept else "F")


def _receives(actions: Sequence[Action]) -> Iterator[int]:
    """Yields the posted and unused receives after each action."""
    posted: set[Action] = set()
    for action in actions:
        if action.kind.startswith("RECV_"):
            posted.add(action)
        posted.discard(Action(action.stage, f"RECV_{action.kind}", action.microbatch))
        yield len(posted)


def format_grid(schedule: Schedule, errors: Collection[Place] = ()) -> str:
    """Returns the schedule as text: one column per rank, one row per position in the lists.

    ::

        step  rank 0   rank 1
           0  0F0      1RECV_F0
           1  0SEND_F0 1F0 <-- ERROR HERE

    Args:
        schedule: What to print; nothing lines up in time, as every rank walks its own list.
        errors: The (rank, position) places to mark; a place behind the end of a list is allowed.
    """
    columns = []
    for rank, actions in enumerate(schedule.actions_by_rank):
        behind = max((position for r, position in errors if r == rank), default=-1) + 1
        cells = [str(action) for action in actions] + [""] * (behind - len(actions))
        for position, cell in enumerate(cells):
            if (rank, position) in errors:
                cells[position] = f"{cell} <-- ERROR HERE".lstrip()
        columns.append([f"rank {rank}", *cells])
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for step, row in enumerate(zip_longest(*columns, fillvalue="")):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        label = "step" if step == 0 else f"{step - 1:4d}"
        lines.append(f"{label}  {' '.join(cells)}".rstrip())
    return "\n".join(lines)


def _fail(schedule: Schedule, problem: str, places: Collection[Place]) -> NoReturn:
    raise ScheduleError(f"{problem}\n{format_grid(schedule, places)}")


def _expected(plan: Plan, rank: int, training: bool) -> set[Action]:
    """Returns the actions that a plan gives to a rank, without those of the tail."""
    placement = plan.placement(rank)
    if placement is None:
        return set()
    stage, replica = placement
    is_first, is_last = stage == 0, stage == len(plan.stages) - 1
    kinds = {
        "F": True,
        "RECV_F": not is_first,
        "SEND_F": not is_last,
        "B": training,
        "RECV_B": training and not is_last,
        "SEND_B": training and not is_first,
    }
    own = microbatches_of(plan, stage, replica)
    return {Action(stage, kind, m) for kind, applies in kinds.items() if applies for m in own}


def _check_misplaced(schedule: Schedule, plan: Plan, rank: int, allowed: set[Action]) -> None:
    """Fails on an action that is there twice, or on a rank that must not have it."""
    actions = schedule.actions_by_rank[rank]
    counts = Counter(actions)
    for position, action in enumerate(actions):
        if counts[action] > 1:
            problem = f"rank {rank}: {action} is there {counts[action]} times, allowed once"
            _fail(schedule, problem, [(rank, i) for i, a in enumerate(actions) if a == action])
        if action not in allowed:
            _fail(schedule, f"rank {rank}: {_misplaced(action, plan, rank)}", [(rank, position)])


def _check_missing(schedule: Schedule, plan: Plan, rank: int, required: set[Action]) -> None:
    """Fails on the first action, by micro-batch, that a rank should have and has not."""
    missing = required.difference(schedule.actions_by_rank[rank])
    if missing:
        action = min(missing, key=lambda a: (a.microbatch, a.kind))
        problem = f"rank {rank}: {action} is missing{_consequence(action, plan)}"
        _fail(schedule, problem, [_first_use(schedule, plan, rank, action)])


def _tail(plan: Plan, rank: int, training: bool) -> tuple[set[Action], set[Action]]:
    """Returns the required and the allowed actions at the end of a rank.

    Any stage may reduce, since its parameters may be tied; one with replicas has to.
    """
    placement = plan.placement(rank)
    if placement is None or not training:
        return set(), set()
    stage = placement[0]
    reduce, optimize = {Action(stage, "REDUCE_GRAD")}, {Action(stage, "OPT")}
    is_shared = len(plan.stages[stage].replicas) > 1
    return optimize | (reduce if is_shared else set()), optimize | reduce


def _owner(action: Action, plan: Plan) -> int | None:
    """Returns the rank on which the routes put an action, None if there is no such place."""
    stage, kind, m = action
    if kind in _TAIL or not (stage < len(plan.stages) and m < len(plan.routes)):
        return None
    return plan.rank_of(stage, plan.routes[m][stage])


def _misplaced(action: Action, plan: Plan, rank: int) -> str:
    """Says where an action belongs that a rank must not have."""
    owner = _owner(action, plan)
    if owner in (None, rank):
        return f"{action} has no place in this plan"
    return f"{action} belongs on rank {owner}, by the route of micro-batch {action.microbatch}"


def _consequence(action: Action, plan: Plan) -> str:
    """Says what the other side of a missing message would see."""
    if "_" not in action.kind or action.kind in _TAIL:
        return ""
    partner = _partner(action)
    outcome = "is never received" if action.kind.startswith("RECV_") else "waits for ever"
    return f", so {partner} of rank {_owner(partner, plan)} {outcome}"


def _first_use(schedule: Schedule, plan: Plan, rank: int, missing: Action) -> Place:
    """Returns where a missing action is needed, else the end of the rank that lacks it."""
    for other, actions in enumerate(schedule.actions_by_rank):
        for position, action in enumerate(actions):
            if missing in needs(action, len(plan.stages) - 1):
                return other, position
    return rank, len(schedule.actions_by_rank[rank])


def _check_tail(schedule: Schedule, rank: int) -> None:
    """Fails unless REDUCE_GRAD and OPT end the list: both wait for every gradient of the rank.

    A reduction in front of a send would also hold up its peers, one of which may need that send
    to reach its own reduction.
    """
    actions = schedule.actions_by_rank[rank]
    order = {kind: i for i, kind in enumerate(_TAIL)}
    for position, action in enumerate(actions):
        if action.kind in _TAIL:
            for late in actions[position + 1 :]:
                if order.get(late.kind, -1) < order[action.kind]:
                    problem = f"rank {rank}: {action} comes before {late}, allowed after it"
                    _fail(schedule, problem, [(rank, position)])


def _dry_run(schedule: Schedule, last_stage: int) -> None:
    """Advances every rank until all have ended; fails if none can move."""
    ranks = schedule.actions_by_rank
    done: set[Action] = set()
    at = [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ranks):
            while at[rank] < len(actions) and done.issuperset(needs(actions[at[rank]], last_stage)):
                done.add(actions[at[rank]])
                at[rank] += 1
                moved = True
    if any(position < len(actions) for position, actions in zip(at, ranks, strict=True)):
        _fail_blocked(schedule, last_stage, at, done)


def _fail_blocked(
    schedule: Schedule, last_stage: int, at: Sequence[int], done: Collection[Action]
) -> NoReturn:
    """Follows the ranks that wait for each other until the circle closes, and names it."""
    ranks = schedule.actions_by_rank
    owners = {action: rank for rank, actions in enumerate(ranks) for action in actions}
    rank = next(r for r, actions in enumerate(ranks) if at[r] < len(actions))
    chain: dict[int, Action] = {}
    while rank not in chain:
        action = ranks[rank][at[rank]]
        chain[rank] = next(need for need in needs(action, last_stage) if need not in done)
        rank = owners[chain[rank]]
    circle = list(chain)[list(chain).index(rank) :]
    places = [(r, at[r]) for r in circle]
    if len(circle) == 1:
        problem = f"rank {rank}: {ranks[rank][at[rank]]} comes before {chain[rank]}, which it needs"
        _fail(schedule, problem, places)
    waits = [
        f"rank {r} waits at {ranks[r][at[r]]} for {chain[r]} of rank {owners[chain[r]]}"
        for r in circle
    ]
    _fail(schedule, f"deadlock: {', '.join(waits)}", places)


def _check_bound(
    schedule: Schedule,
    what: str,
    levels: Callable[[Sequence[Action]], Iterator[int]],
    bounds: Sequence[int],
) -> None:
    """Fails at the first action that takes a rank over its bound."""
    for rank, (actions, bound) in enumerate(zip(schedule.actions_by_rank, bounds, strict=True)):
        for position, level in enumerate(levels(actions)):
            if level > bound:
                problem = f"rank {rank}: {level} {what} at {actions[position]}, allowed {bound}"
                _fail(schedule, problem, [(rank, position)])
