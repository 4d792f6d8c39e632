"""Compares Dora's plan with those of other planners, all executed alike on one contended network.

::

    found = compare(profile, cluster, workload, qoe)
    print(found.gain, reasons(found))

`dora.judge` says what each plan takes. Rivals get the same care as Dora: a plan on one device is
tried at every number of micro-batches that Dora tries. None of them knows about energy, so beside
them stands what a user could choose by hand: the one device that is best for the objective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from dora.errors import InfeasiblePlanError
from dora.judge import Case, Entry, case_of, judge, play
from dora.planner import SearchResult, search
from dora.planner.baselines import BASELINES, Baseline
from dora.planner.search import microbatch_choices
from dora.spec import Cluster, ModelProfile, Plan, QoE, Replica, Spec, Stage, Workload
from dora.spec.plan import ScheduleKind

DORA, SINGLE = "dora", "single for objective"
# A gain below this is explained.
SMALL_GAIN = 1.1
# Values that differ by less are equal: sums in another order.
TOLERANCE = 1e-6


class Comparison(Spec):
    """All planners on one cell.

    Attributes:
        qoe: As compared, with the bound that `note` tells of.
        dora: Where nothing meets the QoE, the plan that comes nearest.
        rivals: The other planners.
        single: The one device that is best for the objective.
        gap: What any other plan could gain at most, as a share; 0 if Dora's is optimal.
        idle_network: Share of the time of Dora's plan in which nothing is sent.
    """

    qoe: QoE
    dora: Entry
    rivals: tuple[Entry, ...]
    single: Entry
    gap: float
    idle_network: float
    note: str = ""

    @property
    def best_rival(self) -> Entry | None:
        """The best plan of another planner: among those within the QoE, if there is one."""
        able = [entry for entry in self.rivals if entry.can_run]
        return min(able, key=lambda e: _order(e, self.qoe.objective), default=None)

    @property
    def gain(self) -> float | None:
        """Over the best rival; see `gain_over`."""
        best = self.best_rival
        return None if best is None else self.gain_over(best)

    def gain_over(self, entry: Entry) -> float | None:
        """Returns the value of an entry over Dora's; None where they can not be compared.

        A plan that breaks bounds which Dora's keeps may well take fewer joules: only its time,
        if it is longer, says something.
        """
        # Where nothing keeps the bounds, Dora's plan is the one that comes nearest to them.
        is_farther = entry.excess > self.dora.excess * (1 + TOLERANCE)
        is_unequal = not entry.meets_qoe and (self.dora.meets_qoe or is_farther)
        if entry.gain is None or (
            is_unequal and (self.qoe.objective == "energy" or entry.gain < 1)
        ):
            return None
        return entry.gain

    @property
    def is_missed(self) -> bool:
        """Whether another plan meets the QoE and Dora's does not."""
        others = any(entry.meets_qoe for entry in (*self.rivals, self.single))
        return others and not self.dora.meets_qoe

    @property
    def is_worse(self) -> bool:
        """Whether another plan beats Dora's, or meets a QoE that Dora's does not."""
        best = [self.best_rival, self.single]
        gains = [self.gain_over(entry) for entry in best if entry is not None]
        return self.is_missed or any(gain < 1 - TOLERANCE for gain in gains if gain is not None)


def compare(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    effort_s: float | None = None,
    planners: Mapping[str, Baseline] = BASELINES,
) -> Comparison:
    """Returns what every planner's plan takes, and what Dora gains over it.

    Energy is compared at equal QoE: without a bound on time, Dora may take no longer than the
    fastest of the others.

    Args:
        profile: With timings for every device.
        cluster: Devices and links.
        workload: What is run.
        qoe: Bounds and objective; None minimises time.
        effort_s: Of Dora's search.
        planners: By name; each is called with (profile, cluster, workload).

    Raises:
        ValueError: A timing is missing.
        SpecError: The QoE has a bound that can not be judged.
    """
    qoe, note = qoe or QoE(), ""
    case = case_of(profile, cluster, workload, qoe)
    answers = [_answer(name, p, profile, cluster, workload) for name, p in planners.items()]
    answers.append(Entry(planner=SINGLE, plan=_first_alone(profile, cluster, workload)))
    rivals = [best_of(answer, case) for answer in answers]
    if qoe.objective == "energy" and not _bounds_time(qoe):
        qoe, note = _as_fast_as(rivals, qoe, workload)
        case = case_of(profile, cluster, workload, qoe)
        rivals = [best_of(answer, case) for answer in answers]
    ours, found = _ours(profile, cluster, case, effort_s)
    *rivals, single = [_with_gain(entry, ours, qoe.objective) for entry in rivals]
    return Comparison(
        qoe=qoe,
        dora=_with_gain(ours, ours, qoe.objective),
        rivals=tuple(rivals),
        single=single,
        gap=0.0 if found.is_optimal else found.gap,
        idle_network=_idle_network(ours, case) if ours.can_run else 1.0,
        note=note,
    )


def reasons(found: Comparison) -> list[str]:
    """Returns why the gain over the best rival is small; nothing if it is not."""
    best, ours = found.best_rival, found.dora.plan
    if best is None or best.plan is None or ours is None or found.gain is None:
        return []
    if found.gain >= SMALL_GAIN:
        return []
    texts = ["one device is best"] if len(_used(ours)) == 1 else []
    if _placement(ours) == _placement(best.plan):
        texts.append("planners agree on the plan")
    elif set(_used(ours)) == set(_used(best.plan)):
        texts.append("the same devices, cut elsewhere")
    if found.idle_network >= 0.5:
        texts.append(f"compute-bound: the network is idle {found.idle_network:.0%} of the time")
    if 0 < found.gap < 1 - 1 / SMALL_GAIN:
        texts.append(f"no plan is more than {found.gap:.1%} better")
    return texts or ["other devices, about as good"]


def _answer(
    name: str, planner: Baseline, profile: ModelProfile, cluster: Cluster, workload: Workload
) -> Entry:
    start_s = time.perf_counter()
    try:
        plan, problem = planner(profile, cluster, workload), ""
    except InfeasiblePlanError as error:
        plan, problem = None, str(error)
    spent_s = time.perf_counter() - start_s
    return Entry(planner=name, plan=plan, problem=problem, planning_s=spent_s)


def best_of(answer: Entry, case: Case) -> Entry:
    """Returns the best of what a planner's answer may run as."""
    if answer.plan is None:
        return answer
    tried = [
        judge(answer.model_copy(update={"plan": plan}), case)
        for plan in _variants(answer.planner, answer.plan, case)
    ]
    return min(tried, key=lambda entry: _order(entry, case.qoe.objective))


def _variants(planner: str, plan: Plan, case: Case) -> Iterator[Plan]:
    yield plan
    if len(_used(plan)) > 1:
        return
    for name in plan.devices if planner == SINGLE else _used(plan):
        for m in microbatch_choices(case.workload):
            stage = plan.stages[0].model_copy(update={"replicas": (Replica(device=name),)})
            yield _alone(plan.devices, stage, m, plan.schedule_kind)


def _first_alone(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Plan:
    """Returns everything on the first device, for `_variants` to try the others."""
    replica = Replica(device=cluster.devices[0].name)
    last = len(profile.blocks) - 1
    stage = Stage(index=0, first_block=0, last_block=last, replicas=(replica,))
    kind: ScheduleKind = "1f1b" if workload.kind == "train" else "wavefront"
    names = tuple(device.name for device in cluster.devices)
    return _alone(names, stage, microbatch_choices(workload)[0], kind)


def _alone(names: tuple[str, ...], stage: Stage, num_microbatches: int, kind: ScheduleKind) -> Plan:
    return Plan(
        devices=names, stages=(stage,), num_microbatches=num_microbatches, schedule_kind=kind
    )


def _order(entry: Entry, objective: str) -> tuple[bool, bool, float]:
    """Sorts what can run before what can not, then by the QoE, then by the objective."""
    if not entry.can_run:
        return True, True, 0.0
    return False, bool(entry.broken), entry.value(objective)


def _bounds_time(qoe: QoE) -> bool:
    bounds = (qoe.latency_s, qoe.step_s, qoe.frame_rate_hz, qoe.ttft_s, qoe.tpot_s)
    return any(bound is not None for bound in bounds)


def _as_fast_as(rivals: list[Entry], qoe: QoE, workload: Workload) -> tuple[QoE, str]:
    """Returns the QoE with the time of the fastest rival as its bound, and a note about it."""
    times = [entry.value("time") for entry in rivals if entry.can_run]
    if not times:
        return qoe, ""
    field = "step_s" if workload.kind == "train" else "latency_s"
    note = f"no bound on time was given: {field} <= {min(times):.4g} s, that of the fastest rival"
    return qoe.model_copy(update={field: min(times)}), note


def _ours(
    profile: ModelProfile, cluster: Cluster, case: Case, effort_s: float | None
) -> tuple[Entry, SearchResult]:
    """Returns Dora's best plan; where none keeps the QoE, the one that comes nearest."""
    start_s = time.perf_counter()
    found = search(profile, cluster, case.workload, case.qoe, effort_s=effort_s)
    plans = found.plans[:1]
    if not plans:
        bare = QoE(
            objective=case.qoe.objective,
            percentile=case.qoe.percentile,
            max_accuracy_loss=case.qoe.max_accuracy_loss,
        )
        found = search(profile, cluster, case.workload, bare, effort_s=effort_s)
        plans = found.plans
    spent_s = time.perf_counter() - start_s
    if not plans:
        return Entry(planner=DORA, problem=found.problem, planning_s=spent_s), found
    tried = [judge(Entry(planner=DORA, plan=plan, planning_s=spent_s), case) for plan in plans]
    return min(tried, key=lambda e: (not e.can_run, e.excess)), found


def _with_gain(entry: Entry, ours: Entry, objective: str) -> Entry:
    if not (entry.can_run and ours.can_run and ours.value(objective)):
        return entry
    return entry.model_copy(update={"gain": entry.value(objective) / ours.value(objective)})


def _idle_network(ours: Entry, case: Case) -> float:
    """Returns the share of the time of a step, request or prompt in which nothing is sent."""
    assert ours.plan is not None
    timeline = play(ours.plan, case)
    # One rank for all, so that what goes on at the same time counts once.
    spans = [s.model_copy(update={"rank": 0}) for s in timeline.spans if s.lane == "network"]
    sending = timeline.model_copy(update={"spans": tuple(spans)})
    return 1 - sending.busy_s(0, "network") / timeline.makespan_s


def _names(stage: Stage) -> tuple[str, ...]:
    return tuple(replica.device for replica in stage.replicas)


def _placement(plan: Plan) -> list[tuple[int, tuple[str, ...]]]:
    return [(stage.first_block, _names(stage)) for stage in plan.stages]


def _used(plan: Plan) -> tuple[str, ...]:
    return tuple(name for stage in plan.stages for name in _names(stage))
