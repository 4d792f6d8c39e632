"""What a profile says beside its blocks: the runtime's own time, and what a rest is good for."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dora import _C
from dora.partition import partition
from dora.planner.predict import Group, Layout, evaluate, setting
from dora.profiler import merge_profiles, profile_model
from dora.runtime.overhead import measure_overhead
from dora.spec import (
    BlockCost,
    BlockProfile,
    Cluster,
    Device,
    ModelProfile,
    Overhead,
    Timing,
    Workload,
)

pytestmark = pytest.mark.timeout(120)
SAMPLE = (torch.ones(2, 8),)


def model(num_blocks: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(num_blocks)))


def program(*, saved_s: float, sprint: float) -> _C.Program:
    network = _C.Network(1)
    network.set_rest(0, saved_s, sprint)
    return _C.Program(network)


@given(st.floats(0, 10), st.floats(1, 20), st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
def test_rest_is_used_up_once_by_computes_that_follow_each_other(saved_s, sprint, durations_s):
    step = program(saved_s=saved_s, sprint=sprint)
    for duration_s in durations_s:
        step.compute(0, duration_s)
    work_s = sum(durations_s)
    expected_s = work_s - min(saved_s, work_s * (1 - 1 / sprint))
    assert step.play().end_s == pytest.approx(expected_s)


@given(st.floats(0.1, 10), st.floats(1.5, 20), st.floats(0, 20))
def test_rest_comes_back_by_waiting(saved_s, sprint, wait_s):
    step = program(saved_s=saved_s, sprint=sprint)
    work_s = 100.0
    step.compute(0, work_s)
    begin_s = work_s - saved_s + wait_s
    step.compute(0, work_s, not_before_s=begin_s)
    expected_s = begin_s + work_s - min(saved_s, wait_s)
    assert step.play().end_s == pytest.approx(expected_s)


@pytest.mark.parametrize(("saved_s", "sprint"), [(-1.0, 2.0), (1.0, 0.5), (float("nan"), 2.0)])
def test_rest_that_makes_no_sense_is_an_error(saved_s, sprint):
    with pytest.raises(ValueError, match="rest"):
        _C.Network(1).set_rest(0, saved_s, sprint)


def make_device(name: str) -> Device:
    sizes = {"memory_bytes": 1 << 30, "mem_bandwidth_bytes_per_s": 1e9}
    return Device(name=name, flops_per_s=1e9, **sizes)


def test_overheads_are_priced_by_action_and_message():
    names = ["a", "b", "c"]
    cost = BlockCost(
        microbatch_size=1,
        flops=1,
        timings=tuple(Timing(device=n, forward_s=1.0, backward_s=2.0) for n in names),
    )
    blocks = tuple(BlockProfile(name=f"{i}", costs=(cost,)) for i in range(3))
    plain = ModelProfile(blocks=blocks)
    laden = plain.model_copy(
        update={"overheads": tuple(Overhead(device=n, action_s=0.1, message_s=0.01) for n in names)}
    )
    media = [{"name": "lan", "rate_bytes_per_s": 1e9}]
    links = [{"src": a, "dst": b, "media": ["lan"]} for a in names for b in names if a != b]
    cluster = Cluster.model_validate(
        {
            "devices": [make_device(n) for n in names],
            "media": media,
            "links": links,
        }
    )
    layout = Layout(tuple(Group(i, i + 1, (i,)) for i in range(3)), ((1,),) * 3, (1, 1, 1), "1f1b")
    workload = Workload(batch_size=1)
    times_s = [
        evaluate(layout, setting(profile, cluster, workload, 1)).makespan_s
        for profile in (plain, laden)
    ]
    # Three stages, forward and backward; the inner one has two messages each time.
    assert times_s[1] - times_s[0] == pytest.approx(2 * (3 * 0.1 + 4 * 0.01))


def test_profile_without_overheads_is_read_as_before():
    cost = BlockCost(microbatch_size=1, flops=1)
    profile = ModelProfile(blocks=(BlockProfile(name="a", costs=(cost,)),))
    body = json.loads(profile.to_json())
    body.pop("overheads", None)
    assert ModelProfile.from_json(json.dumps(body)) == profile


@pytest.mark.parametrize("training", [True, False])
def test_profile_measures_the_runtime_and_leaves_the_model_alone(training):
    module = model()
    before = [p.detach().clone() for p in module.parameters()]
    marks = [torch.ones_like(p) for p in module.parameters()]
    for p, mark in zip(module.parameters(), marks, strict=True):
        p.grad = mark
    torch.manual_seed(3)
    state = torch.get_rng_state()
    chain = partition(module, SAMPLE)
    profile = profile_model(
        chain,
        SAMPLE,
        device_name="here",
        microbatch_sizes=(1,),
        training=training,
        overhead=measure_overhead,
    )
    (overhead,) = profile.overheads
    assert overhead.device == "here"
    assert overhead.message_s > 0
    assert torch.equal(torch.get_rng_state(), state)
    for p, mark, value in zip(module.parameters(), marks, before, strict=True):
        assert p.grad is mark
        assert torch.equal(mark, torch.ones_like(p))
        assert torch.equal(p, value)


def test_two_blocks_have_no_middle():
    assert measure_overhead(partition(model(2), SAMPLE), SAMPLE, {}, True) == (0.0, 0.0)


def test_merged_profiles_keep_every_overhead():
    def measured(name: str) -> ModelProfile:
        timing = Timing(device=name, forward_s=1.0)
        cost = BlockCost(microbatch_size=1, flops=1, timings=(timing,))
        blocks = (BlockProfile(name="a", costs=(cost,)),)
        return ModelProfile(blocks=blocks, overheads=(Overhead(device=name, action_s=0.5),))

    merged = merge_profiles([measured("a"), measured("b")]).overheads
    assert [overhead.device for overhead in merged] == ["a", "b"]
