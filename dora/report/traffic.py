"""How much of each medium was used over time: counted, or else what the simulator expects."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from dora.report.flows import medium_rows
from dora.spec import Run, Timeline, Traffic

# As many steps of a chart as its 300 pixels can show.
_BINS = 150


class Use(NamedTuple):
    """How much of a medium is used.

    Attributes:
        source: 'measured': carried bytes over its rate. 'predicted': share of the time in which
            a message is under way.
        points: (start, end, share), in order.
        mean: Over all the time.
    """

    medium: str
    source: Literal["measured", "predicted"]
    points: tuple[tuple[float, float, float], ...]
    mean: float
    carried_bytes: int | None = None


def uses(run: Run) -> list[Use]:
    """Returns the use of every medium that is known, in the order of the cluster.

    Either all are counted or all are predicted: the two are different quantities.
    """
    traffic = run.activity.traffic if run.activity else ()
    counted = [one for one in traffic if len(one.at_s) > 1 and one.at_s[-1] > one.at_s[0]]
    if counted:
        return [_counted(one) for one in counted]
    return _predicted(run, run.predicted) if run.predicted and run.predicted.spans else []


def _counted(traffic: Traffic) -> Use:
    start_s, end_s = traffic.at_s[0], traffic.at_s[-1]
    count = min(_BINS, len(traffic.at_s) - 1)
    edges = [start_s + (end_s - start_s) * i / count for i in range(count + 1)]
    carried = [_carried_until(traffic, edge) for edge in edges]
    width_s = (end_s - start_s) / count
    points = tuple(
        (a - start_s, b - start_s, (until - since) / width_s / traffic.rate_bytes_per_s)
        for a, b, since, until in zip(edges, edges[1:], carried, carried[1:], strict=False)
    )
    total = traffic.carried_bytes[-1] - traffic.carried_bytes[0]
    mean = total / (end_s - start_s) / traffic.rate_bytes_per_s
    return Use(traffic.medium, "measured", points, mean, total)


def _carried_until(traffic: Traffic, at_s: float) -> float:
    """Returns the bytes carried until then, by a straight line between two samples."""
    after = min(bisect_right(traffic.at_s, at_s), len(traffic.at_s) - 1)
    a, b = traffic.at_s[after - 1 : after + 1]
    low, high = traffic.carried_bytes[after - 1 : after + 1]
    return low + (high - low) * min(1.0, (at_s - a) / (b - a)) if b > a else high


def _predicted(run: Run, timeline: Timeline) -> list[Use]:
    start_s = min(span.start_s for span in timeline.spans)
    rows = list(medium_rows(timeline, run.plan, run.cluster))
    found = []
    for medium in run.cluster.media:
        spans = _merged(
            (span.start_s - start_s, span.end_s - start_s)
            for name, _, span in rows
            if name == medium.name
        )
        width_s = timeline.makespan_s / _BINS
        points = tuple(
            (i * width_s, (i + 1) * width_s, _share(spans, i * width_s, (i + 1) * width_s))
            for i in range(_BINS if width_s else 0)
        )
        mean = sum(b - a for a, b in spans) / timeline.makespan_s if width_s else 0.0
        found.append(Use(medium.name, "predicted", points, mean))
    return found


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for a, b in sorted(intervals):
        if merged and a <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(b, merged[-1][1])
        else:
            merged.append((a, b))
    return merged


def _share(spans: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    covered_s = sum(max(0.0, min(b, end_s) - max(a, start_s)) for a, b in spans)
    return covered_s / (end_s - start_s)
