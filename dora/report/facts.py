"""The numbers of a report, from a Run: times against bounds, where a step's time and joules went.

Whatever compares predicted with measured uses one definition for both: means are over the devices
that compute, and of a message only the sending end counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from statistics import median
from typing import NamedTuple

from dora.report.flows import is_received
from dora.report.quantities import joules, ordinal, percent, seconds, with_unit
from dora.spec import Device, Plan, Run, Timeline, Usage

_TITLES = {
    "step_s": "time per step",
    "latency_s": "latency per request",
    "deadline_s": "time of the whole job",
    "frame_rate_hz": "requests sustained",
    "ttft_s": "time to the first token",
    "tpot_s": "time per further token",
    "energy_j": "energy, all devices",
    "power_w": "mean power, all devices",
    "battery_j": "energy, devices on battery",
}
_TIMES = ("step_s", "latency_s")


def step_word(run: Run) -> str:
    """Returns what is repeated: 'step' or 'request'."""
    return "step" if run.workload.kind == "train" else "request"


def times_s(run: Run) -> tuple[float, ...]:
    """Returns the time of every measured step, or of the one whose timeline is known."""
    return run.times_s or ((run.measured.makespan_s,) if run.measured.spans else ())


def percentile(values: tuple[float, ...], percent: float) -> float:
    """Returns the least value that at least `percent` of all do not exceed; at 50 the median."""
    if percent == 50:
        return median(values)
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100 - 1e-9) - 1)]


def predicted_s(run: Run) -> float | None:
    """Returns the predicted time of a step, of a plan without timeline what the planner expects."""
    cost, timeline = run.plan.cost, whole_prediction(run)
    if timeline is not None:
        return timeline.makespan_s
    return cost.makespan_s if cost else None


def predicted_j(run: Run) -> float | None:
    """Returns the predicted energy of a step; the same."""
    cost, found = run.plan.cost, predicted_energy(run)
    if found:
        return total_j(found)
    return cost.energy_j or None if cost else None


def whole_prediction(run: Run) -> Timeline | None:
    """Returns the predicted timeline if it is of a whole step; to generate, it ends at a token."""
    return None if run.workload.kind == "generate" else run.predicted


def error_of(predicted: float | None, measured: float | None) -> float | None:
    """Returns by which share of the measured value the prediction is above it."""
    return predicted / measured - 1 if predicted is not None and measured else None


def computing_ranks(timeline: Timeline) -> list[int]:
    """Returns the ranks that compute, in order."""
    return sorted({span.rank for span in timeline.spans if span.lane == "compute"})


def bubble(timeline: Timeline) -> float | None:
    """Returns the share of the step in which a device that takes part does not compute."""
    ranks = computing_ranks(timeline)
    if not ranks or not timeline.makespan_s:
        return None
    busy_s = sum(timeline.busy_s(rank, "compute") for rank in ranks)
    return 1 - busy_s / (len(ranks) * timeline.makespan_s)


def exposed_s(timeline: Timeline) -> float | None:
    """Returns the seconds that a device sends and does not compute; None if sends are unknown."""
    spans = tuple(span for span in timeline.spans if not is_received(span))
    ranks = computing_ranks(timeline)
    if not ranks or (len(ranks) > 1 and all(span.lane != "network" for span in spans)):
        return None
    sent = timeline.model_copy(update={"spans": spans})
    hidden = [sent.busy_s(rank, "compute") for rank in ranks]
    both = [sent.busy_s(rank, "network", "compute") for rank in ranks]
    return (sum(both) - sum(hidden)) / len(ranks)


class Joules(NamedTuple):
    """Energy of one device in one step; the parts that are not known are None.

    Attributes:
        parts: (computing, waiting, radio or port), which add up to `total`.
    """

    device: str
    total: float
    provenance: str
    parts: tuple[float, float, float] | None = None


def predicted_energy(run: Run) -> list[Joules]:
    """Returns what the simulator expects of each device, split by the device's power model."""
    timeline = whole_prediction(run)
    if timeline is None:
        return []
    found = []
    for energy in timeline.energy:
        if energy.provenance == "none":
            continue
        device, rank = run.cluster.device(energy.device), run.plan.devices.index(energy.device)
        busy_s = timeline.busy_s(rank, "compute")
        is_used = run.plan.placement(rank) is not None
        idle_s = timeline.makespan_s - busy_s if is_used else 0.0
        busy_j, idle_j = busy_s * _busy_w(device, run.plan), idle_s * device.idle_w
        parts = busy_j, idle_j, max(0.0, energy.joules - busy_j - idle_j)
        found.append(Joules(device.name, energy.joules, energy.provenance, parts))
    return found


def measured_energy(run: Run) -> list[Joules]:
    """Returns what each device took per step: by a meter, else modelled from what it did.

    Devices that the plan leaves out count with their radio only: they wait without the run, too.
    """
    known = {e.device: e for e in run.measured.energy if e.provenance != "none"}
    usage = {u.device: u for u in run.activity.usage} if run.activity and run.times_s else {}
    found = []
    for name in run.plan.devices:
        parts = _parts(run, usage[name]) if name in usage else None
        if name in known:
            joules, provenance = known[name].joules, known[name].provenance
            # A meter does not tell what the joules were for.
            split = parts if provenance == "modelled from measured activity" else None
            found.append(Joules(name, joules, provenance, _scaled(split, joules)))
        elif parts is not None:
            found.append(Joules(name, sum(parts), "modelled from measured activity", parts))
    return found


def measured_j(run: Run, devices: Collection[str] | None = None) -> float | None:
    """Returns what these devices took per step, None: all; None if one that computes is unknown.

    Without it the sum would look like a saving, where some devices have a meter and others none.
    """
    wanted = set(run.plan.devices if devices is None else devices)
    found = [one for one in measured_energy(run) if one.device in wanted]
    is_whole = wanted & set(_used(run)) <= {one.device for one in found}
    return total_j(found) if is_whole else None


def _busy_w(device: Device, plan: Plan) -> float:
    modes = {r.device: r.power_mode for stage in plan.stages for r in stage.replicas}
    factor = device.power_mode(modes.get(device.name, "default")).power_factor
    return device.idle_w + (device.busy_w - device.idle_w) * factor


def _parts(run: Run, usage: Usage) -> tuple[float, float, float]:
    device, count = run.cluster.device(usage.device), len(run.times_s)
    radio_j = usage.sent_bytes * device.tx_j_per_byte + usage.received_bytes * device.rx_j_per_byte
    if run.plan.placement(run.plan.devices.index(device.name)) is None:
        return 0.0, 0.0, radio_j / count
    busy_j = usage.busy_s * _busy_w(device, run.plan)
    idle_j = max(0.0, usage.total_s - usage.busy_s) * device.idle_w
    return busy_j / count, idle_j / count, radio_j / count


def _scaled(
    parts: tuple[float, float, float] | None, total: float
) -> tuple[float, float, float] | None:
    """Returns the parts in proportion, so that they add up to a total from elsewhere."""
    if parts is None or not sum(parts):
        return None
    factor = total / sum(parts)
    return parts[0] * factor, parts[1] * factor, parts[2] * factor


def total_j(found: list[Joules]) -> float | None:
    """Returns the energy of all devices, None if none is known."""
    return sum(one.total for one in found) if found else None


def provenance(found: list[Joules]) -> str:
    """Returns where the joules come from, each source once."""
    return " and ".join(dict.fromkeys(one.provenance for one in found))


def peaks(run: Run) -> dict[str, tuple[int | None, int | None]]:
    """Returns the peak memory of each device whose peak is known: (predicted, measured)."""
    predicted = {m.device: m.peak_bytes for m in run.predicted.memory} if run.predicted else {}
    measured = {m.device: m.peak_bytes for m in run.measured.memory}
    pairs = {name: (predicted.get(name), measured.get(name)) for name in _used(run)}
    return {name: pair for name, pair in pairs.items() if pair != (None, None)}


def process_peaks(run: Run) -> dict[str, int]:
    """Returns the peak of each device's whole process, with Python and its libraries."""
    counted = {u.device: u.peak_bytes for u in run.activity.usage} if run.activity else {}
    return {name: counted[name] for name in _used(run) if counted.get(name)}


def _used(run: Run) -> list[str]:
    return [replica.device for stage in run.plan.stages for replica in stage.replicas]


class Bound(NamedTuple):
    """One bound of the QoE, and whether the measurement keeps it.

    Attributes:
        field, allowed: Of the QoE.
        predicted, measured: Values; None where not known.
        share: Of the steps that keep it, where each one was timed.
        is_kept: None where the run does not tell.
        how: What was judged, or why nothing was.
        level: Percentile that is judged.
    """

    field: str
    allowed: float
    predicted: float | None
    measured: float | None
    share: float | None
    is_kept: bool | None
    how: str
    level: float = 50.0

    @property
    def title(self) -> str:
        """What is bounded, in words."""
        return _TITLES[self.field]

    def written(self, value: float | None) -> str:
        """Returns a value with the unit of the bound."""
        if value is None:
            return "not known"
        unit = self.field.rsplit("_", 1)[1]
        if unit == "s":
            return seconds(value)
        if unit == "j":
            return joules(value)
        return with_unit(value, "W", least=1e-3) if unit == "w" else f"{value:.3g} per s"

    @property
    def reached(self) -> str:
        """What was measured, such as '1.41 s (95th percentile)'."""
        level = f" ({ordinal(self.level)})" if self.share is not None else ""
        return self.written(self.measured) + level

    @property
    def asked(self) -> str:
        """The bound itself, such as 'at most 1.5 s'."""
        least = "at least" if self.field == "frame_rate_hz" else "at most"
        return f"{least} {self.written(self.allowed)}"


def bounds(run: Run) -> list[Bound]:
    """Returns every bound of the QoE, judged by what was measured."""
    given = [(field, getattr(run.qoe, field)) for field in _TITLES]
    return [_bound(run, field, float(value)) for field, value in given if value is not None]


def _bound(run: Run, field: str, allowed: float) -> Bound:
    times, word = times_s(run), step_word(run)
    if field in _TIMES:
        if not times:
            return Bound(field, allowed, predicted_s(run), None, None, None, "nothing was timed")
        share = sum(time <= allowed for time in times) / len(times)
        level = run.qoe.percentile
        value = percentile(times, level)
        how = f"{percent(level / 100)} of the {word}s must keep it"
        if level == 50:
            how = "the median must keep it"
        return Bound(field, allowed, predicted_s(run), value, share, value <= allowed, how, level)
    predicted, measured, how = _other_values(run, field)
    is_kept = None
    if measured is not None:
        is_kept = measured >= allowed if field == "frame_rate_hz" else measured <= allowed
    return Bound(field, allowed, predicted, measured, None, is_kept, how)


def _other_values(run: Run, field: str) -> tuple[float | None, float | None, str]:
    """Returns the predicted and the measured value of a bound on no single time, and its origin."""
    cost, word = run.plan.cost, step_word(run)
    if field in ("ttft_s", "tpot_s"):
        return (getattr(cost, field) if cost else None), None, "tokens were not timed one by one"
    if field == "deadline_s":
        return None, None, f"the run does not say how many {word}s the job has"
    if field == "frame_rate_hz":
        length_s = max((u.total_s for u in run.activity.usage), default=0) if run.activity else 0
        rate = 1 / cost.interval_s if cost and cost.interval_s else None
        if not (length_s and run.times_s):
            return rate, None, "the length of the whole run is not known"
        return rate, len(run.times_s) / length_s, f"{word}s over the length of the run"
    predicted, devices = predicted_j(run), [d.name for d in run.cluster.devices]
    if field == "battery_j":
        devices = [d.name for d in run.cluster.devices if d.battery_j is not None]
        predicted = total_j([one for one in predicted_energy(run) if one.device in devices])
    measured = measured_j(run, devices)
    found = [one for one in measured_energy(run) if one.device in devices]
    how = provenance(found) or "no energy was measured"
    if found and measured is None:
        how = "some devices have no meter"
    if field == "power_w":
        times, step_s = times_s(run), predicted_s(run)
        predicted = predicted / step_s if predicted is not None and step_s else None
        measured = measured / median(times) if measured is not None and times else None
    return predicted, measured, how if field == "power_w" else f"per {word}, {how}"
