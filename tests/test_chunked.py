from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import outcomes, run_ranks

from dora.errors import PeerLostError, ProtocolError
from dora.runtime.chunked import ChunkedTransport
from dora.runtime.priority import URGENT, WEIGHTS

CHUNK_BYTES = 4096
LARGE_BYTES = 2**17  # a chunk where many would take long
SIZES = [0, 1, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, 3 * 2**20 + 3]
WAIT_S = 40.0


def transport(**arguments):
    return ChunkedTransport(timeout_s=WAIT_S, **{"chunk_bytes": CHUNK_BYTES, **arguments})


def content(num_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def finish(*pendings):
    for pending in pendings:
        pending.wait(WAIT_S)


def both_directions(rank, chunk_bytes, sizes, order):
    """Every message has its own tag; the ranks post in different orders, all before any wait."""
    wires = transport(chunk_bytes=chunk_bytes)
    order = order if rank == 0 else order[::-1]
    received = [torch.empty(n, dtype=torch.uint8) for n in sizes]
    pendings = [wires.send(content(sizes[i], 2 * i + rank), 1 - rank, i, "SEND") for i in order]
    pendings += [wires.receive(received[i], 1 - rank, i, "RECV") for i in reversed(order)]
    finish(*pendings)
    wires.close()
    return all(torch.equal(x, content(x.numel(), 2 * i + 1 - rank)) for i, x in enumerate(received))


def test_bytes_are_equal_for_all_sizes_in_both_directions():
    assert run_ranks(2, both_directions, LARGE_BYTES, SIZES, [3, 0, 5, 1, 4, 2]) == [True, True]


@settings(max_examples=3)
@given(
    st.lists(st.integers(0, 3 * CHUNK_BYTES), min_size=1, max_size=30).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.permutations(range(len(sizes))))
    )
)
def test_many_tags_match_in_any_order_of_posting(messages):
    assert run_ranks(2, both_directions, CHUNK_BYTES, *messages) == [True, True]


def same_tag(rank):
    """Messages with one tag match in the order of posting, whatever leaves first."""
    wires = transport()
    sizes = [5 * CHUNK_BYTES, 10, 3 * CHUNK_BYTES]
    if rank == 0:
        priorities = [WEIGHTS, None, URGENT]
        finish(
            *(
                wires.send(content(n, i), 1, 7, "SEND", priority=p)
                for i, (n, p) in enumerate(zip(sizes, priorities, strict=True))
            )
        )
        result = True
    else:
        received = [torch.empty(n, dtype=torch.uint8) for n in sizes]
        finish(*(wires.receive(x, 0, 7, "RECV") for x in received))
        result = all(torch.equal(x, content(x.numel(), i)) for i, x in enumerate(received))
    wires.close()
    return result


def test_equal_tags_match_in_the_order_of_posting():
    assert run_ranks(2, same_tag) == [True, True]


def dtypes(rank):
    wires = transport()
    tensors = [
        torch.tensor(3.5),
        torch.tensor([True, False]),
        torch.arange(9).reshape(3, 3),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.tensor([1 + 2j]),
    ]
    if rank == 0:
        finish(*(wires.send(x, 1, 0, "SEND") for x in tensors))
        result = True
    else:
        received = [torch.zeros_like(x) for x in tensors]
        finish(*(wires.receive(x, 0, 0, "RECV") for x in received))
        result = all(torch.equal(x, y) for x, y in zip(tensors, received, strict=True))
    wires.close()
    return result


def test_any_dtype_and_shape_arrives():
    assert run_ranks(2, dtypes) == [True, True]


def send_first(rank, first):
    """The rank `first` posts, and only then, after a barrier, the other one."""
    wires = transport()
    x = content(3 * CHUNK_BYTES, 1) if rank == 0 else torch.zeros(3 * CHUNK_BYTES).byte()
    if rank != first:
        dist.barrier()
    pending = wires.send(x, 1, 0, "SEND") if rank == 0 else wires.receive(x, 0, 0, "RECV")
    is_early = pending.is_completed() if rank == first else False
    if rank == first:
        dist.barrier()
    finish(pending)
    wires.close()
    return not is_early and torch.equal(x, content(3 * CHUNK_BYTES, 1))


@pytest.mark.parametrize("first", [0, 1])
def test_receive_may_be_posted_before_or_after_the_send(first):
    assert run_ranks(2, send_first, first) == [True, True]


def overtake(rank):
    """The bulk is under way once a small message posted before it in its class is done."""
    wires = transport()
    sizes = [1, 1024 * CHUNK_BYTES, CHUNK_BYTES]
    if rank == 1:
        received = [torch.empty(n, dtype=torch.uint8) for n in sizes]
        pendings = [wires.receive(x, 0, i, "RECV") for i, x in enumerate(received)]
        dist.barrier()
    else:
        dist.barrier()
        pendings = [
            wires.send(content(n, i), 1, i, "SEND", priority=WEIGHTS)
            for i, n in enumerate(sizes[:2])
        ]
        finish(pendings[0])
        pendings.append(wires.send(content(sizes[2], 2), 1, 2, "SEND", priority=URGENT))
    finish(*pendings)
    wires.close()
    return [pending.finished_s for pending in pendings]


def test_urgent_message_overtakes_bulk_under_way():
    for before, bulk, urgent in run_ranks(2, overtake):
        assert before < urgent < bulk


def ungranted(rank):
    """An urgent message without a receive lets others pass instead of blocking the queue."""
    wires = transport()
    x = torch.full((CHUNK_BYTES,), 5.0)
    if rank == 0:
        urgent = wires.send(x, 1, 1, "SEND", priority=URGENT)
        finish(wires.send(x, 1, 2, "SEND", priority=WEIGHTS))
        assert not urgent.is_completed()
        dist.barrier()
        finish(urgent)
    else:
        finish(wires.receive(torch.empty_like(x), 0, 2, "RECV"))
        dist.barrier()
        finish(wires.receive(torch.empty_like(x), 0, 1, "RECV"))
    wires.close()


def test_message_without_a_receive_blocks_no_other():
    run_ranks(2, ungranted)


def silence(rank):
    wires = transport()
    texts = []
    x = torch.arange(4.0)
    if rank == 0:
        for pending in (wires.receive(x, 1, 1, "RECV_F 3"), wires.send(x, 1, 2, "SEND_B 4")):
            with pytest.raises(PeerLostError) as caught:
                pending.wait(0.2)
            texts.append(str(caught.value))
        finish(wires.send(x, 1, 3, "SEND"))
    else:
        y = torch.empty(4)
        finish(wires.receive(y, 0, 3, "RECV"))
        assert torch.equal(x, y)
    dist.barrier()
    wires.close()
    return texts


def test_timeout_names_the_parties_and_leaves_other_transfers_alone():
    assert run_ranks(2, silence)[0] == [
        "rank 0: RECV_F 3 with rank 1 failed: no answer within 0.2 s (timeout_s)",
        "rank 0: SEND_B 4 with rank 1 failed: no answer within 0.2 s (timeout_s)",
    ]


def closes(rank):
    """Rank 0 leaves; the others notice at once, and still reach each other."""
    wires = transport()
    x = torch.ones(CHUNK_BYTES)
    if rank == 0:
        own = wires.receive(x, 1, 0, "RECV")
        dist.barrier()
        wires.close()
        wires.close()
        with pytest.raises(PeerLostError, match="RECV with rank 1 failed: this rank has ended"):
            own.wait(WAIT_S)
        return None
    pendings = wires.receive(x, 0, 1, "RECV"), wires.send(x, 0, 2, "SEND")
    dist.barrier()
    texts = []
    for pending in pendings:
        with pytest.raises(PeerLostError) as caught:
            pending.wait(WAIT_S)
        texts.append(str(caught.value))
    with pytest.raises(PeerLostError):
        wires.send(x, 0, 3, "SEND").wait(WAIT_S)
    if rank == 1:
        finish(wires.send(x, 2, 0, "SEND"))
    else:
        finish(wires.receive(x, 1, 0, "RECV"))
    wires.close()
    return texts


def test_close_wakes_peers_and_leaves_them_connected():
    _, one, two = run_ranks(3, closes)
    reason = "the connection was closed; that process has failed or was killed"
    for rank, texts in ((1, one), (2, two)):
        assert texts == [
            f"rank {rank}: RECV with rank 0 failed: {reason}",
            f"rank {rank}: SEND with rank 0 failed: {reason}",
        ]


def dies(rank):
    wires = transport()
    pending = wires.receive(torch.zeros(4), 1 - rank, 0, "RECV")
    dist.barrier()
    if rank == 1:
        os._exit(3)
    with pytest.raises(PeerLostError, match="RECV with rank 1 failed: the connection was closed"):
        pending.wait(WAIT_S)
    wires.close()


def test_death_of_a_peer_fails_what_waits_for_it():
    survivor, dead = outcomes(2, dies)
    assert (survivor.error, dead.exitcode) == (None, 3), survivor.trace


def leaves_early(rank):
    """Whoever has everything may close at once; the sender still gets its acknowledgement."""
    for i in range(5):
        wires = transport()
        x = torch.zeros(3 * CHUNK_BYTES)
        finish(wires.send(x, 1, i, "SEND") if rank == 0 else wires.receive(x, 0, i, "RECV"))
        wires.close()


def test_receiver_may_close_as_soon_as_it_is_done():
    run_ranks(2, leaves_early)


def disagree(rank):
    wires = transport()
    x = torch.zeros(3 + rank)
    with pytest.raises(ProtocolError) as caught:
        finish(wires.send(x, 1, 0, "SEND") if rank == 0 else wires.receive(x, 0, 0, "RECV"))
    finish(wires.send(x, 1, 0, "SEND") if rank == 0 else wires.receive(x[:3], 0, 0, "RECV"))
    wires.close()
    return str(caught.value)


def test_different_sizes_fail_that_message_on_both_sides():
    reason = "12 bytes on a CPU were sent and 16 bytes on a CPU expected; post equal tensors"
    assert run_ranks(2, disagree) == [
        f"rank 0: SEND with rank 1 failed: {reason}",
        f"rank 1: RECV with rank 0 failed: {reason}",
    ]


def reduces(rank):
    """Sums and broadcasts while bulk is under way in a ring of three ranks."""
    wires = transport()
    wires.add_groups([(0, 2)])
    bulk = content(300 * CHUNK_BYTES, rank)
    received = torch.empty_like(bulk)
    pendings = [
        wires.receive(received, (rank - 1) % 3, 0, "RECV"),
        wires.send(bulk, (rank + 1) % 3, 0, "SEND", priority=WEIGHTS),
    ]
    sums = []
    for _ in range(5):
        x = torch.tensor([rank + 1.0])
        wires.all_reduce(x, range(3), "REDUCE_GRAD").wait(WAIT_S)
        sums.append(x.item())
    if rank != 1:
        x = torch.tensor([rank + 1.0])
        wires.all_reduce(x, (0, 2), "REDUCE_GRAD").wait(WAIT_S)
        sums.append(x.item())
    first = torch.tensor([rank + 10.0])
    wires.broadcast(first, 2, range(3), "initial weight")
    finish(*pendings)
    wires.close()
    return sums, first.item(), torch.equal(received, content(bulk.numel(), (rank - 1) % 3))


def test_all_reduce_works_while_sends_are_under_way():
    results = run_ranks(3, reduces)
    assert [sums for sums, _, _ in results] == [[6.0] * 5 + [4.0], [6.0] * 5, [6.0] * 5 + [4.0]]
    assert all(first == 12.0 and is_equal for _, first, is_equal in results)


def wrong_calls(rank):
    wires = transport()
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"SEND: peer 5 given, allowed: \["):
        wires.send(x, 5, 0, "SEND")
    with pytest.raises(ValueError, match="not contiguous"):
        wires.send(x.T[1:], 1 - rank, 0, "SEND")
    with pytest.raises(ValueError, match="on meta, allowed: "):
        wires.receive(x.to("meta"), 1 - rank, 0, "RECV")
    wires.close()
    with pytest.raises(ValueError, match="backend='mpi', chunk_bytes=4096"):
        transport(backend="mpi")


def test_wrong_calls_say_what_is_allowed():
    run_ranks(2, wrong_calls)


def on_gpus(rank):
    torch.cuda.set_device(rank)
    wires = transport(backend="nccl", chunk_bytes=LARGE_BYTES)
    for i, n in enumerate(SIZES):
        mine, theirs = content(n, rank).cuda(), torch.zeros(n, dtype=torch.uint8, device="cuda")
        finish(
            wires.receive(theirs, 1 - rank, i, "RECV"),
            wires.send(mine, 1 - rank, i, "SEND", priority=URGENT if i % 2 else WEIGHTS),
            wires.send(torch.tensor([rank]), 1 - rank, 99, "SEND"),
            wires.receive(stamp := torch.tensor([-1]), 1 - rank, 99, "RECV"),
        )
        assert torch.equal(theirs.cpu(), content(n, 1 - rank)) and stamp.item() == 1 - rank
    x = torch.ones(3, device="cuda")
    wires.all_reduce(x, range(2), "REDUCE_GRAD").wait(WAIT_S)
    assert x.tolist() == [2.0] * 3
    dist.barrier()
    wires.close()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU per rank")
def test_cuda_tensors_travel_over_nccl():
    run_ranks(2, on_gpus)
