"""Runs one program on all devices of a testbed, as torchrun would on theirs; plays what happens.

Events are `SECONDS VERB NAME`, counted from the moment when all devices are on the network:

    12 kill phone         its processes are killed      14 restart phone   the program starts again
    12 pause phone        its processes are stopped     14 resume phone    they go on
    12 disconnect phone   its cable is pulled           14 connect phone
"""

from __future__ import annotations

import os
import secrets
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from dora.errors import SpecError
from dora.simulator.dynamics import Dynamics
from dora.spec import Cluster
from dora.testbed.testbed import Testbed

_POLL_S = 0.05
# What the others get to end by themselves after one has failed: a peer that is silent is given up
# after 30 s.
_GRACE_S = 40.0
_VERBS = ("kill", "restart", "pause", "resume", "disconnect", "connect")


class Event(NamedTuple):
    """Something that happens to a device at a time."""

    at_s: float
    verb: str
    name: str


def parse_event(text: str, cluster: Cluster) -> Event:
    """Reads 'SECONDS VERB NAME'.

    Raises:
        SpecError: Says what is wrong and what is allowed.
    """
    names = [device.name for device in cluster.devices]
    words = text.split(maxsplit=2)
    with suppress(ValueError):
        if len(words) == 3 and words[1] in _VERBS and words[2] in names and float(words[0]) >= 0:
            return Event(float(words[0]), words[1], words[2])
    raise SpecError(
        f"event: given {text!r}, allowed: 'SECONDS VERB NAME', verbs {', '.join(_VERBS)}, names "
        f"{', '.join(names)}"
    )


class Job:
    """The processes of one program, one per device; `lines` runs it to its end.

    Args:
        testbed: Where; it has to be open.
        command: Program and arguments, equal on all devices.
        env: Their environment; torchrun's variables and a secret for the job are added.
        dynamics: Rates and speeds over time.
        events: What happens to devices.
        limit_s: After which all are stopped.
    """

    def __init__(
        self,
        testbed: Testbed,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        dynamics: Dynamics | None = None,
        events: Sequence[Event] = (),
        limit_s: float = float("inf"),
    ) -> None:
        self._testbed = testbed
        self._names = [device.name for device in testbed.cluster.devices]
        self._command = list(command)
        self._env = {**env, "DORA_KEY": env.get("DORA_KEY", secrets.token_hex(32))}
        self._limit_s = limit_s
        changes = [
            Event(at_s, str(factor), name)
            for at_s, name, factor in (dynamics.entries if dynamics else ())
        ]
        self._events = sorted([*changes, *events], key=lambda event: event.at_s)
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._rests = dict.fromkeys(range(len(self._names)), b"")
        self.has_begun = False
        self.problem = ""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Starts the program and yields (device, line) as they come, until all have ended.

        Devices get their own speeds, and events happen, once all are on the network: `has_begun`
        tells whether they were. Afterwards `problem` says why it failed, and is empty otherwise.
        """
        for device in range(len(self._names)):
            self._start(device)
        begun_s: float | None = None
        deadline = time.monotonic() + self._limit_s
        while self._running() or self._selector.get_map():
            yield from self._read()
            if begun_s is None and self._testbed.has_sent():
                self._testbed.limit()
                begun_s, self.has_begun = time.monotonic(), True
            self._play(begun_s)
            deadline = min(deadline, self._judge())
            if time.monotonic() > deadline:
                self.problem = self.problem or f"still running after {self._limit_s:g} s"
                self.stop()
        self._judge()

    def stop(self) -> None:
        """Kills all processes."""
        for name in self._names:
            self._testbed.kill(name)

    # ------------------------------------------------------------ processes

    def _start(self, device: int) -> None:
        process = self._testbed.spawn(
            device,
            self._command,
            {**self._env, **rank_environment(self._testbed, device)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._processes[device] = process
        self._selector.register(process.stdout, selectors.EVENT_READ, device)

    def _running(self) -> list[int]:
        return [d for d, process in self._processes.items() if process.poll() is None]

    def _read(self) -> Iterator[tuple[str, str]]:
        for key, _ in self._selector.select(_POLL_S):
            device, data = key.data, os.read(key.fd, 1 << 16)
            if not data:
                self._selector.unregister(key.fileobj)
                data = b"\n" if self._rests[device] else b""
            *whole, self._rests[device] = (self._rests[device] + data).split(b"\n")
            for line in whole:
                yield self._names[device], line.decode(errors="replace")

    def _judge(self) -> float:
        """Notes the first failure; returns when the others have had time to end by themselves."""
        failed = {d: p.returncode for d, p in self._processes.items() if p.poll()}
        if not failed or self.problem:
            return float("inf")
        device, code = next(iter(failed.items()))
        self.problem = f"{self._names[device]} (rank {device}) {self._explain(device, code)}"
        return time.monotonic() + _GRACE_S

    def _explain(self, device: int, code: int) -> str:
        if self._testbed.out_of_memory(device):
            allowed = self._testbed.cluster.devices[device].memory_bytes / 1e9
            return f"was killed: it needed more than its memory of {allowed:.1f} GB"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    # ------------------------------------------------------------ events

    def _play(self, begun_s: float | None) -> None:
        while begun_s is not None and self._events:
            if time.monotonic() < begun_s + self._events[0].at_s:
                return
            self._happen(self._events.pop(0))

    def _happen(self, event: Event) -> None:
        testbed, name = self._testbed, event.name
        if event.verb == "kill":
            self._processes.pop(testbed.position(name), None)  # as asked for: no failure
            testbed.kill(name)
        elif event.verb == "restart":
            testbed.kill(name)
            self._start(testbed.position(name))
        elif event.verb in ("pause", "resume"):
            testbed.set_speed(name, float(event.verb == "resume"))
        elif event.verb in ("disconnect", "connect"):
            testbed.set_connected(name, event.verb == "connect")
        elif name in self._names:
            testbed.set_speed(name, float(event.verb))
        else:
            testbed.set_rate(name, float(event.verb))


def rank_environment(testbed: Testbed, device: int) -> dict[str, str]:
    """Returns what torchrun tells the process of a device."""
    return {
        "RANK": str(device),
        "LOCAL_RANK": "0",
        "GROUP_RANK": str(device),
        "WORLD_SIZE": str(len(testbed.cluster.devices)),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": testbed.address(0),
        "MASTER_PORT": str(testbed.port),
        "GLOO_SOCKET_IFNAME": testbed.interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # torch complains about every address that has no name.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
