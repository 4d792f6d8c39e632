from __future__ import annotations

import json
from collections import defaultdict

import pytest

from dora.simulator import format_timeline, to_trace
from dora.spec import Span, Timeline


def timeline(*spans: tuple[int, str, str, float, float], num_ranks: int = 2) -> Timeline:
    return Timeline(
        source="predicted",
        num_ranks=num_ranks,
        spans=tuple(
            Span(rank=rank, lane=lane, label=label, start_s=start, end_s=end)
            for rank, lane, label, start, end in spans
        ),
    )


PIPELINE = timeline(
    (0, "compute", "0F0", 5.0, 5.1),
    (0, "compute", "0F1", 5.1, 5.2),
    (0, "network", "0SEND_F0", 5.1, 5.25),
    (0, "network", "0SEND_F1", 5.2, 5.3),
    (1, "wait", "RECV_F 1F0", 5.0, 5.25),
    (1, "compute", "1F0", 5.25, 5.35),
    (1, "compute", "1B0", 5.35, 5.5),
)


def test_trace_has_a_process_per_rank_and_a_thread_per_lane():
    events = json.loads(to_trace(PIPELINE, ["phone", "hub"]))["traceEvents"]
    named = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert named == {
        ("process_name", 0, 0): "rank 0 phone",
        ("thread_name", 0, 0): "compute",
        ("thread_name", 0, 1): "network",
        ("thread_name", 0, 2): "network 2",
        ("process_name", 1, 0): "rank 1 hub",
        ("thread_name", 1, 0): "compute",
        ("thread_name", 1, 1): "wait",
    }


def test_trace_counts_microseconds_from_the_first_start():
    events = json.loads(to_trace(PIPELINE))["traceEvents"]
    backward = next(e for e in events if e["name"] == "1B0")
    assert (backward["ts"], backward["dur"]) == pytest.approx((350_000, 150_000))
    assert (backward["cat"], backward["args"]) == ("backward", {"stage": 1, "microbatch": 0})
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0


def test_trace_keeps_every_span_and_no_thread_overlaps():
    events = json.loads(to_trace(PIPELINE))["traceEvents"]
    threads = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            threads[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    assert sum(map(len, threads.values())) == len(PIPELINE.spans)
    for spans in threads.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-2 for a, b in zip(spans, spans[1:], strict=False))


def test_trace_of_nothing_is_valid():
    assert json.loads(to_trace(timeline()))["otherData"] == {"source": "predicted"}


def test_grid_draws_a_pipeline():
    drawn = format_timeline(
        timeline(
            (0, "compute", "0F0", 0, 1),
            (0, "compute", "0F1", 1, 2),
            (0, "wait", "RECV_B 0B0", 2, 3),
            (0, "compute", "0B0", 3, 5),
            (1, "compute", "1F0", 1, 2),
            (1, "compute", "1B0", 2, 3),
            (1, "compute", "1REDUCE_GRAD", 3, 4),
            (1, "network", "1SEND_B1", 4, 5),
        ),
        ["phone"],
        width=10,
    )
    assert drawn.splitlines()[:2] == ["rank 0 phone |0011..aaaa|", "rank 1       |  00aa==~~|"]
    assert "5000.0 ms predicted" in drawn


def test_grid_of_nothing_is_empty():
    assert format_timeline(timeline(), width=4).splitlines()[0] == "rank 0 |    |"
