"""Profile, then plan: joins profiler, catalogue and planner for `DoraParallel` and the CLI.

every rank:  its own blocks, timed --gather--> one ModelProfile --+--> search --> best Plan
devices without measured times:    catalogue roofline ------------+
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from dora.catalog import scale_to_cluster
from dora.errors import InfeasiblePlanError, SpecError
from dora.partition import Chain
from dora.planner import SearchResult, search
from dora.planner.search import microbatch_choices
from dora.profiler import load_profiles, merge_profiles, profile_model
from dora.spec import Cluster, ModelProfile, Plan, QoE, Workload

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
Gather = Callable[[bytes], list[bytes]]
Planner = Callable[[Chain, Call, Gather], Plan]
LossFn = Callable[[Any, Any], Any]

# The planner interpolates between measured sizes, so a few are enough.
MAX_SIZES = 4


def planned(
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    profiles: Sequence[str | os.PathLike[str]] = (),
) -> Planner:
    """Returns a function that makes the plan where the model runs, for `DoraParallel`.

    Every rank measures the blocks on its own device, all at once; all ranks then search over the
    same numbers and so find the same plan. Rank i is `cluster.devices[i]`.
    ::

        model = DoraParallel(model, planned(cluster, Workload(batch_size=32)), sample=inputs)

    Args:
        cluster: Devices in rank order, and the links between them.
        workload: What is run; sets the micro-batch sizes that are measured.
        qoe: Hard bounds and the objective; None minimises time.
        profiles: Files of `dora profile` to take instead of measuring; times of devices that
            they lack are modelled.

    Returns:
        A function of (chain, (args, kwargs), gather). It raises InfeasiblePlanError if no plan
        meets the QoE, or if there are not as many ranks as devices.
    """

    def make(chain: Chain, call: Call, gather: Gather) -> Plan:
        if dist.get_world_size() != len(cluster.devices):
            raise InfeasiblePlanError(
                f"cluster: given {len(cluster.devices)} devices for {dist.get_world_size()} "
                "ranks, allowed: one rank per device"
            )
        profile = (
            load_profiles(profiles)
            if profiles
            else profile_everywhere(chain, call, gather, cluster, workload)
        )
        result = explore(profile, cluster, workload, qoe)
        if not result.plans:
            raise InfeasiblePlanError(result.problem)
        return result.plans[0]

    return make


def profile_everywhere(
    chain: Chain,
    call: Call,
    gather: Gather,
    cluster: Cluster,
    workload: Workload,
    *,
    loss_fn: LossFn | None = None,
    targets: Any = None,
) -> ModelProfile:
    """Measures the blocks on every rank's device, all at once; the same result on all ranks.

    Args:
        chain: The partitioned model.
        call: (args, kwargs) of one batch.
        gather: Exchanges bytes between all ranks.
        cluster: Names of the ranks' devices.
        workload: Sets the micro-batch sizes, and whether backward is measured.
        loss_fn: (output, target) -> scalar; None leaves the loss out of the last block.
        targets: For `loss_fn`, of one batch.
    """
    args, kwargs = call
    mine = profile_model(
        chain,
        args,
        kwargs,
        device_name=cluster.devices[dist.get_rank()].name,
        microbatch_sizes=microbatch_sizes(workload),
        training=workload.kind == "train",
        loss_fn=loss_fn,
        targets=targets,
    )
    parts = gather(mine.to_json().encode())
    return merge_profiles([ModelProfile.from_json(part.decode()) for part in parts])


def explore(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    effort_s: float | None = None,
) -> SearchResult:
    """Searches after filling in modelled times for the devices that were not measured.

    Raises:
        SpecError: The profile has no backward times to plan training with, or the QoE has a
            bound that can not be judged.
    """
    training = workload.kind == "train"
    costs = [cost for block in profile.blocks for cost in block.costs]
    for device in measured_devices(profile) if training else ():
        if not any(t.backward_s for cost in costs for t in cost.timings if t.device == device):
            raise SpecError(
                f"profile {profile.name}: given forward times only for {device}, allowed: a "
                "profile measured for training, or a plan for inference"
            )
    complete = scale_to_cluster(profile, cluster, training=training)
    result = search(complete, cluster, workload, qoe, effort_s=effort_s)
    with_links = [plan.model_copy(update={"links": cluster.links}) for plan in result.plans]
    return result._replace(plans=with_links)


def measured_devices(profile: ModelProfile) -> tuple[str, ...]:
    """Returns the devices whose times a profile holds."""
    return tuple(timing.device for timing in profile.blocks[0].costs[0].timings)


def microbatch_sizes(workload: Workload) -> tuple[int, ...]:
    """Returns the micro-batch sizes to measure: the least, the largest and some between."""
    needed = sorted({-(-workload.batch_size // m) for m in microbatch_choices(workload)})
    if len(needed) <= MAX_SIZES:
        return tuple(needed)
    last = len(needed) - 1
    return tuple(needed[round(i * last / (MAX_SIZES - 1))] for i in range(MAX_SIZES))
