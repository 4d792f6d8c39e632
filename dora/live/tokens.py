"""What is noted of every token of `generate`, on the rank that leads the call: about 2 us each."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

# Upper bounds of histograms of times; what takes longer is in none of them.
BUCKETS_S = tuple(m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5))
# So many times are remembered; they are what medians are of.
_NUM_RECENT = 1000
# Tokens per second are those of so long: some pauses of a reader, and a change is seen soon.
_RATE_S = 10.0


class Times:
    """Durations: the last ones, and the counts of all.

    Attributes:
        recent: The last ones.
        counts: Per bucket of `BUCKETS_S`, and those above.
        total_s: Of all.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=_NUM_RECENT)
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.total_s = 0.0

    def add(self, took_s: float) -> None:
        """Adds one."""
        self.recent.append(took_s)
        self.counts[bisect_left(BUCKETS_S, took_s)] += 1
        self.total_s += took_s


class Tokens:
    """Notes tokens. One thread adds, others read; times are those of `time.perf_counter`.

    Attributes:
        first, further: Seconds from a prompt to its first token, and from one token to the next.
        num_tokens, num_requests: In all; requests are those that have ended.
        begun_s, ended_s: Of the last call; None before it, and before its end.
    """

    def __init__(self) -> None:
        self.first, self.further = Times(), Times()
        self.num_tokens = self.num_requests = 0
        self.begun_s: float | None = None
        self.ended_s: float | None = None
        self._places = 0
        self._last_s: dict[int, float] = {}  # of each open request: its last token, or its prompt
        self._started: set[int] = set()
        self._at_s: deque[float] = deque(maxlen=_NUM_RECENT)

    @contextmanager
    def call(self, places: int) -> Iterator[None]:
        """Is a call of `generate`, which serves that many requests at a time."""
        self.begun_s, self.ended_s, self._places = time.perf_counter(), None, places
        try:
            yield
        finally:
            self.ended_s = time.perf_counter()
            self._last_s, self._started = {}, set()

    def arrived(self, request: int, at_s: float) -> None:
        """A prompt is there."""
        self._last_s[request] = at_s

    def came(self, request: int, at_s: float, *, is_last: bool) -> None:
        """A token is there; the request may end with it."""
        took_s = at_s - self._last_s[request]
        self._last_s[request] = at_s
        if request in self._started:
            self.further.add(took_s)
        else:
            self._started.add(request)
            self.first.add(took_s)
        self.num_tokens += 1
        self._at_s.append(at_s)
        if is_last:
            del self._last_s[request]
            self._started.discard(request)
            self.num_requests += 1

    @property
    def num_open(self) -> tuple[int, int]:
        """Requests that are served now, and those that wait for a place."""
        num = len(self._last_s)
        return min(num, self._places), max(num - self._places, 0)

    def per_s(self) -> float:
        """Returns tokens per second in the last seconds of the last call."""
        if self.begun_s is None:
            return 0.0
        at_s, now_s = tuple(self._at_s), self.ended_s or time.perf_counter()
        since_s = max(now_s - _RATE_S, self.begun_s)
        if len(at_s) == _NUM_RECENT:  # more came than are remembered
            since_s = max(since_s, at_s[0])
        return sum(one_s > since_s for one_s in at_s) / max(now_s - since_s, 1e-9)
