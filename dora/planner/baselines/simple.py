"""Placements that follow a rule: one device, copies, equal parts, parts by memory.

Sources: EDDL (Hao and Zhang, SEC 2021) is data parallel over edge devices; GPipe (Huang et al.,
2019, arXiv 1811.06965) and the usual stage splitters cut into equal parts; exo
(github.com/exo-explore/exo) and llama.cpp's RPC back-end place by memory.
"""

from __future__ import annotations

import numpy as np

from dora.planner.baselines.problem import (
    compute_s,
    divisors,
    in_order,
    microbatches,
    problem,
    proportional,
    to_plan,
)
from dora.planner.cost import share_microbatches
from dora.planner.predict import Group
from dora.spec import Cluster, ModelProfile, Plan, Workload


def best_single(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the fastest device that has the memory for the model.

    Its time is compute only, over every divisor of the batch as the number of micro-batches
    (small ones save memory, large ones dispatch). Memory: state, buffers and the activations of
    one micro-batch.

    Raises:
        InfeasiblePlanError: No device has the memory.
    """
    given = problem(profile, cluster, workload)
    choices = divisors(workload.batch_size) if workload.kind == "train" else [1]
    if workload.num_microbatches is not None and workload.kind != "generate":
        choices = [workload.num_microbatches]
    found = []
    for m in choices:
        costs = given.costs(m)
        held = costs.state_bytes + costs.buffer_bytes + costs.activation_bytes
        for d, total_s in enumerate(m * compute_s(costs)[:, 0, -1]):
            if held[0, -1] <= given.memory_bytes[d]:
                found.append((float(total_s), m, d))
    if not found:
        raise given.no_plan("best-single", "no device has the memory for the whole model")
    _, m, d = min(found)
    group = Group(0, given.num_blocks, (d,))
    return to_plan("best-single", given, [group], num_microbatches=m)


def data_parallel(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns one stage on every device that has the memory, with shares by speed.

    Equal shares would wait for the slowest device, so each micro-batch goes to whoever ends it
    first. A device so slow that it would get none is left out. Communication does not enter.

    Raises:
        InfeasiblePlanError: No device has the memory.
    """
    given = problem(profile, cluster, workload)
    m = microbatches(workload, given.num_devices)
    costs = given.costs(m)
    held = float((costs.state_bytes + costs.activation_bytes)[0, -1])
    able = [d for d in range(given.num_devices) if held <= given.memory_bytes[d]]
    if not able:
        raise given.no_plan("data-parallel", "no device has the memory for the whole model")
    counts = share_microbatches(compute_s(costs)[able, 0, -1], m)
    used = [(d, int(count)) for d, count in zip(able, counts, strict=True) if count]
    group = Group(0, given.num_blocks, tuple(d for d, _ in used))
    shares = [[count / m for _, count in used]]
    return to_plan("data-parallel", given, [group], num_microbatches=m, shares=shares)


def even_pipeline(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns all devices in rank order with equal numbers of blocks; earlier ones get the rest.

    Knows neither speed nor memory. With more devices than blocks the last devices are left out.
    """
    given = problem(profile, cluster, workload)
    num_stages = min(given.num_devices, given.num_blocks)
    counts = proportional(np.ones(num_stages), given.num_blocks)
    return to_plan("even-pipeline", given, in_order(range(num_stages), counts))


def memory_proportional(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns blocks in proportion to memory, on the fewest devices that have enough together.

    From exo's placement (src/exo/master/placement.py at b5375f8): fewest nodes, then most total
    memory; layers by the largest remainder, at least one each; neither speed nor bandwidth is
    read. llama.cpp's RPC back-end uses the same proportion over all devices. Our reading: the
    model needs its state, and the order is rank order.

    Raises:
        InfeasiblePlanError: All devices together lack the memory.
    """
    given = problem(profile, cluster, workload)
    needed = given.costs(1).state_bytes[0, -1]
    by_memory = sorted(range(given.num_devices), key=lambda d: (-given.memory_bytes[d], d))
    for count in range(1, min(given.num_devices, given.num_blocks) + 1):
        chosen = sorted(by_memory[:count])
        if given.memory_bytes[chosen].sum() >= needed:
            counts = proportional(given.memory_bytes[chosen], given.num_blocks)
            return to_plan("memory-proportional", given, in_order(chosen, counts))
    raise given.no_plan("memory-proportional", "the devices together lack the memory")
