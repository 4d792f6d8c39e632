"""Random clusters, models and workloads for bench_planner, each drawn from one seed.

`small` is small enough to try every plan; `home` is the cluster of the design's estimate, four
devices on one Wi-Fi channel; `campus` is large, with few kinds of devices, as in reality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from random import Random
from typing import Any, NamedTuple

from dora.catalog import tables
from dora.spec import (
    BlockCost,
    BlockProfile,
    Cluster,
    Device,
    Link,
    Medium,
    ModelProfile,
    PowerMode,
    QoE,
    Timing,
    Workload,
)

WIFI_BYTES_PER_S = 20e6
GIGABIT_BYTES_PER_S = 117e6
SIZES = (1, 64)  # rows of a profile; between them time is linear
LOOSE_BYTES = 10**12


class Instance(NamedTuple):
    """One planning problem.

    Attributes:
        objective: 'time' or 'energy'.
        slack: The other objective may be at most so many times its least value; None: unbounded.
        text: What sort of problem it is.
    """

    seed: int
    profile: ModelProfile
    cluster: Cluster
    workload: Workload
    objective: str
    slack: float | None
    text: str

    def qoe(self, least_s: float, least_j: float) -> QoE:
        """Returns the objective and its bound, given the least time and energy of any plan."""
        if self.slack is None:
            return QoE(objective=self.objective)
        if self.objective == "time":
            return QoE(objective="time", energy_j=self.slack * least_j)
        field = "step_s" if self.workload.kind == "train" else "latency_s"
        return QoE(objective="energy", **{field: self.slack * least_s})


class Machine(NamedTuple):
    """What a random device is like; twins have the same one."""

    speed: float
    per_block: tuple[float, ...]  # factors of its time
    fields: Mapping[str, Any]


# ------------------------------------------------------------ small


def small(seed: int) -> Instance:
    """Draws 3 to 5 devices and 4 to 8 blocks; kinds and networks take turns with the seed."""
    rng = Random(seed)
    n, num_blocks = rng.choice([3, 4, 4, 5]), rng.randint(4, 8)
    objective = ("time", "time", "energy")[seed % 3]
    kind = ("train", "infer", rng.choice(["train", "infer"]))[seed % 3]
    network = ("shared", "private", "mixed")[seed // 3 % 3]
    is_tight = seed // 9 % 3 == 0
    has_modes = n <= 4 and rng.random() < 0.25
    machines = draw_machines(rng, n, num_blocks, spread=8.0, has_modes=has_modes)
    batch = rng.choice([4, 8, 16] if kind == "train" else [1, 4, 8, 16])
    rate = {"shared": WIFI_BYTES_PER_S / 2}.get(network, WIFI_BYTES_PER_S)
    profile = draw_profile(
        rng, machines, num_blocks, rate=rate, ratio=log_uniform(rng, 0.05, 3.0), batch=batch
    )
    if is_tight:
        machines = tighten(rng, machines, profile, batch, is_training=kind == "train")
    devices = [Device(name=f"d{i}", **machine.fields) for i, machine in enumerate(machines)]
    source = rng.choice(devices).name if kind == "infer" and rng.random() < 0.6 else None
    slack = rng.choice([1.05, 1.3, 2.0]) if rng.random() < 0.3 else None
    marks = ["tight"] * is_tight + ["modes"] * has_modes + ["source"] * (source is not None)
    marks += [f"slack {slack}"] if slack else []
    return Instance(
        seed,
        profile,
        NETWORKS[network](rng, devices),
        Workload(kind=kind, batch_size=batch, source=source),
        objective,
        slack,
        " ".join([f"{n}x{num_blocks} {network} {kind} {objective}", *marks]),
    )


def draw_machines(
    rng: Random, n: int, num_blocks: int, *, spread: float, has_modes: bool = False
) -> list[Machine]:
    """Draws devices of up to `spread` times the slowest one's speed, three in ten of them twins."""
    machines: list[Machine] = []
    while len(machines) < n:
        if machines and rng.random() < 0.3:
            machines.append(rng.choice(machines))
            continue
        speed = log_uniform(rng, 1.0, spread)
        idle_w = rng.uniform(0.5, 6.0)
        modes: tuple[PowerMode, ...] = ()
        if has_modes and sum(bool(m.fields["power_modes"]) for m in machines) < 2:
            modes = (
                PowerMode(
                    name="eco",
                    speed_factor=rng.uniform(0.4, 0.8),
                    power_factor=rng.uniform(0.2, 0.6),
                ),
            )
        fields = {
            "flops_per_s": 1e12,
            "mem_bandwidth_bytes_per_s": 3e10,
            "memory_bytes": LOOSE_BYTES,
            "idle_w": idle_w,
            # Fast devices need more power, and some need much less for the same work.
            "busy_w": idle_w + speed * log_uniform(rng, 1.5, 9.0),
            "tx_j_per_byte": rng.choice([0.0, log_uniform(rng, 1e-8, 3e-7)]),
            "rx_j_per_byte": rng.choice([0.0, log_uniform(rng, 1e-8, 1e-7)]),
            "power_modes": modes,
        }
        uneven = rng.random() < 0.5
        factors = [rng.uniform(0.8, 1.25) if uneven else 1.0 for _ in range(num_blocks)]
        machines.append(Machine(speed, tuple(factors), fields))
    return machines


def draw_profile(
    rng: Random,
    machines: Sequence[Machine],
    num_blocks: int,
    *,
    rate: float,
    ratio: float,
    batch: int,
) -> ModelProfile:
    """Draws uneven blocks.

    Args:
        machines: Named d0, d1, ... in the profile.
        rate: Bytes per second between two devices.
        ratio: Seconds to send the mean output, over those of the model on all devices together.
        batch: Samples whose outputs the gradients are drawn against.
    """
    work_s = [0.05 / num_blocks * math.exp(rng.gauss(0, 0.6)) for _ in range(num_blocks)]
    overhead_s = rng.choice([0.0, 0.02, 0.2]) * sum(work_s) / num_blocks
    backward = rng.uniform(1.5, 2.5)
    mean_bytes = ratio * rate * sum(work_s) / sum(m.speed for m in machines)
    outputs = [mean_bytes * math.exp(rng.gauss(-0.3, 0.8)) for _ in range(num_blocks)]
    gradients = log_uniform(rng, 0.1, 10.0) * mean_bytes * batch
    weights = [math.exp(rng.gauss(0, 0.8)) for _ in range(num_blocks)]
    kept = [rng.uniform(1.0, 6.0) for _ in range(num_blocks)]
    blocks = []
    for b in range(num_blocks):
        params = int(gradients * weights[b] / sum(weights)) // 4 + 1
        blocks.append(
            BlockProfile(
                name=f"block{b}",
                num_params=params,
                param_bytes=4 * params,
                trainable_bytes=4 * params,
                costs=tuple(
                    BlockCost(
                        microbatch_size=size,
                        flops=1,
                        activation_bytes=int(kept[b] * outputs[b] * size),
                        output_bytes=int(outputs[b] * size) + 1,
                        timings=_timings(machines, b, overhead_s + work_s[b] * size, backward),
                    )
                    for size in SIZES
                ),
            )
        )
    return ModelProfile(blocks=tuple(blocks), input_bytes=int(outputs[0] * rng.uniform(0.2, 2)) + 1)


def _timings(
    machines: Sequence[Machine], block: int, seconds: float, backward: float
) -> tuple[Timing, ...]:
    found = []
    for i, machine in enumerate(machines):
        own_s = seconds * machine.per_block[block] / machine.speed
        found.append(Timing(device=f"d{i}", forward_s=own_s, backward_s=own_s * backward))
    return tuple(found)


def tighten(
    rng: Random,
    machines: Sequence[Machine],
    profile: ModelProfile,
    batch: int,
    *,
    is_training: bool,
) -> list[Machine]:
    """Gives devices 20 to 80 % of what one alone would need, and all together 1.2 times that."""
    state = sum(b.param_bytes for b in profile.blocks) * (4 if is_training else 1)
    kept = sum(b.costs[0].activation_bytes for b in profile.blocks) * batch
    largest = max(b.costs[0].output_bytes + b.costs[0].activation_bytes for b in profile.blocks)
    need = state + (kept if is_training else largest * batch)
    by_machine = {machine: rng.uniform(0.2, 0.8) for machine in map(id, machines)}
    shares = [by_machine[id(machine)] for machine in machines]
    scale = max(1.0, 1.2 / sum(shares))
    return [
        machine._replace(fields={**machine.fields, "memory_bytes": int(need * share * scale) + 1})
        for machine, share in zip(machines, shares, strict=True)
    ]


def log_uniform(rng: Random, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


# ------------------------------------------------------------ networks


def contention() -> tuple[float, ...]:
    """Returns the catalogue's curve of a Wi-Fi channel, for 1, 2, ... flows."""
    rows = tables.rows("wifi_contention.csv")
    known = {int(row["k_flows"]): float(row["eta_dcf_ampdu4ms"]) for row in rows}
    curve, last = [], 1.0
    for flows in range(1, max(known) + 1):
        last = known.get(flows, last)
        curve.append(last)
    return tuple(curve)


def wifi(name: str, rate: float = WIFI_BYTES_PER_S, latency_s: float = 0.001) -> Medium:
    return Medium(name=name, rate_bytes_per_s=rate, latency_s=latency_s, contention=contention())


def shared(rng: Random, devices: Sequence[Device]) -> Cluster:
    """One Wi-Fi channel; every message crosses it twice, by the access point."""
    pairs = permutations([d.name for d in devices], 2)
    return Cluster(
        devices=tuple(devices),
        media=(wifi("wifi", latency_s=rng.choice([0.0, 0.001])),),
        links=tuple(Link(src=a, dst=b, media=("wifi", "wifi")) for a, b in pairs),
    )


def private(rng: Random, devices: Sequence[Device]) -> Cluster:
    """A medium for each direction of each pair, of different rates; one in four lacks a link."""
    pairs = list(permutations([d.name for d in devices], 2))
    if rng.random() < 0.25:
        pairs.remove(rng.choice(pairs))
    latency_s = rng.choice([0.0, 0.001])
    media = tuple(
        Medium(
            name=f"{a}>{b}",
            rate_bytes_per_s=WIFI_BYTES_PER_S * 2 ** rng.uniform(-1.5, 1.5),
            latency_s=latency_s,
        )
        for a, b in pairs
    )
    links = tuple(Link(src=a, dst=b, media=(f"{a}>{b}",)) for a, b in pairs)
    return Cluster(devices=tuple(devices), media=media, links=links)


def mixed(rng: Random, devices: Sequence[Device]) -> Cluster:
    """At least two devices on Wi-Fi, the others on ports of the switch behind it."""
    names = [d.name for d in devices]
    on_wifi = set(rng.sample(names, rng.randint(2, len(names) - 1)))
    rate = WIFI_BYTES_PER_S * rng.choice([1.0, 2.0, 5.0])
    ports = [
        Medium(name=f"{name}-{way}", rate_bytes_per_s=rate)
        for name in names
        if name not in on_wifi
        for way in ("up", "down")
    ]
    links = tuple(
        Link(
            src=a,
            dst=b,
            media=("wifi" if a in on_wifi else f"{a}-up", "wifi" if b in on_wifi else f"{b}-down"),
        )
        for a, b in permutations(names, 2)
    )
    return Cluster(devices=tuple(devices), media=(wifi("wifi"), *ports), links=links)


NETWORKS = {"shared": shared, "private": private, "mixed": mixed}


def as_if_private(cluster: Cluster, *, relayed: bool = True) -> Cluster:
    """Returns the cluster as a contention-blind planner sees it: each link alone, as measured.

    Not `relayed`, each link has the rate of the channel, as a data sheet gives it.
    """
    media = {medium.name: medium for medium in cluster.media}
    links, copies = [], []
    for link in cluster.links:
        own = {name: f"{link.src}>{link.dst} {name}" for name in link.media}
        for name, copy in own.items():
            copies.append(media[name].model_copy(update={"name": copy, "contention": (1.0,)}))
        crossed = link.media if relayed else tuple(dict.fromkeys(link.media))
        links.append(link.model_copy(update={"media": tuple(own[name] for name in crossed)}))
    return cluster.model_copy(update={"media": tuple(copies), "links": tuple(links)})


# ------------------------------------------------------------ home, campus


def home(seed: int) -> tuple[Instance, float]:
    """Draws four devices on one Wi-Fi channel and six blocks to train.

    Returns:
        The problem, and the seconds to send a mean output over those of the forward pass on all
        devices together. At 20 MB/s, relayed, BERT-base on four laptops has about 2 and ResNet-50
        about 10, cut behind its first stages.
    """
    rng = Random(seed)
    ratio = log_uniform(rng, 0.1, 10.0)
    machines = draw_machines(rng, 4, 6, spread=8.0)
    rate = WIFI_BYTES_PER_S / 2
    profile = draw_profile(rng, machines, 6, rate=rate, ratio=ratio, batch=30)
    devices = [Device(name=f"d{i}", **machine.fields) for i, machine in enumerate(machines)]
    # Of 30 samples the planner also tries six micro-batches if it may choose.
    workload = Workload(kind="train", batch_size=30, num_microbatches=6)
    return Instance(seed, profile, shared(rng, devices), workload, "time", None, "home"), ratio


def campus(num_devices: int, num_blocks: int, seed: int = 0) -> Instance:
    """Draws a Wi-Fi channel for every eight devices, joined by a wire; five kinds of devices.

    Of each channel's place, every fourth device is on a gigabit port instead.
    """
    rng = Random(seed)
    kinds: list[Machine] = []
    while len({id(kind) for kind in kinds}) < 5:
        kinds = draw_machines(rng, 8, num_blocks, spread=16.0)
    machines = [rng.choice(kinds) for _ in range(num_devices)]
    profile = draw_profile(
        rng, machines, num_blocks, rate=WIFI_BYTES_PER_S / 2, ratio=1.0, batch=64
    )
    kept = sum(b.costs[-1].activation_bytes for b in profile.blocks)
    need = 4 * sum(b.param_bytes for b in profile.blocks) + kept
    devices = [
        # None can train the model alone.
        Device(name=f"d{i}", **{**machine.fields, "memory_bytes": need // 3})
        for i, machine in enumerate(machines)
    ]
    place = {d.name: i // 8 for i, d in enumerate(devices)}
    media = [wifi(f"wifi{p}") for p in sorted(set(place.values()))]
    media += [
        Medium(name=f"wire{p}", rate_bytes_per_s=GIGABIT_BYTES_PER_S, latency_s=0.0002)
        for p in sorted(set(place.values()))
    ]
    wired = {d.name for i, d in enumerate(devices) if i % 4 == 3}
    media += [
        Medium(name=f"{name}-{way}", rate_bytes_per_s=GIGABIT_BYTES_PER_S)
        for name in sorted(wired)
        for way in ("up", "down")
    ]

    def route(a: str, b: str) -> tuple[str, ...]:
        out = f"{a}-up" if a in wired else f"wifi{place[a]}"
        into = f"{b}-down" if b in wired else f"wifi{place[b]}"
        between = () if place[a] == place[b] else (f"wire{place[a]}", f"wire{place[b]}")
        return (out, *between, into)

    names = [d.name for d in devices]
    links = tuple(Link(src=a, dst=b, media=route(a, b)) for a, b in permutations(names, 2))
    return Instance(
        seed,
        profile,
        Cluster(name="campus", devices=tuple(devices), media=tuple(media), links=links),
        Workload(kind="train", batch_size=64),
        "time",
        None,
        f"{num_devices} x {num_blocks}",
    )
