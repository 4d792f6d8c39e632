"""What a rank says of itself, for Prometheus; needs the package prometheus-client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dora.errors import SpecError
from dora.live.recorder import Recorder
from dora.live.tokens import BUCKETS_S, Tokens
from dora.spec import Status

if TYPE_CHECKING:
    from prometheus_client.core import Metric

HOW_TO_GET = "pip install 'dora-parallel[metrics]'"


def serve(status: Callable[[], Status | None], recorder: Recorder, host: str, port: int) -> Any:
    """Answers at http://HOST:PORT/metrics from a thread; returns the server.

    Args:
        status: How the rank is doing; asked when somebody asks here.
        recorder: Of its calls.
        host: Address to answer at.
        port: Of this rank.

    Raises:
        SpecError: The package is missing, or nobody can listen there.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ModuleNotFoundError:
        raise SpecError(
            f"metrics: given port {port}, but prometheus-client is not installed: {HOW_TO_GET}"
        ) from None
    registry = CollectorRegistry()
    registry.register(Collector(status, recorder))
    try:
        server, _ = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"metrics: given {host}:{port}: {reason}, allowed: a free port") from None
    return server


class Collector:
    """Makes metrics of the state when they are asked for, so that calls cost nothing more."""

    def __init__(self, status: Callable[[], Status | None], recorder: Recorder) -> None:
        self._status, self._recorder = status, recorder

    def describe(self) -> list[Metric]:
        """Returns nothing: the names are known when they are asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics of this rank."""
        status = self._status()
        if status is None:
            return
        yield from _calls(self._recorder)
        yield from _tokens(self._recorder.tokens)
        yield from _state(status)
        yield from _links(status)
        yield from _events(status)


def _calls(recorder: Recorder) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    yield _histogram("step", "Steps and requests on this rank.", recorder.counts, recorder.total_s)
    for name, text, value in (
        (
            "late_steps",
            "Steps and requests that took longer than the QoE allows.",
            recorder.num_late,
        ),
        ("computing_seconds", "Time in blocks of the model and in codecs.", recorder.computed_s),
        (
            "exposed_communication_seconds",
            "Time waiting for transfers that no computing covers.",
            recorder.waited_s,
        ),
    ):
        yield CounterMetricFamily(f"dora_{name}", text, value=value)


def _histogram(name: str, text: str, counts: Sequence[int], total_s: float) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    histogram = HistogramMetricFamily(f"dora_{name}_seconds", text, labels=())
    names = [*(f"{bound:g}" for bound in BUCKETS_S), "+Inf"]
    buckets = list(zip(names, accumulate(counts), strict=True))
    histogram.add_metric((), buckets, total_s)
    return histogram


def _tokens(tokens: Tokens) -> Iterator[Metric]:
    """Yields what `generate` has done, on the rank that leads it."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    in_flight, waiting = tokens.num_open
    if not (tokens.num_tokens or in_flight):
        return
    for name, text, times in (
        ("first_token", "From a prompt to its first token.", tokens.first),
        ("further_token", "From one token of a request to the next.", tokens.further),
    ):
        yield _histogram(name, text, times.counts, times.total_s)
    for name, text, count in (
        ("tokens", "Generated.", tokens.num_tokens),
        ("generated_requests", "Prompts that have all their tokens.", tokens.num_requests),
    ):
        yield CounterMetricFamily(f"dora_{name}", text, value=count)
    for name, text, value in (
        ("requests_in_flight", "Prompts that are served now.", in_flight),
        ("requests_waiting", "Prompts that wait for a place.", waiting),
        ("tokens_per_second", "In the last 10 s of the last call.", tokens.per_s()),
    ):
        yield GaugeMetricFamily(f"dora_{name}", text, value=value)


def _state(status: Status) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

    yield InfoMetricFamily(
        "dora_rank", "Which rank this is.", {"rank": str(status.rank), "device": status.device}
    )
    for name, text, value in (
        ("up", "1 while the model is open.", float(status.state in ("running", "idle"))),
        ("members", "Ranks that take part.", len(status.members)),
        ("predicted_step_seconds", "What the planner says a call takes.", status.predicted_s),
        ("bound_step_seconds", "What the QoE allows a call.", status.bound_s),
        ("memory_bytes", "Resident memory of the process.", status.memory_bytes),
        ("predicted_memory_bytes", "What the planner says it needs.", status.peak_bytes),
        ("steps_per_second", "Of the last calls.", status.calls_per_s),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"dora_{name}", text, value=value)


def _links(status: Status) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ("peer", "device")
    rate = GaugeMetricFamily(
        "dora_link_bytes_per_second", "Measured when the link was last busy.", labels=labels
    )
    trip = GaugeMetricFamily("dora_link_round_trip_seconds", "To the peer and back.", labels=labels)
    up = GaugeMetricFamily("dora_link_up", "1 while connected.", labels=labels)
    sent = CounterMetricFamily("dora_link_sent_bytes", "Sent to the peer.", labels=labels)
    received = CounterMetricFamily("dora_link_received_bytes", "Got from it.", labels=labels)
    messages = CounterMetricFamily("dora_link_messages", "Sent to the peer.", labels=labels)
    for link in status.links:
        who = (str(link.peer), status.plan.devices[link.peer])
        up.add_metric(who, float(link.is_up))
        sent.add_metric(who, link.sent_bytes)
        received.add_metric(who, link.received_bytes)
        messages.add_metric(who, link.messages)
        if link.rate_bytes_per_s is not None:
            rate.add_metric(who, link.rate_bytes_per_s)
        if link.round_trip_s is not None:
            trip.add_metric(who, link.round_trip_s)
    yield from (rate, trip, up, sent, received, messages)


def _events(status: Status) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    events = CounterMetricFamily(
        "dora_events", "Switches, losses and the like, by kind.", labels=("kind",)
    )
    for kind, count in status.num_events.items():
        events.add_metric((kind,), count)
    yield events
    switches = status.num_events.get("switch", 0)
    yield CounterMetricFamily("dora_plan_switches", "Changes of the plan.", value=switches)
