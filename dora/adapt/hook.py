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
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

from dora.adapt.bank import make_bank, plans_for
from dora.adapt.corrected import Corrected
from dora.adapt.course import Course
from dora.adapt.forecast import Predictor, pricer
from dora.adapt.gauges import LinkGauges, Paths, believable
from dora.adapt.handover import cycle_of, fit_together, memory_of, reordered, toll_of
from dora.adapt.notes import (
    NUM_NOTED,
    Lap,
    Notes,
    compute_s,
    is_alarmed,
    is_asked,
    laps_of,
    noted,
)
from dora.adapt.pace import FIRST_CALLS, Pace
from dora.adapt.play import MOST_PLANS, coarsened, estimated
from dora.adapt.running import Rows, Running
from dora.adapter import Monitor, Rules, Standing, Toll, View, decide, event, placed
from dora.adapter.score import conditions
from dora.catalog import scale_to_cluster
from dora.errors import InfeasiblePlanError
from dora.judge import Case, case_of, play
from dora.spec import (
    Cluster,
    Conditions,
    Decision,
    Forecast,
    ModelProfile,
    Plan,
    Predict,
    QoE,
    Workload,
)

# Of each search in the background.
_EFFORT_S = 0.3


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
        rules: How gains and risks are weighed. Where they read bounds as averages or percentiles,
            plans take turns: requests one by one, with the weights of all plans in place; training
            in phases, between which weights move.
        every: Calls between two exchanges; None keeps their cost below 1 % of the time.
    """
    rules = rules or Rules.of(qoe or QoE())
    if workload.kind == "generate":
        raise ValueError("workload: given kind 'generate', allowed: 'train' or 'infer'")
    complete = scale_to_cluster(profile, cluster, training=workload.kind == "train")
    predict = Predictor(complete, cluster, workload, qoe or QoE())
    return Adapting(predict, rules, bank, Path(log) if log is not None else None, every)


class Adapting:
    """Watches one model, and switches it. See `adapting`.

    Attributes:
        expected_s: What a call of the running plan should take, by the profile.
    """

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
        # Weights change with every call, so that plans can not be in place together.
        self._is_live = predict.workload.kind == "train"
        self._corrected = Corrected(predict)
        self._price = pricer(predict, self._held)
        self._case: Case = case_of(predict.profile, predict.cluster, predict.workload, predict.qoe)
        self._paths, self._links = Paths(predict.cluster), LinkGauges(len(predict.cluster.devices))
        names = [device.name for device in predict.cluster.devices]
        self._monitor = Monitor([m.name for m in predict.cluster.media], names)
        self._names = names
        self._standing: Standing | None = None
        self._running: tuple[Plan, ...] = ()
        self._prepared: list[Plan] = []
        self._course: Course | None = None
        self.expected_s: float | None = None
        self._notes = Notes(predict.usual_s)
        self._pace, self._first = Pace(every), every or FIRST_CALLS
        self._cost_s, self._has_decided = 0.0, False
        self._items = 0
        self._search: Thread | None = None
        self._found: list[Plan] = []
        for plan in self._bank:  # here, rather than in the first exchange
            predict(plan, Conditions())

    @property
    def qoe(self) -> QoE:
        """The bounds that it keeps."""
        return self._predict.qoe

    def between_calls(self, model: Running) -> None:
        """Takes note of the last call, and every few calls decides; a collective call."""
        if model.resident is not self._running:
            self._begin(model)
        if model.calls[-1].kind != self._predict.workload.kind:
            return
        start_s = perf_counter()
        self._items += 1
        call = model.calls[-1]
        self._notes.add(_turn(model), model.computed(), call.end_s - call.start_s)
        self._left -= 1
        self._cost_s += perf_counter() - start_s
        if self._left <= 0:
            self._exchange(model)
        if self._course is not None:
            self._take_turn(model, self._course)

    def _exchange(self, model: Running) -> None:
        start_s, row = perf_counter(), self._row(model)
        self._cost_s = 0.0
        rows, said = model.confer(row, lambda rows: self._answer(model, rows), is_asked)
        if model.resident is not self._running:  # a device was lost in it
            self._begin(model)
        if model.rank != model.members[0] or not is_asked(rows):
            self._observe(model, rows, perf_counter())
        if is_alarmed(rows):
            self._pace.alarm()
        self._has_decided = is_asked(rows)
        self._left = int(noted(rows[0]).left)
        self._cost_s += perf_counter() - start_s
        if said:
            self._follow(model, json.loads(said))

    # ------------------------------------------------------------ noting

    def _begin(self, model: Running) -> None:
        """Knows what runs from now on, whoever has chosen it, on all ranks that are there."""
        standing = self._standing or Standing((model.plan,))
        self._course, self._left = None, self._first
        self._standing = standing._replace(
            plans=(self._known(model.plan),), weights=(1.0,), candidate=None, wins=0
        )
        self._enter(model)

    def _enter(self, model: Running) -> None:
        self._running, self._prepared = model.resident, []
        timelines = [play(plan, self._case) for plan in model.resident]
        self._notes.begin([compute_s(timeline, model.rank) for timeline in timelines])
        self.expected_s = timelines[_turn(model)].makespan_s
        self._monitor.switched()

    def _known(self, plan: Plan) -> Plan:
        """Returns the plan as it is in the bank, where all that is known of plans goes by id."""
        return next((each for each in self._bank if each == plan), plan)

    def _row(self, model: Running) -> list[float]:
        """Returns what this rank tells the others; 0 is not known."""
        rates, round_trips = self._links.read(model.transport, perf_counter())
        is_undecided = self._standing is not None and self._standing.wins > 0
        if self._found or is_undecided or self._monitor.has_news:
            self._pace.alarm()
        plea = self._pace.next(*self._notes.worked)
        is_watching = model.rank in self._watchers(model.plan, model)
        row = self._notes.row(self._cost_s, plea, is_watching=is_watching)
        return [*row, *rates, *round_trips]

    def _observe(self, model: Running, rows: Rows, now_s: float) -> list[Lap]:
        n, by_rank = len(self._names), dict(zip(model.members, rows, strict=True))
        self._pace.pay(min(row[1] for row in rows), has_decided=self._has_decided)
        for rank, name in enumerate(self._names):
            if rank not in by_rank:
                self._monitor.lost(name, now_s)
                continue
            self._monitor.alive(name, now_s)
            if by_rank[rank][0] > 0:
                self._monitor.speed(name, by_rank[rank][0], now_s)
        rates = {r: row[NUM_NOTED : NUM_NOTED + n] for r, row in by_rank.items()}
        round_trips = {r: row[NUM_NOTED + n :] for r, row in by_rank.items()}
        laps = laps_of(by_rank, [self._watchers(plan, model) for plan in self._running])
        speeds = {self._names[r]: row[0] for r, row in by_rank.items() if row[0] > 0}
        call_s = laps[0].mean_s if len(laps) == 1 else 0.0
        asked = self._paths.rates(rates), speeds, self._known(model.plan), self._predict, call_s
        for medium, factor in believable(*asked).items():
            self._monitor.rate(medium, factor, now_s)
        for medium, factor in self._paths.delays(round_trips).items():
            self._monitor.delay(medium, factor, now_s)
        self._monitor.items(sum(lap.calls for lap in laps), sum(lap.late for lap in laps))
        return laps

    def _watchers(self, plan: Plan, model: Running) -> Sequence[int]:
        """Returns the ranks that see how long a call takes.

        Training, all end together. A request begins where its inputs are, and other ranks wait for
        it, maybe since long before it came.
        """
        seeing = [] if self._is_live else set(plan.ranks(0)) & {*model.output_ranks}
        return sorted(seeing) or model.members

    # ------------------------------------------------------------ deciding

    def _answer(self, model: Running, rows: Rows) -> bytes:
        """Returns what all ranks shall do, as JSON."""
        if model.resident is not self._running:  # the same, but decided upon already
            self._begin(model)
        assert self._standing is not None
        now_s = perf_counter()
        laps = self._observe(model, rows, now_s)
        self._take_what_was_found()
        view = self._monitor.view(now_s)
        decision, self._standing, forecast = decide(
            self._bank,
            self._standing,
            view,
            self._forecaster(view, laps),
            self._price,
            self._rules,
            memory_of=None if self._is_live else memory_of(self._predict),
            toll=self._toll(),
        )
        if decision.is_replanning or self._must_search:
            self._begin_search(view)
        self._write(decision, view, forecast)
        news = self._orders(decision, view)
        return json.dumps(news).encode() if news else b""

    def _forecaster(self, view: View, laps: Sequence[Lap]) -> Predict:
        """Returns what predicts plans; where averages count, it learns from their times."""
        if self._rules.reading == "each":
            return self._predict
        now = conditions(view, 0.0)
        for plan, lap in zip(self._running, laps, strict=True):
            if lap.calls:
                self._corrected.observe(self._known(plan), lap.mean_s, now)
        return self._corrected

    def _toll(self) -> Toll:
        """Returns what handing over costs per step, where plans take turns in long phases."""
        if not self._is_live or self._rules.reading == "each":
            return Toll()
        return toll_of(self._predict, cycle_of(self._predict))

    def _orders(self, decision: Decision, view: View) -> dict[str, Any]:
        """Returns the plans to run, or else one to have in place; training changes its weights."""
        plans = list(decision.plans)
        if decision.kind == "reschedule":
            found = reordered(self._running[0], self._predict, estimated(view))
            return {"order": found.to_json(), "reason": decision.reason} if found else {}
        if plans:
            given = {"plans": [plan.to_json() for plan in plans], "reason": decision.reason}
            cycle = cycle_of(self._predict) if self._is_live else 1
            mixed = {"weights": decision.weights, "cycle": cycle}
            return {**given, **mixed} if len(plans) > 1 else given
        if self._is_live:
            return {}
        ways = [plan for plan in decision.prepare if plan not in self._prepared]
        beside = *self._running, *self._prepared
        fitting = next((p for p in ways if fit_together((*beside, p), self._predict)), None)
        return {"prepare": fitting.to_json()} if fitting is not None else {}

    def _held(self) -> dict[str, frozenset[int]]:
        """Returns the blocks that each device has: of what runs, and of what was fetched ahead."""
        held: dict[str, frozenset[int]] = {}
        for plan in (*self._running, *self._prepared):
            for name, blocks in placed(plan).items():
                held[name] = held.get(name, frozenset()) | blocks
        return held

    # ------------------------------------------------------------ following

    def _follow(self, model: Running, news: dict[str, Any]) -> None:
        """Does what the lowest rank has said; plans that are refused are not tried again."""
        plans = [Plan.from_json(text) for text in news.get("plans", ())]
        try:
            if "prepare" in news:
                self._prepared.append(Plan.from_json(news["prepare"]))
                model.prepare(self._prepared[-1])
            elif "order" in news:
                model.reorder(Plan.from_json(news["order"]), reason=news["reason"])
            elif len(plans) > 1:
                self._mix(model, plans, news)
            elif plans:
                self._course = None
                model.switch(plans[0], reason=news["reason"])
        except InfeasiblePlanError:
            refused = [plan for plan in (*plans, *self._prepared[-1:]) if plan != model.plan]
            self._bank = [each for each in self._bank if each not in refused]
            self._begin(model)

    def _mix(self, model: Running, plans: Sequence[Plan], news: dict[str, Any]) -> None:
        """Lets plans take turns from the next call on; other shares of the same move nothing."""
        have = (*model.resident, *(self._course.plans if self._course else ()))
        plans = [next((h for h in have if h == plan), plan) for plan in plans]
        if not self._is_live and not set(map(id, plans)) <= set(map(id, model.resident)):
            model.hold(plans, reason=news["reason"])
            self._enter(model)
        self._course = Course(plans, news["weights"], news["cycle"])
        assert self._standing is not None
        self._standing = self._standing._replace(
            plans=tuple(map(self._known, plans)), weights=tuple(news["weights"])
        )

    def _take_turn(self, model: Running, course: Course) -> None:
        """Gives the next call to its plan; weights that training changes have to move."""
        plan = course.next()
        if plan is model.plan:
            return
        if not self._is_live:
            model.turn_to(plan)
            return
        try:
            model.switch(plan, reason="its turn")
            self._enter(model)
        except InfeasiblePlanError:
            self._begin(model)

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


def _turn(model: Running) -> int:
    """Returns which of the plans in place has had the last call."""
    return next(i for i, plan in enumerate(model.resident) if plan is model.plan)
