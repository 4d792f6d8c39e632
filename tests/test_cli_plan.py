"""`dora plan`, `dora simulate`, `dora compare`, and what they draw."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from dora import catalog, cli
from dora.errors import SpecError
from dora.files import save
from dora.report import gantt_figure, pareto_figure
from dora.spec import BoundaryCodec, Cost, Plan, Replica, Span, Stage, Timeline
from dora.views import describe, plan_lines

HOME = catalog.scenario("smart-home-1")
CELL = next(c for c in HOME.cells if c.model == "vit-base" and c.workload.kind == "train")
TOML = Path(catalog.__file__).parent / "scenarios" / "smart-home-1.toml"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home.toml").write_text(TOML.read_text())
    save(catalog.cell_profile(CELL, HOME.cluster), "vit.json")
    save(pipeline(), "plan.json")
    return tmp_path


def pipeline(**fields) -> Plan:
    ends = [(0, 6, "laptop"), (7, 13, "mini-pc")]
    stages = tuple(
        Stage(index=s, first_block=first, last_block=last, replicas=(Replica(device=name),))
        for s, (first, last, name) in enumerate(ends)
    )
    devices = tuple(device.name for device in HOME.cluster.devices)
    return Plan(**{"devices": devices, "stages": stages, "num_microbatches": 8, **fields})


def fails(capsys, *arguments: str) -> str:
    """Runs `dora`, which must print exactly one line on stderr; returns that line."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("dora: "), printed
    return printed.err


SIMULATE = ("simulate", "plan.json", "vit.json", "home.toml")


def simulated(capsys, *options: str) -> dict:
    assert cli.main([*SIMULATE, *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_simulate_shows_time_energy_memory_and_a_chart(capsys):
    assert cli.main(SIMULATE) == 0
    printed = capsys.readouterr().out
    assert "laptop[0-6] | mini-pc[7-13] x8, simulated" in printed
    assert "bubble ratio" in printed and "exposed communication" in printed
    assert "10 GB" in printed
    assert "rank 2 laptop  |0" in printed


def test_simulate_json_adds_up(capsys):
    found = simulated(capsys)
    assert found["energy_j"] == pytest.approx(sum(e["joules"] for e in found["energy"]))
    assert {m["device"] for m in found["memory"]} == {"laptop", "mini-pc"}
    assert 0 <= found["bubble_ratio"] < 1
    assert found["steps_s"] == [found["makespan_s"]]
    assert simulated(capsys, "--fair")["makespan_s"] >= found["makespan_s"] * (1 - 1e-9)


def test_simulate_plays_steps_on_the_clock_of_the_trace(capsys, folder):
    calm = simulated(capsys)["makespan_s"]
    rows = f"at_s,name,factor\n{2.5 * calm},laptop,0.5\n"
    (folder / "trace.csv").write_text(rows)
    steps = simulated(capsys, "--trace", "trace.csv", "--steps", "5")["steps_s"]
    assert steps[:2] == pytest.approx([calm, calm])
    assert calm < steps[2] < steps[3] == pytest.approx(steps[4])
    assert cli.main([*SIMULATE, "--steps", "3"]) == 0
    assert "3 steps: median" in capsys.readouterr().out


def test_simulate_writes_a_trace_for_perfetto(capsys):
    assert cli.main([*SIMULATE, "--trace-out", "trace.json"]) == 0
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    capsys.readouterr()
    assert "exists" in fails(capsys, *SIMULATE, "--trace-out", "trace.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", "none.json", "vit.json", "home.toml"], ["none.json", "can not be read"]),
        (["simulate", "vit.json", "vit.json", "home.toml"], ["vit.json", "Plan"]),
        (["simulate", "other.json", "vit.json", "home.toml"], ["other.json", "'d0'", "phone-a"]),
        (["simulate", "short.json", "vit.json", "home.toml"], ["given 3 blocks", "14"]),
        (["simulate", "mode.json", "vit.json", "home.toml"], ["no power mode 'turbo'"]),
        ([*SIMULATE, "--batch", "4"], ["num_microbatches", "8"]),
        ([*SIMULATE, "--kind", "x"], ["kind", "x"]),
        ([*SIMULATE, "--steps", "0"], ["--steps"]),
        ([*SIMULATE, "--source", "tv"], ["--source", "tv", "phone-a"]),
        ([*SIMULATE, "--trace", "bad.csv"], ["bad.csv line 2", "tv"]),
        ([*SIMULATE, "--trace", "gone.csv"], ["laptop"]),
        (["compare", "nowhere"], ["nowhere", "smart-home-1"]),
        (["compare", "smart-home-1", "--cell", "99"], ["--cell", "99", "0 to 14"]),
        (["compare", "smart-home-1", "--cell", "x"], ["--cell", "all"]),
        (["compare", "none.json", "home.toml"], ["none.json"]),
        (["plan", "vit.json", "home.toml", "--kind", "x"], ["kind", "x", "generate"]),
        (["plan", "vit.json", "home.toml", "--source", "tv"], ["--source", "tv"]),
    ],
)
def test_bad_input_is_one_line(capsys, folder, arguments, words):
    save(Plan(devices=("d0",), stages=(one("d0", 13),)), "other.json")
    save(pipeline(stages=(one("laptop", 2),)), "short.json")
    save(pipeline(stages=(one("laptop", 13, power_mode="turbo"),)), "mode.json")
    (folder / "bad.csv").write_text("at_s,name,factor\n0,tv,1\n")
    (folder / "gone.csv").write_text("at_s,name,factor\n0,laptop,0\n")
    line = fails(capsys, *arguments)
    assert all(word in line for word in words), line


def one(name: str, last: int, **fields) -> Stage:
    replica = Replica(device=name, **fields)
    return Stage(index=0, first_block=0, last_block=last, replicas=(replica,))


def test_compare_shows_every_planner_and_why_the_gain_is_small(capsys):
    assert cli.main(["compare", "smart-home-1", "--cell", "0", "--out", "found.csv"]) == 0
    printed = capsys.readouterr().out
    assert "smart-home-1 0: mobilenet-v2, infer" in printed
    assert "edgeshard-latency" in printed
    assert "why so little: one device is best" in printed
    with Path("found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [rows[0]["planner"], rows[-1]["planner"]] == ["dora", "single for objective"]
    assert {row["source"] for row in rows} == {"simulated"}


def test_compare_of_own_files_as_json(capsys):
    arguments = ["compare", "vit.json", "home.toml", "--batch", "8", "--source", "phone-a"]
    assert cli.main([*arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["gain"] >= 1 - 1e-9
    assert found["dora"]["plan"]["cost"]["makespan_s"] > 0
    assert len(found["rivals"]) == 12


def test_plan_takes_a_kind_and_says_how_good_it_is(capsys):
    arguments = ["plan", "vit.json", "home.toml", "--source", "phone-a"]
    assert cli.main([*arguments, "--kind", "infer", "--json"]) == 0
    by_kind = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, "--infer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_kind
    assert by_kind["plans"][0]["schedule_kind"] == "wavefront"
    assert cli.main([*arguments, "--kind", "infer"]) == 0
    printed = capsys.readouterr().out
    told = "Optimal: " if by_kind["is_optimal"] else f"Within {by_kind['gap']:.0%} of the bound"
    assert told in printed


def test_info_says_what_a_plan_leaves_out_and_its_token_times(capsys):
    cost = Cost(makespan_s=2, ttft_s=1, tpot_s=0.25, interval_s=0.5)
    save(pipeline(cost=cost), "priced.json")
    assert cli.main(["info", "priced.json"]) == 0
    printed = capsys.readouterr().out
    assert "First token 1 s, then 250 ms each." in printed
    assert "one every 500 ms" in printed
    assert "Leaves out phone-a, phone-b." in printed


def test_plan_for_generation_has_token_times(capsys):
    cell = next(c for c in HOME.cells if c.workload.kind == "generate")
    save(catalog.cell_profile(cell, HOME.cluster), "qwen.json")
    arguments = ["--kind", "generate", "--prompt-tokens", "64", "--new-tokens", "4", "--json"]
    assert cli.main(["plan", "qwen.json", "home.toml", *arguments]) == 0
    cost = json.loads(capsys.readouterr().out)["plans"][0]["cost"]
    assert cost["ttft_s"] + 3 * cost["tpot_s"] == pytest.approx(cost["makespan_s"])


def test_plan_bounds_the_percentile_of_the_qoe_file(capsys, folder):
    times = []
    for percentile in (50, 95):
        (folder / "qoe.toml").write_text(f"percentile = {percentile}\n")
        arguments = ["plan", "vit.json", "home.toml", "--qoe", "qoe.toml", "--batch", "4"]
        assert cli.main([*arguments, "--json"]) == 0
        times.append(json.loads(capsys.readouterr().out)["plans"][0]["cost"]["makespan_s"])
    assert times[0] <= times[1]


def test_description_names_modes_codecs_and_uneven_shares():
    plan = pipeline(
        stages=(
            one("laptop", 6, power_mode="15w"),
            Stage(
                index=1, first_block=7, last_block=13,
                replicas=(
                    Replica(device="phone-a", share=0.25), Replica(device="mini-pc", share=0.75),
                ),
            ),
        ),
        codecs=(BoundaryCodec(forward="int8"),),
    )  # fmt: skip
    assert describe(plan) == "laptop@15w[0-6] |int8/none| phone-a(25%)+mini-pc(75%)[7-13] x8"
    forward = plan.model_copy(update={"schedule_kind": "wavefront"})
    assert " |int8| " in describe(forward)
    assert describe(pipeline(codecs=(BoundaryCodec(),))) == "laptop[0-6] | mini-pc[7-13] x8"
    sums = {"gradient_codecs": ("int8", "int4"), "max_accuracy_loss": 0.03}
    summed = plan.model_copy(update=sums)
    assert describe(summed).endswith(" phone-a(25%)+mini-pc(75%)[7-13] sum int4 x8")
    assert "int8" not in describe(summed.model_copy(update={"codecs": ()})), "one device sums none"
    assert describe(forward.model_copy(update=sums)) == describe(forward)
    assert any("0.03" in line for line in plan_lines(summed))


def test_figures_need_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "dora-parallel[report]" in fails(capsys, *SIMULATE, "--figure", "step.svg", "--json")
    with pytest.raises(SpecError, match=r"dora-parallel\[report\]"):
        pareto_figure([])


def test_gantt_has_a_row_for_each_device_and_medium_in_use():
    pytest.importorskip("matplotlib")
    labels = [(2, "compute", "0F0"), (2, "network", "0SEND_F0"), (0, "network", "input 0")]
    spans = tuple(
        Span(rank=rank, lane=lane, label=label, start_s=i, end_s=i + 1)
        for i, (rank, lane, label) in enumerate([*labels, (3, "compute", "1F0")])
    )
    timeline = Timeline(source="predicted", num_ranks=4, spans=spans)
    axes = gantt_figure(timeline, pipeline(), HOME.cluster).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["laptop", "mini-pc", "wifi"]


def test_figures_are_written(capsys):
    pytest.importorskip("matplotlib")
    assert cli.main([*SIMULATE, "--figure", "step.svg"]) == 0
    assert cli.main(["plan", "vit.json", "home.toml", "--figure", "front.svg"]) == 0
    assert all("<svg" in Path(name).read_text() for name in ("step.svg", "front.svg"))
    capsys.readouterr()
    assert "exists" in fails(capsys, *SIMULATE, "--figure", "step.svg")
    assert "foo" in cli_error(capsys, *SIMULATE, "--figure", "step.foo")


def cli_error(capsys, *arguments: str) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


def test_pareto_front_shows_every_plan():
    pytest.importorskip("matplotlib")
    plans = [pipeline(cost=Cost(makespan_s=1 + i, energy_j=3 - i)) for i in range(2)]
    axes = pareto_figure(plans, plans[1]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "2"]


def test_ctrl_c_says_stopped_and_leaves_no_file():
    command = [sys.executable, "-m", "dora.cli", "compare", "smart-home-1", "--out", "all.csv"]
    # A shell's background jobs ignore Ctrl-C, and so would their children.
    default = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, default)
    assert running.stdout is not None
    running.stdout.readline()  # the first cell is done, the others are not
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors.splitlines()[-1] == "dora: stopped"
    assert not Path("all.csv").exists()
