"""Shows a Timeline: as a trace for https://ui.perfetto.dev (or chrome://tracing), and as text.

rank 0 |000111222aaa333bbbccc...ddd|    0-9 forward of that micro-batch, a-j its backward
rank 1 |...000111aaa222bbb333cccddd|    = other compute, ~ network only, . waits, ' ' idle
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dora.spec import Action, Span, Timeline

_LANES = ("compute", "network", "wait")
_CATEGORIES = {"F": "forward", "B": "backward", "REDUCE_GRAD": "reduce", "OPT": "optimizer"}


def to_trace(timeline: Timeline, names: Sequence[str] = ()) -> str:
    """Returns Chrome trace JSON: a process per rank, a thread per lane, microseconds from 0.

    Spans of one thread must nest in this format. Transfers of one rank may overlap instead, so a
    lane gets as many threads ('network', 'network 2', ...) as it has spans at a time.

    Args:
        timeline: Predicted or measured.
        names: Of the ranks, such as `plan.devices`.
    """
    return _written(timeline.source, _events(timeline, names, 0, ""))


def to_traces(timelines: Sequence[Timeline], names: Sequence[str] = ()) -> str:
    """Returns one trace of several timelines of a step, each with processes of its own.

    Each begins at 0; within a timeline all ranks keep their one clock.

    Args:
        timelines: Such as predicted and measured; their `source` names the processes.
        names: Of the ranks, such as `plan.devices`.
    """
    events: list[dict[str, Any]] = []
    first = 1  # Linux has no process 0 of users, and viewers treat it as the idle one.
    for timeline in timelines:
        events += _events(timeline, names, first, f"{timeline.source} ")
        first += timeline.num_ranks
    return _written(" and ".join(t.source for t in timelines), events)


def _written(source: str, events: list[dict[str, Any]]) -> str:
    other = {"source": source}
    return json.dumps({"displayTimeUnit": "ms", "otherData": other, "traceEvents": events})


def _events(
    timeline: Timeline, names: Sequence[str], first: int, prefix: str
) -> list[dict[str, Any]]:
    """Returns the events of a timeline whose rank 0 is the process `first`."""
    start_s = min((span.start_s for span in timeline.spans), default=0.0)
    events: list[dict[str, Any]] = []
    for rank in range(timeline.num_ranks):
        pid = first + rank
        events.append(_named("process", pid, 0, prefix + _rank_name(rank, names)))
        thread = 0
        for lane in _LANES:
            spans = [s for s in timeline.spans if (s.rank, s.lane) == (rank, lane)]
            for i, row in enumerate(_rows(spans)):
                events.append(_named("thread", pid, thread, f"{lane} {i + 1}" if i else lane))
                events += [_event(span, pid, thread, start_s) for span in row]
                thread += 1
    return events


def format_timeline(timeline: Timeline, names: Sequence[str] = (), *, width: int = 72) -> str:
    """Returns one line of `width` characters per rank, see above, and a line with the duration.

    A character stands for what takes up most of its share of the time.
    """
    start_s = min((span.start_s for span in timeline.spans), default=0.0)
    column_s = timeline.makespan_s / width
    label = max(len(_rank_name(rank, names)) for rank in range(timeline.num_ranks))
    lines = []
    for rank in range(timeline.num_ranks):
        spans = [span for span in timeline.spans if span.rank == rank]
        edges = [start_s + i * column_s for i in range(width + 1)]
        row = "".join(_main_symbol(spans, a, b) for a, b in zip(edges, edges[1:], strict=False))
        lines.append(f"{_rank_name(rank, names):<{label}} |{row}|")
    lines.append(
        f"{'':<{label}}  {timeline.makespan_s * 1e3:.1f} ms {timeline.source}; 0-9 forward of that "
        "micro-batch, a-j backward, = other, ~ network, . waits"
    )
    return "\n".join(lines)


def _rank_name(rank: int, names: Sequence[str]) -> str:
    return f"rank {rank} {names[rank]}" if rank < len(names) else f"rank {rank}"


def _named(what: str, pid: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": thread, "args": {"name": name}}


def _event(span: Span, pid: int, thread: int, start_s: float) -> dict[str, Any]:
    action = _action(span.label)
    return {
        "ph": "X",
        "name": span.label,
        "cat": _CATEGORIES.get(action.kind, span.lane) if action else span.lane,
        "pid": pid,
        "tid": thread,
        "ts": round((span.start_s - start_s) * 1e6, 3),
        "dur": round((span.end_s - span.start_s) * 1e6, 3),
        "args": {"stage": action.stage, "microbatch": action.microbatch} if action else {},
    }


def _rows(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Yields rows in which no two spans overlap, as few as possible."""
    left = sorted(spans, key=lambda span: (span.start_s, span.end_s))
    while left:
        row: list[Span] = []
        rest: list[Span] = []
        for span in left:
            fits = not row or span.start_s >= row[-1].end_s
            (row if fits else rest).append(span)
        yield row
        left = rest


def _action(label: str) -> Action | None:
    try:
        return Action.from_str(label)
    except ValueError:
        return None


def _main_symbol(spans: Sequence[Span], start_s: float, end_s: float) -> str:
    """Returns the symbol with most time in the interval; compute goes before all else."""
    shares: dict[tuple[int, str], float] = {}
    for span in spans:
        shared_s = min(span.end_s, end_s) - max(span.start_s, start_s)
        if shared_s > 0:
            key = _LANES.index(span.lane), _symbol(span)
            shares[key] = shares.get(key, 0.0) + shared_s
    if sum(shares.values()) * 2 < end_s - start_s or not shares:
        return " "
    computing = {key: share for key, share in shares.items() if key[0] == 0}
    if sum(computing.values()) * 2 >= end_s - start_s:
        shares = computing
    return max(shares, key=lambda key: shares[key])[1]


def _symbol(span: Span) -> str:
    if span.lane != "compute":
        return "~" if span.lane == "network" else "."
    action = _action(span.label)
    if action is None or action.kind not in ("F", "B"):
        return "="
    return ("0123456789" if action.kind == "F" else "abcdefghij")[action.microbatch % 10]
