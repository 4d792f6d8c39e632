"""What bench_comm.py promises, and how it shows what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from common import Metric, Row, Samples, Table

KIB, MIB = 1 << 10, 1 << 20
LINK_SIZES = (64 * KIB, MIB, 16 * MIB)
LOOPBACK_SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)


@dataclass(frozen=True)
class Bound:
    at_most: bool
    limit: float
    unit: str

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def size_name(num_bytes: int) -> str:
    return f"{num_bytes // MIB}MiB" if num_bytes >= MIB else f"{num_bytes // KIB}KiB"


def _bounds() -> dict[str, Bound]:
    def named(prefix: str, sizes: Sequence[int], limit: float, suffix: str = "") -> dict:
        bound = Bound(False, limit, "1")
        return {f"{prefix}_{size_name(size)}{suffix}": bound for size in sizes}

    at_most = partial(Bound, True)
    return {
        "round_trip_loopback": at_most(0.75, "1"),
        **named("bulk_loopback", LOOPBACK_SIZES, 1.0, "_header_only"),
        **named("bulk_loopback", LOOPBACK_SIZES, 0.85),
        "cpu_loopback": at_most(1.2, "1"),
        **named("bulk_100mbit", LINK_SIZES, 0.98),
        "cpu_100mbit": at_most(1.2, "1"),
        "urgent_at_once_behind_bulk": at_most(2.5, "ms"),
        "urgent_late_behind_bulk": at_most(2.5, "ms"),
        "bulk_under_urgent": at_most(1.02, "1"),
        "urgent_behind_all_reduce": at_most(5, "ms"),
        "late_receive": at_most(5, "ms"),
        "pipeline": at_most(0.60, "1"),
        "round_trip_1gbit": at_most(0.75, "1"),
        **named("bulk_1gbit", LINK_SIZES, 0.98),
        "cpu_1gbit": at_most(1.2, "1"),
        "urgent_beside_other_device": at_most(4, "ms"),
        "two_devices_urgent": at_most(1.1, "1"),
        "two_devices_total": at_most(1.05, "1"),
    }


BOUNDS = _bounds()


class Report:
    """Prints results as they come and keeps them for the file and the verdict."""

    def __init__(self, missing: str) -> None:
        self.rows: list[Row] = []
        self.missing = missing  # why nobody measured what has no value
        self._values: dict[str, float] = {}
        self._table = Table(["case", "contender", "value", "unit"], width=(62, 24))

    def add(self, case: str, metric: str, unit: str, of: Mapping[str, Samples]) -> None:
        """Adds what contenders reached."""
        for name, samples in of.items():
            self.rows.append(Row(case, name, metric, unit, samples))
            self._table.line(f"{case}: {metric}", name, str(samples), unit)

    def check(self, name: str, samples: Samples) -> None:
        """Holds the median of `samples` against the bound of that name."""
        bound = BOUNDS[name]
        self._values[name] = samples.median
        self.rows.append(Row("bound", "dora", name, bound.unit, samples))
        verdict = "ok" if bound.holds(samples.median) else "MISSED"
        self._table.line(f"  {name}", f"{bound} {bound.unit}", str(samples), verdict)

    def metrics(self) -> dict[str, Metric]:
        return {name: self._metric(name, bound) for name, bound in BOUNDS.items()}

    def _metric(self, name: str, bound: Bound) -> Metric:
        value = self._values.get(name)
        if value is None:
            return Metric(None, bound.unit, str(bound), None, self.missing)
        return Metric(round(value, 4), bound.unit, str(bound), bound.holds(value))
