"""The engine's frame log as spans of a timeline: what was on the wire, and who overtook whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Frame(NamedTuple):
    """One frame that passed, see `dora._C.Engine.log`; times are `time.perf_counter()`'s."""

    start_s: float
    end_s: float
    is_sent: bool
    peer: int
    kind: str
    traffic_class: int
    group: int
    tag: int
    seq: int
    offset: int
    length: int


def network_spans(
    frames: Iterable[Frame], since_s: float, name: Callable[[int], str]
) -> list[tuple[str, str, float, float]]:
    """Returns a span per uninterrupted run of chunks of one message.

    A message that was preempted shows as several spans with the other message between them.

    Args:
        frames: In the order in which they ended.
        since_s: Frames that ended earlier are left out.
        name: Of a message, by its tag.
    """
    spans: list[tuple[str, str, float, float]] = []
    latest: dict[tuple[bool, int], tuple[tuple[int, int, int], int]] = {}
    for frame in frames:
        if frame.kind != "data" or frame.end_s < since_s:
            continue
        way, message = (frame.is_sent, frame.peer), (frame.group, frame.tag, frame.seq)
        before = latest.get(way)
        if before is not None and before[0] == message:
            lane, label, start_s, _ = spans[before[1]]
            spans[before[1]] = (lane, label, start_s, frame.end_s)
            continue
        latest[way] = message, len(spans)
        label = f"{name(frame.tag)} {'to' if frame.is_sent else 'from'} {frame.peer}"
        spans.append(("network", label, frame.start_s, frame.end_s))
    return spans
