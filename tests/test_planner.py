"""The planner against brute force on small problems, and what a user would expect of its plans."""

from itertools import combinations, pairwise, permutations, product
from math import inf, sqrt
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dora._C import share_microbatches as native_shares
from dora.errors import InfeasiblePlanError, SpecError
from dora.planner import plan, predict, search, step_costs
from dora.planner.chains import Chains, shared_media, twins
from dora.planner.codecs import CODECS
from dora.planner.cost import interpolate, share_microbatches, stage_costs
from dora.planner.layouts import layouts, to_plan
from dora.planner.limits import rate_at
from dora.planner.predict import Group, Layout, as_step, evaluate, memory_share, setting
from dora.planner.search import microbatch_choices
from dora.scheduler import build_schedule
from dora.scheduler.network import CLEAR_GAIN
from dora.simulator import simulate
from dora.spec import (
    BlockCost,
    BlockProfile,
    BoundaryCodec,
    Cluster,
    Device,
    Link,
    Medium,
    ModelProfile,
    Plan,
    PowerMode,
    QoE,
    Replica,
    Stage,
    TiedParameter,
    Timing,
    Workload,
)

# Small problems are proven in a fraction of the default.
EFFORT_S = 0.05


def make_device(name, *, memory_bytes=10**12, idle_w=1.0, busy_w=10.0, **fields):
    return Device(
        name=name,
        flops_per_s=1e12,
        mem_bandwidth_bytes_per_s=1e11,
        memory_bytes=memory_bytes,
        idle_w=idle_w,
        busy_w=busy_w,
        **fields,
    )


def make_cluster(devices, *, rate=1e9, latency_s=0.0, missing=(), is_shared=False, **fields):
    """Every pair has a medium of its own with that rate, a number or a function of the pair.

    `is_shared` puts all of them on one, 'air'; `fields` are of the media.
    """
    pairs = [p for p in permutations([d.name for d in devices], 2) if p not in missing]
    names = {pair: "air" if is_shared else ">".join(pair) for pair in pairs}
    media = {
        name: Medium(
            name=name,
            rate_bytes_per_s=rate(*pair) if callable(rate) else rate,
            latency_s=latency_s,
            **fields,
        )
        for pair, name in names.items()
    }
    links = tuple(Link(src=a, dst=b, media=(names[a, b],)) for a, b in pairs)
    return Cluster(devices=tuple(devices), media=tuple(media.values()), links=links)


def make_profile(
    times,
    *,
    output_bytes=1000,
    param_bytes=1000,
    activation_bytes=1000,
    backward=2.0,
    launch_s=None,
    **fields,
):
    """`times`: device -> seconds per sample of each block; `launch_s`: device -> of each pass."""
    num_blocks = len(next(iter(times.values())))
    launch_s = launch_s or {}

    def timing(device, seconds, size):
        forward_s = seconds * size + launch_s.get(device, 0.0)
        return Timing(device=device, forward_s=forward_s, backward_s=backward * forward_s)

    blocks = []
    for i in range(num_blocks):
        costs = tuple(
            BlockCost(
                microbatch_size=size,
                flops=1,
                activation_bytes=activation_bytes * size,
                output_bytes=output_bytes * size,
                timings=tuple(timing(d, t[i], size) for d, t in times.items()),
            )
            for size in (1, 16)
        )
        blocks.append(
            BlockProfile(
                name=f"block{i}",
                num_params=param_bytes // 4,
                param_bytes=param_bytes,
                trainable_bytes=param_bytes,
                costs=costs,
            )
        )
    return ModelProfile(blocks=tuple(blocks), **fields)


def simulated(profile, cluster, workload, found):
    """Returns the timeline of a plan, each transfer as urgent as the plan says."""
    schedule = build_schedule(found, training=workload.kind == "train")
    schedule = schedule.model_copy(update={"transfers": found.transfers})
    costs = step_costs(profile, cluster, workload, found)
    return simulate(found, schedule, costs, cluster)


def devices_of(found: Plan) -> list[str]:
    return [r.device for stage in found.stages for r in stage.replicas]


def two(times_a, times_b, **fields):
    devices = [make_device("a"), make_device("b")]
    profile = make_profile({"a": times_a, "b": times_b})
    return profile, make_cluster(devices, **fields), Workload(batch_size=16)


def halves(
    *,
    memory_bytes=1_000_000,
    rate=1e6,
    latency_s=0.0,
    times=(0.01, 0.02),
    fields=None,
    **of_profile,
):
    """Two devices of which neither holds both blocks, for inference."""
    devices = [make_device(n, memory_bytes=memory_bytes, **(fields or {}).get(n, {})) for n in "ab"]
    options = {"param_bytes": 600_000, "activation_bytes": 0, "output_bytes": 100, **of_profile}
    profile = make_profile({n: [t] * 2 for n, t in zip("ab", times, strict=True)}, **options)
    return profile, make_cluster(devices, rate=rate, latency_s=latency_s)


# ---------------------------------------------------------------- cost


def test_interpolate():
    assert interpolate([2, 4, 8], [1.0, 2.0, 8.0], 4) == 2.0
    assert interpolate([2, 4, 8], [1.0, 2.0, 8.0], 6) == 5.0
    assert interpolate([2, 4, 8], [1.0, 2.0, 8.0], 16) == 20.0
    assert interpolate([4], [2.0], 6) == 3.0
    # Time at batch 0 is the dispatch overhead, and never negative.
    assert interpolate([2, 4], [3.0, 4.0], 1) == 2.5
    assert interpolate([2, 4], [1.0, 4.0], 1) == 0.5


def test_missing_timing_names_block_device_and_remedy():
    profile = make_profile({"a": [1.0, 1.0]})
    cluster = make_cluster([make_device("a"), make_device("b")])
    with pytest.raises(ValueError, match=r"'block0'.*'b'.*scale_profile") as error:
        plan(profile, cluster, Workload())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("times", "counts"), [([1, 1], [2, 2]), ([1, 3], [3, 1]), ([1, 9], [4, 0])]
)
def test_share_microbatches(times, counts):
    assert share_microbatches(times, 4).tolist() == counts


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 6))
def test_shares_end_earliest(times, n):
    counts = share_microbatches(times, n)
    assert counts.sum() == n
    assert counts.tolist() == native_shares([float(t) for t in times], n)
    others = (c for c in product(range(n + 1), repeat=len(times)) if sum(c) == n)
    best = min(max(a * b for a, b in zip(times, c, strict=True)) for c in others)
    assert max(counts * times) == best


def test_tied_parameter_is_stored_once_per_stage():
    tied = (TiedParameter(name="e", blocks=(0, 2), param_bytes=1000),)
    profile = make_profile({"a": [1.0] * 3}, tied=tied)
    costs = stage_costs(profile, [make_device("a")], Workload(optimizer_bytes_per_param=8), 1)
    # Parameters, gradients and two optimizer values of 4 bytes each.
    assert costs.state_bytes[0, 3] == 2 * 4000
    assert costs.state_bytes[0, 2] == 2 * 4000
    assert costs.state_bytes[2, 3] == 4000


def replicas(num_devices, m, kind="1f1b"):
    groups = (Group(0, 1, tuple(range(num_devices))),)
    return Layout(groups, ((m // num_devices,) * num_devices,), (m,), kind)


def test_ring_is_paced_by_its_slowest_link():
    devices = [make_device(name) for name in "abc"]
    cluster = make_cluster(devices, rate=lambda a, b: 10.0 if (a, b) == ("b", "c") else 100.0)
    profile = make_profile({n: [1.0] for n in "abc"}, param_bytes=300)
    known = setting(profile, cluster, Workload(batch_size=3), 3)
    # Four rounds of a third of the gradients, after one forward and backward.
    assert evaluate(replicas(3, 3), known).makespan_s == pytest.approx(3 + 4 * 100 / 10)
    together = make_cluster(devices, rate=100.0, is_shared=True)
    known = setting(profile, together, Workload(batch_size=3), 3)
    assert evaluate(replicas(3, 3), known).makespan_s == pytest.approx(3 + 4 * 3 * 100 / 100)


# ---------------------------------------------------------------- one layout


def test_latency_delays_and_bytes_occupy():
    groups = (Group(0, 1, (0,)), Group(1, 2, (1,)))
    layout = Layout(groups, ((3,), (3,)), (2, 1), "wavefront")
    workload = Workload(kind="infer", batch_size=3)
    devices = [make_device(n) for n in "ab"]
    profile = make_profile({n: [1.0] * 2 for n in "ab"}, output_bytes=500)
    late = setting(profile, make_cluster(devices, rate=1e12, latency_s=5.0), workload, 3)
    assert evaluate(layout, late).makespan_s == pytest.approx(3 + 5 + 1)
    slow = setting(profile, make_cluster(devices, rate=100.0), workload, 3)
    assert evaluate(layout, slow).makespan_s == pytest.approx(1 + 3 * 5 + 1)


def test_deeper_window_hides_a_slow_link():
    profile, cluster, _ = two([1.0] * 2, [1.0] * 2, rate=1000 / 6)
    known = setting(profile, cluster, Workload(batch_size=16), 16)
    groups = (Group(0, 1, (0,)), Group(1, 2, (1,)))
    ends = [
        evaluate(Layout(groups, ((16,), (16,)), (w, 1), "1f1b"), known).makespan_s
        for w in (2, 4, 8)
    ]
    assert ends[0] > 1.3 * ends[2]
    assert ends[0] > ends[1] >= ends[2]


def test_layouts_differ_in_their_windows():
    devices = [make_device(n) for n in "abcd"]
    profile = make_profile({n: [0.1] * 3 for n in "abcd"})
    known = setting(profile, make_cluster(devices), Workload(batch_size=8), 8)
    groups = (Group(0, 1, (0,)), Group(1, 2, (1, 2)), Group(2, 3, (3,)))
    even = [found.warmup for found in layouts(groups, [[8], [4, 4], [8]], known)]
    assert even == [(4, 3, 1), (6, 4, 1), (8, 6, 1), (8, 8, 1)]
    # A replica with a quarter of the micro-batches holds each of them four times as long.
    uneven = [found.warmup for found in layouts(groups, [[8], [6, 2], [8]], known)]
    assert uneven[:2] == [(4, 3, 1), (6, 5, 1)]


# ---------------------------------------------------------------- search against brute force

seconds = st.integers(1, 12).map(lambda n: n / 100)


def make_problem(seed, max_blocks=5):
    """Returns (profile, cluster, workload); drawn value by value, most would be trivial."""
    random = Random(seed)
    names = "abc"[: random.choice([1, 2, 2, 3, 3])]
    num_blocks = random.randint(1, max_blocks)
    times = {n: [random.randint(1, 12) / 100 for _ in range(num_blocks)] for n in names}
    devices = [
        make_device(
            n,
            memory_bytes=random.choice([15_000, 50_000, 10**9, 10**9]),
            idle_w=random.randint(0, 5),
            busy_w=random.randint(5, 30),
            tx_j_per_byte=random.choice([0.0, 1e-5]),
        )
        for n in names
    ]
    rates = {p: random.choice([1e4, 1e5, 1e6]) for p in permutations(names, 2)}
    is_shared = random.random() < 0.5
    cluster = make_cluster(
        devices,
        rate=min(rates.values(), default=1.0) if is_shared else lambda a, b: rates[a, b],
        latency_s=random.choice([0.0, 0.02]),
        missing=(("a", "b"),) if len(names) > 1 and random.random() < 0.2 else (),
        is_shared=is_shared,
        contention=random.choice([(1.0,), (1.0, 0.8)]),
    )
    tied = (TiedParameter(name="t", blocks=(0, num_blocks - 1), param_bytes=500),)
    profile = make_profile(
        times, tied=tied if num_blocks > 1 and random.random() < 0.5 else (), input_bytes=500
    )
    workload = Workload(
        kind=random.choice(["train", "infer"]),
        batch_size=4,
        num_microbatches=random.choice([None, 1, 2, 3, 4] if len(names) < 3 else [2, 3]),
        source=random.choice([None, names[0]]),
    )
    return profile, cluster, workload


def problems(**sizes):
    return st.integers(0, 2**32).map(lambda seed: make_problem(seed, **sizes))


def groupings(devices):
    """Yields every list of disjoint non-empty groups of some of the devices."""
    yield ()
    for size in range(1, len(devices) + 1):
        for group in combinations(devices, size):
            rest = [d for d in devices if d not in group]
            yield from ((group, *others) for others in groupings(rest))


def cuts(num_blocks, num_stages):
    for inner in combinations(range(1, num_blocks), num_stages - 1):
        yield (0, *inner, num_blocks)


def by_speed(group, known):
    times = known.costs.forward_s + known.costs.backward_s
    of_replicas = times[list(group.devices), group.first, group.end]
    return tuple(share_microbatches(of_replicas, known.num_microbatches).tolist())


def compositions(total, num_parts):
    """Yields every way to share `total` micro-batches among replicas, each with at least one."""
    for edges in cuts(total, num_parts):
        yield tuple(b - a for a, b in pairwise(edges))


def all_layouts(profile, cluster, workload):
    """Yields (layout, setting) of every placement, every share and the windows of `layouts`."""
    for m in microbatch_choices(workload):
        known = setting(profile, cluster, workload, m)
        for order in groupings(range(len(cluster.devices))):
            for edges in cuts(known.costs.num_blocks, len(order)) if order else ():
                groups = tuple(Group(*s) for s in zip(edges, edges[1:], order, strict=False))
                if any(0 in by_speed(group, known) for group in groups):
                    continue  # A group with a replica that speed gives nothing is never planned.
                for counts in product(*(compositions(m, len(g)) for g in order)):
                    yield from ((layout, known) for layout in layouts(groups, counts, known))


def price(layout, known, problem):
    """Returns the simulated (seconds, joules) of a layout, None if memory or a link is missing."""
    if memory_share(layout, known, as_step(layout, known, known.costs))[0] > 1:
        return None
    names = [device.name for device in problem[1].devices]
    nothing = evaluate(Layout((Group(0, 1, (0,)),), ((1,),), (1,), layout.kind), known)
    found = to_plan(layout, nothing._replace(peak_bytes=(0.0,) * len(layout.devices)), known, names)
    try:
        timeline = simulated(*problem, found)
    except ValueError as error:
        assert "no link" in str(error)
        return None
    return timeline.makespan_s, timeline.energy_j


def is_by_speed(layout, known):
    """Returns whether all shares are such that the last replica of a stage ends earliest.

    Bounds, and with them what is proven, are of such shares; others are found by descent.
    """
    return layout.counts == tuple(by_speed(group, known) for group in layout.groups)


def brute_force(problem):
    """Returns (seconds, joules, are shares by speed) of every layout that can run."""
    values = [
        (price(layout, known, problem), is_by_speed(layout, known))
        for layout, known in all_layouts(*problem)
    ]
    return [(*value, by_speed) for value, by_speed in values if value]


@settings(max_examples=20)
@given(problem=problems(), slack=st.floats(1.0, 1.5))
# The order of transfers by consumer, which a plan has, is a little behind that by tails.
@example(problem=make_problem(4980107), slack=1.0)
def test_search_against_brute_force(problem, slack):
    values = brute_force(problem)
    for i, objective in enumerate(("time", "energy")):
        result = search(*problem, QoE(objective=objective), effort_s=EFFORT_S)
        assert bool(result.plans) == bool(values)
        if not values:
            return
        best = min(value[i] for value in values if value[2])
        plans = sorted(result.plans, key=lambda p: (p.cost.makespan_s, p.cost.energy_j)[i])
        reached = (plans[0].cost.makespan_s, plans[0].cost.energy_j)[i]
        # An order of transfers by consumer may be that far behind the one by tails.
        assert reached * (1 - CLEAR_GAIN) <= best * 1.01
        again = predict(*problem, plans[0]).cost
        assert (again.makespan_s, again.energy_j)[i] <= best * 1.01
        # What is claimed of all other chains holds of all of them.
        proven = min((value[i] for value in values if value[2]), default=inf)
        assert proven >= reached * (1 - result.gap) * (1 - 1e-9)
        assert 0 <= result.gap <= 1
        if result.is_optimal:
            assert result.gap <= CLEAR_GAIN
    # Shares far from those by speed are only tried near plans that are good already.
    by_speed = [value for value in values if value[2]]
    limit_j = min(value[1] for value in by_speed) * slack
    best_s = min(value[0] for value in by_speed if value[1] <= limit_j * (1 + 1e-9))
    found = search(*problem, QoE(energy_j=limit_j * 1.001), effort_s=EFFORT_S).plans
    fastest = min(found, key=lambda p: p.cost.makespan_s)
    assert fastest.cost.makespan_s * (1 - CLEAR_GAIN) <= best_s * 1.01
    assert fastest.cost.energy_j <= limit_j * 1.001 * (1 + 1e-9)


def bounds_of(known, cluster):
    """Returns every chain by its groups."""
    media = shared_media(cluster, known.devices)
    chains, _ = Chains(known, media, twins(known, media), 0.0).enumerate(
        "time", cutoff_s=inf, cutoff_j=inf, width=10**6, per_state=10**6
    )
    return {chain.groups: chain for chain in chains}


@settings(max_examples=25)
@given(problem=problems(max_blocks=4))
# Gradients that are reduced during the last backward keep one channel busy until the end.
@example(problem=make_problem(182, max_blocks=4))
@example(problem=make_problem(868, max_blocks=4))
def test_no_layout_beats_its_bounds(problem):
    bounds = {}
    for layout, known in all_layouts(*problem):
        price_s, price_j = price(layout, known, problem) or (inf, inf)
        if price_s == inf:
            continue
        if known.num_microbatches not in bounds:
            bounds[known.num_microbatches] = bounds_of(known, problem[1])
        chain = bounds[known.num_microbatches].get(layout.groups)
        if chain is None or layout.counts != chain.counts:
            continue  # A twin in its place, or shares that are not by speed.
        assert chain.bound_s <= price_s * (1 + 1e-9)
        assert chain.bound_j <= price_j * (1 + 1e-9)


def merit(found):
    """What plans are sorted by: one device goes first if others gain no more than that."""
    return found.cost.makespan_s * (1 - CLEAR_GAIN if len(devices_of(found)) == 1 else 1)


@settings(max_examples=15)
@given(problem=problems())
def test_plans_are_a_front_within_memory(problem):
    profile, cluster, workload = problem
    result = search(*problem, effort_s=EFFORT_S)
    memory = {d.name: d.memory_bytes for d in cluster.devices}
    values = []
    for found in result.plans:
        assert all(m.peak_bytes <= memory[m.device] for m in found.cost.memory)
        assert found.devices == tuple(d.name for d in cluster.devices)
        timeline = simulated(*problem, found)
        assert timeline.makespan_s == pytest.approx(found.cost.makespan_s)
        assert timeline.energy_j == pytest.approx(found.cost.energy_j)
        # Priced by tails, which the plan's own order of transfers is hardly worse than.
        again = predict(profile, cluster, workload, found).cost
        assert again.makespan_s >= found.cost.makespan_s * (1 - CLEAR_GAIN) * (1 - 1e-9)
        assert [m.peak_bytes for m in again.memory] == [m.peak_bytes for m in found.cost.memory]
        assert [m.peak_bytes for m in timeline.memory] == pytest.approx(
            [
                m.peak_bytes
                for m in sorted(again.memory, key=lambda m: found.devices.index(m.device))
            ],
            abs=1,
        )
        share = max(m.peak_bytes / memory[m.device] for m in found.cost.memory)
        values.append((again.makespan_s, again.energy_j, share))
    assert len(set(result.plans)) == len(result.plans) <= 12
    merits = [merit(found) for found in result.plans]
    assert merits == sorted(merits, key=lambda s: float(f"{s:.9g}"))
    others = [v for v, p in zip(values, result.plans, strict=True) if p != result.best_single]
    for a, b in permutations(others, 2):
        assert not all(x <= y * (1 - 1e-6) for x, y in zip(a, b, strict=True))


@settings(max_examples=5)
@given(problem=problems(), seed=st.integers(0, 3))
def test_a_seed_gives_one_result(problem, seed):
    first, again = (search(*problem, effort_s=EFFORT_S, seed=seed) for _ in range(2))
    assert first == again


def test_gap_shrinks_with_effort():
    devices = [make_device(n) for n in "abcd"]
    times = {n: [0.01 * (1 + (i * b) % 5) for b in range(6)] for i, n in enumerate("abcd")}
    problem = make_profile(times), make_cluster(devices, rate=1e5), Workload(batch_size=16)
    little, much = (search(*problem, effort_s=effort_s) for effort_s in (0.001, 2.0))
    assert little.gap > 0
    assert not little.is_optimal
    assert much.gap < little.gap
    best_s, first_s = (min(p.cost.makespan_s for p in found.plans) for found in (much, little))
    assert first_s * (1 - little.gap) <= best_s <= first_s


# ---------------------------------------------------------------- what a user would expect


def test_fast_link_uses_both_devices():
    problem = two([0.1] * 4, [0.1] * 4)
    best = plan(*problem)[0]
    assert sorted(devices_of(best)) == ["a", "b"]
    assert best.cost.makespan_s < 0.6 * search(*problem).best_single.cost.makespan_s


def test_slow_link_answers_one_device():
    best = plan(*two([0.1] * 4, [0.09] * 4, rate=100.0))[0]
    assert devices_of(best) == ["b"]


@pytest.mark.parametrize(("times_slower", "used"), [(14, ["a", "b"]), (15.8, ["b"])])
def test_a_gain_too_small_to_see_takes_no_second_device(times_slower, used):
    # A sixteenth of the batch on the slow device saves 6 %, and 1 % if that takes nearly as long.
    result = search(*two([0.01 * times_slower] * 4, [0.01] * 4, rate=1e9))
    assert sorted(devices_of(result.plans[0])) == used
    fastest = min(result.plans, key=lambda p: p.cost.makespan_s)
    assert sorted(devices_of(fastest)) == ["a", "b"]


def test_missing_links_answer_one_device():
    problem = two([0.1] * 4, [0.09] * 4, missing=(("a", "b"), ("b", "a")))
    result = search(*problem)
    assert all(len(devices_of(found)) == 1 for found in result.plans)
    reasons = dict(result.rejected)
    assert reasons["a | b"].startswith("no link ")


def test_uneven_shares_of_a_fast_and_a_slow_device():
    # One block can not be cut, so that only replicas can share it.
    best = plan(*two([0.1], [0.3]))[0]
    shares = {r.device: r.share for r in best.stages[0].replicas}
    assert shares == {"a": 0.75, "b": 0.25}
    counts = [sum(route[0] == i for route in best.routes) for i in (0, 1)]
    assert counts == [round(best.num_microbatches * s) for s in shares.values()]


def test_useless_device_is_left_out():
    devices = [make_device(n) for n in "abc"]
    profile = make_profile({"a": [0.1] * 4, "b": [0.1] * 4, "c": [30.0] * 4})
    best = plan(profile, make_cluster(devices), Workload(batch_size=8))[0]
    assert "c" not in devices_of(best)
    assert best.devices == ("a", "b", "c")
    assert best.placement(2) is None


def test_memory_forces_a_split():
    profile = make_profile({"a": [0.1] * 4, "b": [0.1] * 4})
    # State of one block: 4 x 1000 bytes.
    devices = [make_device("a", memory_bytes=14_000), make_device("b", memory_bytes=14_000)]
    result = search(profile, make_cluster(devices, rate=10.0), Workload(batch_size=2))
    assert result.best_single is None
    assert all(len(found.stages) == 2 for found in result.plans)
    assert "memory: a needs" in dict(result.rejected)["a"]


def test_memory_that_fits_nowhere_is_named():
    profile = make_profile({"a": [0.1], "b": [0.1]}, param_bytes=10**9)
    devices = [make_device("a", memory_bytes=10**9), make_device("b", memory_bytes=2 * 10**9)]
    with pytest.raises(InfeasiblePlanError) as error:
        plan(profile, make_cluster(devices), Workload())
    assert "memory: a needs 4 GB, has 1 GB" in str(error.value)
    assert "\n" not in str(error.value)


def test_unreachable_qoe_names_the_bound_and_the_nearest_plan():
    problem = two([0.1] * 4, [0.1] * 4)
    free = plan(*problem)[0]
    with pytest.raises(InfeasiblePlanError) as error:
        plan(*problem, QoE(step_s=0.01, energy_j=1e9))
    message = str(error.value)
    assert "step_s <= 0.01 s" in message
    assert "energy_j" not in message
    assert f"{free.cost.makespan_s:.4g} s and {free.cost.energy_j:.4g} J" in message
    result = search(*problem, QoE(step_s=0.01))
    assert result.plans == []
    assert result.problem
    assert result.best_single.cost.makespan_s > 0.01


def test_rejected_candidates_have_reasons():
    result = search(*two([0.1] * 4, [0.11] * 4), QoE(step_s=10.0))
    assert result.rejected
    assert all(text and reason for text, reason in result.rejected)
    tight = search(*two([0.1] * 4, [0.11] * 4), QoE(step_s=14.0))
    alone = next(reason for text, reason in tight.rejected if text.startswith("b[0-3] x"))
    assert alone == "breaks step_s <= 14 s: 21.12"


@pytest.mark.parametrize(
    ("qoe", "holds"),
    [
        (QoE(energy_j=160.0), lambda c: c.energy_j <= 160),
        (QoE(power_w=9.0), lambda c: c.energy_j / c.makespan_s <= 9),
        (QoE(battery_j=5.0), lambda c: True),
    ],
)
def test_bounds_hold(qoe, holds):
    devices = [
        make_device("a", idle_w=5, busy_w=20, battery_j=100.0),
        make_device("b", idle_w=1, busy_w=8),
    ]
    profile = make_profile({"a": [0.1] * 4, "b": [0.1] * 4})
    plans = plan(profile, make_cluster(devices), Workload(batch_size=16), qoe)
    assert all(holds(found.cost) for found in plans)
    if qoe.battery_j:
        assert all(devices_of(found) == ["b"] for found in plans)


def test_frame_rate_is_of_pipelined_requests():
    profile, cluster, _ = two([0.1] * 4, [0.1] * 4)
    workload = Workload(kind="infer", batch_size=1)
    # Two stages of two blocks start a request every 0.2 s although one takes 0.4 s.
    assert len(plan(profile, cluster, workload, QoE(frame_rate_hz=4.9))[0].stages) == 2
    with pytest.raises(InfeasiblePlanError, match="frame_rate_hz >= 5.1 Hz"):
        plan(profile, cluster, workload, QoE(frame_rate_hz=5.1))


def test_energy_objective_may_leave_a_device_out():
    devices = [make_device("a", idle_w=5, busy_w=50), make_device("b", idle_w=1, busy_w=5)]
    profile = make_profile({"a": [0.1] * 4, "b": [0.2] * 4})
    best = plan(profile, make_cluster(devices), Workload(batch_size=8), QoE(objective="energy"))[0]
    assert devices_of(best) == ["b"]
    # 4 blocks of 3 x 0.2 s per sample at 5 W.
    assert best.cost.energy_j == pytest.approx(8 * 4 * 0.6 * 5)


@pytest.mark.parametrize(
    ("workload", "qoe", "field"),
    [
        (Workload(), QoE(latency_s=1), "latency_s"),
        (Workload(kind="infer"), QoE(step_s=1), "step_s"),
        (Workload(), QoE(deadline_s=1), "deadline_s"),
        (Workload(kind="infer"), QoE(ttft_s=1), "ttft_s"),
        (Workload(kind="infer"), QoE(tpot_s=1), "tpot_s"),
        (Workload(kind="generate"), QoE(step_s=1), "step_s"),
    ],
)
def test_bound_that_can_not_be_judged_is_refused(workload, qoe, field):
    profile, cluster, _ = two([0.1], [0.1])
    with pytest.raises(SpecError, match=field):
        plan(profile, cluster, workload, qoe)


def test_microbatch_choices():
    assert microbatch_choices(Workload(batch_size=12)) == [1, 2, 4, 6, 12]
    assert microbatch_choices(Workload(batch_size=7)) == [1, 7]
    assert microbatch_choices(Workload(batch_size=12, num_microbatches=5)) == [5]


def test_equal_devices_are_tried_once():
    devices = [make_device(n) for n in "abcd"]
    profile = make_profile({n: [0.1] * 4 for n in "abcd"})
    cluster = make_cluster(devices)
    known = setting(profile, cluster, Workload(batch_size=8), 8)
    assert twins(known, shared_media(cluster, known.devices)) == {0: 0, 1: 0, 2: 0, 3: 0}
    orders = {tuple(g.devices for g in groups) for groups in bounds_of(known, cluster)}
    # One per sequence of group sizes: the compositions of 1, 2, 3 and 4.
    assert len(orders) == 1 + 2 + 4 + 8
    # The device with the inputs is not like the others.
    known = setting(profile, cluster, Workload(batch_size=8, source="b"), 8)
    assert twins(known, shared_media(cluster, known.devices)) == {0: 0, 1: 1, 2: 0, 3: 0}


def test_many_devices_are_all_searched():
    names = [f"d{i}" for i in range(9)]
    times = {n: [9.0 if n != "d8" else 0.1] * 2 for n in names}
    cluster = make_cluster([make_device(n) for n in names], rate=10.0)
    result = search(make_profile(times), cluster, Workload(batch_size=4), effort_s=EFFORT_S)
    assert devices_of(result.plans[0]) == ["d8"]
    assert result.plans[0].devices == tuple(names)


def test_predict_refuses_a_plan_of_another_model():
    profile, cluster, workload = two([0.1] * 3, [0.1] * 3)
    stage = Stage(index=0, first_block=0, last_block=1, replicas=(Replica(device="a"),))
    with pytest.raises(ValueError, match="given 2 blocks, allowed 3"):
        predict(profile, cluster, workload, Plan(devices=("a", "b"), stages=(stage,)))


def test_predict_names_a_missing_link():
    profile, cluster, workload = two([0.1] * 2, [0.1] * 2, missing=(("b", "a"),))
    stages = tuple(
        Stage(index=i, first_block=i, last_block=i, replicas=(Replica(device="ab"[i]),))
        for i in (0, 1)
    )
    with pytest.raises(ValueError, match="no link"):
        predict(profile, cluster, workload, Plan(devices=("a", "b"), stages=stages))


# ---------------------------------------------------------------- percentiles


@pytest.mark.parametrize("percentile", [10, 50, 90, 95])
def test_percentile_is_that_of_sampled_rates(percentile):
    profile, cluster = halves(latency_s=0.001, rate=1e5, output_bytes=2000)
    varying = [
        m.model_copy(update={"rate_p10_bytes_per_s": 2e4, "rate_p90_bytes_per_s": 3e5})
        for m in cluster.media
    ]
    cluster = cluster.model_copy(update={"media": tuple(varying)})
    workload = Workload(kind="infer", batch_size=4)
    found = plan(profile, cluster, workload, QoE(percentile=percentile))[0]
    medium = next(m for m in varying if m.name == ">".join(devices_of(found)))
    random, n = Random(percentile), 500
    below = 0
    for _ in range(n):
        rate = rate_at(medium, random.uniform(1e-9, 1 - 1e-9))
        fixed = Medium(name=medium.name, rate_bytes_per_s=rate, latency_s=medium.latency_s)
        sampled = cluster.model_copy(
            update={"media": tuple(fixed if m is medium else m for m in varying)}
        )
        below += simulated(profile, sampled, workload, found).makespan_s <= found.cost.makespan_s
    share = percentile / 100
    assert abs(below / n - share) <= 4 * sqrt(share * (1 - share) / n)


def test_higher_percentiles_take_longer_and_may_choose_another_plan():
    profile = make_profile({"a": [0.1] * 2, "b": [0.09] * 2}, input_bytes=10_000)
    devices = [make_device(n) for n in "ab"]
    cluster = make_cluster(devices, rate=1e6, rate_p10_bytes_per_s=1e3)
    workload = Workload(kind="infer", batch_size=8, source="b")
    plans = [plan(profile, cluster, workload, QoE(percentile=p))[0] for p in (50, 80, 90, 99)]
    times = [found.cost.makespan_s for found in plans]
    assert times == sorted(times)
    assert sorted(devices_of(plans[0])) == ["a", "b"]
    assert devices_of(plans[-1]) == ["b"]
    limit_s = times[0] * 1.01
    plan(profile, cluster, workload, QoE(latency_s=limit_s))
    with pytest.raises(InfeasiblePlanError, match="latency_s"):
        plan(profile, cluster, workload, QoE(latency_s=limit_s, percentile=99))


# ---------------------------------------------------------------- generation


def generate(prompt_tokens, new_tokens, **fields):
    return Workload(kind="generate", prompt_tokens=prompt_tokens, new_tokens=new_tokens, **fields)


def test_tokens_of_two_devices_by_hand():
    profile, cluster = halves(rate=1e4, latency_s=0.003, times=(0.01, 0.02))
    found = plan(profile, cluster, generate(20, 5, num_microbatches=1))[0]
    assert len(found.stages) == 2
    # Per token 10 ms and 20 ms of compute, 100 bytes, and a delay both ways.
    ttft_s = 20 * (0.01 + 0.02 + 100 / 1e4) + 0.003
    tpot_s = 0.01 + 0.02 + 100 / 1e4 + 2 * 0.003
    assert found.cost.ttft_s == pytest.approx(ttft_s)
    assert found.cost.tpot_s == pytest.approx(tpot_s)
    assert found.cost.makespan_s == pytest.approx(ttft_s + 4 * tpot_s)


def test_one_device_generates_by_hand():
    profile = make_profile({"a": [0.01] * 3}, launch_s={"a": 0.1})
    found = plan(profile, make_cluster([make_device("a")]), generate(20, 5, num_microbatches=1))[0]
    assert found.cost.ttft_s == pytest.approx(3 * (0.1 + 0.2))
    assert found.cost.tpot_s == pytest.approx(3 * (0.1 + 0.01))
    assert found.cost.energy_j == pytest.approx(found.cost.makespan_s * 10.0)


def test_cache_of_long_answers_forces_a_split():
    devices = [make_device(n, memory_bytes=400_000) for n in "ab"]
    profile = make_profile({"a": [0.01] * 4, "b": [0.02] * 4}, activation_bytes=100)
    cluster = make_cluster(devices, rate=1e5, latency_s=0.01)
    short, long = (plan(profile, cluster, generate(8, n))[0] for n in (10, 1000))
    assert devices_of(short) == ["a"]
    assert sorted(devices_of(long)) == ["a", "b"]
    longer = plan(profile, cluster, generate(8, 110))[0]
    assert devices_of(longer) == ["a"]
    cached_bytes = longer.cost.memory[0].peak_bytes - short.cost.memory[0].peak_bytes
    assert cached_bytes == 4 * 100 * 100


def test_bounds_of_tokens_choose_different_plans():
    # One device is slow to launch, the other slow to compute.
    profile = make_profile({"a": [0.001], "b": [0.01]}, launch_s={"a": 0.5, "b": 0.01})
    problem = profile, make_cluster([make_device(n) for n in "ab"]), generate(200, 10)
    first = plan(*problem, QoE(ttft_s=1.0))[0]
    later = plan(*problem, QoE(tpot_s=0.1))[0]
    assert (devices_of(first), devices_of(later)) == (["a"], ["b"])
    assert first.cost.ttft_s <= 1.0 < later.cost.ttft_s
    assert later.cost.tpot_s <= 0.1 < first.cost.tpot_s
    with pytest.raises(InfeasiblePlanError, match="ttft_s <= 1 s|tpot_s <= 0.1 s"):
        plan(*problem, QoE(ttft_s=1.0, tpot_s=0.1))


def test_long_prompts_are_pipelined():
    profile = make_profile({n: [0.001] * 4 for n in "ab"}, output_bytes=10, activation_bytes=10)
    problem = profile, make_cluster([make_device(n) for n in "ab"]), generate(512, 1)
    result = search(*problem)
    assert result.plans[0].cost.ttft_s < 0.7 * result.best_single.cost.ttft_s


@settings(max_examples=10)
@given(
    times=st.lists(st.lists(seconds, min_size=3, max_size=3), min_size=2, max_size=2),
    rate=st.sampled_from([1e3, 1e5, 1e7]),
    tokens=st.tuples(st.sampled_from([1, 8, 64]), st.integers(0, 6)),
    m=st.sampled_from([None, 1]),
)
def test_generation_against_brute_force(times, rate, tokens, m):
    profile = make_profile(dict(zip("ab", times, strict=True)), output_bytes=100)
    cluster = make_cluster([make_device(n) for n in "ab"], rate=rate, latency_s=0.01)
    problem = profile, cluster, generate(*tokens, num_microbatches=m)
    best_s = inf
    for layout, known in all_layouts(*problem):
        # A sequence is never spread over replicas.
        if all(len(group.devices) == 1 for group in layout.groups):
            price_s = evaluate(layout, known).makespan_s
            best_s = min(best_s, price_s)
            chain = bounds_of(known, cluster).get(layout.groups)  # None: a twin in its place.
            assert chain is None or chain.bound_s <= price_s * (1 + 1e-9)
    result = search(*problem, effort_s=EFFORT_S)
    reached_s = min(found.cost.makespan_s for found in result.plans)
    assert reached_s <= best_s * 1.01
    assert best_s >= reached_s * (1 - result.gap) * (1 - 1e-9)


# ---------------------------------------------------------------- power modes

ECO = PowerMode(name="eco", speed_factor=0.5, power_factor=0.2)
BOOST = PowerMode(name="boost", speed_factor=1.5, power_factor=3.0)


def moded(**modes):
    fields = {n: {"power_modes": of_device} for n, of_device in modes.items()}
    return (*halves(times=(0.1, 0.01), fields=fields), Workload(kind="infer", batch_size=8))


def modes_of(found):
    return {r.device: r.power_mode for stage in found.stages for r in stage.replicas}


def test_energy_picks_a_slower_mode_of_a_device_that_waits():
    plain = moded()
    base = plan(*plain, QoE(objective="energy"))[0]
    problem = moded(a=(ECO,), b=(ECO,))
    limit_s = plan(*plain)[0].cost.makespan_s * 1.05
    best = plan(*problem, QoE(objective="energy", latency_s=limit_s))[0]
    assert modes_of(best) == {"a": "default", "b": "eco"}
    assert best.cost.energy_j < base.cost.energy_j
    assert best.cost.makespan_s <= limit_s
    assert simulated(*problem, best).energy_j == pytest.approx(best.cost.energy_j)
    free = plan(*problem, QoE(objective="energy"))[0]
    assert free.cost.energy_j <= best.cost.energy_j * (1 + 1e-9)


def test_time_picks_no_slower_mode_but_a_faster_one():
    plain_s = plan(*moded())[0].cost.makespan_s
    slower = plan(*moded(a=(ECO,), b=(ECO,)))[0]
    assert set(modes_of(slower).values()) == {"default"}
    assert slower.cost.makespan_s == pytest.approx(plain_s)
    faster = plan(*moded(a=(ECO, BOOST)))[0]
    assert modes_of(faster) == {"a": "boost", "b": "default"}
    assert faster.cost.makespan_s < plain_s


# ---------------------------------------------------------------- codecs


def sent_codecs(found):
    return {name for c in found.codecs for name in (c.forward, c.backward)} - {"none"}


def coded(rate, kind="infer"):
    memory_bytes = {"infer": 8_000_000, "train": 30_000_000}[kind]
    fields = {n: {"dispatch_s": 1e-4} for n in "ab"}
    problem = halves(
        rate=rate,
        output_bytes=100_000,
        param_bytes=5_000_000,
        memory_bytes=memory_bytes,
        fields=fields,
    )
    return (*problem, Workload(kind=kind, batch_size=4, num_microbatches=4))


def test_no_codec_without_permission():
    for found in plan(*coded(1e5)):
        assert not sent_codecs(found)


def test_codec_on_a_slow_link_within_the_loss():
    plain, eight, four = (
        plan(*coded(1e5), QoE(max_accuracy_loss=loss))[0] for loss in (0.0, 0.01, 0.03)
    )
    assert sent_codecs(eight) <= {"int8", "fp8"}
    assert sent_codecs(eight)
    assert sent_codecs(four) == {"int4"}
    assert plain.cost.makespan_s > 2 * eight.cost.makespan_s > 2 * four.cost.makespan_s
    for found, loss in ((eight, 0.03), (four, 0.2)):
        assert all(CODECS[name].loss <= loss for name in sent_codecs(found))


def test_no_codec_on_a_fast_link():
    assert not sent_codecs(plan(*coded(1e12), QoE(max_accuracy_loss=0.2))[0])


def test_codec_in_both_directions_of_training():
    problem = coded(1e5, kind="train")
    found = plan(*problem, QoE(max_accuracy_loss=0.01))[0]
    assert found.codecs == (BoundaryCodec(forward="int8", backward="int8"),)
    assert simulated(*problem, found).makespan_s == pytest.approx(found.cost.makespan_s)


# ---------------------------------------------------------------- inputs elsewhere


def test_inputs_elsewhere_cost_a_transfer():
    profile = make_profile({"a": [0.1] * 2, "b": [0.1] * 2}, input_bytes=50_000)
    devices = [make_device("a", tx_j_per_byte=1e-5), make_device("b")]
    cluster = make_cluster(devices, rate=1e5, latency_s=0.01)
    stage = Stage(index=0, first_block=0, last_block=1, replicas=(Replica(device="b"),))
    on_b = Plan(devices=("a", "b"), stages=(stage,), schedule_kind="wavefront")
    here, there = (
        predict(profile, cluster, Workload(kind="infer", source=source), on_b).cost
        for source in ("b", "a")
    )
    assert here.makespan_s == pytest.approx(0.2)
    assert there.makespan_s == pytest.approx(0.2 + 0.5 + 0.01)
    waiting_j = 0.51 * 1.0
    assert there.energy_j == pytest.approx(here.energy_j + waiting_j + 50_000 * 1e-5)


def test_large_inputs_keep_the_first_stage_at_the_source():
    cluster = make_cluster([make_device(n) for n in "ab"], rate=1e5)
    workload = Workload(kind="infer", batch_size=2, source="a")
    times = {"a": [0.05] * 4, "b": [0.01] * 4}
    large, small = (
        plan(make_profile(times, input_bytes=size, output_bytes=100), cluster, workload)[0]
        for size in (100_000, 10)
    )
    assert devices_of(large)[0] == "a"
    assert devices_of(small)[0] == "b"
    with pytest.raises(ValueError, match=r"workload.source: given 'z'"):
        plan(make_profile(times), cluster, Workload(source="z"))


# ---------------------------------------------------------------- a contended channel


@pytest.mark.parametrize(("kind", "size_bytes"), [("train", 150_000), ("infer", 400_000)])
def test_planner_that_knows_the_channel_beats_one_that_does_not(kind, size_bytes):
    names = "abcd"
    devices = [make_device(n) for n in names]
    profile = make_profile(
        {n: [0.05 * (1 + i / 10)] * 6 for i, n in enumerate(names)},
        output_bytes=size_bytes,
        input_bytes=size_bytes,
        param_bytes=400_000,
    )
    believed = make_cluster(devices, rate=1e6)
    real = make_cluster(devices, rate=1e6, is_shared=True)
    workload = Workload(kind=kind, batch_size=16, source="a")
    naive, aware = (plan(profile, cluster, workload)[0] for cluster in (believed, real))
    assert naive.stages != aware.stages
    assert len(devices_of(aware)) <= len(devices_of(naive))
    played_s = simulated(profile, real, workload, naive).makespan_s
    assert simulated(profile, real, workload, aware).makespan_s < played_s
    # On links of its own it would have been the better one.
    alone_s = simulated(profile, believed, workload, naive).makespan_s
    assert alone_s <= simulated(profile, believed, workload, aware).makespan_s


@pytest.mark.slow
def test_six_devices_and_32_blocks_take_seconds():
    names = [f"d{i}" for i in range(6)]
    devices = [make_device(n, busy_w=10 + i) for i, n in enumerate(names)]
    times = {n: [0.01 * (1 + i / 3) * (1 + b % 3) for b in range(32)] for i, n in enumerate(names)}
    cluster = make_cluster(devices, rate=1e6, latency_s=0.003)
    result = search(make_profile(times), cluster, Workload(batch_size=32))
    assert result.plans[0].cost.makespan_s < result.best_single.cost.makespan_s / 2
