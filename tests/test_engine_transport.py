"""The executor's transport over the engine, with connections of its own and with shared ones."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from dora.errors import PeerLostError
from dora.runtime.agreement import Agreement
from dora.runtime.engine_transport import EngineTransport
from dora.runtime.priority import URGENT, WEIGHTS

pytestmark = [pytest.mark.timeout(120)]
both = pytest.mark.parametrize("backend", ["gloo", "dora"])


def moving(rank: int) -> None:
    transport = EngineTransport(timeout_s=20)
    if rank == 0:
        transport.send(torch.arange(5.0), 1, 3, "2F0", priority=URGENT).wait(20)
    elif rank == 1:
        x = torch.empty(5)
        transport.receive(x, 0, 3, "2F0").wait(20)
        assert torch.equal(x, torch.arange(5.0))
    x = torch.full((10_000,), float(rank))
    transport.all_reduce(x, (0, 1, 2), "REDUCE_GRAD").wait(20)
    assert x[-1] == 3
    if rank != 1:
        x = torch.tensor([float(rank)])
        transport.broadcast(x, 2, [0, 2], "initial w")
        assert x.item() == 2
    transport.close()
    transport.close()
    dist.barrier()  # the user's own group is untouched


@both
def test_tensors_move(backend):
    run_ranks(3, moving, backend=backend)


def closing(rank: int) -> str | None:
    transport = EngineTransport(timeout_s=60)
    if rank == 1:
        time.sleep(0.5)
        transport.close()
        dist.barrier()
        return None
    if rank == 0:
        pending = transport.receive(torch.empty(5), 1, 0, "1F0")
    else:
        pending = transport.all_reduce(torch.ones(100_000), (1, 2), "REDUCE_GRAD")
    start = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        pending.wait(60)
    assert time.monotonic() - start < 30
    with pytest.raises(PeerLostError, match="connection was closed"):
        transport.receive(torch.empty(5), 1, 1, "1F1").wait(60)
    dist.barrier()  # the user's own group is untouched
    return str(caught.value)


@both
def test_close_wakes_all_that_wait(backend):
    said = run_ranks(3, closing, backend=backend)
    assert "rank 0: 1F0 with rank 1 failed: the connection was closed" in said[0]
    assert "rank 2: REDUCE_GRAD with ranks [1] failed: the connection was closed" in said[2]


def silent(rank: int) -> None:
    transport = EngineTransport(timeout_s=60)
    if rank == 0:
        with pytest.raises(PeerLostError) as caught:
            transport.receive(torch.empty(5), 1, 0, "1F0").wait(0.3)
        assert str(caught.value) == (
            "rank 0: 1F0 with rank 1 failed: no answer within 0.3 s (timeout_s)"
        )
    dist.barrier()


@both
def test_silent_peer_runs_into_the_timeout(backend):
    run_ranks(2, silent, backend=backend)


def leaving(rank: int) -> None:
    """What was sent before a close still arrives, small and large, wanted early or late."""
    sizes = [1, 1000, 500_000]
    for turn in range(5):
        transport = EngineTransport(timeout_s=30)
        if rank == 0:
            sends = [transport.send(torch.ones(n), 1, i, "x") for i, n in enumerate(sizes)]
            for send in sends:
                send.wait(30)
        else:
            tensors = [torch.empty(n) for n in sizes]
            early = [transport.receive(tensors[i], 0, i, "x") for i in (1, 2)]
            for pending in early:
                pending.wait(30)
            time.sleep(0.05 * turn)
            transport.receive(tensors[0], 0, 0, "x").wait(30)
            assert all(x.sum() == x.numel() for x in tensors)
        transport.close()
    dist.barrier()


@both
def test_messages_sent_before_a_close_arrive(backend):
    run_ranks(2, leaving, backend=backend)


def passing_on_late(rank: int) -> None:
    transport = EngineTransport(timeout_s=20)
    x = torch.full((100_000,), float(rank))
    if rank == 1:
        time.sleep(1)  # rank 0 has closed by now, and rank 2 knows it
    transport.broadcast(x, 0, [0, 1, 2], "initial w")
    assert x[-1] == 0
    transport.close()
    dist.barrier()


def test_peer_that_closes_after_its_part_does_not_fail_the_others():
    """A goodbye used to cancel every operation of its sender's groups at once."""
    run_ranks(3, passing_on_late, backend="dora")


def agreeing(rank: int) -> list[int]:
    transport = EngineTransport(timeout_s=20)
    said = Agreement(transport, rank, (0, 1, 2), 20).gather(b"x" * rank, "adapter")
    assert said == [b"", b"x", b"xx"]
    classes = [f.traffic_class for f in transport.frames() if f.is_sent and f.kind == "data"]
    transport.close()
    return classes


def test_agreements_do_not_wait_for_weights_and_snapshots():
    said = run_ranks(3, agreeing, backend="gloo")
    assert any(said)
    for classes in said:
        assert max(classes, default=0) < WEIGHTS.traffic_class
