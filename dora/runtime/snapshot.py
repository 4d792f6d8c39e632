"""Copies of the training state at a neighbour, made in the background.

Every rank keeps a copy of its own tensors, to go back to, and one of a neighbour that holds others.
A snapshot replaces the one before only when all ranks have their part of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dora.errors import DoraError
from dora.runtime.parcel import Parcel, room
from dora.runtime.priority import WEIGHTS
from dora.runtime.tags import SNAPSHOT_TAG
from dora.runtime.transport import Pending, Transport
from dora.spec import Plan


class Version(NamedTuple):
    """Which state it is: the same numbers on all ranks mean the same state.

    Attributes:
        steps: Calls of `step` of the user's optimizers, and loads, so far.
        calls: Training calls of the model so far.
    """

    steps: int
    calls: int


@dataclass
class Snapshot:
    """What this rank has of one version.

    Attributes:
        updates: Of the optimizers, as people count them.
        own: Of this rank's tensors; empty if those do not change, as in inference.
        others: Of the neighbour's; each is there as soon as it is complete.
        is_whole: `own` has all of this rank's tensors.
        is_done, is_failed: Whether this rank has all its part, or never will.
    """

    version: Version
    updates: int
    own: Mapping[str, Parcel]
    others: dict[str, Parcel] = field(default_factory=dict)
    is_whole: bool = True
    is_done: bool = False
    is_failed: bool = False

    def parcels(self) -> dict[str, Parcel]:
        """Returns all that is complete."""
        return {**self.own, **self.others}


class Snapshots:
    """The snapshots of one rank.

    Args:
        transport: Carries them at the lowest priority.
        timeout_s: Limit of every wait.
    """

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._thread: threading.Thread | None = None
        self.complete: Snapshot | None = None
        self.taking: Snapshot | None = None

    def begin(
        self,
        snapshot: Snapshot,
        outgoing: Mapping[str, Parcel],
        to: int | None,
        of: Iterable[int],
    ) -> None:
        """Starts to exchange copies; only while none is being taken.

        Args:
            snapshot: With the copies of this rank's tensors.
            outgoing: What goes to the neighbour; it must not change until it is there.
            to: The neighbour that keeps them; None if there is none.
            of: Ranks whose neighbour this rank is.
        """
        assert self.taking is None
        self.taking = snapshot
        self._thread = threading.Thread(
            target=self._exchange,
            args=(snapshot, outgoing, to, tuple(of)),
            name="dora-snapshot",
            daemon=True,
        )
        self._thread.start()

    def keep(self) -> None:
        """Keeps the one being taken, which is complete on all ranks, instead of the one before."""
        self.stop()
        self.complete, self.taking = self.taking, None

    def drop(self) -> None:
        """Gives up the one being taken."""
        self.stop()
        self.taking = None

    def settle(self, version: Version) -> None:
        """Keeps what was used in a recovery, for the case of another loss."""
        if self.taking is not None and self.taking.version == version:
            self.complete = self.taking
        self.drop()

    def all(self) -> list[Snapshot]:
        """Returns all that there is, the newest first."""
        return [s for s in (self.taking, self.complete) if s is not None]

    def stop(self) -> None:
        """Waits for the thread; it ends at once after the transport was interrupted."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _exchange(
        self, snapshot: Snapshot, outgoing: Mapping[str, Parcel], to: int | None, of: Sequence[int]
    ) -> None:
        try:
            sends = [] if to is None else self._send(outgoing, to)
            for src in of:
                self._receive(snapshot, src)
            for send in sends:
                send.wait(self._timeout_s)
            snapshot.is_done = True
        except DoraError:  # a rank was lost: the recovery asks what is complete
            snapshot.is_failed = True

    def _send(self, outgoing: Mapping[str, Parcel], to: int) -> list[Pending]:
        layouts = {name: parcel.layout() for name, parcel in outgoing.items()}
        head = torch.frombuffer(bytearray(json.dumps(layouts).encode()), dtype=torch.uint8)
        chunks = [chunk for parcel in outgoing.values() for chunk in parcel.chunks()]
        return [
            self._transport.send(x, to, SNAPSHOT_TAG, "snapshot", priority=WEIGHTS)
            for x in (torch.tensor(head.numel()), head, *chunks)
        ]

    def _receive(self, snapshot: Snapshot, src: int) -> None:
        size = torch.tensor(0)
        self._wait_for(size, src)
        head = torch.empty(int(size), dtype=torch.uint8)
        self._wait_for(head, src)
        parcels = {n: room(layout) for n, layout in json.loads(head.numpy().tobytes()).items()}
        coming = {
            name: [
                self._transport.receive(chunk, src, SNAPSHOT_TAG, "snapshot")
                for chunk in parcel.chunks()
            ]
            for name, parcel in parcels.items()
        }
        for name, parts in coming.items():
            for part in parts:
                part.wait(self._timeout_s)
            snapshot.others[name] = parcels[name]

    def _wait_for(self, tensor: torch.Tensor, src: int) -> None:
        self._transport.receive(tensor, src, SNAPSHOT_TAG, "snapshot").wait(self._timeout_s)


def keepers(plan: Plan, members: Sequence[int]) -> dict[int, int]:
    """Returns which rank keeps the copy of which: the next one along the stages that holds others.

    Devices that the plan leaves out come last: they have memory to spare. Those that hold the same
    as another one, as replicas do, need no keeper.
    """
    chain = [r for stage in plan.stages for r in plan.ranks(stage.index) if r in members]
    chain += [r for r in members if r not in chain]
    stage_of = {r: stage.index for stage in plan.stages for r in plan.ranks(stage.index)}
    found = {}
    for i, rank in enumerate(chain):
        others = [*chain[i + 1 :], *chain[:i]]
        fit = [r for r in others if stage_of.get(r) != stage_of.get(rank)]
        if rank in stage_of and fit:
            found[rank] = fit[0]
    return found
