"""Energy meters that hardware brings: what each one covers and how it is read.

A board that meters its own supply covers everything on it, so that nothing may be added to it; a
battery is the same while it supplies the machine. Processors, memory and discrete GPUs are meters
of parts, and their joules add up.

All but NVML are files of Linux, below a `root` that tests replace by recorded trees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Sets of rails that overlap in nothing and cover a Jetson, the widest first, as INA chips name
# them. Sources: github.com/energymon/energymon, jetson/JetsonPowerRails.md, for the boards up to
# Xavier (VDD_IN and VDD_MUX branch in parallel from the supply of a TX1 and TX2); the chapter on
# power of NVIDIA's Jetson Linux developer guide for AGX Orin (VIN_SYS_5V0 contains
# VDDQ_VDD2_1V8AO); github.com/rbonghi/jetson_stats pull request 900 for AGX Thor (VIN).
JETSON_RAILS = (
    ("whole board", ("VIN",)),
    ("module and carrier board", ("VDD_IN", "VDD_MUX")),
    ("whole module", ("VDD_IN",)),
    ("whole board", ("POM_5V_IN",)),
    ("whole module", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
    ("whole module", ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")),
)
# Root alone may read the counters since Linux 5.10, because they leak what a processor computes
# (CVE-2020-8694).
RAPL_FIX = (
    "run as root, or let all users read it until the next start (CVE-2020-8694 says what that may"
    " leak): sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj"
)


class Meter(NamedTuple):
    """One number that hardware keeps.

    Attributes:
        scope: What it covers and who says so, for example 'CPU package-0 (RAPL)'.
        kind: A counter shows the joules so far, a gauge the watts now.
        read: Returns that number; raises OSError when the hardware can not tell.
        range_j: Where a counter starts again from zero; None if it never does.
    """

    scope: str
    kind: Literal["counter", "gauge"]
    read: Callable[[], float]
    range_j: float | None = None


class Found(NamedTuple):
    """Meters that overlap in nothing, and for each one that is out of reach how to get it."""

    meters: tuple[Meter, ...] = ()
    problems: tuple[str, ...] = ()


def machine_of_meters() -> bytes:
    """Names what the meters are of: all processes of a booted kernel share them."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:  # no Linux, which has no meters that are found
        return b""


def rapl_meters(root: Path) -> Found:
    """Finds the counters of processor packages and of their memory (Intel and AMD).

    A package contains its cores and integrated graphics, which are left out; memory is counted
    apart from it. 'psys' is left out too: what it covers differs by machine, and some show zero
    (github.com/powercap/powercap issue 3, hubblo-org/windows-rapl-driver issue 7).
    """
    meters, denied = [], []
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        scope = _rapl_scope(zone)
        try:
            if scope:
                meters.append(_rapl_meter(zone, scope))
        except PermissionError:
            denied.append(scope)
        except OSError:
            continue  # a zone without a counter
    problems = [f"{', '.join(denied)}: permission denied; {RAPL_FIX}"] if denied else []
    return Found(tuple(meters), tuple(problems))


def _rapl_scope(zone: Path) -> str:
    name = _text(zone / "name")
    if name.startswith("package"):
        return f"CPU {name} (RAPL)"
    if name == "dram":
        package = zone.with_name(zone.name.rpartition(":")[0])
        return f"memory of {_text(package / 'name') or 'the CPU'} (RAPL)"
    return ""


def _rapl_meter(zone: Path, scope: str) -> Meter:
    read = _product(1e-6, zone / "energy_uj")
    read()
    return Meter(scope, "counter", read, _number(zone / "max_energy_range_uj") * 1e-6)


def ina_meters(root: Path) -> Found:
    """Finds the INA power monitor of a board's supply.

    A single channel, as of an INA219 on a power board, is taken for the supply. Of several, only
    the sets of `JETSON_RAILS` are known not to overlap.
    """
    rails = dict(_hwmon_rails(root)) | dict(_iio_rails(root))
    for scope, labels in JETSON_RAILS:
        if all(label in rails for label in labels):
            reads = [rails[label] for label in labels]
            return Found((_sum_meter(f"{scope} (INA {' + '.join(labels)})", reads),))
    if len(rails) == 1:
        return Found(tuple(Meter(f"supply (INA {k})", "gauge", read) for k, read in rails.items()))
    if rails:
        names = ", ".join(sorted(rails))
        return Found(problems=(f"INA rails {names}: unknown which cover the board, none is used",))
    return Found()


def _hwmon_rails(root: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yields name and power of each channel: in1 to in3 in mV (kernel.org, hwmon/ina3221)."""
    for volts in sorted(root.glob("sys/class/hwmon/hwmon*/in[123]_input")):
        chip, channel = volts.parent, volts.name[2]
        amps, kind = chip / f"curr{channel}_input", _text(chip / "name")
        label = _text(chip / f"in{channel}_label") or _text(chip / "label")
        read = _product(1e-6, volts, amps)  # mV x mA
        # 'NC' is a channel that nothing is connected to.
        if kind.startswith("ina") and label != "NC" and _can_tell(read):
            yield label or f"{kind}:{channel} of {chip.name}", read


def _iio_rails(root: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yields the same of JetPack 4, whose driver shows mW."""
    for name in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*")):
        power = name.with_name(f"in_power{name.name.removeprefix('rail_name_')}_input")
        read = _product(1e-3, power)
        if _can_tell(read):
            yield _text(name), read


def battery_meters(root: Path) -> Found:
    """Finds what the batteries of this machine give, if it runs on them now.

    Units are those of kernel.org, ABI/testing/sysfs-class-power. A battery of scope 'Device' is
    that of a mouse or headset.
    """
    batteries = [
        supply
        for supply in sorted(root.glob("sys/class/power_supply/*"))
        if _text(supply / "type") == "Battery"
        and _text(supply / "scope") != "Device"
        and _text(supply / "present") != "0"
    ]
    if not batteries:
        return Found()
    scope = f"whole machine (battery {', '.join(b.name for b in batteries)})"
    gauges = [_battery_gauge(battery) for battery in batteries]
    counters = [
        _product(-3.6e-3, battery / "energy_now") for battery in batteries
    ]  # microwatthours
    meter = _sum_meter(scope, gauges)
    if not all(map(_can_tell, gauges)):
        meter = _sum_meter(scope, counters)._replace(kind="counter")
    meter = meter._replace(read=_while_discharging(batteries, meter.read))
    try:
        meter.read()
    except OSError as error:
        return Found(problems=(f"{scope}: {error.strerror or error}",))
    return Found((meter,))


def _battery_gauge(battery: Path) -> Callable[[], float]:
    """Returns how to read watts; the sign of a current differs by driver."""
    power, current = battery / "power_now", battery / "current_now"
    read = _product(1e-6, power)
    if not _can_tell(read):
        read = _product(1e-12, current, battery / "voltage_now")
    return lambda: abs(read())


def _while_discharging(batteries: list[Path], read: Callable[[], float]) -> Callable[[], float]:
    def guarded() -> float:
        states = {_text(battery / "status") for battery in batteries}
        if "Discharging" not in states or "Charging" in states:
            raise OSError("shows what the machine uses only while it runs on battery")
        return read()

    return guarded


def gpu_meters(root: Path) -> Found:
    """Finds the GPUs of the NVIDIA driver, if there is one (on Windows' Linux it is 'dxg')."""
    if not any((root / "dev" / node).exists() for node in ("nvidiactl", "dxg")):
        return Found()
    try:
        import pynvml
    except ImportError:
        return Found(problems=("GPU (NVML): pip install 'dora-parallel[energy]' to measure it",))
    return nvml_meters(pynvml)


def nvml_meters(nvml: Any) -> Found:
    """Finds a meter for each GPU: its energy counter, from Volta on, or else its power.

    Args:
        nvml: The module `pynvml` of the package nvidia-ml-py.
    """
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return Found(problems=(f"GPU (NVML): {error}",))
    meters, problems = [], []
    for i, handle in enumerate(handles):
        candidates = _gpu_candidates(nvml, i, handle)
        meter = next((m for m in candidates if _can_tell(m.read)), None)
        if meter:
            meters.append(meter)
        else:
            problems.append(f"GPU {i} (NVML): shows neither energy nor power")
    return Found(tuple(meters), tuple(problems))


def _gpu_candidates(nvml: Any, index: int, handle: Any) -> list[Meter]:
    def read(call: Callable[[Any], float]) -> Callable[[], float]:
        def milli() -> float:  # both calls count in thousandths
            try:
                return call(handle) * 1e-3
            except nvml.NVMLError as error:
                raise OSError(f"NVML: {error}") from error

        return milli

    scope = f"GPU {index} {nvml.nvmlDeviceGetName(handle)} (NVML)"
    return [
        Meter(scope, "counter", read(nvml.nvmlDeviceGetTotalEnergyConsumption)),
        Meter(f"{scope[:-1]} power)", "gauge", read(nvml.nvmlDeviceGetPowerUsage)),
    ]


def _sum_meter(scope: str, reads: list[Callable[[], float]]) -> Meter:
    return Meter(scope, "gauge", lambda: sum(read() for read in reads))


def _product(unit: float, *paths: Path) -> Callable[[], float]:
    return lambda: unit * math.prod(map(_number, paths))


def _can_tell(read: Callable[[], float]) -> bool:
    try:
        read()
    except OSError:
        return False
    return True


def _number(path: Path) -> float:
    text = path.read_text()
    try:
        return float(text)
    except ValueError as error:
        raise OSError(f"{path} holds no number: {text!r}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
