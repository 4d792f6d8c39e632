"""Profile, then plan: joins profiler, catalogue and planner for `DoraParallel` and the CLI.

every rank:  its own blocks, timed --gather--> one ModelProfile --+--> search --> best Plan
devices without measured times:    catalogue roofline ------------+
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dora.adapt import Adapting, adapting
from dora.catalog import scale_to_cluster
from dora.errors import DoraError, InfeasiblePlanError, SpecError
from dora.files import save
from dora.judge import case_of, play
from dora.partition import Chain
from dora.planner import SearchResult, search
from dora.planner.search import microbatch_choices
from dora.profiler import (
    EnergyMeter,
    find_meters,
    load_profiles,
    merge_profiles,
    profile_model,
)
from dora.profiler.meters import Meter, machine_of_meters
from dora.runtime.overhead import measure_overhead
from dora.runtime.parallel import DoraParallel
from dora.runtime.turn import Call
from dora.spec import Cluster, Energy, ModelProfile, Plan, QoE, Run, Timeline, Workload

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
Gather = Callable[[bytes], list[bytes]]
LossFn = Callable[[Any, Any], Any]

# The planner interpolates between measured sizes, so a few are enough.
MAX_SIZES = 4


class Planned:
    """Makes the plan where the model runs; `DoraParallel` calls it. See `planned`.

    Attributes:
        profile, plans: What was measured, and the plans kept, the chosen one first; after the call.
    """

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        qoe: QoE,
        profiles: Sequence[str | os.PathLike[str]],
        meters: Sequence[Meter] | None = None,
    ) -> None:
        self._cluster, self._workload, self._qoe = cluster, workload, qoe
        self._files, self._meters = profiles, meters
        self._energy: EnergyMeter | None = None
        self.profile: ModelProfile | None = None
        self.plans: list[Plan] = []

    @property
    def qoe(self) -> QoE:
        """The bounds that the plan has to keep."""
        return self._qoe

    def __call__(self, chain: Chain, call: Inputs, gather: Gather) -> Plan:
        """Returns the best plan.

        Raises:
            InfeasiblePlanError: No plan meets the QoE, or there are not as many ranks as devices.
        """
        if dist.get_world_size() != len(self._cluster.devices):
            raise InfeasiblePlanError(
                f"cluster: given {len(self._cluster.devices)} devices for {dist.get_world_size()} "
                "ranks, allowed: one rank per device"
            )
        self.profile = (
            load_profiles(self._files)
            if self._files
            else profile_everywhere(chain, call, gather, self._cluster, self._workload)
        )
        searcher = fastest(self.profile, self._cluster)
        answer = self._search() if dist.get_rank() == searcher else ""
        found = json.loads(gather(answer.encode())[searcher])
        if not found["plans"]:
            raise InfeasiblePlanError(found["problem"])
        self.plans = [Plan.from_json(plan) for plan in found["plans"]]
        self._begin_metering(gather(machine_of_meters()))
        return self.plans[0]

    def _begin_metering(self, machines: Sequence[bytes]) -> None:
        """Counts the joules of this device for `record`, as long as somebody may call that."""
        rank = dist.get_rank()
        meters = self._meters
        if meters is None:  # what several ranks share tells nothing about one of them
            is_alone = machines.count(machines[rank]) == 1
            meters = find_meters().meters if is_alone else ()
        if meters:
            name = self._cluster.devices[rank].name
            self._energy = EnergyMeter(name, meters, clock=time.perf_counter)
            self._energy.begin()
            weakref.finalize(self, self._energy.end)

    def adapter(self, *, is_lasting: bool) -> Adapting | None:
        """Returns what keeps the QoE while the model runs; None where nothing can.

        Args:
            is_lasting: Devices may come later: then the profile has to come from files, which they
                have too.
        """
        if self._workload.kind == "generate" or (is_lasting and not self._files):
            return None
        profile = self._known_profile()
        return adapting(profile, self._cluster, self._workload, self._qoe, bank=self.plans or None)

    def _known_profile(self) -> ModelProfile:
        """Returns the profile, on devices that have joined later, too."""
        profile = load_profiles(self._files) if self._files else self.profile
        assert profile is not None, "DoraParallel makes the plan before anything is recorded"
        return profile

    def _joules(self, model: DoraParallel, calls: Sequence[Call]) -> tuple[Energy, ...]:
        """Returns what each device with meters took per call; a collective call."""
        found = None
        if self._energy is not None:
            found = self._energy.between(calls[0].start_s, calls[-1].end_s)
        is_known = found is not None and found.provenance == "measured"
        row = [found.joules / len(calls)] if found is not None and is_known else [math.nan]
        rows, _ = model.confer(row, lambda rows: b"", lambda rows: False)
        names = [model.plan.devices[rank] for rank in model.members]
        return tuple(
            Energy(device=name, joules=joules, provenance="measured")
            for name, (joules,) in zip(names, rows, strict=True)
            if not math.isnan(joules)
        )

    def _search(self) -> str:
        """Returns the plans, or why there are none, as JSON; errors reach all ranks that way."""
        assert self.profile is not None
        try:
            result = explore(self.profile, self._cluster, self._workload, self._qoe)
        except (DoraError, ValueError) as error:
            return json.dumps({"plans": [], "problem": str(error)})
        plans = [plan.to_json() for plan in result.plans]
        return json.dumps({"plans": plans, "problem": result.problem})

    def record(
        self, model: DoraParallel, folder: str | os.PathLike[str], *, name: str = "run"
    ) -> None:
        """Writes what `dora report` shows, on the lowest rank; a collective call.

        Args:
            model: Made with this plan, after some steps or requests; the last one is drawn, and
                the first one does not count in times and energy, since it finds the shapes.
            folder: Gets run.json.
            name: Of the report.
        """
        calls = [c for c in model.calls if c.kind == model.calls[-1].kind]
        calls = calls[1:] or calls
        measured = model.timeline().model_copy(update={"energy": self._joules(model, calls)})
        if model.rank != model.members[0]:
            return
        run = recorded(
            model.plan,
            measured,
            profile=self._known_profile(),
            cluster=self._cluster,
            workload=self._workload,
            qoe=self._qoe,
        )
        more = {
            "front": tuple(self.plans),
            "times_s": tuple(call.end_s - call.start_s for call in calls),
            "window_s": (calls[0].start_s, calls[-1].end_s),
            "name": name,
        }
        save(run.model_copy(update=more), Path(folder) / "run.json")


def planned(
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    profiles: Sequence[str | os.PathLike[str]] = (),
    meters: Sequence[Meter] | None = None,
) -> Planned:
    """Returns a function that makes the plan where the model runs, for `DoraParallel`.

    Every rank measures the blocks on its own device, all at once; the fastest device then searches
    and tells the others. Rank i is `cluster.devices[i]`.
    ::

        plan = planned(cluster, Workload(batch_size=32))
        model = DoraParallel(model, plan, sample=inputs)

    Args:
        cluster: Devices in rank order, and the links between them.
        workload: What is run; sets the micro-batch sizes that are measured.
        qoe: Hard bounds and the objective; None minimises time.
        profiles: Files of `dora profile` to take instead of measuring; times of devices that
            they lack are modelled.
        meters: Of this device's energy, for `record`; None takes what `dora.profiler.find_meters`
            finds, unless another rank is on the same machine.
    """
    return Planned(cluster, workload, qoe or QoE(), profiles, meters)


def recorded(
    plan: Plan,
    measured: Timeline,
    *,
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    qoe: QoE,
) -> Run:
    """Returns a run with what the simulator says of its plan beside what was measured."""
    complete = scale_to_cluster(profile, cluster, training=workload.kind == "train")
    predicted = play(plan, case_of(complete, cluster, workload, qoe))
    return Run(
        cluster=cluster,
        workload=workload,
        qoe=qoe,
        plan=plan,
        predicted=predicted,
        measured=measured,
    )


def profile_everywhere(
    chain: Chain,
    call: Inputs,
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
        overhead=measure_overhead,
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


def fastest(profile: ModelProfile, cluster: Cluster) -> int:
    """Returns the position of the device that runs the model in the least time, as measured."""
    times_s = {
        device: sum(
            timing.forward_s + timing.backward_s
            for block in profile.blocks
            for timing in block.costs[-1].timings
            if timing.device == device
        )
        for device in measured_devices(profile)
    }
    known = [d.name for d in cluster.devices if d.name in times_s]
    name = min(known, key=lambda device: times_s[device], default=cluster.devices[0].name)
    return [device.name for device in cluster.devices].index(name)


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
