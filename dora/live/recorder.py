"""What is noted of every step and request: a few numbers, in microseconds."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

from dora.live.tokens import BUCKETS_S, Tokens
from dora.spec import QoE

Kind = Literal["train", "infer"]
Span = tuple[str, str, float, float]  # lane, label, start, end

# So many calls are remembered; they are what medians and shares are of.
NUM_RECENT = 100


class Call(Protocol):
    """A step or request on this rank; times are those of `time.perf_counter`."""

    @property
    def kind(self) -> Kind:
        """What it was."""

    @property
    def start_s(self) -> float:
        """When it began."""

    @property
    def end_s(self) -> float:
        """When it ended."""


class Done(NamedTuple):
    """A call that has ended, and what this rank did in it; `plan` tells plans apart."""

    kind: Kind
    plan: int
    start_s: float
    end_s: float
    computed_s: float
    waited_s: float


class Recorder:
    """Notes calls. One thread adds, others read.

    Args:
        qoe: Bounds that calls have to keep.

    Attributes:
        recent: The last calls.
        num_calls, num_late, total_s, computed_s, waited_s: Of all calls.
        counts: Calls per bucket of `BUCKETS_S`, and those above.
        begun_s: When the present call began; None between two.
        tokens: Of `generate`, whose calls are not among the others: one may go on for days.
    """

    def __init__(self, qoe: QoE) -> None:
        self.recent: deque[Done] = deque(maxlen=NUM_RECENT)
        self.num_calls = self.num_late = 0
        self.total_s = self.computed_s = self.waited_s = 0.0
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.begun_s: float | None = None
        self.tokens = Tokens()
        self._bounds_s = {kind: bound_s(qoe, kind) for kind in ("train", "infer")}

    def began(self) -> None:
        """A call begins."""
        self.begun_s = time.perf_counter()

    @contextmanager
    def generating(self, places: int) -> Iterator[None]:
        """Is a call of `generate`, which serves that many requests at a time."""
        self.began()
        with self.tokens.call(places):
            yield
        self.begun_s = None

    @property
    def is_generating(self) -> bool:
        """Whether the last call, or the present one, is of `generate`."""
        last_s = self.recent[-1].start_s if self.recent else float("-inf")
        return self.tokens.begun_s is not None and self.tokens.begun_s > last_s

    def ended(self, call: Call, plan: int, spans: Sequence[Span]) -> None:
        """A call has ended.

        Args:
            call: When it was.
            plan: Any number that is the same for calls on the same plan.
            spans: What this rank did in it.
        """
        took_s = call.end_s - call.start_s
        computed_s = waited_s = 0.0
        for lane, _, start_s, end_s in spans:
            if lane == "compute":
                computed_s += end_s - start_s
            elif lane == "wait":
                waited_s += end_s - start_s
        self.recent.append(Done(call.kind, plan, call.start_s, call.end_s, computed_s, waited_s))
        self.num_calls += 1
        self.num_late += took_s > (self._bounds_s[call.kind] or took_s)
        self.total_s += took_s
        self.computed_s += computed_s
        self.waited_s += waited_s
        self.counts[bisect_left(BUCKETS_S, took_s)] += 1
        self.begun_s = None


def bound_s(qoe: QoE, kind: str | None) -> float | None:
    """Returns what one call of a kind may take; None if that has no bound."""
    if kind == "train":
        return qoe.step_s
    rate = qoe.frame_rate_hz
    return qoe.latency_s or (1 / rate if rate else None)
