"""Names that tell which process made something, so that what a killed one left can be found."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

PREFIX = "dora-testbed"
_numbers = count()


def fresh() -> str:
    """Returns a name for what this process is about to make; no other process has it."""
    pid = os.getpid()
    return f"{PREFIX}-{pid}-{start_ticks(pid)}-{next(_numbers)}"


def is_left_over(name: str) -> bool:
    """Returns whether the process that made something of that name has ended."""
    pid, ticks = name.removeprefix(f"{PREFIX}-").split("-")[:2]
    return start_ticks(int(pid)) != ticks


def start_ticks(pid: int) -> str | None:
    """Returns when a process began; with its id that names it for good. None: it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
