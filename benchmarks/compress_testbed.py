"""Whole steps and requests with codecs on a testbed, for `bench_compress.py`; also runs by itself.

Three equal devices share one radio channel, which traffic between them crosses twice. A placement
is fixed: in training two replicas feed a second stage, so that activations, their gradients and
sums of gradients travel; in inference three stages follow each other. It runs with the codecs that
the planner chooses for it under a bound of the accuracy loss, without any, and with int8 or int4
for all that travels; all in the same processes, in turns. Every device has profiled the blocks and
the codecs within its share of the processor.

The planner promises to be no more than 3 % slower than the best fixed choice that its bound
allows: one that loses no more on these data, as the guard measures it. Predictions are of the
simulator. Needs root; about 5 minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from common import Metric, Row, Samples, Table, finish, paired_ratio, write_csv
from e2e_fleet import Fleet
from e2e_tasks import TASKS, Task

from dora.catalog import load_cluster
from dora.judge import case_of, play
from dora.planner import recoded
from dora.profiler import merge_profiles
from dora.spec import (
    BoundaryCodec,
    Cluster,
    ModelProfile,
    Plan,
    QoE,
    routes_from_shares,
    warmup_for,
)
from dora.testbed import why_not

RATES_MBIT = (100, 1000)
# Between them lies what int4 loses on Gaussian values.
BOUNDS = (0.01, 0.03)
FIXED = ("none", "int8", "int4")
SLOWER_AT_MOST = 1.03
# Turns of all contenders of a cell, and how often each runs in one.
REPEATS, QUICK_REPEATS, REQUESTS = 7, 4, 3
# Of so much accuracy loss no fixed choice is refused; it is measured all the same.
ALL_ALLOWED = 1e9
# The guard measures over three calls and goes through at most four kinds of codecs.
MEASURING_CALLS = 13
# Weights are spread, and codecs measured, over a network that is not what is to be timed.
BUILD_MBIT = 10_000


class Placement(NamedTuple):
    """Blocks and devices of the stages, as (share of the blocks at the end, devices)."""

    task: str
    stages: tuple[tuple[float, tuple[str, ...]], ...]
    num_microbatches: int


TRAINING = Placement("charlm-train", ((0.65, ("pi-a", "pi-b")), (1.0, ("pi-c",))), 4)
INFERENCE = Placement("vit-frames", ((0.35, ("pi-a",)), (0.65, ("pi-b",)), (1.0, ("pi-c",))), 4)


class Contender(NamedTuple):
    """A choice of codecs.

    Attributes:
        name: Of the plan in the workers.
        chosen_by: 'never', 'always int8', 'planner within 0.03'; several if they agree.
    """

    name: str
    chosen_by: list[str]
    plan: Plan
    predicted_s: float


class Cell(NamedTuple):
    """All contenders at one rate, and what they took."""

    task: Task
    rate_mbit: int
    contenders: list[Contender]
    times_s: dict[str, list[float]]
    lost: Mapping[str, tuple[float | None, str]]

    @property
    def title(self) -> str:
        return f"{self.task.name} {self.rate_mbit} Mbit/s"

    def chosen(self, by: str) -> Contender:
        """Returns the contender of that choice."""
        return next(c for c in self.contenders if by in c.chosen_by)

    def samples(self, by: str) -> Samples:
        """Returns what that choice took."""
        return Samples(self.times_s[self.chosen(by).name])


# ------------------------------------------------------------ plans


def placed(placement: Placement, num_blocks: int, cluster: Cluster) -> Plan:
    """Returns the plan without codecs; its devices take turns on the channel."""
    m, stages, first = placement.num_microbatches, [], 0
    shares = [[1 / len(names)] * len(names) for _, names in placement.stages]
    for index, (end, names) in enumerate(placement.stages):
        last = round(end * num_blocks) - 1
        replicas = [{"device": name, "share": 1 / len(names)} for name in names]
        stage = {"index": index, "first_block": first, "last_block": last, "replicas": replicas}
        stages.append(stage)
        first = last + 1
    is_training = TASKS[placement.task].is_training
    return Plan.model_validate(
        {
            "devices": tuple(device.name for device in cluster.devices),
            "links": cluster.links,
            "stages": stages,
            "num_microbatches": m,
            "routes": routes_from_shares(shares, m),
            "warmup": warmup_for(shares, extra=1),
            "schedule_kind": "1f1b" if is_training else "wavefront",
        }
    )


def everywhere(plan: Plan, codec: str, *, training: bool) -> Plan:
    """Returns the plan with one codec for all that travels."""
    if codec == "none":
        return plan
    pair = BoundaryCodec.model_validate(
        {"forward": codec, "backward": codec if training else "none"}
    )
    sums = tuple(codec if len(stage.replicas) > 1 else "none" for stage in plan.stages)
    update = {
        "codecs": (pair,) * (len(plan.stages) - 1),
        "gradient_codecs": sums if training and set(sums) != {"none"} else (),
        "max_accuracy_loss": ALL_ALLOWED,
    }
    return Plan.model_validate({**plan.model_dump(), **update})


def choices(
    plan: Plan, profile: ModelProfile, cluster: Cluster, task: Task
) -> Iterator[tuple[str, Plan]]:
    """Yields all choices of codecs for one placement."""
    for name in FIXED:
        by = "never" if name == "none" else f"always {name}"
        yield by, everywhere(plan, name, training=task.is_training)
    for bound in BOUNDS:
        yield f"planner within {bound:g}", recoded(profile, cluster, task.workload, plan, bound)


def contenders(plan: Plan, profile: ModelProfile, cluster: Cluster, task: Task) -> list[Contender]:
    """Returns the choices; equal ones once."""
    case = case_of(profile, cluster, task.workload, QoE())
    found: dict[str, Contender] = {}
    for by, one in choices(plan, profile, cluster, task):
        name = codecs_of(one)
        if name not in found:
            predicted_s = play(one, case).makespan_s
            found[name] = Contender(name, [], one, predicted_s)
        found[name].chosen_by.append(by)
    return list(found.values())


def codecs_of(plan: Plan) -> str:
    """Returns for example 'int8/int8, sums int8'."""
    is_training = plan.schedule_kind != "wavefront"
    pairs = [f"{c.forward}/{c.backward}" if is_training else c.forward for c in plan.codecs]
    sums = [name for name in plan.gradient_codecs if name != "none"]
    text = " | ".join(pairs) + ", sums " * bool(sums) + " ".join(sums)
    return text or "none"


# ------------------------------------------------------------ measuring


def at_rate(fleet: Fleet, rate_mbit: float) -> Cluster:
    """Sets the channel's rate; returns the cluster as it is then."""
    (medium,) = fleet.testbed.cluster.media
    rate = rate_mbit * 1e6 / 8
    fleet.testbed.set_rate(medium.name, rate / medium.rate_bytes_per_s)
    media = (medium.model_copy(update={"rate_bytes_per_s": rate}),)
    return fleet.testbed.cluster.model_copy(update={"media": media})


def profiled(fleet: Fleet, placement: Placement) -> ModelProfile:
    """Measures the blocks on all devices at once, each within its own share."""
    size = TASKS[placement.task].workload.batch_size // placement.num_microbatches
    fleet.testbed.limit()
    names = [device.name for device in fleet.testbed.cluster.devices]
    parts = fleet.ask("profile", [(placement.task, name, [size]) for name in names])
    fleet.testbed.lift()
    return merge_profiles([ModelProfile.from_json(part) for part in parts])


def run_placement(fleet: Fleet, placement: Placement, repeats: int) -> list[Cell]:
    """Measures a placement at all rates."""
    task = TASKS[placement.task]
    profile = profiled(fleet, placement)
    plan = placed(placement, len(profile.blocks), fleet.testbed.cluster)
    by_rate = {rate: contenders(plan, profile, at_rate(fleet, rate), task) for rate in RATES_MBIT}
    at_rate(fleet, BUILD_MBIT)
    lost = {}
    for one in {c.name: c for found in by_rate.values() for c in found}.values():
        fleet.ask_all("build", one.name, "plan", task.name, "dora", one.plan.to_json())
        fleet.ask_all("run", one.name, MEASURING_CALLS if one.plan.max_accuracy_loss else 1)
        lost[one.name] = fleet.ask_all("codecs", one.name)[0]
    fleet.testbed.limit()
    cells = []
    for rate, found in by_rate.items():
        at_rate(fleet, rate)
        cells.append(Cell(task, rate, found, take_turns(fleet, task, found, repeats), lost))
        show(cells[-1])
    fleet.testbed.lift()
    fleet.ask_all("close")
    return cells


def take_turns(
    fleet: Fleet, task: Task, entrants: Sequence[Contender], repeats: int
) -> dict[str, list[float]]:
    """Lets all run in turns, in changing order; the first turn only warms up."""
    count = 1 if task.is_training else REQUESTS
    times_s: dict[str, list[float]] = {one.name: [] for one in entrants}
    for i in range(repeats + 1):
        for one in list(entrants)[:: 1 if i % 2 else -1]:
            ranks = fleet.ask_all("run", one.name, count)
            if i:
                times_s[one.name].append(
                    median(max(rank[j][0] for rank in ranks) for j in range(count))
                )
    return times_s


# ------------------------------------------------------------ results


def show(cell: Cell) -> None:
    """Prints one line per contender."""
    header = ("ms", "over never", "predicted", "accuracy loss", "guard")
    table = Table((f"{cell.title}: codecs", *header), width=(44, 20))
    never = cell.samples("never")
    for one in cell.contenders:
        times = Samples(cell.times_s[one.name])
        lost, said = cell.lost[one.name]
        error = one.predicted_s / times.median - 1
        table.line(
            one.name,
            str(Samples([1e3 * t for t in times.values])),
            f"{paired_ratio(times, never).median:.3f}",
            f"{1e3 * one.predicted_s:.0f} ({error:+.0%})",
            "" if lost is None else f"{lost:.2g}",
            f"  {', '.join(one.chosen_by)}{refusals(cell, one)}",
        )
        if "refused" in said:
            print(f"    guard: {said}")


def refusals(cell: Cell, one: Contender) -> str:
    """Returns which bounds a fixed choice breaks, as the guard measured it."""
    lost = cell.lost[one.name][0]
    broken = [f"{bound:g}" for bound in BOUNDS if lost is not None and lost > bound]
    return f"; refused by the guard within {' and '.join(broken)}" if broken else ""


def is_allowed(cell: Cell, one: Contender, bound: float) -> bool:
    """Returns whether the guard's measurement admits a fixed choice."""
    return (cell.lost[one.name][0] or 0.0) <= bound


def rows(cell: Cell) -> Iterator[Row]:
    """Yields the lines of the result file."""
    for one in cell.contenders:
        who = f"{' = '.join(one.chosen_by)}: {one.name}{refusals(cell, one)}"
        yield Row(cell.title, who, "measured_time", "s", Samples(cell.times_s[one.name]))
        yield Row(cell.title, who, "predicted_time", "s", Samples([one.predicted_s]))
        lost = cell.lost[one.name][0]
        if lost is not None:
            yield Row(cell.title, who, "accuracy_loss", "1", Samples([lost]))


def verdict(cell: Cell, *, is_quick: bool) -> dict[str, Metric]:
    """Returns the planner's choices over the best fixed ones, and what codecs gain."""
    case = cell.title.replace(" ", "_").replace("/", "")
    reason = "too few turns; run without --quick" if is_quick else ""
    fixed = [one for one in cell.contenders if not one.chosen_by[0].startswith("planner")]
    found = {}
    for bound in BOUNDS:
        ours = cell.samples(f"planner within {bound:g}")
        allowed = [one for one in fixed if is_allowed(cell, one, bound)]
        ratio = ours.median / min(median(cell.times_s[one.name]) for one in allowed)
        found[f"{case}_within_{bound:g}_over_best_fixed"] = Metric(
            round(ratio, 4),
            "x",
            f"<= {SLOWER_AT_MOST:g}",
            None if is_quick else ratio <= SLOWER_AT_MOST,
            reason,
        )
        gain = paired_ratio(cell.samples("never"), ours).median
        found[f"{case}_within_{bound:g}_gain_over_never"] = Metric(round(gain, 3), "x", "", None)
    errors = [abs(c.predicted_s / median(cell.times_s[c.name]) - 1) for c in cell.contenders]
    found[f"{case}_prediction_error_most"] = Metric(round(max(errors), 3), "1", "", None)
    return found


def testbed(*, is_quick: bool) -> tuple[list[Row], dict[str, Metric]]:
    """Returns rows and metrics; quickly, of inference alone."""
    if reason := why_not():
        return [], {"testbed": Metric(None, "x", "<= 1.03", None, f"the testbed {reason}")}
    start_s = time.monotonic()
    cluster = load_cluster(Path(__file__).with_name("clusters") / "trio.toml")
    cells: list[Cell] = []
    with Fleet(cluster) as fleet:
        print(fleet.testbed.summary, flush=True)
        for placement in (INFERENCE,) if is_quick else (INFERENCE, TRAINING):
            cells += run_placement(fleet, placement, QUICK_REPEATS if is_quick else REPEATS)
    metrics = {k: v for cell in cells for k, v in verdict(cell, is_quick=is_quick).items()}
    metrics["testbed_wall"] = Metric(round(time.monotonic() - start_s, 1), "s", "", None)
    return [row for cell in cells for row in rows(cell)], metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="inference alone, few turns")
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    found, metrics = testbed(is_quick=options.quick)
    if options.out:
        write_csv(options.out, found)
    return finish(metrics)


if __name__ == "__main__":
    sys.exit(main())
