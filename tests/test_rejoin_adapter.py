"""Devices that come back to a job whose adapter is on, and to one that `torchrun` has started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job, wait_for
from models import make
from naps import prepare, train
from test_recovery import batch
from test_rejoin import check_as_uninterrupted, end, has_joined, lose_and_join, reach, step_of
from torch.distributed import TCPStore

import dora

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

# More than there is time for.
MOST_STEPS = 5000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path, make("mlp").module, [batch(i) for i in range(MOST_STEPS)])
    return tmp_path


def work(folder: Path, device: str) -> list[float]:
    """Returns how much this device does, as each rank sees it."""
    said = [folder / f"work-{rank}" for rank in range(3)]
    return [json.loads(one.read_text()).get(device, 0.0) for one in said if one.exists()]


@pytest.mark.parametrize("lost", [1, 0])
def test_device_comes_back_to_a_job_with_an_adapter(folder, lost):
    """The lowest rank decides for all, also when it has just come back."""
    with job(3, train) as running:
        store = TCPStore("127.0.0.1", running.port, is_master=True, wait_for_workers=False)
        running.environment = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        for rank in range(3):
            running.start(rank, folder)
        reach(folder, 12)
        lose_and_join(running, folder, lost, folder)
        wait_for(lambda: len(work(folder, "d2")) == 3 and min(work(folder, "d2")) > 0)
        usual = min(work(folder, "d2"))
        (folder / "slow-2").touch()
        wait_for(lambda: max(work(folder, "d2")) < usual / 2, timeout_s=150)
        end(folder)
        facts = [running.value(rank) for rank in (2, *{0, 1} - {lost}, lost)]
    assert store.num_keys() > 0
    for fact in facts:
        kinds = [kind for kind, *_ in fact["events"]]
        assert "switch" in kinds[kinds.index("join") :]
    check_as_uninterrupted(facts)


# ------------------------------------------------------------ torchrun, one per device


PROGRAM = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, {tests!r})
from naps import train
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path({folder!r})
(folder / f"pid-{{rank}}").write_text(str(os.getpid()))
torch.save(train(rank, folder), folder / f"facts-{{rank}}.pt")
os._exit(0)
"""


class Devices:
    """One `torchrun` per device, as users with several devices have it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.program = folder, folder / "program.py"
        self.program.write_text(
            PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder))
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        path = os.pathsep.join([str(Path(dora.__file__).parent.parent), *sys.path])
        self._environment = {**os.environ, "PYTHONPATH": path}
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def torchrun(self, rank: int) -> list[str]:
        job = ["--nnodes", "3", "--nproc-per-node", "1", "--max-restarts", "0"]
        place = ["--master-addr", "127.0.0.1", "--master-port", str(self.port)]
        given = [*job, "--node-rank", str(rank), *place, str(self.program)]
        return [sys.executable, "-m", "torch.distributed.run", *given]

    def start(self, rank: int, command: list[str]) -> None:
        with (self.folder / f"log-{rank}").open("ab") as log:
            self.agents[rank] = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log
            )

    def join(self, rank: int, command: list[str]) -> None:
        place = ["--rank", str(rank), "--world-size", "3", "--host", "127.0.0.1"]
        join = ["join", *place, "--port", str(self.port), "--", *command]
        before = has_joined(self.folder, rank)
        self.start(rank, [sys.executable, "-m", "dora.cli", *join])
        wait_for(lambda: has_joined(self.folder, rank) != before, timeout_s=90)

    def kill_program(self, rank: int) -> None:
        os.kill(int((self.folder / f"pid-{rank}").read_text()), signal.SIGKILL)

    def kill(self, rank: int) -> None:
        """Ends a device, as if its plug were pulled."""
        self.agents[rank].kill()
        self.kill_program(rank)
        self.agents[rank].wait(10)

    def facts(self, rank: int) -> dict[str, Any]:
        return torch.load(self.folder / f"facts-{rank}.pt")


@contextmanager
def devices(folder: Path) -> Iterator[Devices]:
    found = Devices(folder)
    try:
        for rank in range(3):
            found.start(rank, found.torchrun(rank))
        yield found
    except BaseException:
        for rank in range(3):
            print(rank, (folder / f"log-{rank}").read_text()[-3000:])
        raise
    finally:
        for agent in found.agents.values():
            agent.terminate()  # it ends its program
        for agent in found.agents.values():
            agent.wait(40)


def test_device_comes_back_to_a_job_of_torchrun(folder):
    """Once by itself, and once with a torchrun, for which the others wait in the end."""
    with devices(folder) as job:
        wait_for(lambda: step_of(folder) >= 3, timeout_s=120)  # six processes import torch
        job.kill_program(1)
        assert job.agents[1].wait(60) != 0  # and the other agents stay
        step = step_of(folder)
        reach(folder, step + 3)
        job.join(1, [sys.executable, str(job.program)])
        reach(folder, step_of(folder) + 3)
        job.kill(1)
        step = step_of(folder)
        reach(folder, step + 3)
        job.join(1, job.torchrun(1))
        end(folder)
        assert [job.agents[rank].wait(60) for rank in range(3)] == [0, 0, 0]
        facts = [job.facts(rank) for rank in (0, 2, 1)]
    assert [kind for kind, *_ in facts[0]["events"] if kind != "switch"] == ["recovery", "join"] * 2
    check_as_uninterrupted(facts)
