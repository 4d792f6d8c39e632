"""Asteroid's hybrid pipeline: data-parallel groups of devices as stages.

Source: Ye et al., Asteroid: Resource-Efficient Hybrid Pipeline Parallelism for Collaborative DNN
Training on Heterogeneous Edge Devices, MobiCom 2024, arXiv 2408.08015. Taken from it, its
equations as a public re-implementation that cites them gives them:

- Devices in descending order of memory; the dynamic program Q(l, n, p) puts the last l layers on
  the last n devices in p stages, and adds a stage in front. All devices are used.
- A hop between stages is a step of its own: bytes over the least bandwidth of any pair. Links are
  private.
- Inside a group samples follow capacity v_d = 1 / (forward + backward), within memory.
- K_p = 2 (P - p) - 1 micro-batches of activations in flight, counting p from 0.
- Round latency: the dominant step (the largest of M times its time plus the times before it) runs
  without bubbles; each step s has waited T_w, executes T_e and reduces its gradients T_a, and the
  latency is the largest sum. The all-reduce sends 2 (g-1)/g of the gradients over the least
  bandwidth in the group.

Our reading: shares are real numbers, so that moving samples from the slowest to the fastest, the
paper's second phase, matters only where memory has cut a share. The number of micro-batches is
`microbatches` of the number of stages. As a `Plan` hands micro-batches to replicas whole, a group
of g needs more of them in flight than K_p to keep each replica busy; the larger of K_p and the
plan's default is used. More than `MAX_STAGES` stages are not tried where a stage may have several
devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dora.planner.baselines.problem import Problem, microbatches, problem, to_plan
from dora.planner.cost import Array, StageCosts
from dora.planner.predict import Group
from dora.spec import Cluster, ModelProfile, Plan, Workload, warmup_for

# With 8, 40 devices and 48 blocks take 8 s of one core, and each more adds about 1.5 s.
MAX_STAGES = 8


class Steps(NamedTuple):
    """Seconds of the steps of some pipelines; the last axis is the step, from the front."""

    forward_s: Array
    backward_s: Array
    reduce_s: Array

    def at(self, *index: Any) -> Steps:
        """Returns the entries of every table at that index."""
        return Steps(*(table[index] for table in self))


class Stages(NamedTuple):
    """One group as every stage: seconds and, with a leading axis of devices, shares."""

    forward_s: Array
    backward_s: Array
    reduce_s: Array
    shares: Array


def asteroid(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the pipeline of least round latency.

    Raises:
        InfeasiblePlanError: No pipeline of all devices fits the memory.
    """
    given = problem(profile, cluster, workload)
    most = min(given.num_devices, given.num_blocks)
    if given.max_replicas > 1:
        most = min(most, MAX_STAGES)
    programs: dict[int, Program] = {}
    found = []
    for num_stages in range(1, most + 1):
        m = microbatches(workload, num_stages)
        same_m = [p for p in range(1, most + 1) if microbatches(workload, p) == m]
        if m not in programs:
            programs[m] = Program(given, m, max(same_m))
        latency_s = programs[m].latency_s(num_stages)
        if np.isfinite(latency_s):
            found.append((latency_s, num_stages, m))
    if not found:
        raise given.no_plan("asteroid", "no pipeline of all devices has the memory and the links")
    _, num_stages, m = min(found)
    groups, shares = programs[m].pipeline(num_stages)
    in_flight = [2 * (num_stages - p) - 1 for p in range(num_stages)]
    warmup = [max(pair) for pair in zip(in_flight, warmup_for(shares), strict=True)]
    if not given.training:
        warmup = []
    return to_plan("asteroid", given, groups, shares=shares, warmup=warmup)


def round_latency_s(steps: Steps, num_microbatches: int) -> Array:
    """Returns the latency of a round, per pipeline; infinite if any step is."""
    possible = np.isfinite(steps.forward_s + steps.backward_s + steps.reduce_s)
    forward, backward = (np.where(possible, table, 0.0) for table in steps[:2])
    both = forward + backward
    earlier = np.cumsum(both, axis=-1) - both
    dominant = np.argmax(num_microbatches * both + earlier, axis=-1)[..., None]
    longest = np.take_along_axis(both, dominant, -1)
    # Positive in front of the dominant step, negative behind it.
    ahead = np.take_along_axis(earlier, dominant, -1) - earlier
    executes = np.maximum(num_microbatches * longest + ahead, 0.0)
    waits = np.cumsum(forward, axis=-1) - forward
    latency = np.max(waits + executes + np.where(possible, steps.reduce_s, 0.0), axis=-1)
    return np.where(possible.all(axis=-1), latency, np.inf)


class Program:
    """The tables of Q(l, n, p) for one number of micro-batches.

    Attributes:
        order: Devices by descending memory.
        span: `[first, end]` -> where `flat` has that stage.
        flat: The costs, without empty stages.
        latency: `[p]` -> `[l, n]` least round latency of p stages.
        steps: `[p]` -> the steps of the pipeline kept for each `[l, n]`.
        before: `[p]` -> `[l, n]` (l', n') of the pipeline behind the first stage.
    """

    def __init__(self, given: Problem, num_microbatches: int, most: int) -> None:
        """Fills the tables up to `most` stages."""
        self.given, self.m = given, num_microbatches
        self.costs = given.costs(num_microbatches)
        spans = np.triu_indices(self.costs.num_blocks + 1, 1)
        self.span = np.zeros((self.costs.num_blocks + 1,) * 2, dtype=np.int64)
        self.span[spans] = np.arange(len(spans[0]))
        self.flat = self.costs._replace(
            **{
                field: getattr(self.costs, field)[..., spans[0], spans[1]]
                for field in (
                    "forward_s",
                    "backward_s",
                    "state_bytes",
                    "gradient_bytes",
                    "activation_bytes",
                )
            }
        )
        everyone = range(given.num_devices)
        self.order = sorted(everyone, key=lambda d: (-given.memory_bytes[d], d))
        self.slow = _slowest_links(given, self.order)
        self.latency: dict[int, Array] = {}
        self.steps: dict[int, Steps] = {}
        self.before: dict[int, NDArray[np.int64]] = {}
        self.stages: dict[tuple[int, int, int], Stages] = {}
        for p in range(1, most + 1):
            self._fill(p)

    def latency_s(self, num_stages: int) -> float:
        """Returns Q(all layers, all devices, num_stages)."""
        return float(self.latency[num_stages][-1, -1])

    def stage(self, n: int, n_behind: int, p: int) -> Stages:
        """Returns the stages of the devices between the last n and the last n_behind.

        Args:
            n: Devices from this stage to the end.
            n_behind: Devices behind this stage.
            p: Stages from this one to the last.
        """
        key = n, n_behind, p
        if key not in self.stages:
            num = len(self.order)
            group = self.order[num - n : num - n_behind]
            self.stages[key] = stages_of(self.given, self.flat, group, 2 * p - 1)
        return self.stages[key]

    def _fill(self, p: int) -> None:
        num_blocks, num = self.costs.num_blocks, len(self.order)
        latency = np.full((num_blocks + 1, num + 1), np.inf)
        before = np.zeros((num_blocks + 1, num + 1, 2), dtype=np.int64)
        table = Steps(*(np.zeros((num_blocks + 1, num + 1, 2 * p - 1)) for _ in range(3)))
        layers, behind = np.tril_indices(num_blocks + 1, -1)
        is_pair = behind >= p - 1 if p > 1 else behind == 0
        layers, behind = layers[is_pair], behind[is_pair]
        rows = np.arange(num_blocks + 1)
        for n in range(p, num + 1):
            fewest = max(p - 1, n - self.given.max_replicas)
            for n_behind in range(fewest, n) if p > 1 else [0] * (fewest == 0):
                steps = self._extended(layers, behind, n, n_behind, p)
                values = np.full((num_blocks + 1, num_blocks + 1), np.inf)
                values[layers, behind] = round_latency_s(steps, self.m)
                pick = np.argmin(values, axis=1)
                better = np.flatnonzero(values[rows, pick] < latency[:, n])
                latency[better, n] = values[better, pick[better]]
                before[better, n, 0], before[better, n, 1] = pick[better], n_behind
                where = np.zeros(values.shape, dtype=np.int64)
                where[layers, behind] = np.arange(len(layers))
                for own, new in zip(table, steps, strict=True):
                    own[better, n] = new[where[better, pick[better]]]
        self.latency[p], self.steps[p], self.before[p] = latency, table, before

    def _extended(
        self, layers: NDArray[np.int64], behind: NDArray[np.int64], n: int, n_behind: int, p: int
    ) -> Steps:
        """Returns the steps of a stage in front of the pipeline kept for (behind, n_behind).

        Args:
            layers: From the new stage to the end.
            behind: Layers behind the new stage.
            n: Devices from the new stage to the end.
            n_behind: Devices behind the new stage.
            p: Stages, with the new one.
        """
        front = self.stage(n, n_behind, p)
        end = self.costs.num_blocks - behind
        span = self.span[self.costs.num_blocks - layers, end]
        own = [table[span][:, None] for table in front[:3]]
        if p == 1:
            return Steps(*own)
        old = self.steps[p - 1].at(behind, n_behind)
        n_after = self.before[p - 1][behind, n_behind, 1]
        is_known = np.isfinite(self.latency[p - 1][behind, n_behind])
        sizes = self.costs.boundary_bytes[end]
        with np.errstate(invalid="ignore"):
            there = np.where(is_known, sizes * self.slow[0, n, n_behind, n_after], np.inf)
        back = np.zeros_like(there)
        if self.given.training:
            back = np.where(is_known, sizes * self.slow[1, n, n_behind, n_after], 0.0)
        hop = [there[:, None], back[:, None], np.zeros((len(sizes), 1))]
        return Steps(
            *(np.concatenate([a, b, c], axis=1) for a, b, c in zip(own, hop, old, strict=True))
        )

    def pipeline(self, num_stages: int) -> tuple[list[Group], list[list[float]]]:
        """Returns the stages of the kept pipeline of all layers and devices, and its shares."""
        num_blocks, num = self.costs.num_blocks, len(self.order)
        layers, n = num_blocks, num
        groups, shares = [], []
        for p in range(num_stages, 0, -1):
            behind, n_behind = (int(x) for x in self.before[p][layers, n])
            first, end = num_blocks - layers, num_blocks - behind
            own = self.stage(n, n_behind, p).shares[:, self.span[first, end]]
            groups.append(Group(first, end, tuple(self.order[num - n : num - n_behind])))
            shares.append([float(share) for share in own])
            layers, n = behind, n_behind
        return groups, shares


def stages_of(given: Problem, costs: StageCosts, group: list[int], in_flight: int) -> Stages:
    """Returns what a group costs as any stage with that many micro-batches in flight.

    Args:
        given: The problem.
        costs: With the axes `[first, end]` of every array made one, without empty stages.
        group: The devices.
        in_flight: Micro-batches whose activations are kept.
    """
    forward, backward = costs.forward_s[group], costs.backward_s[group]
    room = given.memory_bytes[group][:, None] - costs.state_bytes
    kept = in_flight * costs.activation_bytes
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.clip(np.where(kept > 0, room / kept, np.inf), 0.0, 1.0)
    shares = _shares(1 / np.maximum(forward + backward, 1e-12), most)
    # A device without a share runs nothing, which the paper's groups do not have.
    possible = np.all((room >= 0) & (shares > 0), axis=0) & (shares.sum(axis=0) > 1 - 1e-9)
    s_per_byte = given.links.s_per_byte[np.ix_(group, group)]
    slowest = s_per_byte.max(initial=0.0, where=~np.eye(len(group), dtype=bool))
    traffic = 2 * (len(group) - 1) / len(group) * costs.gradient_bytes
    # Without gradients, and in inference, nothing is reduced and no link is needed for it.
    reduce_s = np.multiply(traffic, slowest, where=traffic > 0, out=np.zeros_like(traffic))
    return Stages(
        forward_s=np.where(possible, np.max(shares * forward, axis=0), np.inf),
        backward_s=np.where(possible, np.max(shares * backward, axis=0), 0.0),
        reduce_s=np.where(possible, reduce_s, 0.0),
        shares=shares,
    )


def _shares(speed: Array, most: Array) -> Array:
    """Returns shares in proportion to speed, none above `most`; they sum to 1 if they can."""
    shares = speed / speed.sum(axis=0)
    for _ in range(len(speed)):  # each round cuts at least one more device
        if not (shares > most).any():
            break
        is_cut = shares >= most
        left = 1 - np.where(is_cut, most, 0.0).sum(axis=0)
        free = np.where(is_cut, 0.0, speed)
        total = free.sum(axis=0)
        scaled = free * np.where(total > 0, left / np.where(total > 0, total, 1.0), 0.0)
        shares = np.where(is_cut, most, scaled)
    return np.asarray(np.minimum(shares, most))


def _slowest_links(given: Problem, order: list[int]) -> Array:
    """Returns `[direction, n, n', n'']` most seconds per byte between two neighbouring groups.

    The first group are the devices between the last n and the last n', the second those between
    the last n' and the last n''. Direction 0 goes from the first to the second.
    """
    num = len(order)
    s_per_byte = given.links.s_per_byte[np.ix_(order, order)]
    slow = np.full((2, num + 1, num + 1, num + 1), np.inf)
    for b in range(1, num):
        for a in range(b + 1, num + 1):
            for c in range(b):
                front, behind = slice(num - a, num - b), slice(num - b, num - c)
                slow[0, a, b, c] = s_per_byte[front, behind].max()
                slow[1, a, b, c] = s_per_byte[behind, front].max()
    return slow
