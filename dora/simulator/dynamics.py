"""How rates, speeds and membership change over time: traces, files of them, and a generator.

A trace gives factors of what the cluster says: 0.5 is half the rate or speed, 0 is gone until the
next entry. A file is CSV with the columns at_s, name, factor; name is a medium's or a device's::

    at_s,name,factor
    0,wifi,1.0
    12.5,wifi,0.4
    30,phone,0.55
    60,laptop,0
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from math import exp, isfinite, log, sqrt
from pathlib import Path
from random import Random
from typing import NamedTuple

from dora.errors import SpecError
from dora.spec import Cluster

_COLUMNS = ("at_s", "name", "factor")


class Change(NamedTuple):
    """From `at_s` on, `factor` times the given rate or speed of medium or rank `position`."""

    at_s: float
    is_medium: bool
    position: int
    factor: float


class Dynamics(NamedTuple):
    """Entries (seconds, medium or device, factor), ascending in time."""

    entries: tuple[tuple[float, str, float], ...]

    def changes(self, ranks: Sequence[str], cluster: Cluster) -> list[Change]:
        """Returns the entries that concern those devices and the cluster's media, by index."""
        media = {medium.name: i for i, medium in enumerate(cluster.media)}
        devices = {name: rank for rank, name in enumerate(ranks)}
        found = []
        for at_s, name, factor in self.entries:
            if name in media:
                found.append(Change(at_s, True, media[name], factor))
            elif name in devices:
                found.append(Change(at_s, False, devices[name], factor))
        return found


def load_dynamics(path: str | os.PathLike[str], cluster: Cluster) -> Dynamics:
    """Reads a CSV file of changes.

    Raises:
        SpecError: One line with file, line, what was given and what is allowed.
    """
    names = {m.name for m in cluster.media} | {d.name for d in cluster.devices}
    entries = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError(f"{path}: given bytes that are not UTF-8, allowed: a CSV file") from None
    rows = csv.DictReader(text.splitlines())
    if tuple(rows.fieldnames or ()) != _COLUMNS:
        raise SpecError(f"{path}: given columns {rows.fieldnames}, allowed {list(_COLUMNS)}")
    for row in rows:
        where = f"{path} line {rows.line_num}"
        if row["name"] not in names:
            raise SpecError(f"{where}: given {row['name']!r}, allowed: {sorted(names)}")
        entries.append((_number(row["at_s"], where), row["name"], _number(row["factor"], where)))
    return Dynamics(tuple(sorted(entries, key=lambda entry: entry[0])))


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not (isfinite(value) and value >= 0):
        raise SpecError(f"{where}: given {text!r}, allowed: a number of at least 0")
    return value


def wandering(
    name: str,
    *,
    duration_s: float,
    cv: float,
    correlation: float,
    step_s: float = 1.0,
    seed: int = 0,
) -> Dynamics:
    """Generates a rate that wanders around the given one: AR(1) on its logarithm.

    Home and office Wi-Fi measured from 1 s samples: cv 0.3 to 0.5, correlation 0.45; moving
    devices: cv 0.6 to 1, correlation 0.9. The log-normal misses outages: add zeros for those.

    Args:
        name: Of a medium or a device.
        duration_s: Length of the trace.
        cv: Standard deviation over mean.
        correlation: Between one step and the next.
        step_s: Time between changes.
        seed: The same seed gives the same trace.
    """
    random, sigma, x = Random(seed), sqrt(log(1 + cv * cv)), 0.0
    entries = []
    for i in range(int(duration_s / step_s) + 1):
        noise = random.gauss(0, 1)
        x = noise if i == 0 else correlation * x + sqrt(1 - correlation**2) * noise
        entries.append((i * step_s, name, exp(sigma * x)))
    return Dynamics(tuple(entries))
