"""What all benchmarks share: ranks as processes, samples, tables, CSV rows, the verdict."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------ samples


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def p20(self) -> float:
        return self.percentile(20)

    @property
    def p80(self) -> float:
        return self.percentile(80)

    def percentile(self, percent: float) -> float:
        """Interpolates between the two nearest samples."""
        ordered = sorted(self.values)
        at = (len(ordered) - 1) * percent / 100
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.p20:.4g}, {self.p80:.4g}]"


def paired_ratio(ours: Samples, theirs: Samples) -> Samples:
    """Divides measurements that were taken next to each other, so that slow phases cancel."""
    return Samples([a / b for a, b in zip(ours.values, theirs.values, strict=True)])


# ------------------------------------------------------------ results


@dataclass(frozen=True)
class Row:
    """One line of a result file: one quantity of one contender in one case."""

    case: str
    contender: str
    metric: str
    unit: str
    samples: Samples


def write_csv(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Writes rows with all that is needed to judge and to repeat them."""
    origin = {
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = None
        for row in rows:
            line = {
                "case": row.case,
                "contender": row.contender,
                "metric": row.metric,
                "unit": row.unit,
                "p20": f"{row.samples.p20:.6g}",
                "median": f"{row.samples.median:.6g}",
                "p80": f"{row.samples.p80:.6g}",
                "samples": len(row.samples.values),
                **origin,
            }
            if writer is None:
                writer = csv.DictWriter(file, line)
                writer.writeheader()
            writer.writerow(line)


def hardware() -> str:
    """Returns processor, usable cores and memory, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    system = f"{platform.system()} {platform.release()}"
    return f"{name}, {cores} cores, {memory:.0f} GiB{gpu}, {system}"


def versions() -> str:
    """Returns the versions of Python and of the packages that are compared."""
    try:
        dora = version("dora-parallel")
    except PackageNotFoundError:
        dora = "source"
    return f"python {platform.python_version()}, torch {torch.__version__}, dora {dora}"


def commit() -> str:
    """Returns the commit that ran, marked when files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return (
            f"{head}-dirty" if _git("status", "--porcelain", "--", "dora", "benchmarks") else head
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def command() -> str:
    """Returns what to type in the repository to repeat this run."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", str(name), *sys.argv[1:]])


class Table:
    """Prints lines of cells as they come, so that a long run shows how far it is.

    Args:
        header: Names of the columns.
        width: Of the first column, which is left-aligned, and of all others.
    """

    def __init__(self, header: Sequence[str], *, width: tuple[int, int] = (48, 26)) -> None:
        self._width = width
        self.line(*header)

    def line(self, first: str, *cells: str) -> None:
        """Prints one line."""
        rest = (cell.rjust(self._width[1]) for cell in cells)
        print("  ".join([first.ljust(self._width[0]), *rest]), flush=True)


@dataclass(frozen=True)
class Metric:
    """A number with a promise: `ok` is None where this machine can not check it."""

    value: float | None
    unit: str
    bound: str
    ok: bool | None
    reason: str = ""


def finish(metrics: Mapping[str, Metric]) -> int:
    """Prints the verdict as the last line and returns the exit code."""
    shown = {
        name: {key: value for key, value in asdict(metric).items() if value != ""}
        for name, metric in metrics.items()
    }
    print(json.dumps(shown))
    return int(any(metric.ok is False for metric in metrics.values()))


# ------------------------------------------------------------ ranks

# Ranks are forked from a server that has imported everything once: they start in milliseconds
# and with the same pages, so that their memory can be compared.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch.distributed.pipelining", "dora"])


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 600.0
) -> list[Any]:
    """Returns `function(rank, *args)` of every rank: one process and one thread each, gloo.

    Args:
        num_ranks: Processes, all on this machine.
        function: Importable; what it returns is pickled.
        args: Equal on all ranks.
        timeout_s: Of the slowest rank; all are killed when it is over.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(num_ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(there, rank, num_ranks, folder, (function, *args)),
                daemon=True,
            )
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        try:
            results = [_result(end, rank, timeout_s) for rank, end in enumerate(ends)]
        finally:
            for process in processes:
                process.kill()
                process.join()
    return results


def _result(end: Any, rank: int, timeout_s: float) -> Any:
    if not end.poll(timeout_s):
        raise TimeoutError(f"rank {rank} did not end within {timeout_s:g} s")
    try:
        value, failure = end.recv()
    except EOFError:
        failure = "died"
    if failure:
        raise RuntimeError(f"rank {rank}: {failure}")
    return value


def _rank_main(end: Any, rank: int, num_ranks: int, folder: str, call: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function, *args = call
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=60),
        )
        answer = function(rank, *args), ""
    except Exception:
        answer = None, traceback.format_exc()
    end.send(answer)
    end.close()
    os._exit(0)  # a rank whose peers failed must not wait for them in a destructor
