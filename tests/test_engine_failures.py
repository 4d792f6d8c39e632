"""The engine when processes die, links fail and strangers call."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from engines import (
    ANY,
    HANDSHAKE_BYTES,
    HOST,
    KEY,
    Child,
    Proxy,
    await_event,
    finish,
    flip,
    group,
    move,
    pattern,
    proxied,
    receive,
    send,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dora import _C

pytestmark = [pytest.mark.timeout(60)]
MIB = 1 << 20
HEADER_BYTES = _C.HEADER_BYTES
URGENT_LANE, BULK_LANE = 0, 1


def events(engine, kind):
    return [event for event in engine.events() if event[0] == kind]


# ------------------------------------------------------------ processes that stop


def serving(pipe, parents, options):
    """Rank 1 or 2 beside engines in the parent: sends what it is told, until it is killed."""
    rank = pipe.recv()
    engine = _C.Engine(rank, KEY, host=HOST, **options)
    pipe.send(engine.port)
    engine.connect({r: (HOST, port) for r, port in parents.items()})
    assert engine.wait_connected(20) == []
    kept = []
    while True:
        dst, tag, size = pipe.recv()
        data = pattern(size, tag)
        kept.append((data, send(engine, data, dst, tag=tag)))


@contextlib.contextmanager
def with_child(**options):
    """Engines 0 and 2 here, engine 1 in a child."""
    engines = {rank: _C.Engine(rank, KEY, host=HOST, **options) for rank in (0, 2)}
    child = Child(serving, {rank: engine.port for rank, engine in engines.items()}, options)
    try:
        child.pipe.send(1)
        port = child.take()
        for rank, engine in engines.items():
            other = 2 - rank
            engine.connect({1: (HOST, port), other: (HOST, engines[other].port)})
        assert engines[0].wait_connected(20) == engines[2].wait_connected(20) == []
        yield engines[0], engines[2], child
    finally:
        child.end()
        for engine in engines.values():
            engine.close(0)


def stop(child):
    os.kill(child.process.pid, signal.SIGSTOP)


def resume(child):
    os.kill(child.process.pid, signal.SIGCONT)


def test_killed_peer_fails_its_operations_and_no_others():
    with with_child() as (a, c, child):
        room, other = np.zeros(256 * MIB, np.uint8), np.zeros(9 * MIB, np.uint8)
        child.pipe.send((0, 1, room.size))
        doomed = [
            receive(a, room, 1, tag=1),
            receive(a, other, 1, tag=2),
            send(a, other, 1, tag=3),
            a.barrier([0, 1, 2]),
            c.barrier([0, 1, 2]),
        ]
        bystander = receive(c, other, 0, tag=4)
        until(lambda: a.stats()["peers"][1]["bytes_received"] > MIB)
        child.process.kill()
        start_s = time.monotonic()
        assert set(finish(*doomed[:3], timeout_s=1)) == {"peer_lost"}
        assert time.monotonic() - start_s < 1
        assert {"done"}.isdisjoint(finish(*doomed[3:]))
        assert "rank 1" in doomed[0].error
        await_event(a, "peer_lost", 1)
        data = pattern(9 * MIB)
        assert finish(send(a, data, 2, tag=4), bystander) == ["done", "done"]
        assert np.array_equal(data, other)
        assert finish(receive(a, room, 1)) == finish(send(a, room, 1)) == ["peer_lost"]
        move(c, a, (2, 0), 100)


def test_stopped_peer_is_lost_after_dead_s_and_not_before():
    dead_s = 2.0
    with with_child(dead_s=dead_s, heartbeat_s=0.3) as (a, c, child):
        room = np.zeros(10, np.uint8)
        pending = receive(a, room, 1)
        start_s = time.monotonic()
        stop(child)
        assert finish(pending) == ["peer_lost"]
        # What was heard last may be a heartbeat older.
        assert time.monotonic() - start_s > dead_s - 0.7
        assert "no sign of life" in pending.error
        until(lambda: c.stats()["peers"][1]["state"] == "lost")
        move(a, c, (0, 2), 9 * MIB)
        resume(child)


def test_peer_that_is_stopped_for_a_while_continues():
    with with_child(dead_s=8, heartbeat_s=0.3) as (a, c, child):
        room = np.zeros(256 * MIB, np.uint8)
        child.pipe.send((0, 1, room.size))
        pending = receive(a, room, 1, tag=1)
        until(lambda: a.stats()["peers"][1]["bytes_received"] > MIB)
        stop(child)
        time.sleep(1.5)
        resume(child)
        assert finish(pending) == ["done"]
        assert np.array_equal(room, pattern(room.size, 1))
        assert events(a, "peer_lost") == events(c, "peer_lost") == []


def test_rank_that_was_stopped_itself_hears_its_peers_first():
    # The child slept longer than its own dead_s; its peers are more patient, and have talked to
    # it all the time.
    with with_child_of_own_patience() as (a, child):
        stop(child)
        time.sleep(2.5)
        resume(child)
        child.pipe.send((0, 1, 1000))
        room = np.zeros(1000, np.uint8)
        assert finish(receive(a, room, 1, tag=1)) == ["done"]


@contextlib.contextmanager
def with_child_of_own_patience():
    a = _C.Engine(0, KEY, host=HOST, dead_s=30, heartbeat_s=0.2)
    child = Child(serving, {0: a.port}, {"dead_s": 1.5, "heartbeat_s": 0.2})
    try:
        child.pipe.send(1)
        a.connect({1: (HOST, child.take())})
        assert a.wait_connected(20) == []
        yield a, child
    finally:
        child.end()
        a.close(0)


# ------------------------------------------------------------ links that fail


def test_silent_link_is_noticed_by_both_sides():
    with proxied(dead_s=1.0, heartbeat_s=0.2) as (a, b, proxy):
        move(a, b, (0, 1), 9 * MIB)
        room = np.zeros(9 * MIB, np.uint8)
        pending = [
            receive(a, room, 1, tag=1),
            send(b, room, 0, tag=2),
            receive(a, room, ANY, tag=3, timeout_s=0.1),
        ]
        proxy.silence()
        assert finish(*pending) == ["peer_lost", "peer_lost", "timed_out"]
        await_event(a, "peer_lost", 1)
        await_event(b, "peer_lost", 0)


@pytest.mark.slow
def test_link_that_was_slow_for_a_while_is_used_fully_again():
    with proxied() as (a, b, proxy):
        data, room = pattern(64 * MIB), np.zeros(64 * MIB, np.uint8)
        proxy.rate_bytes_per_s = 1e6
        pending = receive(b, room, 0), send(a, data, 1)
        # Longer than the memory of the rate estimate.
        assert not pending[0].wait(4)
        proxy.rate_bytes_per_s = 0.0
        # At the slow rate this would take a minute; memory to memory it takes a fraction of 1 s.
        assert finish(*pending, timeout_s=20) == ["done", "done"]
        assert np.array_equal(data, room)


def altered_payload(protection):
    """A message of which one bit is changed on its way; returns what became of it."""
    at = HANDSHAKE_BYTES + HEADER_BYTES + 100  # in the payload of the first frame
    with proxied(flip(BULK_LANE, at), protection=protection) as (a, b, _):
        data, room = pattern(100_000), np.zeros(100_000, np.uint8)
        pending = [receive(b, room, 0), send(a, data, 1)]
        other = send(a, data[:1000], 1, tag=1), receive(b, room[:1000], 0, tag=1)
        finish(*pending, *other)
        if protection == "checksum":
            assert [p.outcome for p in other] == ["done", "done"]
            assert b.stats()["peers"][0]["state"] == "open"
            move(a, b, (0, 1), 100_000, tag=0)
            move(b, a, (1, 0), 100_000, tag=0)
        stats = b.stats()
        return pending[0], stats["peers"][0], stats["protocol_errors"]


@pytest.mark.parametrize("traffic_class, size", [(0, 60_000), (2, 200_000)])
def test_what_was_sent_arrives_from_who_closes_then(traffic_class, size):
    """Answers that meet a closed socket would make the kernel drop what it has not sent yet."""
    with proxied(buffer_bytes=4096) as (a, b, proxy):
        data, room = pattern(size), np.zeros(size, np.uint8)
        pending = receive(b, room, 0, tag=1)
        move(b, a, (1, 0), 10)  # so that `a` knows of it
        proxy.rate_bytes_per_s = 2e5
        assert finish(send(a, data, 1, tag=1, traffic_class=traffic_class)) == ["done"]
        closing = threading.Thread(target=a.close, args=(10,))
        closing.start()
        while not pending.is_done():
            send(b, pattern(10), 0, tag=2, traffic_class=traffic_class)
            time.sleep(0.002)
        closing.join()
        assert finish(pending) == ["done"], pending.error
        assert np.array_equal(data, room)


def test_altered_payload_fails_one_operation_with_a_checksum():
    pending, peer, protocol_errors = altered_payload("checksum")
    assert pending.outcome == "protocol"
    assert "checksum" in pending.error
    assert (peer["corrupt_frames"], protocol_errors) == (1, 0)


@pytest.mark.parametrize("protection", ["mac", "encrypt"])
def test_altered_payload_loses_the_peer_with_a_mac(protection):
    pending, peer, protocol_errors = altered_payload(protection)
    assert pending.outcome == "peer_lost"
    assert "altered" in pending.error
    assert (peer["state"], protocol_errors) == ("lost", 1)


@pytest.mark.parametrize("protection", ["header", "checksum", "mac", "encrypt"])
@pytest.mark.parametrize("at", [0, 3, 12, 41, 50, HEADER_BYTES - 1])
def test_altered_header_loses_the_peer(protection, at):
    with proxied(flip(BULK_LANE, HANDSHAKE_BYTES + at), protection=protection) as (a, b, _):
        data, room = pattern(100_000), np.zeros(100_000, np.uint8)
        pending = receive(b, room, 0), send(a, data, 1)
        assert finish(*pending)[0] == "peer_lost"
        assert "altered" in pending[0].error
        assert b.stats()["protocol_errors"] == 1
        assert b.stats()["peers"][0]["state"] == "lost"
        assert not np.any(room), "bytes of a refused frame were delivered"


@pytest.mark.parametrize("at", range(0, HANDSHAKE_BYTES, 13))
def test_altered_handshake_never_authenticates(at):
    a, b = (_C.Engine(rank, KEY, host=HOST, connect_timeout_s=0.5) for rank in range(2))
    proxy = Proxy(b.port, flip(BULK_LANE, at))
    try:
        a.connect({1: (HOST, proxy.port)})
        b.connect({0: (HOST, a.port)})
        assert a.wait_connected(10) == [1]
        assert b.wait_connected(10) == [0]
    finally:
        a.close(0)
        b.close(0)
        proxy.close()


def say(port, data):
    """Sends bytes to a listener and returns its answer, until it closes or says nothing more."""
    answer = b""
    with socket.create_connection((HOST, port)) as stranger, contextlib.suppress(OSError):
        stranger.settimeout(0.5)
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        while got := stranger.recv(65536):
            answer += got
    return answer


def test_replayed_connection_is_refused():
    with proxied() as (a, b, proxy):
        move(a, b, (0, 1), 100_000)
        recorded = [bytes(record) for record in proxy.recorded]
        port = b.port
        assert len(recorded) == 2
        for record in recorded:
            assert len(record) >= HANDSHAKE_BYTES
            say(port, record)  # rank 0 is here already
        move(a, b, (0, 1), 100_000)
        assert events(b, "peer_lost") == []
    # The same rank, started anew, expects rank 0.
    with contextlib.closing(_C.Engine(1, KEY, host=HOST, port=port)) as b:
        b.connect({0: (HOST, 1)})
        for record in recorded:
            say(port, record)
        until(lambda: b.stats()["refused"] >= 2)
        assert all("key" in event[2] for event in events(b, "refused"))
        assert b.stats()["peers"][0]["state"] == "connecting"


# ------------------------------------------------------------ strangers


def test_wrong_key_is_refused_on_both_sides():
    with contextlib.ExitStack() as stack:
        a, b = _C.Engine(0, KEY, host=HOST), _C.Engine(1, b"x" * 32, host=HOST)
        for engine in (a, b):
            stack.callback(engine.close, 0)
        b.connect({0: (HOST, a.port)})
        a.connect({1: (HOST, b.port)})
        assert a.wait_connected(10) == [1]
        assert "key" in await_event(a, "peer_lost", 1)
        assert a.stats()["refused"] >= 1
        until(lambda: b.stats()["refused"] >= 1)
        assert b.stats()["peers"][0]["state"] == "connecting"


@pytest.mark.parametrize(
    "other", [{"job": 7}, {"protection": "mac"}], ids=lambda other: next(iter(other))
)
def test_other_job_or_protection_is_refused(other):
    a, b = _C.Engine(0, KEY, host=HOST), _C.Engine(1, KEY, host=HOST, **other)
    with contextlib.closing(a), contextlib.closing(b):
        b.connect({0: (HOST, a.port)})
        a.connect({1: (HOST, b.port)})
        assert a.wait_connected(10) == [1]
        assert next(iter(other)) in await_event(a, "peer_lost", 1)


def test_short_key_is_refused():
    with pytest.raises(ValueError, match="16"):
        _C.Engine(0, b"short", host=HOST)


def test_absent_peer_is_reported_after_the_connect_timeout():
    with socket.create_server((HOST, 0)) as unused:
        port = unused.getsockname()[1]
    with contextlib.closing(_C.Engine(0, KEY, host=HOST, connect_timeout_s=0.5)) as a:
        a.connect({1: (HOST, port)})
        room = np.zeros(10, np.uint8)
        pending = receive(a, room, 1)
        assert a.wait_connected(0.05) == [1]
        assert a.wait_connected(10) == [1]
        assert finish(pending) == ["peer_lost"]
        assert str(port) in pending.error


@pytest.fixture(scope="module")
def harassed():
    """Connected engines, and one that still waits for a peer."""
    with group(2) as (a, b), contextlib.closing(_C.Engine(2, KEY, host=HOST)) as waiting:
        waiting.connect({0: (HOST, 1), 1: (HOST, 1)})
        yield a, b, waiting


HELLO = bytes.fromhex("444f0101") + bytes(100)  # magic, version, kind


@settings(max_examples=200)
@given(
    data=st.one_of(
        st.binary(max_size=600),
        st.binary(max_size=300).map(lambda tail: HELLO[:4] + tail),
        st.binary(max_size=300).map(lambda tail: HELLO + tail),
    )
)
def test_garbage_harms_nobody(harassed, data):
    a, b, waiting = harassed
    for engine in harassed:
        say(engine.port, data)
    move(a, b, (0, 1), 1000)
    assert b.stats()["protocol_errors"] == 0
    assert waiting.stats()["peers"][0]["state"] == "connecting"


@pytest.mark.slow
def test_many_silent_strangers_do_not_keep_members_out():
    a, b = (_C.Engine(rank, KEY, host=HOST) for rank in range(2))
    with contextlib.closing(a), contextlib.closing(b), contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((HOST, b.port)))
        a.connect({1: (HOST, b.port)})
        b.connect({0: (HOST, a.port)})
        assert a.wait_connected(20) == b.wait_connected(20) == []
        move(a, b, (0, 1), 1000)


# ------------------------------------------------------------ fork and exit

START = """
import ctypes, os, sys
from dora import _C

key = b"k" * 32
a, b = (_C.Engine(rank, key, host="127.0.0.1") for rank in range(2))
a.connect({1: ("127.0.0.1", b.port)})
b.connect({0: ("127.0.0.1", a.port)})
assert a.wait_connected(10) == b.wait_connected(10) == []
memory = bytearray(1 << 25)
address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
"""

FORKED = (
    START
    + """
pending = a.receive(0, 0, 1, tag=1)
if (child := os.fork()) == 0:
    calls = [
        lambda: a.send(0, 0, 1),
        lambda: a.receive(0, 0, 1),
        lambda: a.barrier([0, 1]),
        lambda: a.connect({}),
        lambda: a.wait_connected(5),
        lambda: a.cancel(pending),
        lambda: a.reprioritise(pending, 1),
        lambda: a.reconfigure(3),
        lambda: a.stats(),
        lambda: a.log(),
        lambda: a.events(),
    ]
    wrong = []
    for i, call in enumerate(calls):
        try:
            call()
            wrong.append(i)
        except RuntimeError as error:
            assert "fork" in str(error), error
    if wrong:
        print("calls that work in a forked child:", wrong, flush=True)
    os._exit(len(wrong))
_, status = os.waitpid(child, 0)
sent = b.send(0, 0, 0, tag=1)
assert sent.wait(10) and pending.wait(10) and pending.outcome == "done", pending.error
sys.exit(os.waitstatus_to_exitcode(status))
"""
)

# What the child does with an engine that it has inherited, at its end.
INHERITED = (
    START
    + """
pending = a.receive(0, 0, 1, tag=1)
if (child := os.fork()) == 0:
    WAY
    sys.exit(0)
_, status = os.waitpid(child, 0)
sent = b.send(0, 0, 0, tag=1)
assert sent.wait(10) and pending.wait(10) and pending.outcome == "done", pending.error
sys.exit(os.waitstatus_to_exitcode(status))
"""
)

PENDING = (
    START
    + """
pending = [
    a.receive(address, 100, 1, timeout_s=1e9),
    a.send(address, len(memory), 1, tag=5, timeout_s=1e9),
    a.all_reduce(address, 1000, "float32", "sum", [0, 1], timeout_s=1e9),
    b.barrier([0, 1], group=3),
]
WAY
"""
)


def run(script, limit_s=20):
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=limit_s)[0]
        assert process.returncode == 0, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also a forked child that hangs


def test_forked_child_is_told_and_the_parent_goes_on():
    run(FORKED)


DELETED, FORGOTTEN, CHILD_GOES_ON = (
    pytest.param(way, marks=pytest.mark.slow)
    for way in ("del a, b, pending", "del pending", "pass")
)


@pytest.mark.parametrize("way", [CHILD_GOES_ON, DELETED, "os._exit(0)"])
def test_forked_child_ends_with_an_inherited_engine(way):
    run(INHERITED.replace("WAY", way))


@pytest.mark.parametrize("way", ["sys.exit(0)", DELETED, FORGOTTEN, "a.close()"])
def test_interpreter_ends_with_operations_pending(way):
    run(PENDING.replace("WAY", way))


def test_wait_can_be_called_while_another_thread_closes():
    with group(2) as (a, _):
        room = np.zeros(10, np.uint8)
        pending = receive(a, room, 1)
        closing = threading.Timer(0.1, a.close, args=(0.1,))
        closing.start()
        assert finish(pending) == ["closed"]
        closing.join()
