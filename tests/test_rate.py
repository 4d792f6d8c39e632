from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora._C import RateEstimator

KIB = 1024
MBIT = 1e6 / 8  # bytes/s


class Link:
    """A sender, a pacer, a link of fixed rate with a small buffer, and a receiver that acks."""

    def __init__(self, rate_bytes_per_s, *, rtt_s=0.002, buffer_bytes=64 * KIB, jitter_s=None):
        self.estimator = RateEstimator()
        self.rate_bytes_per_s = rate_bytes_per_s
        self.rtt_s = rtt_s
        self.buffer_bytes = buffer_bytes
        self.jitter_s = jitter_s or (lambda: 0.0)
        self.now_s = 0.0  # when the next chunk can be handed over
        self.sent_bytes = 0
        self.link_free_s = 0.0
        self.acks = deque()  # (time, cumulative bytes)

    def send(self):
        """Hands one chunk over and moves the clock to when the next one can follow."""
        self.deliver(self.now_s)
        num_bytes = self.estimator.chunk_bytes()
        self.sent_bytes += num_bytes
        self.estimator.on_sent(self.sent_bytes, self.now_s)
        pace = self.estimator.pace_bytes_per_s(self.now_s)
        paced_s = self.now_s + (num_bytes / pace if pace else 0.0)
        wire_s = num_bytes / self.rate_bytes_per_s
        self.link_free_s = max(max(self.link_free_s, self.now_s) + wire_s, paced_s)
        ack_s = self.link_free_s + self.rtt_s + self.jitter_s()
        self.acks.append((max(ack_s, self.acks[-1][0] if self.acks else 0.0), self.sent_bytes))
        room_s = self.link_free_s - self.buffer_bytes / self.rate_bytes_per_s
        self.now_s = max(paced_s, room_s)

    def deliver(self, until_s):
        while self.acks and self.acks[0][0] <= until_s:
            time_s, num_bytes = self.acks.popleft()
            self.estimator.on_ack(num_bytes, time_s)

    def run(self, seconds):
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.send()
        return self.estimator.rate_bytes_per_s

    def send_burst(self, num_bytes):
        """Sends, then waits until all is acknowledged."""
        first = self.sent_bytes
        while self.sent_bytes < first + num_bytes:
            self.send()
        self.estimator.on_idle()
        self.now_s = max(self.now_s, self.acks[-1][0])
        self.deliver(self.now_s)

    def queue_s(self):
        return max(0.0, self.link_free_s - self.now_s)


rates = st.sampled_from([5, 20, 100, 300, 940, 1900]).map(lambda mbit: mbit * MBIT)
round_trips = st.sampled_from([0.0002, 0.002, 0.01, 0.04])


@given(rates.filter(lambda rate: rate > 10 * MBIT), round_trips)  # of slower ones, too few chunks
@settings(max_examples=40)
def test_rate_constant_is_found_within_200_ms(rate, rtt_s):
    link = Link(rate, rtt_s=rtt_s)
    while link.now_s < 0.2:
        link.send()
    link.deliver(0.3)
    assert link.estimator.rate_bytes_per_s == pytest.approx(rate, rel=0.03)
    assert rtt_s <= link.estimator.min_rtt_s <= rtt_s + 64 * KIB / rate + 1e-9


@given(rates, round_trips)
@settings(max_examples=40)
def test_rate_drop_to_30_percent_is_followed_within_3_s(rate, rtt_s):
    link = Link(rate, rtt_s=rtt_s)
    link.run(2)
    link.rate_bytes_per_s = 0.3 * rate
    assert link.run(3) == pytest.approx(0.3 * rate, rel=0.03)


@given(rates, round_trips)
@settings(max_examples=40)
def test_rate_rise_to_3x_is_found_within_5_s_in_spite_of_pacing(rate, rtt_s):
    link = Link(rate, rtt_s=rtt_s)
    link.run(2)
    link.rate_bytes_per_s = 3 * rate
    assert link.run(5) == pytest.approx(3 * rate, rel=0.03)


@given(rates, round_trips)
@settings(max_examples=30)
def test_pace_uses_the_link_and_leaves_no_queue(rate, rtt_s):
    link = Link(rate, rtt_s=rtt_s, buffer_bytes=max(32 * KIB, rate // 50))
    link.run(8)
    first, start_s = link.sent_bytes, link.now_s
    queues_s = []
    while link.now_s < start_s + 10:
        link.send()
        queues_s.append(link.queue_s())
    assert (link.sent_bytes - first) / (link.now_s - start_s) >= 0.98 * rate
    chunk_s = link.estimator.chunk_bytes() / rate
    assert sorted(queues_s)[len(queues_s) // 2] <= 2 * chunk_s  # one on the wire, one behind it


def test_rate_does_not_decay_in_10_minutes_of_pacing():
    link = Link(20 * MBIT)
    link.run(1)
    assert min(link.run(1) for _ in range(600)) >= 0.99 * 20 * MBIT


@given(st.integers())
@settings(max_examples=10)
def test_rate_with_late_acknowledgements_stays_near(seed):
    random = Random(seed)
    link = Link(100 * MBIT, jitter_s=lambda: random.uniform(0, 0.002))
    link.run(1)
    for _ in range(20):
        assert link.run(0.5) == pytest.approx(100 * MBIT, rel=0.1)


def test_rate_outlives_a_pause():
    link = Link(100 * MBIT)
    link.run(1)
    link.estimator.on_idle()
    link.now_s += 60
    link.deliver(link.now_s)
    assert link.estimator.rate_bytes_per_s == pytest.approx(100 * MBIT, rel=0.01)


def test_rate_is_not_lowered_by_small_messages():
    link = Link(100 * MBIT)
    link.run(1)
    for _ in range(100):
        link.send_burst(1)  # one chunk, then a round trip of silence
        link.now_s += 0.1
    assert link.estimator.rate_bytes_per_s == pytest.approx(100 * MBIT, rel=0.01)


@pytest.mark.parametrize("burst_s", [0.01, 0.03, 0.1, 0.3])
def test_rate_of_bursts_with_pauses_stays_near(burst_s):
    link = Link(100 * MBIT)
    link.run(1)
    for _ in range(200):
        link.send_burst(burst_s * link.rate_bytes_per_s)
        link.now_s += 0.5
    assert link.estimator.rate_bytes_per_s == pytest.approx(100 * MBIT, rel=0.03)


@pytest.mark.parametrize("burst_s", [0.1, 0.4])
def test_pace_recovers_at_once_from_bursts_that_shared_the_link(burst_s):
    link = Link(24 * MBIT)
    link.run(1)
    for _ in range(20):  # another sender takes two thirds meanwhile
        link.rate_bytes_per_s = 8 * MBIT
        link.send_burst(burst_s * link.rate_bytes_per_s)
        link.now_s += 0.5
    link.rate_bytes_per_s = 24 * MBIT
    start_s = link.now_s
    link.send_burst(0.3 * link.rate_bytes_per_s)
    assert link.now_s - start_s <= 1.1 * 0.3


def test_pace_is_that_of_better_times_for_half_a_minute():
    link = Link(24 * MBIT)
    link.run(1)
    link.rate_bytes_per_s = 8 * MBIT  # another sender, or a worse link: nobody can tell
    for _ in range(5):
        link.run(5)
        assert link.estimator.pace_bytes_per_s(link.now_s) > 16 * MBIT
    link.run(10)
    assert link.estimator.pace_bytes_per_s(link.now_s) < 12 * MBIT


def test_estimator_without_samples_knows_nothing():
    estimator = RateEstimator()
    assert estimator.rate_bytes_per_s is None
    assert estimator.min_rtt_s is None
    assert estimator.chunk_bytes() == 64 * KIB
    assert estimator.pace_bytes_per_s(0.0) == 0


def test_rate_is_unknown_after_small_messages():
    """What a few bytes take is mostly waiting: as a rate it would throttle the first transfer."""
    estimator = RateEstimator()
    for i in range(100):
        estimator.on_sent(48 * (i + 1), 0.1 * i)
        estimator.on_idle()
        estimator.on_ack(48 * (i + 1), 0.1 * i + 0.05)
    assert estimator.rate_bytes_per_s is None
    assert estimator.pace_bytes_per_s(10.0) == 0


def test_acknowledgements_out_of_order_or_repeated_change_nothing():
    estimator = RateEstimator()
    estimator.on_sent(100_000, 0.0)
    estimator.on_ack(100_000, 0.1)
    before = estimator.rate_bytes_per_s
    estimator.on_ack(100_000, 0.2)
    estimator.on_ack(10, 0.3)
    assert estimator.rate_bytes_per_s == before == pytest.approx(1_000_000)
    assert estimator.min_rtt_s == pytest.approx(0.1)


def estimator_of(rate, chunks=300, chunk_bytes=64 * KIB):
    """An estimator that has seen chunks acknowledged at this rate, with one more under way."""
    estimator = RateEstimator()
    estimator.on_sent(chunk_bytes, 0.0)
    for i in range(chunks + 1):
        now_s = i * chunk_bytes / rate
        estimator.on_ack(i * chunk_bytes, now_s)
        estimator.on_sent((i + 2) * chunk_bytes, now_s)
    return estimator, now_s


@given(st.floats(1e4, 1e10))
def test_chunk_is_2_ms_in_steps_of_4_kib_within_limits(rate):
    chunk = estimator_of(rate)[0].chunk_bytes()
    assert chunk % (4 * KIB) == 0
    assert 16 * KIB <= chunk <= 1024 * KIB
    if 16 * KIB < chunk < 1024 * KIB:
        assert chunk == pytest.approx(0.002 * rate, abs=2 * KIB + 1)


@pytest.mark.parametrize(
    ("rate", "chunk"), [(1 * MBIT, 16), (100 * MBIT, 24), (1000 * MBIT, 244), (10_000 * MBIT, 1024)]
)
def test_chunk_of_usual_links(rate, chunk):
    assert estimator_of(rate)[0].chunk_bytes() == chunk * KIB


def test_pace_has_no_limit_while_warming_up_or_on_fast_links():
    estimator, now_s = estimator_of(100 * MBIT, chunks=10)
    assert now_s < 0.1
    assert estimator.rate_bytes_per_s is not None
    assert estimator.pace_bytes_per_s(now_s) == 0
    assert estimator.pace_bytes_per_s(now_s + 0.1) > 0
    estimator, now_s = estimator_of(260e6)
    assert estimator.pace_bytes_per_s(now_s + 1) == 0


def test_pace_cycles_through_probe_drain_and_cruise():
    estimator, now_s = estimator_of(100 * MBIT)
    now_s += 2  # the cycle is over: a probe is due and starts with the next chunk
    assert estimator.pace_bytes_per_s(now_s) == pytest.approx(1.15 * 100 * MBIT)
    estimator.on_sent(303 * 64 * KIB, now_s)
    gains = [estimator.pace_bytes_per_s(now_s + at_s) / (100 * MBIT) for at_s in (0.02, 0.06, 0.5)]
    assert gains == pytest.approx([1.15, 0.75, 0.99])


def test_pace_gives_way_to_a_queue_within_limits():
    estimator, now_s = estimator_of(100 * MBIT)
    now_s += 1
    before = estimator.pace_bytes_per_s(now_s)
    for i in range(100):
        estimator.on_queueing(0.005, now_s + 0.05 * i)
    assert 0.94 * before < estimator.pace_bytes_per_s(now_s) < 0.96 * before
    for i in range(100, 300):
        estimator.on_queueing(0.0, now_s + 0.05 * i)
    assert estimator.pace_bytes_per_s(now_s) == pytest.approx(before)
