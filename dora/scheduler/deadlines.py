"""When the receiver of each message needs it: the order in which messages should leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora.spec import Action, Plan

# A backward pass costs about two forward passes; only the order matters.
_WORK = {"F": 1.0, "B": 2.0}


def deadlines(actions_by_rank: Sequence[Sequence[Action]], plan: Plan) -> Mapping[Action, float]:
    """Returns what to sort the messages of a step by, earliest first.

    What the network scheduler decided, if the plan carries that for all of these messages; another
    number of micro-batches, for example of a last, smaller batch, falls back on `consumer_starts`.

    Args:
        actions_by_rank: Of a valid schedule.
        plan: That the schedule is for.
    """
    decided = {transfer.action: -transfer.priority for transfer in plan.transfers}
    sends = [a for actions in actions_by_rank for a in actions if a.kind.startswith("SEND")]
    if decided and all(action in decided for action in sends):
        return decided
    return consumer_starts(actions_by_rank, plan)


def consumer_starts(
    actions_by_rank: Sequence[Sequence[Action]], plan: Plan
) -> Mapping[Action, float]:
    """Returns when each SEND's consumer starts, in forward passes, if the network took no time.

    A list schedule: every rank walks its actions in order; F waits for the previous stage's F, B
    for the next stage's B. A send is as urgent as the compute that waits for it is early.
    ::

        consumer_starts(schedule.actions_by_rank, plan)[Action(0, "SEND_F", 3)]

    Args:
        actions_by_rank: Of a valid schedule.
        plan: That the schedule is for.
    """
    queues = [[a for a in actions if a.kind in _WORK] for actions in actions_by_rank]
    clock, at = [0.0] * len(queues), [0] * len(queues)
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    last = len(plan.stages) - 1
    left = sum(map(len, queues))
    while left:
        before = left
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue):
                action = queue[at[rank]]
                ready = _ready(action, end, last)
                if ready is None:
                    break
                start[action] = max(clock[rank], ready)
                clock[rank] = end[action] = start[action] + _WORK[action.kind]
                at[rank] += 1
                left -= 1
        assert left < before, "a validated schedule does not deadlock"
    sends = {}
    for (stage, kind, m), time in start.items():
        if kind == "F" and stage > 0:
            sends[Action(stage - 1, "SEND_F", m)] = time
        if kind == "B" and stage < last:
            sends[Action(stage + 1, "SEND_B", m)] = time
    return sends


def _ready(action: Action, end: Mapping[Action, float], last: int) -> float | None:
    """Returns when the input of an action is there, None if that is not known yet."""
    stage, kind, m = action
    if kind == "F":
        return 0.0 if stage == 0 else end.get(Action(stage - 1, "F", m))
    return end.get(Action(stage, "F", m)) if stage == last else end.get(Action(stage + 1, "B", m))
