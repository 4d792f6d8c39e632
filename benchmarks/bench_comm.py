"""Dora's communication engine against gloo and raw TCP: rate, round trip, priority, CPU.

Contenders live in the same processes, one per node, and take turns. Nodes are this machine's
loopback or network namespaces with shaped links (netns.py). Each number is the median of several
turns after a discarded one; ratios are taken per pair of neighbouring turns.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from comm_ranks import Ranks, Transfer
from comm_report import KIB, LINK_SIZES, LOOPBACK_SIZES, MIB, Report, size_name
from common import Samples, finish, paired_ratio, write_csv
from netns import LOOPBACK, private_link, shared_medium, why_not

GLOO, GLOO2, RAW, DORA, BARE = "gloo", "gloo, second group", "raw TCP", "dora", "dora, header only"
EARLY = "gloo, early receives"
ALONE = "dora, bulk alone"
ENGINES = {DORA: {"protection": "checksum"}, BARE: {"protection": "header"}}
URGENT_BYTES = 4 * KIB


@dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
        turns: Of each contender, after one that does not count; more of them on loopback, where
            they are short and vary.
        link_sizes: Messages of streams over links, and `stream_s` how long a stream takes.
        loopback_bytes: Of a stream over loopback.
        bulk_bytes: What an urgent message has to get past, `urgent_s` after its start.
        pair_bytes: Of each of two devices.
        receive_s: When a late receive is posted.
        pipeline_turns: Training steps, after `pipeline_warm_up` that do not count.
    """

    turns: int
    loopback_turns: int
    link_sizes: Sequence[int]
    stream_s: float
    loopback_bytes: int
    bulk_bytes: int
    urgent_s: float
    pair_bytes: int
    receive_s: float
    pipeline_turns: int
    pipeline_warm_up: int


FULL = Effort(
    turns=5,
    loopback_turns=15,
    link_sizes=LINK_SIZES,
    stream_s=1.0,
    loopback_bytes=512 * MIB,
    bulk_bytes=32 * MIB,
    urgent_s=0.5,
    pair_bytes=8 * MIB,
    receive_s=0.8,
    pipeline_turns=5,
    pipeline_warm_up=1,
)
QUICK = Effort(
    turns=1,
    loopback_turns=2,
    link_sizes=LINK_SIZES[:2],
    stream_s=0.15,
    loopback_bytes=64 * MIB,
    bulk_bytes=5 * MIB,
    urgent_s=0.2,
    pair_bytes=2 * MIB,
    receive_s=0.3,
    pipeline_turns=1,
    pipeline_warm_up=0,
)


# ------------------------------------------------------------ scenarios


@dataclass(frozen=True)
class Bench:
    """Ranks on one kind of link, and where results go."""

    ranks: Ranks
    link: str  # as in the names of bounds
    effort: Effort
    report: Report

    @property
    def label(self) -> str:
        return f"{self.link} {self.ranks.congestion_control}"

    def turns(
        self,
        names: Sequence[str],
        act: Callable[[str], Sequence[float]],
        *,
        turns: int = 0,
        warm_up: int = 1,
    ) -> list[dict[str, Samples]]:
        """Lets contenders act in turns; returns for each number that they give its samples."""
        taken: dict[str, list[Sequence[float]]] = {name: [] for name in names}
        for turn in range(warm_up + (turns or self.effort.turns)):
            for name in names[:: -1 if turn % 2 else 1]:
                values = act(name)
                if turn >= warm_up:
                    taken[name].append(values)
        columns = {name: list(zip(*values, strict=True)) for name, values in taken.items()}
        return [
            {name: Samples(of[i]) for name, of in columns.items()}
            for i in range(len(columns[names[0]]))
        ]

    def stream(self, name: str, *, size: int, total: int) -> tuple[float, float]:
        """Returns MB/s, and CPU seconds per GB of both ranks together."""
        count = max(1, round(total / size))
        played = self.ranks.play(name, [Transfer(0, 1, size)] * count)
        return count * size / played.span_s / 1e6, played.cpu_s / (count * size) * 1e9


def bulk(bench: Bench, names: Sequence[str], sizes: Sequence[int], total: int, peer: str) -> None:
    """Streams of equal messages, all posted at once; CPU is that of the largest size."""
    for size in sizes:
        act = partial(bench.stream, size=size, total=max(size, total))
        rates, cpu = bench.turns(names, act)
        case = f"{bench.label}, {size_name(size)}"
        bench.report.add(case, "rate", "MB/s", rates)
        for name, suffix in {DORA: "", BARE: "_header_only"}.items():
            if name in names:
                bound = f"bulk_{bench.link}_{size_name(size)}{suffix}"
                bench.report.check(bound, paired_ratio(rates[name], rates[peer]))
    bench.report.add(case, "CPU", "s/GB", cpu)
    bench.report.check(f"cpu_{bench.link}", paired_ratio(cpu[DORA], cpu[GLOO]))


def round_trips(bench: Bench, names: Sequence[str], count: int) -> None:
    def act(name: str) -> list[float]:
        times = bench.ranks.call("round_trips", name, URGENT_BYTES, count)[0]
        return [statistics.median(times) * 1e6]

    (of,) = bench.turns(names, act)
    bench.report.add(f"{bench.label}, 4 KiB", "round trip", "us", of)
    bench.report.check(f"round_trip_{bench.link}", paired_ratio(of[DORA], of[GLOO]))


def urgent_alone(bench: Bench) -> None:
    def act(name: str) -> list[float]:
        transfer = Transfer(0, 1, URGENT_BYTES, is_urgent=True)
        return [1e3 * bench.ranks.play(name, [transfer]).duration_s(0)]

    (of,) = bench.turns((GLOO, DORA), act)
    bench.report.add(f"{bench.label}, nothing else", "4 KiB urgent", "ms", of)


def urgent_behind(
    bench: Bench, bulk_transfer: Transfer, starts_s: Sequence[float], case: str
) -> tuple[list[Samples], Samples]:
    """Returns Dora's urgent ms for each start, and how much longer its bulk took by that."""
    urgent = [Transfer(0, 1, URGENT_BYTES, is_urgent=True, send_s=s) for s in starts_s]

    def act(name: str) -> list[float]:
        if name == ALONE:
            return [1e3 * bench.ranks.play(DORA, [bulk_transfer]).duration_s(0)] * (1 + len(urgent))
        played = bench.ranks.play(name, [bulk_transfer, *urgent])
        return [1e3 * played.duration_s(i) for i in range(1 + len(urgent))]

    whole, *waits = bench.turns((GLOO, GLOO2, DORA, ALONE), act)
    bench.report.add(case, "bulk", "ms", whole)
    for start_s, wait in zip(starts_s, waits, strict=True):
        del wait[ALONE]
        bench.report.add(case, f"4 KiB urgent at {start_s:g} s", "ms", wait)
    return [wait[DORA] for wait in waits], paired_ratio(whole[DORA], whole[ALONE])


def head_of_line(bench: Bench) -> None:
    """An urgent message to a peer that bulk is on the way to."""
    urgent_alone(bench)
    size, late_s = bench.effort.bulk_bytes, bench.effort.urgent_s
    case = f"{bench.label}, behind {size_name(size)}"
    (at_once, late), slowdown = urgent_behind(bench, Transfer(0, 1, size), [0.0, late_s], case)
    bench.report.check("urgent_at_once_behind_bulk", at_once)
    bench.report.check("urgent_late_behind_bulk", late)
    bench.report.check("bulk_under_urgent", slowdown)
    reduction = Transfer(0, 1, size, is_all_reduce=True)
    (late,), _ = urgent_behind(bench, reduction, [0.2], f"{case} all-reduce")
    bench.report.check("urgent_behind_all_reduce", late)


def late_receive(bench: Bench) -> None:
    """A message that was sent long before its receive is posted."""
    transfer = Transfer(0, 1, MIB, receive_s=bench.effort.receive_s)

    def act(name: str) -> list[float]:
        played = bench.ranks.play(name, [transfer])
        return [1e3 * (played.done_s[0] - played.awaited_s[0])]

    (of,) = bench.turns((GLOO, DORA), act)
    case = f"{bench.label}, 1 MiB received {transfer.receive_s:g} s late"
    bench.report.add(case, "wait", "ms", of)
    bench.report.check("late_receive", of[DORA])


def pipeline(bench: Bench) -> None:
    """Training steps of two stages with 2 MiB between them."""
    bench.ranks.call("build_pipelines", {"num_microbatches": 8})
    losses: list[float] = []

    def act(name: str) -> list[float]:
        steps = bench.ranks.call("pipeline_step", name)
        losses.append(steps[-1][1])
        assert abs(losses[-1] - losses[0]) <= 1e-5 * losses[0], f"{name}: losses differ: {losses}"
        return [1e3 * max(elapsed_s for elapsed_s, _ in steps)]

    names = (GLOO, EARLY, DORA) if bench.effort.pipeline_warm_up else (GLOO, DORA)
    (of,) = bench.turns(
        names,
        act,
        turns=bench.effort.pipeline_turns,
        warm_up=bench.effort.pipeline_warm_up,
    )
    bench.report.add(f"{bench.label}, 2 stages, 8 micro-batches", "step", "ms", of)
    bench.report.check("pipeline", paired_ratio(of[DORA], of[GLOO]))


def other_device(bench: Bench) -> None:
    """An urgent message while another device's bulk fills the medium that both share."""
    urgent_alone(bench)
    size, late_s = bench.effort.bulk_bytes, bench.effort.urgent_s
    transfers = [
        Transfer(2, 1, size),
        Transfer(0, 1, URGENT_BYTES, is_urgent=True, send_s=late_s),
    ]

    def act(name: str) -> list[float]:
        played = bench.ranks.play(name, transfers)
        return [1e3 * played.duration_s(i) for i in (0, 1)]

    whole, waits = bench.turns((GLOO, GLOO2, DORA), act)
    case = f"{bench.label}, {size_name(size)} from another device"
    bench.report.add(case, "bulk", "ms", whole)
    bench.report.add(case, "4 KiB urgent", "ms", waits)
    bench.report.check("urgent_beside_other_device", waits[DORA])


def two_devices(bench: Bench) -> None:
    """Equal transfers of two devices, the urgent one a moment after the other."""
    size = bench.effort.pair_bytes
    urgent, other = Transfer(0, 1, size, is_urgent=True, send_s=0.05), Transfer(2, 1, size)

    def act(name: str) -> list[float]:
        both = bench.ranks.play(name, [urgent, other])
        alone = [bench.ranks.play(name, [one]).span_s for one in (urgent, other)]
        return [1e3 * x for x in (both.duration_s(0), both.span_s, alone[0], sum(alone))]

    first, both, first_alone, in_sequence = bench.turns((GLOO, DORA), act)
    case = f"{bench.label}, two devices, {size_name(size)} each"
    bench.report.add(case, "urgent one", "ms", first)
    bench.report.add(case, "urgent one alone", "ms", first_alone)
    bench.report.add(case, "both", "ms", both)
    bench.report.add(case, "one after the other", "ms", in_sequence)
    bench.report.check("two_devices_urgent", paired_ratio(first[DORA], first_alone[DORA]))
    bench.report.check("two_devices_total", paired_ratio(both[DORA], in_sequence[DORA]))


# ------------------------------------------------------------ all of it


def on_loopback(effort: Effort, report: Report) -> None:
    with Ranks([LOOPBACK] * 2, ENGINES) as ranks:
        often = replace(effort, turns=effort.loopback_turns)
        bench = Bench(ranks, "loopback", often, report)
        round_trips(bench, (RAW, GLOO, DORA, BARE), count=1000)
        names = (RAW, GLOO, DORA, BARE)
        bulk(bench, names, LOOPBACK_SIZES, effort.loopback_bytes, GLOO)


def on_100_mbit(effort: Effort, report: Report) -> None:
    with private_link(100) as nodes, Ranks(nodes, {DORA: ENGINES[DORA]}) as ranks:
        bench = Bench(ranks, "100mbit", effort, report)
        total = int(effort.stream_s * 12e6)
        bulk(bench, (RAW, GLOO, DORA), effort.link_sizes, total, RAW)
        head_of_line(bench)
        late_receive(bench)
        pipeline(bench)


def on_1_gbit(effort: Effort, report: Report) -> None:
    with private_link(1000) as nodes, Ranks(nodes, {DORA: ENGINES[DORA]}) as ranks:
        bench = Bench(ranks, "1gbit", effort, report)
        round_trips(bench, (RAW, GLOO, DORA), count=500)
        total = int(effort.stream_s * 120e6)
        bulk(bench, (RAW, GLOO, DORA), effort.link_sizes, total, RAW)


def on_shared_medium(effort: Effort, report: Report) -> None:
    engines = {DORA: ENGINES[DORA]}
    with shared_medium(3, 100) as nodes, Ranks(nodes, engines, is_medium_shared=True) as ranks:
        bench = Bench(ranks, "shared 100mbit", effort, report)
        other_device(bench)
        two_devices(bench)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns and bytes: under 50 s")
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    effort = QUICK if options.quick else FULL
    reason = why_not()
    report = Report(missing=reason or "not in --quick")
    on_loopback(effort, report)
    if reason:
        print(f"skipped links of 100 Mbit and 1 Gbit and the shared medium: {reason}")
    else:
        for scenario in (on_100_mbit, on_1_gbit, on_shared_medium):
            scenario(effort, report)
    if options.out:
        write_csv(options.out, report.rows)
    return finish(report.metrics())


if __name__ == "__main__":
    sys.exit(main())
