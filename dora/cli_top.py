"""The command `dora top`: how a running job is doing."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live

from dora import catalog, top
from dora.console import out
from dora.errors import SpecError
from dora.spec import Cluster

PLACE = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN",
        envvar="DORA_STATUS",
        help="Folder of a run, or of its statuses, or one of these. Default: the latest dora-run.",
    ),
]


def top_command(
    place: PLACE = None,
    *,
    cluster_file: Annotated[
        Path | None,
        typer.Option("--cluster", help="To compare links with. Default: cluster.json of the run."),
    ] = None,
    bound_s: Annotated[
        float | None, typer.Option(min=1e-9, help="What a step or request may take.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one screen, and end.")] = False,
    every_s: Annotated[float, typer.Option(min=0.1, help="Between two screens.")] = 1.0,
) -> None:
    """Shows how a running job is doing; ends with the job, or on Ctrl-C."""
    place = place or _latest()
    cluster = catalog.load_cluster(cluster_file) if cluster_file else top.cluster_beside(place)
    screen, is_over = _screen(place, cluster, bound_s, out)
    if once or is_over or not out.is_terminal:
        out.print(screen)
        while not (once or is_over):  # into a file or a pipe: one screen below the other
            time.sleep(every_s)
            screen, is_over = _screen(place, cluster, bound_s, out)
            out.print()
            out.print(screen)
        return
    # Ctrl-C is how one leaves it, and nothing that went wrong.
    with suppress(KeyboardInterrupt), Live(screen, console=out, auto_refresh=False) as live:
        while not is_over:
            time.sleep(every_s)
            screen, is_over = _screen(place, cluster, bound_s, out)
            live.update(screen, refresh=True)


def _screen(
    place: Path, cluster: Cluster | None, bound_s: float | None, console: Console
) -> tuple[RenderableType, bool]:
    """Returns the screen of now, and whether the job is over."""
    heard = top.hear(place)
    screen = top.frame(heard, width=console.width, cluster=cluster, bound_s=bound_s)
    log = top.last_decision((place if place.is_dir() else place.parent) / "decisions.jsonl")
    return (Group(screen, log) if log else screen), top.is_over(heard)


def _latest() -> Path:
    """Returns the folder of the latest run here that tells how it is doing."""
    found = [path for path in Path().glob("dora-run*") if any(path.glob("status/rank-*.json"))]
    if not found:
        raise SpecError(
            "RUN: given none, and no dora-run here has statuses; start the job with "
            "DORA_STATUS=FOLDER, then: dora top FOLDER"
        )
    return max(found, key=lambda path: (path / "status").stat().st_mtime)
