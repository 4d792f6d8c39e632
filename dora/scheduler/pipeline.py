"""Which rank computes and sends what, in which order: pure functions from ints to Actions.

The compute order of a stage comes first (`SCHEDULES`), then one lowering pass adds the
communication (`add_communication`), and `build_schedule` does both for every rank of a plan.
A micro-batch follows its route, one replica per stage, so a replica owns an ascending list of
*global* micro-batch indices m, which may have gaps.

1F1B with three stages of one replica, warm-up W = (3, 2, 1), four micro-batches, and a forward
(`0F1`: stage 0, micro-batch 1) as long as a backward::

    clock    0    1    2    3    4    5    6    7    8    9   10   11
    W=3    0F0  0F1  0F2            0B0  0F3  0B1       0B2       0B3
    W=2         1F0  1F1       1B0  1F2  1B1  1F3  1B2       1B3
    W=1              2F0  2B0  2F1  2B1  2F2  2B2  2F3  2B3

**Windows.** On a replica of stage s, F(m) comes before B(j) exactly when m < j + W[s]. Because W
counts global indices, it needs no knowledge of which replica holds which micro-batch, and

* nothing deadlocks if W never ascends from stage to stage and is at least 1: order F(s, m) by
  (m - W[s], 1, s) and B(s, j) by (j, 0, -s). Every order on a replica and every dependency
  F(s, m) -> F(s + 1, m), B(s + 1, m) -> B(s, m), F(s, m) -> B(s, m) ascends, so no cycle exists,
  whatever the routes, replica counts and shares are;
* a replica holds the activations of at most W[s] micro-batches, and fewer if it has siblings.

**Receives.** Sends and receives never wait; F and B wait for their data. A receive is posted
`prefetch` compute actions before the one that needs it, which itself needs one at most: never
more than `prefetch` + 1 receive buffers exist on a rank, however many micro-batches there are.
A RECV_B is posted no earlier than its own F: its data can not arrive before, and the shape of
the gradient is known by then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from dora.errors import ScheduleError
from dora.spec import Action, Plan, Schedule

# Two compute actions ahead is one F and one B in the steady state of 1F1B, so both directions can
# move data during every compute action. Measured by walking 3 stages, 24 micro-batches, deep
# warm-up, with messages as long as 2 forwards: prefetch 0, 1, 2, 4 takes 148, 83, 60, 60.
DEFAULT_PREFETCH = 2


def one_f_one_b(stage: int, microbatches: Sequence[int], warmup: int) -> list[Action]:
    """Orders forwards and backwards so that F(m) precedes B(j) exactly when m < j + `warmup`."""
    keyed = [((m - warmup, 1), Action(stage, "F", m)) for m in microbatches]
    keyed += [((m, 0), Action(stage, "B", m)) for m in microbatches]
    return [action for _, action in sorted(keyed)]


def gpipe(stage: int, microbatches: Sequence[int], warmup: int = 0) -> list[Action]:
    """Orders all forwards, then all backwards, both ascending; ignores `warmup`.

    Backwards ascend as in `one_f_one_b`, so that both kinds add up gradients in one order and
    give the same bits.
    """
    backwards = [Action(stage, "B", m) for m in microbatches]
    return wavefront(stage, microbatches, warmup) + backwards


def wavefront(stage: int, microbatches: Sequence[int], warmup: int = 0) -> list[Action]:
    """Orders the forwards of inference, ascending; ignores `warmup`."""
    return [Action(stage, "F", m) for m in microbatches]


ComputeOrder = Callable[[int, Sequence[int], int], list[Action]]
SCHEDULES: dict[str, ComputeOrder] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "wavefront": wavefront,
}


def microbatches_of(plan: Plan, stage: int, replica: int) -> list[int]:
    """Returns the global indices of the micro-batches whose route uses that replica."""
    return [m for m, route in enumerate(plan.routes) if route[stage] == replica]


def receive_for(action: Action, last_stage: int) -> Action | None:
    """Returns the receive that F or B needs: sRECV_Fm -> sFm, sRECV_Bm -> sBm, else None."""
    stage, kind, m = action
    has_peer = (kind == "F" and stage > 0) or (kind == "B" and stage < last_stage)
    return Action(stage, f"RECV_{kind}", m) if has_peer else None


def send_after(action: Action, last_stage: int) -> Action | None:
    """Returns the send that F or B feeds: sFm -> sSEND_Fm, sBm -> sSEND_Bm, else None."""
    stage, kind, m = action
    has_peer = (kind == "F" and stage < last_stage) or (kind == "B" and stage > 0)
    return Action(stage, f"SEND_{kind}", m) if has_peer else None


def _posts(compute: Sequence[Action], last_stage: int, prefetch: int) -> dict[int, list[Action]]:
    """Returns the receives to post before each compute action, by its position."""
    posts: defaultdict[int, list[Action]] = defaultdict(list)
    forward_done: dict[int, int] = {}
    for position, action in enumerate(compute):
        if action.kind == "F":
            forward_done[action.microbatch] = position + 1
        receive = receive_for(action, last_stage)
        if receive is not None:
            after = forward_done[action.microbatch] if action.kind == "B" else 0
            posts[max(position - prefetch, after)].append(receive)
    return posts


def add_communication(
    compute: Sequence[Action], *, num_stages: int, prefetch: int = DEFAULT_PREFETCH
) -> list[Action]:
    """Adds sends right after, and receives `prefetch` compute actions before, their compute.

    Receives of one kind are posted in the order in which they are needed, which is also the
    order in which each peer sends.

    Args:
        compute: F and B of one rank, in order.
        num_stages: Of the whole pipeline; the first and the last have one neighbour.
        prefetch: Compute actions between posting a receive and needing it, at least 0.
    """

    def lowered() -> Iterator[Action | None]:
        posts = _posts(compute, num_stages - 1, prefetch)
        for position, action in enumerate(compute):
            yield from posts.get(position, ())
            yield action
            yield send_after(action, num_stages - 1)

    return [action for action in lowered() if action is not None]


def build_schedule(
    plan: Plan,
    *,
    training: bool = True,
    prefetch: int = DEFAULT_PREFETCH,
    reduce_stages: frozenset[int] = frozenset(),
) -> Schedule:
    """Returns what every rank of a plan does, in order; a rank left out does nothing.

    ::

        schedule = build_schedule(plan)
        validate(schedule, plan)

    Args:
        plan: Its routes, windows and schedule kind decide the order.
        training: False, or a plan of kind 'wavefront', gives forwards only.
        prefetch: Compute actions between posting a receive and needing it.
        reduce_stages: Stages that reduce gradients although they have one replica, since another
            stage holds a copy of one of their parameters. Stages with replicas always do.

    Returns:
        A schedule without transfers, one action list per rank.

    Raises:
        ScheduleError: `prefetch` is negative or `reduce_stages` names a stage that is not there.
    """
    if prefetch < 0:
        raise ScheduleError(f"prefetch: given {prefetch}, allowed 0 or more")
    unknown = sorted(set(reduce_stages) - set(range(len(plan.stages))))
    if unknown:
        raise ScheduleError(f"reduce_stages: given {unknown}, allowed 0 to {len(plan.stages) - 1}")
    kind = plan.schedule_kind if training else "wavefront"
    actions: list[tuple[Action, ...]] = [() for _ in plan.devices]
    for stage in plan.stages:
        reduces = len(stage.replicas) > 1 or stage.index in reduce_stages
        final = _final(stage.index, reduces) if kind != "wavefront" else []
        for replica, rank in enumerate(plan.ranks(stage.index)):
            own = microbatches_of(plan, stage.index, replica)
            compute = SCHEDULES[kind](stage.index, own, plan.warmup[stage.index])
            lowered = add_communication(compute, num_stages=len(plan.stages), prefetch=prefetch)
            actions[rank] = (*lowered, *final)
    return Schedule(actions_by_rank=tuple(actions))


def _final(stage: int, reduces: bool) -> list[Action]:
    """Returns what ends a training step, also on a replica without micro-batches."""
    reduce = [Action(stage, "REDUCE_GRAD")] if reduces else []
    return [*reduce, Action(stage, "OPT")]
