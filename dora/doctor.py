"""Looks at this machine: what Dora can use, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
import torch.distributed as dist

from dora.profiler.energy import find_meters

# Extra of the package -> module that it brings and what that is for.
EXTRAS = {
    "triton": ("triton", "GPU kernels"),
    "energy": ("pynvml", "measured joules of NVIDIA GPUs"),
    "hf": ("transformers", "Hugging Face models"),
    "report": ("matplotlib", "figures"),
    "metrics": ("prometheus_client", "export of run metrics"),
}
MIN_PYTHON, MIN_TORCH = (3, 10), (2, 6)


class Finding(NamedTuple):
    """One thing that was looked at; `broken` means that Dora can not run."""

    subject: str
    status: Literal["ok", "missing", "broken"]
    text: str
    fix: str = ""


def examine(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yields what was found; `environment` tells which network interface gloo will take."""
    yield _version("python", platform.python_version(), MIN_PYTHON, sys.version_info[:2])
    numbers = torch.__version__.split("+")[0].split(".")[:2]
    yield _version("torch", torch.__version__, MIN_TORCH, (int(numbers[0]), int(numbers[1])))
    yield _gloo()
    yield _cores(environment)
    memory = psutil.virtual_memory()
    free = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    yield Finding("memory", "ok", free)
    yield _gpu()
    yield _network(environment)
    yield _energy_meters()
    for extra, (module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            fix = f"pip install 'dora-parallel[{extra}]' for {purpose}"
            yield Finding(f"extra {extra}", "missing", f"{module} is not installed", fix)
        else:
            yield Finding(f"extra {extra}", "ok", f"{module}: {purpose}")


def num_cores() -> int:
    """Returns the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str, text: str, least: tuple[int, int], given: tuple[int, ...]) -> Finding:
    if given >= least:
        return Finding(name, "ok", text)
    wanted = ".".join(map(str, least))
    return Finding(name, "broken", text, f"install {name} {wanted} or newer")


def _gloo() -> Finding:
    if dist.is_available() and dist.is_gloo_available():
        return Finding("gloo", "ok", "torch.distributed with gloo")
    fix = "install a torch that was built with USE_DISTRIBUTED=1 and gloo"
    return Finding("gloo", "broken", "this torch has no torch.distributed with gloo", fix)


def _cores(environment: Mapping[str, str]) -> Finding:
    given = environment.get("OMP_NUM_THREADS")
    note = f", OMP_NUM_THREADS={given}" if given else ""
    text = f"{num_cores()} usable of {psutil.cpu_count()}; torch uses {torch.get_num_threads()}"
    return Finding("cores", "ok", f"{text} threads{note}")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("gpu", "ok", ", ".join(names))
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding(
            "gpu",
            "missing",
            "torch was built for the CPU only",
            "if there is a GPU, install the torch build for it; see pytorch.org",
        )
    return Finding("gpu", "missing", "torch sees none", "check the driver, for example nvidia-smi")


def _energy_meters() -> Finding:
    meters, problems = find_meters()
    text = ", ".join(meter.scope for meter in meters) or "none: energy is modelled"
    return Finding("energy meters", "ok" if meters else "missing", text, "; ".join(problems))


def _network(environment: Mapping[str, str]) -> Finding:
    """Compares the interface of the default route with the one that gloo will take."""
    addresses = {
        name: [a.address for a in found if a.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
    }
    found = ", ".join(f"{name} {a[0]}" for name, a in addresses.items() if a) or "none"
    text = f"interfaces: {found}"
    routed = default_interface()
    named = environment.get("GLOO_SOCKET_IFNAME")
    if named:
        if any(name in addresses for name in named.split(",")):
            return Finding("network", "ok", f"{text}; gloo takes {named} (GLOO_SOCKET_IFNAME)")
        fix = f"unset GLOO_SOCKET_IFNAME or set it to one of {', '.join(addresses)}"
        return Finding("network", "missing", f"{text}; GLOO_SOCKET_IFNAME={named} is none", fix)
    if routed is None:
        fix = "fine for one machine; for several, connect it to the others' network"
        return Finding("network", "missing", f"{text}; no default route", fix)
    taken = _interface_of_host_name(addresses)
    if taken == routed:
        return Finding("network", "ok", f"{text}; gloo takes {routed}, as the default route does")
    other = f"gloo takes {taken}" if taken else "the host name resolves to none of them"
    fix = f"export GLOO_SOCKET_IFNAME={routed} before a run over several machines"
    return Finding("network", "missing", f"{text}; {other}, the default route {routed}", fix)


def default_interface(table: Path = Path("/proc/net/route")) -> str | None:
    """Returns the interface of the default route with the least metric; None if there is none."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return None
    routes = [(int(row[6]), row[0]) for row in rows if len(row) > 7 and row[1] == row[7] == "0" * 8]
    return min(routes)[1] if routes else None


def _interface_of_host_name(addresses: Mapping[str, list[str]]) -> str | None:
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    # All of 127.0.0.0/8 is the loopback interface, as in '127.0.1.1 myhost'.
    address = "127.0.0.1" if address.startswith("127.") else address
    return next((name for name, own in addresses.items() if address in own), None)
