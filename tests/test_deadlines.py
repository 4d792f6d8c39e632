"""The order in which messages should leave follows when their receivers need them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan

from dora.scheduler import build_schedule, consumer_starts, deadlines
from dora.spec import Action, Transfer


def starts_of(plan, training=True):
    return consumer_starts(build_schedule(plan, training=training).actions_by_rank, plan)


def test_starts_of_gpipe_on_two_stages():
    starts = starts_of(make_plan(2, [[1], [1]], num_microbatches=2, schedule_kind="gpipe"))
    # stage 0: F0 F1 . . . B0 B1     stage 1: . F0 F1 B0 B1, a backward takes two forwards
    assert starts == {
        Action(0, "SEND_F", 0): 1.0,
        Action(0, "SEND_F", 1): 2.0,
        Action(1, "SEND_B", 0): 5.0,
        Action(1, "SEND_B", 1): 7.0,
    }


def test_starts_of_one_stage_are_empty():
    assert starts_of(make_plan(1, [[1]])) == {}


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from(["gpipe", "1f1b"]),
)
@settings(max_examples=60)
def test_every_send_has_a_start_after_its_producer(replicas, num_microbatches, kind):
    shares = [[1] * n for n in replicas]
    plan = make_plan(len(shares), shares, num_microbatches=num_microbatches, schedule_kind=kind)
    schedule = build_schedule(plan, training=True)
    starts = consumer_starts(schedule.actions_by_rank, plan)
    sends = {a for row in schedule.actions_by_rank for a in row if a.kind.startswith("SEND")}
    assert set(starts) == sends
    for stage in range(len(shares) - 1):
        for m in range(num_microbatches):
            assert starts[Action(stage, "SEND_F", m)] >= stage + 1
            assert starts[Action(stage + 1, "SEND_B", m)] > starts[Action(stage, "SEND_F", m)]


def test_messages_go_as_the_plan_decided_if_it_names_them_all():
    plan = make_plan(2, [[1], [1]], num_microbatches=2)
    actions = build_schedule(plan).actions_by_rank
    sends = [a for own in actions for a in own if a.kind.startswith("SEND")]
    decided = [
        Transfer(src=0, dst=1, num_bytes=1, action=action, priority=float(i))
        for i, action in enumerate(sends)
    ]
    named = plan.model_copy(update={"transfers": tuple(decided)})
    assert deadlines(actions, named) == {a: -float(i) for i, a in enumerate(sends)}
    # Two orders in different units can not be mixed.
    partly = plan.model_copy(update={"transfers": tuple(decided[1:])})
    assert deadlines(actions, partly) == consumer_starts(actions, plan)
    assert deadlines(actions, plan) == consumer_starts(actions, plan)
