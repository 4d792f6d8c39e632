"""Joules that this device takes between two points in time, measured where it has meters.

What an unmetered device takes is modelled: by the simulator before a run, by the testbed from what
it saw. Zeus would read the same counters, but spawns processes to do so, brings pandas and
scikit-learn, and looks for a Jetson's rails where only JetPack 4 has them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dora.profiler.meters import (
    Found,
    Meter,
    battery_meters,
    gpu_meters,
    ina_meters,
    rapl_meters,
)
from dora.spec import Energy

# A gauge is sampled this often. 30 s of steps that last 0.1, 0.35 and 1.3 s, 40 % of each at 12 W
# and the rest at 3 W, come out 0.6, 0.3 and 0.2 % wrong (median of 200 phases) when sampled every
# 0.05 s, but 1.8, 0.5 and 0.4 % every 0.1 s, and 4.2, 7.4 and 0.7 % every 0.5 s.
GAUGE_PERIOD_S = 0.05
# A counter is looked at this often, so that it starts over at most once in between (the smallest
# range of RAPL, 65 kJ, lasts 10 s at 6.5 kW), and that the ends of a stretch are known.
COUNTER_PERIOD_S = 0.5
# So many samples are kept, and up to twice as many; of a longer window every other one is dropped,
# so that the ends of a stretch are known within a five thousandth of it.
_NUM_KEPT = 5_000


def find_meters(root: Path = Path("/")) -> Found:
    """Returns the meters whose sum is nearest to what this machine takes.

    One that covers the whole board or machine stands alone; only without one are those of
    processors, memory and GPUs added up. All GPUs count, also those that are not used.

    Args:
        root: What the paths of Linux are below.
    """
    problems: list[str] = []
    for look in (ina_meters, battery_meters):
        found = look(root)
        problems += found.problems
        if found.meters:
            return found._replace(problems=tuple(problems))
    processor, gpu = rapl_meters(root), gpu_meters(root)
    problems += processor.problems + gpu.problems
    return Found(processor.meters + gpu.meters, tuple(problems))


class EnergyMeter:
    """Adds up the meters of one device from `begin` to `end`.

    Hardware updates its numbers every 1 (RAPL) to 100 ms (NVML) or, batteries, some seconds: take
    windows that are much longer.
    """

    def __init__(
        self,
        device: str,
        meters: Sequence[Meter],
        *,
        is_sampled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares to measure.

        Args:
            device: The name that the joules go by.
            meters: As `find_meters` returns them; with none, nothing is known.
            is_sampled: Whether a thread calls `sample` in between; else the caller does.
            clock: Returns the seconds of any clock that only goes forward.
        """
        self.trouble = ""
        self._device = device
        self._meters = tuple(meters)
        self._is_sampled = is_sampled and bool(meters)
        self._clock = clock
        self._lock = threading.Lock()
        self._joules = 0.0
        self._last: list[tuple[float, float]] = []
        self._course: list[tuple[float, float]] = []  # seconds, joules until then
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def scope(self) -> str:
        """What is covered, for example 'CPU package-0 (RAPL) + GPU 0 NVIDIA A2 (NVML)'."""
        return " + ".join(meter.scope for meter in self._meters)

    def begin(self) -> None:
        """Starts a window; one that was open is forgotten."""
        self._join()
        self.trouble, self._joules, self._last, self._course = "", 0.0, [], []
        self.sample()
        if self._is_sampled:
            self._thread = threading.Thread(target=self._run, name="dora-energy", daemon=True)
            self._thread.start()

    def sample(self) -> None:
        """Adds what was taken since the last sample."""
        with self._lock:
            if self.trouble:
                return
            try:
                now = [(self._clock(), meter.read()) for meter in self._meters]
            except OSError as error:
                # A sum that lacks a part would pass for a saving.
                self.trouble = str(error)
                return
            for meter, before, after in zip(self._meters, self._last, now, strict=False):
                self._joules += _joules_between(meter, before, after)
            self._last = now
            self._course += [(now[0][0], self._joules)] if now else []
            if len(self._course) > 2 * _NUM_KEPT:
                del self._course[1::2]

    def between(self, start_s: float, end_s: float) -> Energy:
        """Returns the joules of a stretch of the window, on the meter's clock, up to now."""
        if not self._course or start_s < self._course[0][0]:
            return Energy(device=self._device)
        self.sample()
        with self._lock:
            at_s, joules = zip(*self._course, strict=True)
        before, after = np.interp((start_s, end_s), at_s, joules)
        return self._measured(float(after - before))

    def end(self) -> Energy:
        """Returns the joules since `begin`; of provenance 'none' where a meter failed."""
        self._join()
        self.sample()
        return self._measured(self._joules)

    def _measured(self, joules: float) -> Energy:
        if self.trouble or not self._meters or joules < 0:
            return Energy(device=self._device)
        return Energy(device=self._device, joules=joules, provenance="measured")

    def _run(self) -> None:
        has_gauge = any(meter.kind == "gauge" for meter in self._meters)
        while not self._stop.wait(GAUGE_PERIOD_S if has_gauge else COUNTER_PERIOD_S):
            self.sample()

    def _join(self) -> None:
        if self._thread:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._stop.clear()


def _joules_between(meter: Meter, before: tuple[float, float], after: tuple[float, float]) -> float:
    """Returns the joules from one sample (seconds, number) to the next."""
    if meter.kind == "gauge":
        return (after[0] - before[0]) * (after[1] + before[1]) / 2
    taken = after[1] - before[1]
    return taken % meter.range_j if meter.range_j else taken
