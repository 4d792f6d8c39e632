"""What every device of `bench_adapter.py --testbed` runs; see `adapter_testbed.py`.

`profile FOLDER` measures the blocks on all devices at once. `train FOLDER` trains until it is
stopped, `switch FOLDER` changes plans by hand, `serve FOLDER` answers requests with one plan after
the other and then with what the adapter makes of them. FOLDER has the settings; results are lines
of JSON, with times on the clock that all processes of one machine share.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from e2e_tasks import Tokens
from torch import nn

from dora import DoraParallel
from dora.adapt import adapting
from dora.adapter import Rules, placed
from dora.adapter.events import placement
from dora.demo.charlm import ALPHABET, CharLM, batches, next_char_loss, stdlib_text
from dora.files import load, save
from dora.partition import partition
from dora.runtime.agreement import Agreement
from dora.runtime.transports import open_transport
from dora.search import profile_everywhere
from dora.spec import Cluster, ModelProfile, Plan, QoE, Spec, Workload

WIDTH, LAYERS, CONTEXT, BATCH = 160, 6, 64, 32
# Seconds from when a device is on the network until it surely has its own speed.
SETTLE_S = 0.5
# Of each plan and of the mix: the machine itself changes from one minute to the next.
SERVING_TURNS = 3


class Settings(Spec):
    """What the host wants.

    Attributes:
        bank: Plans; the first one runs at first.
        adapts: Whether the adapter is on.
        requests: Of each plan and of the mix in each turn; of `switch`, steps.
    """

    workload: Workload
    qoe: QoE = QoE()
    bank: tuple[Plan, ...] = ()
    adapts: bool = True
    requests: int = 0


class Last(nn.Module):
    """Scores the character after the last one alone, which is what is served."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x[:, -1])


def make_model(*, is_serving: bool = False) -> nn.Sequential:
    """Returns the model, equal on all ranks."""
    torch.manual_seed(0)
    whole = CharLM(width=WIDTH, num_layers=LAYERS, context=CONTEXT)
    head = nn.Sequential(whole.norm, Last(whole.head) if is_serving else whole.head)
    return nn.Sequential(Tokens(len(ALPHABET), WIDTH, CONTEXT), *whole.layers, head)


@lru_cache(maxsize=1)
def _codes() -> torch.Tensor:
    return stdlib_text(200_000).train


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the batch of a step, equal on all ranks."""
    some = batches(_codes(), num_batches=1, batch_size=BATCH, context=CONTEXT, seed=step)
    return next(some)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of the training."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def say(**facts: Any) -> None:
    """Tells the host."""
    print(json.dumps(facts), flush=True)


def profile(folder: Path, settings: Settings) -> None:
    """Measures, and lets rank 0 write profile.json."""
    chain = partition(make_model(), (batch(0)[0],))
    transport = open_transport("dora", timeout_s=60.0)
    agreement = Agreement(transport, dist.get_rank(), range(dist.get_world_size()), 60.0)
    agreement.gather(b"", "start")
    time.sleep(SETTLE_S)
    found = profile_everywhere(
        chain,
        ((batch(0)[0],), {}),
        lambda data: agreement.gather(data, "profile"),
        load(Cluster, folder / "cluster.json"),
        settings.workload,
        loss_fn=next_char_loss,
        targets=batch(0)[1],
    )
    if dist.get_rank() == 0:
        save(found, folder / "profile.json")
    transport.close()


def train(folder: Path, settings: Settings) -> None:
    """Trains until the host stops it."""
    model = _model(folder, settings, _adapter(folder, settings, Rules.of(settings.qoe)))
    optimizer = make_optimizer(model)
    for step in range(10**6):
        x, y = batch(step)
        start_s = time.monotonic()
        optimizer.zero_grad()
        loss = float(model.step(x, y, next_char_loss))
        optimizer.step()
        end_s = time.monotonic()
        if dist.get_rank() == model.members[0]:
            say(step=step, start_s=start_s, end_s=end_s, loss=loss, plan=placement(model.plan))


def switch(folder: Path, settings: Settings) -> None:
    """Goes over to one plan of the bank after the other, with steps between, and to each twice."""
    model = _model(folder, settings, None)
    optimizer = make_optimizer(model)
    for step in range(settings.requests):
        if step and step % 4 == 0:
            model.switch(settings.bank[step // 4 % len(settings.bank)])
        if step % 4 == 2:
            model.reorder(model.plan.model_copy(update={"transfers": ()}))
        optimizer.zero_grad()
        start_s = time.monotonic()
        model.step(*batch(step), next_char_loss)
        optimizer.step()
        if dist.get_rank() == 0:
            say(step=step, start_s=start_s, end_s=time.monotonic(), plan=placement(model.plan))


def serve(folder: Path, settings: Settings) -> None:
    """Serves with the first and the second plan alone, and with what the adapter makes of all."""
    rules = Rules.of(settings.qoe)._replace(reading="average")
    for turn in range(SERVING_TURNS):
        model = _model(folder, settings, None)
        for plan, phase in zip(settings.bank, ("single", "frugal"), strict=False):
            model.switch(plan)
            requests(model, 2, "")
            requests(model, settings.requests, f"{phase} {turn}")
        model.close()
        model = _model(folder, settings, _adapter(folder, settings, rules))
        requests(model, 2 * settings.requests, "")  # until it has decided
        requests(model, settings.requests, f"mix {turn}")
        start_s, count = time.perf_counter(), 1000
        for i in range(count):
            model.turn_to(model.resident[i % len(model.resident)])
        if dist.get_rank() == 0:
            say(turn_s=(time.perf_counter() - start_s) / count)
        model.close()


def requests(model: DoraParallel, count: int, phase: str) -> None:
    """Answers one request after the other."""
    x, rank = batch(0)[0], dist.get_rank()
    with torch.no_grad():
        for step in range(count):
            start_s = time.monotonic()
            model(x)
            end_s = time.monotonic()
            say(step=step, start_s=start_s, end_s=end_s, phase=phase, devices=[*placed(model.plan)],
                is_first=rank == model.plan.rank_of(0, 0))  # fmt: skip


def _adapter(folder: Path, settings: Settings, rules: Rules) -> Any:
    if not settings.adapts:
        return None
    return adapting(
        load(ModelProfile, folder / "profile.json"),
        load(Cluster, folder / "cluster.json"),
        settings.workload,
        settings.qoe,
        bank=settings.bank,
        log=folder / "decisions.jsonl",
        rules=rules,
    )


def _model(folder: Path, settings: Settings, adapter: Any) -> DoraParallel:
    """Returns the model on the first plan, once every device has its own speed."""
    training = settings.workload.kind == "train"
    model = DoraParallel(
        make_model(is_serving=not training),
        settings.bank[0],
        sample=batch(0)[0],
        adapter=adapter,
        snapshot_interval=20 if training else None,
        bank=settings.bank,
        timeout_s=10.0,
    )
    rank = dist.get_rank()

    def tell(event: Any) -> None:
        if rank == model.members[0]:
            now_s, seconds = time.monotonic(), event.end_s - event.start_s
            say(event=event.kind, end_s=now_s, seconds=seconds, num_bytes=event.num_bytes or 0,
                lost_steps=event.lost_steps, text=event.text)  # fmt: skip

    model.on_event = tell
    time.sleep(SETTLE_S)
    return model


MODES: dict[str, Callable[[Path, Settings], None]] = {
    "profile": profile, "train": train, "switch": switch, "serve": serve,
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    MODES[sys.argv[1]](place, load(Settings, place / "settings.json"))
