"""The testbed without root: what programs on it see, what happens to devices, and what is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dora.errors import SpecError
from dora.files import load
from dora.spec import Activity, Cluster, Device, Link, Medium
from dora.testbed import (
    Event,
    Job,
    Testbed,
    TestbedError,
    rank_environment,
    remove_left_over,
    why_not,
)

pytestmark = pytest.mark.timeout(100)
WAIT_S = 40.0
MB = 1_000_000
RATE = 8.0 * MB
ROOT = Path(__file__).parent.parent
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

# A program that joins by Dora's engine, tells each other "hello", and then does what is given.
JOIN = f"""
import os, time, torch
import torch.distributed as dist
from dora.runtime.communicator import Communicator
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, rank == 0)
one = Communicator.create(store, rank, size, timeout_s={WAIT_S})
everyone = list(range(size))
one.barrier(everyone).wait({WAIT_S})
"""
LEAVE = f"one.barrier(everyone).wait({WAIT_S})\none.close()\n"
SUM = f"""
start_s = time.monotonic()
tensor = torch.full(({MB // 4},), float(rank))
one.all_reduce(tensor, everyone).wait({WAIT_S})
print(f"sum {{tensor[0]:g}} in {{time.monotonic() - start_s}} s")
"""
SPIN = "while True: pass"


def cluster_of(num_devices: int = 3, rate: float = RATE) -> Cluster:
    """Equal devices on one medium, which the testbed gives equal shares of this machine."""
    names = [f"d{i}" for i in range(num_devices)]
    return Cluster(
        devices=tuple(
            Device(
                name=name,
                flops_per_s=5e10,
                efficiency=1.0,
                mem_bandwidth_bytes_per_s=1e9,
                memory_bytes=1 << 30,
            )
            for name in names
        ),
        media=(Medium(name="air", rate_bytes_per_s=rate),),
        links=tuple(Link(src=a, dst=b, media=("air",)) for a in names for b in names if a != b),
    )


def testbed_of(num_devices: int = 3) -> Testbed:
    return Testbed(cluster_of(num_devices), mode="buckets")


testbed_of.__test__ = False  # type: ignore[attr-defined]


def job_of(testbed: Testbed, text: str, events: tuple[Event, ...] = ()) -> Job:
    command = [sys.executable, "-c", text]
    return Job(testbed, command, os.environ, events=events, limit_s=2 * WAIT_S)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_over(pid: int) -> bool:
    """Tells whether a process has ended; who has nobody to wait for it counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def spawn(testbed: Testbed, device: int, text: str, **options: Any) -> subprocess.Popen[Any]:
    environment = {**os.environ, **rank_environment(testbed, device)}
    return testbed.spawn(device, [sys.executable, "-c", text], environment, **options)


# ------------------------------------------------------------ programs


def test_traffic_of_the_engine_takes_its_time_and_is_counted():
    with testbed_of() as testbed:
        job = job_of(testbed, JOIN + SUM + LEAVE)
        lines = list(job.lines())
        assert job.problem == "" and job.has_begun
        activity, rate = testbed.activity(), testbed.cluster.media[0].rate_bytes_per_s
    found = [re.fullmatch(r"sum 3 in (.*) s", line) for _, line in lines]
    assert len(found) == 3
    # Every byte but a third leaves its device twice in a ring of three.
    assert all(match and float(match[1]) >= 3 * 4 / 3 * MB / rate * 0.95 for match in found)
    (air,) = activity.traffic
    assert air.carried_bytes[-1] == sum(usage.sent_bytes for usage in activity.usage) >= 4 * MB
    assert all(usage.busy_s > 0 and usage.peak_bytes > 10 * MB for usage in activity.usage)


@pytest.mark.slow
def test_two_testbeds_do_not_see_each_other():
    with testbed_of(2) as a, testbed_of(2) as b:
        jobs = [job_of(testbed, JOIN + SUM + LEAVE) for testbed in (a, b)]
        with ThreadPoolExecutor() as pool:
            rows = list(pool.map(lambda job: list(job.lines()), jobs))
        assert [job.problem for job in jobs] == ["", ""]
        assert [[line[:5] for _, line in lines] for lines in rows] == [["sum 1"] * 2] * 2
        for testbed in (a, b):
            assert testbed.activity().traffic[0].carried_bytes[-1] == 2 * MB


def test_device_computes_at_its_share():
    with testbed_of(2) as testbed:
        process = spawn(testbed, 0, SPIN)
        testbed.limit()
        until(lambda: testbed.activity().usage[0].busy_s > 0)
        time.sleep(0.5)  # it may have run freely before
        begin_s = time.monotonic()
        time.sleep(1.5)
        usage = testbed.activity((begin_s, time.monotonic())).usage
        assert 0 < usage[0].busy_s <= usage[0].total_s
        assert usage[1].busy_s == 0
        process.kill()
        process.wait()
        assert testbed.activity().usage[0].busy_s > 0, "what was counted is kept"


# ------------------------------------------------------------ what happens to devices


@pytest.mark.slow
def test_killed_device_starts_again():
    text = JOIN + "print('joined')\n" + SPIN
    with testbed_of(2) as testbed:
        events = tuple(Event(1.0 + i, "kill", f"d{i}") for i in range(2))
        job = job_of(testbed, "import os\nprint(os.getpid())\n" + text, events)
        lines = list(job.lines())
        assert job.problem == "", "killed as asked for"
    assert [line for _, line in lines].count("joined") == 2
    pids = [int(line) for _, line in lines if line.isdecimal()]
    assert len(pids) == 2 and all(map(is_over, pids))


def test_paused_device_does_nothing_until_it_is_resumed():
    with testbed_of(2) as testbed:
        process = spawn(testbed, 0, SPIN)
        testbed.set_speed("d0", 0.0)
        until(lambda: is_stopped(process.pid))
        time.sleep(0.3)
        begin_s = time.monotonic()
        time.sleep(0.5)
        assert testbed.activity((begin_s, time.monotonic())).usage[0].busy_s < 0.01
        testbed.limit()
        time.sleep(0.1)
        assert is_stopped(process.pid)
        testbed.lift()
        again = spawn(testbed, 0, SPIN)
        until(lambda: is_stopped(again.pid))
        testbed.set_speed("d0", 1.0)
        until(lambda: not is_stopped(process.pid) and not is_stopped(again.pid))


@pytest.mark.slow
def test_disconnected_device_gets_nothing_until_it_is_back():
    wait = "time.sleep(1.5)\n"
    with testbed_of(2) as testbed:
        events = (Event(0.0, "disconnect", "d1"), Event(4.0, "connect", "d1"))
        job = job_of(testbed, JOIN + wait + SUM + LEAVE, events)
        lines = list(job.lines())
        assert job.problem == ""
    found = [re.fullmatch(r"sum 1 in (.*) s", line) for _, line in lines]
    assert all(match and float(match[1]) > 4.0 - 1.5 - 1.0 for match in found)


def test_kill_reaches_what_a_program_has_started():
    text = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {SPIN!r}], start_new_session=True)\n"
        "print(p.pid, flush=True)\ntime.sleep(1000)"
    )
    with testbed_of(2) as testbed:
        processes = [spawn(testbed, i, text, stdout=subprocess.PIPE) for i in range(2)]
        pids = [int(process.stdout.readline()) for process in processes]
        testbed.kill("d0")
        assert processes[0].wait(WAIT_S) == -signal.SIGKILL
        until(lambda: is_over(pids[0]))
        assert not is_over(pids[1])
    assert is_over(pids[1])
    for process in processes:
        process.stdout.close()


def test_nothing_limits_memory():
    with testbed_of(2) as testbed:
        assert not testbed.out_of_memory(0)
        assert not testbed.has_delay


# ------------------------------------------------------------ modes


def test_unknown_mode_is_refused():
    with pytest.raises(SpecError, match="mode: given 'other', allowed: namespaces or buckets"):
        Testbed(cluster_of(), mode="other")


def test_mode_follows_the_machine():
    mode = Testbed(cluster_of()).mode
    assert mode == ("buckets" if why_not() else "namespaces")
    if why_not():
        with pytest.raises(TestbedError, match="needs"):
            Testbed(cluster_of(), mode="namespaces")


# ------------------------------------------------------------ nothing is left

HOLD = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_testbed_buckets import spawn, testbed_of
with testbed_of(2) as testbed:
    text = (
        "import subprocess, sys\\n"
        "p = subprocess.Popen([sys.executable, '-c', {SPIN!r}], start_new_session=True)\\n"
        "print(p.pid, flush=True)\\n"
        "{SPIN}"
    )
    processes = [spawn(testbed, i, text, stdout=subprocess.PIPE) for i in range(2)]
    grandchildren = [int(p.stdout.readline()) for p in processes]
    testbed.set_speed("d0", 0.0)
    testbed.limit()
    print(*(p.pid for p in processes), *grandchildren, flush=True)
    time.sleep(1000)
"""


@contextmanager
def held() -> Iterator[tuple[subprocess.Popen[str], list[int], set[int]]]:
    """A testbed in another process, whose device d0 is stopped: the process, pids, all below."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 4
        until(lambda: is_stopped(pids[0]))
        children = psutil.Process(process.pid).children(recursive=True)
        yield process, pids, {child.pid for child in children}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_nothing_is_left_of_a_testbed_that_ends(number):
    with held() as (process, pids, below):
        process.send_signal(number)
        process.wait(WAIT_S)
        spawned, started = pids[:2], set(pids[2:])
        until(lambda: all(map(is_over, below - started)) and all(map(is_over, spawned)))
        if number == signal.SIGKILL:  # nobody was there to end what programs had started
            assert not any(map(is_over, started))
            remove_left_over()
        assert all(map(is_over, started))


@pytest.mark.slow
def test_what_is_in_use_is_not_left_over():
    with held() as (_, pids, below):
        remove_left_over()
        assert not any(map(is_over, {*pids, *below}))


# ------------------------------------------------------------ dora testbed

TRAIN = """
import torch
import torch.distributed as dist
from torch import nn
from dora import DoraParallel
from dora.spec import Cluster, Workload
from dora.files import load
import sys
from pathlib import Path
from dora.search import planned
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
x = torch.rand(12, 64)
plan = planned(load(Cluster, Path(sys.argv[1])), Workload(batch_size=12))
parallel = DoraParallel(model, plan, sample=x)
for _ in range(3):
    parallel.step(x, x, nn.functional.mse_loss)
print("trained", flush=True)
dist.destroy_process_group()
"""


def home_of(folder: Path) -> Path:
    """A cluster file with three devices on one Wi-Fi."""
    home = folder / "home.toml"
    parts = ['name = "home"', '[[network]]\nname = "wifi"\nnetwork = "wifi6_80_2ss"']
    for name, kind in (
        ("phone", "iphone-15-pro"),
        ("laptop", "macbook-air-m2-16gb"),
        ("mini-pc", "minipc-8845hs-780m-32gb"),
    ):
        parts.append(f'[[device]]\nname = "{name}"\ndevice = "{kind}"\nnetwork = "wifi"')
    home.write_text("\n".join(parts))
    return home


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """A folder that everybody may write to, outside those that only its maker may enter."""
    folder = Path("/tmp") / f"dora-test-{os.getpid()}-{path.name}"
    folder.mkdir()
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def command_of(python: str, folder: Path, text: str) -> list[str]:
    program = folder / "program.py"
    program.write_text(text)
    dora = "import sys; from dora.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--mode", "buckets", "--out", str(folder / "run")]
    testbed = ["testbed", str(home_of(folder)), *options, "--", str(program), "{cluster}"]
    return [python, "-c", dora, *testbed]


def environment_of(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    return {**os.environ, "HOME": str(folder), "PYTHONPATH": path}


def unprivileged_python(folder: Path) -> tuple[list[str], str]:
    """What runs a command as somebody who is not root, and a Python that has Dora there, or skips.

    This Python may lie where only root can start it; one of the same version will do.
    """
    if os.geteuid() != 0:
        return [], sys.executable
    text = "import subprocess as s, sys; s.run([sys.executable, '-c', 'import dora'], check=True)"
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        trial = [*NOBODY, python, "-c", text]
        options = {"cwd": folder, "env": environment_of(folder), "timeout": 60}
        if subprocess.run(trial, capture_output=True, check=False, **options).returncode == 0:
            return NOBODY, python
    pytest.skip("no Python that another user can start has Dora")


@pytest.mark.slow
def test_program_trains_without_root(tmp_path):
    with shared_folder(tmp_path) as folder:
        somebody, python = unprivileged_python(folder)
        done = subprocess.run(
            [*somebody, *command_of(python, folder, TRAIN)],
            cwd=folder,
            env=environment_of(folder),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(line for line in done.stdout.splitlines() if "trained" in line) == [
            f"[{name}] trained" for name in ("laptop", "mini-pc", "phone")
        ]
        assert "only traffic of Dora's engine is slowed" in done.stderr.splitlines()[0]
        activity = load(Activity, folder / "run" / "activity.json")
        assert sum(usage.sent_bytes for usage in activity.usage) > 0


def test_stopped_by_ctrl_c(tmp_path):
    text = "import time\nprint('ready')\ntime.sleep(1000)"
    process = subprocess.Popen(
        command_of(sys.executable, tmp_path, text),
        cwd=tmp_path,
        env=environment_of(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert any("ready" in line for line in process.stdout)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert all(is_over(child.pid) for child in children)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_tells_when_devices_were_never_on_the_network():
    with testbed_of(2) as testbed:
        job = job_of(testbed, "print('done')")
        assert [line for _, line in job.lines()] == ["done", "done"]
        assert not job.has_begun and job.problem == ""
