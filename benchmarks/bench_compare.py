"""Dora's plans against those of twelve other planners, on all scenarios. Simulated, not measured.

Every planner's plan is executed alike (`dora.compare`): checked against the memory of the devices,
played by the simulator on the contended cluster at the QoE's percentile, judged by the QoE. The
value is what the cell minimises: seconds, or joules within its bound on time.

**Best rival**: the best plan of the twelve among those that meet the QoE. None of them knows about
energy, so the column **over single** compares with the one device that is best for the objective,
which a user could find by trying each. A cell is *worse* if either beats Dora.

**Ablations** (`--ablation`): what Dora's plan would take without one of its parts, over what it
takes. "No exclusion" and "fixed order" descend in steps of Dora's own improvement (`changes`)
from the plans of all planners, Dora's among them, through plans that use all devices, or have
them in rank order; they do not enumerate chains. "No network scheduler" is Dora's plan on a network
that shares fairly, not a plan made for one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from common import Metric, Row, Samples, Table, finish, write_csv

from dora import views
from dora.catalog import cell_profile, scenario, scenario_names
from dora.compare import Comparison, compare, reasons
from dora.judge import Case, Entry, case_of, judge
from dora.planner import search
from dora.planner.chains import shared_media, twins
from dora.planner.improve import Move, changes, descend, regrouped
from dora.planner.layouts import layout_of, to_plan
from dora.planner.limits import broken
from dora.planner.predict import (
    Layout,
    Prediction,
    Setting,
    as_step,
    evaluate,
    is_linked,
    memory_share,
)
from dora.planner.search import microbatch_choices
from dora.spec import Cluster, Link, Medium, ModelProfile, Plan, QoE, Workload

# Where several devices share a Wi-Fi channel; edge-cluster is a wired switch.
CONTENDED = ("smart-home-1", "smart-home-2", "traffic", "campus")
QUICK = ("smart-home-1", "smart-home-2", "traffic")
# Cells that --quick takes of each scenario: the small models.
QUICK_CELLS = 8
# Without the contention model campus has 6000 media, and its search alone takes minutes a cell.
NOT_ABLATED = ("campus",)
# Layouts that each descent of an ablation may play.
MAX_PLAYS = 2000


class Cell(NamedTuple):
    """One comparison to make."""

    scenario: str
    number: int
    model: str
    profile: ModelProfile
    cluster: Cluster
    workload: Workload
    qoe: QoE

    @property
    def name(self) -> str:
        bound = {"train": "step_s", "infer": "latency_s", "generate": "tpot_s"}
        value = getattr(self.qoe, bound[self.workload.kind])
        return (
            f"{self.scenario} {self.number} {self.model} {self.workload.kind} "
            f"{self.qoe.objective} {value:g}s"
        )


def cells(names: Iterable[str], most: int | None) -> Iterator[Cell]:
    for name in names:
        given = scenario(name)
        for i, cell in enumerate(given.cells[:most]):
            profile = cell_profile(cell, given.cluster)
            yield Cell(name, i, cell.model, profile, given.cluster, cell.workload, cell.qoe)


# ------------------------------------------------------------ comparison


def show(cell: Cell, found: Comparison, table: Table) -> None:
    """Prints a cell's line: value, best rival, gain over it and over the best single device."""
    if not found.dora.can_run:
        table.line(cell.name, "-", "-", "-", "-", "no plan fits the memory")
        return
    objective = found.qoe.objective
    unit = (lambda e: views.seconds(e.value("time"))) if objective == "time" else joules
    best = found.best_rival
    rival = f"{unit(best)} {best.planner}" if best else "none"
    why = "; ".join([*marks(found), *reasons(found)])
    table.line(
        cell.name, unit(found.dora), rival, gain(found.gain), gain(found.gain_over(found.single)),
        why,
    )  # fmt: skip


def joules(entry: Entry) -> str:
    return f"{entry.value('energy'):.4g} J"


def gain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}x"


def marks(found: Comparison) -> list[str]:
    """Returns what has to catch the eye."""
    texts = ["WORSE"] * found.is_worse + ["QoE MISSED"] * found.is_missed
    if not found.dora.meets_qoe and not found.is_missed:
        texts.append("no plan found meets the QoE: " + ", ".join(found.dora.broken))
    if found.dora.meets_qoe and not any(entry.meets_qoe for entry in found.rivals):
        texts.append("only Dora meets the QoE")
    return texts


def rows_of(cell: Cell, found: Comparison) -> Iterator[Row]:
    for entry in (found.dora, *found.rivals, found.single):
        if entry.can_run:
            for metric, unit in (("time", "s"), ("energy", "J")):
                value = Samples([entry.value(metric)])
                yield Row(cell.name, entry.planner, f"simulated_{metric}", unit, value)
            met = Samples([float(entry.meets_qoe)])
            yield Row(cell.name, entry.planner, "qoe_met", "1", met)
            if entry.gain is not None:
                gained = Samples([entry.gain])
                yield Row(cell.name, entry.planner, "gain_of_dora", "1", gained)
        yield Row(cell.name, entry.planner, "planning", "s", Samples([entry.planning_s]))


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def summary(found: Mapping[Cell, Comparison]) -> Iterator[Row]:
    """Prints and yields the gain over each planner: minimum, geometric mean, maximum."""
    print("\nDora's gain where both can run: least, geometric mean, most (cells); it can not run")
    table = Table(["planner", "time", "energy, both within QoE", "breaks QoE", "can not run"])
    names = [entry.planner for entry in next(iter(found.values())).rivals]
    for i, name in enumerate([*names, "single for objective"]):
        rivals = [(c, c.rivals[i] if i < len(names) else c.single) for c in found.values()]
        shown = []
        for objective in ("time", "energy"):
            gains = [
                e.gain
                for c, e in rivals
                if c.qoe.objective == objective and e.gain is not None
                and (objective == "time" or e.meets_qoe)
            ]  # fmt: skip
            shown.append(spread(gains))
            if gains:
                values = Samples([min(gains), geomean(gains), max(gains)])
                yield Row("all cells", name, f"gain_of_dora_{objective}", "1", values)
        breaks = sum(e.can_run and not e.meets_qoe for _, e in rivals)
        table.line(name, *shown, str(breaks), str(sum(not e.can_run for _, e in rivals)))


def spread(gains: Sequence[float]) -> str:
    if not gains:
        return "-"
    return f"{min(gains):.2f} {geomean(gains):.2f} {max(gains):.2f} ({len(gains)})"


def verdict(found: Mapping[Cell, Comparison]) -> dict[str, Metric]:
    def gains(objective: str, names: Sequence[str], spreads: bool = False) -> list[float]:
        return [
            c.gain
            for cell, c in found.items()
            if c.gain is not None and c.qoe.objective == objective and cell.scenario in names
            and (not spreads or num_devices(c) > 1)
        ]  # fmt: skip

    contended = geomean(gains("time", CONTENDED))
    worse = [cell.name for cell, c in found.items() if c.is_worse]
    missed = [cell.name for cell, c in found.items() if c.is_missed]
    everywhere = scenario_names()
    return {
        "time_gain_contended_geomean": metric(contended, ">= 1.3", contended >= 1.3),
        "time_gain_contended_several_devices_geomean": metric(
            geomean(gains("time", CONTENDED, spreads=True)), "", None
        ),
        "time_gain_geomean": metric(geomean(gains("time", everywhere)), "", None),
        "energy_gain_geomean": metric(geomean(gains("energy", everywhere)), "", None),
        "cells_worse": metric(len(worse), "0", not worse, "; ".join(worse)),
        "cells_qoe_missed": metric(len(missed), "0", not missed, "; ".join(missed)),
        "cells": metric(len(found), "", None),
    }


def num_devices(found: Comparison) -> int:
    """Returns how many devices Dora's plan uses."""
    return sum(len(stage.replicas) for stage in found.dora.plan.stages) if found.dora.plan else 0


def metric(value: float, bound: str, ok: bool | None, reason: str = "") -> Metric:
    if math.isnan(value):
        return Metric(None, "1", bound or "reported only", None, "no such cell")
    return Metric(round(value, 4), "1", bound or "reported only", ok, reason)


# ------------------------------------------------------------ ablations


def ablate(cell: Cell, found: Comparison) -> dict[str, Entry | None]:
    """Returns the best plan without each part, on the true network; None if there is none."""
    case = case_of(cell.profile, cell.cluster, cell.workload, found.qoe)
    starts = [e.plan for e in (found.dora, *found.rivals, found.single) if e.plan is not None]
    numbers = len(cell.cluster.devices)
    return {
        "no contention model": first(_planned(cell, private(cell.cluster), found.qoe), case),
        "no network scheduler": first([found.dora.plan], case, fair_only=True),
        "no exclusion": restricted(case, starts, lambda one: len(one.devices) == numbers),
        "fixed order": restricted(case, starts, is_in_rank_order),
        "no power modes": first(_planned(cell, modeless(cell.cluster), found.qoe), case),
    }


def _planned(cell: Cell, cluster: Cluster, qoe: QoE) -> list[Plan]:
    plans = search(cell.profile, cluster, cell.workload, qoe).plans[:1]
    # The order of transfers was made for another network.
    return [plan.model_copy(update={"transfers": ()}) for plan in plans]


def first(plans: Sequence[Plan], case: Case, *, fair_only: bool = False) -> Entry | None:
    """Returns the first plan, played, if it can run."""
    for plan in plans:
        entry = judge(Entry(planner="ablated", plan=plan), case, fair_only=fair_only)
        return entry if entry.can_run else None
    return None


def private(cluster: Cluster) -> Cluster:
    """Returns the cluster as a planner sees it that measures each link alone: media of its own."""
    media = {medium.name: medium for medium in cluster.media}
    links, copies = [], []
    for link in cluster.links:
        own = {name: f"{name} of {link.src} to {link.dst}" for name in link.media}
        links.append(Link(src=link.src, dst=link.dst, media=tuple(own[n] for n in link.media)))
        copies += [_renamed(media[name], new) for name, new in own.items()]
    return cluster.model_copy(update={"media": tuple(copies), "links": tuple(links)})


def _renamed(medium: Medium, name: str) -> Medium:
    return medium.model_copy(update={"name": name})


def modeless(cluster: Cluster) -> Cluster:
    devices = tuple(d.model_copy(update={"power_modes": ()}) for d in cluster.devices)
    return cluster.model_copy(update={"devices": devices})


def is_in_rank_order(layout: Layout) -> bool:
    groups = [group.devices for group in layout.groups]
    return all(max(a) < min(b) for a, b in zip(groups, groups[1:], strict=False))


def restricted(
    case: Case, starts: Sequence[Plan], allowed: Callable[[Layout], bool]
) -> Entry | None:
    """Returns the best plan that a descent through allowed layouts finds from any start."""
    choices = [case.setting_of(m) for m in microbatch_choices(case.workload)]
    twin_of = twins(choices[0], shared_media(case.cluster, choices[0].devices))
    seen: dict[Layout, tuple[float, Prediction | None]] = {}

    def moves_of(layout: Layout) -> list[Move]:
        known = case.setting_of(layout.num_microbatches)
        others = [k for k in choices if k is not known]
        return [*changes(layout, known, twin_of, case.qoe.max_accuracy_loss), *others]

    def apply(layout: Layout, move: Move) -> Layout | None:
        if isinstance(move, Setting):
            found = regrouped(layout, layout.groups, move)
        elif isinstance(move, Layout):
            found = move
        else:
            found = regrouped(layout, move, case.setting_of(layout.num_microbatches))
        return found if found is not None and allowed(found) else None

    for plan in starts:
        start = layout_of(plan, case.setting_of(plan.num_microbatches))
        if not allowed(start):
            continue
        stop = len(seen) + MAX_PLAYS

        def value_of(layout: Layout, stop: int = stop) -> float:
            if len(seen) > stop:
                return -math.inf
            return rank(layout, case, seen)

        descend(start, value_of, moves_of, apply)
    best = min(seen, key=lambda layout: seen[layout][0], default=None)
    if best is None or seen[best][1] is None:
        return None
    known = case.setting_of(best.num_microbatches)
    names = [device.name for device in known.devices]
    plan = to_plan(best, seen[best][1], known, names)
    return first([plan], case)


def rank(layout: Layout, case: Case, seen: dict[Layout, tuple[float, Prediction | None]]) -> float:
    """Returns what to minimise: the objective, above all a broken bound, and above that memory."""
    if layout not in seen:
        known = case.setting_of(layout.num_microbatches)
        step = as_step(layout, known, known.costs)
        share, _ = memory_share(layout, known, step)
        if share > 1 or not is_linked(layout.groups, known):
            # A start may lack memory: less of it is a way to a plan that fits.
            seen[layout] = 1e24 * share, None
            return seen[layout][0]
        found = evaluate(layout, known, step)
        failed = broken(case.wanted, layout, found, known)
        value = found.makespan_s if case.qoe.objective == "time" else found.total_j
        worst = max((limit.excess(reached) for limit, reached in failed), default=0.0)
        seen[layout] = (1e12 * worst if failed else value), found
    return seen[layout][0]


def show_ablations(costs: Mapping[str, Sequence[tuple[Cell, Comparison, Entry | None]]]) -> None:
    print("\nValue without a part over Dora's: geometric mean and most, where both keep the QoE")
    table = Table(["without", "time", "energy", "time, not one device", "breaks QoE", "no plan"])
    for name, found in costs.items():
        held = [(c, e) for _, c, e in found if e is not None and e.meets_qoe and c.dora.meets_qoe]
        ratios = {
            objective: [ratio(c, e) for c, e in held if c.qoe.objective == objective]
            for objective in ("time", "energy")
        }
        piped = [ratio(c, e) for c, e in held if c.qoe.objective == "time" and num_devices(c) > 1]
        lost = [c for _, c, e in found if c.dora.meets_qoe and e is not None and e.broken]
        none = [c for _, c, e in found if c.dora.meets_qoe and e is None]
        table.line(
            name, spread(ratios["time"]), spread(ratios["energy"]), spread(piped), str(len(lost)),
            str(len(none)),
        )  # fmt: skip


def ratio(found: Comparison, entry: Entry) -> float:
    return entry.value(found.qoe.objective) / found.dora.value(found.qoe.objective)


# ------------------------------------------------------------ all of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small scenarios and models: < 50 s")
    parser.add_argument("--ablation", action="store_true", help="also what each part is worth")
    parser.add_argument("--only", metavar="SCENARIO", help="one scenario, all cells")
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per simulated quantity")
    options = parser.parse_args()
    names = QUICK if options.quick else scenario_names()
    names = [options.only] if options.only else names
    rows: list[Row] = []
    found: dict[Cell, Comparison] = {}
    costs: dict[str, list[tuple[Cell, Comparison, Entry | None]]] = {}
    print("All times and joules are simulated.")
    table = Table(["cell", "Dora", "best rival", "gain", "over single", "remarks"], width=(52, 12))
    start_s = time.monotonic()
    for cell in cells(names, QUICK_CELLS if options.quick else None):
        one = compare(cell.profile, cell.cluster, cell.workload, cell.qoe)
        found[cell] = one
        show(cell, one, table)
        rows += rows_of(cell, one)
        if options.ablation and one.dora.can_run and cell.scenario not in NOT_ABLATED:
            for name, entry in ablate(cell, one).items():
                costs.setdefault(name, []).append((cell, one, entry))
                if entry is not None:
                    rows.append(
                        Row(cell.name, name, "value_over_dora", "1", Samples([ratio(one, entry)]))
                    )
    print(f"{len(found)} cells in {time.monotonic() - start_s:.0f} s")
    rows += summary(found)
    if costs:
        show_ablations(costs)
    if options.out:
        write_csv(options.out, rows)
    return finish(verdict(found))


if __name__ == "__main__":
    sys.exit(main())
