"""Moves tensors of the model to where a new plan wants them, and only those that are missing.

`shipments` decides who sends what, the same on every rank. A `Carrier` sends and receives it in
chunks; what it has started goes on while steps run, until `collect` takes it, and what was
interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dora.errors import DoraError
from dora.runtime.parcel import Layout, Parcel, room
from dora.runtime.priority import WEIGHTS, Priority
from dora.runtime.transport import Pending, Transport
from dora.spec import Plan


class Shipment(NamedTuple):
    """A tensor that one rank sends to another."""

    name: str
    src: int
    dst: int


def shipments(
    needed: Mapping[str, Iterable[int]],
    suppliers: Mapping[str, Sequence[int]],
    distance: Callable[[int, int], float],
) -> list[Shipment]:
    """Returns who sends which tensor to whom; ranks that can supply it themselves get none.

    The nearest supplier sends; of equally near ones, the one that has been given the least.

    Args:
        needed: Tensor -> ranks that have to get it.
        suppliers: Tensor -> ranks that can send it.
        distance: Between two ranks.

    Raises:
        DoraError: Nobody has a tensor.
    """
    given: dict[int, int] = {}
    found = []
    for name, ranks in needed.items():
        sources = suppliers.get(name, ())
        for dst in sorted(ranks):
            if dst in sources:
                continue
            if not sources:
                raise DoraError(f"{name}: no rank has it any more")
            src = min(sources, key=lambda rank: (distance(rank, dst), given.get(rank, 0), rank))
            given[src] = given.get(src, 0) + 1
            found.append(Shipment(name, src, dst))
    return found


def media_between(plan: Plan) -> Callable[[int, int], float]:
    """Returns the distance of two ranks: how many media a flow between them crosses."""
    rank = {name: i for i, name in enumerate(plan.devices)}
    crossed = {(rank[link.src], rank[link.dst]): len(link.media) for link in plan.links}
    return lambda src, dst: crossed.get((src, dst), 0)


class _Arrival(NamedTuple):
    parcel: Parcel
    num_before: int  # chunks that had come before an interruption
    parts: list[Pending]  # the others


class Carrier:
    """Sends and receives parcels for one rank.

    Args:
        transport: Carries the chunks.
        rank: This process.
        tag: Of the chunks.
        timeout_s: Limit of the wait for each chunk.
        priority: Of the chunks; steps that go on meanwhile come before `WEIGHTS`.
    """

    def __init__(
        self,
        transport: Transport,
        rank: int,
        tag: int,
        timeout_s: float,
        *,
        priority: Priority = WEIGHTS,
    ) -> None:
        self._transport = transport
        self._rank = rank
        self._tag = tag
        self._timeout_s = timeout_s
        self._priority = priority
        self._sends: list[Pending] = []
        self._arrivals: dict[str, _Arrival] = {}
        self._parts: dict[str, tuple[Parcel, int]] = {}  # interrupted after so many chunks

    def progress(self) -> dict[str, int]:
        """Returns how many chunks have come of what was interrupted."""
        return {name: count for name, (_, count) in self._parts.items()}

    def names(self) -> list[str]:
        """Returns what has come or is on its way."""
        return list(self._arrivals)

    def start(
        self,
        moves: Sequence[Shipment],
        parcels: Mapping[str, Parcel],
        layouts: Mapping[str, Layout],
        progress: Mapping[int, Mapping[str, int]],
    ) -> None:
        """Starts all of `moves` that this rank takes part in.

        Args:
            moves: In the same order on all ranks.
            parcels: What this rank sends.
            layouts: Of what it receives.
            progress: Rank -> tensor -> chunks that it has already.
        """
        for name, src, dst in moves:
            done = progress.get(dst, {}).get(name, 0)
            if src == self._rank:
                for chunk in parcels[name].chunks()[done:]:
                    self._sends.append(
                        self._transport.send(
                            chunk, dst, self._tag, f"move {name}", priority=self._priority
                        )
                    )
            elif dst == self._rank:
                self._receive(name, src, layouts[name], done)

    def collect(self, names: Iterable[str]) -> dict[str, Parcel]:
        """Waits for all that is under way, and returns those tensors."""
        for arrival in self._arrivals.values():
            for part in arrival.parts:
                part.wait(self._timeout_s)
        for send in self._sends:
            send.wait(self._timeout_s)
        arrived = {name: self._arrivals[name].parcel for name in names}
        self._sends, self._arrivals, self._parts = [], {}, {}
        return arrived

    def interrupted(self) -> None:
        """Keeps what has come, once nothing more can: call it when the transport was renewed."""
        for name, arrival in self._arrivals.items():
            count = arrival.num_before + _num_done(arrival.parts)
            self._parts[name] = arrival.parcel, count
        self._sends, self._arrivals = [], {}

    def forget(self) -> None:
        """Drops what was interrupted: the tensors have changed since."""
        self._parts = {}

    def _receive(self, name: str, src: int, layout: Layout, done: int) -> None:
        before = self._parts.pop(name, None)
        parcel = room(layout) if before is None else before[0]
        parts = [
            self._transport.receive(chunk, src, self._tag, f"move {name}")
            for chunk in parcel.chunks()[done:]
        ]
        self._arrivals[name] = _Arrival(parcel, done, parts)


def _num_done(parts: Sequence[Pending]) -> int:
    for count, part in enumerate(parts):
        try:
            part.wait(0.0)
        except DoraError:
            return count
    return len(parts)
