from itertools import combinations, pairwise, permutations, product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora.errors import InfeasiblePlanError
from dora.planner.baselines import BASELINES
from dora.planner.baselines.alpa import best_split
from dora.planner.baselines.asteroid import Steps, round_latency_s
from dora.planner.baselines.parallax import nearest_chain, water_fill
from dora.planner.baselines.problem import microbatches, proportional
from dora.spec import (
    BlockCost,
    BlockProfile,
    Cluster,
    Device,
    Link,
    Medium,
    ModelProfile,
    Timing,
    Workload,
)

BLOCK_BYTES = 1000  # state of a block without optimizer state, for inference
NO_MEMORY_MODEL = {"even-pipeline"}


class Case:
    """A small model and cluster with the raw numbers that the brute force reads.

    One sample per micro-batch, so that times and bytes are those of a micro-batch.
    """

    def __init__(
        self, times, sizes, rates, *, room=None, kinds=None, training=False, batch=4, latency=None
    ):
        self.times, self.sizes, self.training = times, sizes, training
        self.n, self.num_blocks, self.batch = len(times), len(times[0]), batch
        self.rates = rates if callable(rates) else lambda a, b: rates
        # Bytes of one block: parameters; in training also gradients and one cached activation.
        self.room = room or [self.num_blocks] * self.n
        self.block_bytes = BLOCK_BYTES * (2 if training else 1)
        self.names = [f"d{i}" for i in range(self.n)]
        self.kinds = kinds or self.names
        self.latency = latency or (lambda a, b: 0.0)

    def memory(self, d):
        return self.room[d] * self.block_bytes + self.slack

    # Enough for the boundary buffers that some planners count, and less than a block.
    slack = 500

    def fits(self, d, num_blocks):
        return num_blocks <= self.room[d]

    def time(self, d, first, end):
        factor = 3 if self.training else 1
        return factor * sum(self.times[d][first:end])

    def hop(self, a, b, block):
        there = self.sizes[block - 1] / self.rates(a, b)
        return there + self.sizes[block - 1] / self.rates(b, a) if self.training else there

    def run(self, name, **fields):
        return BASELINES[name](self.profile(), self.cluster(), self.workload(**fields))

    def workload(self, **fields):
        fields = {"num_microbatches": self.batch, **fields}
        return Workload(
            kind="train" if self.training else "infer",
            batch_size=self.batch,
            optimizer_bytes_per_param=0,
            **fields,
        )

    def cluster(self):
        devices = tuple(
            Device(
                name=name,
                kind=kind,
                flops_per_s=1e12,
                mem_bandwidth_bytes_per_s=1e11,
                memory_bytes=self.memory(d),
            )
            for d, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True))
        )
        pairs = list(permutations(range(self.n), 2))
        media = tuple(
            Medium(name=f"{a}>{b}", rate_bytes_per_s=self.rates(a, b), latency_s=self.latency(a, b))
            for a, b in pairs
        )
        links = tuple(
            Link(src=self.names[a], dst=self.names[b], media=(f"{a}>{b}",)) for a, b in pairs
        )
        return Cluster(devices=devices, media=media, links=links)

    def profile(self):
        blocks = []
        for i in range(self.num_blocks):
            timings = tuple(
                Timing(device=name, forward_s=t[i], backward_s=2 * t[i])
                for name, t in zip(self.names, self.times, strict=True)
            )
            cost = BlockCost(
                microbatch_size=1, flops=1, output_bytes=self.sizes[i], timings=timings
            )
            blocks.append(
                BlockProfile(
                    name=f"block{i}",
                    num_params=BLOCK_BYTES // 4,
                    param_bytes=BLOCK_BYTES,
                    trainable_bytes=BLOCK_BYTES,
                    costs=(cost,),
                )
            )
        return ModelProfile(blocks=tuple(blocks))

    def spans(self, plan):
        """(first, end, devices) of each stage."""
        return [
            (
                stage.first_block,
                stage.last_block + 1,
                tuple(self.names.index(r.device) for r in stage.replicas),
            )
            for stage in plan.stages
        ]

    def chain(self, plan):
        spans = self.spans(plan)
        assert all(len(devices) == 1 for *_, devices in spans)
        return [(first, end, devices[0]) for first, end, devices in spans]

    def chains(self):
        """Every split over every order of distinct devices that fits the memory."""
        for count in range(1, min(self.n, self.num_blocks) + 1):
            for bounds in splits(self.num_blocks, count):
                for order in permutations(range(self.n), count):
                    if all(self.fits(d, b - a) for (a, b), d in zip(bounds, order, strict=True)):
                        yield [(a, b, d) for (a, b), d in zip(bounds, order, strict=True)]


def splits(num_blocks, count):
    for cuts in combinations(range(1, num_blocks), count - 1):
        yield list(pairwise([0, *cuts, num_blocks]))


@st.composite
def cases(draw, most=4, types=False, training=None):
    n, num_blocks = draw(st.integers(1, most)), draw(st.integers(1, 5))
    number = st.integers(1, 50)
    rows = draw(
        st.lists(st.lists(number, min_size=num_blocks, max_size=num_blocks), min_size=n, max_size=n)
    )
    room = draw(st.lists(st.integers(1, num_blocks), min_size=n, max_size=n))
    kinds = None
    if types:
        of = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
        rows = [rows[min(of[i], n - 1)] for i in range(n)]
        room = [room[min(of[i], n - 1)] for i in range(n)]
        kinds = [f"kind{t}" for t in of]
    sizes = draw(st.lists(st.integers(1, 60), min_size=num_blocks, max_size=num_blocks))
    table = {pair: draw(st.integers(1, 20)) for pair in permutations(range(n), 2)}
    return Case(
        [[t / 10 for t in row] for row in rows],
        sizes,
        lambda a, b: float(table[a, b]),
        room=room,
        kinds=kinds,
        training=draw(st.booleans()) if training is None else training,
        batch=draw(st.sampled_from([1, 2, 4])),
    )


def best_of(case, name, objective, candidates):
    """The least objective of all candidates; without any, the planner must find none either."""
    values = [objective(c) for c in candidates]
    if not values or min(values) == inf:
        with pytest.raises(InfeasiblePlanError, match=name):
            case.run(name)
        return None
    return min(values)


# ---------------------------------------------------------------- any planner


def simple_case(training, n=4, num_blocks=6, **fields):
    times = [[0.1 * (d + 1) + 0.01 * b for b in range(num_blocks)] for d in range(n)]
    return Case(times, [10] * num_blocks, 1000.0, training=training, **fields)


@pytest.mark.parametrize("kind", ["train", "infer", "generate"])
@pytest.mark.parametrize("name", BASELINES)
def test_plan_covers_the_blocks_and_is_the_same_again(name, kind):
    case = simple_case(kind == "train", batch=16)
    workload = case.workload(num_microbatches=None).model_copy(
        update={"kind": kind, "prompt_tokens": 5, "new_tokens": 3}
    )
    plan = BASELINES[name](case.profile(), case.cluster(), workload)
    assert plan.num_blocks == case.num_blocks
    assert plan.devices == tuple(case.names)
    assert plan.schedule_kind == ("1f1b" if kind == "train" else "wavefront")
    assert plan.links == case.cluster().links
    assert plan.cost is None
    assert plan == BASELINES[name](case.profile(), case.cluster(), workload)
    if kind == "generate":
        assert plan.num_microbatches == 1
        assert all(len(stage.replicas) == 1 for stage in plan.stages)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(set(BASELINES) - NO_MEMORY_MODEL))
def test_too_little_memory_is_infeasible(name, training):
    case = simple_case(training)
    case.room, case.slack = [0] * case.n, 1
    with pytest.raises(InfeasiblePlanError, match=name) as error:
        case.run(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BASELINES)
def test_one_device_gets_everything(name):
    plan = simple_case(True, n=1).run(name)
    assert [len(stage.replicas) for stage in plan.stages] == [1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BASELINES)
def test_devices_without_a_link_do_not_talk(name, training):
    case = simple_case(training, n=2)
    unlinked = case.cluster().model_copy(update={"links": ()})
    try:
        plan = BASELINES[name](case.profile(), unlinked, case.workload())
    except InfeasiblePlanError:
        return
    assert len(plan.stages) == 1
    assert not training or len(plan.stages[0].replicas) == 1


@pytest.mark.parametrize("name", ["edgeshard-latency", "edgeshard-throughput", "prima-like"])
def test_first_stage_is_at_the_source(name):
    case = simple_case(False)
    plan = case.run(name, source="d2")
    assert plan.stages[0].replicas[0].device == "d2"


def test_microbatches_are_a_divisor_near_twice_the_width():
    assert microbatches(Workload(batch_size=12), 2) == 4
    assert microbatches(Workload(batch_size=12), 4) == 6
    assert microbatches(Workload(batch_size=15), 2) == 5
    assert microbatches(Workload(batch_size=12, num_microbatches=7), 2) == 7
    assert microbatches(Workload(kind="generate", batch_size=12), 2) == 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 9))
def test_proportional_counts(weights, more):
    total = len(weights) + more
    counts = proportional(np.array(weights, dtype=float), total)
    assert sum(counts) == total
    exact = [1 + more * w / sum(weights) for w in weights]
    assert all(abs(c - e) < 1 for c, e in zip(counts, exact, strict=True))


def test_many_devices_are_within_reach():
    case = simple_case(True, n=13, num_blocks=6, batch=16)
    for name in BASELINES:
        assert case.run(name, num_microbatches=None).num_blocks == 6


# ---------------------------------------------------------------- rules


def test_best_single_is_the_fastest_that_fits():
    case = simple_case(False, room=[5, 6, 6, 6])
    assert case.chain(case.run("best-single")) == [(0, 6, 1)]


def test_data_parallel_shares_by_speed_among_those_that_fit():
    case = Case([[1.0] * 2, [3.0] * 2, [1.0] * 2], [1, 1], 1.0, room=[2, 2, 1], training=True)
    (stage,) = case.run("data-parallel").stages
    assert [(r.device, r.share) for r in stage.replicas] == [("d0", 0.75), ("d1", 0.25)]


def test_even_pipeline_follows_rank_order():
    case = simple_case(True)
    assert case.chain(case.run("even-pipeline")) == [(0, 2, 0), (2, 4, 1), (4, 5, 2), (5, 6, 3)]


def test_memory_proportional_takes_the_fewest_devices():
    case = simple_case(False, room=[1, 2, 4, 3])
    assert case.chain(case.run("memory-proportional")) == [(0, 3, 2), (3, 6, 3)]


# ---------------------------------------------------------------- dynamic programs


@settings(max_examples=60)
@given(cases())
def test_edgeshard_throughput_finds_the_least_bottleneck(case):
    def bottleneck(chain):
        stages = [case.time(d, a, b) for a, b, d in chain]
        return max(stages + [case.hop(p[2], q[2], q[0]) for p, q in pairwise(chain)])

    least = best_of(case, "edgeshard-throughput", bottleneck, case.chains())
    if least is not None:
        chain = case.chain(case.run("edgeshard-throughput"))
        assert bottleneck(chain) == pytest.approx(least)


@settings(max_examples=60)
@given(cases(most=3))
def test_edgeshard_latency_is_least_unless_devices_would_repeat(case):
    def latency(chain):
        hops = sum(case.hop(p[2], q[2], q[0]) for p, q in pairwise(chain))
        return hops + sum(case.time(d, a, b) for a, b, d in chain)

    def walks():
        for count in range(1, case.num_blocks + 1):
            for bounds in splits(case.num_blocks, count):
                for order in product(range(case.n), repeat=count):
                    repeats = any(a == b for a, b in pairwise(order))
                    if not repeats and all(
                        case.fits(d, b - a) for (a, b), d in zip(bounds, order, strict=True)
                    ):
                        yield [(a, b, d) for (a, b), d in zip(bounds, order, strict=True)]

    simple = min((latency(c) for c in case.chains()), default=inf)
    relaxed = min((latency(c) for c in walks()), default=inf)
    ties = sum(latency(c) < relaxed + 1e-9 for c in walks())
    try:
        found = latency(case.chain(case.run("edgeshard-latency")))
    except InfeasiblePlanError:
        assert simple == inf or relaxed < simple or ties > 1
        return
    assert found >= simple - 1e-9
    if simple == relaxed and ties == 1:
        assert found == pytest.approx(simple)


@settings(max_examples=60)
@given(cases(types=True))
def test_pipeedge_finds_the_least_bottleneck(case):
    pairs = list(permutations(range(case.n), 2))
    rate = {
        d: max((case.rates(a, b) for a, b in pairs if a == d), default=0) for d in range(case.n)
    }

    def bottleneck(chain):
        bytes_factor = 2 if case.training else 1
        stages = [case.time(d, a, b) for a, b, d in chain]
        hops = [
            bytes_factor * case.sizes[q[0] - 1] / min(rate[p[2]], rate[q[2]])
            for p, q in pairwise(chain)
        ]
        return max(stages + hops)

    least = best_of(case, "pipeedge", bottleneck, case.chains())
    if least is not None:
        assert bottleneck(case.chain(case.run("pipeedge"))) == pytest.approx(least)


@settings(max_examples=60)
@given(cases())
def test_prima_like_has_the_least_compute_in_rank_order(case):
    def compute(chain):
        return sum(case.time(d, a, b) for a, b, d in chain)

    in_order = [c for c in case.chains() if [s[2] for s in c] == sorted(s[2] for s in c)]
    least = best_of(case, "prima-like", compute, in_order)
    if least is not None:
        chain = case.chain(case.run("prima-like"))
        assert compute(chain) == pytest.approx(least)
        assert [s[2] for s in chain] == sorted(s[2] for s in chain)


@settings(max_examples=60)
@given(cases())
def test_alpa_like_has_the_least_sum_and_largest(case):
    mean_rate = np.mean([case.rates(a, b) for a, b in permutations(range(case.n), 2)] or [1.0])
    mean_memory = np.mean([case.memory(d) for d in range(case.n)])

    def objective(bounds):
        size = case.n // len(bounds)
        stages = []
        for a, b in bounds:
            if (b - a) * case.block_bytes > mean_memory:
                return inf
            own = np.mean([case.time(d, a, b) for d in range(case.n)]) / size
            if case.training:
                reduced = 2 * (size - 1) / size * (b - a) * BLOCK_BYTES / mean_rate
                own += reduced / case.batch
            stages.append(own)
        return sum(stages) + (case.batch - 1) * max(stages)

    candidates = [
        bounds
        for count in range(1, case.n + 1)
        if case.n % count == 0 and case.n // count <= case.batch
        for bounds in splits(case.num_blocks, count)
    ]
    least = best_of(case, "alpa-like", objective, candidates)
    if least is not None:
        spans = case.spans(case.run("alpa-like"))
        assert objective([(a, b) for a, b, _ in spans]) == pytest.approx(least)
        assert [d for *_, devices in spans for d in devices] == list(range(case.n))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_alpa_split_is_least_whatever_stages_cost(num_stages, num_blocks, m, data):
    value = st.one_of(st.integers(1, 30), st.just(inf))
    width = num_blocks + 1
    table = np.full((num_stages, width, width), inf)
    for s, a, b in product(range(num_stages), range(width), range(width)):
        if a < b:
            table[s, a, b] = data.draw(value)

    def objective(bounds):
        stages = [table[num_stages - 1 - s, a, b] for s, (a, b) in enumerate(bounds)]
        return inf if inf in stages else sum(stages) + (m - 1) * max(stages)

    least = min((objective(bounds) for bounds in splits(num_blocks, num_stages)), default=inf)
    found, ends = best_split(table, m)
    assert found == least
    assert least == inf or objective(list(pairwise([0, *ends]))) == least


@settings(max_examples=60)
@given(cases(types=True))
def test_metis_like_has_the_least_cost_of_balanced_candidates(case):
    m = case.batch

    def stage_s(a, b, devices):
        if any(not case.fits(d, b - a) for d in devices):
            return inf
        return 1 / sum(1 / case.time(d, a, b) for d in devices)

    def cost(spans):
        stages = [stage_s(*span) for span in spans]
        reduces, hops = [0.0], 0.0
        for a, b, devices in spans:
            if case.training and len(devices) > 1:
                slow = min(case.rates(x, y) for x, y in permutations(devices, 2))
                size = len(devices)
                reduces.append(2 * (size - 1) / size * (b - a) * BLOCK_BYTES / slow)
        for (_, _, left), (a, _, right) in pairwise(spans):
            used = list(product(left, right))
            used += [(y, x) for x, y in used] if case.training else []
            sent = case.sizes[a - 1] * (2 if case.training else 1)
            hops += sent / min(case.rates(x, y) for x, y in used)
        return (m - 1) * max(stages) + sum(stages) + max(reduces) + hops

    lows, highs = [], []
    kinds = sorted(set(case.kinds))
    for order in permutations(kinds):
        devices = [d for kind in order for d in range(case.n) if case.kinds[d] == kind]
        for count in range(1, min(case.n, case.num_blocks) + 1):
            for sizes in product([1, 2, 4], repeat=count):
                if sum(sizes) != case.n or max(sizes) > case.batch:
                    continue
                cuts = np.cumsum([0, *sizes])
                groups = [tuple(devices[i:j]) for i, j in pairwise(cuts)]
                options = [
                    [(a, b, g) for (a, b), g in zip(bounds, groups, strict=True)]
                    for bounds in splits(case.num_blocks, count)
                ]
                slowest = [max(stage_s(*span) for span in spans) for spans in options]
                if min(slowest) < inf:
                    # Several splits may share the least slowest stage; the planner takes one.
                    balanced = [
                        cost(spans)
                        for spans, value in zip(options, slowest, strict=True)
                        if value <= min(slowest) * (1 + 1e-9)
                    ]
                    lows.append(min(balanced))
                    highs.append(max(balanced))
    if not lows:
        with pytest.raises(InfeasiblePlanError):
            case.run("metis-like")
        return
    found = cost(case.spans(case.run("metis-like")))
    assert min(lows) - 1e-9 <= found <= min(highs) + 1e-9


def round_latency(case, spans):
    """The steps of an Asteroid pipeline, and their latency."""
    steps = []
    for i, (a, b, devices) in enumerate(spans):
        if any(not case.fits(d, b - a) for d in devices):
            return inf
        speed = [1 / case.time(d, a, b) for d in devices]
        share = [v / sum(speed) for v in speed]
        forward = max(x * sum(case.times[d][a:b]) for x, d in zip(share, devices, strict=True))
        backward = 2 * forward if case.training else 0.0
        reduced = 0.0
        if case.training and len(devices) > 1:
            slow = min(case.rates(x, y) for x, y in permutations(devices, 2))
            size = len(devices)
            reduced = 2 * (size - 1) / size * (b - a) * BLOCK_BYTES / slow
        if i:
            pairs = list(product(spans[i - 1][2], devices))
            there = case.sizes[a - 1] / min(case.rates(x, y) for x, y in pairs)
            back = case.sizes[a - 1] / min(case.rates(y, x) for x, y in pairs)
            steps.append((there, back if case.training else 0.0, 0.0))
        steps.append((forward, backward, reduced))
    return latency_of(steps, case.batch)


def latency_of(steps, m):
    """Asteroid's latency of a round, written as the sums of its definition."""
    both = [f + b for f, b, _ in steps]
    dominant = max(range(len(steps)), key=lambda c: (m * both[c] + sum(both[:c]), -c))
    totals = []
    for s, (_, _, reduced) in enumerate(steps):
        if s < dominant:
            executes = m * both[dominant] + sum(both[s:dominant])
        else:
            executes = max(0.0, m * both[dominant] - sum(both[dominant:s]))
        totals.append(sum(f for f, _, _ in steps[:s]) + executes + reduced)
    return max(totals)


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=7), st.integers(1, 9))
def test_round_latency_is_the_sum_of_its_definition(steps, m):
    columns = Steps(*(np.array([column], dtype=float) for column in zip(*steps, strict=True)))
    assert round_latency_s(columns, m).tolist() == [latency_of(steps, m)]


@settings(max_examples=60)
@given(cases(most=3))
def test_asteroid_has_the_least_round_latency(case):
    order = sorted(range(case.n), key=lambda d: (-case.room[d], d))

    def candidates(most):
        for count in range(1, most + 1):
            for groups in splits(case.n, count):
                if max(j - i for i, j in groups) > case.batch:
                    continue
                for bounds in splits(case.num_blocks, count):
                    yield [
                        (a, b, tuple(order[i:j]))
                        for (a, b), (i, j) in zip(bounds, groups, strict=True)
                    ]

    least = min((round_latency(case, c) for c in candidates(case.n)), default=inf)
    two = min((round_latency(case, c) for c in candidates(min(case.n, 2))), default=inf)
    try:
        found = round_latency(case, case.spans(case.run("asteroid")))
    except InfeasiblePlanError:
        assert least == inf
        return
    # Of three stages the program extends the best two only, which may miss the best three.
    assert least - 1e-9 <= found <= two + 1e-9
    if case.n <= 2:
        assert found == pytest.approx(least)


def test_asteroid_keeps_its_micro_batches_in_flight():
    case = simple_case(True, n=3, batch=16)
    plan = case.run("asteroid")
    num_stages = len(plan.stages)
    for s, window in enumerate(plan.warmup):
        assert window >= 2 * (num_stages - s) - 1


def test_asteroid_cuts_a_share_that_memory_does_not_hold():
    # Equal devices, but the second holds activations of a quarter of each micro-batch only.
    case = Case([[1.0], [1.0]], [1], 1e9, training=True)
    profile = case.profile()
    block = profile.blocks[0]
    costs = (block.costs[0].model_copy(update={"activation_bytes": 4000}),)
    profile = profile.model_copy(update={"blocks": (block.model_copy(update={"costs": costs}),)})
    cluster = case.cluster()
    devices = tuple(
        device.model_copy(update={"memory_bytes": case.block_bytes + kept})
        for device, kept in zip(cluster.devices, (4000, 1000), strict=True)
    )
    cluster = cluster.model_copy(update={"devices": devices})
    (stage,) = BASELINES["asteroid"](profile, cluster, case.workload()).stages
    assert [r.share for r in stage.replicas] == pytest.approx([0.75, 0.25])


# ---------------------------------------------------------------- parallax


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_water_fill_ends_earliest_under_the_capacities(devices, total):
    speed, capacity = (list(column) for column in zip(*devices, strict=True))
    total = min(total, sum(capacity))
    counts = water_fill(np.array(speed, dtype=float), capacity, total)
    assert sum(counts) == total
    assert all(c <= most for c, most in zip(counts, capacity, strict=True))

    def end(split):
        return max(c / v for c, v in zip(split, speed, strict=True))

    options = product(*(range(most + 1) for most in capacity))
    assert end(counts) == pytest.approx(min(end(o) for o in options if sum(o) == total))


def test_parallax_like_takes_few_devices_in_the_order_of_least_rtt():
    def latency(a, b):
        return 0.1 if {a, b} == {1, 3} else 0.001

    case = simple_case(False, room=[1, 2, 2, 2], latency=latency)
    plan = case.run("parallax-like")
    order = [d for *_, d in case.chain(plan)]
    assert sorted(order) == [1, 2, 3]
    assert order[1] == 2


def test_long_chain_goes_to_the_nearest():
    place = np.array([3.0, 0.0, 7.0, 1.0, 5.0, 2.0, 6.0, 4.0])
    rtt_s = np.abs(place[:, None] - place[None, :])
    np.fill_diagonal(rtt_s, inf)
    chain = nearest_chain(rtt_s, list(range(8)))
    assert sorted(place[chain].tolist()) in (place[chain].tolist(), place[chain][::-1].tolist())
