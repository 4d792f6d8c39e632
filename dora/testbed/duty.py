"""Gives processes shares of a core without control groups: stops and continues them all the time.

A process gets credit at the rate of its share and spends it on processor time, its threads' too;
without credit it is stopped until it has a period's worth. So whatever a signal that comes late
lets it have too much is taken back at once, and the share holds over any longer time. Idle, it
saves up a period's worth; while it waits for a processor that others use, more.

What differs from a control group: processes that it starts are not limited, memory is not, and when
the process that does this is killed, those that are stopped stay so (start them with
`setpriv --pdeathsig KILL`, as the testbed does).
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import threading
import time
from contextlib import suppress

# Two wake-ups a period cost this process 1 to 2 % of a core per process that computes; a step takes
# much longer than a period.
_PERIOD_S = 0.020
# What a process gets at a time at least: for shares below 0.11 the period grows instead.
_MIN_CREDIT_S = 0.002
_MIN_LOOK_S = 0.0005
# What it may make up for at once after others have kept it from the processor.
_MAX_CREDIT_S = 0.1
_CPU_CLOCK = 2  # of a process, in the kernel's clock ids


class Duty:
    """Keeps processes at their shares, from a thread of this process; a context manager.

    Processes may end at any time. All that are still there go on at full speed once it is closed.
    """

    def __init__(self) -> None:
        self._members: dict[int, _Member] = {}
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="duty", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Duty:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Lets all processes go on."""
        self.close()

    def limit(self, pid: int, cores: float | None) -> None:
        """Sets the share of a process; one that has ended is ignored.

        Args:
            pid: A process of this user, that its parent has not waited for.
            cores: Processor seconds per second; 0 stops it until it gets another share, None lets
                it run freely.
        """
        if cores is not None and not cores >= 0:
            raise ValueError(f"cores: given {cores}, allowed: 0 or more, or None")
        with self._lock, suppress(ProcessLookupError):
            if cores is None:
                self._drop(pid)
            elif pid in self._members:
                self._members[pid].cores = cores
            else:
                self._members[pid] = _Member(pid, cores)
        self._changed.set()

    def close(self) -> None:
        """Lets all processes go on; may be repeated."""
        atexit.unregister(self.close)
        self._is_closed = True
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._changed.wait(self._look_at_all())
                self._changed.clear()
        finally:
            with self._lock:
                for pid in list(self._members):
                    self._drop(pid)

    def _look_at_all(self) -> float | None:
        """Stops and continues what is due; returns after how many seconds to look again."""
        waits_s = []
        with self._lock:
            for pid, member in list(self._members.items()):
                try:
                    waits_s.append(member.look(time.monotonic()))
                except ProcessLookupError:
                    self._drop(pid)
        return min(waits_s, default=None)

    def _drop(self, pid: int) -> None:
        member = self._members.pop(pid, None)
        if member is not None:
            member.release()


class _Member:
    """One process and its credit."""

    def __init__(self, pid: int, cores: float) -> None:
        self.cores = cores
        self._pid = pid
        self._handle = os.pidfd_open(pid)  # a number that is used again is another process
        self._end = select.poll()
        self._end.register(self._handle, select.POLLIN)
        self._credit_s = 0.0
        self._waits = _open(f"/proc/{pid}/schedstat")
        self._at_s, self._cpu_s = time.monotonic(), cpu_s(pid)
        self._waited_s = self._read_waited_s()
        self._is_stopped = False

    def look(self, now_s: float) -> float:
        """Stops or continues it; returns after how many seconds to look again."""
        if self._end.poll(0):
            raise ProcessLookupError(f"process {self._pid} has ended")
        enough_s = max(self.cores * (1 - self.cores) * _PERIOD_S, _MIN_CREDIT_S)
        self._account(now_s, enough_s)
        if self._credit_s >= enough_s and self._is_stopped and self.cores > 0:
            self._signal(signal.SIGCONT)
        elif (self._credit_s <= 0 or self.cores == 0) and not self._is_stopped:
            self._signal(signal.SIGSTOP)
        if not self._is_stopped:  # until one thread has spent it
            return max(self._credit_s / max(1 - self.cores, 0.1), _MIN_LOOK_S)
        missing_s = enough_s - self._credit_s
        return max(missing_s / self.cores, _MIN_LOOK_S) if self.cores > 0 else 1.0

    def _account(self, now_s: float, enough_s: float) -> None:
        cpu, waited = cpu_s(self._pid), self._read_waited_s()
        passed_s, used_s, kept_s = now_s - self._at_s, cpu - self._cpu_s, waited - self._waited_s
        self._at_s, self._cpu_s, self._waited_s = now_s, cpu, waited
        idle_s = 0.0 if self._is_stopped else max(passed_s - used_s - kept_s, 0.0)
        credit_s = self._credit_s + self.cores * passed_s - used_s
        if credit_s > enough_s:
            credit_s = min(max(credit_s - idle_s, enough_s), _MAX_CREDIT_S)
        self._credit_s = credit_s

    def _read_waited_s(self) -> float:
        """Returns how long its main thread has been ready while others had the processor."""
        text = os.pread(self._waits, 64, 0) if self._waits is not None else b"0 0 0"
        return int(text.split()[1]) / 1e9

    def release(self) -> None:
        """Lets it go on."""
        with suppress(ProcessLookupError):
            self._signal(signal.SIGCONT)
        for file in (self._handle, self._waits):
            if file is not None:
                os.close(file)

    def _signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._handle, number)
        self._is_stopped = number == signal.SIGSTOP


def cpu_s(pid: int) -> float:
    """Returns the processor time that a process and its threads have used.

    Raises:
        ProcessLookupError: It has ended, and its parent has noticed.
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPU_CLOCK)
    except OSError:
        raise ProcessLookupError(f"process {pid} has ended") from None


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:  # the kernel does not count that
        return None
