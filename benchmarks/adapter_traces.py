"""The traces of benchmarks/traces as changes of a cluster; see SOURCES.md there."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

from dora.adapt import merged
from dora.simulator import Dynamics, wandering
from dora.spec import Cluster

FILES = Path(__file__).with_name("traces")
# Of the Ghent 4G traces, from one second to the next.
LTE_CV, LTE_CORRELATION = 0.48, 0.63
# They last up to 89 hours; what counts is how plans meet each change, not the calm between them.
CHURN_COMPRESSION = 10.0
# A hot device that rests cools down in about as long as it took to heat up.
COOLING_S, THERMAL_END_S = 400.0, 800.0


class Trace(NamedTuple):
    """Something that happens to a cluster, until `end_s`."""

    kind: str
    name: str
    dynamics: Dynamics
    end_s: float


def wifi(media: Sequence[str]) -> Iterator[Trace]:
    """Yields one trace per file; of several channels each has another file at the same time."""
    files = sorted(FILES.glob("wifi_*.txt"))
    for i, file in enumerate(files):
        parts = [_rates(files[(i + k) % len(files)], name) for k, name in enumerate(media)]
        yield Trace("wifi", file.stem.removeprefix("wifi_"), merged(parts), 200.0)


def _rates(file: Path, name: str) -> Dynamics:
    rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
    usual = median(float(rate) for _, rate in rows)
    return Dynamics(tuple((round(float(at)), name, float(rate) / usual) for at, rate in rows))


def lte(media: Sequence[str], seeds: Sequence[int]) -> Iterator[Trace]:
    """Yields generated traces."""
    for seed in seeds:
        parts = [
            wandering(
                name,
                duration_s=300,
                cv=LTE_CV,
                correlation=LTE_CORRELATION,
                seed=seed + 100 * k,
            )
            for k, name in enumerate(media)
        ]
        yield Trace("lte", f"generated {seed}", merged(parts), 300.0)


def thermal(devices: Sequence[str]) -> Iterator[Trace]:
    """Yields each curve on those devices, which cool down again and heat up once more."""
    with (FILES / "thermal.csv").open() as file:
        rows = list(csv.DictReader(file))
    for curve in dict.fromkeys(row["curve"] for row in rows):
        points = [(float(r["at_s"]), float(r["factor"])) for r in rows if r["curve"] == curve]
        cycle = [*points, (COOLING_S, 1.0)]
        entries = [
            (at + start, name, factor)
            for start in (0.0, COOLING_S)
            for at, factor in cycle
            for name in devices
            if at + start < THERMAL_END_S
        ]
        dynamics = Dynamics(tuple(sorted(entries, key=lambda e: e[0])))
        yield Trace("thermal", curve, dynamics, THERMAL_END_S)


def churn(cluster: Cluster, keep: str | None) -> Iterator[Trace]:
    """Yields each trace, with the number of instances scaled to the number of devices."""
    for file in sorted(FILES.glob("churn_*.csv")):
        unit_s = 3600.0 if "hours" in file.stem else 1.0
        rows = [line.split(",") for line in file.read_text().splitlines() if line.strip()]
        counts = [(float(at) * unit_s / CHURN_COMPRESSION, int(n)) for at, n in rows]
        first_s = next(at for at, n in counts if n)
        counts = [(at - first_s, n) for at, n in counts if at >= first_s]
        dynamics = _membership(counts, cluster, keep, seed=len(file.stem))
        yield Trace("churn", file.stem.removeprefix("churn_"), dynamics, counts[-1][0])


def _membership(
    counts: Sequence[tuple[float, int]], cluster: Cluster, keep: str | None, seed: int
) -> Dynamics:
    """Returns who is there: joins and losses hit devices drawn at random, one always stays."""
    names = [device.name for device in cluster.devices]
    stays = keep or names[0]
    random, full = Random(seed), max(n for _, n in counts)
    here, entries = set(names), []
    for at_s, n in counts:
        wanted = max(1, round(n / full * len(names)))
        while len(here) > wanted:
            name = random.choice(sorted(here - {stays}))
            here.discard(name)
            entries.append((at_s, name, 0.0))
        while len(here) < wanted:
            name = random.choice([n for n in names if n not in here])
            here.add(name)
            entries.append((at_s, name, 1.0))
    return Dynamics(tuple(entries))


def media_of(cluster: Cluster) -> list[str]:
    """Returns the shared radio channels, which are what varies."""
    return [m.name for m in cluster.media if len(m.contention) > 1]


def uplinks_of(cluster: Cluster) -> list[str]:
    """Returns cellular uplinks: not a channel, and their rate varies."""
    return [
        m.name
        for m in cluster.media
        if len(m.contention) == 1 and (m.rate_p10_bytes_per_s or inf) < 0.9 * m.rate_bytes_per_s
    ]
