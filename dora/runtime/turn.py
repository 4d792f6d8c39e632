"""What one call of DoraParallel does on a rank, and when it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from dora.spec import Action, Plan


class Turn(NamedTuple):
    """What this rank does in one call: the plan with its routes, actions, urgency of sends."""

    plan: Plan
    actions: tuple[Action, ...]
    deadlines: Mapping[Action, float]


class Call(NamedTuple):
    """One step or request on this rank; times are those of `time.perf_counter`."""

    kind: Literal["train", "infer"]
    start_s: float
    end_s: float
