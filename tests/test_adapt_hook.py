"""The adapter in a running job: it leaves a good plan alone, and a slow device behind."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest
import torch
from ranks import outcomes, run_ranks
from torch import nn
from torch.nn import functional as F  # noqa: N812

from dora import _C, DoraParallel
from dora.adapt import adapting
from dora.adapt.gauges import Paths
from dora.adapter import placed
from dora.runtime.buckets import BUCKETS_VARIABLE
from dora.spec import (
    BlockCost,
    BlockProfile,
    Cluster,
    Device,
    Link,
    Medium,
    ModelProfile,
    Plan,
    Replica,
    Stage,
    Timing,
    Workload,
)

pytestmark = pytest.mark.timeout(60)

NUM_BLOCKS, BATCH, WIDTH = 8, 8, 64
NAP_S = 0.001
RATE_BYTES_PER_S = 1e8
NAMES = ("d0", "d1", "d2")


class Nap(torch.autograd.Function):
    """Takes time in both directions, however busy the machine is, and changes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return grads[0], None


class Block(nn.Module):
    """A layer that takes `nap_s` on this process."""

    nap_s = NAP_S

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Nap.apply(torch.tanh(self.linear(x)), Block.nap_s)


def make_module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(NUM_BLOCKS)))


def make_cluster(n: int) -> Cluster:
    names = NAMES[:n]
    return Cluster(
        devices=tuple(
            Device(name=n, flops_per_s=1e10, mem_bandwidth_bytes_per_s=1e10, memory_bytes=10**9)
            for n in names
        ),
        media=(Medium(name="lan", rate_bytes_per_s=RATE_BYTES_PER_S, latency_s=1e-4),),
        links=tuple(Link(src=a, dst=b, media=("lan",)) for a in names for b in names if a != b),
    )


def make_profile(n: int, rows: int) -> ModelProfile:
    timings = tuple(Timing(device=n, forward_s=NAP_S, backward_s=NAP_S) for n in NAMES[:n])
    costs = tuple(
        BlockCost(microbatch_size=n, flops=1.0, output_bytes=4 * WIDTH * rows * n, timings=timings)
        for n in (1, 2, 4, 8)
    )
    number = WIDTH * (WIDTH + 1)
    block = {"num_params": number, "param_bytes": 4 * number, "trainable_bytes": 4 * number}
    return ModelProfile(
        blocks=tuple(BlockProfile(name=f"{i}", costs=costs, **block) for i in range(NUM_BLOCKS))
    )


def make_bank(n: int) -> list[Plan]:
    """Returns a pipeline of all devices, then what can do without the first, or without others."""

    def placed_on(*names: str) -> Plan:
        edges = [round(i * NUM_BLOCKS / len(names)) for i in range(len(names) + 1)]
        stages = tuple(
            Stage(
                index=i,
                first_block=edges[i],
                last_block=edges[i + 1] - 1,
                replicas=(Replica(device=name),),
            )
            for i, name in enumerate(names)
        )
        links = make_cluster(n).links
        return Plan(devices=NAMES[:n], stages=stages, num_microbatches=4, links=links)

    return [placed_on(*NAMES[:n]), placed_on(*NAMES[1:n]), *(placed_on(x) for x in NAMES[:n])]


def batches(steps: int, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, BATCH, rows, WIDTH, generator=random)) for _ in range(steps)]


def job(rank: int, n: int, kind: str, steps: int, options: dict[str, Any]) -> Any:
    """Returns (losses or outputs, placements over time, events).

    Args:
        rank: This process.
        n: Ranks.
        kind: 'train' or 'infer'.
        steps: Calls.
        options: `slow`: rank -> call before which it becomes slow; `dead`: call before which rank
            0 dies; `narrow`: before which the network becomes slow; `every` and `log` of
            `adapting`; the others are of `DoraParallel`.
    """
    slow, dead = options.pop("slow", {}), options.pop("dead", -1)
    narrow, network = options.pop("narrow", -1), options.pop("network", None)
    rows = 64 if network else 1
    if network:
        os.environ[BUCKETS_VARIABLE] = network
    bank = make_bank(n)
    adapter = adapting(
        make_profile(n, rows),
        make_cluster(n),
        Workload(kind=kind, batch_size=BATCH, num_microbatches=4),
        bank=bank,
        log=options.pop("log"),
        every=options.pop("every"),
    )
    data = batches(steps, rows)
    sample = data[0][0]
    model = DoraParallel(make_module(), bank[0], sample=sample, adapter=adapter, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    results, ran = [], []
    for step, (x, y) in enumerate(data):
        if slow.get(rank) == step:
            Block.nap_s = 8 * NAP_S
        if rank == 0 and step == narrow:
            _C.Buckets(network).set_rate(0, RATE_BYTES_PER_S / 100)
        if step == dead:
            model.snapshot()
        if rank == 0 and step == dead:
            os.kill(os.getpid(), signal.SIGKILL)
        results.append(call(model, optimizer, kind, x, y))
        ran.append(tuple(placed(model.plan)))
    model.close()
    return results, ran, list(model.events)


def call(model: DoraParallel, optimizer: torch.optim.Optimizer, kind: str, x: Any, y: Any) -> float:
    """Makes one step, or one request, and returns a number that tells its result."""
    if kind == "infer":
        with torch.no_grad():
            return float(model(x).square().sum())
    optimizer.zero_grad()
    loss = float(model.step(x, y, F.mse_loss))
    optimizer.step()
    return loss


def plain(kind: str, steps: int, rows: int = 1) -> list[float]:
    module, results = make_module(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(steps, rows):
        if kind == "infer":
            with torch.no_grad():
                results.append(float(module(x).square().sum()))
            continue
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        results.append(loss.item())
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "every"), [("train", 1), ("infer", None)])
def test_nothing_changes_when_all_is_as_predicted(kind, every, tmp_path):
    options = {"every": every, "log": str(tmp_path / "log")}
    for results, ran, events in run_ranks(2, job, 2, kind, 30, options, timeout_s=40):
        assert events == []
        assert set(ran) == {("d0", "d1")}
        assert results == pytest.approx(plain(kind, 30), rel=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("train", marks=pytest.mark.slow), "infer"])
def test_a_slow_device_is_left_behind(kind, tmp_path):
    log = tmp_path / "decisions.jsonl"
    options = {"slow": {1: 15}, "every": 1, "log": str(log)}
    found = run_ranks(2, job, 2, kind, 40, options, timeout_s=50)
    wanted = plain(kind, 40)
    for results, ran, events in found:
        assert set(ran[:15]) == {("d0", "d1")}
        assert ran[-1] == ("d0",)
        assert [event.kind for event in events] == ["switch"]
        assert "saves" in events[0].text
        assert results == pytest.approx(wanted, rel=1e-5)
    # For inference all weights had come before.
    assert (found[0][2][0].num_bytes == 0) == (kind == "infer")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    made = [line for line in lines if line["decision"]["kind"] == "switch"]
    assert [line["decision"]["plans"] for line in made] == [["d0 0-7"]]
    assert made[0]["decision"]["reason"] == found[0][2][0].text
    seen = {one["name"]: one["factor"] for one in made[0]["seen"]}
    assert seen["d1"] < 0.5


@pytest.mark.slow
def test_a_slow_network_is_left_alone(tmp_path):
    log, network = tmp_path / "log", tmp_path / "network"
    network.touch()
    _C.Buckets.create(str(network), 2, [RATE_BYTES_PER_S], {(0, 1): [0], (1, 0): [0]})
    options = {"every": 1, "log": str(log), "network": str(network), "narrow": 10}
    for results, ran, events in run_ranks(2, job, 2, "train", 40, options, timeout_s=50):
        assert set(ran[:10]) == {("d0", "d1")}
        assert ran[-1] in (("d0",), ("d1",))
        assert [event.kind for event in events] == ["switch"]
        assert results == pytest.approx(plain("train", 40, 64), rel=1e-5)
    line = json.loads(log.read_text().splitlines()[-1])
    seen = {one["name"]: one["factor"] for one in line["seen"]}
    assert seen["lan"] == pytest.approx(0.01, rel=0.2)


@pytest.mark.slow
def test_another_rank_decides_when_the_lowest_is_lost(tmp_path):
    options = {
        "slow": {2: 30}, "every": 1, "log": str(tmp_path / "log"), "dead": 12,
        "snapshot_interval": 1, "bank": make_bank(3)[1:2],
    }  # fmt: skip
    first, *others = outcomes(3, job, 3, "train", 60, options, timeout_s=50)
    assert first.exitcode == -signal.SIGKILL
    for outcome in others:
        assert outcome.error is None, outcome.trace
        results, ran, events = outcome.value
        assert [event.kind for event in events][0] == "recovery"
        # A search in the background may have found something better than the bank has.
        assert set(ran[12:30]) == {("d1", "d2")}
        assert ran[-1] == ("d1",)
        assert results == pytest.approx(plain("train", 60), rel=1e-5)


def test_what_can_not_be_done_is_refused():
    given = make_profile(2, 1), make_cluster(2)
    with pytest.raises(ValueError, match="given kind 'generate'"):
        adapting(*given, Workload(kind="generate", batch_size=1, prompt_tokens=1, new_tokens=1))


def test_paths_tell_of_their_media():
    names = ("a", "b", "c")
    cluster = Cluster(
        devices=tuple(
            Device(name=n, flops_per_s=1e9, mem_bandwidth_bytes_per_s=1e9, memory_bytes=10**9)
            for n in names
        ),
        media=(
            Medium(name="wifi", rate_bytes_per_s=1e7, latency_s=2e-3),
            Medium(name="lan", rate_bytes_per_s=1e8, latency_s=1e-5),
        ),
        links=(
            Link(src="a", dst="b", media=("wifi", "lan")),
            Link(src="b", dst="a", media=("wifi", "wifi")),
            Link(src="b", dst="c", media=("lan",)),
        ),
    )
    paths = Paths(cluster)
    # Twice over the channel is half of its rate; the path that shows most counts.
    rates = {0: [0.0, 2e6, 0.0], 1: [2e6, 0.0, 5e7], 2: [1e9, 0.0, 0.0]}
    assert paths.rates(rates) == pytest.approx({"wifi": 0.4, "lan": 0.5})
    trips = {0: [0.0, 8.04e-3, 0.0], 1: [1.6e-2, 0.0, 1.0], 2: [0.0, 0.0, 0.0]}
    assert paths.delays(trips) == pytest.approx({"wifi": 2.0})
