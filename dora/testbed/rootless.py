"""Devices and network without root: ordinary processes, stopped and continued, and a bucket file.

What `Testbed` asks of it is what it asks of `namespaces.Namespaces`, too. What is missing:

- Only what Dora's engine sends is slow: traffic of gloo and of other sockets is not, nor counted.
- Media have no latency (see `bucket` for the rest of what they lack).
- Memory is not limited, and the peak is that of the processes that were spawned.
- Processes that programs start themselves are not slowed, nor are their times counted; they end
  with the testbed, or, where that was killed, at the next start of one.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from dora.spec import Cluster
from dora.testbed import names
from dora.testbed.bucket import BucketFile
from dora.testbed.duty import Duty, cpu_s
from dora.testbed.process import start
from dora.testbed.scale import Scale, emulated

# Processes inherit it, so that all that belong to a device are found. Not for programs to read.
_MARK = "DORA_TESTBED_DEVICE"
_KILL_S = 5.0


def remove_left_over() -> None:
    """Kills what programs of testbeds have started and left, whose process was killed."""
    _kill_all(lambda mark: mark.startswith(f"{names.PREFIX}-") and names.is_left_over(mark))


class Rootless:
    """The devices of a cluster, and `network` between them.

    Args:
        name: Of the testbed.
        given: Devices and network, at full size.
        scale: Factors of speeds and rates.

    Attributes:
        cluster: As emulated.
        has_delay: Always False.
        interface, port: Of every device, for the rendezvous of its programs.
    """

    interface, has_delay = "lo", False

    def __init__(self, name: str, given: Cluster, scale: Scale) -> None:
        self._name = name
        self.cluster = emulated(given, scale, has_delay=False)
        self._stack = ExitStack()
        self._members: list[list[_Member]] = [[] for _ in given.devices]
        self._cores: list[float | None] = [None] * len(given.devices)
        self._peaks = [0] * len(given.devices)
        self._aside: list[subprocess.Popen[Any]] = []

    def open(self) -> None:
        """Makes the network and what slows devices down, after removing what is left over."""
        remove_left_over()
        self.network = self._stack.enter_context(BucketFile(self.cluster))
        self._duty = self._stack.enter_context(Duty())
        self.port = self._stack.enter_context(_reserved_port()).getsockname()[1]

    def close(self) -> None:
        """Kills what runs and closes the network."""
        processes = [*self._aside, *(m.process for members in self._members for m in members)]
        for process in processes:
            process.kill()
        _kill_all(lambda mark: mark.startswith(f"{self._name}-"))
        for process in processes:
            process.wait()
        self._stack.close()

    def address(self, device: int) -> str:
        """Returns the IP address of a device: that of this machine, for all."""
        return "127.0.0.1"

    def spawn(
        self,
        device: int,
        command: Sequence[str],
        cpus: Sequence[int],
        env: Mapping[str, str],
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Starts a process on a device."""
        marks = {**self.network.environment, _MARK: f"{self._name}-{device}"}
        process = start(command, cpus, env={**env, **marks}, **options)
        self._members[device].append(_Member(process))
        self._duty.limit(process.pid, self._cores[device])
        return process

    def spawn_aside(
        self, command: Sequence[str], cpus: Sequence[int], env: Mapping[str, str]
    ) -> None:
        """Starts a process that belongs to no device, and yields to those that do."""
        process = start(command, cpus, env={**env, _MARK: f"{self._name}-aside"})
        self._aside.append(process)
        # Kernels with autogroups share a processor between sessions first: those with nothing but
        # idle processes would take as much as others.
        with suppress(OSError):
            Path(f"/proc/{process.pid}/autogroup").write_text("19")

    def set_cores(self, device: int, cores: float | None) -> None:
        """Sets the share of the processor: 0 stops what runs, None is full speed."""
        self._cores[device] = cores
        for member in self._members[device]:
            if member.process.returncode is None:
                self._duty.limit(member.process.pid, cores)

    def free_messengers(self) -> None:
        """Does nothing: stopping a process stops all its threads."""

    def kill(self, device: int) -> None:
        """Kills all processes of a device."""
        for member in self._members[device]:
            member.process.kill()
        _kill_all(lambda mark: mark == f"{self._name}-{device}")

    def cpu_s(self, device: int) -> float:
        """Returns the processor time used so far."""
        return sum(member.cpu_s() for member in self._members[device])

    def peak_bytes(self, device: int) -> int:
        """Returns the most memory held so far, as seen by the calls of this."""
        held = sum(member.peak_bytes() for member in self._members[device])
        self._peaks[device] = max(self._peaks[device], held)
        return self._peaks[device]

    def out_of_memory(self, device: int) -> bool:
        """Returns False: nothing limits memory."""
        return False


class _Member:
    """A process of a device."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self.process = process
        self._cpu_s = 0.0

    def cpu_s(self) -> float:
        """Returns its processor time; once somebody has waited for it, what it was before."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self._cpu_s = cpu_s(self.process.pid)
        return self._cpu_s

    def peak_bytes(self) -> int:
        """Returns the most memory that it has held; 0 once it has ended."""
        with suppress(OSError):
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            if self.process.returncode is None and (found := re.search(r"VmHWM:\s*(\d+) kB", text)):
                return int(found[1]) * 1024
        return 0


def _reserved_port() -> socket.socket:
    """Returns what keeps a port, while it is open, for those who are told of it."""
    holder = socket.socket()
    holder.bind(("", 0))
    # Set later than that, so that nobody gets the port from the kernel a second time; torch's store
    # sets it, too, and may then listen where this one does not.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder


def _kill_all(is_meant: Callable[[str], bool]) -> None:
    """Kills the processes with such marks, and those that they start meanwhile."""
    deadline = time.monotonic() + _KILL_S
    while (pids := _marked(is_meant)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _marked(is_meant: Callable[[str], bool]) -> list[int]:
    """Returns the processes of this user that carry such a mark."""
    found, start_of = [], f"{_MARK}=".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is somebody else's
            entries = path.read_bytes().split(b"\0")
            marks = [e[len(start_of) :].decode() for e in entries if e.startswith(start_of)]
            if any(map(is_meant, marks)):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]
