"""A whole cluster on this machine: real processes and sockets, slow links, unlike devices.

::

    with Testbed(load_cluster("home.toml")) as testbed:
        job = Job(testbed, ["python", "train.py"])
        for device, line in job.lines():
            print(device, line)
        print(testbed.activity())

Needs root, iproute2 and control groups; `why_not` says what is missing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

from dora.errors import DoraError
from dora.spec import Activity, Cluster, Traffic, Usage
from dora.testbed import cgroup, names, netns
from dora.testbed.scale import Scale, core_flops_per_s, emulated, largest, packed, shares
from dora.testbed.wiring import wire

# A process that has loaded torch holds this much before it has a model.
_RUNTIME_BYTES = 512 << 20
_SAMPLE_S = 0.1
_LOAD = """
import numpy
a = numpy.ones((64, 64), "f")
while True:
    a @ a
"""


class TestbedError(DoraError, RuntimeError):
    """The testbed can not be set up here; says what is missing."""

    __test__ = False  # or pytest collects it


def why_not() -> str:
    """Returns what this machine lacks for a testbed; empty if nothing."""
    return netns.why_not() or cgroup.why_not(cgroup.mounts())


def remove_left_over() -> None:
    """Removes all that testbeds left whose process was killed."""
    found = cgroup.mounts()
    for name in cgroup.parents(names.PREFIX, found):
        if names.is_left_over(name):
            cgroup.remove_tree(name, found)
    netns.remove_left_over(names.PREFIX, names.is_left_over)


class Testbed:
    """An emulated cluster; a context manager, which leaves nothing behind.

    Devices compute at full speed of the machine until `limit` is called, so that programs start
    quickly.

    Args:
        cluster: Devices and network, at full size.
        scale: Factors of speeds and rates; None takes the largest that fits this machine.

    Attributes:
        cluster: As emulated; make plans for this one.
        scale: As used.
        cores: Share of the processor of every device.
        has_delay: Whether media have their latency, which takes a kernel with netem.

    Raises:
        TestbedError: This machine can not emulate devices.
        SpecError: The scale does not fit the machine, or the network can not be laid out.
    """

    __test__ = False

    def __init__(self, cluster: Cluster, *, scale: Scale | None = None) -> None:
        if reason := why_not():
            raise TestbedError(f"the testbed {reason}")
        num_cores, core = len(os.sched_getaffinity(0)), core_flops_per_s()
        self.scale = scale or largest(cluster, num_cores, core)
        self.cores = shares(cluster, self.scale, num_cores, core)
        self._cpus = packed(self.cores)
        self._wiring = wire(cluster)
        self._given = cluster
        self._name = names.fresh()
        self._factors = [1.0] * len(cluster.devices)
        self._is_limited = False
        self._is_closed = threading.Event()

    # ------------------------------------------------------------ life

    def __enter__(self) -> Testbed:
        """Builds the network and the groups, after removing what killed testbeds left."""
        remove_left_over()
        try:
            self.has_delay = netns.has_netem(self._name)
            self.cluster = emulated(self._given, self.scale, has_delay=self.has_delay)
            self._network = netns.Network(
                self._name, self.cluster, self._wiring, has_delay=self.has_delay
            )
            self._groups = [self._group(i) for i in range(len(self.cluster.devices))]
            self._keep_awake()
            self._samples = [self._count()]
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kills what runs and removes all."""
        self.close()

    def close(self) -> None:
        """Kills what runs and removes all."""
        self._is_closed.set()
        cgroup.remove_tree(self._name, cgroup.mounts())
        netns.remove_left_over(self._name, lambda _: True)

    def _group(self, device: int) -> cgroup.DeviceGroup:
        group = cgroup.DeviceGroup(self._name, str(device), cgroup.mounts())
        group.limit_memory(self.cluster.devices[device].memory_bytes + _RUNTIME_BYTES)
        return group

    # ------------------------------------------------------------ processes

    def spawn(
        self, device: int, command: Sequence[str], env: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[Any]:
        """Starts a process on a device; it dies with the thread that called this.

        Args:
            device: Position in the cluster.
            command: Program and arguments.
            env: Its whole environment.
            options: Of Popen.
        """
        inside = ["ip", "netns", "exec", self._network.namespace(device), *command]
        group, cpus = self._groups[device], self._cpus[device]
        return _start(inside, group, cpus, env=dict(env), start_new_session=True, **options)

    def _keep_awake(self) -> None:
        """Gives every processor something to do that yields to all else.

        A virtual processor that falls asleep whenever a quota is used up wakes slowly and with cold
        caches, and one beside it computes faster meanwhile: shares of 0.17 to 0.55 of a core did
        170 to 290 units of work per second of processor time instead of 320, changing from minute
        to minute; kept awake 230 to 315, and with products of matrices times were predicted within
        3 % that were 15 % off with an empty loop.
        """
        group = cgroup.DeviceGroup(self._name, "awake", cgroup.mounts())
        idle = ["chrt", "--idle", "0", sys.executable, "-c", _LOAD]
        env = {"OPENBLAS_NUM_THREADS": "1", "PATH": os.defpath}
        for cpu in sorted(os.sched_getaffinity(0)):
            _start(idle, group, [cpu], env=env, start_new_session=True)

    def address(self, device: int) -> str:
        """Returns the IP address of a device."""
        return netns.address(device)

    def position(self, name: str) -> int:
        """Returns where a device is in the cluster."""
        return [d.name for d in self.cluster.devices].index(name)

    def out_of_memory(self, device: int) -> bool:
        """Returns whether the kernel has killed a process of the device for its memory."""
        return self._groups[device].out_of_memory()

    # ------------------------------------------------------------ what changes

    def limit(self) -> None:
        """Gives every device its own speed."""
        self._is_limited = True
        for device in range(len(self._factors)):
            self._set_cores(device)

    def lift(self) -> None:
        """Lets all devices compute as fast as the machine does, for preparations."""
        self._is_limited = False
        for device in range(len(self._factors)):
            self._set_cores(device)

    def set_speed(self, name: str, factor: float) -> None:
        """Sets a device to a multiple of its speed; 0 stops it until it gets another one."""
        device = self.position(name)
        before, self._factors[device] = self._factors[device], factor
        if factor:
            self._set_cores(device)
        if bool(before) != bool(factor):
            self._groups[device].signal(signal.SIGCONT if factor else signal.SIGSTOP)

    def set_rate(self, name: str, factor: float) -> None:
        """Sets a medium to a multiple of its rate; 0 takes it down until it gets another one."""
        self._network.set_rate([m.name for m in self.cluster.media].index(name), factor)

    def set_connected(self, name: str, is_connected: bool) -> None:
        """Plugs the network cable of a device in or out."""
        self._network.connect(self.position(name), is_connected)

    def kill(self, name: str) -> None:
        """Kills all processes of a device."""
        self._groups[self.position(name)].signal(signal.SIGKILL)

    def _set_cores(self, device: int) -> None:
        cores = self.cores[device] * (self._factors[device] or 1.0)
        self._groups[device].limit_cores(cores if self._is_limited else None)

    # ------------------------------------------------------------ what is counted

    def activity(self, window_s: tuple[float, float] | None = None) -> Activity:
        """Returns what devices and media did.

        Args:
            window_s: Begin and end, as `time.monotonic` tells; None is since the start. Counters
                are read every 0.1 s, and taken to grow evenly between.
        """
        samples = [*self._samples, self._count()]
        begin_s, end_s = window_s or (samples[0].at_s, samples[-1].at_s)
        inside = [sample for sample in samples if begin_s < sample.at_s < end_s]
        rows = [_between(samples, begin_s), *inside, _between(samples, end_s)]
        return Activity(
            usage=tuple(self._usage(i, rows) for i in range(len(self._groups))),
            traffic=tuple(
                Traffic(
                    medium=medium.name,
                    rate_bytes_per_s=medium.rate_bytes_per_s,
                    at_s=tuple(row.at_s - begin_s for row in rows),
                    carried_bytes=tuple(int(row.media[i] - rows[0].media[i]) for row in rows),
                )
                for i, medium in enumerate(self.cluster.media)
            ),
        )

    def _usage(self, device: int, rows: Sequence[_Counters]) -> Usage:
        first, last = rows[0], rows[-1]
        total_s = last.at_s - first.at_s
        cpu_s = last.cpu_s[device] - first.cpu_s[device]
        return Usage(
            device=self.cluster.devices[device].name,
            total_s=total_s,
            busy_s=min(cpu_s / self.cores[device], total_s),
            sent_bytes=int(last.sent[device] - first.sent[device]),
            received_bytes=int(last.received[device] - first.received[device]),
            peak_bytes=self._groups[device].peak_bytes(),
        )

    def has_sent(self) -> bool:
        """Returns whether every device has used the network."""
        now, first = self._count(), self._samples[0]
        return all(a > b for a, b in zip(now.sent, first.sent, strict=True))

    def _count(self) -> _Counters:
        sent, received = zip(*self._network.bytes_of_devices(), strict=True)
        return _Counters(
            at_s=time.monotonic(),
            cpu_s=tuple(group.cpu_s() for group in self._groups),
            sent=sent,
            received=received,
            media=tuple(self._network.bytes_of_media()),
        )

    def _sample(self) -> None:
        with suppress(OSError, KeyError):  # the network is being removed
            while not self._is_closed.wait(_SAMPLE_S):
                self._samples.append(self._count())


class _Counters(NamedTuple):
    """What has been counted until `at_s`, by device and by medium."""

    at_s: float
    cpu_s: tuple[float, ...]
    sent: tuple[float, ...]
    received: tuple[float, ...]
    media: tuple[float, ...]


def _between(samples: Sequence[_Counters], at_s: float) -> _Counters:
    """Returns the counters at a time, interpolated."""
    after = next((i for i, sample in enumerate(samples) if sample.at_s >= at_s), len(samples) - 1)
    a, b = samples[max(after - 1, 0)], samples[after]
    share = min(max((at_s - a.at_s) / (b.at_s - a.at_s), 0.0), 1.0) if b.at_s > a.at_s else 1.0

    def mixed(x: Sequence[float], y: Sequence[float]) -> tuple[float, ...]:
        return tuple(p + (q - p) * share for p, q in zip(x, y, strict=True))

    return _Counters(at_s, *(mixed(x, y) for x, y in zip(a[1:], b[1:], strict=True)))


def _start(
    command: Sequence[str], group: cgroup.DeviceGroup, cpus: Sequence[int], **options: Any
) -> subprocess.Popen[Any]:
    """Starts a process as a member of a group; it dies with the thread that called this."""
    join = "".join(f"echo $$ > {path} && " for path in group.entries) + 'exec "$@"'
    places = ["taskset", "-c", ",".join(map(str, cpus))]
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *places, "sh", "-c", join, "sh", *command], **options
    )
