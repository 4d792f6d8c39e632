"""Orders of transfers, held against first come first served and against a bound on any order."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan

from dora.scheduler import build_schedule, lower_bound_s, schedule_network
from dora.scheduler.network import CLEAR_GAIN
from dora.simulator import StepCosts, simulate
from dora.spec import Cluster, Device, Link, Medium, Plan

KIB, MIB = 1024, 1024 * 1024
# Sums of floats in another order differ in the last bits.
CLOSE = 1 + 1e-9


def make_cluster(names, *, rate=1e6, latency_s=0.0, media_of=None, contention=(1.0,)):
    """Every pair is linked by `media_of(src, dst)`; None gives each pair a medium of its own."""
    media_of = media_of or (lambda a, b: (f"{a}>{b}",))
    links = tuple(Link(src=a, dst=b, media=media_of(a, b)) for a in names for b in names if a != b)
    used = sorted({name for link in links for name in link.media})
    media = tuple(
        Medium(
            name=name,
            rate_bytes_per_s=rate(name) if callable(rate) else rate,
            latency_s=latency_s,
            contention=contention,
        )
        for name in used
    )
    devices = tuple(
        Device(name=n, flops_per_s=1, mem_bandwidth_bytes_per_s=1, memory_bytes=1) for n in names
    )
    return Cluster(devices=devices, media=media, links=links)


def shared(*_):
    return ("air",)


def through_access_point(*_):
    return ("air", "air")


def make_costs(plan, *, seconds, num_bytes, gradient_bytes=0, **fields):
    """`seconds(rank, kind)` and `num_bytes(stage, kind)` of every action."""
    ranks = range(len(plan.devices))
    last = len(plan.stages) - 1
    groups = [plan.ranks(stage.index) for stage in plan.stages]
    none = (0.0,) * len(plan.devices)
    return StepCosts(
        compute_s={(rank, kind): seconds(rank, kind) for rank in ranks for kind in "FB"},
        send_bytes={(s, "SEND_F"): num_bytes(s, "SEND_F") for s in range(last)}
        | {(s, "SEND_B"): num_bytes(s, "SEND_B") for s in range(1, last + 1)},
        reductions=tuple((g, gradient_bytes) for g in groups if len(g) > 1 and gradient_bytes),
        fixed_bytes=none,
        kept_bytes=none,
        power_factors=(1.0,) * len(plan.devices),
        **fields,
    )


@st.composite
def steps(draw, max_stages=3, replicas=2):
    """Draws a plan of 1F1B or GPipe with its costs, on shared and private media."""
    shares = [[1] * draw(st.integers(1, replicas)) for _ in range(draw(st.integers(1, max_stages)))]
    plan = make_plan(
        len(shares),
        shares,
        num_microbatches=draw(st.integers(max(map(len, shares)), 5)),
        schedule_kind=draw(st.sampled_from(["1f1b", "gpipe"])),
    )
    random = draw(st.randoms(use_true_random=False))
    media_of = draw(
        st.sampled_from([None, shared, through_access_point, lambda a, b: (f"nic-{a}", "switch")])
    )
    cluster = make_cluster(
        plan.devices,
        rate=lambda name: 1e6 * (1 + len(name) % 3),
        latency_s=draw(st.sampled_from([0.0, 0.1])),
        media_of=media_of,
        contention=draw(st.sampled_from([(1.0,), (1.0, 0.8)])),
    )
    has_source = draw(st.booleans())
    costs = make_costs(
        plan,
        seconds=lambda *_: random.randint(0, 5) / 5,
        num_bytes=lambda *_: random.randint(1, 8) * 200_000,
        gradient_bytes=draw(st.sampled_from([0, 1_000_000])),
        source=len(plan.devices) - 1 if has_source else None,
        input_bytes=300_000 if has_source else 0.0,
    )
    return plan, costs, cluster


def with_priorities(schedule, transfers, priority_of):
    """Returns the schedule with those transfers in another order."""
    changed = [t.model_copy(update={"priority": priority_of(t)}) for t in transfers]
    return schedule.model_copy(update={"transfers": tuple(changed)})


def sends_of(schedule):
    return {a for row in schedule.actions_by_rank for a in row if a.kind.startswith("SEND")}


# ---------------------------------------------------------------- against other orders


@given(steps(), st.booleans())
@settings(max_examples=60)
def test_never_worse_than_first_come_first_served(step, training):
    plan, costs, cluster = step
    if not training:
        costs = costs._replace(reductions=())
    found = schedule_network(plan, costs, cluster, training=training, max_plays=30)
    in_order = with_priorities(found, found.transfers, lambda t: 0.0)
    first_come_s = simulate(plan, in_order, costs, cluster).makespan_s
    assert simulate(plan, found, costs, cluster).makespan_s <= first_come_s * CLOSE / (
        1 - CLEAR_GAIN
    )


def test_urgent_gradient_overtakes_activations_that_are_early():
    # Stage 1 sends activations that the last stage is far too busy for, and gradients that stage 0
    # waits for, over one channel.
    plan = make_plan(3, [[1], [1], [1]], num_microbatches=6, warmup=(5, 4, 1))
    cluster = make_cluster(plan.devices, media_of=shared)
    costs = make_costs(
        plan, seconds=lambda rank, _: (0.2, 0.2, 1.0)[rank], num_bytes=lambda *_: 500_000
    )
    found = schedule_network(plan, costs, cluster)
    in_order = with_priorities(found, found.transfers, lambda t: 0.0)
    first_come_s = simulate(plan, in_order, costs, cluster).makespan_s
    assert simulate(plan, found, costs, cluster).makespan_s < first_come_s * 0.99


@given(steps(), st.integers(0, 3))
@settings(max_examples=20)
def test_a_seed_gives_one_schedule(step, seed):
    plan, costs, cluster = step
    first, again = (
        schedule_network(plan, costs, cluster, max_plays=30, seed=seed) for _ in range(2)
    )
    assert first == again


@given(steps())
@settings(max_examples=20)
def test_more_plays_are_never_worse(step):
    plan, costs, cluster = step
    ends = [
        simulate(
            plan, schedule_network(plan, costs, cluster, max_plays=plays), costs, cluster
        ).makespan_s
        for plays in (3, 60)
    ]
    assert ends[1] <= ends[0] * CLOSE


# ---------------------------------------------------------------- what a transfer says


@given(steps(), st.booleans())
@settings(max_examples=30)
def test_every_send_has_a_transfer(step, training):
    plan, costs, cluster = step
    schedule = schedule_network(plan, costs, cluster, training=training, max_plays=3)
    plain = build_schedule(plan, training=training)
    assert schedule.actions_by_rank == plain.actions_by_rank
    assert sorted(t.action for t in schedule.transfers) == sorted(sends_of(plain))
    for t in schedule.transfers:
        assert t.action in plain.actions_by_rank[t.src]
        assert t.num_bytes == costs.send_bytes[t.action.stage, t.action.kind]
        assert 16 * KIB <= t.chunk_bytes <= MIB
        assert t.pace_bytes_per_s is None, "the engine paces by the rate that it measures"
        receive = t.action._replace(
            stage=t.action.stage + (1 if t.action.kind == "SEND_F" else -1),
            kind=t.action.kind.replace("SEND", "RECV"),
        )
        assert receive in plain.actions_by_rank[t.dst]


@pytest.mark.parametrize(("rate", "chunk_bytes"), [(1e3, 16 * KIB), (50e6, 100_000), (1e12, MIB)])
def test_chunks_are_milliseconds_of_the_link_within_limits(rate, chunk_bytes):
    plan = make_plan(2, [[1], [1]])
    cluster = make_cluster(plan.devices, rate=rate)
    costs = make_costs(plan, seconds=lambda *_: 1.0, num_bytes=lambda *_: 1000)
    schedule = schedule_network(plan, costs, cluster)
    assert {t.chunk_bytes for t in schedule.transfers} == {chunk_bytes}


def test_one_stage_sends_nothing():
    plan = make_plan(1, [[1]])
    costs = make_costs(plan, seconds=lambda *_: 1.0, num_bytes=lambda *_: 0)
    assert schedule_network(plan, costs, make_cluster(plan.devices)).transfers == ()


@given(steps())
@settings(max_examples=20)
def test_plan_with_transfers_survives_json(step):
    plan, costs, cluster = step
    schedule = schedule_network(plan, costs, cluster, max_plays=10)
    planned = plan.model_copy(update={"transfers": schedule.transfers})
    read = Plan.from_json(planned.to_json())
    assert read == planned
    again = build_schedule(read).model_copy(update={"transfers": read.transfers})
    assert simulate(read, again, costs, cluster) == simulate(plan, schedule, costs, cluster)


def test_a_missing_link_is_an_error():
    plan = make_plan(2, [[1], [1]])
    cluster = make_cluster(plan.devices)
    costs = make_costs(plan, seconds=lambda *_: 1.0, num_bytes=lambda *_: 1)
    one_way = cluster.model_copy(update={"links": cluster.links[:1]})
    with pytest.raises(ValueError, match="no link from device 1 to device 0"):
        schedule_network(plan, costs, one_way)
    # Forwards only need the links down.
    assert len(schedule_network(plan, costs, one_way, training=False).transfers) == 4


# ---------------------------------------------------------------- the bound


@given(steps(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_no_order_beats_the_bound(step, seed):
    plan, costs, cluster = step
    # The bound is of the pipeline: inputs elsewhere only make it later.
    found = schedule_network(plan, costs, cluster, max_plays=20)
    bound_s = lower_bound_s(plan, found, costs, cluster)
    random = Random(seed)
    orders = [found] + [
        with_priorities(found, found.transfers, lambda t: random.random()) for _ in range(6)
    ]
    for schedule in orders:
        assert bound_s <= simulate(plan, schedule, costs, cluster).makespan_s * CLOSE
    fair = simulate(plan, found, costs, cluster, discipline="fair")
    assert bound_s <= fair.makespan_s * CLOSE


@given(st.integers(1, 6), st.sampled_from(["1f1b", "gpipe"]))
@settings(max_examples=10)
def test_bound_of_one_stage_is_its_work(num_microbatches, kind):
    plan = make_plan(1, [[1]], num_microbatches=num_microbatches, schedule_kind=kind)
    costs = make_costs(
        plan, seconds=lambda _, kind: {"F": 1.0, "B": 2.0}[kind], num_bytes=lambda *_: 0
    )
    bound_s = lower_bound_s(plan, build_schedule(plan), costs, make_cluster(plan.devices))
    assert bound_s == pytest.approx(3 * num_microbatches)


@given(st.data())
@settings(max_examples=30)
def test_bound_of_two_stages_without_contention_is_reached(data):
    plan = make_plan(
        2,
        [[1], [1]],
        num_microbatches=data.draw(st.integers(1, 6)),
        schedule_kind=data.draw(st.sampled_from(["1f1b", "gpipe"])),
    )
    # A message is under way for less than any compute: none ever waits for another.
    cluster = make_cluster(plan.devices, rate=1e7, latency_s=0.05)
    times = data.draw(st.lists(st.integers(2, 9), min_size=4, max_size=4))
    costs = make_costs(
        plan,
        seconds=lambda rank, kind: times[2 * rank + "FB".index(kind)] / 10,
        num_bytes=lambda *_: 1_000_000,
    )
    schedule = schedule_network(plan, costs, cluster)
    bound_s = lower_bound_s(plan, schedule, costs, cluster)
    assert simulate(plan, schedule, costs, cluster).makespan_s == pytest.approx(bound_s)


def test_bound_counts_what_one_channel_has_to_carry():
    # Both ways on one channel: 2 x 4 messages of a second each, before and behind 4 computes.
    plan = make_plan(2, [[1], [1]], num_microbatches=4, warmup=(4, 1))
    costs = make_costs(plan, seconds=lambda *_: 0.1, num_bytes=lambda *_: 1_000_000)
    alone = make_cluster(plan.devices)
    together = make_cluster(plan.devices, media_of=shared)
    bounds = [
        lower_bound_s(plan, build_schedule(plan), costs, cluster) for cluster in (alone, together)
    ]
    # First forward, last backward, and the eight messages.
    assert bounds[1] >= 8 + 0.2
    assert bounds[0] < bounds[1]
