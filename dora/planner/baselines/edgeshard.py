"""EdgeShard's two dynamic programs.

Source: Zhang et al., EdgeShard: Efficient LLM Inference via Collaborative Edge Computing, IEEE
Internet of Things Journal 2025, arXiv 2405.14371: the latency program over (layer, device), the
throughput program g(i, S, k) over subsets of devices with a stage's cost the larger of its compute
and its communication, bytes over the bandwidth of the pair as communication, and the first layer
on the device that has the inputs. Both programs were read in published notes on the paper, which
comes without source code.

Our reading: devices hold contiguous blocks and appear once; memory holds the state of the blocks;
times are taken at the micro-batch that a pipeline of all devices would use; the token that returns
to the source is too small to count. The subsets of more than `MAX_DEVICES` devices are out
of reach (the paper's program takes O(N^2 2^M M^2)), so it gets the fastest, and if their memory
does not do, the largest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dora.planner.baselines.problem import (
    Problem,
    compute_s,
    fits,
    hop_s,
    microbatches,
    problem,
    shortlists,
    to_plan,
)
from dora.planner.cost import Array
from dora.planner.predict import Group
from dora.spec import Cluster, ModelProfile, Plan, Workload

# Subsets of 12 devices take 0.5 s at 48 blocks, and each more doubles it.
MAX_DEVICES = 12
NO_ROOM = "no chain of devices has the memory and the links"


class Tables(NamedTuple):
    """Seconds of stages `[device, first, end]`, infinite if they do not fit, and of hops."""

    stage_s: Array
    hop_s: Array
    source: int | None


def tables(given: Problem) -> Tables:
    """Returns what both programs read."""
    costs = given.costs(microbatches(given.workload, given.num_devices))
    held = costs.state_bytes + costs.activation_bytes
    stage_s = np.where(fits(given, held), compute_s(costs), np.inf)
    return Tables(stage_s, hop_s(given, costs), given.source)


def edgeshard_latency(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the chain with the least sum of compute and communication.

    The state is (blocks done, last device). A chain is only extended by devices that it does not
    contain; as each state keeps one chain, this is exact unless the best chain that may repeat
    devices does repeat one.

    Raises:
        InfeasiblePlanError: No chain fits the memory.
    """
    given = problem(profile, cluster, workload)
    groups = latency_chain(tables(given))
    if groups is None:
        raise given.no_plan("edgeshard-latency", NO_ROOM)
    return to_plan("edgeshard-latency", given, groups)


def latency_chain(known: Tables) -> list[Group] | None:
    """Returns the stages that the latency program finds."""
    num_devices, num_blocks = len(known.stage_s), known.stage_s.shape[-1] - 1
    best = np.full((num_blocks + 1, num_devices), np.inf)
    contains = np.zeros((num_blocks + 1, num_devices, num_devices), dtype=bool)
    before: dict[tuple[int, int], tuple[int, int]] = {}
    for end in range(1, num_blocks + 1):
        for d in range(num_devices):
            reached = best[:end] + known.hop_s[:end, :, d] + known.stage_s[d, :end, end, None]
            reached[contains[:end, :, d]] = np.inf
            first, last = divmod(int(np.argmin(reached)), num_devices)
            alone_s = known.stage_s[d, 0, end] if known.source in (None, d) else np.inf
            best[end, d] = min(alone_s, reached[first, last])
            if reached[first, last] < alone_s:
                before[end, d] = first, last
                contains[end, d] = contains[first, last]
            contains[end, d, d] = True
    end, d = num_blocks, int(np.argmin(best[-1]))
    if not np.isfinite(best[end, d]):
        return None
    groups = []
    while end:
        first, last = before.get((end, d), (0, -1))
        groups.append(Group(first, end, (d,)))
        end, d = first, last
    return groups[::-1]


def edgeshard_throughput(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the chain whose slowest stage, or hop between stages, is fastest.

    Raises:
        InfeasiblePlanError: No chain fits the memory.
    """
    given = problem(profile, cluster, workload)
    known = tables(given)
    model_s = compute_s(given.costs(1))[:, 0, -1]
    for devices in shortlists(given, model_s, lambda devices: len(devices) <= MAX_DEVICES):
        if known.source is not None and known.source not in devices:
            devices = [*devices[:-1], known.source]  # noqa: PLW2901
        groups = throughput_chain(known, devices)
        if groups is not None:
            return to_plan("edgeshard-throughput", given, groups)
    raise given.no_plan("edgeshard-throughput", NO_ROOM)


def throughput_chain(known: Tables, devices: list[int]) -> list[Group] | None:
    """Returns the stages that the throughput program finds on some of the devices.

    `best[subset, k, i]`: the least bottleneck of i blocks on exactly that subset, ending on its
    member k.
    """
    num, num_blocks = len(devices), known.stage_s.shape[-1] - 1
    stage_s = known.stage_s[devices]
    hops = known.hop_s[:, devices][:, :, devices]
    best = np.full((1 << num, num, num_blocks + 1), np.inf)
    before = np.zeros((1 << num, num, num_blocks + 1, 2), dtype=np.int16)
    for k, d in enumerate(devices):
        if known.source in (None, d):
            best[1 << k, k] = stage_s[k, 0]
            before[1 << k, k] = 0, -1
    columns = np.arange(num_blocks)
    for subset in range(1, 1 << num):
        for k in (k for k in range(num) if not subset >> k & 1):
            arrived = np.maximum(best[subset, :, :-1], hops[:, :, k].T)
            last = np.argmin(arrived, axis=0)
            ended = np.maximum(arrived[last, columns][:, None], stage_s[k, :-1])
            first = np.argmin(ended, axis=0)
            larger = subset | 1 << k
            best[larger, k] = ended[first, np.arange(num_blocks + 1)]
            before[larger, k, :, 0], before[larger, k, :, 1] = first, last[first]
    subset, k = divmod(int(np.argmin(best[:, :, -1])), num)
    if not np.isfinite(best[subset, k, -1]):
        return None
    groups, end = [], num_blocks
    while end:
        first_block, last_member = (int(x) for x in before[subset, k, end])
        groups.append(Group(first_block, end, (devices[k],)))
        subset, k, end = subset & ~(1 << k), last_member, first_block
    return groups[::-1]
