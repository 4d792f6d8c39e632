"""One training step over two ranks: torch.distributed.pipelining on gloo against DoraParallel.

A stage is one `nn.TransformerEncoderLayer`; a micro-batch's activation is 2 MiB. All contenders
start from the same weights, which stay as they are: losses must agree in every step.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from comm_wires import KEY
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F

from dora import DoraParallel
from dora.spec import Plan, Replica, Stage
from dora.spec.plan import warmup_for

WIDTH, HEADS, INNER, LENGTH, MICROBATCH = 512, 8, 2048, 256, 4
# How many more micro-batches Dora keeps in flight: enough to hide a transfer each way.
EXTRA_WARMUP = 3


def build() -> nn.Sequential:
    """Returns the same weights on every call."""
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(
            WIDTH, HEADS, INNER, dropout=0.0, batch_first=True, norm_first=True
        )
        for _ in range(2)
    ]
    return nn.Sequential(*layers)


class Contender(Protocol):
    module: nn.Module

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Runs forward and backward of a batch; returns the loss on the last rank."""


class Torch:
    """Schedule1F1B as lean as it gets: outputs dropped, no pass to scale gradients."""

    def __init__(self, rank: int, num_microbatches: int) -> None:
        self._is_last = rank == 1
        self.module = build()[rank]
        self._schedule = Schedule1F1B(
            PipelineStage(self.module, rank, 2, torch.device("cpu")),
            num_microbatches,
            loss_fn=lambda output, target: F.mse_loss(output, target) / num_microbatches,
            scale_grads=False,
        )

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        if not self._is_last:
            self._schedule.step(inputs)
            return float("nan")
        losses: list[torch.Tensor] = []
        self._schedule.step(target=targets, losses=losses, return_outputs=False)
        return float(sum(loss.item() for loss in losses))


class Dora:
    """DoraParallel with one layer per rank and a deep warm-up; `options` go to it."""

    def __init__(self, num_microbatches: int, **options: Any) -> None:
        names = ("rank0", "rank1")
        plan = Plan(
            devices=names,
            stages=tuple(
                Stage(index=i, first_block=i, last_block=i, replicas=(Replica(device=name),))
                for i, name in enumerate(names)
            ),
            num_microbatches=num_microbatches,
            warmup=warmup_for([[1.0], [1.0]], extra=EXTRA_WARMUP),
        )
        sample = torch.zeros(MICROBATCH, LENGTH, WIDTH)
        self.module = DoraParallel(build(), plan, sample=sample, **options)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        return float(self.module.step(inputs, targets, F.mse_loss))


class Pipelines:
    """All contenders in one process; collective on both ranks."""

    def __init__(self, rank: int, *, num_microbatches: int) -> None:
        generator = torch.Generator().manual_seed(1)
        size = num_microbatches * MICROBATCH, LENGTH, WIDTH
        self._inputs = torch.randn(size, generator=generator)
        self._targets = torch.randn(size, generator=generator)
        self._contenders: dict[str, Contender] = {
            "gloo": Torch(rank, num_microbatches),
            "gloo, early receives": Dora(num_microbatches, transport="gloo"),
            "dora": Dora(num_microbatches, transport="dora", key=KEY.hex()),
        }

    def step(self, name: str) -> tuple[float, float]:
        """Returns seconds of a step on this rank, and its loss: NaN where it is not known."""
        contender = self._contenders[name]
        dist.barrier()
        start = time.perf_counter()
        loss = contender.step(self._inputs, self._targets)
        elapsed_s = time.perf_counter() - start
        for parameter in contender.module.parameters():
            parameter.grad = None
        return elapsed_s, loss
