"""What every process of `dora demo` does; started by launch.py as `-m dora.demo.worker FOLDER`.

Results and progress go to files in FOLDER, since only the command line prints.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dora.demo.charlm import CharLM, Text, batches, decode, next_char_loss, stdlib_text
from dora.demo.planning import NUM_RANKS, best_hybrid, mean_pass_s, process, with_passes
from dora.doctor import num_cores
from dora.files import save
from dora.profiler import measure_links, to_cluster
from dora.runtime.parallel import DoraParallel
from dora.search import explore, profile_everywhere
from dora.simulator import to_trace
from dora.spec import Plan, Spec, Workload

# Before it, allocators and threads warm up; not part of the step times.
WARMUP_STEPS = 5

# For each number of threads that the single process tries.
TRIAL_STEPS = 4

Report = Callable[..., None]
Step = Callable[[torch.Tensor, torch.Tensor], float]


class Settings(Spec):
    """What the processes run; one micro-batch has batch_size / num_microbatches samples."""

    steps: int = 80
    batch_size: int = 32
    num_microbatches: int = 8
    context: int = 64
    width: int = 96
    learning_rate: float = 4e-3
    max_chars: int = 2_000_000
    held_out_batches: int = 8
    generated_chars: int = 120

    def model(self) -> CharLM:
        """Returns the model, equal on all ranks."""
        torch.manual_seed(0)
        return CharLM(width=self.width, context=self.context)

    def batches(self, codes: torch.Tensor, count: int, seed: int) -> Iterator[Any]:
        """Yields `count` batches, equal on all ranks."""
        return batches(
            codes, num_batches=count, batch_size=self.batch_size, context=self.context, seed=seed
        )


def over_devices(folder: Path, settings: Settings, report: Report) -> None:
    """Profiles, plans, trains, serves and saves on one of the ranks."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    report = report if rank == 0 else lambda event, **fields: None
    torch.set_num_threads(max(1, num_cores() // NUM_RANKS))
    report("phase", name="text, links between the processes")
    text = stdlib_text(settings.max_chars)
    links = measure_links(sizes=(16 << 10, 256 << 10), repeats=3)
    cluster = to_cluster([process(i) for i in range(NUM_RANKS)], links, name="this machine")
    workload = Workload(batch_size=settings.batch_size, num_microbatches=settings.num_microbatches)
    inputs, targets = next(settings.batches(text.train, 1, seed=0))

    def plan(chain: Any, call: Any, gather: Any) -> Plan:
        report("phase", name="every block, on all processes at once")
        profile = profile_everywhere(
            chain, call, gather, cluster, workload, loss_fn=next_char_loss, targets=targets
        )
        size = settings.batch_size // settings.num_microbatches
        mine = mean_pass_s(chain.module, inputs[:size], targets[:size])
        profile = with_passes(profile, [float(part) for part in gather(str(mine).encode())])
        report("phase", name="planning")
        chosen = best_hybrid(profile, cluster, workload)
        if rank == 0:
            for name, spec in (("plan", chosen), ("profile", profile), ("cluster", cluster)):
                save(spec, folder / f"{name}.json")
            found = explore(profile, cluster, workload, effort_s=0.2)
            single = found.best_single
            report(
                "planned",
                plan=chosen.to_json(),
                candidates=[p.to_json() for p in found.plans],
                single=single.to_json() if single else None,
            )
        return chosen

    model = DoraParallel(settings.model(), plan, sample=inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(model.step(x, y, next_char_loss))

    report("phase", name=f"training on {NUM_RANKS} processes", total=settings.steps)
    measured = train(
        step,
        model,
        clip=model.clip_grad_norm_,
        optimizer=optimizer,
        text=text,
        settings=settings,
        report=report,
    )
    timeline = model.timeline()
    report("phase", name="serving", total=settings.held_out_batches + settings.generated_chars)
    perplexity = held_out_perplexity(model, text, settings, report)
    written = generate(model, text.held_out[: settings.context], settings, report)
    report("phase", name="writing the checkpoint")
    model.save(folder / "checkpoint")
    if rank == 0:
        save(timeline, folder / "timeline.json")
        (folder / "trace.json").write_text(to_trace(timeline, model.plan.devices))
    report(
        "result",
        **measured,
        perplexity=perplexity,
        generated=written,
        predicted_s=model.plan.cost.makespan_s if model.plan.cost else None,
        files=text.num_files,
        chars=len(text.train),
    )
    dist.destroy_process_group()


def alone(settings: Settings, report: Report) -> None:
    """Trains the plain module in this process: same data, same steps, best number of threads."""
    text = stdlib_text(settings.max_chars)
    report("phase", name="one process: how many threads?")
    threads = min({1, num_cores()}, key=lambda count: _trial_s(count, text, settings))
    torch.set_num_threads(threads)
    model = settings.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)

    def clip(max_norm: float) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    report("phase", name="training on one process", total=settings.steps)
    step = _plain_step(model)
    measured = train(
        step,
        model,
        clip=clip,
        optimizer=optimizer,
        text=text,
        settings=settings,
        report=report,
    )
    perplexity = held_out_perplexity(model, text, settings, lambda *_, **__: None)
    report("result", **measured, perplexity=perplexity, threads=threads)


def _plain_step(model: nn.Module) -> Step:
    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        loss = next_char_loss(model(x), y)
        loss.backward()
        return loss.item()

    return step


def _trial_s(threads: int, text: Text, settings: Settings) -> float:
    """Returns the least time of a few steps with that many threads."""
    torch.set_num_threads(threads)
    step = _plain_step(settings.model())
    times_s = []
    for x, y in settings.batches(text.train, TRIAL_STEPS, seed=0):
        start = time.perf_counter()
        step(x, y)
        times_s.append(time.perf_counter() - start)
    return min(times_s)


def train(
    step: Step,
    model: nn.Module,
    *,
    clip: Callable[[float], Any],
    optimizer: torch.optim.Optimizer,
    text: Text,
    settings: Settings,
    report: Report,
) -> dict[str, Any]:
    """Runs the training loop; returns first and last loss, medians of step and iteration."""
    model.train()
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=0.2
    )
    losses, steps_s, iterations_s = [], [], []
    for i, (x, y) in enumerate(settings.batches(text.train, settings.steps, seed=0)):
        start = time.perf_counter()
        optimizer.zero_grad()
        losses.append(step(x, y))
        steps_s.append(time.perf_counter() - start)
        clip(1.0)
        optimizer.step()
        schedule.step()
        iterations_s.append(time.perf_counter() - start)
        report("progress", done=i + 1, loss=losses[-1])
    warm = min(WARMUP_STEPS, settings.steps - 1)
    return {
        "loss_before": losses[0],
        "loss_after": statistics.fmean(losses[-10:]),
        "step_s": statistics.median(steps_s[warm:]),
        "samples_per_s": settings.batch_size / statistics.median(iterations_s[warm:]),
    }


def held_out_perplexity(model: nn.Module, text: Text, settings: Settings, report: Report) -> float:
    """Returns exp(mean loss) on modules that were not trained on."""
    model.eval()
    losses = []
    with torch.no_grad():
        for x, y in settings.batches(text.held_out, settings.held_out_batches, seed=1):
            losses.append(float(next_char_loss(model(x), y)))
            report("progress", done=len(losses))
    return math.exp(statistics.fmean(losses))


def generate(model: nn.Module, prompt: torch.Tensor, settings: Settings, report: Report) -> str:
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


def main(folder: Path, is_alone: bool) -> int:
    """Runs one process; whatever goes wrong is reported as an event."""
    settings = Settings.from_json((folder / "settings.json").read_text())
    with (folder / "events.jsonl").open("a", buffering=1) as events:

        def report(event: str, **fields: Any) -> None:
            events.write(json.dumps({"event": event, "alone": is_alone, **fields}) + "\n")

        try:
            if is_alone:
                alone(settings, report)
            else:
                over_devices(folder, settings, report)
        except BaseException as error:
            report("error", kind=type(error).__name__, text=" ".join(str(error).split()))
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--alone" in sys.argv[2:]))
