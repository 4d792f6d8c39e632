"""Processes that die with the testbed, and those that keep processors awake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_LOAD = """
import numpy
a = numpy.ones((64, 64), "f")
while True:
    a @ a
"""
# Computes only where a processor has nothing else to do.
IDLE_COMMAND = ("chrt", "--idle", "0", sys.executable, "-c", _LOAD)
IDLE_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "PATH": os.defpath}


def start(command: Sequence[str], cpus: Sequence[int], **options: Any) -> subprocess.Popen[Any]:
    """Starts a process in a session of its own; it dies with the thread that called this.

    Args:
        command: Program and arguments.
        cpus: Processors that it may run on.
        options: Of Popen.
    """
    tied = ["setpriv", "--pdeathsig", "KILL", "taskset", "-c", ",".join(map(str, cpus))]
    return subprocess.Popen([*tied, *command], start_new_session=True, **options)
