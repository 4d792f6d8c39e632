"""The adapter in a running job: what the ranks measure goes in, and other plans come out.

`DoraParallel(..., adapter=adapting(...))` calls it on every rank before a step or request. Every
few calls the ranks tell each other how fast they computed and what the engine has measured of
their links; the lowest rank decides for all, and all go over to the plan that it names::

    cluster, workload, qoe = load_cluster("home.toml"), Workload(batch_size=32), QoE(step_s=1.5)
    adapter = adapting(profile, cluster, workload, qoe, bank=plans, log="decisions.jsonl")
    model = DoraParallel(module, plans[0], sample=inputs, adapter=adapter)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = model.step(inputs, targets, F.cross_entropy)  # may switch before it begins
        optimizer.step()

All ranks keep the same estimates, so that another one can decide when the lowest is lost.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean, median
from threading import Thread
from time import perf_counter
from typing import Any, Literal, Protocol

from dora.adapt.bank import make_bank, plans_for
from dora.adapt.forecast import Predictor, pricer
from dora.adapt.gauges import LinkGauges, Paths
from dora.adapt.play import MOST_PLANS, coarsened, estimated
from dora.adapter import Monitor, Rules, Standing, View, decide, event, placed
from dora.catalog import scale_to_cluster
from dora.errors import InfeasiblePlanError
from dora.judge import Case, case_of, play
from dora.spec import Cluster, Decision, Forecast, ModelProfile, Plan, QoE, Workload

# What telling and deciding may take of the time of the calls between.
SHARE = 0.01
# Calls between two exchanges, at most: a change that matters is worth knowing within minutes.
MOST_CALLS = 1000
# The first exchanges find cold caches, so that the median of as many says what one takes.
_COSTS = 5
# Of each search in the background.
_EFFORT_S = 0.3
# Speed, calls, late ones, mean seconds, cost of the last exchange; then rates and round trips.
_NUM_OWN = 5

Rows = list[list[float]]


class Timed(Protocol):
    """A step or request on this rank."""

    @property
    def kind(self) -> Literal["train", "infer"]:
        """What it was."""

    @property
    def start_s(self) -> float:
        """On a clock of this rank."""

    @property
    def end_s(self) -> float:
        """On the same clock."""


class Running(Protocol):
    """What the hook needs of a model; `DoraParallel` has it."""

    rank: int
    members: tuple[int, ...]
    plan: Plan
    transport: Any

    @property
    def calls(self) -> Sequence[Timed]:
        """The last steps and requests."""

    def computed(self) -> list[tuple[str, float]]:
        """Returns (action, seconds) of what this rank computed in the last call."""

    def confer(self, row: Sequence[float], answer: Callable[[Rows], bytes]) -> tuple[Rows, bytes]:
        """Returns the rows of all ranks, and the lowest rank's answer to them."""

    def switch(self, plan: Plan, *, reason: str = "") -> None:
        """Goes on with another plan."""

    def prepare(self, plan: Plan) -> None:
        """Fetches weights ahead."""


def adapting(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    bank: Sequence[Plan] | None = None,
    log: str | os.PathLike[str] | None = None,
    rules: Rules | None = None,
    every: int | None = None,
) -> Adapting:
    """Returns an adapter for `DoraParallel`; all ranks make it of the same arguments.

    Args:
        profile: Times of devices that it lacks are modelled.
        cluster: Rank i is `cluster.devices[i]`.
        workload: 'train' or 'infer'; calls of the other kind change nothing.
        qoe: Bounds to keep, and the objective.
        bank: Plans to choose from; None searches for them in the background, on the lowest rank.
        log: File that gets one line of JSON per decision that changes something.
        rules: How gains and risks are weighed; only those that read bounds for each item.
        every: Calls between two exchanges; None keeps their cost below 1 % of the time.
    """
    rules = rules or Rules.of(qoe or QoE())
    if workload.kind == "generate":
        raise ValueError("workload: given kind 'generate', allowed: 'train' or 'infer'")
    if rules.reading != "each":
        raise ValueError(f"rules: given reading {rules.reading!r}, allowed: 'each'")
    complete = scale_to_cluster(profile, cluster, training=workload.kind == "train")
    predict = Predictor(complete, cluster, workload, qoe or QoE())
    return Adapting(predict, rules, bank, Path(log) if log is not None else None, every)


class Adapting:
    """Watches one model, and switches it. See `adapting`."""

    def __init__(
        self,
        predict: Predictor,
        rules: Rules,
        bank: Sequence[Plan] | None,
        log: Path | None,
        every: int | None,
    ) -> None:
        self._predict, self._rules, self._log = predict, rules, log
        self._bank, self._must_search = list(bank or ()), bank is None
        self._price = pricer(predict, self._held)
        self._case: Case = case_of(predict.profile, predict.cluster, predict.workload, predict.qoe)
        self._paths, self._links = Paths(predict.cluster), LinkGauges(len(predict.cluster.devices))
        names = [device.name for device in predict.cluster.devices]
        self._monitor = Monitor([m.name for m in predict.cluster.media], names)
        self._names = names
        self._standing: Standing | None = None
        self._running: Plan | None = None
        self._prepared: list[Plan] = []
        self._expected_s: dict[str, float] = {}
        self._is_fresh = True
        self._fixed, self._every, self._left = every, every or 1, every or 1
        self._speeds: list[float] = []
        self._seconds: list[float] = []
        self._cost_s = 0.0
        self._costs_s: deque[float] = deque(maxlen=_COSTS)
        self._items = 0
        self._search: Thread | None = None
        self._found: list[Plan] = []

    def between_calls(self, model: Running) -> None:
        """Takes note of the last call, and every few calls decides; a collective call."""
        if model.plan is not self._running:
            self._begin(model)
        if model.calls[-1].kind != self._predict.workload.kind:
            return
        self._note(model)
        self._left -= 1
        if self._left > 0:
            return
        start_s = perf_counter()
        rows, said = model.confer(self._row(model), lambda rows: self._answer(model, rows))
        if model.rank != model.members[0]:
            self._observe(model, rows, perf_counter())
        self._cost_s = perf_counter() - start_s
        news = json.loads(said) if said else {}
        self._left = self._every = news.get("every", self._every)
        self._follow(model, news)

    # ------------------------------------------------------------ noting

    def _begin(self, model: Running) -> None:
        """Knows what the plan that runs from now on should take."""
        self._running = model.plan
        known = next((plan for plan in self._bank if plan == model.plan), model.plan)
        standing = self._standing or Standing((known,))
        self._standing = standing._replace(plans=(known,), weights=(1.0,), candidate=None, wins=0)
        timeline = play(model.plan, self._case)
        self._expected_s = {
            span.label: span.end_s - span.start_s
            for span in timeline.spans
            if span.rank == model.rank and span.lane == "compute"
        }
        self._speeds, self._seconds, self._is_fresh = [], [], True
        self._prepared = []
        self._monitor.switched()

    def _note(self, model: Running) -> None:
        """Keeps what the last call says; the first one of a plan finds the shapes."""
        self._items += 1
        if self._is_fresh:
            self._is_fresh = False
            return
        ratios = [
            self._expected_s[label] / took_s
            for label, took_s in model.computed()
            if took_s > 0 and self._expected_s.get(label)
        ]
        self._speeds += [median(ratios)] if ratios else []
        self._seconds.append(model.calls[-1].end_s - model.calls[-1].start_s)

    def _row(self, model: Running) -> list[float]:
        """Returns what this rank tells the others; 0 is not known."""
        rates, round_trips = self._links.read(model.transport, perf_counter())
        usual_s = self._predict.usual_s
        row = [
            median(self._speeds) if self._speeds else 0.0,
            float(len(self._seconds)),
            float(sum(seconds > usual_s for seconds in self._seconds)),
            fmean(self._seconds) if self._seconds else 0.0,
            self._cost_s,
        ]
        self._speeds, self._seconds = [], []
        return [*row, *rates, *round_trips]

    def _observe(self, model: Running, rows: Rows, now_s: float) -> None:
        n, by_rank = len(self._names), dict(zip(model.members, rows, strict=True))
        for rank, name in enumerate(self._names):
            if rank not in by_rank:
                self._monitor.lost(name, now_s)
            elif by_rank[rank][0] > 0:
                self._monitor.speed(name, by_rank[rank][0], now_s)
        rates = {r: row[_NUM_OWN : _NUM_OWN + n] for r, row in by_rank.items()}
        round_trips = {r: row[_NUM_OWN + n :] for r, row in by_rank.items()}
        for medium, factor in self._paths.rates(rates).items():
            self._monitor.rate(medium, factor, now_s)
        for medium, factor in self._paths.delays(round_trips).items():
            self._monitor.delay(medium, factor, now_s)
        self._monitor.items(max(row[1] for row in rows), max(row[2] for row in rows))

    # ------------------------------------------------------------ deciding

    def _answer(self, model: Running, rows: Rows) -> bytes:
        """Returns what all ranks shall do, as JSON; empty if that is nothing."""
        if model.plan is not self._running:  # a device was lost in this very exchange
            self._begin(model)
        assert self._standing is not None
        now_s = perf_counter()
        self._observe(model, rows, now_s)
        self._take_what_was_found()
        view = self._monitor.view(now_s)
        decision, self._standing, forecast = decide(
            self._bank, self._standing, view, self._predict, self._price, self._rules
        )
        if decision.is_replanning or self._must_search:
            self._begin_search(view)
        self._write(decision, view, forecast)
        news = {**self._pace(rows), **self._orders(decision)}
        return json.dumps(news).encode() if news else b""

    def _orders(self, decision: Decision) -> dict[str, str]:
        """Returns the plan to run, or else one to have in place; training changes its weights."""
        if decision.kind in ("switch", "shift"):
            return {"plan": decision.plans[0].to_json(), "reason": decision.reason}
        if self._predict.workload.kind == "train":
            return {}
        ways = [plan for plan in decision.prepare if plan not in self._prepared]
        fitting = next((plan for plan in ways if self._fits_beside(plan)), None)
        return {"prepare": fitting.to_json()} if fitting is not None else {}

    def _fits_beside(self, plan: Plan) -> bool:
        """Returns whether every device has the memory for that plan beside what it has."""
        needs = [self._predict.memory_bytes(each) for each in (*self._present(), plan)]
        return all(
            sum(need.get(device.name, 0.0) for need in needs) <= device.memory_bytes
            for device in self._predict.cluster.devices
        )

    def _present(self) -> list[Plan]:
        assert self._running is not None
        return [self._running, *self._prepared]

    def _pace(self, rows: Rows) -> dict[str, int]:
        """Returns how many calls to let pass, if that changes by more than a quarter.

        Who comes last to an exchange has not waited for the others: its time is the cost.
        """
        self._costs_s.append(min(row[4] for row in rows))
        step_s = max(row[3] for row in rows)
        if self._fixed is not None or step_s <= 0 or len(self._costs_s) < _COSTS:
            return {}
        wanted = min(max(ceil(median(self._costs_s) / (SHARE * step_s)), 1), MOST_CALLS)
        return {"every": wanted} if abs(wanted - self._every) > self._every / 4 else {}

    def _follow(self, model: Running, news: dict[str, Any]) -> None:
        """Does what the lowest rank has said; a plan that is refused is not tried again."""
        given = news.get("plan") or news.get("prepare")
        if given is None:
            return
        plan = Plan.from_json(given)
        try:
            if "plan" in news:
                model.switch(plan, reason=news["reason"])
            else:
                model.prepare(plan)
                self._prepared.append(plan)
        except InfeasiblePlanError:
            self._bank = [each for each in self._bank if each != plan]
            self._running = None

    def _held(self) -> dict[str, frozenset[int]]:
        """Returns the blocks that each device has: of what runs, and of what was fetched ahead."""
        held: dict[str, frozenset[int]] = {}
        for plan in self._present():
            for name, blocks in placed(plan).items():
                held[name] = held.get(name, frozenset()) | blocks
        return held

    # ------------------------------------------------------------ searching, telling

    def _begin_search(self, view: View) -> None:
        """Looks for plans in a thread; what it finds joins the bank before a later decision."""
        if self._search is not None and self._search.is_alive():
            return
        is_first, self._must_search = self._must_search, False
        world = coarsened(estimated(view))

        def search() -> None:
            self._found += (
                make_bank(self._predict, effort_s=_EFFORT_S)
                if is_first
                else plans_for(self._predict, world, effort_s=_EFFORT_S)
            )

        self._search = Thread(target=search, name="dora-search", daemon=True)
        self._search.start()

    def _take_what_was_found(self) -> None:
        while self._found:
            plan = self._found.pop(0)
            if plan not in self._bank and len(self._bank) < MOST_PLANS:
                self._bank.append(plan)

    def _write(self, decision: Decision, view: View, forecast: Forecast | None) -> None:
        if self._log is None or decision.kind == "keep":
            return
        line = event(decision, view, step=self._items, forecast=forecast).line()
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
