"""Statuses of ranks on other machines, over the rendezvous store, so that one folder has them all.

It has a connection of its own and works in the writer's thread: a store that does not answer holds
up nobody. Where all ranks are on one machine, only its name passes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from dora.spec import Status

_TIMEOUT = timedelta(seconds=5)


class Relay:
    """Publishes the status of a rank for the lowest one, which gets those of the others.

    Args:
        rank: This process.
        host: Its machine.
    """

    def __init__(self, rank: int, host: str) -> None:
        self._rank, self._host = rank, host
        self._store: Any = None
        self._hosts: dict[int, str] = {}
        self._is_over = False

    def exchange(self, status: Status) -> list[Status]:
        """Returns what ranks on other machines said, on the lowest rank; nothing on the others.

        Once the store has failed, since its host has, this does nothing any more.
        """
        if self._is_over:
            return []
        try:
            return self._exchange(status)
        except Exception:  # of c10d: every kind of it says that the store is gone
            self._is_over = True
            return []

    def _exchange(self, status: Status) -> list[Status]:
        if self._store is None:
            default: Any = dist.distributed_c10d._get_default_store()
            own = default.clone()
            own.set_timeout(_TIMEOUT)
            self._store = PrefixStore("dora/status", own)
            self._store.set(f"host/{self._rank}", self._host)
        lowest = status.members[0]
        if self._rank != lowest:
            if self._is_elsewhere(lowest):
                self._store.set(f"status/{self._rank}", status.model_dump_json(exclude_none=True))
            return []
        others = [rank for rank in status.members[1:] if self._is_elsewhere(rank)]
        texts = (self._read(f"status/{rank}") for rank in others)
        return [Status.model_validate_json(text) for text in texts if text]

    def _is_elsewhere(self, rank: int) -> bool:
        """Returns whether a rank is known to be on another machine."""
        if rank not in self._hosts:
            host = self._read(f"host/{rank}")
            if not host:
                return False
            self._hosts[rank] = host
        return self._hosts[rank] != self._host

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""
