"""The adapter against static plans, planning anew, and an oracle, on traces. Simulated.

With --testbed: beside a real job, see `adapter_testbed.py`.

Every run lives through one trace with the policy's own code (`dora.adapt.play_adapter`): the
adapter sees noisy measurements of what it uses, and pays for every move of weights. The objective
is least energy within the bounds of the cell; **tight** cells have time bounds at `TIGHT` times
what the fastest plan takes, since the bounds of the scenarios leave most plans room to spare.

**Static** is the plan of the bank that turns out best for the trace, known afterwards. **Anew**
searches at each change that its monitor finds, stops, and moves all weights. The **oracle** knows
the trace, and chooses the best sequence of plans of the bank and of all that the adapter found.
Where one generated rate is all that varies, **informed** knows its last value and its law, not the
next value (`adapter_informed.py`).

**Attained** is the share of requests or steps within all bounds; a late one counts as all that
should have been done meanwhile. Energy is per request or step. The time of
a decision is of the processor: other processes may run beside.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import adapter_traces
from adapter_informed import play_informed, varying
from adapter_traces import Trace
from common import Metric, Row, Samples, Table, finish, write_csv

from dora.adapt import (
    Predictor,
    Totals,
    best_static,
    make_bank,
    play_adapter,
    play_oracle,
    play_replanning,
    pricer,
    segments,
)
from dora.adapter import Monitor, Rules, Standing, compose, decide, placed
from dora.catalog import cell_profile, scenario, scenario_names
from dora.simulator import Dynamics
from dora.spec import Conditions, Plan, QoE
from dora.testbed import why_not

# Bounds of tight cells over the time of the fastest plan.
TIGHT = 1.5
# Cells by position in each scenario: each kind of workload, small and large models.
CELLS = {
    "smart-home-1": (0, 4, 6, 8, 12),
    "smart-home-2": (3, 4, 8, 12),
    "traffic": (0, 3, 5, 7, 10),
    "edge-cluster": (0, 4, 5, 12),
    "campus": (0, 4, 8, 14),
}
QUICK_CELLS = {"smart-home-1": (0,), "smart-home-2": (4,), "traffic": (3,)}
# What makes a run count, and what it is held to.
ORACLE_ATTAINS, ATTAINS, ENERGY = 0.98, 0.95, 1.10
BANK = 50


class Case(NamedTuple):
    """One cell to live through traces with."""

    name: str
    predict: Predictor
    bank: list[Plan]
    rules: Rules


class Result(NamedTuple):
    """One case in one trace."""

    case: str
    trace: Trace
    adapter: Totals
    static: Totals
    anew: Totals
    oracle: Totals
    informed: Totals | None = None

    @property
    def counts(self) -> bool:
        return self.oracle.attained >= ORACLE_ATTAINS

    @property
    def energy_ratio(self) -> float:
        return self.adapter.energy_j / self.oracle.energy_j if self.oracle.energy_j else 1.0


def cases(
    names: dict[str, tuple[int, ...]], worlds: int, *, tight_only: bool = False
) -> Iterator[Case]:
    for name, positions in names.items():
        given = scenario(name)
        for position in positions:
            cell = given.cells[position]
            profile = cell_profile(cell, given.cluster)
            loose = cell.qoe.model_copy(update={"objective": "energy"})
            predict = Predictor(profile, given.cluster, cell.workload, loose)
            bank = make_bank(predict, effort_s=0.1, max_worlds=worlds, max_plans=BANK)
            label = f"{name} {position} {cell.model} {cell.workload.kind}"
            if not tight_only:
                yield _case(label, predict, bank)
            tight = Predictor(profile, given.cluster, cell.workload, tightened(predict, bank))
            more = make_bank(tight, effort_s=0.1, max_worlds=worlds, max_plans=BANK)
            yield _case(f"{label} tight", tight, more)


def _case(name: str, predict: Predictor, bank: list[Plan]) -> Case:
    qoe = predict.qoe
    period_s = 1 / qoe.frame_rate_hz if qoe.frame_rate_hz else max(1.0, predict.usual_s)
    if predict.workload.kind == "train":
        period_s = 0.0
    return Case(name, predict, bank, Rules.of(qoe, period_s=period_s))


def tightened(predict: Predictor, bank: Sequence[Plan]) -> QoE:
    """Returns the QoE with every bound on time at `TIGHT` times what the fastest plan takes."""
    qoe, calm = predict.qoe, Conditions()
    found = [(f, plan) for plan in bank if (f := predict(plan, calm)) is not None]
    fastest = min(f.time_s for f, _ in found)
    excess = {
        limit.field: min(f.excess[k] for f, _ in found) for k, limit in enumerate(predict.limits)
    }
    update = {
        field: TIGHT * excess[field] * getattr(qoe, field)
        for field in ("latency_s", "step_s", "ttft_s", "tpot_s")
        if getattr(qoe, field) is not None
    }
    assert fastest > 0
    return qoe.model_copy(update=update)


def traces(case: Case, is_quick: bool) -> Iterator[Trace]:
    cluster, source = case.predict.cluster, case.predict.workload.source
    radios = adapter_traces.media_of(cluster)
    uplinks = adapter_traces.uplinks_of(cluster) or radios
    hot = [name for name in placed(case.bank[0])][:2]
    found = [
        *(adapter_traces.wifi(radios) if radios else ()),
        *(adapter_traces.lte(uplinks, range(1 if is_quick else 3)) if uplinks else ()),
        *adapter_traces.thermal(hot),
        *adapter_traces.churn(cluster, source),
    ]
    # One steady and one bad Wi-Fi, one that fades, one hot device, one churn.
    yield from (found[i] for i in (0, 8, 12, 13, 17)) if is_quick else found


# ------------------------------------------------------------ traces


def live(case: Case, trace: Trace, memo: dict[Conditions, list[Plan]]) -> Result:
    parts = segments(trace.dynamics, trace.end_s)
    predict, bank, rules = case.predict, case.bank, case.rules
    ours = play_adapter(predict, bank, parts, rules, effort_s=0.05, searched=memo)
    static = best_static(predict, bank, parts, rules)[1]
    anew = play_replanning(predict, bank[0], parts, rules, effort_s=0.05, searched=memo)
    everything = list({id(plan): plan for plan in (*bank, *ours.bank)}.values())
    oracle = play_oracle(predict, everything, parts, rules)
    name = varying(parts) if trace.kind == "lte" and predict.workload.kind != "train" else None
    informed = play_informed(predict, everything, parts, rules, name) if name else None
    return Result(case.name, trace, ours.totals, static, anew.totals, oracle, informed)


def show(result: Result, table: Table) -> None:
    runs = (result.adapter, result.static, result.anew, result.oracle)
    cells = [f"{r.attained:.3f} {r.energy_j:.3g} J {r.switches}" for r in runs]
    mark = ""
    if result.counts and result.adapter.attained < ATTAINS:
        mark = "LATE"
    elif result.counts and result.energy_ratio > ENERGY:
        mark = f"ENERGY {result.energy_ratio:.2f}x"
    table.line(f"{result.case}: {result.trace.kind} {result.trace.name}", *cells, mark)


def rows_of(result: Result) -> Iterator[Row]:
    for name in ("adapter", "static", "anew", "oracle", "informed"):
        run: Totals | None = getattr(result, name)
        if run is None:
            continue
        case = f"{result.case} {result.trace.kind} {result.trace.name}"
        for metric, unit in (
            ("attained", "1"), ("energy_j", "J"), ("time_s", "s"), ("switches", "1"),
            ("replans", "1"), ("paused_s", "s"), ("late_s", "s"),
        ):  # fmt: skip
            value = Samples([float(getattr(run, metric))])
            yield Row(case, name, f"simulated_{metric}", unit, value)


def summary(results: Sequence[Result]) -> None:
    print(
        "\nWhere the oracle attains 98 %: runs; least and mean attained; energy over the oracle's"
    )
    table = Table(["traces", "runs", "adapter", "static", "anew", "oracle"], width=(12, 24))
    for kind in dict.fromkeys(r.trace.kind for r in results):
        some = [r for r in results if r.trace.kind == kind and r.counts]
        if some:
            table.line(kind, str(len(some)), *(_summed(some, name) for name in
                       ("adapter", "static", "anew", "oracle")))  # fmt: skip
            missed = sum(r.adapter.attained < ATTAINS for r in some)
            dear = sum(r.energy_ratio > ENERGY for r in some)
            print(
                f"  {missed} attain less than {ATTAINS:.0%}, {dear} take over {ENERGY - 1:.0%} more"
            )
    known = [r for r in results if r.counts and r.informed is not None]
    if known:
        print(
            "one generated rate: energy over the oracle's, adapter and informed, worst and median"
        )
        ratios = [
            (r.energy_ratio, r.informed.energy_j / r.oracle.energy_j) for r in known if r.informed
        ]
        for name, column in zip(("adapter", "informed"), zip(*ratios, strict=True), strict=True):
            print(f"  {name} {max(column):.2f}x {Samples(list(column)).median:.2f}x")


def _summed(results: Sequence[Result], name: str) -> str:
    runs: list[Totals] = [getattr(r, name) for r in results]
    ratios = Samples([run.energy_j / r.oracle.energy_j for run, r in zip(runs, results, strict=True)
                      if run.items and r.oracle.energy_j] or [1.0])  # fmt: skip
    attained = Samples([run.attained for run in runs])
    mean = sum(attained.values) / len(attained.values)
    return (
        f"{min(attained.values):.3f} {mean:.3f} {ratios.median:.2f}x to {max(ratios.values):.2f}x"
    )


# ------------------------------------------------------------ mixing


def mixing(case: Case) -> tuple[float, float, float] | None:
    """Returns (average over its bound, energy over the best single plan's, the same by the LP).

    The bound is on the average time, halfway between the most frugal plan and the next faster
    one that costs more; None if all are equal.
    """
    calm = Conditions()
    found = sorted(
        (
            (f.energy_j, f.time_s, plan)
            for p in case.bank
            if (f := case.predict(p, calm))
            for plan in [p]
        ),
        key=lambda item: item[:2],
    )
    frugal = found[0]
    faster = [item for item in found if item[1] < 0.8 * frugal[1] and item[0] > 1.05 * frugal[0]]
    if not faster:
        return None
    bound_s = (frugal[1] + faster[0][1]) / 2
    field = "step_s" if case.predict.workload.kind == "train" else "latency_s"
    qoe = QoE(objective="energy", **{field: bound_s})
    predict = Predictor(case.predict.profile, case.predict.cluster, case.predict.workload, qoe)
    options = [predict(plan, calm) for plan in case.bank]
    mix = compose(options, "energy")
    single = min(f.energy_j for f in options if f is not None and f.worst <= 1)
    assert mix is not None
    rules = Rules.of(qoe, period_s=case.rules.period_s)._replace(reading="average")
    parts = segments(Dynamics(()), 600.0)
    run = play_adapter(predict, case.bank, parts, rules).totals
    return run.excess, run.energy_j / single, mix.value / single


# ------------------------------------------------------------ decision time


def decision_times(case: Case, num_decisions: int) -> Samples:
    """Returns CPU seconds of decisions about conditions that were never seen before."""
    cluster = case.predict.cluster
    predict = Predictor(case.predict.profile, cluster, case.predict.workload, case.predict.qoe)
    bank = (case.bank * (1 + BANK // len(case.bank)))[:BANK]
    bank = [plan.model_copy() for plan in bank]
    held = {name: frozenset(blocks) for name, blocks in placed(bank[0]).items()}
    price = pricer(predict, lambda: held)
    for plan in bank:  # as it is after the first decision
        predict(plan, Conditions())
    random, standing, spent = Random(0), Standing((bank[0],)), []
    for i in range(num_decisions):
        monitor = Monitor([m.name for m in cluster.media], [d.name for d in cluster.devices])
        for _ in range(5):
            for medium in cluster.media:
                monitor.rate(medium.name, random.uniform(0.1, 1.5), float(i))
            for device in cluster.devices:
                monitor.speed(device.name, random.uniform(0.5, 1.2), float(i))
        view = monitor.view(float(i))
        start_s = time.process_time()
        decide(bank, standing, view, predict, price, case.rules)
        spent.append(time.process_time() - start_s)
    return Samples(spent)


# ------------------------------------------------------------ all of it


def verdict(
    results: Sequence[Result],
    mixes: Sequence[tuple[float, float, float]],
    decisions: Samples,
    observing_s: float,
) -> dict[str, Metric]:
    some = [r for r in results if r.counts]
    attained = min((r.adapter.attained for r in some), default=1.0)
    held = sum(r.adapter.attained >= ATTAINS for r in some) / max(len(some), 1)
    fine = [r for r in some if r.adapter.attained >= ATTAINS]
    near = sum(r.energy_ratio <= ENERGY for r in fine) / max(len(fine), 1)
    energy = Samples([r.energy_ratio for r in fine] or [1.0])
    average = max((abs(m[0] - 1) if m[0] > 1 else 0.0 for m in mixes), default=0.0)
    gain = max((m[1] for m in mixes), default=1.0)
    return {
        "simulated_attained_worst": Metric(round(attained, 4), "1", ">= 0.95", attained >= ATTAINS),
        "simulated_runs_attained": Metric(round(held, 4), "1", "reported only", None),
        "simulated_energy_over_oracle_worst": Metric(
            round(max(energy.values), 4), "1", "<= 1.10", max(energy.values) <= ENERGY
        ),
        "simulated_energy_over_oracle_median": Metric(
            round(energy.median, 4), "1", "reported only", None
        ),
        "simulated_runs_energy_near": Metric(round(near, 4), "1", "reported only", None),
        "simulated_mix_over_average_bound": Metric(
            round(average, 4), "1", "<= 0.02", average <= 0.02 if mixes else None
        ),
        "simulated_mix_energy_over_single": Metric(
            round(gain, 4), "1", "< 1", gain < 1 if mixes else None
        ),
        "decision_median": Metric(
            round(1e3 * decisions.median, 3), "ms", "<= 10", decisions.median <= 0.010
        ),
        "decision_p95": Metric(
            round(1e3 * decisions.percentile(95), 3), "ms", "reported only", None
        ),
        "observation": Metric(round(1e6 * observing_s, 3), "us", "reported only", None),
    }  # fmt: skip


def observation_s() -> float:
    """Returns what one observation costs."""
    monitor, n = Monitor(["wifi"], ["phone"]), 20000
    start_s = time.perf_counter()
    for i in range(n):
        monitor.rate("wifi", 1.0 + 0.1 * (i % 3), float(i))
    return (time.perf_counter() - start_s) / n


def on_testbed(options: argparse.Namespace) -> int:
    """Measures instead: see `adapter_testbed.py`."""
    if reason := why_not():
        sys.exit(f"bench_adapter: the testbed {reason}")
    from adapter_testbed import run  # imports torch

    rows, metrics = run(is_quick=options.quick)
    if options.out:
        write_csv(options.out, rows)
    return finish(metrics)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few cells and traces: < 50 s")
    parser.add_argument("--only", metavar="SCENARIO", choices=scenario_names())
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per quantity")
    parser.add_argument("--testbed", action="store_true", help="a real job instead: needs root")
    options = parser.parse_args()
    if options.testbed:
        return on_testbed(options)
    chosen = QUICK_CELLS if options.quick else CELLS
    chosen = {options.only: CELLS[options.only]} if options.only else chosen
    print("All attainments and joules are simulated. Attained, energy of an item, switches.")
    table = Table(["case: trace", "adapter", "static", "anew", "oracle", ""], width=(64, 22))
    results, rows = [], []
    mixes: list[tuple[float, float, float]] = []
    decisions = Samples([0.0])
    start_s = time.monotonic()
    for case in cases(chosen, 3 if options.quick else 8, tight_only=options.quick):
        memo: dict[Conditions, list[Plan]] = {}
        for trace in traces(case, options.quick):
            results.append(live(case, trace, memo))
            show(results[-1], table)
            rows += rows_of(results[-1])
        mixed = mixing(case) if case.predict.workload.kind == "infer" else None
        if mixed is not None:
            mixes.append(mixed)
            rows.append(
                Row(case.name, "mix", "simulated_average_over_bound", "1", Samples([mixed[0]]))
            )
            rows.append(
                Row(case.name, "mix", "simulated_energy_over_single", "1", Samples([mixed[1]]))
            )
        times = decision_times(case, 20)
        decisions = max(decisions, times, key=lambda s: s.median)
        rows.append(Row(case.name, "adapter", "decision", "s", times))
        if options.out:  # hours of work: what is done stays
            write_csv(options.out, rows)
    print(f"{len(results)} runs in {time.monotonic() - start_s:.0f} s")
    summary(results)
    for average, energy, best in mixes:
        print(f"mix: average {average:.3f} of its bound, energy {energy:.3f} of the best single "
              f"plan's, {best:.3f} by the program")  # fmt: skip
    return finish(verdict(results, mixes, decisions, observation_s()))


if __name__ == "__main__":
    sys.exit(main())
