"""A prima.cpp-like planner: windows of layers by compute and memory, communication free.

Source: Li et al., Prima.cpp: Fast 30-70B LLM Inference on Heterogeneous and Low-Resource Home
Clusters, 2025, arXiv 2504.08791, and its solver (github.com/Lizonghang/prima.cpp,
common/common.cpp): an integer program for the layers of each device of a ring that minimises the
latency of one token, in which the communication term is set to zero; devices that do not help are
dropped; the device with the inputs is the head of the ring.

Our reading: one round of the ring, as a `Plan` gives a device contiguous blocks; layers differ, so
the integer program is a dynamic program over (devices of the ring, blocks done), exact for the same
objective; what prima.cpp would reload from disk does not fit here. Times are taken at the
micro-batch that a pipeline of all devices would use.
"""

from __future__ import annotations

import numpy as np

from dora.planner.baselines.problem import (
    compute_s,
    fits,
    in_order,
    microbatches,
    problem,
    to_plan,
)
from dora.planner.cost import Array
from dora.spec import Cluster, ModelProfile, Plan, Workload


def prima_like(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the windows with the least compute for one pass over the ring in rank order.

    Raises:
        InfeasiblePlanError: The devices lack the memory.
    """
    given = problem(profile, cluster, workload)
    costs = given.costs(microbatches(workload, given.num_devices))
    held = costs.state_bytes + costs.activation_bytes
    stage_s = np.where(fits(given, held), compute_s(costs), np.inf)
    head = given.source or 0
    ring = [(head + i) % given.num_devices for i in range(given.num_devices)]
    windows = least_pass(stage_s[ring], is_head_kept=given.source is not None)
    if windows is None:
        raise given.no_plan("prima-like", "no windows fit the memory")
    return to_plan("prima-like", given, in_order(ring, windows))


def least_pass(stage_s: Array, *, is_head_kept: bool) -> list[int] | None:
    """Returns the blocks of each device, in order, with the least sum; None if none fit.

    Args:
        stage_s: `[device, first, end]` seconds, infinite where it does not fit.
        is_head_kept: The first device has the inputs and can not be dropped.
    """
    num_devices, width = stage_s.shape[0], stage_s.shape[-1]
    best, picks = np.full(width, np.inf), []
    best[0] = 0.0
    nothing = np.arange(width)
    for d, own in enumerate(stage_s):
        total = best[:, None] + own
        if d or not is_head_kept:
            total[nothing, nothing] = best  # the device may be dropped
        picks.append(np.argmin(total, axis=0))
        best = total[picks[-1], nothing]
    if not np.isfinite(best[-1]):
        return None
    windows, end = [], width - 1
    for d in reversed(range(num_devices)):
        first = int(picks[d][end])
        windows.append(end - first)
        end = first
    return windows[::-1]
