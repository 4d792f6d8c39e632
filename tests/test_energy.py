from __future__ import annotations

import os
import tempfile
import threading
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F  # noqa: N812

from dora import DoraParallel, planned
from dora.files import load
from dora.profiler.energy import EnergyMeter, find_meters
from dora.profiler.meters import Meter, nvml_meters
from dora.report.page import page
from dora.spec import Activity, Cluster, Device, Link, Medium, Run, Usage, Workload
from dora.testbed.energy import modelled_energy

RAPL = "sys/class/powercap"
BATTERY = "sys/class/power_supply/BAT0"
RANGE_UJ = 262143328850  # of package-0 on many Intel processors


def write(root: Path, folder: str, **files: object) -> Path:
    """Fills a folder below `root`, as the kernel shows it: one line a file."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / folder / name).write_text(f"{content}\n")
    return root / folder


def zone(root: Path, name: str, kind: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
    folder = f"{RAPL}/{name}"
    return write(root, folder, name=kind, energy_uj=energy_uj, max_energy_range_uj=range_uj)


def scopes(root: Path) -> list[str]:
    return [meter.scope for meter in find_meters(root).meters]


def window(root: Path, *changes: tuple[Path, object], seconds: float = 1.0):
    """Measures while each change is written to a file, `seconds` after the one before."""
    now = [0.0]
    meter = EnergyMeter("box", find_meters(root).meters, is_sampled=False, clock=lambda: now[0])
    meter.begin()
    for file, content in changes:
        file.write_text(f"{content}\n")
        now[0] += seconds
        meter.sample()
    return meter.end(), meter


def test_bare_machine_has_no_meters(tmp_path):
    assert find_meters(tmp_path) == ((), ())
    energy, meter = window(tmp_path)
    assert (energy.device, energy.joules, energy.provenance) == ("box", 0, "none")
    assert meter.scope == ""


def test_rapl_adds_packages_and_memory_but_not_their_parts(tmp_path):
    for p in (0, 1):
        package = zone(tmp_path, f"intel-rapl:{p}", f"package-{p}", 1000)
        zone(tmp_path, f"intel-rapl:{p}:0", "core", 1000)
        memory = zone(tmp_path, f"intel-rapl:{p}:1", "dram", 1000)
    psys = zone(tmp_path, "intel-rapl:2", "psys", 1000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1000)
    write(tmp_path, f"{RAPL}/intel-rapl", enabled=1)
    assert scopes(tmp_path) == [
        "CPU package-0 (RAPL)",
        "memory of package-0 (RAPL)",
        "CPU package-1 (RAPL)",
        "memory of package-1 (RAPL)",
    ]
    changes = [(f / "energy_uj", 5_001_000) for f in (package, memory, psys)]
    energy, _ = window(tmp_path, *changes)
    assert energy.joules == pytest.approx(10)
    assert energy.provenance == "measured"


@given(
    start_uj=st.integers(0, RANGE_UJ - 1),
    taken_uj=st.lists(st.integers(0, RANGE_UJ - 1), max_size=6),
)
def test_rapl_counts_through_the_end_of_its_range(start_uj, taken_uj):
    with tempfile.TemporaryDirectory() as folder:
        counter = zone(Path(folder), "intel-rapl:0", "package-0", start_uj) / "energy_uj"
        seen = list(accumulate(taken_uj, lambda at, uj: (at + uj) % RANGE_UJ, initial=start_uj))
        energy, _ = window(Path(folder), *((counter, uj) for uj in seen[1:]))
    assert energy.joules == pytest.approx(sum(taken_uj) * 1e-6, abs=1e-3)


@contextmanager
def unprivileged():
    """Is some user other than root, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("can not become another user here")
    try:
        yield
    finally:
        os.seteuid(0)


def test_rapl_says_how_to_get_permission():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)  # pytest's own are root's alone
        (zone(root, "intel-rapl:0", "package-0", 7) / "energy_uj").chmod(0)
        (zone(root, "intel-rapl:0:0", "dram", 7) / "energy_uj").chmod(0)
        with unprivileged():
            meters, problems = find_meters(root)
    assert meters == ()
    assert len(problems) == 1
    assert problems[0].startswith("CPU package-0 (RAPL), memory of package-0 (RAPL): permission")
    assert "sudo chmod a+r /sys/class/powercap/" in problems[0]


def test_rapl_without_a_counter_is_no_meter(tmp_path):
    (zone(tmp_path, "intel-rapl:0", "package-0", 7) / "energy_uj").unlink()
    zone(tmp_path, "intel-rapl:1", "package-1", 7)
    assert scopes(tmp_path) == ["CPU package-1 (RAPL)"]


def jetson(root: Path, name: str, **rails: tuple[int, int]) -> Path:
    """Adds an INA3221 with these rails (mV, mA), as its driver shows it."""
    files: dict[str, object] = {"name": "ina3221"}
    for i, (label, (mv, ma)) in enumerate(rails.items(), 1):
        files |= {f"in{i}_label": label, f"in{i}_input": mv, f"curr{i}_input": ma}
    files |= {"in4_input": 40, "in7_label": "sum of shunt voltages", "in7_input": 99}
    return write(root, f"sys/class/hwmon/{name}", **files)


def test_input_rail_of_a_jetson_stands_for_the_rest(tmp_path):
    jetson(tmp_path, "hwmon3", VDD_IN=(5000, 1000), VDD_CPU_GPU_CV=(5000, 600), VDD_SOC=(5000, 200))
    write(tmp_path, "sys/class/hwmon/hwmon0", name="nvme", in1_input=1, curr1_input=1)
    zone(tmp_path, "intel-rapl:0", "package-0", 7)
    energy, meter = window(tmp_path, seconds=1)
    assert meter.scope == "whole module (INA VDD_IN)"
    assert energy.provenance == "measured"


def test_samples_are_integrated_by_trapezoids(tmp_path):
    amps = jetson(tmp_path, "hwmon3", VDD_IN=(5000, 1000)) / "curr1_input"
    # 5 W to 10 W, 10 W to 10 W, 10 W to 0 W, two seconds each.
    energy, _ = window(tmp_path, (amps, 2000), (amps, 2000), (amps, 0), seconds=2)
    assert energy.joules == pytest.approx(15 + 20 + 10)


def test_agx_orin_counts_no_rail_twice(tmp_path):
    jetson(
        tmp_path,
        "hwmon3",
        VDD_GPU_SOC=(20000, 200),
        VDD_CPU_CV=(20000, 100),
        VIN_SYS_5V0=(5000, 800),
    )
    # The memory's rail hangs on the 5 V rail; the channels beside it are not connected.
    second = jetson(tmp_path, "hwmon4", NC=(0, 0), VDDQ_VDD2_1V8AO=(5000, 300))
    (second / "in1_input").unlink()
    (meter,) = find_meters(tmp_path).meters
    assert meter.scope == "whole module (INA VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0)"
    assert meter.read() == pytest.approx(4 + 2 + 4)


def test_jetpack_4_shows_milliwatts(tmp_path):
    folder = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    write(tmp_path, folder, rail_name_0="POM_5V_IN", in_power0_input=3210)
    write(tmp_path, folder, rail_name_1="POM_5V_GPU", in_power1_input=210)
    (meter,) = find_meters(tmp_path).meters
    assert meter.scope == "whole board (INA POM_5V_IN)"
    assert meter.read() == pytest.approx(3.21)


def test_single_monitor_is_taken_for_the_supply(tmp_path):
    # in0 is the voltage over its shunt.
    files = {"name": "ina219", "in0_input": 12, "in1_input": 5100, "curr1_input": 1200}
    write(tmp_path, "sys/class/hwmon/hwmon1", **files)
    (meter,) = find_meters(tmp_path).meters
    assert meter.read() == pytest.approx(6.12)
    # A second one may measure a part of the same.
    write(tmp_path, "sys/class/hwmon/hwmon2", **files)
    meters, problems = find_meters(tmp_path)
    assert meters == ()
    assert "unknown which cover the board" in problems[0]


def test_battery_covers_the_machine_while_it_discharges(tmp_path):
    files = {"type": "Battery", "present": 1, "status": "Discharging", "power_now": 9_500_000}
    battery = write(tmp_path, BATTERY, **files)
    mouse = {"type": "Battery", "scope": "Device", "status": "Discharging", "power_now": 1}
    write(tmp_path, "sys/class/power_supply/hidpp_battery_0", **mouse)
    write(tmp_path, "sys/class/power_supply/AC", type="Mains", online=0)
    zone(tmp_path, "intel-rapl:0", "package-0", 7)
    assert scopes(tmp_path) == ["whole machine (battery BAT0)"]
    energy, _ = window(tmp_path, (battery / "power_now", 10_500_000), seconds=10)
    assert energy.joules == pytest.approx(100)
    # Plugged in during the window: nobody knows what the machine took.
    energy, meter = window(tmp_path, (battery / "status", "Charging"))
    assert energy.provenance == "none"
    assert "while it runs on battery" in meter.trouble
    meters, problems = find_meters(tmp_path)
    assert [m.scope for m in meters] == ["CPU package-0 (RAPL)"]
    assert "battery BAT0" in problems[0]


@pytest.mark.parametrize("current_ua", [1_500_000, -1_500_000])
def test_battery_of_a_phone_shows_current_and_voltage(tmp_path, current_ua):
    files = {"type": "Battery", "status": "Discharging", "voltage_now": 4_000_000}
    write(tmp_path, "sys/class/power_supply/battery", current_now=current_ua, **files)
    (meter,) = find_meters(tmp_path).meters
    assert meter.read() == pytest.approx(6)


def test_two_batteries_add_up_by_what_they_hold(tmp_path):
    files = {"type": "Battery", "present": 1, "energy_now": 20_000_000}
    first = write(tmp_path, BATTERY, status="Discharging", **files)
    write(tmp_path, "sys/class/power_supply/BAT1", status="Not charging", **files)
    energy, meter = window(tmp_path, (first / "energy_now", 19_000_000))
    assert energy.joules == pytest.approx(3600)  # 1 Wh
    assert meter.scope == "whole machine (battery BAT0, BAT1)"


def test_a_stretch_of_a_window_has_its_share():
    """Between samples the joules are interpolated; before the window nothing is known."""
    now = [0.0]
    supply = Meter("bench supply", "counter", lambda: 7 * now[0])
    meter = EnergyMeter("box", [supply], is_sampled=False, clock=lambda: now[0])
    assert meter.between(0.0, 1.0).provenance == "none"
    meter.begin()
    for second in range(1, 30_001):  # more samples than are kept
        now[0] = float(second)
        meter.sample()
    energy = meter.between(10_000.25, 20_000.5)
    assert (energy.joules, energy.provenance) == (pytest.approx(70_001.75), "measured")
    assert meter.between(-1.0, 5.0).provenance == "none"
    assert meter.end().joules == pytest.approx(210_000)


class NvmlError(Exception):
    pass


def recorded_nvml(**calls):
    """NVML as two GPUs answered; a value that is an exception is raised."""

    def answers(values):
        def call(handle):
            if isinstance(values[handle], Exception):
                raise values[handle]
            return values[handle]

        return call

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda handle: ("NVIDIA H100", "Tesla P4")[handle],
        nvmlDeviceGetTotalEnergyConsumption=answers(calls["energy_mj"]),
        nvmlDeviceGetPowerUsage=answers(calls["power_mw"]),
    )


def test_gpu_counts_energy_or_else_shows_power():
    energy_mj = [5_000_000, NvmlError("Not Supported")]
    power_mw = [70_000, 6_500]
    meters, problems = nvml_meters(recorded_nvml(energy_mj=energy_mj, power_mw=power_mw))
    assert problems == ()
    assert [(m.scope, m.kind) for m in meters] == [
        ("GPU 0 NVIDIA H100 (NVML)", "counter"),
        ("GPU 1 Tesla P4 (NVML power)", "gauge"),
    ]
    now = [0.0]
    meter = EnergyMeter("box", meters, is_sampled=False, clock=lambda: now[0])
    meter.begin()
    energy_mj[0], power_mw[1], now[0] = 5_090_000, 7_500, 2.0
    assert meter.end().joules == pytest.approx(90 + 14)
    meter.begin()
    energy_mj[0] = NvmlError("GPU is lost")
    assert meter.end().provenance == "none"
    assert "GPU is lost" in meter.trouble


def test_gpu_that_shows_nothing_is_named():
    denied = [NvmlError("Not Supported")] * 2
    meters, problems = nvml_meters(recorded_nvml(energy_mj=denied, power_mw=denied))
    assert meters == ()
    assert problems[0] == "GPU 0 (NVML): shows neither energy nor power"


def test_thread_samples_until_the_end():
    reads, has_sampled = [], threading.Event()

    def watts() -> float:
        reads.append(4.0)
        if len(reads) > 2:
            has_sampled.set()
        return reads[-1]

    meter = EnergyMeter("box", [Meter("bench supply", "gauge", watts)])
    for _ in range(2):
        reads.clear()
        has_sampled.clear()
        meter.begin()
        assert has_sampled.wait(60)
        energy = meter.end()
        assert energy.joules > 0
        num_reads = len(reads)
        meter.sample()
        assert len(reads) == num_reads + 1  # ours: the thread has ended


@pytest.mark.cuda
def test_gpu_meter_counts_work():
    import torch

    pytest.importorskip("pynvml")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    meter = EnergyMeter("box", [m for m in find_meters().meters if "NVML" in m.scope])
    x = torch.randn(4096, 4096, device="cuda")
    meter.begin()
    for _ in range(200):
        x = torch.nn.functional.normalize(x @ x)
    torch.cuda.synchronize()
    energy = meter.end()
    assert energy.provenance == "measured"
    assert energy.joules > 0


# ------------------------------------------------------------ a run


def record(rank: int, folder: Path, roots: list[str | None]) -> float:
    """Trains where some have a meter, which shows 10 W; returns the seconds per recorded step."""
    meters = None
    if roots[rank] is not None:
        root = Path(roots[rank])
        jetson(root, "hwmon3", VDD_IN=(5000, 2000))
        meters = find_meters(root).meters
    plan = planned(two_devices(), Workload(batch_size=8), meters=meters)
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model = DoraParallel(module, plan, sample=torch.zeros(8, 8), timeout_s=20.0)
    for _ in range(6):
        model.step(torch.ones(8, 8), torch.zeros(8, 8), F.mse_loss)
    plan.record(model, folder)
    model.close()
    calls = list(model.calls)[1:]
    return (calls[-1].end_s - calls[0].start_s) / len(calls)


def two_devices() -> Cluster:
    names = ("d0", "d1")
    medium = Medium(name="lan", rate_bytes_per_s=1e9, latency_s=1e-5)
    links = tuple(Link(src=a, dst=b, media=("lan",)) for a in names for b in names if a != b)
    devices = tuple(device(name=name, memory_bytes=10**9) for name in names)
    return Cluster(devices=devices, media=(medium,), links=links)


BOTH = pytest.param({"d0", "d1"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("metered", [BOTH, {"d1"}, set()])
def test_run_carries_what_its_meters_counted(tmp_path, metered):
    """Ranks on one machine without meters of their own have none: nobody counts twice."""
    roots = [str(tmp_path / name) if name in metered else None for name in ("d0", "d1")]
    step_s = dict(zip(("d0", "d1"), run_ranks(2, record, tmp_path, roots), strict=True))
    run = load(Run, tmp_path / "run.json")
    assert {one.device for one in run.measured.energy} == metered
    assert {one.provenance for one in run.measured.energy} <= {"measured"}
    for one in run.measured.energy:
        assert one.joules == pytest.approx(10.0 * step_s[one.device])
    assert {one.provenance for one in run.predicted.energy} == {"modelled"}
    used = {replica.device for stage in run.plan.stages for replica in stage.replicas}
    # A sum that lacks a part would pass for a saving.
    assert ("energy per step, predicted" in page(run)) == (not used <= metered)


def device(**fields) -> Device:
    given = {"idle_w": 2, "busy_w": 10, "tx_j_per_byte": 1e-6, "rx_j_per_byte": 2e-6} | fields
    return Device(
        flops_per_s=1e9, mem_bandwidth_bytes_per_s=1e9, **{"name": "pi", "memory_bytes": 1} | given
    )


def modelled_j(usage: Usage) -> float:
    (energy,) = modelled_energy(Activity(usage=(usage,)), Cluster(devices=(device(),)))
    assert (energy.device, energy.provenance) == ("pi", "modelled from measured activity")
    return energy.joules


def test_modelled_energy_is_that_of_what_was_counted():
    usage = Usage(device="pi", total_s=10, busy_s=4, sent_bytes=1_000_000, received_bytes=500_000)
    assert modelled_j(usage) == pytest.approx(4 * 10 + 6 * 2 + 1 + 1)
