"""A whole cluster on this machine: real processes and sockets, slow links, unlike devices.

::

    with Testbed(load_cluster("home.toml")) as testbed:
        job = Job(testbed, ["python", "train.py"])
        for device, line in job.lines():
            print(device, line)
        print(testbed.activity())

Mode 'namespaces' lets the kernel do it (`namespaces.Namespaces`): that needs root, iproute2 and
control groups, and `why_not` says what is missing. Mode 'buckets' (`rootless.Rootless`) needs none
of these and emulates less: only traffic of Dora's engine is slowed, gloo's is not; memory has no
limit and media have no latency; processes that a spawned one starts run at full speed. All devices
are on the network there when all have reached another one with Dora's engine.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dora.errors import DoraError, SpecError
from dora.spec import Activity, Cluster, Traffic, Usage
from dora.testbed import names, namespaces, rootless
from dora.testbed.namespaces import Namespaces, why_not
from dora.testbed.process import IDLE_COMMAND, IDLE_ENVIRONMENT
from dora.testbed.rootless import Rootless
from dora.testbed.scale import Scale, core_flops_per_s, largest, packed, shares

MODES = ("namespaces", "buckets")
_SAMPLE_S = 0.1
_ROOTLESS = (
    "mode buckets: only traffic of Dora's engine is slowed, gloo's is not; "
    "memory is not limited; media have no latency"
)


class TestbedError(DoraError, RuntimeError):
    """The testbed can not be set up here; says what is missing."""

    __test__ = False  # or pytest collects it


def remove_left_over() -> None:
    """Removes all that testbeds left whose process was killed."""
    rootless.remove_left_over()
    if not why_not():
        namespaces.remove_left_over()


class Testbed:
    """An emulated cluster; a context manager, which leaves nothing behind.

    Devices compute at full speed of the machine until `limit` is called, so that programs start
    quickly.

    Args:
        cluster: Devices and network, at full size.
        scale: Factor of all speeds and rates; None takes the largest that fits this machine.
        network_factor: Of all rates on top of that, for models that are small as well.
        mode: 'namespaces' or 'buckets', see above; None takes the first where this machine can.

    Attributes:
        mode: As used.
        scale: Factors of speeds and rates, as used.
        cores: Share of the processor of every device.
        cluster: As emulated; make plans for this one. This and the following come with opening it.
        has_delay: Whether media have their latency, which takes namespaces and a kernel with netem.
        interface, port: Of every device, for the rendezvous of its programs.

    Raises:
        TestbedError: This machine can not emulate devices in this mode.
        SpecError: The scale does not fit the machine, or the network can not be laid out.
    """

    __test__ = False

    def __init__(
        self,
        cluster: Cluster,
        *,
        scale: float | None = None,
        network_factor: float = 1.0,
        mode: str | None = None,
    ) -> None:
        self.mode = mode or ("buckets" if why_not() else "namespaces")
        if self.mode not in MODES:
            raise SpecError(f"mode: given {self.mode!r}, allowed: {' or '.join(MODES)}")
        if self.mode == "namespaces" and (reason := why_not()):
            raise TestbedError(f"the testbed {reason}, or mode 'buckets'")
        num_cores, core = len(os.sched_getaffinity(0)), core_flops_per_s()
        compute = scale or largest(cluster, num_cores, core)
        self.scale = Scale(compute, compute * network_factor)
        self.cores = shares(cluster, compute, num_cores, core)
        self._cpus = packed(self.cores)
        emulation = Namespaces if self.mode == "namespaces" else Rootless
        self._emulation: Namespaces | Rootless = emulation(names.fresh(), cluster, self.scale)
        self._factors = [1.0] * len(cluster.devices)
        self._is_limited = False
        self._counting = threading.Lock()
        self._is_closed = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    # ------------------------------------------------------------ life

    def __enter__(self) -> Testbed:
        """Builds everything, after removing what killed testbeds of this mode left."""
        emulation = self._emulation
        try:
            emulation.open()
            self.cluster, self.has_delay = emulation.cluster, emulation.has_delay
            self.interface, self.port = emulation.interface, emulation.port
            self._keep_awake()
            self._samples = [self._count()]
            self._sampler.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kills what runs and removes all."""
        self.close()

    @property
    def summary(self) -> str:
        """What is emulated, in what it falls short, and the cores and rates, in three lines."""
        cores = [
            f"{device.name} {share:.2f}"
            for device, share in zip(self.cluster.devices, self.cores, strict=True)
        ]
        rates = [f"{m.name} {m.rate_bytes_per_s * 8e-6:.3g}" for m in self.cluster.media]
        latency = "as given" if self.has_delay else "none, this kernel can not delay packets"
        caveat = _ROOTLESS if self.mode == "buckets" else f"latency of media: {latency}"
        return (
            f"{self.cluster.name} emulated on this machine: speeds x{self.scale.compute:.3g}, "
            f"rates x{self.scale.network:.3g}; {caveat}\n"
            f"cores: {', '.join(cores)}\nMbit/s: {', '.join(rates)}"
        )

    def close(self) -> None:
        """Kills what runs and removes all; may be repeated."""
        self._is_closed.set()
        if self._sampler.is_alive():
            self._sampler.join()
        self._emulation.close()

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
        return self._emulation.spawn(device, command, self._cpus[device], env, **options)

    def _keep_awake(self) -> None:
        """Gives every processor something to do that yields to all else.

        A virtual processor that falls asleep whenever a quota is used up wakes slowly and with cold
        caches, and one beside it computes faster meanwhile: shares of 0.17 to 0.55 of a core did
        170 to 290 units of work per second of processor time instead of 320, changing from minute
        to minute; kept awake 230 to 315, and with products of matrices times were predicted within
        3 % that were 15 % off with an empty loop.
        """
        for cpu in sorted(os.sched_getaffinity(0)):
            self._emulation.spawn_aside(IDLE_COMMAND, [cpu], IDLE_ENVIRONMENT)

    def address(self, device: int) -> str:
        """Returns the IP address of a device."""
        return self._emulation.address(device)

    def position(self, name: str) -> int:
        """Returns where a device is in the cluster."""
        return [d.name for d in self.cluster.devices].index(name)

    def out_of_memory(self, device: int) -> bool:
        """Returns whether the kernel has killed a process of the device for its memory."""
        return self._emulation.out_of_memory(device)

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
        self._factors[device] = factor
        self._set_cores(device)

    def _set_cores(self, device: int) -> None:
        factor = self._factors[device]
        is_free = factor > 0 and not self._is_limited
        self._emulation.set_cores(device, None if is_free else self.cores[device] * factor)

    def set_rate(self, name: str, factor: float) -> None:
        """Sets a medium to a multiple of its rate; 0 takes it down until it gets another one."""
        self._emulation.network.set_rate([m.name for m in self.cluster.media].index(name), factor)

    def set_connected(self, name: str, is_connected: bool) -> None:
        """Plugs the network cable of a device in or out."""
        self._emulation.network.connect(self.position(name), is_connected)

    def kill(self, name: str) -> None:
        """Kills all processes of a device."""
        self._emulation.kill(self.position(name))

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
            usage=tuple(self._usage(i, rows) for i in range(len(self.cores))),
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
            peak_bytes=int(last.peak_bytes[device]),
        )

    def has_sent(self) -> bool:
        """Returns whether every device has used the network: with buckets, Dora's engine has."""
        with self._counting:
            return self._emulation.network.have_joined()

    def _count(self) -> _Counters:
        emulation, devices = self._emulation, range(len(self.cores))
        with self._counting:
            sent, received = zip(*emulation.network.bytes_of_devices(), strict=True)
            return _Counters(
                at_s=time.monotonic(),
                cpu_s=tuple(emulation.cpu_s(device) for device in devices),
                peak_bytes=tuple(emulation.peak_bytes(device) for device in devices),
                sent=sent,
                received=received,
                media=tuple(emulation.network.bytes_of_media()),
            )

    def _sample(self) -> None:
        while not self._is_closed.wait(_SAMPLE_S):
            self._samples.append(self._count())
            self._emulation.free_messengers()


class _Counters(NamedTuple):
    """What has been counted until `at_s`, by device and by medium."""

    at_s: float
    cpu_s: tuple[float, ...]
    peak_bytes: tuple[float, ...]
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
