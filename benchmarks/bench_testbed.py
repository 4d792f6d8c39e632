"""What the testbed emulates against what it says: rates of media and shares of the processor.

**Rates**: sockets in the namespaces of two devices carry data for seconds, with the congestion
control that the machine has; the goodput counts from the first byte to the last that arrive. A path
may carry what its media do; one that names a medium twice, as between two devices of a Wi-Fi
channel, half of it. Two flows that share a medium are counted while both run; the bytes that
both carry across it, each as often as it crosses it, may be its rate.

**Shares**: a loop on a device against its part of a core, as the process itself counts it, on one
device alone and on all at once.

Round trips, and the time to build and to remove a testbed, are for information. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from common import Metric, Row, Samples, Table, finish, write_csv

from dora import catalog
from dora.spec import Cluster, Device, Link, Medium
from dora.testbed import Testbed, why_not
from dora.testbed.scale import core_flops_per_s

WORKER = Path(__file__).with_name("testbed_worker.py")
RATE_BOUND, TOGETHER_BOUND, SHARE_BOUND = 0.03, 0.05, 0.03
SHARES = (0.8, 0.4, 0.2, 0.1)
PINGS = 200
LIMIT_S = 60.0
_ports = count(30000)

Arrived = list[tuple[float, int]]  # seconds on the machine's clock, bytes so far


class Case(NamedTuple):
    """Flows (source, destination) at once, on a catalogue cluster at a scale of its rates."""

    name: str
    scenario: str
    network: float
    flows: tuple[tuple[str, str], ...]
    shared: str = ""


def _cases(network: float) -> list[Case]:
    wifi, port = ("phone-a", "laptop"), ("agx", "nx")
    return [
        Case("Wi-Fi, relayed", "smart-home-1", network, (wifi,)),
        Case("Wi-Fi, two flows", "smart-home-1", network, (wifi, ("phone-b", "mini-pc")), "wifi"),
        Case("Wi-Fi, both ways", "smart-home-1", network, (wifi, wifi[::-1]), "wifi"),
        Case("port", "edge-cluster", network, (port,)),
        Case("port, both ways", "edge-cluster", network, (port, port[::-1])),
        Case("port, two flows", "edge-cluster", network, (port, ("agx", "gpu-box")), "agx.up"),
        Case("Wi-Fi to port", "smart-home-2", network, (("phone", "hub"),)),
        Case("uplink", "traffic", network, (("camera-north", "edge-box"),)),
        Case(
            "uplink, two flows",
            "traffic",
            network,
            (("camera-north", "edge-box"), ("cabinet-nx", "edge-box")),
            "street.up",
        ),
    ]


# ------------------------------------------------------------ processes


def start(testbed: Testbed, device: str, *words: object) -> subprocess.Popen[str]:
    """Starts the worker on a device."""
    return testbed.spawn(
        testbed.position(device),
        [sys.executable, str(WORKER), *map(str, words)],
        os.environ,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """Returns what a worker measured."""
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, f"{process.args} ended with {process.returncode}"
    return json.loads(printed)


def pair(testbed: Testbed, flow: tuple[str, str], here: str, there: str, arguments: object) -> Any:
    """Starts the worker on both ends of a flow: (source, destination)."""
    port = next(_ports)
    listening = start(testbed, flow[1], there, port)
    address = testbed.address(testbed.position(flow[1]))
    return start(testbed, flow[0], here, address, port, arguments), listening


# ------------------------------------------------------------ rates


def flows_at_once(testbed: Testbed, case: Case, duration_s: float) -> list[Arrived]:
    """Returns what arrived of every flow over time."""
    ends = [pair(testbed, flow, "send", "receive", duration_s) for flow in case.flows]
    arrived = [answer(there) for _, there in ends]
    for here, _ in ends:
        answer(here)
    return arrived


def goodputs(arrived: Sequence[Arrived]) -> list[float]:
    """Returns bytes per second of every flow, while all were running."""
    begin_s, end_s = max(s[0][0] for s in arrived), min(s[-1][0] for s in arrived)
    return [(_at(s, end_s) - _at(s, begin_s)) / (end_s - begin_s) for s in arrived]


def _at(samples: Arrived, at_s: float) -> float:
    """Returns the bytes until a time, interpolated."""
    after = next(i for i, sample in enumerate(samples) if sample[0] >= at_s)
    (a_s, a), (b_s, b) = samples[max(after - 1, 0)], samples[after]
    return b if b_s == a_s else a + (b - a) * (at_s - a_s) / (b_s - a_s)


def ratios(testbed: Testbed, case: Case, rates: Sequence[float]) -> list[float]:
    """Returns goodput / what the testbed says, of every flow or of the medium that they share."""
    media = {link[:2]: link[2] for link in _links(testbed.cluster)}
    if case.shared:
        crossings = [media[flow].count(case.shared) for flow in case.flows]
        carried = sum(rate * n for rate, n in zip(rates, crossings, strict=True))
        return [carried / _rate(testbed.cluster, case.shared)]
    paths = [testbed.cluster.path(*flow) for flow in case.flows]
    return [rate / path[0] for rate, path in zip(rates, paths, strict=True) if path]


def _links(cluster: Cluster) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(link.src, link.dst, link.media) for link in cluster.links]


def _rate(cluster: Cluster, medium: str) -> float:
    return next(m.rate_bytes_per_s for m in cluster.media if m.name == medium)


def measure_rates(
    cases: Sequence[Case], repeats: int, duration_s: float
) -> tuple[list[Row], dict[str, Metric]]:
    """Returns rows and bounds of all cases; those of one cluster share a testbed."""
    rows, metrics = [], {}
    table = Table(["flows", "Mbit/s", "of the rate, %"])
    for key in dict.fromkeys((case.scenario, case.network) for case in cases):
        cluster = catalog.scenario(key[0]).cluster
        with open_testbed(cluster, key[1]) as testbed:
            for case in (case for case in cases if (case.scenario, case.network) == key):
                runs = [goodputs(flows_at_once(testbed, case, duration_s)) for _ in range(repeats)]
                found = [ratios(testbed, case, rates) for rates in runs]
                name = f"{case.name}, rates x{case.network:g}"
                medians = [statistics.median(column) for column in zip(*found, strict=True)]
                worst = max(medians, key=lambda ratio: abs(ratio - 1))
                shown = Samples([sum(rates) * 8e-6 for rates in runs])
                share = Samples([100 * ratio[medians.index(worst)] for ratio in found])
                table.line(name, str(shown), str(share))
                rows.append(Row(name, "testbed", "goodput", "Mbit/s", shown))
                rows.append(Row(name, "testbed", "goodput_of_rate", "%", share))
                bound = TOGETHER_BOUND if len(case.flows) > 1 else RATE_BOUND
                metrics[_metric(name)] = Metric(
                    round(worst, 4), "of the rate", f"1 +- {bound}", abs(worst - 1) <= bound
                )
    return rows, metrics


def _metric(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


def open_testbed(cluster: Cluster, network: float) -> Testbed:
    """Returns a testbed of devices that are slow and alike, as nobody computes on them."""
    core = core_flops_per_s()
    slow = [d.model_copy(update={"flops_per_s": core, "efficiency": 0.05}) for d in cluster.devices]
    return Testbed(
        cluster.model_copy(update={"devices": tuple(slow)}), scale=1.0, network_factor=network
    )


# ------------------------------------------------------------ shares of the processor


def share_cluster() -> Cluster:
    """Returns devices of which each has its share of a core."""
    names = [f"d{i}" for i in range(len(SHARES))]
    return Cluster(
        devices=tuple(
            Device(
                name=name,
                flops_per_s=share * 1e9,
                efficiency=1.0,
                mem_bandwidth_bytes_per_s=1e9,
                memory_bytes=10**9,
            )
            for name, share in zip(names, SHARES, strict=True)
        ),
        media=(Medium(name="wifi", rate_bytes_per_s=1e7),),
        links=tuple(Link(src=a, dst=b, media=("wifi",)) for a in names for b in names if a != b),
    )


def measure_shares(repeats: int, duration_s: float) -> tuple[list[Row], dict[str, Metric]]:
    """Returns rows and bounds of a busy process's share of a core."""
    rows, metrics = [], {}
    table = Table(["share of a core", "alone, points off", "all busy, points off"])
    # The lowest of a few: the shares of all must fit what the testbed itself measures.
    scale = core_flops_per_s() / 1e9
    with Testbed(share_cluster(), scale=scale) as testbed:
        testbed.limit()
        names = [device.name for device in testbed.cluster.devices]
        alone: dict[str, list[float]] = {name: [] for name in names}
        together: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                alone[name].append(answer(start(testbed, name, "spin", duration_s)))
            busy = {name: start(testbed, name, "spin", duration_s) for name in names}
            for name, process in busy.items():
                together[name].append(answer(process))
        for name, share in zip(names, testbed.cores, strict=True):
            off = [
                Samples([100 * (got - share) for got in kind[name]]) for kind in (alone, together)
            ]
            table.line(f"{share:.3f}", *map(str, off))
            for kind, samples in zip(("alone", "together"), off, strict=True):
                label = SHARES[names.index(name)]
                rows.append(Row(f"share {label:g}, {kind}", "testbed", "error", "points", samples))
                metrics[f"share_{label:g}_{kind}"] = Metric(
                    round(samples.median / 100, 4),
                    "cores off",
                    f"within {SHARE_BOUND}",
                    abs(samples.median / 100) <= SHARE_BOUND,
                )
    return rows, metrics


# ------------------------------------------------------------ for information


def measure_rest(repeats: int) -> list[Row]:
    """Returns round trips, and what it takes to build and remove a testbed."""
    rows = []
    table = Table(["for information", "round trip, ms", "build, s", "remove, s"])
    for scenario, flow in (
        ("smart-home-1", ("phone-a", "laptop")),
        ("edge-cluster", ("agx", "nx")),
        ("traffic", ("camera-north", "edge-box")),
    ):
        build, remove, trips = [], [], []
        for _ in range(repeats):
            testbed = open_testbed(catalog.scenario(scenario).cluster, 0.1)
            start_s = time.monotonic()
            with testbed:
                build.append(time.monotonic() - start_s)
                here, there = pair(testbed, flow, "ping", "echo", PINGS)
                trips += [1e3 * seconds for seconds in answer(here)]
                answer(there)
                start_s = time.monotonic()
            remove.append(time.monotonic() - start_s)
        found = [Samples(values) for values in (trips, build, remove)]
        table.line(f"{scenario}, rates x0.1", *map(str, found))
        names = (("round_trip", "ms"), ("build", "s"), ("remove", "s"))
        rows += [
            Row(scenario, "testbed", *name, values)
            for name, values in zip(names, found, strict=True)
        ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases, one short run of each")
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    if reason := why_not():
        return finish({"testbed": Metric(None, "", "", None, f"the testbed {reason}")})
    cases = [*_cases(0.02), *_cases(0.1), *_cases(1.0)[:2]]
    if options.quick:
        cases = [case for case in _cases(0.1) if "both" not in case.name]
    repeats, duration_s = (1, 2.0) if options.quick else (5, 3.0)
    rows, metrics = measure_rates(cases, repeats, duration_s)
    more_rows, more_metrics = measure_shares(repeats, 1.0 if options.quick else 3.0)
    rows += [*more_rows, *measure_rest(repeats)]
    if options.out:
        write_csv(options.out, rows)
    return finish(metrics | more_metrics)


if __name__ == "__main__":
    sys.exit(main())
