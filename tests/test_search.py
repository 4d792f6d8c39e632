from __future__ import annotations

import pytest
import torch
from ranks import outcomes, run_ranks
from torch import nn

from dora import DoraParallel
from dora.errors import InfeasiblePlanError, SpecError
from dora.files import save
from dora.partition import partition
from dora.profiler import profile_model
from dora.search import explore, measured_devices, microbatch_sizes, planned
from dora.spec import Cluster, Device, Link, Medium, ModelProfile, QoE, Workload


def make_cluster(n: int = 2) -> Cluster:
    names = [f"d{i}" for i in range(n)]
    return Cluster(
        devices=tuple(
            Device(name=name, flops_per_s=1e10, mem_bandwidth_bytes_per_s=1e10, memory_bytes=10**9)
            for name in names
        ),
        media=(Medium(name="lan", rate_bytes_per_s=1e9, latency_s=1e-5),),
        links=tuple(Link(src=a, dst=b, media=("lan",)) for a in names for b in names if a != b),
    )


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def make_profile(*, training: bool = True, name: str = "d0") -> ModelProfile:
    x = torch.randn(4, 16)
    return profile_model(
        partition(make_model(), (x,)),
        (x,),
        device_name=name,
        microbatch_sizes=(1, 4),
        training=training,
        warmup=0,
        repeats=1,
    )


def plan_and_step(rank: int, profiles: tuple[str, ...]) -> tuple[str, float]:
    workload = Workload(batch_size=4)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    plan = planned(make_cluster(), workload, profiles=profiles)
    model = DoraParallel(make_model(), plan, sample=x)
    loss = model.step(x, x, nn.functional.mse_loss)
    assert model.plan.cost is not None
    return model.plan.to_json(), float(loss)


def test_ranks_measure_themselves_and_find_one_plan():
    results = run_ranks(2, plan_and_step, ())
    assert results[0] == results[1]
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.mse_loss(make_model()(x), x).item()
    assert results[0][1] == pytest.approx(expected, rel=1e-5)


def test_ranks_plan_from_files(tmp_path):
    save(make_profile(), tmp_path / "d0.json")
    results = run_ranks(2, plan_and_step, (str(tmp_path / "d0.json"),))
    assert results[0] == results[1]


def test_plans_know_the_media_of_their_cluster():
    cluster = make_cluster()
    found = explore(make_profile(), cluster, Workload(batch_size=4))
    assert found.plans
    assert all(plan.links == cluster.links for plan in found.plans)


def plan_for_three(rank: int) -> None:
    DoraParallel(make_model(), planned(make_cluster(3), Workload()), sample=torch.zeros(4, 16))


def plan_the_impossible(rank: int) -> None:
    plan = planned(make_cluster(), Workload(batch_size=4), QoE(step_s=1e-12))
    DoraParallel(make_model(), plan, sample=torch.zeros(4, 16))


@pytest.mark.parametrize(
    ("function", "message"),
    [(plan_for_three, "given 3 devices for 2 ranks"), (plan_the_impossible, "step_s <= 1e-12")],
)
def test_all_ranks_say_why_there_is_no_plan(function, message):
    for outcome in outcomes(2, function):
        assert isinstance(outcome.error, InfeasiblePlanError)
        assert message in str(outcome.error)


def test_devices_without_times_are_modelled():
    profile = make_profile()
    assert measured_devices(profile) == ("d0",)
    found = explore(profile, make_cluster(3), Workload(batch_size=4))
    assert found.plans
    assert found.best_single is not None


def test_inference_profile_can_not_plan_training():
    with pytest.raises(SpecError, match="forward times only for d0"):
        explore(make_profile(training=False), make_cluster(), Workload(batch_size=4))
    workload = Workload(kind="infer", batch_size=4)
    assert explore(make_profile(training=False), make_cluster(), workload).plans


@pytest.mark.parametrize(
    ("workload", "sizes"),
    [
        (Workload(batch_size=1), (1,)),
        (Workload(batch_size=8), (1, 2, 4, 8)),
        (Workload(batch_size=64), (1, 4, 16, 64)),
        (Workload(batch_size=7, num_microbatches=3), (3,)),
    ],
)
def test_few_sizes_are_measured(workload, sizes):
    assert microbatch_sizes(workload) == sizes
