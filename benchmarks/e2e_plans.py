"""Who takes part in `bench_e2e.py`: Dora and its rivals, all planning with the same profiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from e2e_tasks import Task

from dora.compare import best_of
from dora.errors import InfeasiblePlanError
from dora.judge import Case, Entry, case_of, play
from dora.planner import search
from dora.planner.baselines import BASELINES
from dora.spec import BlockCost, Cluster, ModelProfile, Plan, QoE, Timeline, Timing

DORA, THRIFTY = "dora", "dora for energy"
RIVALS = (
    "best-single",
    "memory-proportional",
    "edgeshard-latency",
    "edgeshard-throughput",
    "asteroid",
    "alpa-like",
    "metis-like",
)
TORCH_PIPELINE, DDP = "torch pipeline, even", "DDP"
# Energy is compared among all that take at most this many times as long as Dora's plan should.
RELAXED = 1.5
# A plan that is predicted to take this many times as long as Dora's runs over the engine alone.
HOPELESS = 2.0


class Contender(NamedTuple):
    """Something that runs a task.

    Attributes:
        planners: Who made the plan; several if they agree.
        over: 'engine', 'engine, first come' (without the plan's order of transfers) or 'gloo'.
        kind: Of `e2e_worker.KINDS`.
        predicted: What the simulator says of a plan.
    """

    planners: tuple[str, ...]
    over: str
    kind: str = "plan"
    plan: Plan | None = None
    predicted: Timeline | None = None

    @property
    def name(self) -> str:
        return f"{' = '.join(self.planners)} | {self.over}"

    @property
    def transport(self) -> str:
        return "gloo" if self.over == "gloo" else "dora"

    @property
    def discipline(self) -> str:
        return "fair" if self.over == "gloo" else "priority"

    @property
    def devices(self) -> set[str] | None:
        """The devices that take part; None is all."""
        if self.plan is None:
            return None
        return {r.device for stage in self.plan.stages for r in stage.replicas}


def contenders(task: Task, profile: ModelProfile, cluster: Cluster) -> Iterator[Contender]:
    """Yields all that run the task; equal plans of several planners come once."""
    case = case_of(profile, cluster, task.workload, QoE())
    by_content: dict[str, tuple[list[str], Plan]] = {}
    plans = dict(_plans(task, profile, cluster, case))
    for name, plan in plans.items():
        by_content.setdefault(_content(plan), ([], plan))[0].append(name)
    limit_s = HOPELESS * play(by_content[_content(plans[DORA])][1], case).makespan_s
    for names, plan in by_content.values():
        linked = plan.model_copy(update={"links": cluster.links})
        yield from _ways(tuple(names), linked, case, limit_s)
    yield Contender((TORCH_PIPELINE,), "gloo", "torch-pipeline")
    if task.is_training:
        yield Contender((DDP,), "gloo", "ddp")
        yield Contender((DDP,), "engine", "ddp")


def _plans(
    task: Task, profile: ModelProfile, cluster: Cluster, case: Case
) -> Iterator[tuple[str, Plan]]:
    ours = search(profile, cluster, task.workload, QoE()).plans[0]
    yield DORA, ours
    for name in RIVALS:
        try:
            answer = Entry(planner=name, plan=BASELINES[name](profile, cluster, task.workload))
        except InfeasiblePlanError:
            continue
        found = best_of(answer, case)
        if found.can_run and found.plan is not None:
            yield name, found.plan
    assert ours.cost is not None
    bound = {"step_s" if task.is_training else "latency_s": ours.cost.makespan_s * RELAXED}
    qoe = QoE.model_validate({**bound, "objective": "energy"})
    for plan in search(profile, cluster, task.workload, qoe).plans[:1]:
        yield THRIFTY, plan


def _ways(names: tuple[str, ...], plan: Plan, case: Case, limit_s: float) -> Iterator[Contender]:
    """Yields a plan over every transport that makes a difference; hopeless ones over one."""
    bare, predicted = plan.model_copy(update={"transfers": ()}), play(plan, case)
    yield Contender(names, "engine", plan=plan, predicted=predicted)
    is_alone = len({r.device for stage in plan.stages for r in stage.replicas}) == 1
    if is_alone or predicted.makespan_s > limit_s:
        return
    if DORA in names and plan.transfers:
        yield Contender(names, "engine, first come", plan=bare, predicted=play(bare, case))
    yield Contender(names, "gloo", plan=bare, predicted=play(bare, case, discipline="fair"))


def predicted_at(
    contender: Contender,
    slowdowns: Mapping[str, float],
    task: Task,
    profile: ModelProfile,
    cluster: Cluster,
) -> Timeline:
    """Returns what a plan takes where devices need so many times as long as they were profiled."""
    assert contender.plan is not None
    case = case_of(_slowed(profile, slowdowns), cluster, task.workload, QoE())
    return play(contender.plan, case, discipline=contender.discipline)


def _slowed(profile: ModelProfile, factors: Mapping[str, float]) -> ModelProfile:
    def timing(given: Timing) -> Timing:
        times = {
            name: getattr(given, name) * factors[given.device]
            for name in ("forward_s", "backward_s")
        }
        return given.model_copy(update=times)

    def cost(given: BlockCost) -> BlockCost:
        return given.model_copy(update={"timings": tuple(map(timing, given.timings))})

    blocks = [b.model_copy(update={"costs": tuple(map(cost, b.costs))}) for b in profile.blocks]
    return profile.model_copy(update={"blocks": tuple(blocks)})


def _content(plan: Plan) -> str:
    return plan.model_copy(update={"cost": None, "transfers": (), "links": ()}).to_json()
