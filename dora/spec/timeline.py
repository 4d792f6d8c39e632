"""What happened on every rank, predicted or measured, and what the adapter concludes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from dora.spec.base import Count, Index, Name, NonNegative, Provenance, Spec
from dora.spec.plan import DeviceMemory


class Span(Spec):
    """Something that occupied one lane of one rank; `wait` is blocked on a transfer."""

    rank: Index
    lane: Literal["compute", "network", "wait"]
    label: str
    start_s: float
    end_s: float


class Energy(Spec):
    """Joules of one device, and whether they were measured, modelled or are unknown."""

    device: Name
    joules: NonNegative = 0.0
    provenance: Provenance = "none"


def _union_s(intervals: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yields the merged intervals in order."""
    start, end = float("-inf"), float("-inf")
    for a, b in sorted(intervals):
        if a > end:
            if end > start:
                yield start, end
            start, end = a, b
        end = max(end, b)
    if end > start:
        yield start, end


class Timeline(Spec):
    """Spans of all ranks on one clock, predicted by the simulator or measured by the runtime."""

    source: Literal["predicted", "measured"]
    num_ranks: Count
    spans: tuple[Span, ...] = ()
    energy: tuple[Energy, ...] = ()
    memory: tuple[DeviceMemory, ...] = ()

    def busy_s(self, rank: int, *lanes: str) -> float:
        """Returns the seconds in which any of those lanes of a rank is occupied."""
        spans = [(s.start_s, s.end_s) for s in self.spans if s.rank == rank and s.lane in lanes]
        return sum(b - a for a, b in _union_s(spans))

    @property
    def makespan_s(self) -> float:
        """Seconds from the first start to the last end; 0 without spans."""
        if not self.spans:
            return 0.0
        return max(s.end_s for s in self.spans) - min(s.start_s for s in self.spans)

    @property
    def bubble_ratio(self) -> float:
        """Share of rank-seconds without compute: 1 - busy / (ranks x makespan)."""
        busy = sum(self.busy_s(rank, "compute") for rank in range(self.num_ranks))
        return 1 - busy / (self.num_ranks * self.makespan_s) if self.spans else 0.0

    @property
    def exposed_comm_s(self) -> float:
        """Mean over ranks of the network seconds that no compute of that rank covers."""
        return (
            sum(
                self.busy_s(rank, "network", "compute") - self.busy_s(rank, "compute")
                for rank in range(self.num_ranks)
            )
            / self.num_ranks
        )

    @property
    def energy_j(self) -> float:
        """Joules of all devices, whatever their provenance."""
        return sum(energy.joules for energy in self.energy)
