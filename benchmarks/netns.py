"""Slow links on this machine: network namespaces, a node each, joined by shaped devices.

`private_link` is a wire of its own between two nodes; `shared_medium` is one half-duplex medium
for all nodes, as a Wi-Fi channel is: whatever any node sends passes one token bucket. Rates are
kept by tbf, so bytes wait as on a slow link, but propagation takes no time.

Everything lives inside namespaces whose names tell the process that made them. Removing those
removes all: on exit, on an exception, on SIGTERM, and at the next start after SIGKILL. Two
benchmarks may run at once. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

_PREFIX = "dora-bench"
_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 20.0
_numbers = count()


@dataclass(frozen=True)
class Node:
    """A device of the testbed; no namespace: this machine's own network."""

    address: str
    interface: str = "eth0"
    namespace: str | None = None


LOOPBACK = Node("127.0.0.1", "lo")


def why_not() -> str:
    """Returns what is missing for namespaces; empty if nothing is."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)} (package iproute2)" if missing else ""


# ------------------------------------------------------------ topologies


@contextmanager
def private_link(rate_mbit: int) -> Iterator[list[Node]]:
    """Gives two nodes, joined by one wire of `rate_mbit` in each direction."""
    with _namespaces("node0", "node1") as names:
        _ip(names[0], f"link add eth0 type veth peer eth0 netns {names[1]}")
        nodes = [_node(name, i) for i, name in enumerate(names)]
        for name in names:
            _shape(name, "eth0", rate_mbit)
        yield nodes


@contextmanager
def shared_medium(num_nodes: int, rate_mbit: int) -> Iterator[list[Node]]:
    """Gives nodes on a bridge whose ports all feed one token bucket of `rate_mbit`."""
    with _namespaces("medium", *(f"node{i}" for i in range(num_nodes))) as (medium, *names):
        _ip(medium, "link add bridge type bridge")
        _ip(medium, "link set bridge up")
        _ip(medium, "link add air type ifb")
        _ip(medium, "link set air up")
        _shape(medium, "air", rate_mbit)
        for i, name in enumerate(names):
            _ip(name, f"link add eth0 type veth peer port{i} netns {medium}")
            _ip(medium, f"link set port{i} master bridge up")
            _tc(medium, f"qdisc add dev port{i} ingress")
            _tc(
                medium,
                f"filter add dev port{i} parent ffff: protocol all u32 match u32 0 0 "
                "action mirred egress redirect dev air",
            )
        yield [_node(name, i) for i, name in enumerate(names)]


def _node(namespace: str, index: int) -> Node:
    address = f"10.77.0.{index + 1}"
    _ip(namespace, "link set lo up")
    _ip(namespace, f"address add {address}/24 dev eth0")
    _ip(namespace, "link set eth0 up")
    return Node(address, namespace=namespace)


def _shape(namespace: str, device: str, rate_mbit: int) -> None:
    # The bucket must hold what arrives between two timer ticks, and little more: it is data
    # that passes at once.
    burst = "256kb" if rate_mbit >= 1000 else "32kb"
    bucket = f"tbf rate {rate_mbit}mbit burst {burst} latency 50ms"
    _tc(namespace, f"qdisc add dev {device} root {bucket}")


# ------------------------------------------------------------ processes


def enter(namespace: str | None) -> None:
    """Moves the calling thread, and threads it starts from now on, into a namespace."""
    if namespace is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {namespace} failed")


def run_in(namespace: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
    """Starts a command in a namespace; `options` are those of Popen."""
    return subprocess.Popen(["ip", "netns", "exec", namespace, *command], **options)


# ------------------------------------------------------------ making and removing


@contextmanager
def _namespaces(*roles: str) -> Iterator[list[str]]:
    if reason := why_not():
        raise PermissionError(reason)
    remove_leftovers()
    number = next(_numbers)
    with ExitStack() as stack:
        stack.enter_context(_unwound_by_sigterm())
        names = []
        for role in roles:
            name = f"{_PREFIX}-{os.getpid()}-{_start_ticks(os.getpid())}-{number}-{role}"
            stack.callback(_remove, name)  # first, so that no signal can come between
            _run("ip", "netns", "add", name)
            names.append(name)
        yield names


@contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, unless somebody else handles it."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def remove_leftovers() -> None:
    """Removes the namespaces, and processes in them, of benchmarks that were killed."""
    folder = Path("/run/netns")
    for path in sorted(folder.glob(f"{_PREFIX}-*")) if folder.exists() else []:
        pid, ticks = path.name.removeprefix(f"{_PREFIX}-").split("-")[:2]
        if _start_ticks(int(pid)) != ticks:
            _remove(path.name)


def _start_ticks(pid: int) -> str | None:
    """Returns when a process began; with its id that names it for good. None: it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _remove(namespace: str) -> None:
    """Ends what runs in a namespace and deletes it with all its devices."""
    if not Path(f"/run/netns/{namespace}").exists():
        return
    for pid in _run("ip", "netns", "pids", namespace).split():
        if int(pid) != os.getpid():
            os.kill(int(pid), signal.SIGKILL)
    _run("ip", "netns", "delete", namespace)


def _ip(namespace: str, arguments: str) -> None:
    _run("ip", "-n", namespace, *arguments.split())


def _tc(namespace: str, arguments: str) -> None:
    _run("tc", "-n", namespace, *arguments.split())


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        start_new_session=True,  # Ctrl-C must not break the commands that clean up after it
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
