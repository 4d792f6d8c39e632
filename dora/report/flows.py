"""Tells what a span of a timeline is, and which media its message crosses."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dora.spec import Action, Cluster, Plan, Span, Timeline

# What the engine's log calls messages: 'F3 to 1', 'B0 from 2', 'reduce to 1', 'loss from 2'.
_LOGGED = re.compile(r"^(F|B|reduce|result|header|loss)(\d*) (to|from) (\d+)$")
_LOGGED_KINDS = {"F": "SEND_F", "B": "SEND_B", "reduce": "REDUCE_GRAD"}


def kind_of(span: Span) -> str:
    """Returns F, B, SEND_F, SEND_B, REDUCE_GRAD, OPT or 'input', or 'other' for all else."""
    if span.label.startswith("input "):
        return "input"
    logged = _LOGGED.match(span.label)
    if logged:
        return _LOGGED_KINDS.get(logged[1], "other")
    try:
        return Action.from_str(span.label).kind
    except ValueError:
        return "other"


def microbatch_of(span: Span) -> str:
    """Returns the number of the micro-batch that a rank computes, '' where there is none."""
    match = re.match(r"^\d+[FB](\d+)$", span.label)
    return match[1] if match else ""


def is_received(span: Span) -> bool:
    """Tells whether a network span is the receiving end; a simulation only has sending ends."""
    logged = _LOGGED.match(span.label)
    return logged is not None and logged[3] == "from"


def medium_rows(
    timeline: Timeline, plan: Plan, cluster: Cluster
) -> Iterator[tuple[str, str, Span]]:
    """Yields (medium, kind, span) of everything sent, once for each medium that it crosses."""
    media = {(link.src, link.dst): link.media for link in cluster.links}
    found = [
        (name, kind, span)
        for span in timeline.spans
        if span.lane == "network"
        for kind, pair in _flows(span, plan)
        for name in dict.fromkeys(media.get(pair, ()))
    ]
    order = [medium.name for medium in cluster.media]
    yield from sorted(found, key=lambda row: order.index(row[0]))


def _flows(span: Span, plan: Plan) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields the kind of a network span, and the devices that it is sent between."""
    sender = plan.devices[span.rank]
    logged = _LOGGED.match(span.label)
    if logged:
        if logged[3] == "to":
            yield kind_of(span), (sender, plan.devices[int(logged[4])])
        return
    if span.label.startswith("input "):
        m = int(span.label.removeprefix("input "))
        yield "input", (sender, _device(plan, 0, m))
        return
    try:
        stage, kind, m = Action.from_str(span.label)
    except ValueError:
        return
    if kind == "REDUCE_GRAD":
        ring = [replica.device for replica in plan.stages[stage].replicas]
        yield kind, (sender, ring[(ring.index(sender) + 1) % len(ring)])
    else:
        to = stage + 1 if kind == "SEND_F" else stage - 1
        yield kind, (sender, _device(plan, to, m))


def _device(plan: Plan, stage: int, microbatch: int) -> str:
    return plan.stages[stage].replicas[plan.routes[microbatch][stage]].device
