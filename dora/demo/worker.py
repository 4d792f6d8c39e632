"""What every device of `dora demo` does; started by launch.py as `-m dora.demo.worker FOLDER`.

Progress and results are lines of JSON on standard output, which launch.py reads.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dora.demo.charlm import CharLM, Text, batches, decode, next_char_loss, stdlib_text
from dora.files import load
from dora.planner import predict
from dora.planner.baselines import BASELINES
from dora.runtime.parallel import DoraParallel
from dora.search import planned
from dora.spec import Cluster, Plan, Spec, Workload

Report = Callable[..., None]
# What is shown beside Dora, and who plans it.
RIVALS = {
    "best single device": "best-single",
    "even pipeline over all devices": "even-pipeline",
}


class Settings(Spec):
    """What the devices run."""

    steps: int = 60
    rival_steps: int = 4
    batch_size: int = 32
    context: int = 64
    width: int = 128
    learning_rate: float = 4e-3
    max_chars: int = 2_000_000
    held_out_batches: int = 4
    generated_chars: int = 60

    def model(self) -> CharLM:
        """Returns the model, equal on all ranks."""
        torch.manual_seed(0)
        return CharLM(width=self.width, context=self.context)

    def batches(self, codes: torch.Tensor, count: int, seed: int) -> Iterator[Any]:
        """Yields `count` batches, equal on all ranks."""
        return batches(
            codes, num_batches=count, batch_size=self.batch_size, context=self.context, seed=seed
        )


def run(folder: Path, settings: Settings, report: Report) -> None:
    """Profiles, plans, trains, serves, saves and compares on one of the ranks."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    report = report if dist.get_rank() == 0 else lambda event, **fields: None
    cluster = load(Cluster, folder / "cluster.json")
    workload = Workload(batch_size=settings.batch_size)
    text = stdlib_text(settings.max_chars)
    inputs, _ = next(settings.batches(text.train, 1, seed=0))

    report("phase", name="every device measures the blocks of the model, then one plans")
    plan = planned(cluster, workload)
    model = DoraParallel(settings.model(), plan, sample=inputs)
    assert plan.profile is not None
    report("planned", candidates=[p.to_json() for p in plan.plans], cluster=cluster.to_json())

    report("phase", name="training on Dora's plan", total=settings.steps)
    losses = train(model, text, settings, settings.steps, report)
    plan.record(model, folder, name="dora demo")
    contenders = {"dora": _measured(model, losses)}
    report("phase", name="serving", total=settings.held_out_batches + settings.generated_chars)
    perplexity = held_out_perplexity(model, text, settings, report)
    written = generate(model, text.held_out[: settings.context], settings, report)
    model.save(folder / "checkpoint")
    model.transport.close()
    for name, planner in RIVALS.items():
        report("phase", name=f"the same on: {name}", total=settings.rival_steps)
        rival = BASELINES[planner](plan.profile, cluster, workload)
        priced = predict(plan.profile, cluster, workload, rival)
        linked = priced.model_copy(update={"links": cluster.links})
        contenders[name] = _rival(linked, text, settings, report)
    report(
        "result",
        contenders=contenders,
        perplexity=perplexity,
        generated=written,
        loss_after=statistics.fmean(losses[-10:]),
        files=text.num_files,
        chars=len(text.train),
    )
    dist.destroy_process_group()


def _rival(plan: Plan, text: Text, settings: Settings, report: Report) -> dict[str, Any]:
    """Trains a fresh model for a few steps on another plan."""
    inputs, _ = next(settings.batches(text.train, 1, seed=0))
    model = DoraParallel(settings.model(), plan, sample=inputs)
    losses = train(model, text, settings, settings.rival_steps, report)
    found = _measured(model, losses)
    model.transport.close()
    return found


def _measured(model: DoraParallel, losses: list[float]) -> dict[str, Any]:
    """Returns what `dora demo` shows of the steps so far; the first one finds the shapes."""
    calls = list(model.calls)[1:]
    plan = model.plan
    return {
        "plan": plan.to_json(),
        "devices": sorted({r.device for stage in plan.stages for r in stage.replicas}),
        "losses": losses,
        "step_s": statistics.median(call.end_s - call.start_s for call in calls),
        "predicted_s": plan.cost.makespan_s if plan.cost else None,
        "predicted_j": plan.cost.energy_j if plan.cost else None,
        "window_s": (calls[0].start_s, calls[-1].end_s),
        "steps": len(calls),
    }


def train(
    model: DoraParallel, text: Text, settings: Settings, steps: int, report: Report
) -> list[float]:
    """Runs the training loop; returns the losses."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.2
    )
    losses = []
    for i, (x, y) in enumerate(settings.batches(text.train, steps, seed=0)):
        optimizer.zero_grad()
        losses.append(float(model.step(x, y, next_char_loss)))
        model.clip_grad_norm_(1.0)
        optimizer.step()
        schedule.step()
        report("progress", done=i + 1, loss=losses[-1])
    return losses


def held_out_perplexity(
    model: DoraParallel, text: Text, settings: Settings, report: Report
) -> float:
    """Returns exp(mean loss) on modules that were not trained on."""
    model.eval()
    losses = []
    with torch.no_grad():
        for x, y in settings.batches(text.held_out, settings.held_out_batches, seed=1):
            losses.append(float(next_char_loss(model(x), y)))
            report("progress", done=len(losses))
    return math.exp(statistics.fmean(losses))


def generate(model: DoraParallel, prompt: torch.Tensor, settings: Settings, report: Report) -> str:
    """Continues the prompt character by character; equal draws on all ranks."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    codes = prompt
    with torch.no_grad():
        for i in range(settings.generated_chars):
            scores_BTV = model(codes[None, -settings.context :])
            weights = torch.softmax(scores_BTV[0, -1] / 0.7, dim=-1)
            codes = torch.cat([codes, torch.multinomial(weights, 1, generator=generator)])
            report("progress", done=settings.held_out_batches + i + 1)
    return decode(codes[len(prompt) :])


def main(folder: Path) -> int:
    """Runs one device; whatever goes wrong is reported as an event."""
    torch.set_num_threads(1)

    def report(event: str, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()

    try:
        run(folder, load(Settings, folder / "settings.json"), report)
    except BaseException as error:
        report("error", kind=type(error).__name__, text=" ".join(str(error).split()))
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
