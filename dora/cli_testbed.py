"""The command `dora testbed`: a program on a whole emulated cluster."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dora import catalog
from dora.console import FORCE, check_free, err, out
from dora.errors import SpecError
from dora.files import load, save
from dora.simulator import load_dynamics
from dora.spec import Activity, Cluster, Run
from dora.testbed import Job, Testbed, modelled_energy, parse_event


def testbed_command(
    cluster_file: Annotated[Path, typer.Argument(metavar="CLUSTER.toml")],
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND", help="{cluster} and {run} in it become the paths of both."
        ),
    ],
    *,
    trace: Annotated[
        Path | None, typer.Option(help="CSV of rates and speeds over time: at_s,name,factor.")
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="'SECONDS VERB DEVICE': kill, restart, pause, resume, disconnect or connect; may "
            "be repeated."
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Factor of all speeds; default: what fits this machine."),
    ] = None,
    network_factor: Annotated[
        float, typer.Option(min=1e-9, help="Factor of all rates beyond --scale.")
    ] = 1.0,
    mode: Annotated[
        str | None,
        typer.Option(
            help="namespaces (needs root) or buckets (does not, and emulates less); default: the "
            "first where it can."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for what was counted, and for {run}.")
    ] = None,
    limit_s: Annotated[float, typer.Option(help="Kills the program after that.")] = 3600.0,
    force: FORCE = False,
) -> int:
    """Runs a program on every device of a cluster that is emulated on this machine."""
    if command[0] == "torchrun":
        raise SpecError(
            "command: given torchrun, allowed: the program itself: the testbed starts one process "
            "per device as torchrun would, so leave out torchrun and its options"
        )
    given = catalog.load_cluster(cluster_file)
    dynamics = load_dynamics(trace, given) if trace else None
    events = [parse_event(text, given) for text in at or ()]
    if folder is not None:
        check_free(folder / "activity.json", force)
    emulation = Testbed(given, scale=scale, network_factor=network_factor, mode=mode)
    with tempfile.TemporaryDirectory() as scratch, emulation as testbed:
        place = folder or Path(scratch)
        save(testbed.cluster, place / "cluster.json")
        err.print(testbed.summary, soft_wrap=True)
        job = Job(
            testbed,
            _program(command, place),
            {**_told_to(folder), **os.environ},
            dynamics=dynamics,
            events=events,
            limit_s=limit_s,
        )
        for device, line in job.lines():
            out.print(f"[{device}] {line}", soft_wrap=True)
        activity = testbed.activity()
        err.print(_table(activity, testbed.cluster))
        if folder is not None:
            save(activity, folder / "activity.json")
            _complete(folder / "run.json", testbed)
    return _judge(job)


def _told_to(folder: Path | None) -> dict[str, str]:
    """Returns what makes the program say how it is doing, for `dora top` on the run's folder."""
    return {"DORA_STATUS": f"{folder.absolute()}/status"} if folder is not None else {}


def _judge(job: Job) -> int:
    """Says what went wrong; returns the exit code."""
    if not job.has_begun:
        text = "not all devices came onto the network: none was slowed, no event happened"
        err.print(f"dora: {text}", soft_wrap=True)
    if job.problem:
        err.print(f"dora: {job.problem}", soft_wrap=True)
    return 1 if job.problem else 0


def _table(activity: Activity, cluster: Cluster) -> Table:
    """Returns what every device did."""
    table = Table(title="from when all devices were on the network")
    for heading in ("device", "busy", "sent", "received", "peak memory", "energy (modelled)"):
        table.add_column(heading, justify="left" if heading == "device" else "right")
    for usage, energy in zip(activity.usage, modelled_energy(activity, cluster), strict=True):
        share = usage.busy_s / usage.total_s if usage.total_s else 0.0
        table.add_row(
            usage.device,
            f"{share:.0%} of {usage.total_s:.1f} s",
            f"{usage.sent_bytes / 1e6:.2f} MB",
            f"{usage.received_bytes / 1e6:.2f} MB",
            f"{usage.peak_bytes / 1e6:.0f} MB",
            f"{energy.joules:.1f} J",
        )
    return table


def _program(command: list[str], place: Path) -> list[str]:
    """Returns the command with paths filled in; a Python file is run by this Python."""
    paths = {"{cluster}": place / "cluster.json", "{run}": place}
    filled = list(command)
    for name, path in paths.items():
        filled = [word.replace(name, str(path.absolute())) for word in filled]
    return [sys.executable, *filled] if filled[0].endswith(".py") else filled


def _complete(path: Path, testbed: Testbed) -> None:
    """Adds to a run that the program has recorded what was counted meanwhile."""
    if not path.exists():
        return
    run = load(Run, path)
    more = {"activity": testbed.activity(run.window_s), "note": testbed.summary}
    save(run.model_copy(update=more), path)
    out.print(f"Report: dora report {shlex.quote(str(path.parent))}", soft_wrap=True)
