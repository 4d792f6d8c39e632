"""How a cluster of unlike devices is brought down to the size of one machine.

Two factors, and nothing else, lie between a cluster and the one that the testbed emulates: all
devices compute `compute` times as fast, all media carry `network` times as much. With equal factors
the emulated cluster is the given one in slow motion. A small model sends more bytes per operation
than a large one; a larger network factor makes up for that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dora.errors import SpecError
from dora.spec import Cluster, Device, Medium

# The rest carries the packets of all devices, which the kernel charges to nobody.
_USED_CORES = 0.7
# Below it the scheduler's tick is too coarse for a share of a core.
_MIN_SHARE = 0.01
_MATMUL = 384
_BURSTS, _BURST_S = 8, 0.04


class Scale(NamedTuple):
    """Factors of all speeds, and of all rates."""

    compute: float
    network: float


def speed(device: Device) -> float:
    """Returns the FLOP/s that a device sustains."""
    return device.flops_per_s * device.efficiency


def largest(cluster: Cluster, num_cores: int, core_flops_per_s: float) -> float:
    """Returns the factor at which the devices fill the machine, none having more than one core."""
    speeds = [speed(device) for device in cluster.devices]
    return min(num_cores * _USED_CORES / sum(speeds), 1 / max(speeds)) * core_flops_per_s


def shares(cluster: Cluster, factor: float, num_cores: int, core_flops_per_s: float) -> list[float]:
    """Returns the cores of every device at that factor of all speeds.

    Raises:
        SpecError: They need more cores than there are, or one gets next to nothing.
    """
    found = [speed(d) * factor / core_flops_per_s for d in cluster.devices]
    if sum(found) > num_cores:
        raise SpecError(
            f"scale: given {factor:.4g}, which needs {sum(found):.2f} cores of {num_cores}, "
            f"allowed: at most {factor * num_cores / sum(found):.4g}"
        )
    slowest = min(found)
    if slowest < _MIN_SHARE:
        name = cluster.devices[found.index(slowest)].name
        raise SpecError(
            f"scale: given {factor:.4g}, which leaves {slowest:.4f} cores for {name}, "
            f"allowed: at least {_MIN_SHARE} for every device: leave out the slowest or fastest"
        )
    return found


def packed(cores: Sequence[float]) -> list[list[int]]:
    """Returns the processors that each device may run on: one, if all find a place.

    The kernel hands out a quota per processor, so a process that moves between two loses some.
    """
    cpus = sorted(os.sched_getaffinity(0))
    load = dict.fromkeys(cpus, 0.0)
    found: dict[int, list[int]] = {}
    for device in sorted(range(len(cores)), key=lambda d: -cores[d]):
        cpu = min(cpus, key=lambda c: load[c])
        load[cpu] += cores[device]
        found[device] = [cpu]
    return [found[d] if max(load.values()) <= 1 else cpus for d in range(len(cores))]


def emulated(cluster: Cluster, scale: Scale, *, has_delay: bool) -> Cluster:
    """Returns the cluster as the testbed is: this is what plans for it are made with.

    Args:
        cluster: As given.
        scale: See above.
        has_delay: Whether the kernel can delay packets; without, media have no latency. How
            radios lose rate when several of them send can not be emulated either way.
    """

    def slower(device: Device) -> Device:
        return device.model_copy(
            update={
                "flops_per_s": device.flops_per_s * scale.compute,
                "mem_bandwidth_bytes_per_s": device.mem_bandwidth_bytes_per_s * scale.compute,
                "dispatch_s": device.dispatch_s / scale.compute,
                "power_modes": (),
            }
        )

    def narrower(medium: Medium) -> Medium:
        return Medium(
            name=medium.name,
            rate_bytes_per_s=medium.rate_bytes_per_s * scale.network,
            latency_s=medium.latency_s / scale.network if has_delay else 0.0,
        )

    return cluster.model_copy(
        update={
            "devices": tuple(map(slower, cluster.devices)),
            "media": tuple(map(narrower, cluster.media)),
        }
    )


def core_flops_per_s() -> float:
    """Measures what one core of this machine sustains, in fp32 matrix products.

    The fastest of several short bursts counts: what else runs can only slow them down.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return max(_burst_flops_per_s() for _ in range(_BURSTS))
    finally:
        torch.set_num_threads(threads)


def _burst_flops_per_s() -> float:
    a = torch.rand(_MATMUL, _MATMUL)
    start, count = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - start) < _BURST_S:
        a @ a
        count += 1
    return count * 2 * _MATMUL**3 / elapsed_s
