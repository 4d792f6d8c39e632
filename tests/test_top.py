"""`dora top` and metrics: what a running job says of itself, and what is made of it."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from plans import make_plan
from ranks import outcomes, run_ranks
from rich.console import Console
from test_generation import build as build_lm
from torch import nn
from torch.nn import functional as F  # noqa: N812

from dora import DoraParallel, cli, top
from dora.errors import SpecError
from dora.files import load, save
from dora.live import watching
from dora.live.metrics import serve
from dora.live.recorder import BUCKETS_S, Recorder
from dora.live.relay import Relay
from dora.live.tokens import Tokens
from dora.runtime.turn import Call
from dora.spec import Cluster, Cost, Device, DeviceMemory, Link, Medium, QoE, Status

pytestmark = pytest.mark.timeout(60)

STEPS, BOUND_S, PREDICTED_S = 6, 100.0, 0.5
CLUSTER = Cluster(
    devices=tuple(
        Device(name=n, flops_per_s=1e10, mem_bandwidth_bytes_per_s=1e10, memory_bytes=10**9)
        for n in ("d0", "d1")
    ),
    media=(Medium(name="wifi", rate_bytes_per_s=1e9, latency_s=1e-4),),
    links=(
        Link(src="d0", dst="d1", media=("wifi", "wifi")),
        Link(src="d1", dst="d0", media=("wifi", "wifi")),
    ),
)
COST = Cost(
    makespan_s=PREDICTED_S,
    energy_j=1.0,
    memory=tuple(DeviceMemory(device=n, peak_bytes=3 * 10**8) for n in ("d0", "d1")),
)


def build(**options: Any) -> DoraParallel:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    plan = make_plan(4, ((1,), (1,)), cost=COST)
    return DoraParallel(module, plan, sample=torch.zeros(8, 8), timeout_s=10.0, **options)


def train(model: DoraParallel, steps: int = STEPS) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.step(torch.ones(8, 8), torch.zeros(8, 8), F.mse_loss)
        optimizer.step()


class Seen(NamedTuple):
    """What one rank saw while the job ran."""

    statuses: list[Status]
    pages: list[str]
    relayed: list[Status]
    frames: list[str]


def job(rank: int, folder: str, port: int) -> Seen | None:
    """Trains as the environment asks; rank 0 looks at both ranks before they end."""
    os.environ.update(DORA_STATUS=folder, DORA_METRICS_PORT=str(port))
    model = build()
    train(model)
    assert model.watch is not None
    model.watch.write()
    status = model.watch.now()
    assert status is not None
    relay = Relay(rank, f"machine {rank}")
    for turn in (1, 0, 1, 0):  # the first time they learn where the other one is
        if rank == turn:
            relayed = relay.exchange(status)
        dist.barrier()
    seen = look(Path(folder), port, relayed) if rank == 0 else None
    dist.barrier()
    model.close()
    return seen


def look(folder: Path, port: int, relayed: list[Status]) -> Seen:
    pages = []
    for rank in (0, 1):
        with urllib.request.urlopen(f"http://127.0.0.1:{port + rank}/metrics", timeout=10) as page:
            pages.append(page.read().decode())
    heard = top.hear(folder)
    frames = [shown(heard, width, cluster=CLUSTER) for width in (120, 60)]
    return Seen([one.status for one in heard], pages, relayed, frames)


def shown(heard: list[top.Heard], width: int, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False, markup=False)
    console.print(top.frame(heard, width=width, **options))
    return console.file.getvalue()


def two_ports() -> int:
    """Returns a port that is free, as is the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
                return port
            except (OSError, OverflowError):
                continue


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Seen]:
    folder = tmp_path_factory.mktemp("run")
    seen = run_ranks(2, job, str(folder / "status"), two_ports())[0]
    return folder, seen


def test_a_running_job_says_how_it_is_doing(run):
    _, seen = run
    assert [status.rank for status in seen.statuses] == [0, 1]
    for status in seen.statuses:
        assert (status.state, status.kind, status.num_calls) == ("idle", "train", STEPS)
        assert len(status.recent_s) == STEPS and min(status.recent_s) > 0
        assert status.predicted_s == PREDICTED_S and status.peak_bytes == 3 * 10**8
        assert status.members == (0, 1) and status.memory_bytes > 10**7
        assert 0 < status.shares.computing <= 1
        (link,) = status.links
        assert link.peer == 1 - status.rank and link.is_up
        assert link.sent_bytes > 0 and link.messages > 0


def test_an_ended_job_is_over(run, capsys):
    folder, _ = run
    heard = top.hear(folder)
    assert top.is_over(heard) and [one.status.state for one in heard] == ["over", "over"]
    assert cli.main(["top", str(folder)]) == 0  # ends, since the job has
    printed = capsys.readouterr().out
    assert "OVER, last heard" in printed and "2 of 2 devices" in printed


def test_metrics_are_what_the_rank_says(run):
    _, seen = run
    for status, page in zip(seen.statuses, seen.pages, strict=True):
        lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
        value = {name: float(text) for name, text in lines.items()}
        assert value["dora_step_seconds_count"] == STEPS
        assert value['dora_step_seconds_bucket{le="+Inf"}'] == STEPS
        assert value["dora_step_seconds_sum"] == pytest.approx(sum(status.recent_s), abs=1e-4)
        assert value["dora_predicted_step_seconds"] == PREDICTED_S
        assert value["dora_exposed_communication_seconds_total"] > 0
        assert value["dora_plan_switches_total"] == 0 and value["dora_up"] == 1
        peer = 1 - status.rank
        sent = value[f'dora_link_sent_bytes_total{{device="d{peer}",peer="{peer}"}}']
        assert sent >= status.links[0].sent_bytes


def test_statuses_of_other_machines_reach_the_lowest_rank(run):
    (status,) = run[1].relayed
    assert status.rank == 1 and status.num_calls == STEPS


@pytest.mark.parametrize("which", [0, 1])
def test_a_screen_fits_and_has_both_times(run, which):
    text, width = run[1].frames[which], (120, 60)[which]
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "500 ms predicted" in words and "measured" in words
    assert "training, 2 of 2 devices, step 6" in words
    for name in ("d0", "d1", "idle", "d0 to d1"):
        assert name in words
    assert f"{5e8 * 8e-6:.3g} Mbit/s" in words  # the medium is crossed twice


def test_a_bound_is_compared_with(run):
    heard = top.hear(run[0])
    assert "kept by 100%" in shown(heard, 120, bound_s=BOUND_S)
    assert "kept by 0%" in shown(heard, 120, bound_s=1e-9)
    assert "no bound is known" in shown(heard, 120)


def test_silence_is_said(run, tmp_path):
    """A rank that was heard of long ago, on a machine that can not be asked about its processes."""
    status = top.hear(run[0])[0].status
    update = {"host": "elsewhere", "state": "running", "in_call_s": 1.0, "members": (0,)}
    save(status.model_copy(update=update), tmp_path / "rank-0.json")
    assert "SILENT" not in shown(top.hear(tmp_path), 120)
    long_ago = time.time() - 50
    os.utime(tmp_path / "rank-0.json", (long_ago, long_ago))
    text = shown(top.hear(tmp_path), 120)
    assert "SILENT, last heard 5" in text and "lost" in text
    gone = {"host": socket.gethostname(), "process": 2**22 + 1}
    save(status.model_copy(update={**update, **gone}), tmp_path / "rank-0.json")
    assert top.is_over(top.hear(tmp_path))


def fails(capsys, *arguments: str) -> str:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("dora: "), printed
    return printed


def test_what_is_no_status_is_said_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DORA_STATUS", raising=False)
    assert "DORA_STATUS=FOLDER" in fails(capsys, "top", "--once")
    assert "no rank-N.json" in fails(capsys, "top", "nowhere", "--once")
    (tmp_path / "rank-0.json").write_text('{"schema": "Status/9"}')
    assert "'Status/9', allowed 'Status/1'" in fails(capsys, "top", ".", "--once")
    (tmp_path / "rank-0.json").write_text("half of")
    assert "rank-0.json" in fails(capsys, "top", "rank-0.json", "--once")


def outlive(rank: int, folder: str) -> str:
    """Rank 1 is killed between two steps; rank 0 goes on and says so."""
    model = build(snapshot_interval=1)
    watching(model, folder=folder, qoe=QoE(step_s=BOUND_S))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(4):
        if i == 2:
            model.snapshot()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        model.step(torch.ones(8, 8), torch.zeros(8, 8), F.mse_loss)
        optimizer.step()
    model.watch.write()
    text = shown(top.hear(Path(folder)), 120)
    model.close()
    return text


def test_a_lost_device_is_shown(tmp_path):
    text = outcomes(2, outlive, str(tmp_path))[0].value
    assert "1 of 2 devices" in text and "kept by 100%" in text
    (line,) = [line for line in text.splitlines() if line.split()[:2] == ["1", "d1"]]
    assert "lost" in line
    assert "recovery d1" in text


def break_down(rank: int, folder: str) -> None:
    watching(model := build(), folder=folder)
    if rank == 1:
        raise_in_forward(model)
    train(model)


def raise_in_forward(model: DoraParallel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    list(model.module.children())[-1].register_forward_pre_hook(fail)


def test_a_failure_is_shown(tmp_path):
    outcomes(2, break_down, str(tmp_path))
    heard = top.hear(tmp_path)
    assert [one.status.state for one in heard] == ["failed", "failed"]
    assert "out of luck" in shown(heard, 120)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SpecError, match=r"pip install 'dora-parallel\[metrics\]'"):
        serve(lambda: None, Recorder(QoE()), "127.0.0.1", 9400)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=f"127.0.0.1:{port}: .*, allowed: a free port"):
            serve(lambda: None, Recorder(QoE()), "127.0.0.1", port)


@given(st.lists(st.floats(0.0, 1000.0), max_size=150))
def test_calls_are_counted(durations):
    recorder = Recorder(QoE(step_s=1.0))
    for took_s in durations:
        recorder.began()
        spans = [("compute", "0F0", 0.0, took_s / 2), ("wait", "x", 0.0, took_s / 4)]
        recorder.ended(Call("train", 0.0, took_s), 1, spans)
    assert recorder.num_calls == len(durations) == sum(recorder.counts)
    assert recorder.num_late == sum(took_s > 1.0 for took_s in durations)
    for i, bound_s in enumerate(BUCKETS_S):
        assert sum(recorder.counts[: i + 1]) == sum(took_s <= bound_s for took_s in durations)
    assert recorder.computed_s == pytest.approx(sum(durations) / 2)
    assert recorder.waited_s == pytest.approx(sum(durations) / 4)


# ---------------------------------------------------------------- tokens

PROMPTS, LIMIT, PLACES = [[1, 2, 3]] * 5, 4, 2


def generate(rank: int, folder: str, port: int) -> tuple[list[Any], str, Status]:
    """Looks at both ranks in the middle of a call, and at the leader's metrics after it."""
    os.environ.update(DORA_STATUS=folder, DORA_METRICS_PORT=str(port))
    model, frames = build_lm("tiny", [[1], [1]], timeout_s=10.0), []

    def look_in(request: int, token: int) -> None:
        status = model.watch.write()
        frames.append((status, shown(top.hear(Path(folder)), 120)))

    model.generate(PROMPTS, LIMIT, max_in_flight=PLACES, on_token=look_in)
    model.watch.write()
    page = ""
    if rank == 0:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            page = answer.read().decode()
    dist.barrier()
    state = model.watch.now()
    model.close()
    return frames, page, state


def test_tokens_are_watched(tmp_path):
    num_tokens = len(PROMPTS) * LIMIT
    (frames, page, state), (others, _, other) = run_ranks(2, generate, str(tmp_path), two_ports())
    assert len(frames) == num_tokens and not others
    assert other.tokens is None and other.kind == state.kind == "generate"
    for i, (status, _) in enumerate(frames):
        assert (status.state, status.kind) == ("running", "generate")
        told = status.tokens
        assert told.num_tokens == i + 1 and told.tokens_per_s > 0
        assert told.in_flight <= PLACES
        assert told.in_flight + told.waiting + told.num_requests == len(PROMPTS)
        assert 0 < told.first_s[0] <= told.first_s[1]
    screen = " ".join(frames[-1][1].split())
    assert "generating, 2 of 2 devices" in screen and "per s; first after" in screen
    assert f"0 in flight; {len(PROMPTS)} ended, {num_tokens} tokens in all" in screen
    assert state.state == "idle" and state.tokens.in_flight == 0
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    value = {name: float(text) for name, text in lines.items()}
    assert value["dora_tokens_total"] == num_tokens
    assert value["dora_generated_requests_total"] == len(PROMPTS)
    assert value["dora_first_token_seconds_count"] == len(PROMPTS)
    assert value["dora_further_token_seconds_count"] == num_tokens - len(PROMPTS)
    assert value["dora_requests_in_flight"] == 0 < value["dora_tokens_per_second"]


@given(st.lists(st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=5), max_size=8))
def test_times_of_tokens_are_those_between_them(gaps):
    """Each request has a first time and further ones, whatever the others do meanwhile."""
    tokens, now_s = Tokens(), 0.0
    with tokens.call(3):
        for request, waits_s in enumerate(gaps):
            tokens.arrived(request, now_s)
            for i, wait_s in enumerate(waits_s):
                now_s += wait_s
                tokens.came(request, now_s, is_last=i + 1 == len(waits_s))
    assert tokens.first.total_s == pytest.approx(sum(waits_s[0] for waits_s in gaps))
    assert tokens.further.total_s == pytest.approx(sum(sum(waits_s[1:]) for waits_s in gaps))
    assert tokens.num_tokens == sum(map(len, gaps)) and tokens.num_requests == len(gaps)
    assert tokens.num_open == (0, 0)


def test_a_status_survives_its_file(run):
    folder, _ = run
    file = folder / "status" / "rank-0.json"
    status = load(Status, file)
    assert Status.from_json(status.to_json()) == status
