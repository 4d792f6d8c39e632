"""Devices and network by the kernel: a namespace and a control group each. Needs root.

What `Testbed` asks of it is what it asks of `rootless.Rootless`, too.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from dora.spec import Cluster
from dora.testbed import cgroup, names, netns
from dora.testbed.process import start
from dora.testbed.scale import Scale, emulated
from dora.testbed.wiring import wire

# A process that has loaded torch holds this much before it has a model.
_RUNTIME_BYTES = 512 << 20


def why_not() -> str:
    """Returns what this machine lacks; empty if nothing."""
    return netns.why_not() or cgroup.why_not(cgroup.mounts())


def remove_left_over() -> None:
    """Removes all that testbeds left whose process was killed."""
    found = cgroup.mounts()
    for name in cgroup.parents(names.PREFIX, found):
        if names.is_left_over(name):
            cgroup.remove_tree(name, found)
    netns.remove_left_over(names.PREFIX, names.is_left_over)


class Namespaces:
    """The devices of a cluster, and `network` between them.

    Args:
        name: Of the testbed.
        given: Devices and network, at full size.
        scale: Factors of speeds and rates.

    Attributes:
        cluster: As emulated.
        has_delay: Whether media have their latency, which takes a kernel with netem.
        interface, port: Of every device, for the rendezvous of its programs.

    Raises:
        SpecError: The network can not be laid out.
    """

    interface, port = "eth0", 29500

    def __init__(self, name: str, given: Cluster, scale: Scale) -> None:
        self._name, self._given, self._scale = name, given, scale
        self._wiring = wire(given)

    def open(self) -> None:
        """Builds the network and the groups, after removing what killed testbeds left."""
        remove_left_over()
        name = self._name
        self.has_delay = netns.has_netem(name)
        self.cluster = emulated(self._given, self._scale, has_delay=self.has_delay)
        self.network = netns.Network(name, self.cluster, self._wiring, has_delay=self.has_delay)
        self._groups = [self._group(i) for i in range(len(self.cluster.devices))]
        self._aside = cgroup.DeviceGroup(f"{name}-aside", "idle", cgroup.mounts())
        self._aside.yield_to_others()

    def _group(self, device: int) -> cgroup.DeviceGroup:
        group = cgroup.DeviceGroup(self._name, str(device), cgroup.mounts())
        group.limit_memory(self.cluster.devices[device].memory_bytes + _RUNTIME_BYTES)
        return group

    def close(self) -> None:
        """Kills what runs and removes all."""
        with netns.signals_later(), ExitStack() as stack:
            stack.callback(netns.remove_left_over, self._name, lambda _: True)
            stack.callback(cgroup.remove_tree, f"{self._name}-aside", cgroup.mounts())
            cgroup.remove_tree(self._name, cgroup.mounts())

    def address(self, device: int) -> str:
        """Returns the IP address of a device."""
        return netns.address(device)

    def spawn(
        self,
        device: int,
        command: Sequence[str],
        cpus: Sequence[int],
        env: Mapping[str, str],
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Starts a process on a device."""
        inside = ["ip", "netns", "exec", self.network.namespace(device), *command]
        return start(_joining(self._groups[device], inside), cpus, env=dict(env), **options)

    def spawn_aside(
        self, command: Sequence[str], cpus: Sequence[int], env: Mapping[str, str]
    ) -> None:
        """Starts a process that belongs to no device."""
        start(_joining(self._aside, command), cpus, env=dict(env), stderr=subprocess.DEVNULL)

    def set_cores(self, device: int, cores: float | None) -> None:
        """Sets the share of the processor: 0 stops what runs, None is full speed."""
        group = self._groups[device]
        if cores == 0:
            group.signal(signal.SIGSTOP)
        else:
            group.limit_cores(cores)
            group.signal(signal.SIGCONT)

    def free_messengers(self) -> None:
        """Lets new threads that carry messages run outside the shares."""
        for group in self._groups:
            group.free_messengers()

    def kill(self, device: int) -> None:
        """Kills all processes of a device."""
        self._groups[device].signal(signal.SIGKILL)

    def cpu_s(self, device: int) -> float:
        """Returns the processor time used so far."""
        return self._groups[device].cpu_s()

    def peak_bytes(self, device: int) -> int:
        """Returns the most memory held so far."""
        return self._groups[device].peak_bytes()

    def out_of_memory(self, device: int) -> bool:
        """Returns whether the kernel has killed a process of the device for its memory."""
        return self._groups[device].out_of_memory()


def _joining(group: cgroup.DeviceGroup, command: Sequence[str]) -> list[str]:
    """Returns the command of a process that becomes a member of a group first."""
    join = "".join(f"echo $$ > {path} && " for path in group.entries) + 'exec "$@"'
    return ["sh", "-c", join, "sh", *command]
