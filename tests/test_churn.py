"""Devices are killed, hang, leave and come back at random, on a network that changes as it likes.

    DORA_CHURN_S=1800 pytest -m slow tests/test_churn.py

trains for half an hour; a minute without that.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from jobs import Job, job, wait_for
from models import make
from test_recovery import batch
from test_rejoin import begin, build, end, has_joined, reach, step_of

from dora._C import Buckets

DURATION_S = float(os.environ.get("DORA_CHURN_S", "60"))
TIMEOUT_S = 3.0
# Weights that decay so fast come to rest on so few batches, so that rounding does not add up over
# hours: changed by 1e-7 in the beginning, losses differ by 2e-7 after 12,000 steps. A step that is
# missing changes some of the next losses by 1e-4.
_BATCHES, _DECAY = 40, 3.0
_TOLERANCE = 2e-5
_RATES_BYTES_PER_S = (2e5, 5e6)
_MAX_GROWTH_BYTES = 64 << 20
# A snapshot is taken beside the steps, and takes longer than one on the slowest of those networks.
_MOST_LOST = 10
# Of all ranks together, after the last of them has come back.
_STEPS_SETTLED = 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(DURATION_S + 400)]


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, weight_decay=_DECAY)


def train(rank: int, folder: Path) -> dict[str, Any]:
    """Trains until told to stop or to leave; rank 0 says what it uses meanwhile."""
    case, model = build(timeout_s=TIMEOUT_S)
    first = model.step_count
    optimizer = optimizer_of(model.parameters())
    losses, used = {}, []
    for i in itertools.count(first):
        if not begin(folder, rank, i, first):
            break
        if (folder / f"leave-{rank}").exists():
            (folder / f"leave-{rank}").unlink()
            model.leave()
            return {}
        optimizer.zero_grad()
        losses[i] = float(model.step(*batch(i % _BATCHES), case.loss_fn))
        optimizer.step()
        if rank == 0:
            used.append(resources())
    facts = {
        "losses": losses,
        "used": used,
        "events": [(e.kind, e.call, e.lost_calls) for e in model.events],
        "state": model.state_dict(),
        "steps": model.step_count,
    }
    model.close()
    return facts


def resources() -> tuple[int, int, int]:
    memory = psutil.Process().memory_info().rss
    return threading.active_count(), len(os.listdir("/proc/self/fd")), memory


class Churn:
    """What happens to ranks 1 and 2, one after the other."""

    def __init__(self, running: Job, folder: Path, media: Buckets, seed: int) -> None:
        self._running, self._folder, self._media = running, folder, media
        self._random = random.Random(seed)
        self.done: list[str] = []

    def act(self) -> None:
        rank = self._random.choice((1, 2))
        name = self._random.choice(("kill", "stop", "pause", "leave", "rate"))
        self.done.append(f"{name} {rank} at {step_of(self._folder)}")
        getattr(self, name)(rank)
        reach(self._folder, step_of(self._folder) + self._random.randint(3, 12))

    def kill(self, rank: int) -> None:
        self._running.kill(rank)
        reach(self._folder, step_of(self._folder) + self._random.randint(1, 20))
        self._join(rank)

    def stop(self, rank: int) -> None:
        """It hangs until the others have given it up; somebody ends it and starts it again."""
        os.kill(self._running.ranks[rank].pid, signal.SIGSTOP)
        reach(self._folder, step_of(self._folder) + 3)
        self._running.kill(rank)
        self._join(rank)

    def pause(self, rank: int) -> None:
        """It hangs for less than the others wait."""
        os.kill(self._running.ranks[rank].pid, signal.SIGSTOP)
        time.sleep(TIMEOUT_S / 6)
        os.kill(self._running.ranks[rank].pid, signal.SIGCONT)

    def leave(self, rank: int) -> None:
        (self._folder / f"leave-{rank}").touch()
        wait_for(lambda: self._running.has_ended(rank))
        self._running.ranks[rank].join(10)
        reach(self._folder, step_of(self._folder) + 3)
        self._join(rank)

    def rate(self, rank: int) -> None:
        self._media.set_rate(0, self._random.uniform(*_RATES_BYTES_PER_S))

    def _join(self, rank: int) -> None:
        before = has_joined(self._folder, rank)
        self._running.join(rank, self._folder)
        wait_for(lambda: has_joined(self._folder, rank) != before, 60)


def plain(applied: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains the plain module with the batches of those steps."""
    torch.set_num_threads(1)  # layers so small are faster so, above all beside other work
    case = make("mlp")
    optimizer = optimizer_of(case.module.parameters())
    losses = []
    for i in applied:
        inputs, targets = batch(i % _BATCHES)
        optimizer.zero_grad()
        loss = case.loss_fn(case.module(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, case.module.state_dict()


def check_losses(facts: dict[str, Any]) -> None:
    """Compares all steps whose effect has stayed with a plain run of them."""
    applied: list[int] = []
    resumed = 0
    for kind, call, lost in facts["events"]:
        assert lost <= (_MOST_LOST if kind == "recovery" else 0)
        applied += range(resumed, call)
        del applied[len(applied) - lost :]
        resumed = call
    applied += range(resumed, facts["steps"])
    losses, state = plain(applied)
    for i, loss in zip(applied, losses, strict=True):
        assert facts["losses"][i] == pytest.approx(loss, rel=_TOLERANCE), i
    for name, value in state.items():
        torch.testing.assert_close(facts["state"][name], value, rtol=1e-3, atol=1e-4)


def check_resources(used: list[tuple[int, int, int]], settled: int) -> None:
    """Compares the last steps with some with all ranks there, after each has been away once."""
    early, late = used[settled - _STEPS_SETTLED : settled], used[-20:]
    for name, column in (("threads", 0), ("files", 1)):
        least = min(row[column] for row in late)
        assert least <= max(row[column] for row in early), (name, early[-1], late[-1])
    growth = min(row[2] for row in late) - max(row[2] for row in early)
    assert growth < _MAX_GROWTH_BYTES, f"{growth / 1e6:.1f} MB more"


def test_training_survives_whatever_happens(tmp_path):
    path = tmp_path / "buckets"
    links = {(a, b): [0] for a in range(3) for b in range(3) if a != b}
    Buckets.create(str(path), 3, [_RATES_BYTES_PER_S[1]], links)
    seed = random.SystemRandom().randrange(1 << 30)
    with job(3, train) as running:
        running.environment = {"DORA_TESTBED_BUCKETS": str(path)}
        for rank in range(3):
            running.start(rank, tmp_path)
        reach(tmp_path, 5)
        churn = Churn(running, tmp_path, Buckets(str(path)), seed)
        start_s = time.monotonic()
        for rank in (1, 2):
            churn.kill(rank)
            reach(tmp_path, step_of(tmp_path) + _STEPS_SETTLED)
        settled = step_of(tmp_path)
        try:
            while time.monotonic() - start_s < DURATION_S:
                churn.act()
        except BaseException as error:
            ended = {r: running.outcome(r, 0.0) for r in range(3) if running.has_ended(r)}
            raise AssertionError(f"seed {seed}: {churn.done[-3:]}: {error}: {ended}") from error
        end(tmp_path)
        facts = [running.value(rank, 60) for rank in range(3)]
    lost = Counter(lost for kind, _, lost in facts[0]["events"] if kind == "recovery")
    summary = {"seed": seed, "steps": facts[0]["steps"], "lost": lost}
    print(json.dumps({**summary, "first": facts[0]["used"][settled], "last": facts[0]["used"][-1]}))
    print(json.dumps(churn.done))
    check_losses(facts[0])
    check_resources(facts[0]["used"], settled)
    for fact in facts[1:]:
        for name, value in facts[0]["state"].items():
            torch.testing.assert_close(fact["state"][name], value, rtol=0, atol=0)
