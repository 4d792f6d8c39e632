"""Starts the processes of the demo, passes on what they report, and leaves none running."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from dora.demo.planning import NUM_RANKS
from dora.errors import DoraError

_POLL_S = 0.1
# What a stopped process gets to end by itself.
_GRACE_S = 5.0


class DemoError(DoraError, RuntimeError):
    """A process of the demo failed; says why and where its log is."""


def devices_command(folder: Path) -> list[str]:
    """Returns the torchrun command that runs one process per device, on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    return [
        *launcher,
        *rendezvous,
        f"--nproc-per-node={NUM_RANKS}",
        "--max-restarts=0",
        "-m",
        "dora.demo.worker",
        str(folder),
    ]


def alone_command(folder: Path) -> list[str]:
    """Returns the command that runs the plain module in one process."""
    return [sys.executable, "-m", "dora.demo.worker", str(folder), "--alone"]


def demo_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the processes: gloo on the loopback interface.

    By default gloo takes the interface that the host's name resolves to, which on laptops is
    often none.
    """
    loopback = (
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    )
    return {**environment, "GLOO_SOCKET_IFNAME": next(loopback, "lo")}


def follow(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], *, limit_s: float
) -> Iterator[dict[str, Any]]:
    """Runs `command` and yields the events that its processes report, until it ends.

    However this ends, no process is left running.

    Raises:
        DemoError: A process failed, or the limit was reached.
    """
    events, log = folder / "events.jsonl", folder / "log.txt"
    events.touch()
    failures = []
    with log.open("ab") as output, events.open() as lines:
        lines.seek(0, 2)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
        )
        deadline = time.monotonic() + limit_s
        try:
            while True:
                has_ended = process.poll() is not None
                for event in _complete(lines):
                    if event["event"] == "error":
                        failures.append(event)
                    else:
                        yield event
                if has_ended:
                    break
                if time.monotonic() > deadline:
                    raise DemoError(f"still running after {limit_s:g} s: see {log}")
                time.sleep(_POLL_S)
        finally:
            stop(process)
    if process.returncode:
        raise DemoError(_explain(failures, process.returncode, log))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started; torchrun's workers are sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    if process.poll() is None:
        process.kill()
    process.wait()


def _complete(lines: Any) -> Iterator[dict[str, Any]]:
    """Yields the events of the lines that are complete so far."""
    while True:
        position = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(position)
            return
        yield json.loads(line)


def _explain(failures: Sequence[Mapping[str, Any]], returncode: int, log: Path) -> str:
    """Returns the first failure that is not the loss of a peer, which only follows from one."""
    first = [f for f in failures if f["kind"] != "PeerLostError"] or failures
    if first:
        return f"a process failed: {first[0]['kind']}: {first[0]['text']} (log: {log})"
    # torchrun names the root cause last.
    signals = re.findall(r"Signal \d+ \(\w+\) received by PID \d+", log.read_text())
    why = signals[-1] if signals else f"ended with exit code {returncode}"
    return f"a process failed: {why} (log: {log})"
