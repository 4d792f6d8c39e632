"""Runs the demo on an emulated home and passes on what its devices report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora.catalog import scenario
from dora.errors import DoraError
from dora.files import load, save
from dora.spec import Run
from dora.testbed import Job, Testbed, modelled_energy

HOME = "smart-home-1"
# The model is small: it does about that much less computing per byte that it sends than the models
# that such a home is for (width 128 instead of 1024, and short texts).
NETWORK_FACTOR = 16.0
_LIMIT_S = 600.0


class DemoError(DoraError, RuntimeError):
    """A device of the demo failed; says why and where its log is."""


def open_home() -> Testbed:
    """Returns the home, not built yet."""
    return Testbed(scenario(HOME).cluster, network_factor=NETWORK_FACTOR)


def follow(
    testbed: Testbed, folder: Path, environment: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Runs the devices and yields the events that they report, until all have ended.

    Args:
        testbed: Open.
        folder: With the settings; gets cluster.json, log.txt and what the devices write.
        environment: Of the devices.

    Raises:
        DemoError: A device failed, or the limit was reached.
    """
    save(testbed.cluster, folder / "cluster.json")
    command = [sys.executable, "-m", "dora.demo.worker", str(folder.absolute())]
    job = Job(testbed, command, environment, limit_s=_LIMIT_S)
    failures = []
    with (folder / "log.txt").open("a") as log:
        for device, line in job.lines():
            if not line.startswith('{"event"'):
                log.write(f"{device}: {line}\n")
            elif (event := json.loads(line))["event"] == "error":
                failures.append(event)
            else:
                yield event
    if job.problem:
        # The loss of a peer only follows from another failure.
        first = [f for f in failures if f["kind"] != "PeerLostError"] or failures
        why = f"{first[0]['kind']}: {first[0]['text']}" if first else job.problem
        raise DemoError(f"a device failed: {why} (log: {folder / 'log.txt'})")


def with_energy(testbed: Testbed, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the result with joules per step of every contender; completes the run's record."""
    for contender in result["contenders"].values():
        activity = testbed.activity(tuple(contender["window_s"]))
        energy = modelled_energy(activity, testbed.cluster)
        used = [e.joules for e in energy if e.device in contender["devices"]]
        contender["energy_j"] = sum(used) / contender["steps"]
    run = load(Run, folder / "run.json")
    more = {"activity": testbed.activity(run.window_s), "note": testbed.summary}
    save(run.model_copy(update=more), folder / "run.json")
    return result
