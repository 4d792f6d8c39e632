"""A network emulated by the engine, and processors shared by signals: real processes, slow media.

What a medium carries is bounded below by its rate, on any machine: those bounds are tight. Those
above leave room for a machine that is busy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import (
    HOST,
    KEY,
    Child,
    await_event,
    finish,
    frames,
    group,
    join,
    move,
    pattern,
    receive,
    send,
    until,
)
from ranks import run_ranks

from dora import _C
from dora.runtime.buckets import BUCKETS_VARIABLE, emulated_network
from dora.runtime.communicator import Communicator
from dora.spec import Cluster, Device, Link, Medium
from dora.testbed.bucket import BucketFile
from dora.testbed.duty import Duty, cpu_s

pytestmark = pytest.mark.timeout(60)
MB = 1_000_000
RATE = 2.0 * MB
# How much longer than on its network something may take on a busy machine.
SLACK_S = 5.0


def network(media: dict[str, float], paths: dict[str, list[str]], num_devices: int = 2) -> Cluster:
    """A cluster of devices 0, 1, ...; paths are {'01': [media from 0 to 1]}."""
    devices = tuple(
        Device(name=str(i), flops_per_s=1e9, mem_bandwidth_bytes_per_s=1e9, memory_bytes=1)
        for i in range(num_devices)
    )
    return Cluster(
        devices=devices,
        media=tuple(Medium(name=name, rate_bytes_per_s=rate) for name, rate in media.items()),
        links=tuple(Link(src=ends[0], dst=ends[1], media=path) for ends, path in paths.items()),
    )


def on_air(rate: float = RATE, num_devices: int = 2, times: int = 1) -> Cluster:
    """All devices on one medium, which every message crosses so many times."""
    pairs = [f"{i}{j}" for i in range(num_devices) for j in range(num_devices) if i != j]
    return network({"air": rate}, {pair: ["air"] * times for pair in pairs}, num_devices)


def elapsed(a: _C.Engine, b: _C.Engine, num_bytes: int, tag: int = 0, **options: Any) -> float:
    """Seconds that one message from rank 0 to rank 1 takes."""
    data, room = pattern(num_bytes), np.zeros(num_bytes, np.uint8)
    done = [receive(b, room, 0, tag=tag)]
    start = time.perf_counter()
    done += [send(a, data, 1, tag=tag, **options)]
    assert finish(*done) == ["done", "done"]
    taken_s = time.perf_counter() - start
    assert np.array_equal(data, room)
    return taken_s


# ------------------------------------------------------------ between processes


def _serve(pipe: Any, path: str, rank: int) -> None:
    """An engine that does what it is told: (method, peer, bytes, class) -> when it was done."""
    engine = _C.Engine(rank, KEY, host=HOST, buckets=path)
    pipe.send(engine.port)
    ports = pipe.recv()
    engine.connect({r: (HOST, port) for r, port in enumerate(ports) if r != rank})
    pipe.send(engine.wait_connected(20))
    while True:
        method, peer, num_bytes, options = pipe.recv()
        data = np.zeros(num_bytes, np.uint8)
        operation = getattr(engine, method)(data.ctypes.data, num_bytes, peer, **options)
        pipe.send("started")
        assert operation.wait(40)
        pipe.send((operation.outcome, time.monotonic(), engine.stats()["peers"][peer]))


@contextmanager
def processes(file: BucketFile, count: int) -> Iterator[list[Child]]:
    children = [Child(_serve, file.path, rank) for rank in range(count)]
    try:
        ports = [child.take() for child in children]
        for child in children:
            child.pipe.send(ports)
        assert [child.take() for child in children] == [[]] * count
        yield children
    finally:
        for child in children:
            child.end()


def tell(child: Child, method: str, peer: int, num_bytes: int, **options: Any) -> None:
    child.pipe.send((method, peer, num_bytes, options))
    assert child.take() == "started"


def ended_s(child: Child) -> float:
    outcome, at_s, _ = child.take()
    assert outcome == "done"
    return float(at_s)


@pytest.mark.parametrize("times", [1, 2])
def test_message_takes_as_long_as_its_medium_needs(times):
    with BucketFile(on_air(times=times)) as file, processes(file, 2) as (a, b):
        tell(b, "receive", 0, MB)
        start_s = time.monotonic()
        tell(a, "send", 1, MB)
        taken_s = ended_s(b) - start_s
        assert times * MB / RATE <= taken_s < times * MB / RATE + SLACK_S
        assert file.bytes_of_devices() == [(MB, 0), (0, MB)]
        assert file.bytes_of_media() == [times * MB]
        assert file.have_joined()


def test_two_senders_share_one_medium():
    with BucketFile(on_air(num_devices=3)) as file, processes(file, 3) as (a, b, c):
        start_s = time.monotonic()
        tell(a, "send", 2, MB)
        tell(b, "send", 2, MB)
        shares = []
        for src in range(2):
            tell(c, "receive", src, MB)
            shares.append(ended_s(c) - start_s)
        assert 2 * MB / RATE <= max(shares) < 2 * MB / RATE + SLACK_S
        assert file.bytes_of_media() == [2 * MB]


def test_medium_outlives_a_killed_sender():
    with BucketFile(on_air(num_devices=3)) as file, processes(file, 3) as (a, b, c):
        tell(c, "receive", 1, MB)
        tell(a, "send", 2, 3 * MB)  # so much needs no receive
        until(lambda: file.bytes_of_media()[0] > 0)
        a.end()
        start_s = time.monotonic()
        tell(b, "send", 2, MB)
        assert ended_s(c) - start_s < MB / RATE + SLACK_S


def test_stopped_sender_gets_no_more_than_the_rate():
    with BucketFile(on_air()) as file, processes(file, 2) as (a, b), Duty() as duty:
        tell(b, "receive", 0, MB)
        duty.limit(a.process.pid, 0.3)
        start_s = time.monotonic()
        tell(a, "send", 1, MB)
        assert ended_s(b) - start_s >= MB / RATE


# ------------------------------------------------------------ what a medium does


def test_slowest_medium_of_a_path_decides():
    cluster = network({"fast": 50 * RATE, "slow": RATE}, {"01": ["fast", "slow"]})
    with BucketFile(cluster) as file, group(2, buckets=file.path) as (a, b):
        assert elapsed(a, b, MB) >= MB / RATE
        assert file.bytes_of_media() == [MB, MB]


def test_pair_without_a_link_has_no_limit():
    with BucketFile(network({"air": 1.0}, {"01": ["air"]})) as file:
        with group(2, buckets=file.path) as (a, b):
            move(b, a, (1, 0), 3 * MB)
        assert file.bytes_of_devices() == [(0, 3 * MB), (3 * MB, 0)]


def test_small_message_takes_its_bytes_over_the_rate():
    with BucketFile(on_air(20_000)) as file, group(2, buckets=file.path) as (a, b):
        assert 4096 / 20_000 <= elapsed(a, b, 4096, tag=1) < 4096 / 20_000 + SLACK_S


def test_estimate_settles_at_the_rate():
    with BucketFile(on_air(8 * RATE)) as file, group(2, buckets=file.path) as (a, b):
        # Its own rate, whatever share of the processor this process gets.
        taken_s = elapsed(a, b, 20 * MB)
        stats = a.stats()["peers"][1]
        assert 0.7 * 20 * MB / taken_s < stats["rate_bytes_per_s"] < 2 * 8 * RATE
        assert stats["chunk_bytes"] < 4 * 8 * RATE * 2e-3


def test_urgent_message_overtakes_bulk():
    with (
        BucketFile(on_air(RATE / 2)) as file,
        group(2, buckets=file.path, log_frames=1000) as (a, b),
    ):
        bulk, room = pattern(2 * MB), np.zeros(2 * MB, np.uint8)
        done = [receive(b, room, 0, tag=1), send(a, bulk, 1, tag=1, traffic_class=4)]
        until(lambda: file.bytes_of_media()[0] > MB / 2)
        posted_s = time.perf_counter()
        elapsed(a, b, 1000, tag=2, traffic_class=1)
        assert not done[0].is_done()
        assert finish(*done) == ["done", "done"]
        sent = [frame for frame in frames(a) if frame.is_sent and frame.type == "data"]
        chunk_s = max(frame.length for frame in sent) / (RATE / 2)
        (urgent,) = [frame for frame in sent if frame.tag == 2]
        assert urgent.start_s < posted_s + chunk_s + 0.5  # of the 1.5 s that bulk still takes


def test_frames_last_as_long_as_the_medium_needs():
    with (
        BucketFile(on_air(100_000)) as file,
        group(2, buckets=file.path, log_frames=100) as (a, b),
    ):
        elapsed(a, b, 10_000)
        for engine in (a, b):
            (frame,) = [frame for frame in frames(engine) if frame.type == "data"]
            assert frame.end_s - frame.start_s >= 0.8 * 0.1


def test_rate_changes_what_is_under_way():
    with BucketFile(on_air(10.0)) as file, group(2, buckets=file.path) as (a, b):
        data, room = pattern(MB), np.zeros(MB, np.uint8)
        done = [receive(b, room, 0), send(a, data, 1)]
        assert not done[0].wait(0.1)
        file.set_rate(0, 1e6)
        assert finish(*done) == ["done", "done"]


def take_down(file: BucketFile, is_up: bool) -> None:
    file.set_rate(0, float(is_up))


def unplug(file: BucketFile, is_up: bool) -> None:
    file.connect(1, is_up)


@pytest.mark.parametrize("switch", [take_down, unplug])
@pytest.mark.parametrize("num_bytes", [0, 100, MB])
def test_nothing_passes_a_medium_that_is_down(switch, num_bytes):
    with BucketFile(on_air()) as file, group(2, buckets=file.path) as (a, b):
        move(a, b, (0, 1), 10)
        switch(file, False)
        data, room = pattern(num_bytes), np.zeros(num_bytes, np.uint8)
        done = [receive(b, room, 0), send(a, data, 1)]
        assert not done[0].wait(0.3)
        assert file.bytes_of_media() == [10]
        switch(file, True)
        assert finish(*done) == ["done", "done"]
        assert np.array_equal(data, room)


def test_peer_behind_a_link_that_stays_down_is_lost():
    options = {"heartbeat_s": 0.2, "dead_s": 1.0}
    with BucketFile(on_air()) as file, group(2, buckets=file.path, **options) as (a, b):
        move(a, b, (0, 1), 10)
        file.connect(0, False)
        reasons = [await_event(a, "peer_lost", 1), await_event(b, "peer_lost", 0)]
        # Who finds out first closes the connection, and the other one sees that.
        assert any("link is down" in reason for reason in reasons)


def test_cancelled_message_leaves_the_medium_to_others():
    with BucketFile(on_air()) as file, group(2, buckets=file.path) as (a, b):
        data, room = pattern(50 * MB), np.zeros(50 * MB, np.uint8)
        done = [receive(b, room, 0, tag=1), send(a, data, 1, tag=1)]
        until(lambda: file.bytes_of_media()[0] > 0)
        a.cancel(done[1])
        assert finish(*done) == ["protocol", "cancelled"]
        assert elapsed(a, b, 1000) < SLACK_S


@pytest.mark.parametrize("protection", ["header", "checksum", "mac", "encrypt"])
def test_bytes_arrive_as_sent(protection):
    options = {"protection": protection}
    with BucketFile(on_air(50 * MB)) as file, group(2, buckets=file.path, **options) as (a, b):
        for size in (0, 1, 20_000, 3 * MB):
            move(a, b, (0, 1), size)
            move(b, a, (1, 0), size)


def test_shared_medium_with_an_arbiter_is_fully_used():
    media = {"media": {0: [0], 1: [0], 2: [0]}, "arbiters": {0: 0}}
    with BucketFile(on_air(num_devices=3)) as file:
        engines = [_C.Engine(rank, KEY, host=HOST, buckets=file.path) for rank in range(3)]
        try:
            join(dict(enumerate(engines)), **media)
            data, rooms = pattern(MB), [np.zeros(MB, np.uint8) for _ in range(2)]
            start = time.perf_counter()
            done = [receive(engines[2], room, src) for src, room in enumerate(rooms)]
            done += [send(engines[src], data, 2, traffic_class=3 - src) for src in range(2)]
            assert set(finish(*done)) == {"done"}
            assert 2 * MB / RATE <= time.perf_counter() - start < 2 * MB / RATE + SLACK_S
        finally:
            for engine in engines:
                engine.close(0)


# ------------------------------------------------------------ who finds it


def _communicate(rank: int, rendezvous: str, path: str, num_elements: int) -> float:
    os.environ[BUCKETS_VARIABLE] = path
    one = Communicator.create(dist.FileStore(rendezvous, 2), rank, 2, timeout_s=30)
    one.barrier([0, 1]).wait(30)
    start = time.monotonic()
    tensor = torch.full((num_elements,), rank + 1.0)
    one.all_reduce(tensor, [0, 1]).wait(30)
    assert torch.equal(tensor, torch.full((num_elements,), 3.0))
    taken_s = time.monotonic() - start
    one.barrier([0, 1]).wait(30)
    one.close()
    return taken_s


def test_communicator_finds_the_network_in_its_environment():
    num_bytes = 4 * 250_000
    with BucketFile(on_air()) as file:
        assert dict(file.environment) == {BUCKETS_VARIABLE: file.path}
        taken_s = run_ranks(2, _communicate, file.path, num_bytes // 4, backend=None)
        # A ring of two sends every byte twice, on one medium.
        assert min(taken_s) >= 2 * num_bytes / RATE * 0.95
        assert sum(sent for sent, _ in file.bytes_of_devices()) >= 2 * num_bytes


def test_without_the_variable_there_is_no_network(monkeypatch):
    monkeypatch.delenv(BUCKETS_VARIABLE, raising=False)
    assert emulated_network() == {}
    monkeypatch.setenv(BUCKETS_VARIABLE, "/nowhere")
    assert emulated_network() == {"buckets": "/nowhere"}


def test_ranks_may_be_in_another_order_than_devices():
    cluster = network({"air": RATE, "cable": 1e3 * RATE}, {"02": ["air"], "10": ["cable"]}, 3)
    with BucketFile(cluster, ["2", "0"]) as file, group(2, buckets=file.path) as (a, b):
        move(b, a, (1, 0), 1000)
        assert file.bytes_of_media() == [1000, 0]
        assert file.bytes_of_devices() == [(0, 1000), (1000, 0)]


def test_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_bytes(bytes(10_000))
    for name in ("missing", "empty", "other"):
        with pytest.raises(ValueError, match="buckets: given"):
            _C.Engine(0, KEY, buckets=str(tmp_path / name))
    with BucketFile(on_air()) as file:
        path = file.path
        a = _C.Engine(0, KEY, host=HOST, buckets=path)
        with pytest.raises(ValueError, match="device: given 2, allowed: less than 2"):
            a.connect({2: (HOST, a.port)})
        a.close(0)
    with pytest.raises(ValueError, match="has its testbed ended"):
        _C.Buckets(path)


# ------------------------------------------------------------ shares of the processor

SPIN = "while True: pass"


@contextmanager
def program(text: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", text])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def used_s(pid: int, seconds: float) -> tuple[float, float]:
    """(processor time, time) of the next seconds."""
    before, start = cpu_s(pid), time.monotonic()
    time.sleep(seconds)
    return cpu_s(pid) - before, time.monotonic() - start


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("cores", [0.05, 0.2, 0.5])
def test_process_gets_no_more_than_its_share(cores):
    with program(SPIN) as process, Duty() as duty:
        duty.limit(process.pid, cores)
        used_s(process.pid, 0.2)  # it may have run freely before
        used, passed = used_s(process.pid, 1.5)
        # A processor that others use gives less: that is not what is tested.
        assert 0.1 * cores * passed < used < (cores + 0.03) * passed + 0.1


def test_threads_count_together():
    text = "import threading as t\n[t.Thread(target=exec, args=(%r,)).start() for _ in '12']" % SPIN
    with program(text) as process, Duty() as duty:
        duty.limit(process.pid, 0.3)
        used_s(process.pid, 0.2)
        used, passed = used_s(process.pid, 1.0)
        assert used < 0.33 * passed + 0.1


def test_share_of_zero_stops_and_none_frees():
    with program(SPIN) as process, Duty() as duty:
        duty.limit(process.pid, 0)
        until(lambda: is_stopped(process.pid))
        assert used_s(process.pid, 0.3)[0] == 0
        duty.limit(process.pid, 0.5)
        assert used_s(process.pid, 0.5)[0] > 0
        duty.limit(process.pid, None)
        until(lambda: not is_stopped(process.pid))
        assert duty_is_over(process.pid)


def duty_is_over(pid: int) -> bool:
    return not any(is_stopped(pid) or time.sleep(0.01) for _ in range(20))


def test_all_go_on_when_it_is_closed():
    with program(SPIN) as process:
        with Duty() as duty:
            duty.limit(process.pid, 0)
            until(lambda: is_stopped(process.pid))
        assert duty_is_over(process.pid)
        duty.close()


def test_all_go_on_when_the_program_ends():
    text = (
        "import sys, time\nfrom dora.testbed.duty import Duty\n"
        "duty = Duty()\nduty.limit(int(sys.argv[1]), 0)\ntime.sleep(0.5)\n"
    )
    with program(SPIN) as process:
        subprocess.run([sys.executable, "-c", text, str(process.pid)], check=True, timeout=40)
        assert duty_is_over(process.pid)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()


def kill_and_wait(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("end", [kill, kill_and_wait])
def test_process_that_ends_is_left_alone(end: Callable[[Any], None]):
    with program(SPIN) as process, program(SPIN) as other, Duty() as duty:
        duty.limit(process.pid, 0.2)
        duty.limit(other.pid, 0)
        end(process)
        assert process.wait(10) == -signal.SIGKILL
        duty.limit(process.pid, 0.5)
        until(lambda: is_stopped(other.pid))
        duty.limit(other.pid, None)
        until(lambda: not is_stopped(other.pid))


def test_share_below_zero_is_refused():
    with Duty() as duty, pytest.raises(ValueError, match="cores: given -1, allowed: 0 or more"):
        duty.limit(os.getpid(), -1)
