"""DoraParallel against torch.distributed.pipelining: step time and peak memory over loopback.

Same model, split, ranks, micro-batches and weights, gloo, one thread per rank, one run. Losses
of both must agree in every step.

**Time** of a step: from a barrier until the slowest rank is done with forward and backward;
optimizer and zeroing follow outside the clock. Both contenders live in the same processes and
take turns step by step; the ratio is taken per pair of neighbouring steps.

**Memory** of a contender: fresh processes, one contender each; the highest resident size during
the steps above the size before the model was built, on the worst rank. It holds parameters,
gradients, activations and buffers of messages.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Metric, Row, Samples, Table, finish, paired_ratio, run_ranks, write_csv
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from dora import DoraParallel
from dora.spec import Plan, Replica, Stage
from dora.spec.plan import warmup_for

KINDS = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
VOCABULARY, CLASSES = 96, 10


@dataclass(frozen=True)
class Case:
    """A model and a batch; `num_layers` equal layers between an input and an output layer."""

    model: str
    num_layers: int
    width: int
    length: int  # tokens of a sequence, or height and width of an image
    microbatch: int
    num_microbatches: int


@dataclass(frozen=True)
class Job:
    """A case under one schedule; `more` are options of further Dora contenders, by name."""

    case: Case
    kind: str
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


TIME_CASES = [
    Case("transformer", 4, width=256, length=128, microbatch=2, num_microbatches=8),
    Case("cnn", 8, width=32, length=32, microbatch=4, num_microbatches=8),
]
# Narrow and long: much memory for little arithmetic.
MEMORY_CASES = [
    Case("transformer", 4, width=128, length=128, microbatch=4, num_microbatches=16),
    Case("cnn", 8, width=16, length=32, microbatch=8, num_microbatches=16),
]
# Reported without a bound: what torch's schedules do not offer.
INFORMATION: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    2: {"1f1b": {"dora warm-up +2": {"extra": 2}}},
    4: {
        "1f1b": {
            "dora warm-up +2": {"extra": 2},
            "dora 3:1 + 1 + 1": {"shares": ((0.75, 0.25), (1.0,), (1.0,))},
        }
    },
}
TINY = {
    "transformer": Case("transformer", 4, width=16, length=4, microbatch=1, num_microbatches=4),
    "cnn": Case("cnn", 4, width=4, length=4, microbatch=2, num_microbatches=4),
}

# ------------------------------------------------------------ models


class ConvBlock(nn.Module):
    """A residual block of one convolution with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class PooledHead(nn.Module):
    """Averages an image and classifies it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)))


def build(case: Case) -> nn.Sequential:
    """Returns the same weights on every call."""
    torch.manual_seed(0)
    if case.model == "cnn":
        layers = [ConvBlock(case.width) for _ in range(case.num_layers)]
        return nn.Sequential(
            nn.Conv2d(3, case.width, 3, padding=1), *layers, PooledHead(case.width)
        )
    layers = [
        nn.TransformerEncoderLayer(
            case.width, 4, 4 * case.width, dropout=0.0, batch_first=True, norm_first=True
        )
        for _ in range(case.num_layers)
    ]
    return nn.Sequential(
        nn.Embedding(VOCABULARY, case.width), *layers, nn.Linear(case.width, VOCABULARY)
    )


def batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    size = case.microbatch * case.num_microbatches
    if case.model == "cnn":
        images = torch.randn(size, 3, case.length, case.length, generator=generator)
        return images, torch.randint(CLASSES, (size,), generator=generator)
    tokens = torch.randint(VOCABULARY, (size, case.length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def cuts(case: Case, num_stages: int) -> list[int]:
    """Returns the first block of each stage, and the end: about equally many layers each."""
    inner = [1 + round(case.num_layers * i / num_stages) for i in range(1, num_stages)]
    return [0, *inner, case.num_layers + 2]


# ------------------------------------------------------------ contenders


class Dora:
    """DoraParallel with one device per stage, or `shares` of devices per stage."""

    def __init__(
        self, case: Case, kind: str, *, shares: Sequence[Sequence[float]] = (), extra: int = 0
    ) -> None:
        shares = shares or [[1.0]] * dist.get_world_size()
        edges = cuts(case, len(shares))
        names = iter(f"rank{i}" for i in range(dist.get_world_size()))
        stages = [
            Stage(
                index=i,
                first_block=edges[i],
                last_block=edges[i + 1] - 1,
                replicas=tuple(Replica(device=next(names), share=share) for share in row),
            )
            for i, row in enumerate(shares)
        ]
        plan = Plan(
            devices=tuple(f"rank{i}" for i in range(dist.get_world_size())),
            stages=tuple(stages),
            num_microbatches=case.num_microbatches,
            schedule_kind=kind,
            warmup=warmup_for(shares, extra=extra),
        )
        self.inputs, self.targets = batch(case)
        self.model = DoraParallel(build(case), plan, sample=self.inputs[:1], transport="gloo")
        self.parameters = list(self.model.parameters())

    def step(self) -> float:
        return float(self.model.step(self.inputs, self.targets, loss_fn))


class Torch:
    """torch.distributed.pipelining as lean as it gets: outputs dropped, no pass to scale."""

    def __init__(self, case: Case, kind: str) -> None:
        rank, num_stages = dist.get_rank(), dist.get_world_size()
        edges = cuts(case, num_stages)
        own = build(case)[edges[rank] : edges[rank + 1]]
        self.num_microbatches = case.num_microbatches
        self.inputs, self.targets = batch(case)
        stage = PipelineStage(own, rank, num_stages, torch.device("cpu"))
        self.schedule = KINDS[kind](
            stage,
            case.num_microbatches,
            loss_fn=lambda output, target: loss_fn(output, target) / case.num_microbatches,
            scale_grads=False,
        )
        self.is_first, self.is_last = rank == 0, rank == num_stages - 1
        self.parameters = list(own.parameters())

    def step(self) -> float:
        """Returns the loss on the last rank."""
        inputs = (self.inputs,) if self.is_first else ()
        if not self.is_last:
            self.schedule.step(*inputs)
            return float("nan")
        losses: list[torch.Tensor] = []
        self.schedule.step(*inputs, target=self.targets, losses=losses, return_outputs=False)
        return float(sum(loss.item() for loss in losses))


CONTENDERS = {"dora": Dora, "torch": Torch}


def advance(contender: Dora | Torch) -> tuple[float, float]:
    """Runs one step and a plain SGD update; returns its seconds on this rank, and its loss."""
    dist.barrier()
    start = time.perf_counter()
    loss = contender.step()
    elapsed = time.perf_counter() - start
    with torch.no_grad():
        for parameter in contender.parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.01)
                parameter.grad = None
    return elapsed, loss


# ------------------------------------------------------------ one rank

WARM_UP = 1  # steps of each contender before times count
STEPS = 2  # of each contender for memory
_M_MMAP_THRESHOLD = -3  # malloc.h
Times = dict[str, list[tuple[float, float]]]


def time_rank(rank: int, jobs: Sequence[Job], pairs: int) -> list[Times]:
    """Returns for each job (seconds, loss) per contender and step, taken in turns."""
    return [_take_turns(job, pairs) for job in jobs]


def _take_turns(job: Job, pairs: int) -> Times:
    contenders = {name: make(job.case, job.kind) for name, make in CONTENDERS.items()}
    for name, options in job.more.items():
        contenders[name] = Dora(job.case, job.kind, **options)
    steps = {name: [advance(c) for _ in range(WARM_UP)] for name, c in contenders.items()}
    gc.collect()
    for i in range(pairs):
        for name in list(contenders)[:: 1 if i % 2 else -1]:
            steps[name].append(advance(contenders[name]))
    return steps


def memory_rank(rank: int, job: Job, name: str, steps: int, exact: bool) -> int:
    """Returns the bytes that training adds to the process at its peak."""
    if exact:
        # glibc: return memory to the system at once, so that the peak is what is in use.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
    tiny = CONTENDERS[name](TINY[job.case.model], job.kind)  # loads the code of every layer
    for _ in range(2):
        advance(tiny)
    del tiny
    gc.collect()
    before = _status_bytes("VmRSS")
    contender = CONTENDERS[name](job.case, job.kind)
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(steps):
        advance(contender)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ------------------------------------------------------------ all ranks


def measure_times(num_ranks: int, jobs: Sequence[Job], pairs: int) -> list[dict[str, Samples]]:
    """Returns seconds per step of each contender, per job; AssertionError if losses differ."""
    ranks = run_ranks(num_ranks, time_rank, jobs, pairs)
    results = []
    for i, job in enumerate(jobs):
        losses = {name: [loss for _, loss in steps] for name, steps in ranks[-1][i].items()}
        for name, values in losses.items():
            worst = max(abs(a - b) for a, b in zip(values, losses["torch"], strict=True))
            assert worst <= 1e-5 * max(losses["torch"]), f"{job} {name}: losses differ by {worst}"
        results.append(
            {
                name: Samples(
                    [
                        max(seconds for seconds, _ in step)  # of the slowest rank
                        for step in list(zip(*(rank[i][name] for rank in ranks), strict=True))[
                            WARM_UP:
                        ]
                    ]
                )
                for name in losses
            }
        )
    return results


def measure_memory(num_ranks: int, job: Job, runs: int, *, exact: bool) -> dict[str, Samples]:
    """Returns peak bytes of the worst rank of each contender."""

    def peaks(name: str) -> Samples:
        ranks = [run_ranks(num_ranks, memory_rank, job, name, STEPS, exact) for _ in range(runs)]
        return Samples([max(peak) for peak in ranks])

    with ThreadPoolExecutor() as pool:  # both at once: neither speed nor the other one matters
        return dict(zip(CONTENDERS, pool.map(peaks, CONTENDERS), strict=True))


class Report:
    """Prints results as they come and keeps them for the file and the verdict."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.metrics: dict[str, Metric] = {}
        self._table = Table(["case", "Dora", "torch", "ratio"])

    def add(self, case: str, metric: str, of: Mapping[str, Samples], *, bound: bool = True) -> None:
        """Adds one comparison with torch; `bound` is for the contender "dora" alone."""
        unit, shown_unit, scale = ("s", "ms", 1e3) if metric == "step_time" else ("B", "MB", 1e-6)
        shown = {
            name: f"{Samples([x * scale for x in samples.values])} {shown_unit}"
            for name, samples in of.items()
        }
        for name, samples in of.items():
            self.rows.append(Row(case, name, metric, unit, samples))
            if name == "torch":
                continue
            ratio = paired_ratio(samples, of["torch"])
            self.rows.append(Row(case, f"{name}/torch", f"{metric}_ratio", "1", ratio))
            bounded = bound and name == "dora"
            label = case if bounded else f"  {name}, {metric}, no bound"
            self._table.line(label, shown[name], shown["torch"], str(ratio))
            if bounded:
                self.metrics[f"{metric}_ratio_{case.replace(' ', '_')}"] = Metric(
                    round(ratio.median, 4), "1", "<= 1.0", ratio.median <= 1
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps, half the micro-batches: under 50 s"
    )
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    report = Report()
    cases = TIME_CASES
    if options.quick:
        cases = [replace(case, num_microbatches=4) for case in cases]
    for num_ranks in (2, 4):
        more = {} if options.quick else INFORMATION[num_ranks]
        jobs = [Job(case, kind, more.get(kind, {})) for case in cases for kind in KINDS]
        times = measure_times(num_ranks, jobs, pairs=5 if options.quick else 30)
        for job, of in zip(jobs, times, strict=True):
            report.add(f"{job.case.model} {num_ranks} ranks {job.kind}", "step_time", of)
    for num_ranks in (2, 4):
        for job in (Job(case, kind) for case in MEMORY_CASES for kind in KINDS):
            case = f"{job.case.model} {num_ranks} ranks {job.kind}"
            report.add(case, "peak_memory", measure_memory(num_ranks, job, 1, exact=True))
            if not options.quick:
                resident = measure_memory(num_ranks, job, 3, exact=False)
                report.add(case, "peak_memory_default_malloc", resident, bound=False)
    if options.out:
        write_csv(options.out, report.rows)
    return finish(report.metrics)


if __name__ == "__main__":
    sys.exit(main())
