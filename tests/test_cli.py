from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from plans import make_plan

from dora import cli, cli_bench
from dora.doctor import default_interface, examine
from dora.files import load, save
from dora.keys import load_key
from dora.profiler.energy import find_meters
from dora.spec import Cost, ModelProfile, Plan, Run, Span, Timeline

CLUSTER = """
[[network]]
name = "lan"
network = "eth_1g"

[[device]]
name = "laptop"
device = "macbook-air-m2-16gb"

[[device]]
name = "hub"
device = "rpi5-8gb"
"""
FACTORY = """
import torch
from torch import nn

def model():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.zeros(2, 8)

def broken():
    return 1 / 0

def wrong():
    return nn.Linear(8, 8)

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home.toml").write_text(CLUSTER)
    (tmp_path / "net.py").write_text(FACTORY)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> str:
    """Returns what `dora profile` has written, once for all tests."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "net.py").write_text(FACTORY)
    given = [f"{folder}/net.py:model", "--out", f"{folder}/p.json", "--device", "laptop"]
    assert cli.main(["profile", *given, "--sizes", "1,2"]) == 0
    return (folder / "p.json").read_text()


@pytest.fixture
def profile(measured, folder) -> str:
    (folder / "p.json").write_text(measured)
    return "p.json"


def fails(capsys, *arguments: str, code: int = 2) -> str:
    """Runs `dora`, which must print exactly one line on stderr; returns that line."""
    assert cli.main(arguments) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("dora: "), printed
    return printed


def test_bench_runs_a_benchmark_of_the_checkout(capfd, monkeypatch, tmp_path):
    assert "allowed: " in fails(capfd, "bench", "speed")
    (tmp_path / "bench_odd.py").write_text("import sys; print(sys.argv[1:]); sys.exit(1)")
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path)
    assert cli.main(["bench", "odd", "--quick", "--out", "x.csv"]) == 1
    assert capfd.readouterr().out == "['--quick', '--out', 'x.csv']\n"
    monkeypatch.setattr(cli_bench, "FOLDER", tmp_path / "none")
    assert "source checkout" in fails(capfd, "bench", "odd")


def test_devices_lists_the_catalogue(capsys):
    assert cli.main(["devices", "orin-nano"]) == 0
    printed = capsys.readouterr().out
    assert "jetson-orin-nano-8gb-25w" in printed
    assert "macbook" not in printed


def test_doctor_says_how_to_get_what_is_missing(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "gloo" in printed


def test_doctor_names_the_energy_meters():
    finding = {f.subject: f for f in examine({})}["energy meters"]
    meters = find_meters().meters
    assert finding.status == ("ok" if meters else "missing")
    expected = [meter.scope for meter in meters] or ["none: energy is modelled"]
    assert all(text in finding.text for text in expected)


def test_doctor_explains_the_network_interface(tmp_path):
    table = tmp_path / "route"
    table.write_text(
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        "eth0 00000000 0100A8C0 0003 0 0 600 00000000 0 0 0\n"
        "wlan0 00000000 0100A8C0 0003 0 0 100 00000000 0 0 0\n"
        "eth0 0000A8C0 00000000 0001 0 0 100 00FFFFFF 0 0 0\n"
    )
    assert default_interface(table) == "wlan0"
    assert default_interface(tmp_path / "none") is None
    named = {f.subject: f for f in examine({"GLOO_SOCKET_IFNAME": "nope0"})}["network"]
    assert named.status == "missing"
    assert "unset GLOO_SOCKET_IFNAME" in named.fix


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--peer", "hub", "--listen"], "given both"),
        (["--once"], "given without --listen"),
        (["29610"], "given without --listen"),
        (["--peer", "hub:x"], "allowed: HOST or HOST:PORT"),
        (["--listen", "70000"], "allowed: a free port"),
    ],
)
def test_doctor_refuses_what_makes_no_sense(arguments, expected, capsys, monkeypatch):
    monkeypatch.setenv("DORA_KEY", "0123456789abcdef")
    assert expected in fails(capsys, "doctor", *arguments)


def test_doctor_needs_a_key_for_peers(capsys, monkeypatch):
    monkeypatch.delenv("DORA_KEY", raising=False)
    monkeypatch.delenv("DORA_KEY_FILE", raising=False)
    assert "--key-file FILE" in fails(capsys, "doctor", "--peer", "hub")
    Path("short").write_text("too short")
    assert "allowed: 16 or more" in fails(capsys, "doctor", "--listen", "--key-file", "short")


def test_key_is_new_each_time(capsys):
    made = []
    for _ in range(2):
        assert cli.main(["key"]) == 0
        made.append(capsys.readouterr().out.strip())
    assert made[0] != made[1]
    assert all(len(key) >= 32 and key.isascii() and not key.count(" ") for key in made)


def test_key_file_is_private_and_kept(capsys):
    assert cli.main(["key", "--out", "job.key"]) == 0
    file, printed = Path("job.key"), capsys.readouterr().out
    first = file.read_text()
    assert first.strip() not in printed and "DORA_KEY_FILE=job.key" in printed
    assert file.stat().st_mode & 0o777 == 0o600
    assert "exists, allowed: a new file, or --force" in fails(capsys, "key", "--out", "job.key")
    assert file.read_text() == first
    file.chmod(0o644)
    assert cli.main(["key", "--out", "job.key", "--force"]) == 0
    assert file.read_text() != first
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_key(key_file=file) == file.read_bytes().strip()


def test_key_that_can_not_be_written_is_told(capsys):
    assert "none/job.key" in fails(capsys, "key", "--out", "none/job.key")


def test_profile_writes_what_plan_reads(profile, capsys):
    measured = load(ModelProfile, profile)
    assert [t.device for t in measured.blocks[0].costs[0].timings] == ["laptop"]
    assert cli.main(["plan", profile, "home.toml", "--batch", "4", "--out", "plan.json"]) == 0
    printed = capsys.readouterr().out
    assert "Best single device:" in printed
    assert "Times measured for laptop" in printed
    assert "Times modelled for hub" in printed
    assert load(Plan, "plan.json").devices == ("laptop", "hub")


def test_plan_as_json_holds_all_of_it(profile, capsys):
    assert cli.main(["plan", profile, "home.toml", "--infer", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["times"] == {"laptop": "measured", "hub": "modelled"}
    assert found["plans"][0]["cost"]["makespan_s"] > 0
    assert found["best_single"]["stages"]
    assert found["rejected"][0].keys() == {"candidate", "reason"}


def test_unreachable_qoe_shows_the_previews_and_exits_with_1(profile, capsys, folder):
    (folder / "qoe.toml").write_text("step_s = 1e-9\n")
    assert cli.main(["plan", profile, "home.toml", "--qoe", "qoe.toml", "--out", "n.json"]) == 1
    printed = capsys.readouterr()
    assert "Best single device:" in printed.out
    assert "step_s <= 1e-09" in printed.err
    assert not Path("n.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step_s = -1\n", ["qoe.toml", "step_s", "-1", "greater than 0"]),
        ("steps = 1\n", ["qoe.toml", "steps", "unknown field"]),
        ("step_s = \n", ["qoe.toml", "TOML"]),
        ("latency_s = 1\n", ["latency_s", "allowed: step_s"]),
        ("ttft_s = 1\n", ["ttft_s", "can not be judged"]),
    ],
)
def test_wrong_qoe_is_one_line(profile, capsys, folder, text, words):
    (folder / "qoe.toml").write_text(text)
    line = fails(capsys, "plan", profile, "home.toml", "--qoe", "qoe.toml")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "none.json", "home.toml"], ["none.json", "can not be read"]),
        (["plan", "net.py", "home.toml"], ["net.py"]),
        (["plan", "p.json", "none.toml"], ["none.toml", "can not be read"]),
        (["plan", "p.json", "home.toml", "--batch", "0"], ["batch_size", "0", "greater than"]),
        (["plan", "p.json", "home.toml", "--batch", "x"], ["--batch", "integer"]),
        (
            ["plan", "p.json", "home.toml", "--batch", "2", "--microbatches", "4"],
            ["num_microbatches", "given 4"],
        ),
        (["plan", "p.json", "home.toml", "--pick", "99", "--out", "q.json"], ["--pick", "99"]),
        (["plan", "p.json", "home.toml", "--also", "p.json"], ["laptop", "one profile per device"]),
        (["plan", "p.json"], ["CLUSTER.toml"]),
        (["plan", "p.json", "home.toml", "--out", "no/such\0/dir.json"], ["null"]),
        (["profile", "net.py", "--out", "q.json"], ["net.py", "allowed: path/to/file.py:function"]),
        (["profile", "no.py:f", "--out", "q.json"], ["no.py", "no file"]),
        (["profile", "no.such:f", "--out", "q.json"], ["no.such", "ModuleNotFoundError"]),
        (["profile", "net.py:none", "--out", "q.json"], ["none", "does not have"]),
        (["profile", "net.py:number", "--out", "q.json"], ["number"]),
        (["profile", "net.py:broken", "--out", "q.json"], ["ZeroDivisionError", "net.py:9"]),
        (["profile", "net.py:wrong", "--out", "q.json"], ["returned Linear", "(model, (x,))"]),
        (["profile", "net.py:model", "--out", "q.json", "--sizes", "1,a"], ["--sizes", "1,a"]),
        (["profile", "net.py:model", "--out", "q.json", "--sizes", "0"], ["microbatch_sizes"]),
        (["profile", "net.py:model", "--out", "p.json"], ["p.json", "exists", "--force"]),
        (["info", "none.json"], ["none.json"]),
        (["info", "net.py"], ["net.py", "Plan, ModelProfile"]),
        (["info", "."], ["results.json"]),
        (["devices", "jetsn"], ["jetsn", "jetson-nano-4gb"]),
        (["demo", "--out", "."], ["not empty", "--force"]),
        (["demo", "--steps", "1"], ["--steps", "2"]),
        (["demoo"], ["demoo"]),
        (["plan", "p.json", "home.toml", "--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bad_input_is_one_line(profile, capsys, folder, arguments, words):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    line = fails(capsys, *arguments)
    assert all(word in line for word in words), line
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_wrong_cluster_names_the_closest_device(profile, capsys, folder):
    (folder / "home.toml").write_text(CLUSTER.replace("rpi5-8gb", "rpi5"))
    line = fails(capsys, "plan", profile, "home.toml")
    assert "home.toml" in line
    assert "rpi5-8gb" in line


def test_force_overwrites(profile, capsys):
    arguments = ["plan", profile, "home.toml", "--out", "plan.json"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    assert "exists" in fails(capsys, *arguments)
    assert cli.main([*arguments, "--force"]) == 0


def test_info_shows_every_kind_of_file(profile, capsys):
    save(make_plan(3, [[1, 1], [1]], cost=Cost(makespan_s=0.5)), "plan.json")
    span = Span(rank=0, lane="compute", label="0F0", start_s=0, end_s=1)
    save(Timeline(source="measured", num_ranks=1, spans=(span,)), "timeline.json")
    shown = {
        "plan.json": "d0+d1[0-1] | d2[2-2] x4",
        "timeline.json": "rank 0 |000",
        profile: "laptop forward / backward",
        "home.toml": "laptop.up: ",
    }
    for name, words in shown.items():
        assert cli.main(["info", name]) == 0
        assert words in capsys.readouterr().out


def test_help_and_version_of_python_need_no_model(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "doctor", "devices", "profile", "plan", "info"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dora.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_process_ends_with_code_2_and_one_line():
    ended = run("plan", "none.json", "home.toml")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["command", "device"])
def test_broken_demo_leaves_no_process(victim):
    command = [sys.executable, "-m", "dora.cli", "demo", "--steps", "1000", "--out", "run"]
    with open("out.txt", "w") as out:
        demo = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
    while "training" not in Path("out.txt").read_text():
        assert demo.poll() is None
        time.sleep(0.1)
    family = psutil.Process(demo.pid).children(recursive=True)
    devices = [p for p in family if "dora.demo.worker" in p.cmdline()]
    if victim == "command":
        demo.send_signal(signal.SIGINT)
    else:
        devices[-1].kill()
    printed = demo.communicate(timeout=90)[1]
    assert demo.returncode == (130 if victim == "command" else 1)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    if victim == "device":
        assert "a device failed" in printed
        assert printed.count("\n") == 1


@pytest.mark.slow
def test_demo_runs_and_info_shows_it(capsys):
    assert cli.main(["demo", "--quick", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "step, predicted" in printed
    contenders = json.loads(Path("run/results.json").read_text())["contenders"]
    ours, *others = contenders.values()
    for other in others:
        count = len(other["losses"])
        assert other["losses"] == pytest.approx(ours["losses"][:count], abs=1e-3)
        assert other["energy_j"] > 0
    assert ours["losses"][-1] < ours["losses"][0]
    run = load(Run, "run/run.json")
    assert run.predicted is not None and run.activity is not None
    assert run.window_s is not None and len(run.times_s) == ours["steps"]
    assert json.loads(Path("run/trace.json").read_text())["traceEvents"]
    assert Path("run/report.html").stat().st_size > 10_000
    assert Path("run/checkpoint").is_dir()
    assert cli.main(["info", "run"]) == 0
    assert "ui.perfetto.dev" in capsys.readouterr().out
