"""The engine between several ranks in one process: messages, order, cancelling, collectives."""

import contextlib
import random
import resource

import numpy as np
import pytest
import torch
from engines import (
    ANY,
    HOST,
    KEY,
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora import _C

pytestmark = [pytest.mark.timeout(60)]
MIB = 1 << 20
PROTECTIONS = ["header", "checksum", "mac", "encrypt"]


@pytest.fixture(scope="module")
def pair():
    with group(2) as engines:
        yield engines


@pytest.fixture(scope="module")
def trio():
    with group(3) as engines:
        yield engines


# ------------------------------------------------------------ bytes


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_messages_arrive_byte_for_byte_posted_early_and_late(protection):
    with group(2, protection=protection) as (a, b):
        chunk = a.stats()["peers"][1]["chunk_bytes"]
        for size in [0, 1, 63, chunk - 1, chunk, chunk + 1, 4 * MIB, 10 * MIB + 3]:
            for is_late in [False, True]:
                data, room = pattern(size, size), np.zeros(size, np.uint8)
                post = [lambda r=room: receive(b, r, 0), lambda d=data: send(a, d, 1)]
                if is_late:
                    post.reverse()
                first = post[0]()
                if is_late and size <= MIB:
                    assert finish(first) == ["done"]  # it left without a receive
                second = post[1]()
                assert finish(first, second) == ["done", "done"], (first.error, second.error)
                assert np.array_equal(data, room)


def test_unaligned_memory_arrives(pair):
    a, b = pair
    for shift in (1, 3):
        data, room = pattern(300_001)[shift:], np.zeros(300_001, np.uint8)[shift:]
        done = receive(b, room, 0, tag=5), send(a, data, 1, tag=5)
        assert finish(*done) == ["done", "done"]
        assert np.array_equal(data, room)


def test_tags_groups_and_priorities_match_in_any_order(pair):
    a, b = pair
    rng = random.Random(1)
    keys = [(g, tag, i) for g in range(3) for tag in range(20) for i in range(3)]
    rooms = {key: np.zeros(100 + 1000 * key[1], np.uint8) for key in keys}
    data = {key: pattern(rooms[key].size, abs(hash(key))) for key in keys}
    operations = []
    for turn in (receive, send):
        order = list(keys)
        rng.shuffle(order)
        order.sort(key=lambda key: key[2])  # equals match in the order of posting
        for key in order:
            if turn is receive:
                operations.append(receive(b, rooms[key], 0, group=key[0], tag=key[1]))
            else:
                options = {"traffic_class": rng.randint(1, 4), "deadline": rng.random()}
                operations.append(send(a, data[key], 1, group=key[0], tag=key[1], **options))
    assert set(finish(*operations)) == {"done"}
    assert all(np.array_equal(data[key], rooms[key]) for key in keys)


def test_receives_posted_before_the_connection_are_served():
    engines = [_C.Engine(rank, KEY, host=HOST) for rank in range(2)]
    data, room = pattern(8 * MIB), np.zeros(8 * MIB, np.uint8)
    try:
        a, b = engines
        b.connect({0: (HOST, a.port)})
        pending = receive(b, room, 0)
        a.connect({1: (HOST, b.port)})
        sent = send(a, data, 1)
        assert finish(pending, sent, timeout_s=10) == ["done", "done"]
        assert np.array_equal(data, room)
    finally:
        for engine in engines:
            engine.close(0)


def test_receive_from_anybody_tells_the_source(trio):
    rooms = [np.zeros(size, np.uint8) for size in (1000, 1000, 9 * MIB, 9 * MIB)]
    early = [receive(trio[0], room, ANY, tag=1) for room in rooms[:2]]
    assert [operation.source for operation in early] == [-1, -1]
    data = {r: pattern(1000, r) for r in (1, 2)}
    sends = [send(trio[r], data[r], 0, tag=1) for r in (1, 2)]
    assert set(finish(*early, *sends)) == {"done"}
    data = {r: pattern(9 * MIB, r) for r in (1, 2)}
    sends = [send(trio[r], data[r], 0, tag=2) for r in (1, 2)]
    late = [receive(trio[0], room, ANY, tag=2) for room in rooms[2:]]
    assert set(finish(*late, *sends)) == {"done"}
    for operations in (early, late):
        assert {operation.source for operation in operations} == {1, 2}
    for operation, room in zip([*early, *late], rooms, strict=True):
        assert np.array_equal(room, pattern(room.size, operation.source))


def test_completion_queue_tells_what_has_finished(pair):
    a, b = pair
    queue = _C.CompletionQueue()
    data, room = pattern(1000), np.zeros(1000, np.uint8)
    pending = receive(b, room, 0, tag=6)
    pending.notify(queue)
    assert queue.take(0.01) == []
    sent = send(a, data, 1, tag=6)
    assert queue.take(10) == [pending.id]
    finish(sent)
    sent.notify(queue)  # finished before
    assert queue.take(10) == [sent.id]
    queue.close()
    assert queue.is_closed
    assert queue.take(10) == []


# ------------------------------------------------------------ order on the wire


def follow(log, posted):
    """Checks that each chunk belonged to the message that had to go first.

    `posted`: tag -> (class, deadline, order, bytes), all waiting for a grant.
    """
    waiting = {}
    left = {tag: message[-1] for tag, message in posted.items()}
    steps = [(f.end_s, "grant", f) for f in log if f.type == "grant" and not f.is_sent]
    steps += [(f.start_s, "chunk", f) for f in log if f.type == "data" and f.is_sent]
    for _, kind, frame in sorted(steps, key=lambda step: step[0]):
        if kind == "grant":
            waiting[frame.tag] = posted[frame.tag][:3]
            continue
        assert frame.tag == min(waiting, key=waiting.get), "a less urgent chunk went first"
        assert frame.traffic_class == posted[frame.tag][0]
        assert frame.offset == posted[frame.tag][-1] - left[frame.tag]
        left[frame.tag] -= frame.length
        if left[frame.tag] == 0:
            del waiting[frame.tag]
    assert not waiting
    assert not any(left.values())


def test_urgent_messages_pass_bulk_on_the_wire():
    # Without eager credit a message is ready when its grant arrives, which the log shows.
    options = {"eager_credit_bytes": 0, "log_frames": 100_000, "aging_s": 1e6}
    with group(2, {"rates": {0: 50e6, 1: 50e6}}, **options) as (a, b):
        posted = {0: (3, 0.0, 0, 24 * MIB)}
        for i in range(1, 13):
            posted[i] = (2, float(i // 4 % 2), i, 100_000 + i)
        data = {tag: pattern(message[-1], tag) for tag, message in posted.items()}
        rooms = {tag: np.zeros(message[-1], np.uint8) for tag, message in posted.items()}
        operations = [
            send(a, data[tag], 1, tag=tag, traffic_class=message[0], deadline=message[1])
            for tag, message in posted.items()
        ]
        operations.append(receive(b, rooms[0], 0, tag=0))
        until(lambda: any(f.type == "data" and f.is_sent for f in frames(a)))
        operations += [receive(b, rooms[tag], 0, tag=tag) for tag in range(1, 13)]
        assert set(finish(*operations)) == {"done"}
        log = frames(a)
        follow(log, posted)
        order = [f.tag for f in log if f.type == "data" and f.is_sent]
        assert order[0] == order[-1] == 0  # bulk was passed on its way
        assert a.stats()["peers"][1]["bulk"]["preemptions"] >= 1
        assert all(np.array_equal(data[tag], rooms[tag]) for tag in posted)


def test_reprioritised_message_passes_others():
    options = {"eager_credit_bytes": 0, "log_frames": 100_000, "aging_s": 1e6}
    with group(2, {"rates": {0: 20e6, 1: 20e6}}, **options) as (a, b):
        data = [pattern(4 * MIB, i) for i in range(3)]
        rooms = [np.zeros(4 * MIB, np.uint8) for _ in range(3)]
        sends = [send(a, data[i], 1, tag=i, traffic_class=3) for i in range(3)]
        receives = [receive(b, rooms[i], 0, tag=i) for i in range(3)]
        until(lambda: any(f.type == "data" and f.is_sent for f in frames(a)))
        a.reprioritise(sends[2], 2)
        assert set(finish(*sends, *receives)) == {"done"}
        last = {f.tag: i for i, f in enumerate(frames(a)) if f.type == "data" and f.is_sent}
        assert last[2] < last[0] < last[1]
        assert all(np.array_equal(*both) for both in zip(data, rooms, strict=True))


# ------------------------------------------------------------ ending early


def test_length_mismatch_names_both_sizes_on_both_sides(pair):
    a, b = pair
    data, room = pattern(9 * MIB), np.zeros(8 * MIB, np.uint8)
    for order in (0, 1):
        post = [lambda: send(a, data, 1, tag=20), lambda: receive(b, room, 0, tag=20)]
        operations = [post[order](), post[1 - order]()]
        assert finish(*operations) == ["protocol", "protocol"]
        for operation in operations:
            assert str(data.size) in operation.error
            assert str(room.size) in operation.error
    small = np.zeros(100, np.uint8)
    for order in (0, 1):
        post = [lambda: send(a, small, 1, tag=20), lambda: receive(b, small[:7], 0, tag=20)]
        operations = [post[order](), post[1 - order]()]
        finish(*operations)
        failed = operations[1 - order]
        assert failed.outcome == "protocol"
        assert "100 bytes" in failed.error
        assert "7" in failed.error
        assert operations[order].outcome in ("done", "protocol")  # it may have left before
    move(a, b, (0, 1), 1000, tag=20)


def test_timeout_fails_one_operation_only(pair):
    a, b = pair
    room, data = np.zeros(9 * MIB, np.uint8), pattern(9 * MIB)
    for size in (10, 9 * MIB):
        late = receive(b, room[:size], 0, tag=21, timeout_s=0.05)
        assert finish(late) == ["timed_out"]
        assert "0.05 s" in late.error
        assert "tag 21" in late.error
        assert finish(send(a, data[:size], 1, tag=21))[0] in ("protocol", "done")
        move(a, b, (0, 1), size, tag=21)
    unwanted = send(a, data, 1, tag=22, timeout_s=0.05)
    assert finish(unwanted) == ["timed_out"]
    assert finish(receive(b, room, 0, tag=22)) == ["protocol"]
    move(a, b, (0, 1), 9 * MIB, tag=22)


def cancel(engine, operation, buffer, fill):
    """Cancels and overwrites the memory as soon as it is free."""
    engine.cancel(operation)
    assert finish(operation)[0] in ("cancelled", "done")
    buffer[:] = fill


@pytest.mark.parametrize("size", [100, 5 * MIB])
@pytest.mark.parametrize("side", ["send", "receive"])
def test_cancel_frees_memory_and_ends_both_sides(side, size):
    with group(2, {"rates": {0: 100e6, 1: 100e6}}) as engines:
        a, b = engines
        for state in ("alone", "under way", "finished"):
            data, room = pattern(size), np.zeros(size, np.uint8)
            s = r = None
            if state != "alone" or side == "send":
                s = send(a, data, 1)
            if state != "alone" or side == "receive":
                r = receive(b, room, 0)
            if state == "under way" and size > MIB:
                before = b.stats()["peers"][0]["bytes_received"]
                until(lambda at=before: b.stats()["peers"][0]["bytes_received"] > at)
            if state == "finished":
                assert finish(s, r) == ["done", "done"]
            mine = s if side == "send" else r
            was_done = mine.is_done()
            cancel(engines[side == "receive"], mine, data if side == "send" else room, 0xEE)
            if was_done:
                assert mine.outcome == "done"
            # The other side ends too, with the message as it was or an error.
            s, r = s or send(a, data, 1), r or receive(b, room, 0)
            finish(s, r)
            if r.outcome == "done" and side == "send":
                assert np.array_equal(room, pattern(size))
            if side == "receive":
                assert np.all(room == 0xEE), "written after it was cancelled"
            move(a, b, (0, 1), size, tag=0)


def test_cancel_of_a_receive_from_anybody(pair):
    a, b = pair
    room = np.zeros(100, np.uint8)
    pending = receive(b, room, ANY, tag=23)
    cancel(b, pending, room, 0xEE)
    move(a, b, (0, 1), 100, tag=23)
    assert np.all(room == 0xEE)


def test_cancel_of_a_collective_ends_all_ranks(trio):
    x = [torch.ones(3_000_000) for _ in trio]
    pending = [
        trio[r].all_reduce(x[r].data_ptr(), x[r].numel(), "float32", "sum", [0, 1, 2], group=40)
        for r in (0, 1)
    ]
    trio[0].cancel(pending[0])
    pending.append(
        trio[2].all_reduce(x[2].data_ptr(), x[2].numel(), "float32", "sum", [0, 1, 2], group=40)
    )
    assert finish(*pending)[0] == "cancelled"
    check_all_reduce(trio, torch.float32, 1000, "sum", group=40)


# ------------------------------------------------------------ random programs

CONFIGS = {
    "small credit": ({}, {"eager_bytes": 4096, "eager_credit_bytes": 65536}),
    "many chunks": (
        {"rates": dict.fromkeys(range(3), 8e6)},  # chunks of 16 KiB
        {"eager_bytes": 16384, "eager_credit_bytes": 262_144, "pacing": False},
    ),
}
ACTIONS = ["", "", "", "cancel", "cancel later", "reprioritise"]


@pytest.fixture(scope="module", params=CONFIGS)
def configured(request):
    connect, options = CONFIGS[request.param]
    with group(3, connect, **options) as engines:
        yield engines, options


class Message:
    """Both sides of one message; memory is overwritten as soon as it is free again."""

    def __init__(self, size, seed):
        self.expected = pattern(size, seed)
        self.data = self.expected.copy()
        self.room = np.full(size, 0x55, np.uint8)
        self.send = self.receive = None

    def check(self):
        finish(self.send)
        self.data[:] = 0xEE
        finish(self.receive)
        if self.receive.outcome == "done":
            assert np.array_equal(self.room, self.expected)
        else:
            self.room[:] = 0x66

    def check_untouched(self):
        if self.receive.outcome != "done":
            assert np.all(self.room == 0x66), "written after it had ended"


def check_credit(engines, options):
    """All eager credit comes back: three quarters of it can be used again."""
    size = min(1000, options["eager_bytes"])
    count = options["eager_credit_bytes"] * 3 // 4 // (size + 256)
    for src, a in enumerate(engines):
        for dst, b in enumerate(engines):
            if src != dst:
                until(lambda b=b, src=src: b.stats()["peers"][src]["unexpected_bytes"] == 0)
                # A round that starts before the last credit has arrived needs its receives.
                until(lambda a=a, b=b, ranks=(src, dst): fill_credit(a, b, ranks, size, count), 20)


def fill_credit(a, b, ranks, size, count):
    """Sends and receives many messages; returns whether all sends ended before any receive."""
    data = pattern(size)
    sends = [send(a, data, ranks[1], tag=50) for _ in range(count)]
    is_eager = all(operation.wait(1) for operation in sends)
    received = [receive(b, data, ranks[0], tag=50) for _ in sends]
    assert set(finish(*sends, *received)) == {"done"}
    return is_eager


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    messages=st.lists(
        st.tuples(
            st.sampled_from([(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]),
            st.integers(0, 1),  # tag
            st.sampled_from([0, 1, 1000, 4096, 4097, 20_000, 65_536, 65_537, 200_000, 1_000_000]),
            st.integers(1, 4),  # class
            st.sampled_from(ACTIONS),
            st.sampled_from(ACTIONS),
        ),
        max_size=30,
    ),
    seed=st.integers(0, 1000),
)
def test_random_programs_end_on_both_sides_with_the_right_bytes(configured, messages, seed):
    engines, options = configured
    rng = random.Random(seed)
    events = [(i, side) for i in range(len(messages)) for side in ("send", "receive")]
    rng.shuffle(events)
    # On one channel and side the program order is kept, so that equals match.
    waiting = {}
    for i, side in sorted(events):
        waiting.setdefault((messages[i][:2], side), []).append(i)
    pairs = [Message(m[2], i) for i, m in enumerate(messages)]
    later = []
    for i, side in events:
        number = waiting[messages[i][:2], side].pop(0)
        (src, dst), tag, _, traffic_class, *actions = messages[number]
        both, action = pairs[number], actions[side == "receive"]
        if side == "send":
            engine = engines[src]
            both.send = send(engine, both.data, dst, tag=tag, traffic_class=traffic_class)
            if action == "reprioritise":
                engine.reprioritise(both.send, rng.randint(1, 4), rng.random())
        else:
            engine = engines[dst]
            both.receive = receive(engine, both.room, src, tag=tag)
        operation = getattr(both, side)
        if action == "cancel":
            engine.cancel(operation)
        elif action == "cancel later":
            later.append((engine, operation))
    for engine, operation in later:
        engine.cancel(operation)
    for both in pairs:
        both.check()
    for message, both in zip(messages, pairs, strict=True):
        both.check_untouched()
        if "cancel" not in message[4] and "cancel" not in message[5]:
            assert both.send.outcome == both.receive.outcome == "done", both.receive.error
    check_credit(engines, options)
    assert all(e.stats()["protocol_errors"] == 0 for e in engines)


def test_cancelled_eager_message_gives_its_credit_back_once():
    size = 1_000_000
    options = {"eager_credit_bytes": 4 * MIB}
    with group(2, {"rates": {0: 4e6, 1: 4e6}}, **options) as (a, b):
        data, room = pattern(size), np.zeros(size, np.uint8)
        sends = [send(a, data, 1, tag=2) for _ in range(3)]
        assert set(finish(*sends)) == {"done"}
        doomed = send(a, data, 1, tag=1)
        until(lambda: b.stats()["peers"][0]["unexpected_bytes"] > 3 * (size + 256))
        a.cancel(doomed)
        assert finish(doomed, receive(b, room, 0, tag=1)) == ["cancelled", "protocol"]
        sends = [send(a, data, 1, tag=2) for _ in range(2)]
        sends[0].wait(2)
        sends[1].wait(0.5)
        assert b.stats()["peers"][0]["unexpected_bytes"] <= 4 * MIB
        assert b.stats()["peers"][0]["state"] == "open", b.events()
        for _ in range(5):
            assert finish(receive(b, room, 0, tag=2)) == ["done"]
            assert np.array_equal(room, data)
        assert set(finish(*sends)) == {"done"}


# ------------------------------------------------------------ memory


def test_unexpected_data_stays_below_the_credit():
    credit = 1 * MIB
    with group(2, eager_credit_bytes=credit) as (a, b):
        data = pattern(64 * MIB)
        sends = [send(a, data, 1, tag=1)]
        sends += [send(a, data[i * MIB : (i + 1) * MIB], 1, tag=2) for i in range(32)]
        sends += [send(a, data[i * 4000 : (i + 1) * 4000], 1, tag=3) for i in range(2000)]
        until(lambda: b.stats()["peers"][0]["unexpected_bytes"] > credit // 2)
        for _ in range(100):
            assert b.stats()["peers"][0]["unexpected_bytes"] <= credit
        room = np.zeros(64 * MIB, np.uint8)
        receives = [receive(b, room[i * 4000 : (i + 1) * 4000], 0, tag=3) for i in range(2000)]
        assert set(finish(*receives)) == {"done"}
        assert np.array_equal(room[: 2000 * 4000], data[: 2000 * 4000])
        receives = [receive(b, room[i * MIB : (i + 1) * MIB], 0, tag=2) for i in range(32)]
        assert set(finish(*receives)) == {"done"}
        assert np.array_equal(room[: 32 * MIB], data[: 32 * MIB])
        assert finish(receive(b, room, 0, tag=1)) == ["done"]
        assert np.array_equal(room, data)
        assert set(finish(*sends)) == {"done"}
        assert b.stats()["peers"][0]["unexpected_bytes"] == 0


def test_late_receives_in_reverse_order_do_not_block():
    with group(2, eager_credit_bytes=65536) as (a, b):
        data, rooms = pattern(500_000).reshape(5000, 100), np.zeros((5000, 100), np.uint8)
        sends = [send(a, row, 1, tag=tag) for tag, row in enumerate(data)]
        receives = [receive(b, rooms[tag], 0, tag=tag) for tag in reversed(range(5000))]
        assert set(finish(*sends, *receives)) == {"done"}
        assert np.array_equal(data, rooms)


def exchange_small(a, b, count, timeout_s):
    data, room = pattern(64), np.zeros(64, np.uint8)
    for _ in range(count // 500):
        operations = []
        for _ in range(500):
            operations.append(receive(b, room, 0, tag=1, timeout_s=timeout_s))
            operations.append(send(a, data, 1, tag=1, timeout_s=timeout_s))
        assert set(finish(*operations)) == {"done"}


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_many_messages_leave_no_memory_behind(pair):
    exchange_small(*pair, 20_000, timeout_s=1800)
    before = resident_bytes()
    exchange_small(*pair, 100_000, timeout_s=1800)
    assert resident_bytes() - before < 8 * MIB


# ------------------------------------------------------------ collectives

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
}
OPS = {
    "sum": lambda x: x.sum(0),
    "product": lambda x: x.prod(0),
    "min": lambda x: x.amin(0),
    "max": lambda x: x.amax(0),
}
WORLD = [0, 1, 2]


def numbers(dtype, count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(0, 5, (3, count), generator=generator)  # exact in every type
    return values.to(dtype)


def check_all_reduce(engines, dtype, count, op, **options):
    x = numbers(dtype, count)
    expected = OPS[op](x.to(torch.int64)).to(dtype)
    work = [x[rank].clone() for rank in WORLD]
    pending = [
        engines[r].all_reduce(work[r].data_ptr(), count, DTYPES[dtype], op, WORLD, **options)
        for r in WORLD
    ]
    assert set(finish(*pending)) == {"done"}, [p.error for p in pending]
    for rank in WORLD:
        assert torch.equal(work[rank], expected), (dtype, count, op)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_equals_torch(trio, dtype):
    for op in OPS:
        for count in (0, 1, 2, 1001, 100_003):
            check_all_reduce(trio, dtype, count, op)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_equals_torch(trio, dtype):
    for count in (0, 1, 77, 50_001):
        x = numbers(dtype, 3 * count)
        out = [torch.zeros(count, dtype=dtype) for _ in WORLD]
        pending = [
            trio[r].reduce_scatter(
                x[r].data_ptr(), out[r].data_ptr(), count, DTYPES[dtype], "sum", WORLD
            )
            for r in WORLD
        ]
        assert set(finish(*pending)) == {"done"}
        expected = x.to(torch.int64).sum(0).to(dtype)
        assert torch.equal(torch.cat(out), expected)


def test_all_gather_broadcast_and_barrier(trio):
    for size in (0, 1, 1000, 3 * MIB + 1):
        x = [pattern(size, rank) for rank in WORLD]
        out = [np.zeros(3 * size, np.uint8) for _ in WORLD]
        pending = [
            trio[r].all_gather(x[r].ctypes.data, out[r].ctypes.data, size, WORLD) for r in WORLD
        ]
        assert set(finish(*pending)) == {"done"}
        assert all(np.array_equal(each, np.concatenate(x)) for each in out)
        root = x[1].copy()
        pending = [trio[r].broadcast(x[r].ctypes.data, size, 1, WORLD) for r in WORLD]
        assert set(finish(*pending)) == {"done"}
        assert all(np.array_equal(each, root) for each in x)
    first = [trio[r].barrier(WORLD) for r in (0, 1)]
    assert not first[0].wait(0.05)
    assert not first[1].is_done()
    assert set(finish(*first, trio[2].barrier(WORLD))) == {"done"}


def test_all_reduce_by_shares_is_the_weighted_average(trio):
    shares = [0.5, 0.2, 0.3]
    for count in (3, 200_000):
        x = torch.rand(3, count, generator=torch.Generator().manual_seed(0))
        work = [x[rank].clone() for rank in WORLD]
        pending = [
            trio[r].all_reduce(work[r].data_ptr(), count, "float32", "sum", WORLD, shares=shares)
            for r in WORLD
        ]
        assert set(finish(*pending)) == {"done"}
        expected = (x.double() * torch.tensor(shares).double()[:, None]).sum(0).float()
        torch.testing.assert_close(work[0], expected)
        assert torch.equal(work[0], work[1])
        assert torch.equal(work[0], work[2])


def test_collectives_of_many_groups_run_at_once(trio):
    x = torch.ones(20, 3, 50_000)
    pending = []
    for rank in WORLD:
        order = list(range(20))
        random.Random(rank).shuffle(order)
        for number in order:
            address = x[number, rank].data_ptr()
            pending.append(
                trio[rank].all_reduce(address, 50_000, "float32", "sum", WORLD, group=100 + number)
            )
    assert set(finish(*pending)) == {"done"}
    assert torch.all(x == 3)


# ------------------------------------------------------------ epochs and closing


def test_reconfigured_group_continues_in_the_new_epoch():
    with group(3) as engines:
        move(engines[0], engines[1], (0, 1), 100_000)
        room = np.zeros(100, np.uint8)
        pending = [receive(engines[0], room, 1, tag=1), receive(engines[0], room, ANY, tag=2)]
        engines[0].reconfigure(5)
        assert finish(*pending) == ["closed", "closed"]
        assert engines[0].epoch == 5
        with pytest.raises(ValueError, match="epoch: given 5, allowed: more than the current 5"):
            engines[0].reconfigure(5)
        # A rank of an old epoch is refused, and called again until it has come along.
        until(lambda: engines[1].stats()["peers"][0]["state"] == "lost")
        engines[0].connect({1: (HOST, engines[1].port)})
        until(lambda: any(e[0] == "refused" and "epoch" in e[2] for e in engines[1].events()))
        assert engines[0].stats()["peers"][1]["state"] == "connecting"
        engines[1].reconfigure(5)
        engines[1].connect({0: (HOST, engines[0].port)})
        assert engines[0].wait_connected(10) == engines[1].wait_connected(10) == []
        move(engines[0], engines[1], (0, 1), 9 * MIB)
        move(engines[1], engines[0], (1, 0), 100)


def test_groups_are_reconfigured_again_and_again():
    with group(3) as engines:
        for epoch in range(1, 6):
            data = pattern(9 * MIB)
            room = np.zeros(9 * MIB, np.uint8)
            pending = [send(engines[0], data, 1), receive(engines[2], room, 1)]
            for engine in engines:
                engine.reconfigure(epoch)
            finish(*pending)
            join(dict(enumerate(engines)))
            move(engines[1], engines[2], (1, 2), 100_000)
            check_all_reduce(engines, torch.float32, 10_000, "sum")


def test_close_fails_what_is_pending_and_tells_the_peer():
    with group(2) as (a, b):
        room, data = np.zeros(9 * MIB, np.uint8), pattern(9 * MIB)
        mine = [send(a, data, 1, tag=1), receive(a, room, 1, tag=2), receive(a, room, ANY, tag=3)]
        theirs = [receive(b, room, 0, tag=4), send(b, data, 0, tag=5)]
        x = torch.ones(10)
        mine.append(a.all_reduce(x.data_ptr(), 10, "float32", "sum", [0, 1]))
        a.close(0.1)
        assert set(finish(*mine)) == {"closed"}
        assert set(finish(*theirs)) == {"peer_lost"}
        a.close()
        with pytest.raises(RuntimeError, match="closed"):
            send(a, data, 1)
        with pytest.raises(RuntimeError, match="closed"):
            a.barrier([0, 1])
        await_event(b, "peer_lost", 0)


def test_close_lingers_until_sends_have_left():
    for size in (100, MIB, 9 * MIB):
        with group(2) as (a, b):
            data, room = pattern(size), np.zeros(size, np.uint8)
            pending = receive(b, room, 0)
            sent = send(a, data, 1)
            a.close(10)
            assert finish(sent, pending) == ["done", "done"]
            assert np.array_equal(data, room)


@pytest.mark.parametrize("word", ["", "sha", None])
def test_wrong_arguments_are_refused(pair, word):
    with pytest.raises((ValueError, TypeError)):
        _C.Engine(0, KEY, protection=word)
    with pytest.raises(ValueError, match="given 15 bytes|16"):
        _C.Engine(0, b"k" * 15)
    with pytest.raises(ValueError, match="class"):
        pair[0].send(0, 0, 1, traffic_class=5)
    with pytest.raises(ValueError, match="tag"):
        pair[0].send(0, 0, 1, tag=-1)
    with pytest.raises(ValueError, match="host"):
        _C.Engine(0, KEY, host="no address")


# ------------------------------------------------------------ shared media


MEDIA = {"media": {rank: [0] for rank in range(4)}, "arbiters": {0: 0}}


def bulk(engine, size, dst, tag, traffic_class):
    """The memory and its send."""
    data = pattern(size, tag)
    return data, send(engine, data, dst, tag=tag, traffic_class=traffic_class)


def test_arbiter_lets_one_sender_use_the_medium_at_a_time():
    connect = MEDIA | {"rates": dict.fromkeys(range(4), 40e6)}
    with group(4, connect, log_frames=100_000, aging_s=1e6) as engines:
        rooms = [np.zeros(12 * MIB, np.uint8) for _ in range(2)]
        receives = [receive(engines[3], rooms[i], i + 1, tag=i) for i in range(2)]
        first = bulk(engines[1], 12 * MIB, 3, 0, 4)
        until(lambda: any(f.is_sent and f.type == "data" for f in frames(engines[1])))
        second = bulk(engines[2], 12 * MIB, 3, 1, 2)
        assert set(finish(first[1], second[1], *receives)) == {"done"}
        assert np.array_equal(rooms[0], first[0])
        assert np.array_equal(rooms[1], second[0])
        asked = [(f.peer, f.type) for f in frames(engines[0]) if f.type in ("want", "return")]
        assert asked[:3] == [(1, "want"), (2, "want"), (1, "return")]
        told = [f.type for f in frames(engines[1]) if f.type in ("allow", "revoke")]
        assert told == ["allow", "revoke", "allow"]
        urgent = [f for f in frames(engines[2]) if f.type == "data" and f.is_sent]
        begin_s, end_s = urgent[0].start_s, urgent[-1].start_s
        chunks = [f.start_s for f in frames(engines[1]) if f.type == "data" and f.is_sent]
        assert not [s for s in chunks if begin_s <= s <= end_s], "both used the medium"
        assert min(chunks) < begin_s
        assert max(chunks) > end_s  # the urgent one went first


def test_lost_arbiter_leaves_the_medium_free():
    with group(3, MEDIA | {"rates": dict.fromkeys(range(3), 40e6)}) as engines:
        rooms = [np.zeros(8 * MIB, np.uint8) for _ in range(2)]
        sent = [bulk(engines[i], 8 * MIB, 3 - i, 0, 3) for i in (1, 2)]
        operations = [
            receive(engines[2], rooms[0], 1),
            receive(engines[1], rooms[1], 2),
            *(operation for _, operation in sent),
        ]
        engines[0].close(0)
        assert set(finish(*operations)) == {"done"}
        for engine in engines[1:]:
            await_event(engine, "arbiter_lost", 0)
        move(engines[1], engines[2], (1, 2), 9 * MIB)


def test_arbiter_that_comes_late_is_waited_for():
    engines = [_C.Engine(rank, KEY, host=HOST, aging_s=1e6) for rank in range(3)]
    with contextlib.ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.close, 0)
        for rank in (1, 2):
            peers = {r: (HOST, e.port) for r, e in enumerate(engines) if r != rank}
            engines[rank].connect(peers, **MEDIA)
        until(lambda: engines[1].stats()["peers"][2]["state"] == "open")
        until(lambda: engines[2].stats()["peers"][1]["state"] == "open")
        room = np.zeros(9 * MIB, np.uint8)
        data, sent = bulk(engines[1], 9 * MIB, 2, 0, 3)
        pending = receive(engines[2], room, 1), sent
        pending[0].wait(0.1)
        engines[0].connect({r: (HOST, engines[r].port) for r in (1, 2)}, **MEDIA)
        assert finish(*pending, timeout_s=10) == ["done", "done"]
        assert np.array_equal(data, room)


def test_medium_is_returned_when_the_receiver_is_lost():
    connect = MEDIA | {"rates": dict.fromkeys(range(4), 20e6)}
    with group(4, connect, log_frames=100_000, aging_s=1e6) as engines:
        room, other = np.zeros(20 * MIB, np.uint8), np.zeros(9 * MIB, np.uint8)
        _, doomed = bulk(engines[1], 20 * MIB, 3, 0, 3)
        lost = receive(engines[3], room, 1)
        until(lambda: any(f.is_sent and f.type == "data" for f in frames(engines[1])))
        engines[3].close(0)
        finish(lost, doomed)
        data, sent = bulk(engines[2], 9 * MIB, 1, 0, 3)
        assert finish(receive(engines[1], other, 2), sent, timeout_s=10) == ["done", "done"]
        assert np.array_equal(data, other)
