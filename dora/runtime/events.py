"""What has happened to a running model beside its steps and requests."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """A switch, a departure, a loss or an arrival; times are those of `time.perf_counter`.

    Attributes:
        kind: 'switch'; 'leave': a device left politely; 'recovery': one was lost; 'join': one came
            or came back; 'refused': this rank was, since it did not answer.
        call: Number of the step or request that was next or interrupted.
        devices: Those that are gone.
        lost_steps: Optimizer steps whose effect is undone, since nobody had all of their state.
        lost_calls: Calls of `step` whose gradients were undone with them.
        num_bytes: What this rank got from others.
        text: What led to it.
    """

    kind: str
    call: int
    start_s: float
    end_s: float
    devices: tuple[str, ...] = ()
    lost_steps: int = 0
    lost_calls: int = 0
    num_bytes: int = 0
    text: str = ""
