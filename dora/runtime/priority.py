"""How urgent a message is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Priority(NamedTuple):
    """Decides which of the waiting messages leaves first, and where it may be cut.

    Attributes:
        traffic_class: 1 (first) to 4; see the constants below.
        deadline: Earlier goes first inside a class; any comparable number, such as the
            consumer's start time in the plan, in seconds.
        unit_bytes: What leaves at once are whole units, of at most 16 KiB.
    """

    traffic_class: int
    deadline: float = 0.0
    unit_bytes: int = 1


URGENT = Priority(1)  # tokens, losses, small activations that a user waits for
ACTIVATION = Priority(2)  # activations and their gradients
GRADIENT = Priority(3)  # gradient buckets
WEIGHTS = Priority(4)  # parameters, checkpoints, migration

_local = threading.local()


@contextmanager
def priority(traffic_class: int, deadline: float = 0.0) -> Iterator[None]:
    """Sets the priority of what this thread sends inside the block over torch.distributed."""
    before = chosen()
    _local.chosen = checked(Priority(traffic_class, deadline))
    try:
        yield
    finally:
        _local.chosen = before


def chosen() -> Priority | None:
    """Returns what the innermost `priority` block of this thread asks for."""
    choice: Priority | None = getattr(_local, "chosen", None)
    return choice


def checked(given: Priority) -> Priority:
    """Returns `given`, or raises ValueError."""
    if not URGENT.traffic_class <= given.traffic_class <= WEIGHTS.traffic_class:
        raise ValueError(
            f"traffic_class: given {given.traffic_class}, allowed: {URGENT.traffic_class} "
            f"(urgent) to {WEIGHTS.traffic_class} (weights)"
        )
    if given.deadline != given.deadline:
        raise ValueError("deadline: given nan, allowed: a number that can be compared")
    return given
