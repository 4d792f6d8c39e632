"""Judges the planner against all plans of small problems, and by its speed on large ones.

Optimality: random small clusters and models, planned with the default effort and solved by trying
every plan under the same simulator (`planner_brute`). Speed: clusters of 6 to 200 devices, each in
a process of its own on one core. Estimate: what each freedom of a plan is worth
(`planner_estimate`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import inf
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import planner_estimate
from common import Metric, Row, Samples, Table, finish, write_csv
from planner_brute import Brute, Front, every_value, hypervolume
from planner_instances import Instance, campus, small

from dora.planner import search
from dora.spec import Plan, QoE

# Seeds 0, 1, ... until so many problems have a plan; a few have no room for the model.
NUM_SMALL, NUM_SMALL_QUICK = 300, 40
# Plans that gain less than this may be missing inside the true front.
FRONT_TOLERANCE = 1e-3
CLOSE, EQUAL = 0.01, 1e-6
# (devices, blocks, most seconds).
SPEED_CASES = [(6, 32, 1.0), (12, 48, 3.0), (40, 48, 15.0), (200, 96, 90.0)]
MOST_BYTES = 2e9
NUM_HOMES, NUM_HOMES_QUICK = 1000, 40
# Limits between clusters where computing, both and sending take most of the time.
BANDS = (0.1, 0.5, 2.0, 10.0)


def in_processes(function: Callable[[int], Any], seeds: Iterable[int]) -> Iterator[Any]:
    """Yields the results for those seeds in order, from one process per core."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        yield from pool.map(function, seeds, chunksize=2)


# ------------------------------------------------------------ optimality


class Verdict(NamedTuple):
    """The planner's plans of one problem beside the best ones.

    Attributes:
        ratio: Its value over the least; infinite if only brute force found a plan, 0 if none is.
        volume: Its hypervolume over that of the true front.
        bound: Largest lower bound over what the plan it is of takes.
        tiny_ratio: Its value over the least of all plans at all shares, if so few that all of them
            were played without any bound; otherwise 0.
    """

    seed: int
    text: str
    ratio: float
    volume: float
    bound: float
    tiny_ratio: float
    brute_s: float
    search_s: float


def judge(seed: int) -> Verdict:
    """Plans and solves one small problem."""
    one = small(seed)
    start = time.process_time()
    brute = Brute(one.profile, one.cluster, one.workload)
    least_s, least_j = brute.least("time"), brute.least("energy")
    qoe = one.qoe(least_s, least_j) if least_s < inf else QoE(objective=one.objective)
    limits = qoe.step_s or qoe.latency_s or inf, qoe.energy_j or inf
    best = brute.least(one.objective, *limits)
    front = brute.complete(FRONT_TOLERANCE) if best < inf else Front()
    middle = time.process_time()
    chosen = _plans(one, qoe)
    end = time.process_time()
    value = min((v[one.objective == "energy"] for v in _values(chosen)), default=inf)
    if best == inf:
        return Verdict(
            seed, one.text, inf if chosen else 0.0, 1, 1, 0, middle - start, end - middle
        )
    volume = share_of_volume(_values(_plans(one, QoE(objective=one.objective))), front)
    tiny = 0.0
    if len(one.cluster.devices) == 3 and one.workload.batch_size <= 8:
        fronts = Front()
        for pair in every_value(one.profile, one.cluster, one.workload, all_shares=True):
            fronts.add(pair)
        tiny = value / fronts.least(one.objective, *limits)
    return Verdict(
        seed, one.text, value / best, volume, brute.worst_bound, tiny, middle - start, end - middle
    )


def _plans(one: Instance, qoe: QoE) -> list[Plan]:
    return search(one.profile, one.cluster, one.workload, qoe).plans


def _values(plans: Sequence[Plan]) -> list[tuple[float, float]]:
    return [(p.cost.makespan_s, p.cost.energy_j) for p in plans if p.cost is not None]


def share_of_volume(values: Sequence[tuple[float, float]], true: Front) -> float:
    """Returns the hypervolume over that of the true front.

    Both up to 1.1 times the worst time and energy of either front.
    """
    own = Front()
    for value in values:
        own.add(value)
    both = own.values + true.values
    reference = 1.1 * max(v[0] for v in both), 1.1 * max(v[1] for v in both)
    return hypervolume(own.values, reference) / hypervolume(true.values, reference)


class Report:
    """Collects rows and bounds while tables are printed."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.metrics: dict[str, Metric] = {}

    def add(self, case: str, metric: str, unit: str, values: Sequence[float]) -> None:
        self.rows.append(Row(case, "dora", metric, unit, Samples(values)))

    def check(self, name: str, value: float, bound: str, ok: bool | None, unit: str = "1") -> None:
        reason = "--quick" if ok is None else ""
        self.metrics[name] = Metric(float(f"{value:.6g}"), unit, bound, ok, reason)


def optimality(report: Report, wanted: int) -> None:
    """Judges problems until `wanted` of them have a plan, and shows those that are not solved."""
    header = [
        "not equal, or hypervolume below 0.98",
        "value / least",
        "at all shares",
        "hypervolume",
    ]
    table = Table(header, width=(56, 14))
    verdicts: list[Verdict] = []
    # One in thirty has no plan.
    seeds = range(wanted + wanted // 10)
    for verdict in in_processes(judge, seeds):
        verdicts.append(verdict)
        if max(verdict.ratio, verdict.tiny_ratio) > 1 + EQUAL or verdict.volume < 0.98:
            tiny = f"{verdict.tiny_ratio:.6f}" if verdict.tiny_ratio else "-"
            cells = f"{verdict.ratio:.6f}", tiny, f"{verdict.volume:.4f}"
            table.line(f"{verdict.seed}: {verdict.text}", *cells)
        if verdict.ratio > 0:
            case = f"small {verdict.seed}: {verdict.text}"
            report.add(case, "value_over_least", "1", [verdict.ratio])
            report.add(case, "hypervolume_share", "1", [verdict.volume])
    solved = [v for v in verdicts if v.ratio > 0]
    ratios, volumes = [v.ratio for v in solved], Samples([v.volume for v in solved])
    tiny = [v.tiny_ratio for v in solved if v.tiny_ratio > 0]
    report.check("problems", len(solved), f">= {NUM_SMALL}", len(solved) >= NUM_SMALL or None)
    close = sum(r <= 1 + CLOSE for r in ratios) / len(ratios)
    report.check("within_1_percent", close, ">= 1", close >= 1)
    equal = sum(r <= 1 + EQUAL for r in ratios) / len(ratios)
    report.check("equal", equal, ">= 0.95", equal >= 0.95)
    report.check("hypervolume_median", volumes.median, ">= 0.98", volumes.median >= 0.98)
    worst = min(volumes.values)
    report.check("hypervolume_worst", worst, ">= 0.98", worst >= 0.98)
    bound = max(v.bound for v in solved)
    report.check("bound_over_value", bound, "<= 1", bound <= 1 + 1e-9)
    print(f"{len(solved)} problems; {len(verdicts) - len(solved)} have no plan, for both")
    print(f"within 1 %: {close:.2%}, equal: {equal:.2%}, worst {max(ratios):.4f}")
    print(f"better by uneven shares: {sum(r < 1 - EQUAL for r in ratios)}, to {min(ratios):.4f}")
    print(f"all shares, no bounds, {len(tiny)} problems: worst {max(tiny, default=1):.4f}")
    print(f"hypervolume: {volumes}, worst {worst:.4f}")
    report.add("small", "value_over_least", "1", ratios)
    report.add("small", "hypervolume_share", "1", volumes.values)
    report.add("small, all shares", "value_over_least", "1", tiny or [1.0])
    for name in ("brute_s", "search_s"):
        samples = Samples([getattr(v, name) for v in verdicts])
        print(f"{name}: {samples}, most {max(samples.values):.3g}")
        report.add("small", name, "s", samples.values)


# ------------------------------------------------------------ speed


class Speed(NamedTuple):
    """Of one search in a fresh process."""

    cpu_s: float
    wall_s: float
    peak_bytes: float
    gap: float
    num_played: int
    makespan_s: float


def plan_once(num_devices: int, num_blocks: int, kind: str) -> Speed:
    """Plans a campus on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    one = campus(num_devices, num_blocks)
    # Without a source every device would have the inputs, and replicas of all nothing to send.
    source = "d0" if kind == "infer" else None
    workload = one.workload.model_copy(update={"kind": kind, "source": source})
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    found = search(one.profile, one.cluster, workload)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    makespan_s = min((seconds for seconds, _ in _values(found.plans)), default=inf)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024.0 for line in status if line.startswith("VmHWM"))
    return Speed(cpu_s, wall_s, peak, found.gap, found.num_evaluated, makespan_s)


def speed(report: Report, cases: Sequence[tuple[int, int, float]]) -> None:
    """Plans each case once, in a process of its own."""
    header = ["devices x blocks", "one core s", "wall s", "peak MB", "played", "gap"]
    table = Table(header, width=(24, 12))
    # A fresh interpreter: memory of this process does not count.
    context = multiprocessing.get_context("spawn")
    for num_devices, num_blocks, most_s in cases:
        taken: list[Speed] = []
        for kind in ("train", "infer"):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found = pool.submit(plan_once, num_devices, num_blocks, kind).result()
            taken.append(found)
            case = f"{num_devices}x{num_blocks} {kind}"
            numbers = f"{found.cpu_s:.2f}", f"{found.wall_s:.2f}", f"{found.peak_bytes / 1e6:.0f}"
            table.line(case, *numbers, str(found.num_played), f"{found.gap:.2f}")
            for field, unit in (("cpu_s", "s"), ("wall_s", "s"), ("peak_bytes", "B"), ("gap", "1")):
                report.add(case, field, unit, [getattr(found, field)])
        name, worst_s = f"plan_{num_devices}x{num_blocks}", max(t.cpu_s for t in taken)
        report.check(name, worst_s, f"< {most_s:g}", worst_s < most_s, "s")
        peak = max(t.peak_bytes for t in taken)
        report.check(f"{name}_peak", peak, f"< {MOST_BYTES:g}", peak < MOST_BYTES, "B")

    for num_devices, num_blocks, most_s in SPEED_CASES[len(cases) :]:
        skipped = Metric(None, "s", f"< {most_s:g}", None, "--quick")
        report.metrics[f"plan_{num_devices}x{num_blocks}"] = skipped


def plot_growth(report: Report, path: Path) -> None:
    """Draws the seconds over devices x blocks, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot of the growth: pip install 'dora-parallel[report]' brings matplotlib")
        return
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind in ("train", "infer"):
        rows = [r for r in report.rows if r.metric == "cpu_s" and r.case.endswith(kind)]
        sizes = [r.case.split()[0].split("x") for r in rows]
        x = [int(devices) * int(blocks) for devices, blocks in sizes]
        axes.loglog(x, [r.samples.median for r in rows], "o-", label=kind)
    axes.loglog(
        [d * b for d, b, _ in SPEED_CASES], [s for *_, s in SPEED_CASES], "k:", label="limit"
    )
    axes.set(xlabel="devices x blocks", ylabel="seconds to plan, one core")
    axes.legend()
    figure.savefig(path)
    print(f"growth: {path}")


# ------------------------------------------------------------ estimate


def estimate(report: Report, count: int) -> None:
    """Shows what each freedom of a plan is worth on `count` clusters."""
    found = list(in_processes(planner_estimate.gains, range(count)))
    header = ["gain", "mean", "median", "max", "min", *(f"ratio < {b:g}" for b in BANDS[1:])]
    table = Table(header, width=(48, 12))
    for key, label in planner_estimate.LABELS.items():
        values = Samples([one[key] for one in found])
        bands = [
            geometric_mean([one[key] for one in found if low <= one["ratio"] < high] or [1.0])
            for low, high in zip(BANDS, BANDS[1:], strict=False)
        ]
        mean = geometric_mean(values.values)
        numbers = mean, values.median, max(values.values), min(values.values), *bands
        table.line(label, *(f"{x:.3f}" for x in numbers))
        report.add("home", key, "1", values.values)
        for name, number in zip(("mean", "max", "min"), (mean, *numbers[2:4]), strict=False):
            report.add("home", f"{key}_{name}", "1", [number])
        for high, number in zip(BANDS[1:], bands, strict=True):
            report.add(f"home, ratio < {high:g}", f"{key}_mean", "1", [number])
    # A single stage sends nothing: its gap is 0 whatever the order.
    gaps = Samples([one["gap"] for one in found if one["num_stages"] > 1])
    print(f"order over its lower bound: median {gaps.median:.3%}, worst {max(gaps.values):.2%}")
    report.add("home, several stages", "order_gap", "1", gaps.values)
    report.check("order_gap_median", gaps.median, "<= 0.05", gaps.median <= 0.05)
    late = min(one["scheduler_over_first_come"] for one in found)
    report.check("scheduler_never_worse_than_first_come", late, ">= 1", late >= 1 - 1e-9)
    report.check("clusters", count, f">= {NUM_HOMES}", count >= NUM_HOMES or None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer problems: under 50 s")
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    report = Report()
    optimality(report, NUM_SMALL_QUICK if options.quick else NUM_SMALL)
    speed(report, SPEED_CASES[:2] if options.quick else SPEED_CASES)
    estimate(report, NUM_HOMES_QUICK if options.quick else NUM_HOMES)
    if options.out:
        write_csv(options.out, report.rows)
        plot_growth(report, Path(options.out).with_suffix(".svg"))
    return finish(report.metrics)


if __name__ == "__main__":
    sys.exit(main())
