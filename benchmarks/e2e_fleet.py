"""The devices of a testbed as processes that do what they are asked: see `e2e_worker.py`."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dora.keys import new_key
from dora.spec import Cluster
from dora.testbed import Testbed, rank_environment

_WORKER = Path(__file__).with_name("e2e_worker.py")
_START_S = 60.0
_ANSWER_S = 300.0


class Fleet:
    """A testbed with a worker on every device; a context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self.testbed = Testbed(cluster, mode="namespaces")
        self._ends: list[Connection] = []
        self._stack = ExitStack()
        self._key = new_key()

    def __enter__(self) -> Fleet:
        """Starts the workers and lets them join, at full speed."""
        self._stack.enter_context(self.testbed)
        try:
            for device in range(len(self.testbed.cluster.devices)):
                self._ends.append(self._start(device))
            for rank, end in enumerate(self._ends):
                self._answer(end, rank, _START_S)
            self.ask("join", [(rank_environment(self.testbed, d),) for d in range(len(self._ends))])
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers and the testbed."""
        self._stack.close()

    def _start(self, device: int) -> Connection:
        here, there = socket.socketpair()
        with there:
            command = [sys.executable, str(_WORKER), str(there.fileno())]
            environment = {
                **os.environ,
                **rank_environment(self.testbed, device),
                "DORA_KEY": self._key,
            }
            self.testbed.spawn(device, command, environment, pass_fds=(there.fileno(),))
        return Connection(here.detach())

    def ask(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Calls a method on every worker, each with its own arguments; returns all results."""
        for end, given in zip(self._ends, arguments, strict=True):
            end.send((method, given))
        return [self._answer(end, rank, _ANSWER_S) for rank, end in enumerate(self._ends)]

    def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method on every worker with the same arguments."""
        return self.ask(method, [arguments] * len(self._ends))

    def _answer(self, end: Connection, rank: int, limit_s: float) -> Any:
        if not end.poll(limit_s):
            raise TimeoutError(f"worker {rank} did not answer within {limit_s:g} s")
        try:
            result, error = end.recv()
        except EOFError:
            raise RuntimeError(f"worker {rank} has ended") from None
        if error:
            raise RuntimeError(f"worker {rank}: {error}")
        return result
