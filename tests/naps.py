"""A job whose blocks take time, with the plans that `planned` finds; light, for `torchrun`."""

from __future__ import annotations

import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jobs import begin
from test_adapt_hook import make_cluster
from torch import nn
from torch.nn import functional as F  # noqa: N812

from dora import DoraParallel, partition, planned
from dora.files import save
from dora.spec import BlockCost, BlockProfile, ModelProfile, Plan, Timing, Workload

Batch = tuple[torch.Tensor, torch.Tensor]

# Of a block and a sample, forward as backward: most of a step is what the plan divides.
NAP_S = 0.0005


class Nap(torch.autograd.Function):
    """Takes time in both directions, and changes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return grads[0], None


def doze(slow: Path, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Lets a block take its time, and eight times that once the test says that it is slow."""
    return Nap.apply(output, len(output) * NAP_S * (8 if slow.exists() else 1))


def make_profile(num_blocks: int) -> ModelProfile:
    def cost(n: int) -> BlockCost:
        timings = tuple(
            Timing(device=d.name, forward_s=n * NAP_S, backward_s=n * NAP_S)
            for d in make_cluster(3).devices
        )
        return BlockCost(microbatch_size=n, flops=1.0, output_bytes=48 * n, timings=timings)

    costs = tuple(cost(n) for n in (1, 2, 4, 8))
    block = {"num_params": 156, "param_bytes": 624, "trainable_bytes": 624, "costs": costs}
    return ModelProfile(blocks=tuple(BlockProfile(name=f"{i}", **block) for i in range(num_blocks)))


def prepare(folder: Path, module: nn.Sequential, batches: list[Batch]) -> None:
    """Leaves in a folder what `train` trains."""
    torch.save((module, batches), folder / "case.pt")
    chain = partition(module, (batches[0][0],))
    save(make_profile(chain.num_blocks), folder / "profile.json")


def work_of(plan: Plan) -> dict[str, float]:
    """Returns by device how many blocks it runs, of as large a share of the samples."""
    found: dict[str, float] = {}
    for stage in plan.stages:
        for replica in stage.replicas:
            blocks = stage.last_block + 1 - stage.first_block
            found[replica.device] = found.get(replica.device, 0.0) + blocks * replica.share
    return found


def train(rank: int, folder: Path) -> dict[str, Any]:
    """Trains with the plans that `planned` finds, and its adapter."""
    module, batches = torch.load(folder / "case.pt", weights_only=False)
    for block in module.children():
        block.register_forward_hook(partial(doze, folder / f"slow-{rank}"))
    chain = partition(module, (batches[0][0],))
    workload = Workload(batch_size=len(batches[0][0]))
    plan = planned(make_cluster(3), workload, profiles=[folder / "profile.json"])
    model = DoraParallel(chain, plan, snapshot_interval=1, timeout_s=10.0, seed=5)
    first, losses = model.step_count, {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    for i in itertools.count(first):
        if not begin(folder, rank, i, first):
            break
        optimizer.zero_grad()
        losses[i] = float(model.step(*batches[i], F.cross_entropy))
        model.clip_grad_norm_(5.0)
        optimizer.step()
        part = folder / f"work-{rank}.part"
        part.write_text(json.dumps(work_of(model.plan)))
        part.rename(folder / f"work-{rank}")
    facts = {
        "losses": losses,
        "events": [(e.kind, e.call, e.devices, e.lost_calls) for e in model.events],
        "state": model.state_dict(),
        "steps": model.step_count,
    }
    model.close()
    return facts
