"""The notes of a recorder and what a model says of itself, as one Status."""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import fmean, median
from typing import Any, NamedTuple, Protocol

import psutil

from dora.live.recorder import Done, Recorder, bound_s
from dora.live.tokens import Times, Tokens
from dora.spec import Happening, LinkStatus, Plan, QoE, Shares, Status, TokenStatus

# An estimate of the engine is the largest of samples of 40 ms (csrc/rate.h): it is about the link
# only if what was sent between two looks filled two of them.
_BUSY_S = 0.08
# Looks at the engine's counters over which the share of time on the wire is taken.
_NUM_LOOKS = 10
# Events that are kept for people; the counts are of all.
_NUM_EVENTS = 8


class Happened(Protocol):
    """An event of a model; times are those of `time.perf_counter`."""

    @property
    def kind(self) -> str:
        """What it was."""

    @property
    def call(self) -> int:
        """Number of the call before which it was."""

    @property
    def start_s(self) -> float:
        """When it began."""

    @property
    def end_s(self) -> float:
        """When it ended."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Those that are gone."""

    @property
    def lost_steps(self) -> int:
        """Optimizer steps that are undone."""

    @property
    def num_bytes(self) -> int:
        """What this rank got from others."""

    @property
    def text(self) -> str:
        """What led to it."""


class Live(Protocol):
    """What is read of a model; `DoraParallel` has it."""

    rank: int
    members: tuple[int, ...]
    plan: Plan
    transport: Any

    @property
    def events(self) -> Sequence[Happened]:
        """The last switches, losses and departures."""


class _Look(NamedTuple):
    """What the engine had counted at a time, by peer."""

    at_s: float
    sent_bytes: dict[int, int]


class Observer:
    """Says how a rank is doing; remembers what it has seen of the links.

    Args:
        recorder: Of the model's calls.
        qoe: Bounds that calls have to keep.
        adapter: What its `expected_s` says is for plans without a cost.
    """

    def __init__(self, recorder: Recorder, qoe: QoE, adapter: Any = None) -> None:
        self.host, self._process = socket.gethostname(), psutil.Process()
        self._started_s = self._process.create_time()
        self._recorder, self._qoe, self._adapter = recorder, qoe, adapter
        self._looks: deque[_Look] = deque(maxlen=_NUM_LOOKS)
        self._rates: dict[int, float] = {}
        self._peers: Mapping[int, Any] = {}

    def status(self, model: Live, *, period_s: float, problem: str | None = None) -> Status:
        """Returns how the rank is doing.

        Args:
            model: On this rank.
            period_s: Until the next time.
            problem: Of a model that was closed, '' if there was none; None while it is open.
        """
        plan, recorder, now_s = model.plan, self._recorder, time.perf_counter()
        begun_s, recent = recorder.begun_s, recent_of(recorder, plan)
        called = recent[-1].kind if recent else None
        kind = "generate" if recorder.is_generating else called
        device = plan.devices[model.rank]
        links = self._links(model)
        is_over = problem is not None
        open_state = "idle" if begun_s is None else "running"
        return Status(
            at_s=time.time(),
            period_s=period_s,
            host=self.host,
            process=os.getpid(),
            started_s=self._started_s,
            rank=model.rank,
            device=device,
            state=("failed" if problem else "over") if is_over else open_state,
            problem=problem or "",
            members=model.members,
            plan=plan.model_copy(update={"cost": None, "links": (), "transfers": ()}),
            predicted_s=self._predicted_s(plan, kind),
            peak_bytes=next(
                (
                    m.peak_bytes
                    for m in (plan.cost.memory if plan.cost else ())
                    if m.device == device
                ),
                None,
            ),
            kind=kind,
            num_calls=recorder.num_calls,
            in_call_s=None if is_over or begun_s is None else round(now_s - begun_s, 3),
            recent_s=tuple(round(done.end_s - done.start_s, 6) for done in recent),
            calls_per_s=_rate(recent),
            shares=self._shares(recent),
            tokens=token_status(recorder.tokens),
            bound_s=bound_s(self._qoe, kind),
            percentile=self._qoe.percentile,
            num_late=recorder.num_late,
            memory_bytes=self._process.memory_info().rss,
            links=links,
            events=_happenings(model.events),
            num_events=dict(Counter(event.kind for event in tuple(model.events))),
        )

    def _predicted_s(self, plan: Plan, kind: str | None) -> float | None:
        """Returns what the planner, or else the adapter, says that a call takes."""
        if kind not in (None, "infer" if plan.schedule_kind == "wavefront" else "train"):
            return None
        planned_s = plan.cost.makespan_s if plan.cost is not None else 0.0
        return planned_s or getattr(self._adapter, "expected_s", None)

    def _links(self, model: Live) -> tuple[LinkStatus, ...]:
        self._ask(model.transport)
        self._look(self._peers)
        return tuple(
            LinkStatus(
                peer=peer,
                is_up=stats["state"] == "open",
                sent_bytes=stats["bytes_sent"],
                received_bytes=stats["bytes_received"],
                messages=sum(
                    each["messages"] for way in ("urgent", "bulk") for each in stats[way]["classes"]
                ),
                rate_bytes_per_s=self._rates.get(peer),
                round_trip_s=stats["rtt_s"] or None,
            )
            for peer, stats in self._peers.items()
        )

    def _ask(self, transport: Any) -> None:
        """Gets what the engine has counted by peer; if something else carries messages, nothing."""
        communicator = getattr(transport, "communicator", None)
        if communicator is not None:
            with suppress(RuntimeError):  # it is closed: the last counts stay
                self._peers = communicator.engine.stats()["peers"]

    def _look(self, peers: Mapping[int, Any]) -> None:
        """Takes note of the counters, and of the rates of links that were busy since the last."""
        before = self._looks[-1].sent_bytes if self._looks else {}
        sent_bytes = {peer: int(stats["bytes_sent"]) for peer, stats in peers.items()}
        for peer, stats in peers.items():
            rate = stats["rate_bytes_per_s"]
            if rate and sent_bytes[peer] - before.get(peer, 0) >= _BUSY_S * rate:
                self._rates[peer] = rate
        self._looks.append(_Look(time.perf_counter(), sent_bytes))

    def _shares(self, recent: Sequence[Done]) -> Shares | None:
        if not recent or recent[-1].end_s <= recent[0].start_s:
            return None
        total_s = recent[-1].end_s - recent[0].start_s
        return Shares(
            computing=round(sum(done.computed_s for done in recent) / total_s, 4),
            waiting=round(sum(done.waited_s for done in recent) / total_s, 4),
            sending=self._sending(),
        )

    def _sending(self) -> float | None:
        first, last = self._looks[0], self._looks[-1]
        if not self._rates or last.at_s <= first.at_s:
            return None
        on_wire_s = sum(
            (last.sent_bytes[peer] - first.sent_bytes.get(peer, 0)) / rate
            for peer, rate in self._rates.items()
            if peer in last.sent_bytes
        )
        return round(max(on_wire_s, 0.0) / (last.at_s - first.at_s), 4)


def recent_of(recorder: Recorder, plan: Plan) -> list[Done]:
    """Returns the last calls that were like the last one: of its kind, on this plan."""
    done = tuple(recorder.recent)
    return [d for d in done if d.plan == id(plan) and d.kind == done[-1].kind]


def token_status(tokens: Tokens) -> TokenStatus | None:
    """Returns what was noted of tokens; None where nothing was."""
    in_flight, waiting = tokens.num_open
    if not (tokens.num_tokens or in_flight):
        return None
    return TokenStatus(
        num_tokens=tokens.num_tokens,
        num_requests=tokens.num_requests,
        in_flight=in_flight,
        waiting=waiting,
        tokens_per_s=round(tokens.per_s(), 3),
        first_s=_median_and_late(tokens.first),
        further_s=_median_and_late(tokens.further),
    )


def _median_and_late(times: Times) -> tuple[float, float] | None:
    found = sorted(tuple(times.recent))
    if not found:
        return None
    return round(median(found), 6), round(found[math.ceil(0.95 * len(found)) - 1], 6)


def _rate(recent: Sequence[Done]) -> float | None:
    if len(recent) < 2:
        return None
    between_s = fmean(b.end_s - a.end_s for a, b in zip(recent, recent[1:], strict=False))
    return round(1 / between_s, 4) if between_s > 0 else None


def _happenings(events: Sequence[Happened]) -> tuple[Happening, ...]:
    to_wall_s = time.time() - time.perf_counter()
    return tuple(
        Happening(
            at_s=event.end_s + to_wall_s,
            kind=event.kind,
            call=event.call,
            took_s=event.end_s - event.start_s,
            devices=event.devices,
            lost_steps=event.lost_steps,
            num_bytes=event.num_bytes,
            text=event.text,
        )
        for event in tuple(events)[-_NUM_EVENTS:]
    )
