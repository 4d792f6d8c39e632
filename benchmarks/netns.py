"""Slow links on this machine: network namespaces, a node each, joined by shaped devices.

`private_link` is a wire of its own between two nodes; `shared_medium` is one half-duplex medium
for all nodes, as a Wi-Fi channel is: whatever any node sends passes one token bucket. Rates are
kept by tbf, so bytes wait as on a slow link, but propagation takes no time.

Everything lives inside namespaces whose names tell the process that made them. Removing those
removes all: on exit, on an exception, on SIGTERM, and at the next start after SIGKILL. Two
benchmarks may run at once. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dora.testbed import names, netns
from dora.testbed.netns import ip, tc, why_not


@dataclass(frozen=True)
class Node:
    """A device of the testbed; no namespace: this machine's own network."""

    address: str
    interface: str = "eth0"
    namespace: str | None = None


LOOPBACK = Node("127.0.0.1", "lo")


# ------------------------------------------------------------ topologies


@contextmanager
def private_link(rate_mbit: int) -> Iterator[list[Node]]:
    """Gives two nodes, joined by one wire of `rate_mbit` in each direction."""
    with _namespaces("node0", "node1") as ends:
        ip(ends[0], f"link add eth0 type veth peer eth0 netns {ends[1]}")
        nodes = [_node(end, i) for i, end in enumerate(ends)]
        for end in ends:
            _shape(end, "eth0", rate_mbit)
        yield nodes


@contextmanager
def shared_medium(num_nodes: int, rate_mbit: int) -> Iterator[list[Node]]:
    """Gives nodes on a bridge whose ports all feed one token bucket of `rate_mbit`."""
    with _namespaces("medium", *(f"node{i}" for i in range(num_nodes))) as (medium, *ends):
        ip(medium, "link add bridge type bridge")
        ip(medium, "link set bridge up")
        ip(medium, "link add air type ifb")
        ip(medium, "link set air up")
        _shape(medium, "air", rate_mbit)
        for i, end in enumerate(ends):
            ip(end, f"link add eth0 type veth peer port{i} netns {medium}")
            ip(medium, f"link set port{i} master bridge up")
            tc(medium, f"qdisc add dev port{i} ingress")
            tc(
                medium,
                f"filter add dev port{i} parent ffff: protocol all u32 match u32 0 0 "
                "action mirred egress redirect dev air",
            )
        yield [_node(end, i) for i, end in enumerate(ends)]


def _node(namespace: str, index: int) -> Node:
    address = f"10.77.0.{index + 1}"
    ip(namespace, "link set lo up")
    ip(namespace, f"address add {address}/24 dev eth0")
    ip(namespace, "link set eth0 up")
    return Node(address, namespace=namespace)


def _shape(namespace: str, device: str, rate_mbit: int) -> None:
    # The bucket must hold what arrives between two timer ticks, and little more: it is data
    # that passes at once.
    burst = "256kb" if rate_mbit >= 1000 else "32kb"
    bucket = f"tbf rate {rate_mbit}mbit burst {burst} latency 50ms"
    tc(namespace, f"qdisc add dev {device} root {bucket}")


# ------------------------------------------------------------ processes


def enter(namespace: str | None) -> None:
    """Moves the calling thread, and threads it starts from now on, into a node's namespace."""
    if namespace is not None:
        netns.enter(namespace)


def run_in(namespace: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
    """Starts a command in a namespace; `options` are those of Popen."""
    return subprocess.Popen(["ip", "netns", "exec", namespace, *command], **options)


# ------------------------------------------------------------ making and removing


@contextmanager
def _namespaces(*roles: str) -> Iterator[list[str]]:
    if reason := why_not():
        raise PermissionError(reason)
    netns.remove_left_over(names.PREFIX, names.is_left_over)
    prefix = names.fresh()
    with ExitStack() as stack:
        stack.enter_context(_unwound_by_sigterm())
        stack.callback(netns.remove_left_over, prefix, lambda _: True)
        made = [f"{prefix}-{role}" for role in roles]
        for name in made:
            netns.run("ip", "netns", "add", name)
        yield made


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
