"""Tensors over the engine, without torch.distributed's groups: ranks are threads here."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from dora.errors import DoraError, PeerLostError, ProtocolError, SpecError
from dora.runtime.communicator import Communicator
from dora.runtime.priority import URGENT, WEIGHTS, Priority

pytestmark = pytest.mark.timeout(60)
KEY = "the secret of these tests"


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("DORA_KEY", raising=False)
    monkeypatch.delenv("DORA_KEY_FILE", raising=False)


def create_all(options: list[dict], store=None) -> list:
    """Returns the communicator or the error of every rank."""
    store = store or dist.HashStore()

    def create(rank: int):
        try:
            return Communicator.create(
                store, rank, len(options), **{"timeout_s": 20.0, **options[rank]}
            )
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(options)) as pool:
        return [*pool.map(create, range(len(options)))]


@contextmanager
def connected(size: int = 2, **options):
    made = create_all([options] * size)
    errors = [one for one in made if isinstance(one, Exception)]
    try:
        if errors:
            raise errors[0]
        yield made
    finally:
        for one in made:
            if isinstance(one, Communicator):
                one.close()


# ------------------------------------------------------------ finding one another


def test_ranks_of_one_machine_need_no_key():
    with connected(3) as ranks:
        tensors = [torch.tensor([float(one.rank)]) for one in ranks]
        pendings = [one.all_reduce(x, [0, 1, 2]) for one, x in zip(ranks, tensors, strict=True)]
        for pending in pendings:
            pending.wait(20)
        assert [x.item() for x in tensors] == [3, 3, 3]


def test_one_rank_alone_works():
    with connected(1) as (one,):
        x = torch.ones(3)
        one.all_reduce(x, [0]).wait(20)
        one.broadcast(x, 0, [0]).wait(20)
        one.barrier([0]).wait(20)
        assert x.tolist() == [1, 1, 1]


def test_ranks_with_different_keys_are_refused():
    errors = create_all([{"key": KEY, "timeout_s": 5.0}, {"key": KEY + "!", "timeout_s": 5.0}])
    assert all(isinstance(error, PeerLostError) for error in errors), errors
    assert "connecting to ranks [1] failed" in str(errors[0])
    assert any("key" in str(error) for error in errors), errors


def test_rank_without_key_is_named_on_all_ranks():
    for error in create_all([{"key": KEY}, {}]):
        assert isinstance(error, SpecError)
        assert "ranks [1] have none" in str(error)
        assert "DORA_KEY" in str(error)


def test_open_ports_need_a_key():
    for error in create_all([{"host": "0.0.0.0"}, {"host": "0.0.0.0"}]):
        assert isinstance(error, SpecError)
        assert "set DORA_KEY" in str(error)


def test_open_ports_work_with_a_key(monkeypatch):
    monkeypatch.setenv("DORA_KEY", KEY)
    with connected(2, host="0.0.0.0", protection="encrypt") as (a, b):
        x = torch.zeros(100)
        pending = b.receive(x, 0)
        a.send(torch.ones(100), 1).wait(20)
        pending.wait(20)
        assert x.sum() == 100


def test_missing_rank_is_named():
    with pytest.raises(PeerLostError, match=r"rendezvous with ranks \[1\] failed: no answer"):
        Communicator.create(dist.HashStore(), 0, 2, timeout_s=0.5)


def test_same_store_serves_again():
    store = dist.HashStore()
    for _ in range(2):
        made = create_all([{}, {}], store)
        assert all(isinstance(one, Communicator) for one in made), made
        for one in made:
            one.close()


# ------------------------------------------------------------ messages


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0),
        torch.arange(7, dtype=torch.int16),
        torch.rand(3, 5).to(torch.bfloat16),
        torch.tensor([True, False, True]),
        torch.rand(2, 3, dtype=torch.complex64),
        torch.rand(400_003),
    ],
    ids=lambda x: f"{x.dtype}{tuple(x.shape)}".replace("torch.", ""),
)
def test_any_dtype_and_shape_arrives(tensor):
    with connected() as (a, b):
        x = torch.empty_like(tensor)
        sent = a.send(tensor, 1, tag=2, priority=URGENT)
        b.receive(x, 0, tag=2).wait(20)
        sent.wait(20)
        assert torch.equal(x, tensor)


def test_message_from_any_source():
    with connected(3) as (a, b, c):
        x, y = torch.empty(1), torch.empty(1)
        c.send(torch.tensor([2.0]), 0, tag=5).wait(20)
        first = a.receive(x, None, tag=5)
        first.wait(20)
        b.send(torch.tensor([1.0]), 0, tag=5).wait(20)
        second = a.receive(y, None, tag=5)
        second.wait(20)
        assert (first.source(), second.source()) == (2, 1)
        assert (x.item(), y.item()) == (2, 1)


def test_dropped_operations_keep_their_memory():
    with connected() as (a, b):
        for i in range(20):
            a.send(torch.full((50_000,), float(i)), 1, tag=i)  # nobody holds tensor or handle
        gc.collect()
        for i in range(20):
            x = torch.empty(50_000)
            b.receive(x, 0, tag=i).wait(20)
            assert torch.equal(x, torch.full((50_000,), float(i)))


def test_misuse_is_refused():
    with connected() as (a, _):
        x = torch.ones(4, 4)
        for call, text in (
            (lambda: a.send(x.t(), 1), "contiguous"),
            (lambda: a.send(x, 1, tag=-1), "tag: given -1"),
            (lambda: a.send(x, 0), "dst: given rank 0"),
            (lambda: a.receive(x, 2), "src: given rank 2"),
            (lambda: a.send(x, 1, priority=Priority(0)), "traffic_class: given 0"),
            (lambda: a.send(x, 1, priority=Priority(2, float("nan"))), "deadline: given nan"),
            (lambda: a.all_reduce(x.bool(), [0, 1]), "dtype: given torch.bool"),
            (lambda: a.all_gather(x, torch.empty(17), [0, 1]), "output: given 17"),
            (lambda: a.send(x.to("meta"), 1), "on meta"),
        ):
            with pytest.raises(ValueError, match=text):
                call()


def test_silent_peer_runs_into_the_timeout():
    with connected() as (a, _):
        pending = a.receive(torch.empty(3), 1)
        with pytest.raises(PeerLostError) as caught:
            pending.wait(0.2)
        assert str(caught.value) == (
            "rank 0: receive with rank 1 failed: no answer within 0.2 s (timeout_s)"
        )


def test_limit_of_the_operation_holds_without_one_of_the_wait():
    with connected() as (a, _), pytest.raises(PeerLostError, match=r"no answer within 0\.3 s"):
        a.receive(torch.empty(3), 1, timeout_s=0.3).wait()


def test_different_sizes_are_a_protocol_error():
    with connected() as (a, b):
        a.send(torch.ones(5), 1)
        with pytest.raises(ProtocolError, match="20 bytes"):
            b.receive(torch.empty(6), 0).wait(20)


def test_cancelled_operation_says_so():
    with connected() as (a, _):
        pending = a.receive(torch.empty(3), 1)
        pending.cancel()
        with pytest.raises(DoraError, match="cancelled"):
            pending.wait(20)


# ------------------------------------------------------------ collectives


def test_all_reduce_by_shares():
    shares = [0.5, 0.25, 0.25]
    with connected(3) as ranks:
        tensors = [torch.full((1000,), float(one.rank + 1)) for one in ranks]
        pendings = [
            one.all_reduce(x, [0, 1, 2], shares=shares, priority=WEIGHTS)
            for one, x in zip(ranks, tensors, strict=True)
        ]
        for pending in pendings:
            pending.wait(20)
        for x in tensors:
            torch.testing.assert_close(x, torch.full((1000,), 1.75))


def test_groups_of_some_ranks_run_beside_one_another():
    with connected(3) as ranks:
        teams, pendings = [[0, 1], [1, 2], [2, 0]], []
        tensors = {}
        for number, team in enumerate(teams):
            for rank in team:
                x = tensors[number, rank] = torch.full((70_000,), float(rank))
                pendings.append(ranks[rank].all_reduce(x, team, group=number + 1))
        for pending in pendings:
            pending.wait(20)
        for (number, _), x in tensors.items():
            assert torch.equal(x, torch.full((70_000,), float(sum(teams[number]))))


# ------------------------------------------------------------ the end


def test_close_wakes_the_peer():
    with connected() as (a, b):
        pending = b.receive(torch.empty(3), 0)
        threading.Timer(0.2, a.close).start()
        start = time.monotonic()
        with pytest.raises(PeerLostError, match="connection was closed"):
            pending.wait(30)
        assert time.monotonic() - start < 20
        a.close()  # may be repeated


def test_message_that_has_arrived_outlives_its_sender():
    with connected() as (a, b):
        a.send(torch.arange(9), 1, tag=4).wait(20)
        a.close()
        with pytest.raises(PeerLostError, match="connection"):
            b.receive(torch.empty(9), 0, tag=5).wait(20)  # ends when the loss is known
        x = torch.empty(9, dtype=torch.int64)
        b.receive(x, 0, tag=4).wait(20)
        assert torch.equal(x, torch.arange(9))


def test_closed_communicator_is_refused():
    with connected() as (a, _):
        pending = a.receive(torch.empty(3), 1)
        told = threading.Event()
        pending.on_done(told.set)
        a.close()
        assert told.wait(20)
        with pytest.raises(PeerLostError, match="this rank closed"):
            pending.wait(20)
        with pytest.raises(PeerLostError, match="this rank closed"):
            a.send(torch.ones(3), 1)


_RANK = """
import sys, torch, torch.distributed as dist
from dora.runtime.communicator import Communicator
rank, host = int(sys.argv[1]), sys.argv[2]
store = dist.TCPStore(host, 29511, 2, rank == 0, wait_for_workers=False)
try:
    one = Communicator.create(store, rank, 2, key=sys.argv[3] or None, timeout_s=20)
    x = torch.tensor([rank + 1.0])
    one.all_reduce(x, [0, 1]).wait(20)
    print(x.item())
    one.barrier([0, 1]).wait(20)
    one.close()
except Exception as error:
    print(f"{type(error).__name__}: {error}")
store.set(f"end/{rank}", "")
store.wait(["end/0", "end/1"])  # the store lives in rank 0
"""


@pytest.fixture
def namespaces():
    """Two network namespaces of one machine, joined by a cable: hosts to each other."""
    names = [f"dora{os.getpid()}{end}" for end in "ab"]
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 for network namespaces")
    commands = [
        *(f"netns add {name}" for name in names),
        f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}",
        *(f"-n {name} addr add 10.77.0.{i + 1}/24 dev {name}" for i, name in enumerate(names)),
        *(f"-n {name} link set {device} up" for name in names for device in (name, "lo")),
    ]
    try:
        for command in commands:
            if subprocess.run(["ip", *command.split()], check=False).returncode:
                pytest.skip("network namespaces are not allowed here")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.parametrize("key", [KEY, pytest.param("", marks=pytest.mark.slow)])
def test_hosts_reach_one_another_by_the_address_towards_the_store(namespaces, key):
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", _RANK, str(rank), host, key],
            stdout=subprocess.PIPE,
            text=True,
        )
        # Rank 0 knows its own store as localhost, as torchrun may say.
        for rank, (name, host) in enumerate(
            zip(namespaces, ("localhost", "10.77.0.1"), strict=True)
        )
    ]
    try:
        said = [process.communicate(timeout=50)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if key:
        assert said == ["3.0", "3.0"]
    else:
        assert all(text.startswith("SpecError: key: given none") for text in said), said
