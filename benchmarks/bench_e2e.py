"""Dora against other planners and runtimes, measured end to end on the testbed.

Real processes, sockets and contention: every device is a network namespace with a share of the
processor, every medium a token bucket (`dora.testbed`). Every device profiles the model within its
share; all planners get these profiles and the emulated cluster. Their plans are run by Dora's
executor, over gloo and over the engine, beside torch.distributed.pipelining and DDP on gloo.

All contenders of a cell live in the same processes and take turns. Needs root and a machine that
does nothing else; about an hour, with --quick one cell.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from common import Metric, finish, write_csv
from e2e_fleet import Fleet
from e2e_plans import HOPELESS, Contender, contenders, predicted_at
from e2e_report import bounds, rows, show
from e2e_tasks import TASKS, Task, network_factor

from dora.catalog import load_cluster, scenario
from dora.profiler import merge_profiles
from dora.search import microbatch_sizes
from dora.simulator import device_j
from dora.spec import Activity, Cluster, ModelProfile, Timeline
from dora.testbed import why_not

CLUSTERS = Path(__file__).with_name("clusters")
SCENARIOS = ("smart-home-1", "smart-home-2", "traffic", "edge-cluster")
# Turns of every contender; one more before them warms up.
REPEATS = 3
REQUESTS = 2  # in a turn
# Weights are spread over a network this many times as fast: that is not what is measured.
BUILD_FACTOR = 100.0
FRAMES = 8
# Frames come this many times as far apart as Dora's plan should take for one, and are of use for
# this many times as long.
FRAME_GAP, FRAME_DEADLINE = 1.25, 1.5


class Result(NamedTuple):
    """What a contender did: seconds, joules as modelled from measured activity, one timeline.

    Attributes:
        slowdowns: Of each turn, by device: processor time of the same work over that when profiled.
        predicted_now: What the plan takes with the median of these.
        in_time: Share of the frames of a stream that were done by their deadline.
        memory: Of each device of Dora's plan, (predicted, measured) bytes.
    """

    contender: Contender
    times_s: list[float]
    energy_j: list[float]
    slowdowns: list[dict[str, float]]
    predicted_now: Timeline | None = None
    timeline: Timeline | None = None
    in_time: float | None = None
    memory: tuple[tuple[str, int, int], ...] = ()


class Cell(NamedTuple):
    """One task on one cluster."""

    scenario: str
    task: Task
    network: float
    results: list[Result]


def cluster_of(name: str) -> Cluster:
    """Returns a scenario's cluster, or its smaller version where it does not fit the machine."""
    path = CLUSTERS / f"{name}.toml"
    return load_cluster(path) if path.exists() else scenario(name).cluster


def profiled(fleet: Fleet, task: Task) -> tuple[ModelProfile, list[float]]:
    """Measures the blocks on all devices at once, each within its own share.

    Returns:
        The profile, and how long each device took for a pass while it was made.
    """
    fleet.testbed.limit()
    names = [device.name for device in fleet.testbed.cluster.devices]
    sizes = sorted({1, *microbatch_sizes(task.workload)[::-2]})  # times beyond the largest mislead
    before = fleet.ask_all("pass_s", task.name)
    parts = fleet.ask("profile", [(task.name, name, sizes) for name in names])
    passes_s = [mean(pair) for pair in zip(before, fleet.ask_all("pass_s", task.name), strict=True)]
    fleet.testbed.lift()
    return merge_profiles([ModelProfile.from_json(part) for part in parts]), passes_s


def set_network(fleet: Fleet, factor: float) -> Cluster:
    """Sets all media to a multiple of their rates; returns the cluster as it is then."""
    cluster = fleet.testbed.cluster
    for medium in cluster.media:
        fleet.testbed.set_rate(medium.name, factor)
    media = [
        m.model_copy(update={"rate_bytes_per_s": m.rate_bytes_per_s * factor})
        for m in cluster.media
    ]
    return cluster.model_copy(update={"media": tuple(media)})


# ------------------------------------------------------------ measuring


def run_cell(fleet: Fleet, name: str, task: Task, repeats: int) -> Cell:
    """Profiles, plans and measures one task on one cluster."""
    say = progress(f"{name} {task.name}")
    profile, passes_s = profiled(fleet, task)
    say("profiled")
    factor = network_factor(task, profile)
    cluster = set_network(fleet, factor)
    entrants = list(contenders(task, profile, cluster))
    say(f"{len(entrants)} contenders planned")
    set_network(fleet, BUILD_FACTOR)
    for e in entrants:
        plan = e.plan.to_json() if e.plan else ""
        fleet.ask_all("build", e.name, e.kind, task.name, e.transport, plan)
    set_network(fleet, factor)
    say("built")
    found = take_turns(fleet, task, entrants, repeats, passes_s)
    for i, r in enumerate(found):
        if r.contender.plan:
            again = predicted_at(r.contender, middle(r.slowdowns), task, profile, cluster)
            found[i] = r._replace(predicted_now=again)
    if task.is_stream:
        found = [stream(fleet, r, entrants[0]) if len(r.times_s) > REQUESTS else r for r in found]
    say("measured")
    timelines = {
        e.name: Timeline.from_json(fleet.ask_all("timeline", e.name)[0])
        for e in entrants
        if e.kind == "plan"
    }
    fleet.testbed.lift()
    fleet.ask_all("close")
    found = [r._replace(timeline=timelines.get(r.contender.name)) for r in found]
    found[0] = found[0]._replace(memory=memory(fleet, task, entrants[0]))
    say("done")
    return Cell(name, task, factor, found)


def progress(what: str) -> Callable[[str], None]:
    """Returns a function that says on stderr how far something is, and after how long."""
    start_s = time.monotonic()

    def say(done: str) -> None:
        print(f"{what}: {done} after {time.monotonic() - start_s:.0f} s", file=sys.stderr)

    return say


def take_turns(
    fleet: Fleet,
    task: Task,
    entrants: Sequence[Contender],
    repeats: int,
    passes_s: Sequence[float],
) -> list[Result]:
    """Lets all contenders run in turns, in changing order; `passes_s` is of the profile."""
    names = [device.name for device in fleet.testbed.cluster.devices]
    losses = {}
    for entrant in entrants:  # shapes are found once, at full speed
        ranks = fleet.ask_all("run", entrant.name, 1)
        known = [rank[0][1] for rank in ranks if not math.isnan(rank[0][1])]
        losses |= {entrant.name: known[-1]} if known else {}
    check_equal(losses)
    fleet.testbed.limit()
    found = {entrant.name: Result(entrant, [], [], []) for entrant in entrants}
    count = 1 if task.is_training else REQUESTS
    before = fleet.ask_all("pass_s", task.name)
    for i in range(repeats):
        fastest_s = min((median(r.times_s) for r in found.values() if r.times_s), default=0.0)
        for entrant in list(entrants)[:: 1 if i % 2 else -1]:
            # Who is far behind after the first turn has no other.
            times_s = found[entrant.name].times_s
            if i > 0 and median(times_s) > HOPELESS * fastest_s:
                continue
            begin_s = time.monotonic()
            ranks = fleet.ask_all("run", entrant.name, count)
            activity = fleet.testbed.activity((begin_s, time.monotonic()))
            taken_s = [max(rank[j][0] for rank in ranks) for j in range(count)]
            times_s.extend(taken_s)
            joules = energy_j(fleet, entrant, activity, sum(taken_s)) / count
            found[entrant.name].energy_j.append(joules)
            after = fleet.ask_all("pass_s", task.name)
            ratios = [(a + b) / 2 / p for a, b, p in zip(before, after, passes_s, strict=True)]
            found[entrant.name].slowdowns.append(dict(zip(names, ratios, strict=True)))
            before = after
    return [found[entrant.name] for entrant in entrants]


def middle(slowdowns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns each device's median."""
    return {name: median(turn[name] for turn in slowdowns) for name in slowdowns[0]}


def check_equal(losses: Mapping[str, float]) -> None:
    """Raises if contenders did not compute the same."""
    if losses and max(losses.values()) - min(losses.values()) > 1e-3 * abs(min(losses.values())):
        raise RuntimeError(f"losses differ: {losses}")


def energy_j(fleet: Fleet, entrant: Contender, activity: Activity, total_s: float) -> float:
    """Returns the joules of the devices that take part, over steps of so many seconds in all."""
    return sum(
        device_j(
            fleet.testbed.cluster.device(usage.device),
            busy_s=min(usage.busy_s, total_s),
            total_s=total_s,
            sent_bytes=usage.sent_bytes,
            received_bytes=usage.received_bytes,
        )
        for usage in activity.usage
        if entrant.devices is None or usage.device in entrant.devices
    )


def stream(fleet: Fleet, result: Result, ours: Contender) -> Result:
    """Adds how many frames of a stream, at a rate that suits Dora's plan, were done in time."""
    assert ours.predicted is not None
    frame_s = ours.predicted.makespan_s
    ranks = fleet.ask_all("run", result.contender.name, FRAMES, FRAME_GAP * frame_s)
    latencies_s = [max(rank[j][0] for rank in ranks) for j in range(FRAMES)]
    in_time = sum(latency_s <= FRAME_DEADLINE * frame_s for latency_s in latencies_s)
    return result._replace(in_time=in_time / FRAMES)


def memory(fleet: Fleet, task: Task, ours: Contender) -> tuple[tuple[str, int, int], ...]:
    """Returns predicted and measured peak bytes of the devices of Dora's plan, in training."""
    if not task.is_training:
        return ()
    assert ours.plan is not None and ours.predicted is not None
    measured = fleet.ask_all("memory", ours.kind, task.name, ours.transport, ours.plan.to_json())
    by_device = dict(zip(ours.plan.devices, measured, strict=True))
    return tuple((m.device, m.peak_bytes, by_device[m.device]) for m in ours.predicted.memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--quick", action="store_true", help="one task on one cluster")
    parser.add_argument("--out", type=Path, help="CSV file of all results")
    options = parser.parse_args()
    scenarios = options.scenario or (SCENARIOS[:1] if options.quick else SCENARIOS)
    tasks = options.task or (["minilm-requests"] if options.quick else list(TASKS))
    cells: list[Cell] = []
    failed = 0
    for name, task in product(scenarios, tasks):
        try:
            with Fleet(cluster_of(name)) as fleet:
                cells.append(run_cell(fleet, name, TASKS[task], options.repeats))
        except (RuntimeError, TimeoutError) as error:
            print(f"{name} {task} failed: {error}", flush=True)
            failed += 1
            continue
        except KeyboardInterrupt:
            print(f"stopped at {name} {task}", flush=True)
            break
        show(cells[-1])
        if options.out:
            write_csv(options.out, [row for cell in cells for row in rows(cell)])
    return finish({**bounds(cells), "failed_cells": Metric(failed, "1", "<= 0", failed == 0)})


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"bench_e2e: the testbed {reason}")
    sys.exit(main())
