"""A device that was lost comes back to the running job, or a new one comes; no loss differs."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, begin, job, wait_for
from models import make
from plans import make_plan
from ranks import Outcome
from test_recovery import batch, plain
from torch.distributed import TCPStore

import dora
from dora import DoraParallel, partition
from dora.cli import main
from dora.errors import ProtocolError, SpecError
from dora.runtime import joining
from dora.runtime.batch import as_call
from dora.runtime.door import seal, unseal

pytestmark = pytest.mark.timeout(150)

KEY = "a secret that all ranks share"
_MORE_STEPS = 30


def build(name: str = "mlp", **options: Any) -> Any:
    case = make(name)
    chain = partition(case.module, *as_call(case.inputs))
    shares = options.pop("shares", ((1,), (1,), (1,)))
    plan = make_plan(chain.num_blocks, shares, idle=options.pop("idle", 0))
    options = {"snapshot_interval": 1, "timeout_s": 10.0, "seed": 5, **options}
    return case, DoraParallel(chain, plan, **options)


def train(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    case, model = build(**options)
    first = model.step_count
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    losses = {}
    for i in itertools.count(first):
        if not begin(folder, rank, i, first):
            break
        optimizer.zero_grad()
        losses[i] = float(model.step(*batch(i), case.loss_fn))
        model.clip_grad_norm_(5.0)
        optimizer.step()
    facts = {
        "losses": losses,
        "events": [(e.kind, e.call, e.devices, e.lost_calls) for e in model.events],
        "state": model.state_dict(),
        "stages": [[r.device for r in s.replicas] for s in model.plan.stages],
        "steps": model.step_count,
    }
    model.close()
    return facts


def serve(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    _, model = build(**options)
    model.eval()
    first = model.request_count
    answers = {}
    with torch.no_grad():
        for i in itertools.count(first):
            if not begin(folder, rank, i, first):
                break
            answers[i] = model(batch(i)[0])
    model.state_dict()
    stages = [[r.device for r in s.replicas] for s in model.plan.stages]
    model.close()
    return {"answers": answers, "stages": stages}


def step_of(folder: Path, rank: int = 0) -> int:
    at = folder / f"at-{rank}"
    return int(at.read_text() or 0) if at.exists() else -1


def reach(folder: Path, step: int) -> None:
    wait_for(lambda: step_of(folder) >= step)


def has_joined(folder: Path, rank: int) -> list[int]:
    """Returns the steps with which processes of this rank have begun."""
    return sorted(int(path.name.rsplit("-")[-1]) for path in folder.glob(f"in-{rank}-*"))


def lose_and_join(running: Job, folder: Path, rank: int, *arguments: Any, **how: Any) -> None:
    """Kills a rank, and starts it again some steps later; ends when it takes part."""
    before = has_joined(folder, rank)
    if rank in running.ranks:
        running.kill(rank)
    step = step_of(folder, 2)
    wait_for(lambda: step_of(folder, 2 if rank < 2 else 0) >= step + 3)
    running.join(rank, *arguments, **how)
    wait_for(lambda: has_joined(folder, rank) != before or running.has_ended(rank))


def end(folder: Path) -> None:
    part = folder / "end.part"
    part.write_text(str(step_of(folder) + _MORE_STEPS))
    part.rename(folder / "end")


def check_as_uninterrupted(facts: list[dict[str, Any]]) -> None:
    """Compares with a plain run in which the lost calls never were; all lost the same."""
    applied: list[int] = []
    resumed, num_steps = 0, facts[0]["steps"]
    for _, call, _, lost in facts[0]["events"]:
        applied += range(resumed, call)
        del applied[len(applied) - lost :]
        resumed = call
        assert lost <= 2
    losses, state = plain(applied + list(range(resumed, num_steps)))
    wanted = dict(zip(range(resumed, num_steps), losses[len(applied) :], strict=True))
    for fact in facts:
        assert fact["steps"] == num_steps
        assert max(fact["losses"]) == num_steps - 1
        for i, loss in fact["losses"].items():
            assert loss == facts[0]["losses"][i]
            assert i < resumed or loss == pytest.approx(wanted[i], rel=1e-4)
        for name, value in state.items():
            torch.testing.assert_close(fact["state"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["gloo", pytest.param("dora", marks=pytest.mark.slow)])
def test_device_that_was_killed_comes_back(tmp_path, backend):
    with job(3, train, backend=backend) as running:
        for rank in range(3):
            running.start(rank, tmp_path, {})
        reach(tmp_path, 3)
        lose_and_join(running, tmp_path, 1, tmp_path, {})
        end(tmp_path)
        facts = [running.value(rank) for rank in (0, 2, 1)]
    kinds = [[kind for kind, *_ in fact["events"]] for fact in facts]
    assert kinds == [["recovery", "join"], ["recovery", "join"], ["join"]]
    assert [fact["stages"] for fact in facts] == [[["d0"], ["d1"], ["d2"]]] * 3
    assert min(facts[2]["losses"]) == has_joined(tmp_path, 1)[1] >= 6
    check_as_uninterrupted(facts)


@pytest.mark.slow
def test_two_devices_come_back_again_and_again(tmp_path):
    with job(3, train) as running:
        for rank in range(3):
            running.start(rank, tmp_path, {})
        reach(tmp_path, 3)
        for rank in (1, 2, 1):
            lose_and_join(running, tmp_path, rank, tmp_path, {})
            reach(tmp_path, step_of(tmp_path) + 3)
        running.kill(1)
        reach(tmp_path, step_of(tmp_path) + 3)
        lose_and_join(running, tmp_path, 2, tmp_path, {})  # while 1 is gone
        lose_and_join(running, tmp_path, 1, tmp_path, {})
        end(tmp_path)
        facts = [running.value(rank) for rank in range(3)]
    assert facts[0]["stages"] == [["d0"], ["d1"], ["d2"]]
    assert [kind for kind, *_ in facts[0]["events"]].count("join") == 5
    check_as_uninterrupted(facts)


@pytest.mark.slow
def test_device_comes_back_to_inference(tmp_path):
    with job(3, serve) as running:
        for rank in range(3):
            running.start(rank, tmp_path, {})
        reach(tmp_path, 12)
        lose_and_join(running, tmp_path, 1, tmp_path, {})
        end(tmp_path)
        facts = [running.value(rank) for rank in range(3)]
    case = make("mlp")
    for fact in facts:
        assert fact["stages"] == [["d0"], ["d1"], ["d2"]]
        for i, answer in fact["answers"].items():
            with torch.no_grad():
                torch.testing.assert_close(answer, case.module(batch(i)[0]))


@pytest.mark.slow
def test_device_that_was_never_there_comes(tmp_path):
    options = {"idle": 1, "shares": ((1,), (1,))}
    with job(2, train) as running:
        for rank in range(2):
            running.start(rank, tmp_path, options)
        reach(tmp_path, 3)
        lose_and_join(running, tmp_path, 2, tmp_path, options, world_size=3)
        lose_and_join(running, tmp_path, 1, tmp_path, options)
        end(tmp_path)
        facts = [running.value(rank) for rank in range(3)]
    assert [kind for kind, *_ in facts[0]["events"]] == ["join", "recovery", "join"]
    check_as_uninterrupted(facts)


@pytest.mark.slow
def test_lowest_rank_comes_back_where_another_process_hosts_the_rendezvous(tmp_path):
    """As under torchrun."""
    with job(3, train) as running:
        store = TCPStore("127.0.0.1", running.port, is_master=True, wait_for_workers=False)
        running.environment = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        for rank in range(3):
            running.start(rank, tmp_path, {})
        reach(tmp_path, 3)
        for rank in (0, 1, 0):
            lose_and_join(running, tmp_path, rank, tmp_path, {})
            step = step_of(tmp_path, 2)
            wait_for(lambda step=step: step_of(tmp_path, 2) >= step + 3)
        end(tmp_path)
        facts = [running.value(rank) for rank in (2, 1, 0)]
    assert store.num_keys() > 0
    assert facts[0]["stages"] == [["d0"], ["d1"], ["d2"]]
    assert [kind for kind, *_ in facts[0]["events"]] == ["recovery", "join"] * 3
    check_as_uninterrupted(facts)


def die_at_the_door(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Trains; a newcomer is killed once it is connected, before it knows anything."""
    if options.pop("dies", False):
        joining.exchange = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return train(rank, folder, options)


@pytest.mark.slow
def test_newcomer_that_dies_at_the_door_costs_nothing(tmp_path):
    with job(3, die_at_the_door) as running:
        for rank in range(3):
            running.start(rank, tmp_path, {})
        reach(tmp_path, 3)
        for dies in (True, True, False):
            lose_and_join(running, tmp_path, 1, tmp_path, {"dies": dies})
            reach(tmp_path, step_of(tmp_path) + 3)
        end(tmp_path)
        facts = [running.value(rank) for rank in (0, 2, 1)]
    kinds = [kind for kind, *_ in facts[0]["events"]]
    assert kinds == ["recovery", "recovery", "recovery", "join"]
    assert [lost for *_, lost in facts[0]["events"]][1:] == [0, 0, 0]
    check_as_uninterrupted(facts)


# ------------------------------------------------------------ refusals


def refused(tmp_path: Path, rank: int, options: dict[str, Any], **how: Any) -> Outcome:
    """Returns what becomes of a process that wants to join a job of three; the job goes on."""
    started = how.pop("started", {})
    with job(3, train) as running:
        for each in range(3):
            running.start(each, tmp_path, {"key": KEY, **started})
        reach(tmp_path, 2)
        others = running.ranks.pop(rank, None)
        ends = running.ends.pop(rank, None)
        running.join(rank, tmp_path, {"key": KEY, **options}, **how)
        outcome = running.outcome(rank)
        step = step_of(tmp_path)
        reach(tmp_path, step + 3)
        if others is not None:
            running.ranks[rank], running.ends[rank] = others, ends
            end(tmp_path)
            assert [kind for kind, *_ in running.value(0)["events"]] == []
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "options", "kind", "message"),
    [
        (1, {}, ProtocolError, "rank 1 is alive, allowed: a rank that is gone"),
        (1, {"key": "another secret, not theirs"}, SpecError, "given another one than the job"),
        (1, {"name": "tied"}, ProtocolError, "its module or options differ"),
        (1, {"snapshot_interval": 7}, ProtocolError, "its module or options differ"),
        (1, {"snapshot_interval": None}, ProtocolError, "given no snapshot_interval"),
    ],
)
def test_who_does_not_belong_is_refused(tmp_path, rank, options, kind, message):
    outcome = refused(tmp_path, rank, options)
    assert isinstance(outcome.error, kind), outcome
    assert message in str(outcome.error)


@pytest.mark.slow
def test_rank_that_the_plan_does_not_count_is_refused(tmp_path):
    outcome = refused(tmp_path, 3, {}, world_size=4)
    assert "rank 3: given for a job of 3 devices, allowed: ranks 0 to 2" in str(outcome.error)


def lag(rank: int, folder: Path, options: dict[str, Any]) -> Any:
    """Trains; rank 0 then stays on, since it hosts the rendezvous."""
    facts = train(rank, folder, options)
    (folder / f"done-{rank}").touch()
    while rank == 0 and not (folder / "leave").exists():
        time.sleep(0.01)
    return facts


@pytest.mark.slow
def test_job_that_has_ended_takes_nobody_in(tmp_path):
    with job(3, lag) as running:
        for rank in range(3):
            running.start(rank, tmp_path, {})
        reach(tmp_path, 2)
        running.kill(1)
        end(tmp_path)
        wait_for((tmp_path / "done-0").exists)
        running.join(1, tmp_path, {})
        outcome = running.outcome(1)
        (tmp_path / "leave").touch()
    assert "the job has ended" in str(outcome.error), outcome


# ------------------------------------------------------------ the command


PROGRAM = """
import sys, itertools, os, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_rejoin import train
torch.set_num_threads(1)
dist.init_process_group("gloo")
facts = train(dist.get_rank(), Path({folder!r}), {{}})
torch.save(facts, Path({folder!r}) / "facts.pt")
os._exit(0)
"""


@pytest.mark.slow
def test_command_brings_a_program_back(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    with job(3, train) as running:
        for rank in range(3):
            running.start(rank, tmp_path, {"key": None})
        reach(tmp_path, 3)
        running.kill(1)
        place = ["--rank", "1", "--world-size", "3", "--host", "127.0.0.1", "--port"]
        command = ["join", *place, str(running.port), "--", sys.executable, str(program)]
        path = os.pathsep.join([str(Path(dora.__file__).parent.parent), *sys.path])
        with subprocess.Popen(
            [sys.executable, "-m", "dora.cli", *command], env={**os.environ, "PYTHONPATH": path}
        ) as process:
            wait_for(lambda: len(has_joined(tmp_path, 1)) > 1)
            end(tmp_path)
            facts = [running.value(rank) for rank in (0, 2)]
            assert process.wait(30) == 0
    facts.append(torch.load(tmp_path / "facts.pt"))
    check_as_uninterrupted(facts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": "3"}, "--rank: given 3, allowed: 0 to 2, by --world-size"),
        ({"rank": None}, "--rank: given nothing, allowed: what the job's ranks have as RANK"),
        ({}, "where no job answers (Connection refused): the job's rank 0"),
        ({"rank": "0"}, "rank 0 hosts the rendezvous, and can come back only if a torchrun"),
        ({"key-file": "{folder}/none"}, "which can not be read (No such file or directory)"),
        ({"key-file": "{folder}/short"}, "given a secret of 5 bytes, allowed: 16 or more"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, monkeypatch, given, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "short").write_text("short")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"rank": "1", "world-size": "3", "host": "127.0.0.1", **given}
        place.setdefault("port", str(free.getsockname()[1]))
        flags = [
            part.format(folder=tmp_path)
            for name, value in place.items()
            if value is not None
            for part in (f"--{name}", value)
        ]
        assert main(["join", *flags, "--", "python", "train.py"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_only_who_knows_the_secret_writes_notes():
    sealed = seal(b"secret", "answer 1", {"a": [1]})
    assert unseal(b"secret", "answer 1", sealed) == {"a": [1]}
    assert unseal(b"other", "answer 1", sealed) is None
    assert unseal(b"secret", "answer 2", sealed) is None
    assert unseal(b"secret", "answer 1", sealed.replace("[1]", "[2]")) is None
    assert unseal(b"secret", "answer 1", "{") is None
