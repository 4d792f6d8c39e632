"""Collective calls under way, and the last ones that have ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dora.runtime.undo import Undo


class Logged(NamedTuple):
    """An inference call that has ended on this rank, and may have to run again for others."""

    position: int
    number: int
    attempt: Callable[[], Any]


@dataclass
class Ongoing:
    """A collective call under way.

    Attributes:
        kind: What it is.
        number: Of steps and requests before it.
        attempt: Runs it once.
        results: Its result, once this rank has done its part.
        undo: Takes back what the last attempt has done.
        is_over: It has ended on this rank.
    """

    kind: str
    number: int
    attempt: Callable[[], Any]
    results: list[Any] = field(default_factory=list)
    undo: Undo | None = None
    is_over: bool = False
