"""Operations wait for the GPU without holding anybody up, and keep their order."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.distributed as dist
from models import make
from plans import make_plan
from ranks import run_ranks
from torch.utils._pytree import tree_map_only

from dora import DoraParallel, partition
from dora.runtime.batch import as_call
from dora.runtime.staging import Launch, Launcher, Staging


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self) -> None:
        self._done = threading.Event()

    def query(self) -> bool:
        return self._done.is_set()

    def synchronize(self) -> None:
        assert self._done.wait(20)

    def record(self) -> None:
        self._done.set()


@pytest.fixture
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.close()


def test_launcher_posts_at_once_when_nothing_waits(launcher):
    assert launcher.post(lambda: "operation", None) == "operation"
    event = Event()
    event.record()
    assert launcher.post(lambda: "operation", event) == "operation"


def test_launcher_keeps_the_order(launcher):
    posted, first, second = [], Event(), Event()
    launches = [
        launcher.post(lambda: posted.append("first") or "1", first),
        launcher.post(lambda: posted.append("cpu") or "2", None),
        launcher.post(lambda: posted.append("second") or "3", second),
    ]
    second.record()
    assert all(isinstance(launch, Launch) for launch in launches)
    assert not launches[1].wait(0.05)
    assert posted == []
    first.record()
    assert all(launch.wait(20) for launch in launches)
    assert posted == ["first", "cpu", "second"]
    assert [launch.operation for launch in launches] == ["1", "2", "3"]


def test_launcher_reports_what_could_not_be_posted(launcher):
    def fail():
        raise ValueError("no such peer")

    event, told = Event(), threading.Event()
    launch = launcher.post(fail, event)
    launch.then(told.set)
    event.record()
    assert told.wait(20)
    assert launch.operation is None
    assert str(launch.error) == "no such peer"


def test_staging_leaves_cpu_tensors_alone():
    stage, x = Staging(), torch.ones(3)
    assert stage.reads(x) is stage.writes(x) is stage.updates(x) is x
    assert stage.event is None
    stage.finish()


def on_gpu(rank: int) -> None:
    x = torch.full((1000, 1000), float(rank + 1), device="cuda")
    for _ in range(10):  # what is sent is computed on the stream, after the call that sends it
        x = x @ torch.eye(1000, device="cuda")
    if rank == 0:
        works = [dist.isend(x, 1, tag=1)]
    else:
        y = torch.zeros_like(x)
        works = [dist.irecv(y, 0, tag=1)]
    works.append(dist.all_reduce(x, async_op=True))
    works.append(dist.all_reduce(torch.ones(3), async_op=True))
    gathered = [torch.empty(4, device="cuda") for _ in range(2)]
    dist.all_gather(gathered, torch.full((4,), float(rank), device="cuda"))
    for work in works:
        work.wait()
    assert (x == 3).all()
    assert [g[0].item() for g in gathered] == [0, 1]
    if rank == 1:
        assert (y == 1).all()
    part = torch.empty(2, device="cuda")
    dist.reduce_scatter_tensor(part, torch.arange(4.0, device="cuda"), op=dist.ReduceOp.AVG)
    assert part.tolist() == [2 * rank, 2 * rank + 1]
    future = dist.all_reduce(part, async_op=True).get_future()
    assert future.wait()[0].tolist() == [2, 4]


def odd_messages(rank: int) -> None:
    works, received = [], []
    cases = [*itertools.product((0, 1, 1001, 1_048_577), (torch.float32, torch.bfloat16))]
    torch.cuda._sleep(500_000_000)  # nothing below is there yet when it is sent
    for tag, (count, dtype) in enumerate(cases):
        x = (torch.arange(count, device="cuda") + rank).to(dtype)
        works.append(dist.isend(x, 1 - rank, tag=tag))
        y = torch.zeros_like(x)
        works.append(dist.irecv(y, 1 - rank, tag=tag))
        received.append(y)
    for work in works:
        work.wait()
    for y, (count, dtype) in zip(received, cases, strict=True):
        assert torch.equal(y.cpu(), (torch.arange(count) + 1 - rank).to(dtype)), (count, dtype)


def train(rank: int, shares: list[list[int]]) -> float:
    """Returns the largest relative difference of losses and gradients from the plain module's."""
    ours, plain = make("gpt2"), make("gpt2")
    for case in (ours, plain):
        case.module.cuda()
        case.inputs, case.targets = tree_map_only(
            torch.Tensor, torch.Tensor.cuda, (case.inputs, case.targets)
        )
    args, kwargs = as_call(ours.inputs)
    chain = partition(ours.module, args, kwargs)
    model = DoraParallel(chain, make_plan(chain.num_blocks, shares), transport="dora")
    optimizers = [torch.optim.SGD(x.parameters(), 0.05) for x in (model, plain.module)]
    worst = 0.0
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model.step(ours.inputs, ours.targets, ours.loss_fn).item()
        expected = plain.loss_fn(plain.module(*args, **kwargs), plain.targets)
        expected.backward()
        grads = {name: p.grad for name, p in plain.module.named_parameters()}
        worst = max(worst, abs(loss / expected.item() - 1))
        for name, parameter in model.named_parameters():
            difference = (parameter.grad - grads[name]).abs().max() / grads[name].abs().max()
            worst = max(worst, difference.item())
        for optimizer in optimizers:
            optimizer.step()
    return worst


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.mark.cuda
@pytest.mark.parametrize("function", [on_gpu, odd_messages])
def test_cuda_tensors_travel(function):
    needs_gpu()
    run_ranks(2, function, backend="dora")


@pytest.mark.cuda
@pytest.mark.parametrize("shares", [[[1], [1]], [[1, 1], [1]]], ids=["two", "two_to_one"])
@pytest.mark.parametrize("backend", ["gloo", "dora"])
def test_training_on_a_gpu_equals_the_plain_module(backend, shares):
    needs_gpu()
    world_size = sum(len(row) for row in shares)
    assert max(run_ranks(world_size, train, shares, backend=backend)) <= 1e-5
