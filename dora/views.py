"""Tables and lines that the command line shows, made from the vocabulary; prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dora.compare import Comparison
from dora.doctor import Finding
from dora.judge import Entry
from dora.planner import SearchResult
from dora.spec import Cluster, Device, ModelProfile, Plan, Replica, Stage, Timeline

# How a reason begins -> the kind it is counted under.
_REASONS = {
    "memory:": "not enough memory",
    "breaks ": "breaks the QoE",
    "takes at least": "can not beat the plans kept",
    "no link": "devices without a link",
    "no split": "no split fits",
    "not among": "more devices than are searched",
}
_STATUS = {"ok": "green", "missing": "yellow", "broken": "red"}


def describe(plan: Plan) -> str:
    """Returns for example 'phone[0-3] | laptop+hub[4-11] x8'.

    With shares where uneven, power modes where not the default, codecs in place of the bar, forward
    before backward, and the codec of a stage's sums of gradients behind it:
    'phone@15w[0-3] |int8/none| laptop(60%)+hub(40%)[4-11] sum int8 x8'.
    """
    text = _describe_stage(plan, plan.stages[0])
    for s, stage in enumerate(plan.stages[1:]):
        codec = plan.codecs[s] if plan.codecs else None
        names = [codec.forward, codec.backward] if codec else []
        if plan.schedule_kind == "wavefront":
            names = names[:1]
        bar = f"|{'/'.join(dict.fromkeys(names))}|" if set(names) - {"none"} else "|"
        text += f" {bar} {_describe_stage(plan, stage)}"
    return f"{text} x{plan.num_microbatches}"


def _describe_stage(plan: Plan, stage: Stage) -> str:
    is_even = len({round(replica.share, 6) for replica in stage.replicas}) == 1

    def name(replica: Replica) -> str:
        mode = f"@{replica.power_mode}" * (replica.power_mode != "default")
        return f"{replica.device}{mode}" + ("" if is_even else f"({replica.share:.0%})")

    text = f"{'+'.join(map(name, stage.replicas))}[{stage.first_block}-{stage.last_block}]"
    codec = plan.sum_codec(stage.index)
    return text if codec == "none" else f"{text} sum {codec}"


def seconds(value: float) -> str:
    """Returns a duration with a unit that suits it."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def num_bytes(value: float) -> str:
    """Returns a size with a unit that suits it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def plan_table(plans: Sequence[Plan], single: Plan | None, what: str) -> Table:
    """Returns the previews: one row per plan.

    Args:
        plans: With costs, best first.
        single: The best plan on one device, to compare with.
        what: Column title of the time: 'step' or 'latency'.
    """
    table = _table("", "plan", what, "vs best single", "energy", "peak memory", "schedule")
    for i, plan in enumerate(plans):
        cost = plan.cost
        if cost is None:
            continue
        faster = "-"
        if single is not None and single.cost is not None and cost.makespan_s:
            faster = f"{single.cost.makespan_s / cost.makespan_s:.2f}x"
        memory = "\n".join(f"{m.device} {num_bytes(m.peak_bytes)}" for m in cost.memory)
        table.add_row(
            str(i + 1),
            describe(plan),
            seconds(cost.makespan_s),
            faster,
            f"{cost.energy_j:.3g} J" if cost.energy_j else "unknown",
            memory,
            plan.schedule_kind,
        )
    table.caption = (
        "device@power mode(share)[first block-last block], + replica, | next stage, |codec|, "
        "sum codec of its gradients, x micro-batches"
    )
    return table


def plan_lines(plan: Plan) -> list[str]:
    """Returns what a row of `plan_table` has no room for."""
    cost, lines = plan.cost, []
    if cost is not None and cost.ttft_s and cost.tpot_s:
        lines.append(f"First token {seconds(cost.ttft_s)}, then {seconds(cost.tpot_s)} each.")
    if cost is not None and cost.interval_s:
        lines.append(f"Sustains one every {seconds(cost.interval_s)}.")
    used = {replica.device for stage in plan.stages for replica in stage.replicas}
    unused = [name for name in plan.devices if name not in used]
    if unused:
        lines.append(f"Leaves out {', '.join(unused)}.")
    if plan.transfers:
        lines.append(f"Orders {len(plan.transfers)} transfers on the network.")
    if plan.max_accuracy_loss is not None:
        limit = f"{plan.max_accuracy_loss:.3g}"
        lines.append(f"Codecs stay on while they lose at most {limit} of accuracy, as measured.")
    return lines


def single_line(single: Plan | None) -> str:
    """Returns what the best single device would take."""
    if single is None or single.cost is None:
        return "Best single device: none has the memory for the model."
    name = single.stages[0].replicas[0].device
    return f"Best single device: {name} would take {seconds(single.cost.makespan_s)}."


def gap_line(result: SearchResult) -> str:
    """Returns how much better than the first plan another one could be."""
    if result.is_optimal:
        return "Optimal: no other chain of devices, at the windows and shares tried, is better."
    return (
        f"Within {result.gap:.0%} of the bound: the search stopped at its limit, a better plan may "
        "exist."
    )


def rejected_table(rejected: Sequence[tuple[str, str]], examples: int = 2) -> Table:
    """Returns the rejected candidates: count and examples per kind of reason."""
    kinds = [_kind(reason) for _, reason in rejected]
    table = _table("rejected", "why", "for example")
    for kind, count in Counter(kinds).most_common():
        shown = [
            f"{text}: {reason}"
            for (text, reason), own in zip(rejected, kinds, strict=True)
            if own == kind
        ]
        table.add_row(str(count), kind, "\n".join(shown[:examples]))
    return table


def _kind(reason: str) -> str:
    for start, kind in _REASONS.items():
        if reason.startswith(start):
            return kind
    if reason.startswith("their bounds"):
        return "not walked"
    return "worse than a plan kept"


def result_json(result: SearchResult, times: Mapping[str, str]) -> dict[str, Any]:
    """Returns a search result as plain data."""

    def data(plan: Plan) -> dict[str, Any]:
        return plan.model_dump(mode="json", exclude_none=True)

    return {
        "plans": [data(plan) for plan in result.plans],
        "best_single": data(result.best_single) if result.best_single else None,
        "problem": result.problem,
        "is_optimal": result.is_optimal,
        "gap": result.gap,
        "rejected": [{"candidate": text, "reason": reason} for text, reason in result.rejected],
        "times": dict(times),
    }


def device_table(devices: Sequence[Device]) -> Table:
    """Returns catalogue devices, one per row."""
    table = _table("device", "kind", "fp32", "memory", "bandwidth", "idle", "busy", "battery")
    for d in devices:
        table.add_row(
            d.name,
            d.kind,
            f"{d.flops_per_s / 1e12:.3g} TFLOP/s",
            f"{d.memory_bytes / 1e9:.3g} GB",
            f"{d.mem_bandwidth_bytes_per_s / 1e9:.3g} GB/s",
            f"{d.idle_w:g} W",
            f"{d.busy_w:g} W",
            f"{d.battery_j / 3600:.3g} Wh" if d.battery_j else "mains",
        )
    return table


def finding_table(findings: Sequence[Finding]) -> Table:
    """Returns what `dora doctor` found, with how to fix it."""
    table = _table("", "what", "found", "how to fix it")
    for f in findings:
        table.add_row(Text(f.status, style=_STATUS[f.status]), f.subject, f.text, f.fix)
    return table


def profile_table(profile: ModelProfile) -> Table:
    """Returns the blocks of a profile at its largest micro-batch size."""
    size = profile.blocks[0].costs[-1].microbatch_size
    devices = [timing.device for timing in profile.blocks[0].costs[-1].timings]
    table = _table(
        "block", "parameters", "FLOPs", "kept", "sent on",
        *(f"{device} forward / backward" for device in devices),
    )  # fmt: skip
    for i, block in enumerate(profile.blocks):
        cost = block.costs[-1]
        table.add_row(
            f"{i} {block.name}",
            num_bytes(block.param_bytes),
            f"{cost.flops / 1e6:.4g} M",
            num_bytes(cost.activation_bytes),
            num_bytes(cost.output_bytes),
            *(f"{seconds(t.forward_s)} / {seconds(t.backward_s)}" for t in cost.timings),
        )
    table.caption = f"one micro-batch of {size}"
    return table


def demo_table(result: Mapping[str, Any]) -> Table:
    """Returns the demo's results: Dora's plan beside others, predicted beside measured."""
    contenders: Mapping[str, Any] = result["contenders"]
    table = _table("", *contenders)
    last = min(len(c["losses"]) for c in contenders.values())

    def row(name: str, text: Callable[[Mapping[str, Any]], str]) -> None:
        table.add_row(name, *(text(contender) for contender in contenders.values()))

    def error(contender: Mapping[str, Any]) -> str:
        ratio = contender["predicted_s"] / contender["step_s"] - 1
        return f"{seconds(contender['predicted_s'])} ({ratio:+.0%})"

    row("devices", lambda c: ", ".join(c["devices"]))
    row(f"loss of step 1, {last}", lambda c: f"{c['losses'][0]:.3f}, {c['losses'][last - 1]:.3f}")
    row("step, measured", lambda c: seconds(c["step_s"]))
    row("step, predicted", error)
    row("energy a step, from measured activity", lambda c: f"{c['energy_j']:.3g} J")
    row("energy a step, predicted", lambda c: f"{c['predicted_j']:.3g} J")
    return table


def step_figures(timeline: Timeline) -> dict[str, float]:
    """Returns the time of a step and where it goes; means are over the devices that compute."""
    ranks = {span.rank for span in timeline.spans if span.lane == "compute"}
    busy_s = sum(timeline.busy_s(rank, "compute") for rank in ranks)
    return {
        "makespan_s": timeline.makespan_s,
        "bubble_ratio": 1 - busy_s / (len(ranks) * timeline.makespan_s),
        "exposed_comm_s": timeline.exposed_comm_s * timeline.num_ranks / len(ranks),
        "energy_j": timeline.energy_j,
    }


def step_line(timeline: Timeline) -> str:
    """Returns the figures of a step in one line."""
    figures = step_figures(timeline)
    return (
        f"{seconds(figures['makespan_s'])}, bubble ratio {figures['bubble_ratio']:.2f}, exposed "
        f"communication {seconds(figures['exposed_comm_s'])}, {figures['energy_j']:.4g} J"
    )


def device_use_table(timeline: Timeline, plan: Plan, cluster: Cluster) -> Table:
    """Returns what each device of a plan does in one step."""
    table = _table("device", "computes", "energy", "peak memory", "of")
    peaks = {memory.device: memory.peak_bytes for memory in timeline.memory}
    for rank, energy in enumerate(timeline.energy):
        if not (energy.joules or energy.device in peaks):
            continue
        table.add_row(
            energy.device,
            f"{timeline.busy_s(rank, 'compute') / timeline.makespan_s:.0%}",
            f"{energy.joules:.3g} J",
            num_bytes(peaks.get(energy.device, 0)),
            num_bytes(cluster.device(energy.device).memory_bytes),
        )
    return table


def timeline_json(timelines: Sequence[Timeline], plan: Plan) -> dict[str, Any]:
    """Returns the figures of simulated steps as plain data; all but `steps_s` of the first."""
    first = timelines[0]
    return {
        "plan": describe(plan),
        "source": first.source,
        **step_figures(first),
        "energy": [energy.model_dump() for energy in first.energy],
        "memory": [memory.model_dump() for memory in first.memory],
        "steps_s": [timeline.makespan_s for timeline in timelines],
    }


def comparison_table(title: str, found: Comparison) -> Table:
    """Returns one row per planner, Dora first."""
    table = _table("planner", "plan", "time", "energy", "QoE met", "Dora's gain")
    table.title = title
    for entry in (found.dora, *found.rivals, found.single):
        if not entry.can_run or entry.plan is None or entry.plan.cost is None:
            table.add_row(entry.planner, entry.problem, "-", "-", "-", "-")
            continue
        cost = entry.plan.cost
        table.add_row(
            entry.planner,
            describe(entry.plan),
            seconds(cost.makespan_s),
            f"{cost.energy_j:.3g} J",
            "yes" if entry.meets_qoe else "no: " + ", ".join(entry.broken),
            f"{entry.gain:.2f}x" if entry.gain is not None and entry is not found.dora else "-",
        )
    table.caption = (
        f"simulated; minimises {found.qoe.objective}; a plan without an order of its own runs "
        "under priority or fair sharing, whichever is faster"
    )
    return table


def comparison_lines(found: Comparison, reasons: Sequence[str]) -> list[str]:
    """Returns what a table of planners does not say."""
    lines = [f"Note: {found.note}."] if found.note else []
    if not found.dora.can_run:
        lines.append("Dora finds nothing that can run.")
    elif not found.dora.meets_qoe:
        lines.append("QoE unreachable: Dora's nearest plan is compared.")
    best, gain = found.best_rival, found.gain
    if best is not None and gain is not None:
        why = f"; why so little: {', '.join(reasons)}" if reasons else ""
        lines.append(f"Dora's gain over the best of them, {best.planner}: {gain:.2f}x{why}.")
    elif best is not None and found.dora.meets_qoe:
        lines.append("Only Dora's plan meets the QoE.")
    return lines


def comparison_rows(name: str, found: Comparison) -> list[dict[str, Any]]:
    """Returns one flat row per planner, for a file."""
    return [_entry_row(name, e, found) for e in (found.dora, *found.rivals, found.single)]


def _entry_row(name: str, entry: Entry, found: Comparison) -> dict[str, Any]:
    plan, cost = entry.plan, entry.plan.cost if entry.plan and entry.can_run else None
    return {
        "cell": name,
        "objective": found.qoe.objective,
        "planner": entry.planner,
        "plan": describe(plan) if plan else "",
        "problem": entry.problem,
        "time_s": cost.makespan_s if cost else None,
        "energy_j": cost.energy_j if cost else None,
        "ttft_s": cost.ttft_s if cost else None,
        "tpot_s": cost.tpot_s if cost else None,
        "meets_qoe": entry.meets_qoe,
        "broken": "; ".join(entry.broken),
        "gain_of_dora": entry.gain,
        "discipline": entry.discipline,
        "planning_s": entry.planning_s,
        "source": "simulated",
    }


def comparison_json(name: str, found: Comparison, reasons: Sequence[str]) -> dict[str, Any]:
    """Returns a comparison as plain data."""
    return {
        "cell": name,
        "gain": found.gain,
        "reasons": list(reasons),
        **found.model_dump(mode="json", exclude_none=True),
    }


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
