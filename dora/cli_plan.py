"""The commands of `dora` about plans: find them, play them, compare them with others' plans."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer

from dora import catalog, views
from dora.compare import Comparison, compare, reasons
from dora.console import FORCE, check_free, err, out, progress_of, waiting
from dora.errors import ScheduleError, SpecError
from dora.files import load, save, validate
from dora.planner import SearchResult, step_costs
from dora.profiler import load_profiles
from dora.report import gantt_figure, pareto_figure
from dora.scheduler import build_schedule, schedule_network
from dora.search import explore, measured_devices
from dora.simulator import format_timeline, load_dynamics, simulate, to_trace
from dora.spec import Cluster, ModelProfile, Plan, QoE, Schedule, Timeline, Workload

PROFILE = Annotated[Path, typer.Argument(metavar="PROFILE.json")]
CLUSTER = Annotated[Path, typer.Argument(metavar="CLUSTER.toml")]
ALSO = Annotated[
    list[Path] | None,
    typer.Option(help="Profile of the same model on another device; may be repeated."),
]
QOE = Annotated[
    Path | None, typer.Option("--qoe", help="Bounds, their percentile, and the objective.")
]
KIND = Annotated[str | None, typer.Option(help="train, infer or generate; default train.")]
BATCH = Annotated[
    int | None, typer.Option(help="Samples per step or request; default 32 to train, else 1.")
]
PROMPT = Annotated[int | None, typer.Option(help="Of --kind generate; default 256.")]
NEW = Annotated[int | None, typer.Option(help="Of --kind generate; default 128.")]
SOURCE = Annotated[
    str | None, typer.Option(help="Device that has the inputs; default: the first stage.")
]
JSON = Annotated[bool, typer.Option("--json", help="For programs.")]
FIGURE = Annotated[Path | None, typer.Option(help="Draw it: .svg, .png or .pdf.")]


def plan_command(
    profile_file: PROFILE,
    cluster_file: CLUSTER,
    *,
    also: ALSO = None,
    qoe_file: QOE = None,
    training: Annotated[bool, typer.Option("--train/--infer", help="Short for --kind.")] = True,
    kind: KIND = None,
    batch: BATCH = None,
    microbatches: Annotated[int | None, typer.Option(help="Default: the planner's choice.")] = None,
    prompt_tokens: PROMPT = None,
    new_tokens: NEW = None,
    source: SOURCE = None,
    pick: Annotated[int, typer.Option(min=1, help="Which preview --out writes.")] = 1,
    file: Annotated[Path | None, typer.Option("--out", help="The plan to write.")] = None,
    figure: FIGURE = None,
    as_json: JSON = False,
    force: FORCE = False,
) -> None:
    """Previews the plans for a model on a cluster: time, energy, memory, and what was rejected."""
    for new in (file, figure):
        if new is not None:
            check_free(new, force)
    known = load_profiles([profile_file, *(also or [])])
    cluster = catalog.load_cluster(cluster_file)
    kind = kind or ("train" if training else "infer")
    workload = _workload(kind, batch, microbatches, prompt_tokens, new_tokens, source, cluster)
    qoe = load(QoE, qoe_file) if qoe_file else QoE()
    with waiting("searching"):
        found = explore(known, cluster, workload, qoe)
    measured = measured_devices(known)
    times = {d.name: "measured" if d.name in measured else "modelled" for d in cluster.devices}
    if as_json:
        out.print_json(json.dumps(views.result_json(found, times)))
    else:
        _show_plans(found, times, measured, "step" if kind == "train" else "latency")
    if not found.plans:
        err.print(f"dora: {found.problem}", soft_wrap=True)
        raise typer.Exit(1)
    if file is not None:
        if pick > len(found.plans):
            raise SpecError(f"--pick: given {pick}, allowed: 1 to {len(found.plans)}")
        save(found.plans[pick - 1], file)
        err.print(f"Written: {file}", soft_wrap=True)
    if figure is not None:
        _draw(pareto_figure(found.plans, found.best_single), figure)


def _show_plans(
    found: SearchResult, times: dict[str, str], measured: Sequence[str], what: str
) -> None:
    out.print(views.plan_table(found.plans, found.best_single, what))
    out.print(views.single_line(found.best_single))
    if found.plans:
        out.print(views.gap_line(found))
    out.print(views.rejected_table(found.rejected))
    for source in ("measured", "modelled"):
        names = [name for name, given in times.items() if given == source]
        if names:
            roofline = " (catalogue roofline; measure with: dora profile)"
            out.print(f"Times {source} for {', '.join(names)}{roofline * (source == 'modelled')}.")
    unused = [name for name in measured if name not in times]
    if unused:
        out.print(f"Note: the profile of {', '.join(unused)} is of no device in this cluster.")


def simulate_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.json")],
    profile_file: PROFILE,
    cluster_file: CLUSTER,
    *,
    also: ALSO = None,
    kind: Annotated[
        str | None, typer.Option(help="Default: infer for a wavefront plan, else train.")
    ] = None,
    batch: BATCH = None,
    prompt_tokens: PROMPT = None,
    source: SOURCE = None,
    trace: Annotated[
        Path | None, typer.Option(help="CSV of at_s,name,factor: rates and speeds over time.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="One after the other.")] = 1,
    fair: Annotated[
        bool, typer.Option("--fair", help="A network that knows no priorities.")
    ] = False,
    trace_out: Annotated[
        Path | None, typer.Option(help="First step, to open in ui.perfetto.dev.")
    ] = None,
    figure: FIGURE = None,
    as_json: JSON = False,
    force: FORCE = False,
) -> None:
    """Plays a plan on a cluster: time, waiting, energy and memory; nothing is run."""
    for new in (trace_out, figure):
        if new is not None:
            check_free(new, force)
    plan = load(Plan, plan_file)
    cluster = catalog.load_cluster(cluster_file)
    kind = kind or ("infer" if plan.schedule_kind == "wavefront" else "train")
    given = load_profiles([profile_file, *(also or [])])
    _check_fits(plan, given, cluster, plan_file)
    num = plan.num_microbatches
    workload = _workload(
        kind, batch, None if kind == "generate" else num, prompt_tokens, 1, source, cluster
    )
    profile = catalog.scale_to_cluster(given, cluster, training=kind == "train")
    discipline = "fair" if fair else "priority"
    dynamics = load_dynamics(trace, cluster) if trace else None
    try:
        costs = step_costs(profile, cluster, workload, plan)
        schedule = _schedule(plan, costs, cluster, kind == "train")
        timelines, start_s = [], 0.0
        for _ in range(steps):
            timelines.append(
                simulate(
                    plan, schedule, costs, cluster,
                    discipline=discipline, dynamics=dynamics, start_s=start_s,
                )
            )  # fmt: skip
            start_s += timelines[-1].makespan_s
    except ScheduleError:
        raise
    except ValueError as error:
        # A plan may be edited by hand: a power mode or a link that the cluster does not have.
        raise SpecError(f"{plan_file}: {error}") from None
    _show_steps(timelines, plan, cluster, as_json)
    if kind == "generate" and not as_json:
        out.print("This is the prompt; each token after it is one more pass.")
    if trace_out is not None:
        trace_out.write_text(to_trace(timelines[0], plan.devices), encoding="utf-8")
        err.print(f"Written: {trace_out}; open it in ui.perfetto.dev", soft_wrap=True)
    if figure is not None:
        _draw(gantt_figure(timelines[0], plan, cluster), figure)


def _check_fits(plan: Plan, profile: ModelProfile, cluster: Cluster, file: Path) -> None:
    """Raises SpecError for a plan of another model or cluster."""
    known = [device.name for device in cluster.devices]
    for name in plan.devices:
        if name not in known:
            raise SpecError(f"{file}: given device {name!r}, allowed: {', '.join(known)}")
    if plan.num_blocks != len(profile.blocks):
        raise SpecError(
            f"{file}: given {plan.num_blocks} blocks, allowed: {len(profile.blocks)}, those of "
            f"{profile.name}"
        )


def _schedule(plan: Plan, costs: Any, cluster: Cluster, training: bool) -> Schedule:
    if plan.transfers:
        schedule = build_schedule(plan, training=training)
        return schedule.model_copy(update={"transfers": plan.transfers})
    return schedule_network(plan, costs, cluster, training=training)


def _show_steps(timelines: list[Timeline], plan: Plan, cluster: Cluster, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(views.timeline_json(timelines, plan)))
        return
    first = timelines[0]
    out.print(f"{views.describe(plan)}, simulated")
    out.print(views.step_line(first))
    out.print(views.device_use_table(first, plan, cluster))
    # Not through rich, which would break the lines of the chart.
    out.print(format_timeline(first, plan.devices), soft_wrap=True)
    if len(timelines) > 1:
        times = sorted(timeline.makespan_s for timeline in timelines)
        p95 = times[min(len(times) - 1, round(0.95 * (len(times) - 1)))]
        out.print(
            f"{len(times)} steps: median {views.seconds(median(times))}, "
            f"95th percentile {views.seconds(p95)}"
        )


class Cell(NamedTuple):
    """One comparison to make."""

    name: str
    profile: ModelProfile
    workload: Workload
    qoe: QoE


def compare_command(
    what: Annotated[str, typer.Argument(metavar="SCENARIO|PROFILE.json")],
    cluster_file: Annotated[
        Path | None, typer.Argument(metavar="CLUSTER.toml", help="Beside a profile.")
    ] = None,
    *,
    cell: Annotated[str, typer.Option(help="Number of a scenario's cell, or all.")] = "all",
    also: ALSO = None,
    qoe_file: QOE = None,
    kind: KIND = None,
    batch: BATCH = None,
    prompt_tokens: PROMPT = None,
    new_tokens: NEW = None,
    source: SOURCE = None,
    file: Annotated[Path | None, typer.Option("--out", help="All rows, as CSV.")] = None,
    as_json: JSON = False,
    force: FORCE = False,
) -> None:
    """Compares Dora's plan with those of other planners, all played on the same cluster."""
    if file is not None:
        check_free(file, force)
    if cluster_file is None:
        if any((also, qoe_file, kind, batch, prompt_tokens, new_tokens, source)):
            raise SpecError(
                f"{what}: given options of a workload, allowed beside a scenario: --cell, --out, "
                "--json, --force"
            )
        cluster, cells = _scenario(what, cell)
    else:
        cluster = catalog.load_cluster(cluster_file)
        given = load_profiles([Path(what), *(also or [])])
        kind = kind or "train"
        workload = _workload(kind, batch, None, prompt_tokens, new_tokens, source, cluster)
        profile = catalog.scale_to_cluster(given, cluster, training=kind == "train")
        qoe = load(QoE, qoe_file) if qoe_file else QoE()
        cells = iter([Cell(what, profile, workload, qoe)])
    found: list[tuple[str, Comparison]] = []
    with progress_of("comparing") as progress:
        for one in cells:
            comparison = compare(one.profile, cluster, one.workload, one.qoe)
            found.append((one.name, comparison))
            progress(len(found), len(found))
            if not as_json:
                _show_comparison(one.name, comparison)
    if as_json:
        out.print_json(
            json.dumps([views.comparison_json(*pair, reasons(pair[1])) for pair in found])
        )
    if file is not None:
        rows = [row for pair in found for row in views.comparison_rows(*pair)]
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        err.print(f"Written: {file}", soft_wrap=True)


def _scenario(name: str, cell: str) -> tuple[Cluster, Iterator[Cell]]:
    given = catalog.scenario(name)
    last = len(given.cells) - 1
    if cell != "all" and not (cell.isdecimal() and int(cell) <= last):
        raise SpecError(f"--cell: given {cell!r}, allowed: all, or 0 to {last}")
    numbers = range(len(given.cells)) if cell == "all" else [int(cell)]

    def cells() -> Iterator[Cell]:
        for i in numbers:
            one = given.cells[i]
            title = f"{name} {i}: {one.model}, {one.workload.kind}"
            profile = catalog.cell_profile(one, given.cluster)
            yield Cell(title, profile, one.workload, one.qoe)

    return given.cluster, cells()


def _show_comparison(name: str, found: Comparison) -> None:
    out.print(views.comparison_table(name, found))
    for line in views.comparison_lines(found, reasons(found)):
        out.print(line)
    out.print()


def _workload(
    kind: str,
    batch: int | None,
    microbatches: int | None,
    prompt_tokens: int | None,
    new_tokens: int | None,
    source: str | None,
    cluster: Cluster,
) -> Workload:
    names = [device.name for device in cluster.devices]
    if source is not None and source not in names:
        raise SpecError(f"--source: given {source!r}, allowed: {', '.join(names)}")
    given = {
        "kind": kind,
        "batch_size": batch if batch is not None else (32 if kind == "train" else 1),
        "num_microbatches": microbatches,
        "source": source,
    }
    if kind == "generate":
        given["prompt_tokens"] = 256 if prompt_tokens is None else prompt_tokens
        given["new_tokens"] = 128 if new_tokens is None else new_tokens
    return validate(Workload, given, source="options of the workload")


def _draw(figure: Any, file: Path) -> None:
    try:
        figure.savefig(file)
    except ValueError as error:
        raise SpecError(f"--figure {file}: {str(error).splitlines()[0]}") from None
    err.print(f"Written: {file}", soft_wrap=True)
