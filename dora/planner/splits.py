"""Enumerates the splits of one order of device groups, the most promising first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dora.planner.bounds import Suffix, Worth
from dora.planner.cost import Array
from dora.planner.predict import Group

Objective = Literal["time", "energy"]
OBJECTIVES: tuple[Objective, ...] = ("time", "energy")


def placement_of(suffix: Suffix, ends: Sequence[int]) -> tuple[tuple[Group, ...], list[list[int]]]:
    """Returns the stages, and the micro-batches of their replicas, of one split."""
    groups, counts, first = [], [], 0
    for stage, end in zip(suffix.stages, ends, strict=True):
        groups.append(Group(first, end, stage.group.devices))
        counts.append([int(count) for count in stage.group.counts[:, first, end]])
        first = end
    return tuple(groups), counts


def enumerate_splits(
    suffix: Suffix, objective: Objective, is_worth: Worth
) -> Iterator[tuple[int, ...]]:
    """Yields the ends of the stages of every split whose bounds are worth it, best bound first.

    `is_worth` may become stricter while the caller consumes; it is asked at every branch.
    """
    stages = suffix.stages
    tables = [_Tables.of(stage) for stage in stages]

    def descend(s: int, first: int, head: _Head) -> Iterator[tuple[int, ...]]:
        if s == len(stages):
            yield ()
            return
        t = tables[s]
        bound_s = np.maximum(head.bound_s, head.round_s + t.time_s[first])
        bound_s = np.maximum(bound_s, head.down_s + t.reduced_s[first])
        # Where there is no time there is no energy either, not even of devices that idle at 0 W.
        idle_j = suffix.idle_w * np.where(np.isfinite(bound_s), bound_s, 0.0)
        bound_j = head.work_j + t.total_j[first] + idle_j
        order = np.argsort(bound_s if objective == "time" else bound_j, kind="stable")
        for end in order.tolist():
            if not np.isfinite(bound_s[end]):
                return
            if not is_worth(float(bound_s[end]), float(bound_j[end])):
                continue
            at_work = max(
                head.round_s + t.own_s[first, end], head.down_s + t.own_reduced_s[first, end]
            )
            below = _Head(
                bound_s=max(head.bound_s, at_work),
                round_s=head.round_s + t.pass_s[first, end],
                down_s=head.down_s + t.pass_down_s[first, end],
                work_j=head.work_j + t.work_j[first, end],
            )
            for ends in descend(s + 1, end, below):
                yield (end, *ends)

    yield from descend(0, 0, _Head(0.0, 0.0, 0.0, 0.0))


class _Tables(NamedTuple):
    """The bounds of a stage within its suffix, as `[first, end]` arrays.

    Attributes:
        time_s, reduced_s, total_j: Of all that remains, if this stage has those blocks.
        own_s, own_reduced_s: Of this stage at work.
        pass_s, pass_down_s, work_j: What it adds before the next stage.
    """

    time_s: Array
    reduced_s: Array
    total_j: Array
    own_s: Array
    own_reduced_s: Array
    pass_s: Array
    pass_down_s: Array
    work_j: Array

    @classmethod
    def of(cls, stage: Suffix) -> _Tables:
        """Computes them again; keeping those of every order would take gigabytes."""
        group, hop, own_s = stage.group, stage.hop, stage.own_s()
        return cls(
            time_s=np.maximum(own_s, stage.tail_s()),
            reduced_s=np.maximum(group.reduced_s, stage.reduced_tail_s()),
            total_j=group.work_j + stage.after_j,
            own_s=own_s,
            own_reduced_s=group.reduced_s,
            pass_s=group.one_s + (hop.round_s if hop else 0.0),
            pass_down_s=group.one_forward_s + (hop.down_s if hop else 0.0),
            work_j=group.work_j + (hop.radio_j if hop else 0.0),
        )


class _Head(NamedTuple):
    """What the stages before some stage add: their own bound, one pass, energy."""

    bound_s: float
    round_s: float
    down_s: float
    work_j: float
