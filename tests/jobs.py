"""Jobs whose processes the test starts, kills and starts again: real ones, over loopback."""

from __future__ import annotations

import io
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Outcome, _context, collect

from dora.runtime.process_group import register

# Steps take this long, so that a newcomer comes while there are some; the test ends the job.
_PACE_S = 0.02


@dataclass
class Job:
    """Processes that find one another at a port, where rank 0 answers.

    Attributes:
        world_size: What torch.distributed is told.
        function: Called with (rank, *arguments).
        backend: Of the default process group.
        port: Of the rendezvous.
        environment: Of all of its processes.
        ranks, ends: Rank -> what runs as it now, and where its outcome comes from.
    """

    world_size: int
    function: Callable[..., Any]
    backend: str = "gloo"
    port: int = 0
    ranks: dict[int, Any] = field(default_factory=dict)
    ends: dict[int, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, rank: int, *arguments: Any, world_size: int = 0, **environment: str) -> None:
        """Starts a process as this rank, in the place of one that has ended."""
        here, there = _context.Pipe(duplex=False)
        size = world_size or self.world_size
        told = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            **self.environment,
            **environment,
        }
        process = _context.Process(
            target=_main, args=(there, told, self.backend, self.function, arguments), daemon=True
        )
        process.start()
        there.close()
        self.ranks[rank], self.ends[rank] = process, here

    def join(self, rank: int, *arguments: Any, **options: Any) -> None:
        """Starts a process that comes to the running job, as `dora join` does."""
        self.start(rank, *arguments, TORCH_GLOO_LAZY_INIT="1", **options)

    def kill(self, rank: int) -> None:
        """Ends the process of a rank at once."""
        self.ranks[rank].kill()
        self.ranks[rank].join(10)

    def has_ended(self, rank: int) -> bool:
        """Tells whether the process of a rank is over, or will be at once."""
        return bool(self.ends[rank].poll(0))

    def outcome(self, rank: int, timeout_s: float = 30.0) -> Outcome:
        """Returns what became of a rank; waits for its end."""
        return collect(self.ends[rank], self.ranks[rank], timeout_s)

    def value(self, rank: int, timeout_s: float = 30.0) -> Any:
        """Returns what a rank has returned."""
        outcome = self.outcome(rank, timeout_s)
        assert outcome.error is None and outcome.exitcode is None, (rank, outcome)
        return outcome.value


@contextmanager
def job(world_size: int, function: Callable[..., Any], *, backend: str = "gloo") -> Iterator[Job]:
    """A job whose processes are killed in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = Job(world_size, function, backend, port)
    try:
        yield running
    except AssertionError as error:
        ended = {r: running.outcome(r) for r in running.ranks if running.has_ended(r)}
        raise AssertionError(f"{error}; ended: {ended}") from error
    finally:
        for process in running.ranks.values():
            process.kill()
            process.join()


def wait_for(is_over: Callable[[], bool], timeout_s: float = 40.0) -> None:
    """Waits until something is so."""
    deadline_s = time.monotonic() + timeout_s
    while not is_over():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def begin(folder: Path, rank: int, i: int, first: int) -> bool:
    """Waits for the time of step i; returns whether there is one: the test says which is last."""
    (folder / f"in-{rank}-{first}").touch()
    (folder / f"at-{rank}").write_text(str(i))
    time.sleep(_PACE_S)
    end = folder / "end"
    return i < (int(end.read_text()) if end.exists() else sys.maxsize)


def _main(
    end: Any,
    environment: dict[str, str],
    backend: str,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        if backend == "dora":
            register()
        dist.init_process_group(backend, timeout=timedelta(seconds=60))
        outcome = Outcome(value=function(dist.get_rank(), *arguments))
    except BaseException as error:
        outcome = Outcome(error=error, trace=traceback.format_exc())
    buffer = io.BytesIO()
    try:
        torch.save(outcome, buffer)
    except Exception as error:
        failed = Outcome(error=RuntimeError(repr(error)), trace=outcome.trace)
        torch.save(failed, buffer := io.BytesIO())
    end.send_bytes(buffer.getvalue())
    os._exit(0)  # a rank whose peers failed must not wait for them in a destructor
