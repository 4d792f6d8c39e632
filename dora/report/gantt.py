"""Draws timelines above each other on one axis: per rank what it computes, sends and waits for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dora.report.flows import kind_of, microbatch_of
from dora.report.markup import Markup, drawing, joined, line, tag, text
from dora.report.quantities import seconds, tick_labels, ticks
from dora.spec import Plan, Span, Timeline

_WIDTH, _LEFT, _RIGHT = 1060.0, 170.0, 24.0
_HEAD, _ROW, _AXIS = 30.0, 42.0, 26.0
# Top and height of each lane in its row.
_LANES = {"compute": (0.0, 18.0), "network": (20.0, 10.0), "wait": (32.0, 4.0)}
_LEGEND = (
    ("F", "compute", "forward"),
    ("B", "compute", "backward"),
    ("other", "compute", "other work"),
    ("SEND_F", "network", "activations sent"),
    ("SEND_B", "network", "gradients sent"),
    ("REDUCE_GRAD", "network", "gradients reduced"),
    ("input", "network", "inputs sent"),
    ("other", "network", "other messages"),
    ("wait", "wait", "waiting for a message"),
)


class Panel(NamedTuple):
    """One timeline and the title above it."""

    title: str
    timeline: Timeline


def gantt_drawing(panels: Sequence[Panel], plan: Plan) -> Markup:
    """Returns a legend and the panels, one below the other, all with the same ranks and axis."""
    ranks = sorted({span.rank for panel in panels for span in panel.timeline.spans})
    end_s = max(panel.timeline.makespan_s for panel in panels)
    height = _HEAD + _ROW * len(ranks) + _AXIS
    drawn = [
        tag("g", _panel(panel, plan, ranks, end_s), transform=f"translate(0 {i * height:g})")
        for i, panel in enumerate(panels)
    ]
    label = f"When each device computes, sends and waits: {', '.join(p.title for p in panels)}"
    return joined(_legend(panels), drawing(_WIDTH, height * len(panels), label, *drawn))


def _legend(panels: Sequence[Panel]) -> Markup:
    seen = {(_class(span), span.lane) for panel in panels for span in panel.timeline.spans}
    items = (
        tag("li", tag("span", class_=f"swatch {lane} {kind}"), name)
        for kind, lane, name in _LEGEND
        if (kind, lane) in seen
    )
    return tag("ul", items, class_="legend")


def _class(span: Span) -> str:
    if span.lane == "wait":
        return "wait"
    kind = kind_of(span)
    if span.lane == "compute":
        return kind if kind in ("F", "B") else "other"
    return kind if kind in ("SEND_F", "SEND_B", "REDUCE_GRAD", "input") else "other"


def _panel(panel: Panel, plan: Plan, ranks: Sequence[int], end_s: float) -> Iterator[Markup]:
    timeline, bottom = panel.timeline, _HEAD + _ROW * len(ranks)
    scale = (_WIDTH - _LEFT - _RIGHT) / end_s if end_s else 0.0
    start_s = min((span.start_s for span in timeline.spans), default=0.0)
    yield text(0, 15, panel.title, "strong")
    marks = ticks(end_s, 8)
    for mark, label in zip(marks, tick_labels(marks, "s"), strict=True):
        x = _LEFT + mark * scale
        yield line(x, _HEAD - 4, x, bottom, "grid")
        yield text(x, bottom + 14, label, "middle")
    for row, rank in enumerate(ranks):
        top = _HEAD + row * _ROW
        yield from _label(plan, rank, top)
        for lane in _LANES:
            spans = [s for s in timeline.spans if (s.rank, s.lane) == (rank, lane)]
            yield from _lane(spans, _name(plan, rank), top, scale, start_s)
    end_x = _LEFT + timeline.makespan_s * scale
    yield line(end_x, _HEAD - 8, end_x, bottom, "end")


def _label(plan: Plan, rank: int, top: float) -> Iterator[Markup]:
    name, place = _name(plan, rank), plan.placement(rank) if rank < len(plan.devices) else None
    shown = name if len(name) <= 22 else f"{name[:14]}…{name[-7:]}"
    if place is not None:
        yield tag("rect", x=0, y=top, width=4, height=36, class_=f"s{place[0] % 6}")
    yield tag("text", tag("title", name), shown, x=10, y=top + 13)
    where = f"rank {rank}" + (f", stage {place[0]}" if place else "")
    yield text(10, top + 29, where, "muted")


def _name(plan: Plan, rank: int) -> str:
    return plan.devices[rank] if rank < len(plan.devices) else f"rank {rank}"


def _lane(
    spans: Sequence[Span], name: str, top: float, scale: float, start_s: float
) -> Iterator[Markup]:
    """Yields the spans of one lane; those that overlap share its height."""
    rows = _rows(spans)
    for row, members in enumerate(rows):
        for span in members:
            offset, full = _LANES[span.lane]
            height = full / len(rows)
            x, width = _LEFT + (span.start_s - start_s) * scale, (span.end_s - span.start_s) * scale
            y = top + offset + row * height
            title = f"{span.label} on {name}, {seconds(span.end_s - span.start_s)} from "
            title += f"{seconds(span.start_s - start_s)} ({span.lane})"
            yield tag(
                "rect",
                tag("title", title),
                x=x, y=y, width=max(width, 0.4), height=height, class_=_class(span),
            )  # fmt: skip
            number = microbatch_of(span)
            if span.lane == "compute" and number and width > 7 * len(number) + 3:
                yield text(x + width / 2, y + height / 2 + 4, number, "inside")


def _rows(spans: Sequence[Span]) -> list[list[Span]]:
    """Returns rows in which no two spans overlap, as few as possible."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.start_s, s.end_s)):
        free = next((row for row in rows if row[-1].end_s <= span.start_s), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows
