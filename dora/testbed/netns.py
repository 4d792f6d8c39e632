"""A cluster's network on this machine: a namespace per device, and one for all that joins them.

See `wiring` for the layout. A medium is an `ifb` device: packets that cross it are redirected to it
by tc, wait in its token bucket, and go on where they came from. There are no broadcasts: every
device knows the others' hardware addresses, and every bridge where they are.

Everything lives inside namespaces whose names tell the process that made them; removing those
removes all.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dora.errors import DoraError
from dora.spec import Cluster
from dora.testbed.wiring import Wiring

_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 20.0
# Rates are goodputs: TCP carries 1448 bytes in a packet of 1514, and answers every second packet
# with 66, on the same medium if that is half-duplex.
_PACKET, _PAYLOAD, _ANSWER = 1514, 1448, 66
# A bucket must hold a packet, and what leaves between two interrupts of the timer; more would pass
# at once.
_BURST_S, _MIN_BURST_BYTES = 0.001, 5_000
# As deep as the queues of access points and switches: shallower ones throw away what TCP sends in
# bursts.
_QUEUE_S, _MIN_QUEUE_BYTES = 0.1, 128_000


class NetworkError(DoraError, RuntimeError):
    """The kernel refused a part of the network; says the command and its answer."""


def why_not() -> str:
    """Returns what is missing for namespaces; empty if nothing is."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    missing = [tool for tool in ("ip", "tc", "bridge") if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)} (package iproute2)" if missing else ""


def address(device: int) -> str:
    """Returns the IP address of the device at that position."""
    return f"10.77.{device // 250}.{device % 250 + 1}"


def _hardware_address(device: int) -> str:
    return f"02:00:00:00:{device // 256:02x}:{device % 256:02x}"


# ------------------------------------------------------------ the network of a cluster


class Network:
    """The namespaces of a cluster.

    Args:
        name: Of the testbed; namespaces are called after it.
        cluster: As emulated.
        wiring: Of the cluster.
        has_delay: Adds each medium's latency, which takes a kernel with netem.
    """

    def __init__(self, name: str, cluster: Cluster, wiring: Wiring, *, has_delay: bool) -> None:
        self.fabric = f"{name}-fabric"
        self._devices = [f"{name}-{i}" for i in range(len(cluster.devices))]
        self._media = cluster.media
        self._packet_bytes = [
            _PACKET + _ANSWER / 2 * _is_half_duplex(medium.name, cluster) for medium in self._media
        ]
        self._has_delay = has_delay
        for namespace in (self.fabric, *self._devices):
            run("ip", "netns", "add", namespace)
            # It would announce itself on every medium.
            no_ipv6 = "net.ipv6.conf.default.disable_ipv6=1"
            run("ip", "netns", "exec", namespace, "sysctl", "-qw", no_ipv6)
        self._make_links(wiring)
        for i in range(len(self._media)):
            self._make_queue(i)
        self._redirect(wiring)
        self._counters = _open_in(self.fabric, "/proc/net/dev")
        self._first = self.bytes_of_devices()

    def namespace(self, device: int) -> str:
        """Returns where the processes of a device run."""
        return self._devices[device]

    def set_rate(self, medium: int, factor: float) -> None:
        """Sets a medium to a multiple of its rate; 0 takes it down."""
        name = f"medium{medium}"
        if factor:
            tc(self.fabric, f"qdisc change dev {name} {self._bucket(medium, factor)}")
        ip(self.fabric, f"link set {name} {'up' if factor else 'down'}")

    def connect(self, device: int, is_connected: bool) -> None:
        """Plugs the cable of a device in or out."""
        ip(self.fabric, f"link set port{device} {'up' if is_connected else 'down'}")

    def have_joined(self) -> bool:
        """Returns whether every device has sent something."""
        pairs = zip(self.bytes_of_devices(), self._first, strict=True)
        return all(now > first for (now, _), (first, _) in pairs)

    def bytes_of_devices(self) -> list[tuple[int, int]]:
        """Returns (sent, received) of every device so far."""
        counted = self._read()
        return [counted[f"port{i}"] for i in range(len(self._devices))]

    def bytes_of_media(self) -> list[int]:
        """Returns what every medium has carried so far."""
        counted = self._read()
        return [counted[f"medium{i}"][1] for i in range(len(self._media))]

    def close(self) -> None:
        """Kills what runs in the namespaces and removes them."""
        if counters := getattr(self, "_counters", None):
            counters.close()
        for namespace in (*self._devices, self.fabric):
            remove(namespace)

    def _read(self) -> dict[str, tuple[int, int]]:
        """Returns (received, sent) bytes by interface of the fabric."""
        self._counters.seek(0)
        rows = [line.partition(":") for line in self._counters.read().splitlines()[2:]]
        numbers = {name.strip(): values.split() for name, _, values in rows}
        return {name: (int(row[0]), int(row[8])) for name, row in numbers.items()}

    # ------------------------------------------------------------ building

    def _make_links(self, wiring: Wiring) -> None:
        for site in range(wiring.num_sites):
            ip(self.fabric, f"link add site{site} type bridge")
            ip(self.fabric, f"link set site{site} addrgenmode none up")
        for i, namespace in enumerate(self._devices):
            ip(namespace, f"link add eth0 type veth peer port{i} netns {self.fabric}")
            self._join(f"port{i}", wiring.site_of[i])
            ip(namespace, "link set lo up")
            ip(namespace, f"link set eth0 address {_hardware_address(i)} addrgenmode none up")
            ip(namespace, f"address add {address(i)}/16 dev eth0")
        for a, b in wiring.trunks:
            if (b, a) not in wiring.trunks or a < b:
                ip(self.fabric, f"link add trunk{a}-{b} type veth peer trunk{b}-{a}")
                self._join(f"trunk{a}-{b}", a)
                self._join(f"trunk{b}-{a}", b)
        for (src, dst), _ in wiring.entering.items():
            lladdr = f"lladdr {_hardware_address(dst)} nud permanent"
            ip(self.namespace(src), f"neigh replace {address(dst)} {lladdr} dev eth0")
        for device, home in enumerate(wiring.site_of):
            for site in range(wiring.num_sites):
                if site == home:
                    self._lead(device, f"port{device}")
                elif (site, home) in wiring.trunks:
                    self._lead(device, f"trunk{site}-{home}")

    def _join(self, interface: str, site: int) -> None:
        ip(self.fabric, f"link set {interface} master site{site} addrgenmode none up")
        ip(self.fabric, f"link set {interface} type bridge_slave learning off flood off")
        tc(self.fabric, f"qdisc add dev {interface} clsact")

    def _lead(self, device: int, interface: str) -> None:
        entry = f"fdb replace {_hardware_address(device)} dev {interface} master static"
        run("bridge", "-n", self.fabric, *entry.split())

    def _make_queue(self, medium: int) -> None:
        name, latency_s = f"medium{medium}", self._media[medium].latency_s
        ip(self.fabric, f"link add {name} type ifb")
        ip(self.fabric, f"link set {name} txqueuelen 10000 addrgenmode none up")
        if self._has_delay:
            delay = f"netem delay {latency_s * 1e6:.0f}us limit 100000"
            tc(self.fabric, f"qdisc add dev {name} root handle 1: {delay}")
        tc(self.fabric, f"qdisc add dev {name} {self._bucket(medium, 1.0)}")

    def _bucket(self, medium: int, factor: float) -> str:
        wire = self._packet_bytes[medium] / _PAYLOAD
        rate = self._media[medium].rate_bytes_per_s * factor * wire
        burst = max(rate * _BURST_S, _MIN_BURST_BYTES)
        queue = max(rate * _QUEUE_S, _MIN_QUEUE_BYTES)
        place = "parent 1:1 handle 10:" if self._has_delay else "root handle 10:"
        return f"{place} tbf rate {rate * 8:.0f}bit burst {burst:.0f}b limit {queue:.0f}b"

    def _redirect(self, wiring: Wiring) -> None:
        for (src, dst), medium in wiring.entering.items():
            self._send_through(medium, f"port{src} ingress", f"dst {address(dst)}/32")
        for (src, dst), medium in wiring.leaving.items():
            self._send_through(medium, f"port{dst} egress", f"src {address(src)}/32")
        for (a, b), between in wiring.trunks.items():
            places = (f"trunk{a}-{b} egress", f"trunk{b}-{a} ingress")
            for medium, place in zip(between, places, strict=False):
                self._send_through(medium, place, "dst 0.0.0.0/0")

    def _send_through(self, medium: int, place: str, condition: str) -> None:
        action = f"action mirred egress redirect dev medium{medium}"
        match = f"protocol ip u32 match ip {condition}"
        tc(self.fabric, f"filter add dev {place} {match} {action}")


def _is_half_duplex(medium: str, cluster: Cluster) -> bool:
    """Returns whether data and the answers to it cross the same medium."""
    over = {(link.src, link.dst) for link in cluster.links if medium in link.media}
    return any((dst, src) in over for src, dst in over)


def has_netem(name: str) -> bool:
    """Returns whether this kernel can delay packets; tries it in a namespace of that name."""
    with _namespace(f"{name}-probe") as namespace:
        try:
            tc(namespace, "qdisc add dev lo root netem delay 1ms")
        except NetworkError:
            return False
        return True


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    run("ip", "netns", "add", name)
    try:
        yield name
    finally:
        remove(name)


# ------------------------------------------------------------ namespaces


def enter(namespace: str) -> None:
    """Moves the calling thread, and threads it starts from now on, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {namespace} failed")


def _open_in(namespace: str, path: str) -> IO[str]:
    """Opens a file that shows what the namespace of the thread that opens it has."""
    opened: list[IO[str]] = []

    def work() -> None:
        enter(namespace)
        file = open(path.replace("/proc/", "/proc/thread-self/"))  # noqa: SIM115
        opened.append(file)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return opened[0]


def remove(namespace: str) -> None:
    """Ends what runs in a namespace and deletes it with all its devices."""
    path = Path(f"/run/netns/{namespace}")
    if not path.exists():
        return
    with suppress(NetworkError):  # of a namespace that was never finished
        for pid in run("ip", "netns", "pids", namespace).split():
            if int(pid) != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    try:
        run("ip", "netns", "delete", namespace)
    except NetworkError:
        if path.exists():  # else another start has removed it meanwhile
            raise


def remove_left_over(prefix: str, is_left_over: Callable[[str], bool]) -> None:
    """Removes the namespaces of that prefix whose makers have ended."""
    folder = Path("/run/netns")
    for path in sorted(folder.glob(f"{prefix}-*")) if folder.exists() else []:
        if is_left_over(path.name):
            remove(path.name)


def ip(namespace: str, arguments: str) -> None:
    """Runs `ip` for a namespace."""
    run("ip", "-n", namespace, *arguments.split())


def tc(namespace: str, arguments: str) -> None:
    """Runs `tc` for a namespace."""
    run("tc", "-n", namespace, *arguments.split())


@contextmanager
def signals_later() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait: one amid starting a command leaves it to run on unseen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for later in came:
            signal.raise_signal(later)


def run(*command: str) -> str:
    """Runs a command and returns what it prints."""
    with signals_later():
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            start_new_session=True,  # Ctrl-C must not break the commands that clean up after it
            check=False,
        )
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
