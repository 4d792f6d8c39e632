"""A Parallax-like planner: water-filling by speed, a chain by round-trip times.

Source: Parallax: Efficient LLM Inference Service over Decentralized Environment, 2025, arXiv
2509.26182, and its scheduler (github.com/GradientHQ/parallax, src/scheduling): phase 1 takes nodes
by descending capacity until a pipeline holds the model, for the fewest stages, and rebalances its
layers in proportion to compute under each node's capacity (water-filling); phase 2 picks the chain
with the least round-trip times plus layer latencies. Bandwidth is in neither.

Our reading: one pipeline, as a `Plan` is one; capacity is the number of mean blocks that the memory
holds; as each part has one holder, phase 2 orders the devices by round-trip times alone: exactly up
to `MAX_EXACT` of them, else always to the nearest. Times are taken at the micro-batch that a
pipeline of all devices would use.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from dora.planner.baselines.problem import (
    compute_s,
    in_order,
    microbatches,
    problem,
    to_plan,
)
from dora.planner.cost import Array
from dora.spec import Cluster, ModelProfile, Plan, Workload

# 7 devices have 5,040 orders: 20 ms; each more takes about ten times as long.
MAX_EXACT = 7


def parallax_like(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns a pipeline of the fewest devices, balanced by speed, in the order of least RTT.

    Raises:
        InfeasiblePlanError: The devices lack the memory.
    """
    given = problem(profile, cluster, workload)
    costs = given.costs(microbatches(workload, given.num_devices))
    block_bytes = (costs.state_bytes + costs.activation_bytes)[0, -1] / given.num_blocks
    room = np.minimum(given.memory_bytes / max(block_bytes, 1.0), given.num_blocks)
    capacity = np.floor(room + 1e-9).astype(int)
    model_s = compute_s(costs)[:, 0, -1]
    by_capacity = sorted(range(given.num_devices), key=lambda d: (-capacity[d], model_s[d], d))
    enough = np.flatnonzero(np.cumsum(capacity[by_capacity]) >= given.num_blocks)
    if not len(enough):
        raise given.no_plan("parallax-like", "the devices together hold too few blocks")
    chosen = by_capacity[: int(enough[0]) + 1]
    chain = nearest_chain(given.links.latency_s + given.links.latency_s.T, sorted(chosen))
    if chain is None:
        raise given.no_plan("parallax-like", "no chain of links connects the devices")
    speed = 1 / np.maximum(model_s[chain], 1e-12)
    counts = water_fill(speed, capacity[chain].tolist(), given.num_blocks)
    return to_plan("parallax-like", given, in_order(chain, counts))


def water_fill(speed: Array, capacity: list[int], total: int) -> list[int]:
    """Returns counts in proportion to speed under capacities, as evenly in time as they can be.

    Filled a block at a time to whoever would end first, the whole-number form of raising the water
    level; ties go to the lower index. The largest count over speed is the least possible.
    """
    counts = np.zeros(len(speed), dtype=int)
    for _ in range(total):
        ends = np.where(counts < np.array(capacity), (counts + 1) / speed, np.inf)
        counts[int(np.argmin(ends))] += 1
    return [int(count) for count in counts]


def nearest_chain(rtt_s: Array, devices: list[int]) -> list[int] | None:
    """Returns the order with the least sum of round trips; None if links do not connect it."""

    def length_s(order: tuple[int, ...] | list[int]) -> float:
        return sum(float(rtt_s[a, b]) for a, b in zip(order, order[1:], strict=False))

    if len(devices) <= MAX_EXACT:
        best = min(permutations(devices), key=length_s)
        return list(best) if np.isfinite(length_s(best)) else None
    chains = []
    for start in devices:
        chain, left = [start], set(devices) - {start}
        while left:
            chain.append(min(left, key=lambda d, last=chain[-1]: (rtt_s[last, d], d)))  # type: ignore[misc]
            left.remove(chain[-1])
        chains.append(chain)
    best_chain = min(chains, key=length_s)
    return best_chain if np.isfinite(length_s(best_chain)) else None
