"""Runs a function on several ranks: real processes over loopback, a hard time limit."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dora.runtime.process_group import register

# The fork server takes its module path from here, and only from here.
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
_context = multiprocessing.get_context("forkserver")
# Imported once and inherited by every rank; models.py brings torch, dora and transformers.
_context.set_forkserver_preload(["models", "dora.runtime.parallel", "torch._dynamo"])


@dataclass
class Outcome:
    """What one rank did: returned `value`, raised `error`, or ended with `exitcode`."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    exitcode: int | None = None


def outcomes(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    backend: str | None = "gloo",
) -> list[Outcome]:
    """Runs `function(rank, *args)` on every rank and returns what became of each.

    `function` must be importable. `backend` None leaves torch.distributed alone and passes the
    path of a file for a rendezvous: `function(rank, path, *args)`. Ranks that are still alive
    after `timeout_s` are killed and reported as TimeoutError.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(world_size):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_main,
                args=(there, backend, rank, world_size, folder, function, args),
                daemon=True,
            )
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        results = [
            collect(end, process, deadline - time.monotonic())
            for end, process in zip(ends, processes, strict=True)
        ]
        for process in processes:
            process.kill()
            process.join()
        return results


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    backend: str | None = "gloo",
) -> list[Any]:
    """Like `outcomes`, but any failure fails the test with all tracebacks."""
    results = outcomes(world_size, function, *args, timeout_s=timeout_s, backend=backend)
    failures = [
        f"rank {r}: {o.trace or o.error or o.exitcode}"
        for r, o in enumerate(results)
        if o.error is not None or o.exitcode is not None
    ]
    assert not failures, "\n".join(failures)
    return [o.value for o in results]


def join(backend: str, path: str, rank: int, world_size: int) -> None:
    """Makes the default process group, over a file."""
    if backend == "dora":
        register()
    dist.init_process_group(
        backend,
        init_method=f"file://{path}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    if backend == "gloo":  # who ends while others still connect makes their connecting fail
        dist.barrier()


def collect(end: Any, process: Any, timeout_s: float) -> Outcome:
    """Returns what became of a rank; waits for its end."""
    try:
        if not end.poll(max(0.0, timeout_s)):
            return Outcome(error=TimeoutError("still running at the time limit"))
        outcome = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)
    except EOFError:
        process.join(5)
        return Outcome(exitcode=process.exitcode)
    assert isinstance(outcome, Outcome)
    return outcome


def _main(
    end: Any,
    backend: str | None,
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[..., Any],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    try:
        if backend is None:
            args = (f"{folder}/rendezvous", *args)
        else:
            join(backend, f"{folder}/rendezvous", rank, world_size)
        outcome = Outcome(value=function(rank, *args))
    except BaseException as error:
        outcome = Outcome(error=error, trace=traceback.format_exc())
    buffer = io.BytesIO()
    try:
        torch.save(outcome, buffer)
    except Exception as error:
        torch.save(
            Outcome(error=RuntimeError(repr(error)), trace=outcome.trace), buffer := io.BytesIO()
        )
    end.send_bytes(buffer.getvalue())
    os._exit(0)  # a rank whose peers failed must not wait for them in a destructor
