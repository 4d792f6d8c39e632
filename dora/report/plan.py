"""Shows a plan: its stages as a pipeline, and how its micro-batches go through them."""

from __future__ import annotations

from collections.abc import Iterator

from dora.report.markup import Markup, joined, tag
from dora.report.quantities import percent
from dora.spec import Plan, Replica, Run, Stage

_KINDS = {
    "gpipe": "gpipe: all forwards, then all backwards",
    "1f1b": "1f1b: one forward, one backward in turn",
    "wavefront": "wavefront: forwards only, each micro-batch as soon as it is there",
}


def badge(stage: int) -> Markup:
    """Returns the mark of a stage, in its colour."""
    return tag("span", f"stage {stage}", class_=f"badge s{stage % 6}")


def placement_text(plan: Plan) -> str:
    """Returns which blocks are where: 'phone [0-3] | laptop + hub [4-11]'."""
    return " | ".join(
        f"{' + '.join(r.device for r in s.replicas)} [{s.first_block}-{s.last_block}]"
        for s in plan.stages
    )


def plan_text(plan: Plan) -> str:
    """Returns the same with the number of micro-batches."""
    return f"{placement_text(plan)}, {_counted(plan.num_microbatches, 'micro-batch', 'es')}"


def plan_drawing(run: Run) -> Markup:
    """Returns the stages in a row, with what is sent between them, and the facts below."""
    plan = run.plan
    parts: list[Markup] = []
    for stage in plan.stages:
        if stage.index:
            parts.append(_arrow(plan, stage.index - 1))
        parts.append(_stage(plan, stage))
    facts = ((tag("dt", name), tag("dd", value)) for name, value in _facts(run))
    return joined(
        tag("div", parts, class_="pipeline"),
        tag("dl", (part for pair in facts for part in pair), class_="facts"),
    )


def _stage(plan: Plan, stage: Stage) -> Markup:
    count = stage.last_block - stage.first_block + 1
    blocks = f"{count} of {plan.num_blocks} blocks: {stage.first_block}-{stage.last_block}"
    if count == 1:
        blocks = f"1 of {plan.num_blocks} blocks: {stage.first_block}"
    codec = plan.sum_codec(stage.index)
    return tag(
        "div",
        tag("p", badge(stage.index)),
        tag("p", blocks),
        tag("ul", (tag("li", _replica(plan, stage, i)) for i in range(len(stage.replicas)))),
        "" if codec == "none" else tag("p", f"gradients summed as {codec}"),
        # Wide enough for its text, and wider with more blocks.
        class_=f"box stage s{stage.index % 6}",
        style=f"flex-grow:{count}",
    )


def _replica(plan: Plan, stage: Stage, index: int) -> Iterator[str]:
    replica: Replica = stage.replicas[index]
    yield tag("b", replica.device)
    if len(stage.replicas) > 1:
        count = sum(route[stage.index] == index for route in plan.routes)
        yield f" {percent(replica.share)}, {_counted(count, 'micro-batch', 'es')}"
    if replica.power_mode != "default":
        yield f", power mode {replica.power_mode}"


def _arrow(plan: Plan, boundary: int) -> Markup:
    codec = plan.codecs[boundary] if plan.codecs else None
    names = [codec.forward, codec.backward] if codec else ["none", "none"]
    if plan.schedule_kind == "wavefront":
        names = names[:1]
    if set(names) == {"none"}:
        return tag("div", "→", class_="arrow", title="sent as it is")
    label = " / ".join(dict.fromkeys(names))
    title = "compressed: forward / backward" if len(set(names)) > 1 else "compressed both ways"
    return tag("div", "→", tag("span", label), class_="arrow", title=title)


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    plan, batch = run.plan, run.workload.batch_size
    each = batch / plan.num_microbatches
    size = f"{each:g}" if each == int(each) else f"{int(each)} or {int(each) + 1}"
    samples = _counted(batch, "sample", "s")
    whole = f"1, the whole batch of {samples}"
    several = f"{plan.num_microbatches}, each with {size} of {samples}"
    yield "micro-batches", several if plan.num_microbatches > 1 else whole
    yield "schedule", _KINDS[plan.schedule_kind]
    windows = ", ".join(map(str, plan.warmup))
    if plan.schedule_kind == "1f1b" and len(plan.stages) > 1:
        yield "warm-up", f"{windows} micro-batches in flight, from the first stage to the last"
    if plan.transfers:
        yield "network", f"{_counted(len(plan.transfers), 'transfer', 's')} in the planned order"
    if plan.max_accuracy_loss is not None:
        yield "codecs", f"stay on while they lose at most {plan.max_accuracy_loss:.3g} of accuracy"
    used = {replica.device for stage in plan.stages for replica in stage.replicas}
    if run.workload.source is not None:
        yield "inputs", f"come from {run.workload.source}"
    left = [name for name in plan.devices if name not in used | {run.workload.source}]
    yield "left out", ", ".join(left) or "no device"


def _counted(count: int, word: str, plural: str) -> str:
    return f"{count} {word}{plural if count != 1 else ''}"
