"""Finds the emulated network that a process is part of: it, too, reads the environment.

A testbed starts programs that know nothing of it, so only their environment can tell.
"""

from __future__ import annotations

import os

BUCKETS_VARIABLE = "DORA_TESTBED_BUCKETS"


def emulated_network() -> dict[str, str]:
    """Returns the options of `dora._C.Engine` for the network that this process is to emulate.

    They are empty outside a testbed.
    """
    path = os.environ.get(BUCKETS_VARIABLE)
    return {"buckets": path} if path else {}
