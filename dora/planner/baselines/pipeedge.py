"""PipeEdge's dynamic program over multisets of device types.

Source: Hu et al., PipeEdge: Pipeline Parallelism for Large-Scale Model Inference on Heterogeneous
Edge Devices, DSD 2022, arXiv 2110.14895, and its scheduler
(github.com/usc-isi/PipeEdge, src-native/schedule.cpp): the state is (layers done, devices used of
each type, next type); a stage costs the larger of its compute and of its bytes over the smaller of
the two endpoints' bandwidths; the objective is the slowest stage; memory holds weights and receive,
send and processing buffers.

Our reading: devices of one type have equal times, memory and bandwidth; a device's bandwidth is
that of its fastest link; times are taken at the micro-batch that a pipeline of all devices would
use. Where the states, multisets times types, exceed `MAX_STATES`, it gets as many of the fastest
devices as stay below, and if their memory does not do, of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from dora.planner.baselines.problem import (
    Problem,
    compute_s,
    fits,
    microbatches,
    problem,
    shortlists,
    to_plan,
)
from dora.planner.cost import Array, StageCosts
from dora.planner.predict import Group
from dora.spec import Cluster, ModelProfile, Plan, Workload

# These take 1 to 2 s at 48 blocks: ten devices of each of four types, or 12 that all differ.
MAX_STATES = 1 << 16


def pipeedge(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the pipeline whose slowest stage or hop is fastest.

    Raises:
        InfeasiblePlanError: No pipeline fits the memory.
    """
    given = problem(profile, cluster, workload)
    costs = given.costs(microbatches(workload, given.num_devices))
    stage_s = np.where(fits(given, memory_needed(costs)), compute_s(costs), np.inf)
    rates = np.max(1 / given.links.s_per_byte, axis=1)

    def types_of(devices: Sequence[int]) -> list[list[int]]:
        return device_types(given, stage_s, rates, devices)

    def within_reach(devices: Sequence[int]) -> bool:
        types = types_of(devices)
        return len(types) * prod(len(members) + 1 for members in types) <= MAX_STATES

    for devices in shortlists(given, compute_s(costs)[:, 0, -1], within_reach):
        types = types_of(devices)
        one_each = [members[0] for members in types]
        slower = np.minimum(rates[one_each][:, None], rates[one_each][None, :])
        sizes = costs.boundary_bytes * (2 if given.training else 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            hops = np.where(slower > 0, sizes[:, None, None] / slower, np.inf)
        chain = best_chain(stage_s[one_each], hops, [len(members) for members in types])
        if chain:
            unused = [iter(members) for members in types]
            groups = [Group(first, end, (next(unused[u]),)) for first, end, u in chain]
            return to_plan("pipeedge", given, groups)
    raise given.no_plan("pipeedge", "no pipeline has the memory and the links")


def memory_needed(costs: StageCosts) -> Array:
    """Returns `[first, end]` bytes: weights, receive and send buffers, and input and output."""
    arriving = costs.boundary_bytes
    # The output of the last block is not in the profile's boundaries; it goes nowhere here.
    leaving = np.append(costs.boundary_bytes, 0.0)[None, :]
    received = np.append(np.where(np.arange(len(arriving)) > 0, arriving, 0.0), 0.0)[:, None]
    inside = np.append(arriving, 0.0)[:, None]
    state = costs.state_bytes + costs.activation_bytes
    return np.asarray(state + received + inside + 2 * leaving)


def device_types(
    given: Problem, stage_s: Array, rates: Array, devices: Sequence[int]
) -> list[list[int]]:
    """Returns the devices grouped by equal kind, times, memory and bandwidth, in rank order."""
    types: dict[tuple[object, ...], list[int]] = {}
    for d in devices:
        device = given.cluster.devices[d]
        key = (device.kind, device.memory_bytes, rates[d], stage_s[d].tobytes())
        types.setdefault(key, []).append(d)
    return list(types.values())


def best_chain(
    stage_s: Array, hops: Array, counts: Sequence[int]
) -> list[tuple[int, int, int]] | None:
    """Returns (first, end, type) of each stage, None if nothing fits.

    Args:
        stage_s: `[type, first, end]`.
        hops: `[block, type, type]`.
        counts: Devices of each type.
    """
    num_types, num_blocks = len(counts), stage_s.shape[-1] - 1
    radix = np.cumprod([1, *(count + 1 for count in counts)])
    # best[used, u, i]: i blocks are done by the multiset `used`, and type u comes next.
    best = np.full((int(radix[-1]), num_types, num_blocks + 1), np.inf)
    before = np.zeros((*best.shape, 2), dtype=np.int16)
    best[0, :, 0] = 0.0
    answer, ending = np.inf, (0, 0, 0)
    for used in range(int(radix[-1])):
        free = [u for u in range(num_types) if used // radix[u] % (counts[u] + 1) < counts[u]]
        for u in free:
            through = np.maximum(best[used, u][:, None], stage_s[u])
            first = np.argmin(through, axis=0)
            ended = through[first, np.arange(num_blocks + 1)]
            if ended[-1] < answer:
                answer, ending = ended[-1], (used, u, int(first[-1]))
            larger = used + int(radix[u])
            arrived = np.maximum(ended[:-1], hops[:, u, :].T)
            better = arrived < best[larger, :, :-1]
            best[larger, :, :-1][better] = arrived[better]
            before[larger, :, :-1][better] = np.stack([first[:-1], 0 * first[:-1] + u], axis=-1)[
                np.nonzero(better)[1]
            ]
    if not np.isfinite(answer):
        return None
    used, u, first_block = ending
    chain = [(first_block, num_blocks, u)]
    while first_block:
        earlier, previous = (int(x) for x in before[used, u, first_block])
        chain.append((earlier, first_block, previous))
        used, u, first_block = used - int(radix[previous]), previous, earlier
    return chain[::-1]
