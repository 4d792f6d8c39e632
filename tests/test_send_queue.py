import math
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora._C import SendQueue

UNLIMITED = 1 << 60
CHUNK = 8


class Oracle:
    """What csrc/send_queue.h says, by looking at every message every time."""

    def __init__(self, aging_s, credit_bytes):
        self.aging_s, self.credit, self.outstanding = aging_s, credit_bytes, 0
        self.messages, self.posts, self.current, self.preemptions = {}, count(), None, 0
        self.waiting_s = [-math.inf] * 5

    def post(self, id, size, traffic_class, deadline, now_s, is_ready, unit):
        self.messages[id] = dict(cls=traffic_class, deadline=deadline, post=next(self.posts))
        self.messages[id] |= dict(size=size, offset=0, ready=False, unit=unit, waiting_s=now_s)
        if is_ready:
            self.enter(id)

    def ready(self):
        return sorted((m["cls"], m["deadline"], m["post"], id)
                      for id, m in self.messages.items() if m["ready"])  # fmt: skip

    def enter(self, id, **changes):
        """Makes a message ready, in the class given."""
        m = self.messages[id]
        m |= {"ready": False, **changes}
        if all(cls != m["cls"] for cls, *_ in self.ready()):
            self.waiting_s[m["cls"]] = max(self.waiting_s[m["cls"]], m["waiting_s"])
        m["ready"] = True

    def next(self, now_s, chunk_bytes):
        for c in (3, 4):
            waiting = [id for cls, *_, id in self.ready() if cls == c]
            if waiting and now_s - self.waiting_s[c] >= self.aging_s:
                self.waiting_s[c] = now_s
                self.enter(waiting[0], cls=c - 1, waiting_s=now_s)
        ready = self.ready()
        if not ready or self.outstanding >= self.credit:
            return None
        id = ready[0][-1]
        m = self.messages[id]
        self.waiting_s[m["cls"]] = now_s
        self.preemptions += self.current in self.messages and self.current != id
        whole = max(chunk_bytes // m["unit"], 1) * m["unit"]
        offset, size = m["offset"], min(whole, m["size"] - m["offset"])
        m["offset"] += size
        self.current, self.outstanding = id, self.outstanding + size
        is_last = m["offset"] == m["size"]
        if is_last:
            del self.messages[id]
        return (id, offset, size, is_last)


def step(queue, oracle, random, id, now_s):
    """Does one random thing to both; `id` is new."""
    known = random.choice([*oracle.messages, 10_000])
    priority = (random.randrange(5), float(random.randrange(3)))
    match random.choice(["post", "post", "next", "next", "next", "ready", "move", "cancel", "ack"]):
        case "post":
            args = (id, random.choice([0, 1, CHUNK - 1, CHUNK, 30]), *priority, now_s)
            is_ready, unit = random.random() < 0.7, random.choice([1, 3, CHUNK + 2])
            queue.post(*args, is_ready, unit)
            oracle.post(*args, is_ready, unit)
        case "next":
            assert queue.next(now_s, CHUNK) == oracle.next(now_s, CHUNK)
        case "ready":
            assert queue.set_ready(known) == (known in oracle.messages)
            if known in oracle.messages and not oracle.messages[known]["ready"]:
                oracle.enter(known)
        case "move":
            assert queue.reprioritise(known, *priority) == (known in oracle.messages)
            changes = dict(zip(("cls", "deadline"), priority, strict=True))
            if oracle.messages.get(known, {}).get("ready"):
                oracle.enter(known, **changes)
            else:
                oracle.messages.get(known, {}).update(changes)
        case "cancel":
            assert queue.cancel(known) == (oracle.messages.pop(known, None) is not None)
        case "ack":
            num_bytes = random.randrange(3 * CHUNK)
            queue.acknowledge(num_bytes)
            oracle.outstanding = max(0, oracle.outstanding - num_bytes)


@given(st.randoms(use_true_random=False), st.sampled_from([1, 40, UNLIMITED]))
@settings(max_examples=150)
def test_queue_equals_oracle_in_random_use(random, credit):
    queue, oracle, now_s = SendQueue(1.0, credit), Oracle(1.0, credit), 0.0
    for id in range(120):
        now_s += random.choice([0.0, 0.01, 0.3])
        step(queue, oracle, random, id, now_s)
        assert queue.outstanding == oracle.outstanding
        assert len(queue) == len(oracle.messages)
        assert queue.preemptions == oracle.preemptions
        assert queue.queued_bytes == sum(m["size"] - m["offset"] for m in oracle.messages.values())


def drain(queue, now_s=0.0, chunk_bytes=CHUNK):
    return list(iter(lambda: queue.next(now_s, chunk_bytes), None))


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(allow_nan=False)), max_size=30))
def test_order_is_class_then_deadline_then_post_order(priorities):
    queue = SendQueue(math.inf, UNLIMITED)
    for id, priority in enumerate(priorities):
        queue.post(id, 1, *priority, 0.0)
    expected = sorted(range(len(priorities)), key=lambda id: (*priorities[id], id))
    assert [id for id, *_ in drain(queue)] == expected


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 300))
def test_chunks_end_at_whole_units(chunk, unit, num_bytes):
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(7, num_bytes, 2, 0.0, 0.0, unit_bytes=unit)
    *others, last = drain(queue, chunk_bytes=chunk)
    assert all((offset + size) % unit == 0 for _, offset, size, _ in others)
    assert all(size == max(chunk - chunk % unit, unit) for *_, size, _ in others)
    assert last[1] + last[2] == num_bytes


@pytest.mark.parametrize("unit_bytes", [0, 16 * 1024 + 1])
def test_units_must_fit_a_chunk(unit_bytes):
    with pytest.raises(ValueError, match="unit_bytes is"):
        SendQueue(1.0, UNLIMITED).post(7, 1, 2, 0.0, 0.0, unit_bytes=unit_bytes)


@pytest.mark.parametrize("num_bytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK + 3])
def test_chunks_tile_the_message(num_bytes):
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(7, num_bytes, 2, 0.0, 0.0)
    chunks = drain(queue)
    end = 0
    for id, offset, size, _ in chunks:
        assert (id, offset) == (7, end)
        assert 0 < size <= CHUNK or num_bytes == 0
        end += size
    assert end == num_bytes == queue.outstanding
    assert [is_last for *_, is_last in chunks] == [False] * (len(chunks) - 1) + [True]
    assert len(chunks) == max(1, -(-num_bytes // CHUNK))
    assert (len(queue), queue.queued_bytes) == (0, 0)


def test_head_without_credit_is_not_overtaken():
    queue = SendQueue(1.0, CHUNK)
    queue.post(1, 3 * CHUNK, 2, 0.0, 0.0)
    queue.post(2, 1, 3, 0.0, 0.0)
    assert queue.next(0.0, CHUNK)[0] == 1
    assert queue.next(0.0, CHUNK) is None  # not even the one byte of message 2
    queue.acknowledge(1)
    assert queue.next(0.0, CHUNK) == (1, CHUNK, CHUNK, False)  # one chunk of overdraft
    assert queue.outstanding == 2 * CHUNK - 1
    queue.acknowledge(10 * CHUNK)
    assert queue.outstanding == 0
    queue.set_credit(0)
    assert queue.next(0.0, CHUNK) is None


def test_message_that_is_not_ready_is_skipped_until_it_is():
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(1, 1, 1, 0.0, 0.0, is_ready=False)
    queue.post(2, 2 * CHUNK, 2, 0.0, 0.0)
    assert queue.next(0.0, CHUNK)[0] == 2
    assert queue.set_ready(1)
    assert [id for id, *_ in drain(queue)] == [1, 2]


@given(st.floats(0.01, 10.0), st.integers(1, 50))
def test_bulk_under_a_flood_is_served_within_the_aging_bound(aging_s, steps):
    queue = SendQueue(aging_s, UNLIMITED)
    queue.post(0, 1, 4, 0.0, 0.0)
    step_s = aging_s / steps
    for id in range(1, 3 * steps + 4):
        now_s = id * step_s
        queue.post(id, 1, 2, 0.0, now_s)
        if queue.next(now_s, CHUNK)[0] == 0:
            break
    # Two classes up, each noticed at most a step late; then it is the oldest of its class.
    assert 2 * aging_s * (1 - 1e-9) <= now_s <= 2 * (aging_s + step_s) + 1e-9


def test_what_was_posted_together_does_not_overtake_together():
    queue = SendQueue(1.0, UNLIMITED)
    for id in range(10):
        queue.post(id, 1, 3, 0.0, 0.0)
    served = []
    for i in range(10, 50):  # a flood for ten times as long as a message waits before it ages
        queue.post(i, 1, 2, 0.0, i / 4)
        served.append(queue.next(i / 4, CHUNK)[0])
    bulk = [i for i, id in enumerate(served) if id < 10]
    assert [served[i] for i in bulk] == list(range(len(bulk)))
    assert all(later - i >= 4 for i, later in zip(bulk, bulk[1:], strict=False))
    assert len(bulk) >= 8


@pytest.mark.parametrize("traffic_class", [2, 3, 4])
def test_aged_message_never_passes_urgent_ones(traffic_class):
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(0, 1, traffic_class, -1e9, 0.0)
    for id in range(1, 100):
        queue.post(id, 1, id % 2, 0.0, float(id))
        assert queue.next(float(id), CHUNK)[0] == id
    assert queue.next(100.0, CHUNK)[0] == 0


def test_reprioritised_message_keeps_its_post_order_and_age():
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(1, 1, 4, 0.0, 0.0)
    queue.post(2, 1, 3, 0.0, 0.0)
    assert queue.reprioritise(1, 3, 0.0)
    assert [id for id, *_ in drain(queue)] == [1, 2]
    queue.post(3, 1, 4, 0.0, 0.0)
    queue.post(4, 1, 3, 0.0, 0.9)
    assert queue.reprioritise(3, 4, 0.0)
    assert queue.next(1.0, CHUNK)[0] == 3  # has waited a second, whatever was asked meanwhile


def test_preemptions_count_started_messages_passed_over():
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(1, 3 * CHUNK, 3, 0.0, 0.0)
    queue.next(0.0, CHUNK)
    queue.post(2, 2 * CHUNK, 2, 0.0, 0.0)
    queue.next(0.0, CHUNK)
    assert queue.preemptions == 1
    queue.post(3, 1, 1, 0.0, 0.0)
    assert [id for id, *_ in drain(queue)] == [3, 2, 1, 1]
    assert queue.preemptions == 2  # going back to a message that was passed over is none


def test_cancel_of_a_started_message_forgets_the_rest():
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(1, 3 * CHUNK, 3, 0.0, 0.0)
    queue.next(0.0, CHUNK)
    assert queue.cancel(1)
    assert not queue.cancel(1)
    assert (queue.queued_bytes, queue.outstanding) == (
        0,
        CHUNK,
    )  # what left is still unacknowledged
    queue.post(1, 1, 3, 0.0, 0.0)  # the id is free again
    assert queue.next(0.0, CHUNK) == (1, 0, 1, True)
    assert queue.preemptions == 0


def test_bad_arguments_are_refused():
    queue = SendQueue(1.0, UNLIMITED)
    queue.post(1, 1, 2, 0.0, 0.0)
    for args in [(1, 1, 2, 0.0, 0.0), (2, 1, 5, 0.0, 0.0), (2, 1, 2, math.nan, 0.0)]:
        with pytest.raises(ValueError, match="1|5|NaN"):
            queue.post(*args)
    with pytest.raises(ValueError, match="use 0"):
        queue.reprioritise(1, 5, 0.0)
    with pytest.raises(ValueError, match="chunk_bytes"):
        queue.next(0.0, 0)
    with pytest.raises(ValueError, match="aging_s"):
        SendQueue(0.0, 1)
    assert drain(queue) == [(1, 0, 1, True)]
    assert not queue.set_ready(1)
    assert not queue.reprioritise(1, 2, 0.0)
