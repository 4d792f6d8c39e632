"""`dora report`: a run folder -> one HTML page, and a trace of both timelines beside the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dora.console import FORCE, check_free, err
from dora.errors import SpecError
from dora.files import load
from dora.report import page
from dora.simulator import to_traces
from dora.spec import Run

RUN = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run with run.json in it, or that file.")
]
OUT = Annotated[Path | None, typer.Option("--out", help="Default: report.html beside run.json.")]


def report_command(run: RUN, *, file: OUT = None, force: FORCE = False) -> None:
    """Makes one HTML page of a run, to open anywhere: predicted beside measured."""
    written, trace = write_report(run, file, force=force)
    err.print(f"Written: {written}", soft_wrap=True)
    if trace is None:
        err.print(f"Kept: {_source(run).with_name('trace.json')}; --force writes it anew")
    else:
        err.print(f"Written: {trace}; open it in ui.perfetto.dev", soft_wrap=True)


def write_report(
    run: Path, out: Path | None = None, *, force: bool = False
) -> tuple[Path, Path | None]:
    """Writes the page and the trace of a run; nothing is written if anything is wrong.

    Args:
        run: Folder with run.json in it, or that file.
        out: The page; None: report.html beside run.json.
        force: Overwrite what exists.

    Returns:
        The page, and the trace beside run.json; None if one was there and stays.

    Raises:
        SpecError: run.json is missing or not valid, or the page exists.
    """
    source = _source(run)
    out = out or source.with_name("report.html")
    check_free(out, force)
    given = load(Run, source)
    _check(given, source)
    html = page(given)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    trace = source.with_name("trace.json")
    if trace.exists() and not force:
        return out, None
    timelines = [one for one in (given.predicted, given.measured) if one is not None]
    trace.write_text(to_traces(timelines, given.plan.devices), encoding="utf-8")
    return out, trace


def _source(run: Path) -> Path:
    """Returns the file of a run."""
    if not run.is_dir():
        return run
    file = run / "run.json"
    if not file.exists():
        raise SpecError(f"{run}: given a folder without run.json, allowed: the folder of a run")
    return file


def _check(run: Run, source: Path) -> None:
    """Raises SpecError where names or ranks of a file edited by hand do not fit each other."""
    devices = {device.name for device in run.cluster.devices}
    media = {medium.name for medium in run.cluster.media}
    usage = run.activity.usage if run.activity else ()
    traffic = run.activity.traffic if run.activity else ()
    timelines = [one for one in (run.predicted, run.measured) if one is not None]
    named = {
        "plan.devices": (run.plan.devices, devices),
        "activity.usage": ([one.device for one in usage], devices),
        "activity.traffic": ([one.medium for one in traffic], media),
        "energy": ([e.device for t in timelines for e in t.energy], set(run.plan.devices)),
        "memory": ([m.device for t in timelines for m in t.memory], set(run.plan.devices)),
    }
    for field, (names, allowed) in named.items():
        for name in names:
            if name not in allowed:
                raise SpecError(
                    f"{source}: {field}: given {name!r}, allowed: {', '.join(sorted(allowed))}"
                )
    for timeline in timelines:
        last = max((span.rank for span in timeline.spans), default=0)
        if max(last + 1, timeline.num_ranks) > len(run.plan.devices):
            raise SpecError(
                f"{source}: {timeline.source}: given rank {max(last, timeline.num_ranks - 1)}, "
                f"allowed: below {len(run.plan.devices)}, the devices of the plan"
            )
