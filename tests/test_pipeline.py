"""Schedules: the drawn table, golden files, windows, receives, tail.

`python tests/test_pipeline.py` rewrites the golden files; review the difference before a commit.
"""

from itertools import pairwise
from pathlib import Path

import pytest

from dora.errors import ScheduleError
from dora.scheduler import pipeline
from dora.scheduler.pipeline import (
    SCHEDULES,
    add_communication,
    build_schedule,
    gpipe,
    microbatches_of,
    one_f_one_b,
    wavefront,
)
from dora.spec import Action, Plan, Schedule, warmup_for

GOLDEN = Path(__file__).parent / "golden"


def make_plan(*shares, num_microbatches=4, spare=0, **fields):
    """One block per stage; devices d0, d1, ... in stage order, then spare ones."""
    num_used = sum(len(stage) for stage in shares)
    names = [f"d{i}" for i in range(num_used + spare)]
    given = iter(names)
    stages = [
        {
            "index": i,
            "first_block": i,
            "last_block": i,
            "replicas": [{"device": next(given), "share": share} for share in stage],
        }
        for i, stage in enumerate(shares)
    ]
    plan = {"devices": names, "stages": stages, "num_microbatches": num_microbatches}
    return Plan.model_validate({**plan, **fields})


def chain(num_stages, num_microbatches, **fields):
    return make_plan(*[[1.0]] * num_stages, num_microbatches=num_microbatches, **fields)


GOLDEN_PLANS = {
    "1f1b_4x8": chain(4, 8),
    "gpipe_3x4": chain(3, 4, schedule_kind="gpipe"),
    "wavefront_3x5": chain(3, 5, schedule_kind="wavefront"),
    "1f1b_uneven_3to1": make_plan([0.75, 0.25], [1.0], num_microbatches=8, spare=1),
}


def to_csv(schedule):
    """One row per rank; the row of a rank left out is empty."""
    rows = [",".join(map(str, actions)) for actions in schedule.actions_by_rank]
    return "".join(f"{row}\n" for row in rows)


def from_csv(text):
    rows = [row.split(",") if row else [] for row in text.splitlines()]
    return Schedule(
        actions_by_rank=tuple(tuple(Action.from_str(cell) for cell in row) for row in rows)
    )


def rewrite_golden_files():
    for name, plan in GOLDEN_PLANS.items():
        (GOLDEN / f"{name}.csv").write_text(to_csv(build_schedule(plan)))


@pytest.mark.parametrize("name", GOLDEN_PLANS)
def test_build_schedule_golden(name):
    text = (GOLDEN / f"{name}.csv").read_text()
    schedule = build_schedule(GOLDEN_PLANS[name])
    assert to_csv(schedule) == text
    assert from_csv(text) == schedule


def clock_table(warmup, num_microbatches):
    """Draws when each action starts if F and B take one clock each and messages none."""
    last = len(warmup) - 1
    orders = [one_f_one_b(s, range(num_microbatches), w) for s, w in enumerate(warmup)]
    clock = {}
    while len(clock) < sum(map(len, orders)):
        for stage, order in enumerate(orders):
            for before, action in pairwise([None, *order]):
                is_end = stage == (0 if action.kind == "F" else last)
                step = -1 if action.kind == "F" else 1
                needed = [] if is_end else [action._replace(stage=stage + step)]
                needed += [before] if before else []
                if all(need in clock for need in needed):
                    clock[action] = max((clock[need] + 1 for need in needed), default=0)
    width = max(clock.values()) + 1
    rows = [("clock", [f"{t}" for t in range(width)])]
    for stage, w in enumerate(warmup):
        at = {t: str(action) for action, t in clock.items() if action.stage == stage}
        rows.append((f"W={w}", [at.get(t, "") for t in range(width)]))
    return [f"{label:<5}" + "".join(f"{cell:>5}" for cell in row).rstrip() for label, row in rows]


def test_one_f_one_b_table():
    table = [
        "clock    0    1    2    3    4    5    6    7    8    9   10   11",
        "W=3    0F0  0F1  0F2            0B0  0F3  0B1       0B2       0B3",
        "W=2         1F0  1F1       1B0  1F2  1B1  1F3  1B2       1B3",
        "W=1              2F0  2B0  2F1  2B1  2F2  2B2  2F3  2B3",
    ]
    assert clock_table((3, 2, 1), 4) == table
    assert "\n".join(f"    {row}" for row in table) in pipeline.__doc__


@pytest.mark.parametrize("warmup", [1, 2, 3, 9])
def test_one_f_one_b_deadlock_rule(warmup):
    own = [0, 1, 4, 5, 7]
    order = {(a.kind, a.microbatch): i for i, a in enumerate(one_f_one_b(2, own, warmup))}
    for m in own:
        for j in own:
            assert (order["F", m] < order["B", j]) == (m < j + warmup)


def test_gpipe_and_wavefront_order():
    assert [str(a) for a in gpipe(0, [1, 3])] == ["0F1", "0F3", "0B1", "0B3"]
    assert gpipe(0, [1, 3]) == one_f_one_b(0, [1, 3], 4)
    assert [str(a) for a in wavefront(2, [0, 2])] == ["2F0", "2F2"]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_without_microbatches(kind):
    assert SCHEDULES[kind](0, [], 3) == []


def lowered(text, **options):
    compute = [Action.from_str(word) for word in text.split()]
    return " ".join(map(str, add_communication(compute, **options)))


@pytest.mark.parametrize(
    ("prefetch", "expected"),
    [
        (0, "1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 1RECV_B0 1B0 1SEND_B0"),
        (1, "1RECV_F0 1RECV_F1 1F0 1SEND_F0 1RECV_B0 1F1 1SEND_F1 1B0 1SEND_B0"),
        # Two ahead of 1B0 is 1F0, but a gradient can not come before its own forward is sent.
        (2, "1RECV_F0 1RECV_F1 1F0 1SEND_F0 1RECV_B0 1F1 1SEND_F1 1B0 1SEND_B0"),
    ],
)
def test_add_communication_prefetch(prefetch, expected):
    assert lowered("1F0 1F1 1B0", num_stages=3, prefetch=prefetch) == expected


def test_add_communication_ends_of_pipeline():
    assert lowered("0F0 0B0", num_stages=2) == "0F0 0SEND_F0 0RECV_B0 0B0"
    assert lowered("1F0 1B0", num_stages=2) == "1RECV_F0 1F0 1B0 1SEND_B0"
    assert lowered("0F0 0B0", num_stages=1) == "0F0 0B0"


@pytest.mark.parametrize("plan", GOLDEN_PLANS.values(), ids=GOLDEN_PLANS)
def test_build_schedule_peers_send_in_the_order_of_receives(plan):
    schedule = build_schedule(plan)
    sent, received = {}, {}
    for rank, actions in enumerate(schedule.actions_by_rank):
        for stage, kind, m in actions:
            verb, _, direction = kind.partition("_")
            if verb not in ("SEND", "RECV"):
                continue
            ahead = (verb == "SEND") == (direction == "F")
            other = stage + 1 if ahead else stage - 1
            peer = plan.rank_of(other, plan.routes[m][other])
            pair, book = ((rank, peer), sent) if verb == "SEND" else ((peer, rank), received)
            book.setdefault(pair, []).append((direction, m))
    assert sent == received


def test_build_schedule_microbatches_follow_shares():
    plan = GOLDEN_PLANS["1f1b_uneven_3to1"]
    assert [len(microbatches_of(plan, 0, r)) for r in (0, 1)] == [6, 2]
    forwards = [
        [a.microbatch for a in actions if a.kind == "F"]
        for actions in build_schedule(plan).actions_by_rank
    ]
    assert sorted(forwards[0] + forwards[1]) == forwards[2] == list(range(8))


def test_build_schedule_leaves_ranks_out():
    assert build_schedule(make_plan([1.0], spare=2)).actions_by_rank[1:] == ((), ())


def test_build_schedule_idle_replica_still_reduces():
    plan = make_plan([0.5, 0.5], num_microbatches=1)
    assert build_schedule(plan).actions_by_rank[1] == (Action(0, "REDUCE_GRAD"), Action(0, "OPT"))


def test_build_schedule_reduces_replicas_and_tied_stages():
    plan = make_plan([1.0], [0.5, 0.5], [1.0])
    tails = [actions[-2:] for actions in build_schedule(plan).actions_by_rank]
    assert [tail[0].kind == "REDUCE_GRAD" for tail in tails] == [False, True, True, False]
    tied = build_schedule(plan, reduce_stages=frozenset({0, 2}))
    assert all(a[-2].kind == "REDUCE_GRAD" and a[-1].kind == "OPT" for a in tied.actions_by_rank)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_build_schedule_inference_is_the_wavefront(kind):
    plan, wave = (chain(3, 4, schedule_kind=k) for k in (kind, "wavefront"))
    assert build_schedule(plan, training=False) == build_schedule(wave)


def test_build_schedule_rejects_bad_options():
    with pytest.raises(ScheduleError, match="prefetch: given -1, allowed 0 or more"):
        build_schedule(chain(2, 2), prefetch=-1)
    with pytest.raises(ScheduleError, match=r"reduce_stages: given \[2\], allowed 0 to 1"):
        build_schedule(chain(2, 2), reduce_stages=frozenset({2}))


def test_warmup_for_even_shares_is_the_default_of_a_plan():
    plan = make_plan([1 / 3] * 3, [0.5, 0.5], [1.0])
    assert warmup_for([[1 / 3] * 3, [0.5, 0.5], [1.0]]) == plan.warmup == (6, 3, 1)


def test_warmup_for_slow_replica_and_slow_links():
    assert warmup_for([[0.75, 0.25], [1.0]]) == (5, 1)
    assert warmup_for([[1.0]] * 3, extra=2) == (7, 4, 1)


if __name__ == "__main__":
    rewrite_golden_files()
