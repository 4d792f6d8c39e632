"""The adapter beside a real job on the testbed: what happens to it, and how soon it is over.

Three unlike devices on one medium train a small language model (`adapter_worker.py`); profiles are
measured within the devices' shares, and the bank is made of them. In each run one thing happens:
the medium falls to 30 %, a device to 40 % of its speed, other traffic crosses the medium, a device
is killed. The same happens to the same job without the adapter, in turn.

**In violation** is a step over the QoE's bound. **Recovery** is from the event to the end of the
last step over the bound, or over 1.1 times what the bank's best plan should take by then, before
three in a row that are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from adapter_worker import SERVING_TURNS, Settings, batch, make_model, make_optimizer
from common import Metric, Row, Samples, Table

from dora.adapt import Predictor, make_bank
from dora.adapter import placed
from dora.catalog import scale_to_cluster
from dora.demo.charlm import next_char_loss
from dora.files import load, save
from dora.spec import Cluster, Conditions, Device, Link, Medium, ModelProfile, Plan, QoE, Workload
from dora.testbed import Job, Testbed, cgroup, parse_event
from dora.testbed.scale import core_flops_per_s, largest

_WORKER = Path(__file__).with_name("adapter_worker.py")
_TRAFFIC = Path(__file__).with_name("testbed_worker.py")
_RATE_BYTES_PER_S = 12.5e6
# Of a step, over that of the fastest plan.
BOUND = 1.5
# What the events do.
NARROW, SLOW, CROWDED = 0.3, 0.4, 0.5
BANK = 24
LIMIT_S = 200.0
# Other work on the machine makes the measured speed of a core smaller than it is.
_CAUTION = 0.9
# Until the last packets of a killed job have come.
_CLEAR_S = 0.3
# Of what happens to the jobs, each with and without the adapter in turn.
REPEATS = 3
# Steps in a row that show that it is over.
_CALM_STEPS = 3

TRAIN = Workload(kind="train", batch_size=32, optimizer_bytes_per_param=4)
SERVE = Workload(kind="infer", batch_size=32)


def make_cluster() -> Cluster:
    """Returns three devices that share one medium."""
    power = {"laptop": (8.0, 28.0, 9), "hub": (3.0, 10.0, 6), "phone": (1.0, 5.0, 3)}
    devices = tuple(
        Device(name=name, flops_per_s=speed * 1e11, mem_bandwidth_bytes_per_s=speed * 1e10,
               memory_bytes=10**9, idle_w=idle_w, busy_w=busy_w, tx_j_per_byte=1e-7,
               rx_j_per_byte=1e-7)
        for name, (idle_w, busy_w, speed) in power.items()
    )  # fmt: skip
    names = [device.name for device in devices]
    return Cluster(
        name="three devices",
        devices=devices,
        media=(Medium(name="wifi", rate_bytes_per_s=_RATE_BYTES_PER_S),),
        links=tuple(Link(src=a, dst=b, media=("wifi",)) for a in names for b in names if a != b),
    )


class Devices(Testbed):
    """A testbed for one job after the other, whose devices are lifted while a program starts."""

    def __init__(self) -> None:
        cluster = make_cluster()
        scale = largest(cluster, len(os.sched_getaffinity(0)), core_flops_per_s()) * _CAUTION
        super().__init__(cluster, scale=scale, network_factor=1 / scale, mode="namespaces")
        self._sent: list[int] = []

    def __enter__(self) -> Devices:
        """Builds everything; what else runs on this machine yields to the devices."""
        super().__enter__()
        found = cgroup.mounts()
        name = self._emulation._name
        if "unified" in found:
            (found["unified"] / name / "cpu.weight").write_text("10000")
        else:
            (found["cpu"] / name / "cpu.shares").write_text("100000")
        return self

    def begin(self) -> None:
        """Sets all back, for another job."""
        for name in ("laptop", "hub", "phone"):
            self.kill(name)
            self.set_speed(name, 1.0)
        self.set_rate("wifi", 1.0)
        self.lift()
        time.sleep(_CLEAR_S)
        self._sent = [usage.sent_bytes for usage in self.activity().usage]

    def has_sent(self) -> bool:
        """Returns whether every device has, in this job."""
        now = [usage.sent_bytes for usage in self.activity().usage]
        return all(a > b for a, b in zip(now, self._sent, strict=True))


class Place(NamedTuple):
    """Where jobs run, and the folder of their settings."""

    folder: Path
    testbed: Devices

    def write(self, **settings: Any) -> None:
        """Sets what the next job shall do."""
        save(Settings(**settings), self.folder / "settings.json")


# ------------------------------------------------------------ jobs


@dataclass
class Told:
    """What a job has said, and when things happened to it."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    begun_s: float = 0.0
    happened_s: float = 0.0


class Happening(NamedTuple):
    """Something that happens; `rest` is what is true of the cluster from then on."""

    name: str
    begin: Callable[[Testbed, Job], None]
    rest: Conditions


def run_job(
    place: Place,
    mode: str,
    *,
    length_s: float = LIMIT_S,
    happening: Happening | None = None,
    after_s: float = 0.0,
) -> Told:
    """Runs a job until it ends, or for so long after its first step.

    Args:
        place: With its settings.
        mode: Of `adapter_worker.py`.
        length_s: After which it is stopped.
        happening: What happens to it.
        after_s: And when, after its first step.
    """
    told, testbed = Told(), place.testbed
    testbed.begin()
    command = [sys.executable, str(_WORKER), mode, str(place.folder)]
    job = Job(testbed, command, os.environ, limit_s=LIMIT_S)
    for device, line in job.lines():
        now_s = time.monotonic()
        if not line.startswith("{"):
            told.others.append(f"{device}: {line}")
            continue
        facts = json.loads(line) | {"device": device}
        (told.events if "event" in facts else told.steps).append(facts)
        told.begun_s = told.begun_s or now_s
        if happening and not told.happened_s and now_s > told.begun_s + after_s:
            happening.begin(testbed, job)
            told.happened_s = time.monotonic()
        if now_s > told.begun_s + length_s:
            job.stop()
            return told
    if job.problem:
        raise RuntimeError(f"{mode}: {job.problem}\n" + "\n".join(told.others[-40:]))
    return told


# ------------------------------------------------------------ what happens


def happenings() -> Iterator[Happening]:
    """Yields what happens to jobs."""
    yield Happening(
        f"medium at {NARROW:.0%}",
        lambda testbed, job: testbed.set_rate("wifi", NARROW),
        Conditions.of({"wifi": NARROW}),
    )
    yield Happening(
        f"hub at {SLOW:.0%}",
        lambda testbed, job: testbed.set_speed("hub", SLOW),
        Conditions.of({"hub": SLOW}),
    )
    yield Happening("other traffic", _crowd, Conditions.of({"wifi": CROWDED}))
    yield Happening("hub killed", _kill, Conditions.of({"hub": 0.0}))


def _crowd(testbed: Testbed, job: Job) -> None:
    """Lets one device send to another for the rest of the run."""
    for device, words in (
        (2, ["receive", "7777"]),
        (0, ["send", testbed.address(2), "7777", f"{LIMIT_S:g}"]),
    ):
        command = [sys.executable, str(_TRAFFIC), *words]
        testbed.spawn(device, command, os.environ, stdout=subprocess.DEVNULL)


def _kill(testbed: Testbed, job: Job) -> None:
    job._happen(parse_event("0 kill hub", testbed.cluster))


# ------------------------------------------------------------ preparing


def prepared(place: Place, workload: Workload, *, is_fresh: bool) -> tuple[Predictor, list[Plan]]:
    """Returns what predicts plans without bounds, and a bank for them.

    Args:
        place: Where profiles are measured.
        workload: What is run.
        is_fresh: Measures; else the profile is there.
    """
    if is_fresh:
        place.write(workload=TRAIN)
        run_job(place, "profile")
    cluster = place.testbed.cluster
    measured = load(ModelProfile, place.folder / "profile.json")
    profile = scale_to_cluster(measured, cluster, training=True)
    predict = Predictor(profile, cluster, workload, QoE(objective="time"))
    return predict, make_bank(predict, effort_s=0.3, max_worlds=8, max_plans=BANK)


def fastest(predict: Predictor, bank: Sequence[Plan], rest: Conditions) -> tuple[float, Plan]:
    """Returns the time of the fastest plan under conditions, and the plan."""
    found = [(f.time_s, i) for i, plan in enumerate(bank) if (f := predict(plan, rest))]
    time_s, i = min(found)
    return time_s, bank[i]


# ------------------------------------------------------------ events


class Trouble(NamedTuple):
    """What a job made of what happened to it.

    Attributes:
        late, late_s: Steps over the bound since then, and their seconds.
        recovery_s: Until it was over; None if it never was.
        calm_s: Median step before.
        switches_s, rescheduled_s: Seconds of each.
        lost_s: From the loss of a device to the end of the next step.
    """

    late: int
    late_s: float
    recovery_s: float | None
    calm_s: float
    switches_s: list[float]
    rescheduled_s: list[float]
    lost_s: float | None = None


def trouble(told: Told, bound_s: float, best_s: float, length_s: float) -> Trouble:
    """Returns what became of a job.

    Args:
        told: What it said.
        bound_s: Of a step.
        best_s: What the best plan takes by then.
        length_s: Seconds that count, from when something happened.
    """
    at_s = told.happened_s
    after = [(max(s["start_s"], at_s), s["end_s"]) for s in told.steps
             if at_s < s["end_s"] <= at_s + length_s]  # fmt: skip
    own = {(s["start_s"], s["end_s"]) for s in told.steps}
    before = [end - start for start, end in own if end <= at_s]
    late = [end - start for start, end in after if end - start > bound_s]
    limit_s = max(bound_s, 1.1 * best_s)
    fine = [end - start <= limit_s for start, end in after]
    over = next(
        (i for i in range(len(fine) - _CALM_STEPS + 1) if all(fine[i : i + _CALM_STEPS])), None
    )
    recovery_s = None if over is None else (after[over - 1][1] - at_s if over else 0.0)
    kinds = {
        kind: [e["seconds"] for e in told.events if e["event"] == kind and e["end_s"] > at_s]
        for kind in ("switch", "reschedule", "recovery")
    }
    lost_s = after[0][1] - at_s if kinds["recovery"] and after else None
    return Trouble(len(late), sum(late), recovery_s, median(before), kinds["switch"],
                   kinds["reschedule"], lost_s)  # fmt: skip


def losses_agree(told: Told, num_after: int = 6) -> bool:
    """Returns whether the losses after a loss are those of training without it.

    What the lost steps had learnt is undone, and their batches do not come again.
    """
    lost = next((e for e in told.events if e["event"] == "recovery"), None)
    if lost is None:
        return True
    first = next(i for i, s in enumerate(told.steps) if s["end_s"] > told.happened_s)
    gone = set(range(first - lost["lost_steps"], first))
    wanted = reference([s["step"] for i, s in enumerate(told.steps[: first + num_after])
                        if i not in gone])  # fmt: skip
    pairs = [(s["loss"], wanted[s["step"]]) for s in told.steps[first : first + num_after]]
    return all(abs(a - b) < 2e-3 * abs(b) for a, b in pairs)


def reference(steps: Sequence[int]) -> dict[int, float]:
    """Returns the losses of plain training on those batches."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, found = make_model(), {}
    optimizer = make_optimizer(model)
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = next_char_loss(model(x), y)
        loss.backward()
        optimizer.step()
        found[step] = loss.item()
    return found


def live(place: Place, table: Table, *, is_quick: bool) -> tuple[list[Row], dict[str, Metric]]:
    """Lets everything happen to jobs with and without the adapter, in turn."""
    predict, bank = prepared(place, TRAIN, is_fresh=True)
    best, first = fastest(predict, bank, Conditions())
    qoe = QoE(step_s=BOUND * best, objective="time")
    bank = [first, *(plan for plan in bank if plan is not first)]
    after_s, length_s = (5.0, 12.0) if is_quick else (8.0, 14.0)
    chosen = list(happenings())[:: 3 if is_quick else 1]
    found: dict[tuple[str, bool], list[Trouble]] = {}
    agree = []
    for happening in chosen * (1 if is_quick else REPEATS):
        then_s = fastest(predict, bank, happening.rest)[0]
        for adapts in (True, False) if happening.name != "hub killed" or not is_quick else (True,):
            place.write(workload=TRAIN, qoe=qoe, bank=tuple(bank), adapts=adapts)
            told = run_job(place, "train", length_s=after_s + length_s, happening=happening,
                           after_s=after_s)  # fmt: skip
            result = trouble(told, qoe.step_s or 0.0, then_s, length_s)
            found.setdefault((happening.name, adapts), []).append(result)
            if "killed" in happening.name:
                agree.append(losses_agree(told))
            show(table, happening.name, adapts, result, qoe.step_s or 0.0, then_s)
    rows = [
        row for (name, adapts), results in found.items() for row in rows_of(name, adapts, results)
    ]
    return rows, verdict(found, agree)


def show(
    table: Table, name: str, adapts: bool, result: Trouble, bound_s: float, then_s: float
) -> None:
    recovery = "never" if result.recovery_s is None else f"{result.recovery_s:.2f} s"
    table.line(
        f"{name}, {'adapter' if adapts else 'without'}",
        f"{result.calm_s:.3f} of {bound_s:.3f} s",
        f"{then_s:.3f} s",
        f"{result.late} ({result.late_s:.1f} s)",
        recovery,
        " ".join(f"{s:.2f}" for s in result.switches_s) or "-",
        "-" if result.lost_s is None else f"{result.lost_s:.2f} s",
    )


def rows_of(name: str, adapts: bool, results: Sequence[Trouble]) -> Iterator[Row]:
    values = {
        "late_steps": ("1", [float(r.late) for r in results]),
        "late": ("s", [r.late_s for r in results]),
        "recovery": ("s", [r.recovery_s for r in results if r.recovery_s is not None]),
        "never_recovered": ("1", [float(sum(r.recovery_s is None for r in results))]),
        "calm_step": ("s", [r.calm_s for r in results]),
        "loss_to_step": ("s", [r.lost_s for r in results if r.lost_s is not None]),
        "switch": ("s", [s for r in results for s in r.switches_s]),
        "reschedule": ("s", [s for r in results for s in r.rescheduled_s]),
    }
    for metric, (unit, samples) in values.items():
        if samples:
            yield Row(name, "adapter" if adapts else "without", metric, unit, Samples(samples))


def verdict(
    found: dict[tuple[str, bool], list[Trouble]], agree: Sequence[bool]
) -> dict[str, Metric]:
    ours = [result for (_, adapts), results in found.items() if adapts for result in results]
    lost = [r.lost_s for results in found.values() for r in results if r.lost_s is not None]
    pairs = [
        pair
        for name, adapts in found
        if adapts and (name, False) in found
        for pair in zip(found[name, True], found[name, False], strict=True)
    ]
    own_s, their_s = (sum(r.late_s for r in some) for some in zip(*pairs, strict=True))
    recoveries = [r.recovery_s for r in ours if r.recovery_s is not None]
    shares = [own.calm_s / their.calm_s - 1 for own, their in pairs]
    return {
        "testbed_late": Metric(round(own_s, 2), "s", f"< {their_s:.2f} without", own_s < their_s),
        "testbed_recovered": Metric(
            len(recoveries), "1", f"= {len(ours)}", len(recoveries) == len(ours)
        ),
        "testbed_recovery_worst": Metric(
            round(max(recoveries, default=0.0), 2), "s", "reported only", None
        ),
        "testbed_loss_to_step": Metric(
            round(max(lost), 2) if lost else None, "s", "<= 5", max(lost) <= 5 if lost else None
        ),
        "testbed_losses_agree": Metric(float(all(agree)), "1", "= 1", all(agree)),
        "testbed_hook_cost": Metric(
            round(100 * median(shares), 2) if shares else None, "%", "reported only", None
        ),
    }


# ------------------------------------------------------------ switches


def switching(place: Place, *, is_quick: bool) -> tuple[list[Row], dict[str, Metric]]:
    """Measures switches and new orders of transfers by hand, under the medium's full rate."""
    predict, bank = prepared(place, TRAIN, is_fresh=False)
    other = [plan for plan in bank if placed(plan) != placed(bank[0])]
    plans = (fastest(predict, bank, Conditions())[1], other[0], other[-1])
    place.write(workload=TRAIN, bank=plans, requests=10 if is_quick else 40)
    told = run_job(place, "switch")
    seconds = Samples([e["seconds"] for e in told.events if e["event"] == "switch"])
    orders = Samples([e["seconds"] for e in told.events if e["event"] == "reschedule"] or [0.0])
    moved = Samples([e["num_bytes"] / 1e6 for e in told.events if e["event"] == "switch"])
    step_s = median(s["end_s"] - s["start_s"] for s in told.steps)
    worst_s = max(seconds.values)
    rows = [
        Row("by hand", "adapter", "switch", "s", seconds),
        Row("by hand", "adapter", "switch_to_rank_0", "MB", moved),
        Row("by hand", "adapter", "reschedule", "s", orders),
        Row("by hand", "adapter", "step", "s", Samples([step_s])),
    ]
    print(f"switches by hand: {seconds} s, worst {worst_s:.2f}; new orders {orders} s")
    return rows, {
        "testbed_switch_median": Metric(
            round(seconds.median, 3), "s", "<= 2", seconds.median <= 2.0
        ),
        "testbed_switch_worst": Metric(round(worst_s, 3), "s", "<= 2", worst_s <= 2.0),
        "testbed_reschedule": Metric(
            round(max(orders.values), 4), "s", f"< {step_s:.3f}", max(orders.values) < step_s
        ),
    }


# ------------------------------------------------------------ mixing


def mixing(place: Place, *, is_quick: bool) -> tuple[list[Row], dict[str, Metric]]:
    """Serves requests whose average time is bounded: with single plans, and with a mix."""
    predict, bank = prepared(place, SERVE, is_fresh=False)
    found = sorted(((f.energy_j, f.time_s, i) for i, plan in enumerate(bank)
                    if (f := predict(plan, Conditions()))))  # fmt: skip
    frugal = found[0]
    faster = [x for x in found if x[1] < 0.8 * frugal[1]]
    if not faster:
        print("mixing: no plan is faster than the most frugal one")
        return [], {}
    bound_s = (frugal[1] + faster[0][1]) / 2
    single = next(x for x in found if x[1] <= bound_s)
    qoe = QoE(latency_s=bound_s, objective="energy")
    plans = (bank[single[2]], bank[frugal[2]], *bank)
    requests = 10 if is_quick else 25
    place.write(workload=SERVE, qoe=qoe, bank=plans, requests=requests)
    told = run_job(place, "serve")
    results = {
        name: [served(place.testbed, told, f"{name} {turn}") for turn in range(SERVING_TURNS)]
        for name in ("single", "frugal", "mix")
    }
    times = {name: Samples([t for seconds, _ in r for t in seconds]) for name, r in results.items()}
    joules = {name: Samples([j for _, j in r]) for name, r in results.items()}
    over = {name: fmean(seconds.values) / bound_s for name, seconds in times.items()}
    for name in results:
        print(f"serving, {name}: {times[name]} s of {bound_s:.3f} s on average "
              f"{over[name]:.4f} of it, {joules[name]} J")  # fmt: skip
    turn_s = [s["turn_s"] for s in told.steps if "turn_s" in s]
    held = [e["seconds"] for e in told.events if e["event"] == "hold"]
    pairs = zip(joules["mix"].values, joules["single"].values, strict=True)
    energy = Samples([mixed / alone for mixed, alone in pairs])
    rows = [Row("serving", name, "request", "s", seconds) for name, seconds in times.items()]
    rows += [Row("serving", name, "modelled_energy", "J", found) for name, found in joules.items()]
    rows += [Row("serving", name, "average_over_bound", "1", Samples([value]))
             for name, value in over.items()]  # fmt: skip
    rows.append(Row("serving", "mix", "energy_over_single", "1", energy))
    rows.append(Row("serving", "mix", "turn", "s", Samples(turn_s)))
    rows += [Row("serving", "mix", "hold", "s", Samples(held))] if held else []
    return rows, {
        "testbed_mix_average_over_bound": Metric(
            round(over["mix"], 4), "1", "<= 1.02", over["mix"] <= 1.02
        ),
        "testbed_mix_energy_over_single": Metric(
            round(energy.median, 4), "1", "< 1", energy.median < 1
        ),
        "testbed_turn": Metric(round(1e3 * median(turn_s), 4), "ms", "reported only", None),
    }


def served(testbed: Devices, told: Told, phase: str) -> tuple[list[float], float]:
    """Returns seconds of a phase's requests, as their first device saw them, and joules of one.

    A device counts while a request runs on a plan that it is part of, as planned.
    """
    mine = [s for s in told.steps if s.get("phase") == phase and s["is_first"]]
    window = mine[0]["start_s"], mine[-1]["end_s"]
    times = [s["end_s"] - s["start_s"] for s in mine]
    joules = 0.0
    for usage in testbed.activity(window).usage:
        device = testbed.cluster.device(usage.device)
        here_s = sum(t for t, s in zip(times, mine, strict=True) if usage.device in s["devices"])
        joules += device.idle_w * here_s
        if here_s:
            joules += (device.busy_w - device.idle_w) * min(usage.busy_s, here_s)
            joules += device.tx_j_per_byte * usage.sent_bytes
            joules += device.rx_j_per_byte * usage.received_bytes
    return times, joules / len(mine)


def run(*, is_quick: bool) -> tuple[list[Row], dict[str, Metric]]:
    """Returns all that was measured, and what it is held to."""
    header = ["what happens", "step before", "best plan then", "late", "recovered after",
              "switches, s", "lost to step"]  # fmt: skip
    with TemporaryDirectory() as folder, Devices() as testbed:
        print(testbed.summary)
        place = Place(Path(folder), testbed)
        save(testbed.cluster, place.folder / "cluster.json")
        rows, metrics = live(place, Table(header, width=(28, 18)), is_quick=is_quick)
        for part in (switching, mixing):
            more, bounds = part(place, is_quick=is_quick)
            rows, metrics = [*rows, *more], {**metrics, **bounds}
    return rows, metrics
