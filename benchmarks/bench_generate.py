"""Tokens per second and time per token of `generate`, on two emulated devices.

The same requests, of unlike length, by a plain loop in one process, and by `generate` on one device
and on two, one request at a time and eight at a time. All contenders live in the same processes and
take turns, and their tokens must agree. `generation_rows` starts the testbed, and this file again
on every device.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, Row, Samples
from torch import nn

from dora import DoraParallel
from dora.catalog import load_cluster
from dora.runtime.batcher import Generated
from dora.runtime.kvcache import KVCache
from dora.spec import Plan
from dora.testbed import Testbed
from dora.testbed.launch import Job

sys.path.append(str(ROOT / "examples"))
from generate_lm import Layer  # noqa: E402

CLUSTER = Path(__file__).with_name("clusters") / "pair.toml"
WIDTH, LAYERS, VOCABULARY, CONTEXT = 256, 8, 2000, 512
REQUESTS, IN_FLIGHT, NEW_TOKENS = 16, 8, (16, 48)
REPEATS = 3
LIMIT_S = 600.0
PLAIN, SINGLE = "plain loop", "one device"
ALONE, SHARED = "one at a time", f"{IN_FLIGHT} at a time"


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        places = torch.arange(tokens.shape[1]) if cache is None else cache.positions
        x = self.tokens(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x, cache=cache)
        return self.head(x)


def requests() -> tuple[list[list[int]], list[int]]:
    """Returns prompts and limits of new tokens."""
    dice = random.Random(0)
    prompts = [
        [dice.randrange(VOCABULARY) for _ in range(dice.randint(8, 96))] for _ in range(REQUESTS)
    ]
    return prompts, [dice.randint(*NEW_TOKENS) for _ in range(REQUESTS)]


def plan_of(devices: Sequence[str], num_stages: int) -> Plan:
    """Returns an even split; devices beyond it are left out."""
    edges = [round((LAYERS + 2) * i / num_stages) for i in range(num_stages + 1)]
    stages = [
        {
            "index": i,
            "first_block": edges[i],
            "last_block": edges[i + 1] - 1,
            "replicas": [{"device": devices[i]}],
        }
        for i in range(num_stages)
    ]
    return Plan.model_validate({"devices": devices, "stages": stages})


def plain_loop(module: nn.Module, prompts: list[list[int]], limits: list[int]) -> list[Generated]:
    """Serves one request after the other with a cache, as a script without Dora would."""
    results, start_s = [], time.perf_counter()
    for prompt, limit in zip(prompts, limits, strict=True):
        cache, new = KVCache([0]), torch.tensor([prompt])
        tokens: list[int] = []
        times_s: list[float] = []
        while len(tokens) < limit:
            cache.begin(new.shape[1])
            with torch.no_grad():
                new = module(new, cache=cache)[:, -1:].argmax(-1)
            cache.commit()
            tokens.append(int(new))
            times_s.append(time.perf_counter() - start_s)
        results.append(Generated(tuple(tokens), tuple(times_s), "length"))
    return results


def worker(devices: Sequence[str]) -> None:
    """Runs on every device; rank 0 prints what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    prompts, limits = requests()
    contenders: dict[str, Callable[[], list[Generated]]] = {}
    torch.manual_seed(0)
    plain = Decoder().eval()
    contenders[PLAIN] = lambda: plain_loop(plain, prompts, limits) if dist.get_rank() == 0 else []
    sample = torch.zeros(2, 4, dtype=torch.long)
    for num_stages, name in ((1, SINGLE), (len(devices), f"{len(devices)} devices")):
        torch.manual_seed(0)
        plan = plan_of(devices, num_stages)
        model = DoraParallel(Decoder(), plan, sample=sample, timeout_s=120.0).eval()
        for in_flight, how in ((1, ALONE), (IN_FLIGHT, SHARED)):
            contenders[f"{name}, {how}"] = partial(
                model.generate, prompts, limits, max_in_flight=in_flight
            )
    found: dict[str, Any] = {
        name: {"tokens_per_s": [], "ttft_s": [], "tpot_s": []} for name in contenders
    }
    said = set()
    for repeat in range(REPEATS + 1):  # the first finds shapes
        for name in list(contenders)[:: 1 if repeat % 2 else -1]:
            dist.barrier()
            start_s = time.perf_counter()
            results = contenders[name]()
            taken_s = time.perf_counter() - start_s
            said |= {tuple(result.tokens for result in results)} if results else set()
            if repeat:
                found[name]["tokens_per_s"].append(sum(limits) / taken_s)
                found[name]["ttft_s"] += [result.ttft_s for result in results]
                found[name]["tpot_s"] += [result.tpot_s for result in results]
    if dist.get_rank() == 0:
        print(json.dumps({"found": found, "is_equal": len(said) == 1}), flush=True)
    dist.barrier()
    os._exit(0)  # a rank whose peers are gone must not wait for them in a destructor


def generation_rows(mode: str | None = None) -> list[Row]:
    """Measures all contenders; fails if their tokens differ.

    Args:
        mode: Of the testbed; None takes namespaces where this machine can.
    """
    cluster = load_cluster(CLUSTER)
    devices = [device.name for device in cluster.devices]
    command = [sys.executable, str(Path(__file__)), *devices]
    lines = []
    with Testbed(cluster, mode=mode) as testbed:
        job = Job(testbed, command, dict(os.environ), limit_s=LIMIT_S)
        lines = [line for _, line in job.lines()]
    answers = [line for line in lines if line.startswith('{"found"')]
    if job.problem or not answers:
        raise RuntimeError("\n".join([f"generate: {job.problem}", *lines[-20:]]))
    answer = json.loads(answers[0])
    if not answer["is_equal"]:
        raise RuntimeError("generate: contenders say different tokens")
    units = {"tokens_per_s": "1/s", "ttft_s": "s", "tpot_s": "s"}
    return [
        Row("generate", contender, metric, units[metric], Samples(values))
        for contender, measured in answer["found"].items()
        for metric, values in measured.items()
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(sys.argv[1:])
    for row in generation_rows():
        print(f"{row.contender:30} {row.metric:14} {row.samples} {row.unit}")
