"""Speed of the simulator: actions per second on one core, played into a Timeline and priced.

A case is a 1F1B training step of a chain of devices, with uneven times, on media of their own or
all on one Wi-Fi channel. An **action** is an entry of the lists that the runtime walks: forwards,
backwards, posted sends and receives.

**simulate** compiles the schedule, plays it, and returns a Timeline with every span, the energy
and the memory. **price** is what a search repeats for every candidate: it builds the same lists
from a plan in numbers, plays them and returns totals (`dora._C.Step.price`); the actions are those
of the schedule that it stands for.

Times are those of the processor, so that other work on the machine matters less; one thread.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import Metric, Row, Samples, Table, finish, write_csv

from dora._C import Step
from dora.scheduler import DEFAULT_PREFETCH, build_schedule
from dora.simulator import StepCosts, network_of, simulate
from dora.spec import Cluster, Device, Link, Medium, Plan, Replica, Stage

SIZES = ((4, 16), (12, 64), (40, 64))
BOUND_PER_S = 200_000
RATE_BYTES_PER_S, MESSAGE_BYTES = 1e7, 1e5


class Case(NamedTuple):
    """A step of `num_stages` devices."""

    num_stages: int
    num_microbatches: int
    is_shared: bool

    @property
    def name(self) -> str:
        media = "shared" if self.is_shared else "private"
        return f"{self.num_stages}x{self.num_microbatches} {media}"


def make_plan(case: Case) -> Plan:
    """Returns a plan of one block and one device per stage."""
    names = tuple(f"d{i}" for i in range(case.num_stages))
    stages = tuple(
        Stage(index=i, first_block=i, last_block=i, replicas=(Replica(device=name),))
        for i, name in enumerate(names)
    )
    return Plan(devices=names, stages=stages, num_microbatches=case.num_microbatches)


def make_cluster(case: Case, names: Sequence[str]) -> Cluster:
    """Returns links between all devices, on one channel or each on a medium of its own."""
    pairs = [(a, b) for a in names for b in names if a != b]
    medium = {pair: "wifi" if case.is_shared else f"{pair[0]}>{pair[1]}" for pair in pairs}
    return Cluster(
        devices=tuple(
            Device(name=n, flops_per_s=1e10, mem_bandwidth_bytes_per_s=1e10, memory_bytes=10**9)
            for n in names
        ),
        media=tuple(
            Medium(name=name, rate_bytes_per_s=RATE_BYTES_PER_S, contention=(1.0, 0.9))
            for name in dict.fromkeys(medium.values())
        ),
        links=tuple(Link(src=a, dst=b, media=(medium[a, b],)) for a, b in pairs),
    )


def forward_s(stage: int) -> float:
    """Returns seconds that differ from stage to stage, around those of one message."""
    return 0.01 + 0.001 * (stage * 7 % 5)


def costs_of(case: Case) -> StepCosts:
    """Returns what the actions of the case take."""
    n = case.num_stages
    times = {(s, "F"): forward_s(s) for s in range(n)}
    times |= {(s, "B"): 2 * forward_s(s) for s in range(n)}
    return StepCosts(
        compute_s=times,
        send_bytes={(s, kind): MESSAGE_BYTES for s in range(n) for kind in ("SEND_F", "SEND_B")},
        reductions=(),
        fixed_bytes=(1e6,) * n,
        kept_bytes=(1e5,) * n,
        power_factors=(1.0,) * n,
    )


def step_of(case: Case, plan: Plan) -> Step:
    """Returns the case in numbers."""
    n = case.num_stages
    return Step(
        devices=[[s] for s in range(n)],
        forward_s=[[forward_s(s)] for s in range(n)],
        backward_s=[[2 * forward_s(s)] for s in range(n)],
        down_bytes=[MESSAGE_BYTES] * (n - 1),
        up_bytes=[MESSAGE_BYTES] * (n - 1),
        routes=plan.routes,
        warmup=plan.warmup,
        kind=plan.schedule_kind,
        reductions=(),
        source=-1,
        input_bytes=0.0,
        prefetch=DEFAULT_PREFETCH,
    )


def speed(run: Callable[[], object], num_actions: int, repeats: int) -> Samples:
    """Returns actions per second of each repetition; one lasts long enough to be timed."""
    calls = max(1, 20_000 // num_actions)
    run()
    rates = []
    for _ in range(repeats):
        start_s = time.process_time()
        for _ in range(calls):
            run()
        rates.append(calls * num_actions / (time.process_time() - start_s))
    return Samples(rates)


def measure(case: Case, repeats: int) -> tuple[int, dict[str, Samples]]:
    """Returns the number of actions of a case and the speed of each contender.

    Raises:
        AssertionError: The two disagree about how long the step takes.
    """
    plan, costs = make_plan(case), costs_of(case)
    cluster = make_cluster(case, plan.devices)
    schedule, network = build_schedule(plan), network_of(cluster, plan.devices)
    step = step_of(case, plan)
    played_s = simulate(plan, schedule, costs, cluster).makespan_s
    priced_s = step.price(network).makespan_s
    assert abs(played_s - priced_s) <= 1e-9 * played_s, f"{case.name}: {played_s} and {priced_s} s"
    num_actions = sum(map(len, schedule.actions_by_rank))
    return num_actions, {
        "simulate": speed(lambda: simulate(plan, schedule, costs, cluster), num_actions, repeats),
        "price": speed(lambda: step.price(network), num_actions, repeats),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="5 repetitions instead of 30")
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    # Else half of the time goes to the collector walking through torch, which `common` imports.
    gc.collect()
    gc.freeze()
    rows, metrics = [], {}
    table = Table(["case (stages x micro-batches)", "actions", "simulate, 1000/s", "price, 1000/s"])
    for case in (Case(*size, is_shared) for size in SIZES for is_shared in (False, True)):
        num_actions, found = measure(case, 5 if options.quick else 30)
        shown = [str(Samples([x / 1e3 for x in rates.values])) for rates in found.values()]
        table.line(case.name, str(num_actions), *shown)
        for contender, rates in found.items():
            rows.append(Row(case.name, contender, "actions_per_second", "1/s", rates))
            metrics[f"{contender}_{case.name.replace(' ', '_')}"] = Metric(
                round(rates.median), "actions/s", f">= {BOUND_PER_S}", rates.median >= BOUND_PER_S
            )
    if options.out:
        write_csv(options.out, rows)
    return finish(metrics)


if __name__ == "__main__":
    sys.exit(main())
