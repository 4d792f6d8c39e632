"""Tables and lines that the command line shows, made from the vocabulary; prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dora.doctor import Finding
from dora.planner import SearchResult
from dora.spec import Device, ModelProfile, Plan

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
    """Returns for example 'phone[0-3] | laptop+hub[4-11] x8', with shares where uneven."""
    stages = []
    for stage in plan.stages:
        even = len({round(replica.share, 6) for replica in stage.replicas}) == 1
        names = (r.device if even else f"{r.device}({r.share:.0%})" for r in stage.replicas)
        stages.append(f"{'+'.join(names)}[{stage.first_block}-{stage.last_block}]")
    return f"{' | '.join(stages)} x{plan.num_microbatches}"


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
    table.caption = "device[first block-last block], + replica, | next stage, x micro-batches"
    return table


def single_line(single: Plan | None) -> str:
    """Returns what the best single device would take."""
    if single is None or single.cost is None:
        return "Best single device: none has the memory for the model."
    name = single.stages[0].replicas[0].device
    return f"Best single device: {name} would take {seconds(single.cost.makespan_s)}."


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


def demo_table(devices: Mapping[str, Any], alone: Mapping[str, Any]) -> Table:
    """Returns the demo's results: one process, and Dora on four."""
    threads = f"{alone['threads']} thread" + "s" * (alone["threads"] > 1)
    table = _table("", f"best single process ({threads})", "Dora, 4 processes")

    def row(name: str, key: str, form: str) -> None:
        table.add_row(name, form.format(alone[key]), form.format(devices[key]))

    row("loss before", "loss_before", "{:.3f}")
    row("loss after", "loss_after", "{:.3f}")
    row("perplexity, held-out", "perplexity", "{:.2f}")
    row("samples/s", "samples_per_s", "{:.0f}")
    table.add_row("step, measured", seconds(alone["step_s"]), seconds(devices["step_s"]))
    error = devices["predicted_s"] / devices["step_s"] - 1
    table.add_row("step, predicted", "", f"{seconds(devices['predicted_s'])} ({error:+.0%})")
    return table


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
