"""Makes the demo's plan for processes that share the cores of one machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import combinations

import psutil
import torch
from torch import nn

from dora.demo.charlm import next_char_loss
from dora.planner import predict
from dora.spec import (
    BlockProfile,
    Cluster,
    Device,
    ModelProfile,
    Plan,
    Replica,
    Stage,
    Timing,
    Workload,
)

NUM_RANKS = 4
# How long all processes compute at once to see how they share the cores.
SHARED_S = 2.0


def mean_pass_s(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the mean time of a forward and backward pass while all processes run theirs.

    A block takes less than the operating system's time slice, so its median time shows nothing
    of the other processes on the same core; the mean over many slices does.
    """
    start, num_passes = time.perf_counter(), 0
    while time.perf_counter() - start < SHARED_S:
        next_char_loss(module(x), y).backward()
        num_passes += 1
    elapsed_s = time.perf_counter() - start
    module.zero_grad()
    return elapsed_s / num_passes


def with_passes(profile: ModelProfile, passes_s: Sequence[float]) -> ModelProfile:
    """Scales each device's times so that all blocks together take its time of a pass."""
    timings = [block.costs[0].timings for block in profile.blocks]
    factors = {
        device[0].device: pass_s / sum(t.forward_s + t.backward_s for t in device)
        for device, pass_s in zip(zip(*timings, strict=True), passes_s, strict=True)
    }

    def scaled(timing: Timing) -> Timing:
        factor = factors[timing.device]
        return Timing(
            device=timing.device,
            forward_s=timing.forward_s * factor,
            backward_s=timing.backward_s * factor,
        )

    def scaled_block(block: BlockProfile) -> BlockProfile:
        cost = block.costs[0].model_copy(
            update={"timings": tuple(scaled(t) for t in block.costs[0].timings)}
        )
        return block.model_copy(update={"costs": (cost,)})

    return profile.model_copy(update={"blocks": tuple(map(scaled_block, profile.blocks))})


def best_hybrid(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns the fastest plan with two replicas of the first stage and two more stages."""
    num_blocks = len(profile.blocks)
    plans = (
        predict(profile, cluster, workload, _hybrid((0, *cuts, num_blocks), cluster, workload))
        for cuts in combinations(range(1, num_blocks), 2)
    )
    return min(plans, key=lambda plan: plan.cost.makespan_s if plan.cost else math.inf)


def _hybrid(edges: tuple[int, ...], cluster: Cluster, workload: Workload) -> Plan:
    names = [device.name for device in cluster.devices]
    groups = [names[:2], names[2:3], names[3:]]
    return Plan(
        devices=tuple(names),
        stages=tuple(
            Stage(
                index=i,
                first_block=edges[i],
                last_block=edges[i + 1] - 1,
                replicas=tuple(Replica(device=d, share=1 / len(group)) for d in group),
            )
            for i, group in enumerate(groups)
        ),
        num_microbatches=workload.num_microbatches or 1,
    )


def process(rank: int) -> Device:
    """Returns one of the processes as a device; its speed is measured, not taken from here."""
    memory_bytes = psutil.virtual_memory().total // NUM_RANKS
    return Device(
        name=f"process-{rank}",
        kind="process",
        flops_per_s=1e10,
        mem_bandwidth_bytes_per_s=1e10,
        memory_bytes=memory_bytes,
    )
