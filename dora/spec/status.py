"""What one rank of a running job says about itself, for `dora top` and for metrics."""

from __future__ import annotations

from typing import Literal

from dora.spec.base import Bytes, Index, Name, NonNegative, Positive, Spec
from dora.spec.plan import Plan


class LinkStatus(Spec):
    """What went from this rank to another one.

    Attributes:
        sent_bytes, messages: Since the connection was made; messages are those that were sent.
        rate_bytes_per_s: Measured when the link was last busy; None where it never was.
        round_trip_s: None where it is not known.
    """

    peer: Index
    is_up: bool
    sent_bytes: Bytes = 0
    received_bytes: Bytes = 0
    messages: Index = 0
    rate_bytes_per_s: Positive | None = None
    round_trip_s: NonNegative | None = None


class Happening(Spec):
    """A switch, a loss and the like, as `dora.runtime.events.Event`, but on the wall clock."""

    at_s: float
    kind: Name
    call: Index = 0
    took_s: NonNegative = 0.0
    devices: tuple[Name, ...] = ()
    lost_steps: Index = 0
    num_bytes: Bytes = 0
    text: str = ""


class Shares(Spec):
    """Where the time from the start of the first of the last calls to the end of the last went.

    The rest is neither: the user's optimizer, loading of data, Python, waiting for requests.

    Attributes:
        computing: In blocks of the model, and in encoding and decoding.
        waiting: For a transfer that nothing covers: exposed communication.
        sending: Time on the wire at the measured rates, covered or not; None where none is known.
    """

    computing: NonNegative = 0.0
    waiting: NonNegative = 0.0
    sending: NonNegative | None = None


class TokenStatus(Spec):
    """What `generate` has done, on the rank that leads it: the first one of the first stage.

    Attributes:
        num_tokens, num_requests: Since the model was made; requests are those that have ended.
        in_flight, waiting: Requests that hold a cache now, and those that wait for a place.
        tokens_per_s: Of all requests, in the last 10 s of the last call.
        first_s: Seconds from a prompt to its first token: median and 95th percentile of the last
            1000 requests; None where there was none.
        further_s: Seconds from one token of a request to the next; the same of 1000 tokens.
    """

    num_tokens: Index = 0
    num_requests: Index = 0
    in_flight: Index = 0
    waiting: Index = 0
    tokens_per_s: NonNegative = 0.0
    first_s: tuple[NonNegative, NonNegative] | None = None
    further_s: tuple[NonNegative, NonNegative] | None = None


class Status(Spec):
    """One rank of a job at one moment; `FOLDER/rank-N.json` is replaced by the next.

    Attributes:
        at_s: When that was, in seconds since 1970 on the clock of `host`.
        period_s: The next one comes after about that long, whether calls end meanwhile or not.
        process, started_s: Number of the process on `host`, and when it began (since 1970).
        state: In a call; between two; closed or ended; closed because of `problem`.
        members: Ranks that take part.
        plan: That runs, without its cost, links and transfers.
        predicted_s: What the planner says that a call takes; None where the plan has no cost, or
            is for the other kind of call.
        peak_bytes: What the planner says that this device needs.
        kind: Of the last call, or the present one if it is of `generate`.
        num_calls: Steps and requests; without those of `generate`, which `tokens` is about.
        in_call_s: For how long the present call has been going on.
        recent_s: What the last calls took, of that kind and on that plan; the latest last.
        calls_per_s: From the end of the first of these to the end of the last.
        bound_s: What the QoE allows a call; None where it is not known.
        percentile: Which of the calls have to keep it.
        num_late: How many of all calls took longer.
        memory_bytes: Resident memory of the process.
        events: The last ones; `num_events` counts all by kind.
    """

    at_s: float
    period_s: Positive
    host: str
    process: Index
    started_s: NonNegative
    rank: Index
    device: Name
    state: Literal["running", "idle", "over", "failed"]
    problem: str = ""
    members: tuple[Index, ...]
    plan: Plan
    predicted_s: NonNegative | None = None
    peak_bytes: Bytes | None = None
    kind: Literal["train", "infer", "generate"] | None = None
    num_calls: Index = 0
    in_call_s: NonNegative | None = None
    recent_s: tuple[NonNegative, ...] = ()
    calls_per_s: NonNegative | None = None
    shares: Shares | None = None
    tokens: TokenStatus | None = None
    bound_s: Positive | None = None
    percentile: Positive = 50.0
    num_late: Index = 0
    memory_bytes: Bytes = 0
    links: tuple[LinkStatus, ...] = ()
    events: tuple[Happening, ...] = ()
    num_events: dict[str, int] = {}
