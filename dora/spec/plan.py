"""A plan: which devices run which blocks, and how micro-batches travel through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dora.spec.base import (
    Bytes,
    Count,
    Fraction,
    Index,
    Name,
    NonNegative,
    Spec,
    check,
    check_unique,
)
from dora.spec.cluster import Link
from dora.spec.schedule import Transfer


class Replica(Spec):
    """One device that runs a stage, and the share of the micro-batches it gets."""

    device: Name
    share: Fraction = 1.0
    power_mode: str = "default"


class Stage(Spec):
    """Blocks `first_block` to `last_block`, both included, and the devices that run them."""

    index: Index
    first_block: Index
    last_block: Index
    replicas: Annotated[tuple[Replica, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_consistent(self) -> Stage:
        check(self.first_block <= self.last_block, f"stage {self.index} has no block")
        total = sum(replica.share for replica in self.replicas)
        check(abs(total - 1) < 1e-6, f"shares of stage {self.index} sum to {total:g}, not 1")
        return self


# 'int4-smooth' is int4 behind a factor per channel, for activations with outlier channels.
CodecName = Literal["none", "int8", "int4", "int4-smooth", "fp8"]


# A sum of gradients has no channels.
GradientCodecName = Literal["none", "int8", "int4", "fp8"]


class BoundaryCodec(Spec):
    """How the activations (forward) and their gradients (backward) of one boundary are sent."""

    forward: CodecName = "none"
    backward: CodecName = "none"


class DeviceMemory(Spec):
    """Predicted peak memory of one device."""

    device: Name
    peak_bytes: Bytes


class Cost(Spec):
    """What a plan is predicted to take: per training step or per inference request.

    Attributes:
        interval_s: Least time between two requests that every device and medium can sustain.
        ttft_s, tpot_s: Time to the first token and per further token, for 'generate'.
    """

    makespan_s: NonNegative
    energy_j: NonNegative = 0.0
    interval_s: NonNegative | None = None
    ttft_s: NonNegative | None = None
    tpot_s: NonNegative | None = None
    memory: tuple[DeviceMemory, ...] = ()


def routes_from_shares(shares: Sequence[Sequence[float]], n: int) -> tuple[tuple[int, ...], ...]:
    """Spreads `n` micro-batches over each stage's replicas, as evenly in time as shares allow.

    Smooth weighted round robin, stage by stage: each micro-batch goes to the replica that is
    furthest behind its share; ties go to the lower index.

    Returns:
        One route per micro-batch: the replica index of each stage.
    """
    columns = []
    for stage in shares:
        given, column = [0] * len(stage), []
        for m in range(n):
            behind = [share * (m + 1) - count for share, count in zip(stage, given, strict=True)]
            pick = max(range(len(stage)), key=lambda r: (round(behind[r], 9), -r))
            given[pick] += 1
            column.append(pick)
        columns.append(column)
    return tuple(zip(*columns, strict=True))


def warmup_for(shares: Sequence[Sequence[float]], *, extra: int = 0) -> tuple[int, ...]:
    """Returns a warm-up per stage that keeps every replica busy; it never ascends.

    A replica with share x works on one micro-batch while 1/x of them pass its stage, so stage s
    needs a window of the sum of ceil(1 / smallest share) over the stages from s to the last. With
    even shares that is the number of replicas from s to the last, a plan's default.

    Args:
        shares: Per stage, the share of each replica.
        extra: More micro-batches in flight per boundary that is still ahead; hides slow links
            and costs their activations.
    """
    # A sum of floats such as 0.1 * 3 must not turn 1 / (1/3) into 4.
    needed = [math.ceil(1 / min(stage) - 1e-6) for stage in shares]
    windows = list(accumulate(reversed(needed)))
    return tuple(window + extra * ahead for ahead, window in enumerate(windows))[::-1]


ScheduleKind = Literal["gpipe", "1f1b", "wavefront"]


class Plan(Spec):
    """A hybrid data + pipeline parallel placement; a file of it may be edited by hand.

    Attributes:
        devices: All devices in rank order; those in no stage are left out of the work.
        stages: Contiguous blocks from the first to the last block of the model.
        routes: Per micro-batch, the replica index at each stage; () follows the shares.
        codecs: One per stage boundary; () sends every boundary as it is.
        gradient_codecs: One per stage, for the sums of its replicas' gradients; () sums them as
            they are.
        max_accuracy_loss: What the codecs may cost, from the QoE: each is measured on the user's
            own batches before it stays on (`dora.runtime.guard`). None trusts the plan.
        warmup: Per stage, W: forward m runs before backward j if m < j + W. Never ascending,
            which excludes deadlock; () takes `warmup_for` the shares.
        cost: The planner's prediction, if it made this plan.
        links: The media that flows between devices cross; transfers on a medium that several
            devices send on take turns by priority. () takes every link for private.
        transfers: How the network scheduler wants messages sent; those it does not name, and all
            of (), go in the order in which their consumers start.
    """

    devices: Annotated[tuple[Name, ...], Field(min_length=1)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    num_microbatches: Count = 1
    routes: tuple[tuple[Index, ...], ...] = ()
    codecs: tuple[BoundaryCodec, ...] = ()
    gradient_codecs: tuple[GradientCodecName, ...] = ()
    max_accuracy_loss: NonNegative | None = None
    schedule_kind: ScheduleKind = "1f1b"
    warmup: tuple[Count, ...] = ()
    cost: Cost | None = None
    links: tuple[Link, ...] = ()
    transfers: tuple[Transfer, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        """Completes routes and warm-up from the stages; invalid stages are reported later."""
        if not isinstance(data, Mapping):
            return data
        try:
            stages = [Stage.model_validate(stage) for stage in data["stages"]]
            shares = [[replica.share for replica in stage.replicas] for stage in stages]
            routes = data.get("routes") or routes_from_shares(
                shares, int(data.get("num_microbatches", 1))
            )
            warmup = data.get("warmup") or warmup_for(shares)
        except (KeyError, TypeError, ValueError):
            return data
        return {**data, "routes": routes, "warmup": warmup}

    @model_validator(mode="after")
    def _is_consistent(self) -> Plan:
        check_unique("device", self.devices)
        used = [replica.device for stage in self.stages for replica in stage.replicas]
        for name in used:
            check(name in self.devices, f"stage names device {name!r}, not in {self.devices}")
            check(used.count(name) == 1, f"device {name!r} is used twice")
        check(self.stages[0].first_block == 0, "the first stage must begin at block 0")
        for i, stage in enumerate(self.stages):
            check(stage.index == i, f"stage {i} has index {stage.index}")
        for a, b in pairwise(self.stages):
            check(
                b.first_block == a.last_block + 1,
                f"stage {b.index} begins at block {b.first_block}, allowed {a.last_block + 1}",
            )
        for link in self.links:
            for name in (link.src, link.dst):
                check(name in self.devices, f"link names device {name!r}, not in {self.devices}")
        num_stages = len(self.stages)
        check(
            len(self.routes) == self.num_microbatches
            and all(len(route) == num_stages for route in self.routes),
            f"routes: one per micro-batch ({self.num_microbatches}) of {num_stages} replicas",
        )
        for route in self.routes:
            for stage, replica in zip(self.stages, route, strict=True):
                check(replica < len(stage.replicas), f"stage {stage.index}: no such replica")
        check(len(self.codecs) in (0, num_stages - 1), f"codecs: allowed {num_stages - 1}")
        check(
            len(self.gradient_codecs) in (0, num_stages), f"gradient_codecs: allowed {num_stages}"
        )
        check(
            len(self.warmup) == num_stages and all(a >= b for a, b in pairwise(self.warmup)),
            f"warmup: given {self.warmup}, allowed {num_stages} counts that never ascend",
        )
        return self

    @property
    def num_blocks(self) -> int:
        """Blocks of the model that this plan is for."""
        return self.stages[-1].last_block + 1

    def rank_of(self, stage: int, replica: int) -> int:
        """Returns the rank that runs that replica of that stage."""
        return self.devices.index(self.stages[stage].replicas[replica].device)

    def ranks(self, stage: int) -> tuple[int, ...]:
        """Returns the ranks of a stage, in the order of its replicas."""
        return tuple(self.rank_of(stage, r) for r in range(len(self.stages[stage].replicas)))

    def sum_codec(self, stage: int) -> str:
        """Returns how a stage's sums of gradients travel; 'none' as well if it has none to sum."""
        is_summed = len(self.stages[stage].replicas) > 1 and self.schedule_kind != "wavefront"
        return self.gradient_codecs[stage] if is_summed and self.gradient_codecs else "none"

    def placement(self, rank: int) -> tuple[int, int] | None:
        """Returns (stage, replica) of a rank, None if the plan leaves it out."""
        for stage in self.stages:
            for i, replica in enumerate(stage.replicas):
                if replica.device == self.devices[rank]:
                    return stage.index, i
        return None
