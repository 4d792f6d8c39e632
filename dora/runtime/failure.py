"""Tells all ranks why one of them failed, so that nobody is left with 'connection closed'."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Sequence

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from dora.errors import PeerLostError

# Long enough for the failing rank to write its reason after its connections closed.
_GRACE_S = 1.0


# How many boards this process opened: keeps their notes in the rendezvous store apart.
_boards = 0


def open_board(rank: int) -> FailureBoard:
    """Returns the board of the next job of this process; the same turn on all ranks."""
    global _boards  # noqa: PLW0603
    _boards += 1
    store = dist.distributed_c10d._get_default_store()
    return FailureBoard(PrefixStore(f"dora/{_boards}", store), rank)


class FailureBoard:
    """One note per job in the rendezvous store: the first failure of any rank.

    Args:
        store: Shared by all ranks.
        rank: This process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self.is_silent = False  # a newcomer's failure is not yet the job's

    def report(self, error: BaseException) -> None:
        """Writes the failure of this rank unless another one was first."""
        if self.is_silent:
            return
        note = json.dumps({"rank": self._rank, "error": f"{type(error).__name__}: {error}"})
        with contextlib.suppress(Exception):  # the store may have died with its host
            self._store.compare_set("failure", "", note)

    def explain(self, error: PeerLostError) -> PeerLostError:
        """Returns `error` with the first failure of another rank appended, if one is known."""
        deadline = time.monotonic() + (0.0 if self.is_silent else _GRACE_S)
        while time.monotonic() < deadline:
            try:
                if self._store.check(["failure"]):
                    note = json.loads(self._store.get("failure"))
                    if note["rank"] == self._rank:
                        return error
                    return PeerLostError(
                        f"{error}; first failure, on rank {note['rank']}: {note['error']}"
                    )
            except Exception:  # the store died with its host: nothing more to learn
                return error
            time.sleep(0.02)
        return error

    def claim(self, topic: str, members: Sequence[int]) -> list[int]:
        """Returns who goes on, by the first rank that has claimed this topic.

        Keeps two parts of a job from both going on, as far as the store can be reached.
        """
        claimed = [*members]

        def ask() -> None:
            nonlocal claimed
            with contextlib.suppress(Exception):  # the store may have died with its host
                note = self._store.compare_set(f"claim/{topic}", "", json.dumps(claimed))
                claimed = json.loads(note)

        # A host that can not be reached answers no sooner than the store's own timeout.
        thread = threading.Thread(target=ask, name="dora-claim", daemon=True)
        thread.start()
        thread.join(_GRACE_S)
        return claimed
