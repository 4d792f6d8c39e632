"""The torch.distributed backend "dora", as users and torch's own parts call it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import join, outcomes, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from dora.errors import PeerLostError, ProtocolError
from dora.runtime.priority import URGENT, chosen, priority
from dora.runtime.process_group import DoraProcessGroup

pytestmark = pytest.mark.timeout(120)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8]


def run(world_size, function, *args, **options):
    return run_ranks(world_size, function, *args, backend="dora", **options)


# ------------------------------------------------------------ messages


def ping(rank: int) -> str:
    tensor = torch.arange(10) * (rank + 1)
    if rank == 0:
        dist.send(tensor, 1, tag=7)
        dist.recv(tensor, 1, tag=7)
        assert torch.equal(tensor, torch.arange(10) * 2)
    else:
        other = torch.empty_like(tensor)
        assert dist.recv(other, 0, tag=7) == 0
        assert torch.equal(other, torch.arange(10))
        dist.send(tensor, 0, tag=7)
    return dist.get_backend()


def test_messages_arrive():
    assert run(2, ping) == ["dora", "dora"]


def polled(rank: int) -> None:
    tensor = torch.full((100_000,), float(rank))
    work = dist.isend(tensor, 1) if rank == 0 else dist.irecv(tensor, 0)
    while not work.is_completed():
        time.sleep(0.001)
    assert work.is_success()
    assert tensor[5] == 0


def test_messages_complete_without_wait():
    run(2, polled)


def out_of_order(rank: int) -> None:
    tensors = [torch.full((5000 * (tag + 1),), float(tag)) for tag in range(6)]
    if rank == 0:
        works = [dist.isend(x, 1, tag=tag) for tag, x in enumerate(tensors)]
    else:
        received = [torch.empty_like(x) for x in tensors]
        works = [dist.irecv(received[tag], 0, tag=tag) for tag in (4, 0, 5, 2, 1, 3)]
    for work in works:
        work.wait()
    if rank == 1:
        assert all(torch.equal(x, y) for x, y in zip(tensors, received, strict=True))


def test_tags_match_in_any_order():
    run(2, out_of_order)


def with_priorities(rank: int) -> None:
    classes = [0, 1, 4, 2, 3]
    tensors = [torch.full((2000,), float(i)) for i in range(len(classes))]
    works = []
    for i, (traffic_class, x) in enumerate(zip(classes, tensors, strict=True)):
        # Only the sender says how urgent it is; the match is by the rest of the tag.
        if rank == 0:
            works.append(dist.isend(x, 1, tag=traffic_class << 28 | i))
        else:
            works.append(dist.irecv(x.zero_(), 0, tag=i))
    with priority(URGENT.traffic_class, deadline=0.5):
        assert chosen()[:2] == (1, 0.5)
        dist.all_reduce(torch.ones(3))
    assert chosen() is None
    for work in works:
        work.wait()
    assert [x[0].item() for x in tensors] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="traffic_class: given 5"):
        dist.isend(tensors[0], 1 - rank, tag=5 << 28)


def test_priority_is_not_part_of_the_match():
    run(2, with_priorities)


def from_anybody(rank: int) -> None:
    if rank > 0:
        dist.send(torch.tensor([rank]), 0, tag=3)
        return
    sources = []
    for _ in range(2):
        tensor = torch.empty(1, dtype=torch.int64)
        sources.append(dist.recv(tensor, tag=3))
        assert tensor.item() == sources[-1]
    assert sorted(sources) == [1, 2]


def test_receive_from_any_source_names_the_sender():
    run(3, from_anybody)


def batched(rank: int) -> None:
    size = dist.get_world_size()
    right, left = (rank + 1) % size, (rank - 1) % size
    mine, theirs = torch.full((1000,), float(rank)), torch.empty(1000)
    ops = [dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, theirs, left)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert torch.equal(theirs, torch.full((1000,), float(left)))


def test_batches_of_messages():
    run(3, batched)


def with_futures(rank: int) -> None:
    tensor = torch.full((4,), float(rank))
    work = dist.isend(tensor, 1) if rank == 0 else dist.irecv(tensor, 0)
    total = work.get_future().then(lambda future: future.value()[0].sum().item())
    assert total.wait() == 0
    reduced = dist.all_reduce(torch.ones(2) * rank, async_op=True).get_future()
    assert torch.equal(reduced.wait()[0], torch.ones(2))


def test_futures_yield_the_tensors():
    run(2, with_futures)


def refused(rank: int) -> list[str]:
    said = []
    for call in (
        lambda: dist.isend(torch.ones(4, 4).t(), 1 - rank),
        lambda: dist.isend(torch.ones(2), 1 - rank, tag=-1),
        lambda: dist.all_reduce(torch.ones(4, 4)[:, 1]),
        lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32), op=dist.ReduceOp.BAND),
        lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32), op=dist.ReduceOp.AVG),
        lambda: dist.isend(torch.ones(2).to_sparse(), 1 - rank),
        lambda: dist.isend(torch.ones(2), rank),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    dist.barrier()  # none of it broke the group
    return said


def test_misuse_is_refused():
    for said in run(2, refused):
        strided, tag, column, bits, average, sparse, self_send = said
        assert "pass tensor.contiguous()" in strided
        assert tag == "tag: given -1, allowed: 0 or more"
        assert "contiguous" in column
        assert "BAND" in bits
        assert "allowed: SUM, AVG, PRODUCT, MIN or MAX" in bits
        assert "then divide" in average
        assert "sparse" in sparse
        assert "another rank from 0 to 1" in self_send


def other_sizes(rank: int) -> None:
    tensor = torch.ones(10 + rank)
    (dist.isend(tensor, 1) if rank == 0 else dist.irecv(tensor, 0)).wait()


def test_different_sizes_are_a_protocol_error():
    errors = [o.error for o in outcomes(2, other_sizes, backend="dora")]
    assert isinstance(errors[1], ProtocolError), errors
    assert "rank 1: receive with rank 0 failed" in str(errors[1])


# ------------------------------------------------------------ collectives


def against_gloo(rank: int) -> None:
    gloo = dist.new_group(backend="gloo")
    size = dist.get_world_size()
    torch.manual_seed(rank)
    for dtype in DTYPES:
        x = (torch.rand(size * 6) * 8).to(dtype)
        for call in (
            lambda x, g: dist.all_reduce(x, group=g),
            lambda x, g: dist.all_reduce(x, op=dist.ReduceOp.MAX, group=g),
            lambda x, g: dist.all_reduce(x, op=dist.ReduceOp.MIN, group=g),
            lambda x, g: dist.broadcast(x, size - 1, group=g),
            lambda x, g: dist.all_gather(list(x.chunk(size)), x[:6] + rank, group=g),
            lambda x, g: dist.all_gather_into_tensor(x, x[:6] + rank, group=g),
            lambda x, g: dist.scatter(
                x[:6], [*x.clone().chunk(size)] if rank == 1 else None, src=1, group=g
            ),
            lambda x, g: dist.gather(
                x[:6].clone(), [*x.chunk(size)] if rank == 1 else None, dst=1, group=g
            ),
            lambda x, g: dist.all_to_all_single(x, x.clone() + rank, group=g),
        ):
            ours, theirs = x.clone(), x.clone()
            call(ours, None)
            call(theirs, gloo)
            torch.testing.assert_close(ours, theirs)
    dist.destroy_process_group(gloo)


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_equal_those_of_gloo(world_size):
    run(world_size, against_gloo)


def closed_forms(rank: int) -> None:
    size = dist.get_world_size()
    total = sum(range(size))

    average = torch.full((3,), float(rank))
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    torch.testing.assert_close(average, torch.full((3,), total / size))

    tensor = torch.full((3,), float(rank))
    dist.reduce(tensor, 1)
    assert torch.equal(tensor, torch.full((3,), float(total if rank == 1 else rank)))

    for op, factor in ((dist.ReduceOp.SUM, 1), (dist.ReduceOp.AVG, size)):
        part = torch.empty(2)
        dist.reduce_scatter_tensor(part, torch.arange(2.0 * size) + rank, op=op)
        expected = ((torch.arange(2.0) + 2 * rank) * size + total) / factor
        torch.testing.assert_close(part, expected)
        dist.reduce_scatter(part, [torch.full((2,), float(rank + i)) for i in range(size)], op=op)
        torch.testing.assert_close(part, torch.full((2,), (total + size * rank) / factor))

    # Uneven parts: rank r sends d + 1 rows to rank d.
    sizes = [d + 1 for d in range(size)]
    rows = torch.full((sum(sizes), 2), float(rank))
    out = torch.empty((rank + 1) * size, 2)
    dist.all_to_all_single(out, rows, [rank + 1] * size, sizes)
    assert torch.equal(out[:, 0], torch.arange(float(size)).repeat_interleave(rank + 1))
    outputs = [torch.empty(rank + 1) for _ in range(size)]
    dist.all_to_all(outputs, [torch.full((n,), float(rank)) for n in sizes])
    assert [x[0].item() for x in outputs] == list(range(size))

    truth = torch.tensor([rank == 1, False, True])
    dist.all_reduce(truth, op=dist.ReduceOp.MAX)
    assert truth.tolist() == [True, False, True]

    tensors = [torch.full((i + 1,), float(rank)) for i in range(3)]
    with dist.distributed_c10d._coalescing_manager():
        for x in tensors:
            dist.all_reduce(x)
    assert all(torch.equal(x, torch.full_like(x, total)) for x in tensors)

    empty = torch.empty(0)
    dist.all_reduce(empty)
    dist.broadcast(empty, 0)
    dist.barrier()
    dist.group.WORLD.monitored_barrier(timedelta(seconds=30))


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_equal_closed_forms(world_size):
    run(world_size, closed_forms)


def late(rank: int) -> str:
    if rank == 2:
        time.sleep(3)
        return ""
    try:
        dist.group.WORLD.monitored_barrier(timedelta(seconds=1), wait_all_ranks=True)
    except PeerLostError as error:
        return str(error)
    except ProtocolError:  # rank 0 gave the barrier up
        return ""
    raise AssertionError


def test_monitored_barrier_names_the_rank_that_did_not_come():
    said = run(3, late)
    assert said[0].startswith("monitored_barrier: ranks [2] did not come")


# ------------------------------------------------------------ groups


def subgroups(rank: int) -> None:
    world = dist.group.WORLD
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    group = pairs[rank % 2]
    assert group.communicator is world.communicator
    tensor = torch.tensor([float(rank)])
    dist.all_reduce(tensor, group=group)
    assert tensor.item() == {0: 2, 1: 4}[rank % 2]
    received = torch.empty(1)
    if rank < 2:
        dist.send(torch.tensor([rank + 10.0]), rank + 2, group=group)
    else:
        assert dist.recv(received, group=group) == rank - 2
        assert received.item() == rank + 8
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="shut down"):
        group.allreduce([tensor])
    dist.barrier()


def test_subgroups_share_the_connections():
    run(4, subgroups)


def mesh(rank: int) -> tuple[float, float]:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    sums = []
    for name in ("pp", "dp"):
        tensor = torch.tensor(float(rank))
        dist.all_reduce(tensor, group=grid[name].get_group())
        sums.append(tensor.item())
    assert grid.get_local_rank("pp") == rank // 2
    return tuple(sums)


def test_device_mesh():
    assert run(4, mesh) == [(2, 1), (4, 1), (2, 5), (4, 5)]


def functional(rank: int) -> None:
    from torch.distributed import _functional_collectives as fc

    out = fc.all_reduce(torch.full((3,), float(rank)), "sum", dist.group.WORLD)
    assert torch.equal(out + 0, torch.ones(3))
    out = fc.all_gather_tensor(torch.tensor([rank]), 0, dist.group.WORLD)
    assert (out + 0).tolist() == [0, 1]


def test_functional_collectives():
    run(2, functional)


def own_engine_of_a_group(rank: int) -> None:
    from dora.runtime.process_group import register

    register()
    group = dist.new_group([0, 1], backend="dora")
    tensor = torch.ones(2)
    if rank < 2:
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [2, 2]
        dist.destroy_process_group(group)


def test_group_beside_a_gloo_default_group():
    run_ranks(3, own_engine_of_a_group)


# ------------------------------------------------------------ torch's parallelism


def model() -> nn.Sequential:
    torch.manual_seed(3)
    blocks = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(12, 3))


def ddp_gradients(rank: int) -> list[torch.Tensor]:
    parallel = DistributedDataParallel(model(), bucket_cap_mb=0.001)
    torch.manual_seed(rank)
    for _ in range(2):
        parallel.zero_grad()
        parallel(torch.randn(5, 12)).square().mean().backward()
    return [p.grad for p in parallel.parameters()]


def joined_at(rank: int, path: str, level: str) -> list[torch.Tensor]:
    dist.set_debug_level(dist.DebugLevel.__members__[level])
    join("dora", path, rank, 3)
    return ddp_gradients(rank)


@pytest.mark.parametrize("level", ["OFF", "DETAIL"])
def test_ddp_gradients_equal_those_over_gloo(level):
    ours = run_ranks(3, joined_at, level, backend=None)
    theirs = run_ranks(3, ddp_gradients)
    for rank in range(3):
        for mine, gloos, first in zip(ours[rank], theirs[rank], ours[0], strict=True):
            torch.testing.assert_close(mine, gloos)
            assert torch.equal(mine, first)


def pipeline(rank: int, kind: str) -> dict[str, torch.Tensor]:
    whole, size = model(), dist.get_world_size()
    cut = [0, 2, 5] if size == 2 else [0, 2, 4, 5]
    part = nn.Sequential(*[whole[i] for i in range(cut[rank], cut[rank + 1])])
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    schedule = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[kind](
        stage, n_microbatches=4, loss_fn=lambda out, target: (out - target).square().mean()
    )
    torch.manual_seed(9)
    inputs, targets = torch.randn(8, 12), torch.randn(8, 3)
    for _ in range(2):
        part.zero_grad()
        if rank == 0:
            schedule.step(inputs)
        elif rank == size - 1:
            schedule.step(target=targets)
        else:
            schedule.step()
    names = dict(part.named_parameters())
    return {
        f"{cut[rank] + int(name.split('.')[0])}.{name.split('.', 1)[1]}": p.grad
        for name, p in names.items()
    }


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_pipelining_equals_the_plain_module(kind, world_size):
    plain = model()
    torch.manual_seed(9)
    inputs, targets = torch.randn(8, 12), torch.randn(8, 3)
    (plain(inputs) - targets).square().mean().backward()
    found = {}
    for grads in run(world_size, pipeline, kind):
        found |= grads
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


# ------------------------------------------------------------ life and death


def again(rank: int, path: str) -> None:
    for turn in range(3):
        join("dora", f"{path}{turn // 2}", rank, 2)  # the second one over the same file
        tensor = torch.tensor([float(rank + turn)])
        dist.all_reduce(tensor)
        assert tensor.item() == 2 * turn + 1
        dist.barrier()
        dist.destroy_process_group()


def test_destroy_and_init_again_in_one_process():
    run_ranks(2, again, backend=None)


def last_words(rank: int) -> float:
    """The sender leaves at once; what it has sent still arrives."""
    tensor = torch.full((300_000,), 7.0 * (rank == 0))
    if rank == 0:
        work = dist.isend(tensor, 1)
        time.sleep(0.5)
        work.wait()
    else:
        dist.recv(tensor, 0)
    dist.destroy_process_group()
    return tensor[-1].item()


def test_destroy_waits_for_sends():
    assert run(2, last_words) == [7, 7]


def killed(rank: int) -> None:
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.recv(torch.empty(5), 1)


def test_killed_peer_is_an_error_with_rank_peer_and_action():
    first, second, third = outcomes(3, killed, backend="dora")
    assert second.exitcode == -signal.SIGKILL
    for rank, outcome in ((0, first), (2, third)):
        assert isinstance(outcome.error, PeerLostError), outcome
        assert f"rank {rank}: receive with rank 1 failed" in str(outcome.error)
        assert "connection was closed" in str(outcome.error)


def killed_in_backward(rank: int) -> None:
    parallel = DistributedDataParallel(model())
    for _ in range(2):  # the second one rebuilds the buckets
        parallel(torch.randn(5, 12)).sum().backward()
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    parallel(torch.randn(5, 12)).sum().backward()


def test_killed_peer_fails_a_backward_of_ddp():
    first, _ = outcomes(2, killed_in_backward, backend="dora")
    assert isinstance(first.error, RuntimeError), first
    assert "rank 0: all_reduce with ranks [1] failed" in str(first.error)


def timed_out(rank: int) -> str:
    if rank == 1:
        with pytest.raises(PeerLostError, match=r"no answer within 0\.5 s \(timeout_s\)"):
            dist.irecv(torch.empty(3), 0, tag=9).wait(timedelta(seconds=0.5))
    tensor = torch.ones(3)  # one timeout fails one operation, not the group
    dist.all_reduce(tensor)
    return tensor.tolist()


def test_timeout_fails_one_operation_only():
    assert run(2, timed_out) == [[2, 2, 2]] * 2


def forked(rank: int) -> str:
    dist.barrier()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            dist.all_reduce(torch.ones(2))
            text = "no error"
        except RuntimeError as error:
            text = str(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 1000).decode()
    dist.barrier()  # the parent's group still works
    return said


def test_forked_child_is_refused():
    for said in run(2, forked):
        assert "do not survive a fork" in said


_EXIT = """
import sys, time, torch, torch.distributed as dist
from dora.runtime.process_group import register
register()
rank = int(sys.argv[1])
dist.init_process_group("dora", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
dist.barrier()
works = [dist.irecv(torch.empty(1000), 1 - rank, tag=i) for i in range(3)]
works.append(dist.isend(torch.ones(10_000_000), 1 - rank, tag=99))
works.append(dist.all_reduce(torch.ones(5), async_op=True) if rank else None)
future = works[0].get_future()
print("end", flush=True)
if rank:
    time.sleep(0.3)
"""


def test_interpreter_ends_with_operations_pending(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _EXIT, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert out == "end\n", err
            assert process.returncode == 0, err
            assert "Fatal" not in err
    finally:
        for process in processes:
            process.kill()


def test_register_is_explicit():
    code = (
        "import torch.distributed as d, dora.runtime.process_group as p;"
        "assert 'dora' not in d.Backend.backend_list; p.register(); p.register();"
        "assert 'dora' in d.Backend.backend_list"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert DoraProcessGroup.supports_coalescing is False
