"""What the commands share: output, progress, and the care not to overwrite."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from dora.errors import SpecError

# Tables in a file or a pipe need not fit a screen.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, markup=False)
FORCE = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
# Something that takes less shows no progress.
_SHORT_S = 2.0


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how much is done if it takes long: a bar on a terminal, else lines."""
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        start, next_s = time.monotonic(), _SHORT_S

        def show(done: int, total: int) -> None:
            nonlocal next_s
            bars.update(task, completed=done, total=total)
            if not err.is_terminal and time.monotonic() - start > next_s:
                next_s *= 2
                err.print(f"{what}: {done}/{total}")

        yield show


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows that something is going on."""
    if err.is_terminal:
        with err.status(what):
            yield
    else:
        yield


def check_free(file: Path, force: bool) -> None:
    """Raises SpecError for a file that exists, unless it may be overwritten."""
    if file.exists() and not force:
        raise SpecError(f"{file}: exists, allowed: a new file, or --force")
