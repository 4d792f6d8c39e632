"""Validator: every schedule that is built passes, every kind of damage is named."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora.errors import ScheduleError
from dora.scheduler import (
    SCHEDULES,
    build_schedule,
    format_grid,
    in_flight_bounds,
    peak_in_flight,
    peak_receives,
    validate,
)
from dora.spec import Action, Plan, Schedule, routes_from_shares, warmup_for


def make_plan(*shares, num_microbatches=4, spare=0, seed=None, **fields):
    """One block per stage; a seed shuffles which device runs what."""
    num_used = sum(len(stage) for stage in shares)
    names = [f"d{i}" for i in range(num_used + spare)]
    given_names = iter(names if seed is None else Random(seed).sample(names, num_used))
    stages = [
        {
            "index": i,
            "first_block": i,
            "last_block": i,
            "replicas": [{"device": next(given_names), "share": share} for share in stage],
        }
        for i, stage in enumerate(shares)
    ]
    plan = {"devices": names, "stages": stages, "num_microbatches": num_microbatches}
    return Plan.model_validate({**plan, **fields})


@st.composite
def plans(draw, kinds=tuple(SCHEDULES)):
    """Any stage and replica counts, shares or free routes, windows that do not ascend."""
    weights = draw(
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5)
    )
    shares = [[weight / sum(stage) for weight in stage] for stage in weights]
    n = draw(st.integers(1, 12))
    routes = routes_from_shares(shares, n)
    if draw(st.booleans()):
        route = st.tuples(*[st.integers(0, len(stage) - 1) for stage in shares])
        routes = tuple(draw(st.lists(route, min_size=n, max_size=n)))
    size = len(shares)
    windows = draw(st.lists(st.integers(1, 14), min_size=size, max_size=size))
    warmup = draw(st.sampled_from([tuple(sorted(windows, reverse=True)), warmup_for(shares), ()]))
    return make_plan(
        *shares,
        num_microbatches=n,
        spare=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
        routes=routes,
        warmup=warmup,
        schedule_kind=draw(st.sampled_from(kinds)),
    )


@settings(max_examples=150)
@given(
    plan=plans(),
    prefetch=st.integers(0, 5),
    training=st.booleans(),
    reduce_all=st.booleans(),
)
def test_validate_accepts_what_is_built(plan, prefetch, training, reduce_all):
    tied = frozenset(range(len(plan.stages)) if reduce_all else ())
    schedule = build_schedule(plan, prefetch=prefetch, training=training, reduce_stages=tied)
    validate(schedule, plan, max_receives=prefetch + 1)
    assert max(peak_receives(schedule)) <= prefetch + 1
    assert peak_in_flight(schedule) == in_flight_bounds(plan, training=training)


@settings(max_examples=50)
@given(plan=plans(kinds=("1f1b",)))
def test_peak_in_flight_is_at_most_the_window(plan):
    peaks = peak_in_flight(build_schedule(plan))
    for stage in plan.stages:
        assert all(peaks[r] <= plan.warmup[stage.index] for r in plan.ranks(stage.index))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("shares", [[[1.0]] * 4, [[0.75, 0.25], [1.0]], [[1.0], [0.5, 0.5]]])
def test_peaks_do_not_grow_with_microbatches(shares, prefetch):
    peaks = []
    for n in (12, 48):
        schedule = build_schedule(make_plan(*shares, num_microbatches=n), prefetch=prefetch)
        peaks.append((peak_receives(schedule), peak_in_flight(schedule)))
    assert peaks[0] == peaks[1]


def test_peak_in_flight_by_kind():
    kinds = {"1f1b": (3, 2, 1), "gpipe": (8, 8, 8), "wavefront": (1, 1, 1)}
    for kind, expected in kinds.items():
        plan = make_plan(*[[1.0]] * 3, num_microbatches=8, schedule_kind=kind)
        assert peak_in_flight(build_schedule(plan)) == expected


def test_format_grid():
    plan = make_plan([1.0], [1.0], num_microbatches=1, spare=1)
    assert format_grid(build_schedule(plan), [(1, 1), (2, 0)]).splitlines() == [
        "step  rank 0   rank 1             rank 2",
        "   0  0F0      1RECV_F0           <-- ERROR HERE",
        "   1  0SEND_F0 1F0 <-- ERROR HERE",
        "   2  0RECV_B0 1B0",
        "   3  0B0      1SEND_B0",
        "   4  0OPT     1OPT",
    ]


# --- damage: a 2 -> 1 pipeline of rank 0 (even micro-batches), rank 1 (odd) and rank 2 ---

PLAN = make_plan([0.5, 0.5], [1.0], spare=1)


def lists():
    return [list(actions) for actions in build_schedule(PLAN).actions_by_rank]


def swap(actions, a, b):
    i, j = (actions.index(Action.from_str(text)) for text in (a, b))
    actions[i], actions[j] = actions[j], actions[i]


def rejected(ranks, plan=PLAN, **bounds):
    """Returns the first line of the error, and the marked cells as 'rank: action'."""
    schedule = Schedule(actions_by_rank=tuple(map(tuple, ranks)))
    with pytest.raises(ScheduleError) as caught:
        validate(schedule, plan, **bounds)
    first, grid = str(caught.value).split("\n", 1)
    assert all(f"rank {rank}" in grid.splitlines()[0] for rank in range(len(ranks)))
    cells = [line.split(" <-- ERROR HERE")[0].split()[-1] for line in grid.splitlines()]
    marked = ["<-- ERROR HERE" in line for line in grid.splitlines()]
    return first, [cell for cell, is_marked in zip(cells, marked, strict=True) if is_marked]


@pytest.mark.parametrize(
    ("rank", "dropped", "problem", "marked"),
    [
        (2, "1RECV_F1", "so 0SEND_F1 of rank 1 is never received", "1F1"),
        (1, "0RECV_B3", "so 1SEND_B3 of rank 2 is never received", "0B3"),
        (0, "0SEND_F2", "so 1RECV_F2 of rank 2 waits for ever", "1F2"),
        (2, "1SEND_B0", "so 0RECV_B0 of rank 0 waits for ever", "0B0"),
        (0, "0F2", "", "0SEND_F2"),
        (2, "1B1", "", "1SEND_B1"),
        (1, "0REDUCE_GRAD", "", None),
        (2, "1OPT", "", None),
    ],
)
def test_validate_missing_action(rank, dropped, problem, marked):
    ranks = lists()
    ranks[rank].remove(Action.from_str(dropped))
    first, cells = rejected(ranks)
    assert first == f"rank {rank}: {dropped} is missing" + (f", {problem}" if problem else "")
    assert marked is None or cells == [marked]


@pytest.mark.parametrize("text", ["0F0", "0SEND_F0", "0RECV_B2", "0OPT"])
def test_validate_duplicate_action(text):
    ranks = lists()
    ranks[0].insert(1, Action.from_str(text))
    first, cells = rejected(ranks)
    assert first == f"rank 0: {text} is there 2 times, allowed once"
    assert cells == [text, text]


@pytest.mark.parametrize(
    ("rank", "text", "problem"),
    [
        (1, "0F2", "0F2 belongs on rank 0, by the route of micro-batch 2"),
        (0, "1RECV_F1", "1RECV_F1 belongs on rank 2, by the route of micro-batch 1"),
        (3, "0F2", "0F2 belongs on rank 0, by the route of micro-batch 2"),
        (2, "1SEND_F0", "1SEND_F0 has no place in this plan"),
        (2, "1F4", "1F4 has no place in this plan"),
        (0, "1OPT", "1OPT has no place in this plan"),
        (0, "7B0", "7B0 has no place in this plan"),
    ],
)
def test_validate_wrong_rank(rank, text, problem):
    ranks = lists()
    for actions in ranks:
        if Action.from_str(text) in actions and not text.endswith("OPT"):
            actions.remove(Action.from_str(text))
    ranks[rank].insert(0, Action.from_str(text))
    assert rejected(ranks) == (f"rank {rank}: {problem}", [text])


def test_validate_deadlock_names_the_circle():
    ranks = lists()
    # Rank 0 now wants the gradient of micro-batch 0 before it runs 2, the last stage 2 before 0.
    swap(ranks[0], "0F2", "0B0")
    ranks[0].remove(Action(0, "SEND_F", 2))
    ranks[0].insert(ranks[0].index(Action(0, "F", 2)) + 1, Action(0, "SEND_F", 2))
    swap(ranks[2], "1B0", "1F2")
    swap(ranks[2], "1SEND_B0", "1F1")
    ranks[2].sort(key=lambda a: not a.kind.startswith("RECV"))
    first, cells = rejected(ranks, max_in_flight=[9] * 4, max_receives=9)
    assert first == (
        "deadlock: rank 0 waits at 0B0 for 1SEND_B0 of rank 2, "
        "rank 2 waits at 1F2 for 0SEND_F2 of rank 0"
    )
    assert sorted(cells) == ["0B0", "1F2"]


def test_validate_windows_that_ascend_deadlock():
    plan = make_plan([1.0], [0.5, 0.5]).model_copy(update={"warmup": (1, 3)})
    with pytest.raises(ScheduleError, match=r"^deadlock: rank 0 waits at 0B0 for 1SEND_B0"):
        validate(build_schedule(plan), plan)


@pytest.mark.parametrize(
    ("rank", "late", "early"),
    [
        (0, "0F0", "0SEND_F0"),
        (2, "1B1", "1SEND_B1"),
        (2, "1RECV_F2", "1F2"),
        (0, "0RECV_B2", "0B2"),
        (2, "1F3", "1B3"),
    ],
)
def test_validate_action_before_what_it_needs(rank, late, early):
    ranks = lists()
    swap(ranks[rank], late, early)
    assert rejected(ranks) == (f"rank {rank}: {early} comes before {late}, which it needs", [early])


@pytest.mark.parametrize(
    ("early", "late"), [("0REDUCE_GRAD", "0B2"), ("0OPT", "0REDUCE_GRAD"), ("0OPT", "0B2")]
)
def test_validate_tail_must_end_the_list(early, late):
    ranks = lists()
    swap(ranks[0], early, late)
    first, cells = rejected(ranks)
    assert first.startswith(f"rank 0: {early} comes before 0")
    assert first.endswith("allowed after it")
    assert cells == [early]


def test_validate_in_flight_bound():
    plan = make_plan([1.0], [1.0], num_microbatches=6)
    deep = make_plan([1.0], [1.0], num_microbatches=6, warmup=(4, 1))
    ranks = build_schedule(deep).actions_by_rank
    first, cells = rejected(ranks, plan)
    assert first == "rank 0: 3 in-flight micro-batches at 0F2, allowed 2"
    assert cells == ["0F2"]
    assert "allowed 3" in rejected(ranks, plan, max_in_flight=[3, 1])[0]
    validate(build_schedule(deep), plan, max_in_flight=[4, 1])


def test_validate_receive_bound():
    ranks = lists()
    ranks[2].sort(key=lambda action: not action.kind.startswith("RECV"))
    first, cells = rejected(ranks)
    assert first == "rank 2: 4 posted receives at 1RECV_F3, allowed 3"
    assert cells == ["1RECV_F3"]


def test_validate_number_of_ranks():
    with pytest.raises(ScheduleError, match="schedule has 1 ranks, the plan 4"):
        validate(Schedule(actions_by_rank=((),)), PLAN)


@settings(max_examples=80)
@given(plan=plans(), data=st.data())
def test_validate_notices_any_dropped_or_repeated_action(plan, data):
    ranks = [list(actions) for actions in build_schedule(plan).actions_by_rank]
    rank = data.draw(st.sampled_from([r for r, actions in enumerate(ranks) if actions]))
    position = data.draw(st.integers(0, len(ranks[rank]) - 1))
    action = ranks[rank][position]
    if data.draw(st.booleans()):
        ranks[rank].insert(position, action)
    else:
        del ranks[rank][position]
    schedule = Schedule(actions_by_rank=tuple(map(tuple, ranks)))
    with pytest.raises(ScheduleError, match=f"rank {rank}: {action} is "):
        validate(schedule, plan)
