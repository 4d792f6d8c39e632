"""What the adapter needs of a model that runs; `DoraParallel` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from dora.spec import Plan

Rows = list[list[float]]


class Timed(Protocol):
    """A step or request on this rank."""

    @property
    def kind(self) -> Literal["train", "infer"]:
        """What it was."""

    @property
    def start_s(self) -> float:
        """On a clock of this rank."""

    @property
    def end_s(self) -> float:
        """On the same clock."""


class Running(Protocol):
    """What the hook needs of a model; `DoraParallel` has it."""

    rank: int
    members: tuple[int, ...]
    plan: Plan
    resident: tuple[Plan, ...]
    output_ranks: tuple[int, ...]
    transport: Any

    @property
    def calls(self) -> Sequence[Timed]:
        """The last steps and requests."""

    def computed(self) -> list[tuple[str, float]]:
        """Returns (action, seconds) of what this rank computed in the last call."""

    def confer(
        self,
        row: Sequence[float],
        answer: Callable[[Rows], bytes],
        is_asked: Callable[[Rows], bool],
    ) -> tuple[Rows, bytes]:
        """Returns the rows of all ranks, and the lowest rank's answer to them, if it is asked."""

    def switch(self, plan: Plan, *, reason: str = "") -> None:
        """Goes on with another plan."""

    def prepare(self, plan: Plan) -> None:
        """Fetches weights ahead."""

    def hold(self, plans: Sequence[Plan], *, reason: str = "") -> None:
        """Has the weights of several plans in place."""

    def turn_to(self, plan: Plan) -> None:
        """Goes on with another one of them."""

    def reorder(self, plan: Plan, *, reason: str = "") -> None:
        """Goes on with another order of transfers."""
