"""Dora against other planners, all executed alike."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dora.catalog import cell_profile, scenario
from dora.compare import SINGLE, Comparison, compare, reasons
from dora.errors import InfeasiblePlanError
from dora.judge import Entry, case_of, judge, play
from dora.planner import predict
from dora.planner.baselines import BASELINES
from dora.spec import (
    BlockCost,
    BlockProfile,
    Cluster,
    Device,
    Link,
    Medium,
    ModelProfile,
    Plan,
    QoE,
    Replica,
    Stage,
    Timing,
    Workload,
)

NAMES = ("a", "b", "c")


def cluster(rate: float = 1e6, memory: int = 10**9, **medium: float) -> Cluster:
    """Three devices on one channel, which every message crosses twice."""
    devices = tuple(
        Device(
            name=name, flops_per_s=1e12, mem_bandwidth_bytes_per_s=1e11, memory_bytes=memory,
            idle_w=1.0, busy_w=watts,
        )
        for name, watts in zip(NAMES, (20.0, 10.0, 3.0), strict=True)
    )  # fmt: skip
    links = tuple(
        Link(src=a, dst=b, media=("wifi", "wifi")) for a in NAMES for b in NAMES if a != b
    )
    media = (Medium(name="wifi", rate_bytes_per_s=rate, latency_s=1e-3, **medium),)
    return Cluster(devices=devices, media=media, links=links)


def model(num_blocks: int = 4, sent: int = 1000) -> ModelProfile:
    times = zip(NAMES, (0.01, 0.02, 0.03), strict=True)
    timings = tuple(Timing(device=n, forward_s=s, backward_s=2 * s) for n, s in times)
    cost = BlockCost(
        microbatch_size=1, flops=1e6, activation_bytes=1000, output_bytes=sent, timings=timings
    )
    block = BlockProfile(
        name="block", num_params=1000, param_bytes=4000, trainable_bytes=4000, costs=(cost,)
    )
    return ModelProfile(blocks=(block,) * num_blocks, input_bytes=sent)


def alone(name: str, num_blocks: int = 4, **fields: int) -> Plan:
    replica = Replica(device=name)
    stage = Stage(index=0, first_block=0, last_block=num_blocks - 1, replicas=(replica,))
    return Plan(devices=NAMES, stages=(stage,), **fields)


def pipeline(num_microbatches: int = 4) -> Plan:
    stages = tuple(
        Stage(index=s, first_block=2 * s, last_block=2 * s + 1, replicas=(Replica(device=name),))
        for s, name in enumerate("ab")
    )
    return Plan(devices=NAMES, stages=stages, num_microbatches=num_microbatches)


TRAIN = Workload(batch_size=8)


def test_every_planner_answers_and_gains_are_ratios_of_values():
    found = compare(model(), cluster(), TRAIN)
    assert [entry.planner for entry in found.rivals] == list(BASELINES)
    assert found.single.planner == SINGLE
    for entry in (*found.rivals, found.single):
        if entry.can_run:
            assert entry.gain == pytest.approx(entry.value("time") / found.dora.value("time"))
    assert found.dora.gain == 1.0
    assert found.gain is not None and found.gain >= 1 - 1e-9
    assert not found.is_worse
    assert Comparison.from_json(found.to_json()) == found


@settings(max_examples=10)
@example(10_000.0, 100, "energy")  # nothing keeps the bound: a farther plan may well take less
@given(st.floats(1e4, 1e8), st.integers(100, 100_000), st.sampled_from(["time", "energy"]))
def test_dora_is_never_worse_and_meets_what_anyone_meets(rate, sent, objective):
    qoe = QoE(step_s=0.7, objective=objective)
    found = compare(model(sent=sent), cluster(rate), TRAIN, qoe, effort_s=0.05)
    assert not found.is_worse
    assert not found.is_missed


def test_truth_of_a_plan_is_the_prediction_under_priority():
    plan = pipeline()
    case = case_of(model(), cluster(), TRAIN, QoE())
    found = judge(Entry(planner="mine", plan=plan), case)
    told = predict(model(), cluster(), TRAIN, plan).cost
    assert found.value("time") <= told.makespan_s * (1 + 1e-9)
    if found.discipline == "priority":
        assert found.plan.cost == told


def test_fair_sharing_counts_where_it_is_better_and_alone_if_asked():
    case = case_of(model(sent=100_000), cluster(), TRAIN, QoE())
    best = judge(Entry(planner="mine", plan=pipeline()), case)
    fair = judge(Entry(planner="mine", plan=pipeline()), case, fair_only=True)
    assert fair.discipline == "fair"
    assert best.value("time") <= fair.value("time")
    longer_s = fair.value("time") - best.value("time")
    # Two devices that wait at one watt each.
    assert fair.value("energy") - best.value("energy") == pytest.approx(2 * longer_s)


def test_time_is_that_of_the_slow_network_at_a_high_percentile():
    slow = cluster(rate_p10_bytes_per_s=1e5)
    values = [
        judge(
            Entry(planner="mine", plan=pipeline()),
            case_of(model(), slow, TRAIN, QoE(percentile=percentile)),
        ).value("time")
        for percentile in (50, 90)
    ]
    assert values[0] < values[1]


def test_rival_without_the_memory_says_so():
    # Room for one micro-batch's activations, not for those of a whole batch.
    found = compare(
        model(), cluster(memory=200_000), Workload(batch_size=64), QoE(),
        planners={"greedy": lambda *_: alone("a", num_microbatches=1)},
    )  # fmt: skip
    # Cutting the batch is free, so the rival may do it too.
    assert found.rivals[0].can_run
    assert found.rivals[0].plan.num_microbatches > 1
    tiny = compare(
        model(), cluster(memory=60_000), TRAIN, QoE(), planners={"greedy": lambda *_: alone("a")}
    )
    assert tiny.rivals[0].problem.startswith("memory: a needs")
    assert tiny.rivals[0].gain is None
    assert not tiny.is_worse


def test_rival_without_a_plan_says_why():
    def none(*_: object) -> Plan:
        raise InfeasiblePlanError("nothing fits")

    found = compare(model(), cluster(), TRAIN, planners={"none": none})
    assert found.rivals[0].problem == "nothing fits"
    assert found.best_rival is None
    assert found.gain is None
    assert reasons(found) == []


def test_unreachable_qoe_compares_the_nearest_plan():
    found = compare(model(), cluster(), TRAIN, QoE(step_s=1e-3))
    assert not found.dora.meets_qoe
    assert found.dora.broken
    assert found.dora.can_run
    assert not found.is_missed


def test_plan_that_breaks_the_bound_is_no_rival_in_joules():
    # Device c takes the least energy, and too long.
    qoe = QoE(step_s=0.97, objective="energy")
    found = compare(model(), cluster(), TRAIN, qoe, planners={"lazy": lambda *_: alone("c")})
    lazy = found.rivals[0]
    assert lazy.can_run and lazy.broken
    assert lazy.gain < 1
    assert found.gain is None
    assert not found.is_worse


def test_energy_without_a_bound_is_compared_at_the_time_of_the_fastest_rival():
    planners = {"fast": lambda *_: alone("a"), "slow": lambda *_: alone("c")}
    found = compare(model(), cluster(), TRAIN, QoE(objective="energy"), planners=planners)
    assert found.qoe.step_s == pytest.approx(8 * 4 * 0.03)
    assert "step_s" in found.note
    assert found.dora.value("time") <= found.qoe.step_s * (1 + 1e-9)


def test_single_device_is_the_best_for_the_objective():
    qoe = QoE(step_s=100.0, objective="energy")
    assert compare(model(), cluster(), TRAIN, qoe).single.plan.stages[0].replicas[0].device == "c"
    assert compare(model(), cluster(), TRAIN).single.plan.stages[0].replicas[0].device == "a"


def test_small_gain_is_explained():
    slow = cluster(rate=1e2)
    found = compare(model(), slow, TRAIN)
    assert reasons(found)[:2] == ["one device is best", "planners agree on the plan"]
    rich = compare(model(), cluster(rate=1e9), TRAIN, planners={"a": lambda *_: alone("a")})
    assert rich.gain > 1.1
    assert reasons(rich) == []


def test_generate_cell_keeps_its_token_times():
    home = scenario("smart-home-1")
    cell = next(c for c in home.cells if c.workload.kind == "generate")
    found = compare(
        cell_profile(cell, home.cluster), home.cluster, cell.workload, cell.qoe, effort_s=0.1
    )
    for entry in (found.dora, *found.rivals):
        if entry.can_run:
            cost = entry.plan.cost
            assert cost.makespan_s > cost.ttft_s > 0 and cost.tpot_s > 0
    assert not found.is_worse


def test_play_shows_the_same_time():
    case = case_of(model(), cluster(), TRAIN, QoE())
    found = compare(model(), cluster(), TRAIN)
    assert play(found.dora.plan, case).makespan_s >= found.dora.value("time") * (1 - 1e-9)
