"""Layouts, plans and step costs: from one to the other.

`layouts` gives the depths of one placement, `to_plan` the plan of a layout, `layout_of` the layout
of a plan, `step_costs` what the simulator needs to play a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dora.planner.added import added_s, rests_of
from dora.planner.codecs import wire_ratio
from dora.planner.predict import (
    NO_CODEC,
    Group,
    Layout,
    Prediction,
    Setting,
    evaluate,
    is_linked,
    reductions,
    setting,
)
from dora.simulator import StepCosts
from dora.spec import (
    Cluster,
    Cost,
    DeviceMemory,
    ModelProfile,
    Plan,
    Replica,
    Stage,
    Workload,
    warmup_for,
)

# Micro-batches in flight per boundary beyond what hides no latency; the last choice is all of them.
EXTRA_WARMUP = (0, 1, 3)


def layouts(
    groups: Sequence[Group], counts: Sequence[Sequence[int]], known: Setting
) -> list[Layout]:
    """Returns the layouts of one placement that differ in how many micro-batches are in flight.

    Deeper windows hide slow links and cost memory; they come in ascending order.

    Args:
        groups: The stages.
        counts: Micro-batches per stage and replica.
        known: With the number of micro-batches, which each stage's counts sum to.
    """
    m = known.num_microbatches
    fixed = tuple(groups), tuple(map(tuple, counts))
    # The least that avoids idle replicas if all are equally fast, and the least memory.
    least = tuple(accumulate(len(stage) for stage in reversed(counts)))[::-1]
    if not known.training:
        return [Layout(*fixed, least, "wavefront")]
    shares = [[count / m for count in stage] for stage in counts]
    deeper = [warmup_for(shares, extra=extra) for extra in (*EXTRA_WARMUP, m)]
    # A window beyond the step runs all forwards first.
    capped = {tuple(min(window, m) for window in warmup) for warmup in [least, *deeper]}
    return [Layout(*fixed, warmup, "1f1b") for warmup in sorted(capped)]


def predict(profile: ModelProfile, cluster: Cluster, workload: Workload, plan: Plan) -> Plan:
    """Returns `plan` with its predicted cost, for example after it was edited by hand.

    Raises:
        ValueError: A block has no timing for a device of the plan, the plan is for another
            number of blocks, or a link is missing.
    """
    if plan.num_blocks != len(profile.blocks):
        raise ValueError(f"plan: given {plan.num_blocks} blocks, allowed {len(profile.blocks)}")
    known = setting(profile, cluster, workload, plan.num_microbatches)
    layout = layout_of(plan, known)
    if not is_linked(layout.groups, known):
        raise ValueError("cluster has no link between two devices of the plan that exchange data")
    return plan.model_copy(update={"cost": cost(layout, evaluate(layout, known), known)})


def layout_of(plan: Plan, known: Setting) -> Layout:
    """Returns a plan as a layout; routes that no shares give become the shares they have."""
    index = {device.name: d for d, device in enumerate(known.devices)}
    for name in (r.device for stage in plan.stages for r in stage.replicas):
        if name not in index:
            raise ValueError(f"plan: given device {name!r}, allowed: {', '.join(index)}")
    groups = tuple(
        Group(s.first_block, s.last_block + 1, tuple(index[r.device] for r in s.replicas))
        for s in plan.stages
    )
    counts = tuple(
        tuple(sum(route[s] == r for route in plan.routes) for r in range(len(group.devices)))
        for s, group in enumerate(groups)
    )
    modes = tuple(
        (index[r.device], r.power_mode)
        for stage in plan.stages
        for r in stage.replicas
        if r.power_mode != "default"
    )
    # Without training the runtime runs forwards only, whatever the plan's kind is.
    kind = plan.schedule_kind if known.training else "wavefront"
    return Layout(groups, counts, plan.warmup, kind, modes, plan.codecs, plan.gradient_codecs)


def cost(layout: Layout, prediction: Prediction, known: Setting) -> Cost:
    """Returns the prediction as part of a `Plan`."""
    memory = tuple(
        DeviceMemory(device=known.devices[d].name, peak_bytes=int(peak))
        for d, peak in zip(layout.devices, prediction.peak_bytes, strict=True)
    )
    return Cost(
        makespan_s=prediction.makespan_s,
        energy_j=prediction.total_j,
        memory=memory,
        interval_s=prediction.interval_s,
        ttft_s=prediction.ttft_s or None,
        tpot_s=prediction.tpot_s or None,
    )


def to_plan(layout: Layout, prediction: Prediction, known: Setting, names: Sequence[str]) -> Plan:
    """Returns the layout as a plan of the devices `names`, with its cost filled."""
    modes = dict(layout.modes)
    stages = []
    for s, (group, counts) in enumerate(zip(layout.groups, layout.counts, strict=True)):
        replicas = tuple(
            Replica(
                device=known.devices[d].name,
                share=count / layout.num_microbatches,
                power_mode=modes.get(d, "default"),
            )
            for d, count in zip(group.devices, counts, strict=True)
        )
        stages.append(
            Stage(index=s, first_block=group.first, last_block=group.end - 1, replicas=replicas)
        )
    return Plan(
        devices=tuple(names),
        stages=tuple(stages),
        num_microbatches=layout.num_microbatches,
        routes=layout.routes,
        codecs=layout.codecs,
        gradient_codecs=layout.gradient_codecs,
        warmup=layout.warmup,
        schedule_kind=layout.kind,
        cost=cost(layout, prediction, known),
    )


def step_costs(
    profile: ModelProfile, cluster: Cluster, workload: Workload, plan: Plan
) -> StepCosts:
    """Returns what the actions of a plan cost, for `dora.simulator.simulate`."""
    known = setting(profile, cluster, workload, plan.num_microbatches)
    return costs_of(layout_of(plan, known), known, plan)


def costs_of(layout: Layout, known: Setting, plan: Plan) -> StepCosts:
    """Returns the same for a layout and the plan made from it."""
    ranks = {
        d: plan.devices.index(device.name)
        for d, device in enumerate(known.devices)
        if device.name in plan.devices
    }
    if known.source is not None and known.source not in ranks:
        name = known.devices[known.source].name
        raise ValueError(f"source: given {name!r}, allowed: {', '.join(plan.devices)}")
    compute_s: dict[tuple[int, str], float] = {}
    fixed, kept, factors = ([value] * len(plan.devices) for value in (0.0, 0.0, 1.0))
    for stage, group in zip(plan.stages, layout.groups, strict=True):
        span = group.first, group.end
        for r, (replica, d) in enumerate(zip(stage.replicas, group.devices, strict=True)):
            rank, mode = ranks[d], known.devices[d].power_mode(replica.power_mode)
            times = known.costs.forward_s, known.costs.backward_s
            both_s = added_s(layout, known, known.costs, stage.index, r)
            for kind, table, more_s in zip(("F", "B"), times, both_s, strict=True):
                alone_s = float(table[d, group.first, group.end]) / mode.speed_factor
                compute_s[rank, kind] = alone_s + more_s
            factors[rank] = mode.power_factor
            fixed[rank] = float(known.costs.state_bytes[span] + known.costs.buffer_bytes[span])
            kept[rank] = float(known.costs.activation_bytes[span])
    return StepCosts(
        compute_s=compute_s,
        send_bytes=_send_bytes(layout, known),
        reductions=tuple(
            (tuple(ranks[d] for d in devices), num_bytes)
            for devices, num_bytes in (
                reductions(layout, known.costs, known.dtype) if known.training else ()
            )
        ),
        fixed_bytes=tuple(fixed),
        kept_bytes=tuple(kept),
        power_factors=tuple(factors),
        source=None if known.source is None else ranks[known.source],
        input_bytes=float(known.costs.boundary_bytes[0]),
        rests=rests_of(plan.devices, known.overheads),
    )


def _send_bytes(layout: Layout, known: Setting) -> dict[tuple[int, str], float]:
    sizes: dict[tuple[int, str], float] = {}
    for s, group in enumerate(layout.groups[1:]):
        size = float(known.costs.boundary_bytes[group.first])
        codec = layout.codecs[s] if layout.codecs else NO_CODEC
        sizes[s, "SEND_F"] = size * wire_ratio(codec.forward, known.dtype)
        sizes[s + 1, "SEND_B"] = size * wire_ratio(codec.backward, known.dtype)
    return sizes
