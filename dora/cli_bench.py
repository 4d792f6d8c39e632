"""`dora bench`: runs a benchmark of the source checkout that this is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from dora.errors import SpecError

# Beside the package in a checkout; a wheel has none.
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as compress.")],
) -> int:
    """Runs a benchmark with all further options: --quick, --out FILE.csv, --help for more."""
    names = [path.stem.removeprefix("bench_") for path in sorted(FOLDER.glob("bench_*.py"))]
    if not names:
        raise SpecError(
            "bench: given an installed package, which has no benchmarks, allowed: dora bench in a "
            "source checkout"
        )
    if name not in names:
        raise SpecError(f"bench: given {name!r}, allowed: {', '.join(names)}")
    script = FOLDER / f"bench_{name}.py"
    return subprocess.run([sys.executable, str(script), *context.args], check=False).returncode
