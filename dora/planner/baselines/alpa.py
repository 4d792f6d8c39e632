"""An Alpa-like planner: the inter-operator program on a cluster taken for homogeneous.

Source: Zheng et al., Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep
Learning, OSDI 2022, arXiv 2201.12023: devices are equal; stages on device meshes that use all
devices; the objective is the sum of the stages' latencies plus (B - 1) times the largest, found by
trying each largest latency and a dynamic program over the rest; communication between stages is
not in it; memory holds a stage's state and the activations of as many micro-batches as there are
stages from it to the last.

Our reading: a device has the mean time, memory and rate of the cluster. Meshes of one size only
(the paper also mixes sizes), which the devices fill in rank order. Inside a mesh there is data
parallelism with equal shares and an all-reduce spread over the micro-batches (the paper's intra-
operator plans also split operators, which our runtime does not). B is `microbatches`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dora.planner.baselines.problem import (
    Problem,
    compute_s,
    divisors,
    microbatches,
    problem,
    to_plan,
)
from dora.planner.cost import Array
from dora.planner.predict import Group
from dora.spec import Cluster, ModelProfile, Plan, Workload


def alpa_like(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the best split over equal meshes of all devices.

    Raises:
        InfeasiblePlanError: No split fits the mean memory.
    """
    given = problem(profile, cluster, workload)
    found = []
    for num_stages in divisors(given.num_devices):
        size = given.num_devices // num_stages
        if num_stages <= given.num_blocks and size <= given.max_replicas:
            m = microbatches(workload, max(num_stages, size))
            objective, ends = best_split(mesh_s(given, num_stages, m), m)
            if ends:
                found.append((objective, num_stages, m, ends))
    if not found:
        raise given.no_plan("alpa-like", "no split over all devices fits their mean memory")
    _, num_stages, m, ends = min(found)
    size = given.num_devices // num_stages
    meshes = [tuple(range(s * size, (s + 1) * size)) for s in range(num_stages)]
    groups = [
        Group(first, end, mesh) for first, end, mesh in zip([0, *ends], ends, meshes, strict=False)
    ]
    return to_plan("alpa-like", given, groups, num_microbatches=m)


def mesh_s(given: Problem, num_stages: int, num_microbatches: int) -> Array:
    """Returns `[stages to the end - 1, first, end]` latency per micro-batch of a stage on a mesh.

    Infinite where it does not fit the mean memory.
    """
    costs = given.costs(num_microbatches)
    size = given.num_devices // num_stages
    stage_s = compute_s(costs).mean(axis=0) / size
    if size > 1 and given.training:
        known = given.links.s_per_byte[np.isfinite(given.links.s_per_byte)]
        mean_rate = (1 / known).mean() if len(known) else 1e-300  # no link: slower than any
        traffic = 2 * (size - 1) / size * costs.gradient_bytes
        stage_s = stage_s + traffic / mean_rate / num_microbatches
    in_flight = np.arange(1, num_stages + 1)[:, None, None]
    needed = costs.state_bytes + in_flight * costs.activation_bytes / size
    return np.where(needed <= given.memory_bytes.mean(), stage_s, np.inf)


def best_split(stage_s: Array, num_microbatches: int) -> tuple[float, list[int]]:
    """Returns the least sum + (B - 1) largest, and the end of each stage; no ends if none fits.

    Args:
        stage_s: `[stages to the end - 1, first, end]`.
        num_microbatches: B.
    """
    best, answer = np.inf, list[int]()
    for largest in np.unique(stage_s[np.isfinite(stage_s)]):
        # No stage is slower than the largest, so nothing later can win.
        if num_microbatches * largest >= best:
            break
        total, ends = _least_sum(np.where(stage_s <= largest, stage_s, np.inf))
        if total + (num_microbatches - 1) * largest < best:
            best, answer = total + (num_microbatches - 1) * float(largest), ends
    return best, answer


def _least_sum(stage_s: Array) -> tuple[float, list[int]]:
    """Returns the least sum over splits into that many stages, and the end of each stage."""
    num_stages, width = stage_s.shape[0], stage_s.shape[-1]
    behind = np.full(width, np.inf)
    behind[-1] = 0.0
    picks: list[NDArray[np.int64]] = []
    for own in stage_s:
        total = own + behind[None, :]
        picks.append(np.argmin(total, axis=1))
        behind = total[np.arange(width), picks[-1]]
    if not np.isfinite(behind[0]):
        return np.inf, []
    ends, first = [], 0
    for s in reversed(range(num_stages)):
        first = int(picks[s][first])
        ends.append(first)
    return float(behind[0]), ends
