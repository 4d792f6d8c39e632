"""Decides when the ranks take snapshots, takes them, and knows which are complete everywhere."""

from __future__ import annotations

from typing import Any

from dora.runtime.snapshot import Snapshot, Snapshots, Version, keepers
from dora.runtime.transport import Transport

# Calls of the user that snapshots are for; those that follow change no weights.
USERS = ("train", "infer", "generate")
_UNCHANGING = ("infer", "generate")


class Copies:
    """The snapshots of one rank's model; all ranks take them before the same calls.

    Args:
        model: A DoraParallel.
        transport: Carries the copies.
        interval: Optimizer steps between snapshots; 0 takes them on request only.

    Attributes:
        snapshots: What there is.
        is_due: The next one is to be taken whatever the interval.
        serial: Of the one that was begun last; equal on all ranks.
    """

    def __init__(self, model: Any, transport: Transport, interval: int) -> None:
        self._model = model
        self._interval = interval
        self._taken_at = 0  # updates
        self.snapshots = Snapshots(transport, model.timeout_s)
        self.is_due = True
        self.serial = 0

    def prepare(self, kind: str, version: Version) -> None:
        """Begins a snapshot before a call, if it is time."""
        wanted = self._interval > 0 and kind in USERS
        if (wanted or kind == "snapshot") and self._is_time(kind):
            self._take(kind, version)

    def _is_time(self, kind: str) -> bool:
        if self.snapshots.taking is not None:
            return False
        last = self.snapshots.complete
        is_old = 0 < self._interval <= self._model._optimizers.updates - self._taken_at
        is_partial = kind == "train" and last is not None and not last.is_whole
        return self.is_due or is_old or is_partial

    def done(self) -> int:
        """Returns the last one that this rank has all its part of; -1 if the present one failed."""
        taking = self.snapshots.taking
        if taking is not None and taking.is_failed:
            return -1
        return self.serial - (taking is not None and not taking.is_done)

    def learn(self, oldest: int) -> None:
        """Takes note of the least of what all ranks have done."""
        if self.snapshots.taking is not None and oldest == self.serial:
            self.snapshots.keep()
        elif oldest < 0:
            self.snapshots.drop()

    def _take(self, kind: str, version: Version) -> None:
        model = self._model
        state, rank = model._state, model.rank
        updates = model._optimizers.updates
        self.is_due, self._taken_at = False, updates
        self.serial += 1
        is_whole = kind not in _UNCHANGING or updates > 0
        mine = [n for n, ranks in state.holders.items() if rank in ranks]
        parcels = state.parcels(mine, model._optimizers.entries())
        if is_whole:
            parcels = {name: parcel.copy() for name, parcel in parcels.items()}
        keeper = keepers(model.plan, model.members)
        only = {n: ranks[0] for n, ranks in state.holders.items() if len(ranks) == 1}
        of = [r for r, k in keeper.items() if k == rank and r in only.values()]
        outgoing = {n: p for n, p in parcels.items() if n in only and rank in keeper}
        self.snapshots.begin(
            Snapshot(version, updates, parcels if is_whole else {}, is_whole=is_whole),
            outgoing,
            keeper[rank] if outgoing else None,
            of,
        )
