"""One control group per device: its share of the processor and its memory; cgroup v1 and v2.

Version 1 has a folder per controller, version 2 one for all; each device's folders lie in one that
names the testbed's process, so that leftovers can be told from what is in use.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from dora.errors import DoraError

# A process waits for the rest of a period once its share is used up: 10 ms keep those waits short.
# Shares below 1 ms a period are refused by the kernel, and coarse already at 2 ms: then the period
# grows.
_PERIOD_S = 0.010
_MIN_QUOTA_S = 0.002
_MAX_PERIOD_S = 0.2
_CONTROLLERS = ("cpu", "cpuacct", "memory")
# Names of the threads of Dora's engine and of gloo that carry messages.
_MESSENGERS = ("dora-io", "gloo_tcp_loop")
_KILL_S = 20.0


class CgroupError(DoraError, RuntimeError):
    """This machine offers no usable control groups, or one refused a limit; says why."""


def mounts(text: str | None = None) -> dict[str, Path]:
    """Returns where each controller is: cpu, cpuacct and memory (v1), or 'unified' (v2 alone).

    Args:
        text: Of /proc/mounts.
    """
    found: dict[str, Path] = {}
    for line in (text or Path("/proc/mounts").read_text()).splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup":
            found |= {c: Path(folder) for c in _CONTROLLERS if c in options.split(",")}
        elif kind == "cgroup2" and _has_controllers(Path(folder)):
            found["unified"] = Path(folder)
    return found


def _has_controllers(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return {"cpu", "memory"} <= set((folder / "cgroup.controllers").read_text().split())
    return False


def why_not(found: Mapping[str, Path]) -> str:
    """Returns what is missing to limit devices; empty if nothing is."""
    if "unified" in found or all(c in found for c in _CONTROLLERS):
        return ""
    return "needs the cgroup controllers cpu and memory, of version 1 or 2"


class DeviceGroup:
    """The processes of one device.

    Args:
        parent: Name of the folder above, of the testbed.
        name: Of the device's folder.
        found: From `mounts`.
    """

    def __init__(self, parent: str, name: str, found: Mapping[str, Path]) -> None:
        self._is_v2 = "unified" in found
        used = ("unified",) if self._is_v2 else _CONTROLLERS
        self._folders = {c: found[c] / parent / name for c in used}
        self._cpu, self._memory = (
            self._folders["unified" if self._is_v2 else c] for c in ("cpu", "memory")
        )
        for controller, folder in self._folders.items():
            folder.parent.mkdir(exist_ok=True)
            if self._is_v2:
                for above in (found[controller], folder.parent):
                    _write(above / "cgroup.subtree_control", "+cpu +memory")
            folder.mkdir()
        self._freed: set[str] = set()

    @property
    def entries(self) -> list[Path]:
        """Files that a process writes its id to, to become a member."""
        return sorted({folder / "cgroup.procs" for folder in self._folders.values()})

    def limit_cores(self, cores: float | None) -> None:
        """Sets the share of the processor; None lifts it."""
        period_s = min(max(_PERIOD_S, _MIN_QUOTA_S / cores), _MAX_PERIOD_S) if cores else _PERIOD_S
        period, quota = int(period_s * 1e6), int(period_s * 1e6 * cores) if cores else None
        if self._is_v2:
            _write(self._cpu / "cpu.max", f"{'max' if quota is None else quota} {period}")
            return
        _write(self._cpu / "cpu.cfs_period_us", str(period))
        _write(self._cpu / "cpu.cfs_quota_us", str(-1 if quota is None else quota))

    def yield_to_others(self) -> None:
        """Lets members run only where nothing else on this machine wants to.

        The kernel shares a processor between groups first, level by level: idle processes in a
        group that is not idle take half of it, and a device with 0.8 of a core got 0.63. So the
        folder above, which has to be for this group alone, is idle too.
        """
        weight = "cpu.weight" if self._is_v2 else "cpu.shares"
        for folder in (self._cpu.parent, self._cpu):
            if (folder / "cpu.idle").exists():  # since Linux 5.15
                _write(folder / "cpu.idle", "1")
            else:
                _write(folder / weight, "1" if self._is_v2 else "2")  # the smallest allowed

    def free_messengers(self) -> None:
        """Lets the threads that carry messages run outside the device's share; version 1 only.

        A quota stops all threads of a group for the rest of a period, but a device that computes
        goes on sending: with Dora's engine, which feeds a slow link bit by bit, steps took 30 %
        longer while its thread was stopped with the others. Their time is still counted, unless
        one folder serves both cpu and cpuacct.
        """
        if self._is_v2:
            return
        for task in [t for pid in self.pids() for t in Path(f"/proc/{pid}/task").glob("*")]:
            with contextlib.suppress(OSError):  # it has ended
                if task.name not in self._freed and _name(task) in _MESSENGERS:
                    (self._cpu.parent / "tasks").write_text(task.name)
                    os.sched_setaffinity(int(task.name), os.sched_getaffinity(0))
                    self._freed.add(task.name)

    def limit_memory(self, num_bytes: int) -> None:
        """Sets the memory above which the kernel kills."""
        name = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
        _write(self._memory / name, str(num_bytes))

    def cpu_s(self) -> float:
        """Returns the processor time used so far."""
        if self._is_v2:
            return _field(self._cpu / "cpu.stat", "usage_usec") / 1e6
        return int((self._folders["cpuacct"] / "cpuacct.usage").read_text()) / 1e9

    def peak_bytes(self) -> int:
        """Returns the most memory held so far."""
        name = "memory.peak" if self._is_v2 else "memory.max_usage_in_bytes"
        return int((self._memory / name).read_text())

    def out_of_memory(self) -> bool:
        """Returns whether the kernel has killed a member for its memory."""
        name = "memory.events" if self._is_v2 else "memory.oom_control"
        return _field(self._memory / name, "oom_kill") > 0

    def pids(self) -> list[int]:
        """Returns the members."""
        return _pids(self._cpu)

    def signal(self, number: int) -> None:
        """Sends a signal to all members."""
        _signal(self.pids(), number)


def _name(task: Path) -> str:
    return (task / "comm").read_text().strip()


def remove_tree(name: str, found: Mapping[str, Path]) -> None:
    """Deletes the groups of a testbed, with all that runs in them."""
    roots = {mount / name for mount in found.values()}
    groups = [path for root in roots for path in root.glob("*") if path.is_dir()]
    for folder in groups:
        _free(folder)
    for folder in (*groups, *roots):
        _remove(folder)


def parents(prefix: str, found: Mapping[str, Path]) -> set[str]:
    """Returns the names of the testbeds that have groups."""
    return {path.name for mount in found.values() for path in mount.glob(f"{prefix}-*")}


def _free(folder: Path) -> None:
    """Lifts limits: to end takes processor time, which a member without any would wait for."""
    for name, text in (("cpu.idle", "0"), ("cpu.cfs_quota_us", "-1"), ("cpu.max", "max")):
        if (folder / name).exists():
            with contextlib.suppress(OSError):
                (folder / name).write_text(text)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _KILL_S
    while folder.exists():
        _signal(_pids(folder), signal.SIGKILL)
        try:
            folder.rmdir()
        except OSError:  # members are still ending
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _pids(folder: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(line) for line in (folder / "cgroup.procs").read_text().split()]
    return []


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise CgroupError(f"{path}: writing {text!r} failed: {error.strerror}") from None


def _field(path: Path, name: str) -> int:
    rows = (line.split() for line in path.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)
