"""Finds the best plans over contiguous splits, device subsets and orders, replicas and shares.

Branch and bound. `bounds` gives, for every order of device groups and every number of
micro-batches, a time and an energy that no split of it can beat. Orders are tried best bound
first; the splits of one are enumerated as long as their own bound may still win, and walked exactly
(`predict`). The search ends when no bound is better than the best plan found, which proves it, or
when `max_evaluations` are spent; `SearchResult.is_optimal` tells which.

Left for later: power modes, codecs, contention on shared media, more than `MAX_DEVICES` devices
at once, and windows other than four depths. Shares follow the speed of the replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import NamedTuple

import numpy as np

from dora.errors import InfeasiblePlanError
from dora.planner.bounds import Bounds, Suffix, twins
from dora.planner.cost import block_time_s
from dora.planner.limits import Limit, broken, limits
from dora.planner.predict import Group, Layout, Setting, evaluate, layouts, peak_bytes, setting
from dora.planner.select import Candidate, best_single, kept, nearest_text, rejections, to_plans
from dora.planner.splits import OBJECTIVES, Objective, enumerate_splits, placement_of
from dora.spec import Cluster, Device, ModelProfile, Plan, QoE, Workload

# 6 devices have 9,366 orders of groups, 7 have 94,586: minutes.
MAX_DEVICES = 6
# Relative difference below which two predictions are equal.
TOLERANCE = 1e-9

# Splits walked for each number of micro-batches before the next is bounded.
FIRST_WALKS = 20


class SearchResult(NamedTuple):
    """Everything that a search found out.

    Attributes:
        plans: Within the QoE, none worse than another in time, energy and memory; best first.
        rejected: (candidate, reason), nearest first.
        best_single: Best plan on one device, even if it breaks the QoE; None if none has the
            memory for the model.
        problem: Why `plans` is empty, in one line; '' otherwise.
        is_optimal: No other plan of this search space is better than the first.
        num_placements: Orders of device groups that were bounded.
        num_evaluated: Placements with a split that were walked exactly.
    """

    plans: list[Plan]
    rejected: list[tuple[str, str]]
    best_single: Plan | None
    problem: str
    is_optimal: bool
    num_placements: int
    num_evaluated: int


def plan(
    profile: ModelProfile, cluster: Cluster, workload: Workload, qoe: QoE | None = None
) -> list[Plan]:
    """Returns the plans worth considering, best first, each with its predicted cost.

    ::

        best, *others = plan(profile, cluster, Workload(batch_size=32), QoE(step_s=0.5))

    Args:
        profile: With timings for every device; `dora.catalog.scale_profile` adds missing ones.
        cluster: Devices and links; any device may be left out of a plan.
        workload: 'train' or 'infer'; without `num_microbatches` divisors of the batch are tried.
        qoe: Hard bounds and the objective; None minimises time.

    Raises:
        ValueError: A timing is missing.
        SpecError: The QoE has a bound that can not be judged.
        InfeasiblePlanError: No plan meets the bounds; names the bound and the nearest plan.
    """
    result = search(profile, cluster, workload, qoe)
    if not result.plans:
        raise InfeasiblePlanError(result.problem)
    return result.plans


def search(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    max_evaluations: int = 2000,
) -> SearchResult:
    """Returns the plans as `plan` does, and what became of the other candidates.

    An unreachable QoE is no error here: `plans` is empty and `problem` says why.

    Raises:
        ValueError: A timing is missing.
        SpecError: The QoE has a bound that can not be judged.
    """
    qoe = qoe or QoE()
    wanted = limits(workload, qoe)
    devices = shortlist(profile, cluster, workload)
    settings = [
        setting(profile, cluster, workload, m, devices) for m in microbatch_choices(workload)
    ]
    other: Objective = "energy" if qoe.objective == "time" else "time"
    run = Search(settings, wanted)
    run.bound_all()
    is_optimal = run.explore(qoe.objective, max_evaluations)
    run.explore(other, max_evaluations // 4)
    problem = ""
    if not run.has_any():
        # What the bounds cut off is needed to say which plan comes nearest.
        relaxed = Search(settings, ())
        relaxed.bound_all()
        for objective in (qoe.objective, other):
            relaxed.explore(objective, max_evaluations // 8)
        problem = nearest_text([*relaxed.found, *run.found], wanted, run.unfit)
    names = [device.name for device in cluster.devices]
    single = best_single(run.found, qoe.objective)
    chosen = kept(run.found, qoe.objective, single)
    left_out = [
        (device.name, f"not among the {MAX_DEVICES} fastest devices, the most that are searched")
        for device in cluster.devices
        if device not in devices
    ]
    rejected = rejections(run.found, chosen, run.unfit, run.unwalked, settings)
    return SearchResult(
        plans=to_plans(chosen, names),
        rejected=left_out + rejected,
        best_single=to_plans([single], names)[0] if single else None,
        problem=problem,
        is_optimal=is_optimal,
        num_placements=run.num_placements,
        num_evaluated=len(run.seen),
    )


def microbatch_choices(workload: Workload) -> list[int]:
    """Returns the workload's number of micro-batches, or divisors of the batch near 1, 2, 4..64."""
    if workload.num_microbatches is not None:
        return [workload.num_microbatches]
    divisors = [m for m in range(1, workload.batch_size + 1) if workload.batch_size % m == 0]
    return sorted({max(m for m in divisors if m <= 2**power) for power in range(7)})


def shortlist(profile: ModelProfile, cluster: Cluster, workload: Workload) -> tuple[Device, ...]:
    """Returns the devices to search over: all, or the fastest `MAX_DEVICES`, in rank order."""

    def model_s(device: Device) -> float:
        times = (block_time_s(b, device.name, workload.batch_size) for b in profile.blocks)
        return sum(forward + backward for forward, backward in times)

    fastest = sorted(cluster.devices, key=model_s)[:MAX_DEVICES]
    return tuple(device for device in cluster.devices if device in fastest)


class Bounded(NamedTuple):
    """An order of groups with its bounds, to be explored."""

    bound_s: float
    bound_j: float
    suffix: Suffix
    known: Setting

    def value(self, objective: Objective) -> float:
        """Returns the bound of that objective."""
        return self.bound_s if objective == "time" else self.bound_j


class Search:
    """State of one search: what is open, what was found, what was rejected without a walk.

    Attributes:
        found: Every layout that was walked.
        seen: Splits that were walked, so that none is walked twice.
        unwalked: Placement -> (least time, least energy) of those never walked.
    """

    def __init__(self, settings: Sequence[Setting], wanted: tuple[Limit, ...]) -> None:
        """Starts with every single device walked."""
        self.wanted = wanted
        # A good plan, found early, cuts off most of the rest: it often has about two micro-batches
        # for each device.
        guess = 2 * len(settings[0].devices)
        self.settings = sorted(settings, key=lambda k: abs(log2(k.num_microbatches / guess)))
        self.found: list[Candidate] = []
        self.seen: set[tuple[int, tuple[Group, ...]]] = set()
        self.unfit: dict[tuple[tuple[int, ...], ...], str] = {}
        self.unwalked: dict[tuple[tuple[int, ...], ...], tuple[float, float]] = {}
        self.open: list[Bounded] = []
        self.best = {"time": np.inf, "energy": np.inf}
        self.num_placements = 0
        for known in self.settings:
            for d in range(len(known.devices)):
                self.walk(
                    (Group(0, known.costs.num_blocks, (d,)),), [[known.num_microbatches]], known
                )

    def has_any(self) -> bool:
        """Returns whether some plan keeps all limits."""
        return bool(np.isfinite(self.best["time"]))

    def is_worth(self, objective: Objective, bound_s: float, bound_j: float) -> bool:
        """Returns whether a plan with such bounds may keep the limits and beat the best."""
        slack = 1 - TOLERANCE
        for limit in self.wanted:
            if limit.field in ("latency_s", "step_s") and bound_s * slack > limit.allowed:
                return False
            if limit.field == "energy_j" and bound_j * slack > limit.allowed:
                return False
        return (bound_s if objective == "time" else bound_j) < self.best[objective] * slack

    def bound_all(self) -> None:
        """Bounds the orders of groups for every number of micro-batches."""
        for known in self.settings:
            found = []
            for suffix in Bounds(known, twins(known)).suffixes(self.is_worth_any):
                self.num_placements += 1
                bound_s, bound_j = suffix.bound_s, suffix.bound_j
                placement = tuple(stage.group.devices for stage in suffix.stages)
                old = self.unwalked.get(placement, (np.inf, np.inf))
                self.unwalked[placement] = min(old[0], bound_s), min(old[1], bound_j)
                if self.is_worth_any(bound_s, bound_j):
                    found.append(Bounded(bound_s, bound_j, suffix, known))
            self.open += found
            for objective in OBJECTIVES:
                self.walk_best(found, objective, 1, len(self.seen) + FIRST_WALKS)

    def is_worth_any(self, bound_s: float, bound_j: float) -> bool:
        """Returns whether such bounds are worth it for one of the objectives."""
        return any(self.is_worth(objective, bound_s, bound_j) for objective in OBJECTIVES)

    def explore(self, objective: Objective, budget: int) -> bool:
        """Walks what may still be best; returns whether the best is proven.

        First the most promising split of each order, which soon gives a good plan, then all
        splits that may beat it.
        """
        start = len(self.seen)
        self.walk_best(self.open, objective, 1, start + budget // 4)
        return self.walk_best(self.open, objective, budget, start + budget)

    def walk_best(
        self, given: Sequence[Bounded], objective: Objective, splits_per_order: int, stop: int
    ) -> bool:
        """Walks splits in the order of their bounds until `stop` have been walked in all.

        Returns:
            Whether none was left out because of `stop`.
        """

        def is_worth(bound_s: float, bound_j: float) -> bool:
            return self.is_worth(objective, bound_s, bound_j)

        for bounded in sorted(given, key=lambda bounded: bounded.value(objective)):
            if not is_worth(bounded.bound_s, bounded.bound_j):
                continue
            splits = enumerate_splits(bounded.suffix, objective, is_worth)
            for _, ends in zip(range(splits_per_order), splits, strict=False):
                if len(self.seen) >= stop:
                    return False
                self.walk(*placement_of(bounded.suffix, ends), bounded.known)
        return True

    def walk(
        self, groups: tuple[Group, ...], counts: Sequence[Sequence[int]], known: Setting
    ) -> None:
        """Predicts one placement exactly at every depth of window that its memory allows."""
        if (known.num_microbatches, groups) in self.seen:
            return
        self.seen.add((known.num_microbatches, groups))
        placement = tuple(group.devices for group in groups)
        for layout in layouts(groups, counts, known):
            share, text = memory_share(layout, known)
            if share > 1:
                # The least bad one is worth telling; deeper windows only need more.
                self.unfit.setdefault(placement, text)
                return
            prediction = evaluate(layout, known)
            if not np.isfinite(prediction.makespan_s):
                self.unfit.setdefault(placement, "no link between devices that share gradients")
                return
            failed = broken(self.wanted, layout, prediction, known)
            self.found.append(Candidate(layout, prediction, known, failed, share))
            self.unfit.pop(placement, None)
            if not failed:
                self.best["time"] = min(self.best["time"], prediction.makespan_s)
                self.best["energy"] = min(self.best["energy"], prediction.total_j)


def memory_share(layout: Layout, known: Setting) -> tuple[float, str]:
    """Returns the largest share of any device's memory that is needed, and which device's."""
    needs = [
        (peak / known.devices[d].memory_bytes, peak, known.devices[d])
        for d, peak in zip(layout.devices, peak_bytes(layout, known), strict=True)
    ]
    share, peak, device = max(needs, key=lambda need: need[0])
    has = device.memory_bytes
    return share, f"memory: {device.name} needs {peak / 1e9:.3g} GB, has {has / 1e9:.3g} GB"
