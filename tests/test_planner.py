from itertools import combinations, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora.errors import InfeasiblePlanError, ScheduleError, SpecError
from dora.planner import plan, predict, search
from dora.planner.bounds import Bounds, Suffix, twins
from dora.planner.cost import interpolate, ring_s, share_microbatches, stage_costs
from dora.planner.makespan import PipelineTimes, Wire, finish_times_s, replica_order
from dora.planner.predict import Group, evaluate, layouts, setting
from dora.planner.search import memory_share, microbatch_choices
from dora.scheduler.pipeline import SCHEDULES
from dora.spec import (
    BlockCost,
    BlockProfile,
    Cluster,
    Device,
    Link,
    Medium,
    ModelProfile,
    Plan,
    QoE,
    Replica,
    Stage,
    TiedParameter,
    Timing,
    Workload,
)


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


def make_cluster(devices, *, rate=1e9, latency_s=0.0, missing=()):
    """Every pair has the same private rate, a number or a function of the pair."""
    pairs = [p for p in permutations([d.name for d in devices], 2) if p not in missing]
    media = tuple(
        Medium(
            name=f"{a}>{b}",
            rate_bytes_per_s=rate(a, b) if callable(rate) else rate,
            latency_s=latency_s,
        )
        for a, b in pairs
    )
    links = tuple(Link(src=a, dst=b, media=(f"{a}>{b}",)) for a, b in pairs)
    return Cluster(devices=tuple(devices), media=media, links=links)


def make_profile(
    times, *, output_bytes=1000, param_bytes=1000, activation_bytes=1000, backward=2.0, **fields
):
    """`times`: device -> seconds per sample of each block."""
    num_blocks = len(next(iter(times.values())))
    blocks = []
    for i in range(num_blocks):
        costs = tuple(
            BlockCost(
                microbatch_size=size,
                flops=1,
                activation_bytes=activation_bytes * size,
                output_bytes=output_bytes * size,
                timings=tuple(
                    Timing(device=d, forward_s=t[i] * size, backward_s=backward * t[i] * size)
                    for d, t in times.items()
                ),
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


def test_ring_is_paced_by_the_slowest_link():
    devices = [make_device(name) for name in "abc"]
    cluster = make_cluster(devices, rate=lambda a, b: 10.0 if (a, b) == ("b", "c") else 100.0)
    known = setting(make_profile({n: [1.0] for n in "abc"}), cluster, Workload(batch_size=4), 4)
    assert float(ring_s((0, 1, 2), 300.0, known.links)) == pytest.approx(4 * 100 / 10)
    assert float(ring_s((0,), 300.0, known.links)) == 0


# ---------------------------------------------------------------- makespan


@given(st.sets(st.integers(0, 12)), st.integers(1, 14), st.sampled_from(sorted(SCHEDULES)))
def test_order_is_the_one_that_runs(microbatches, window, kind):
    own = sorted(microbatches)
    actions = SCHEDULES[kind](0, own, window)
    assert replica_order(own, window, kind) == [(a.kind == "F", a.microbatch) for a in actions]


FREE = Wire(0.0, 0.0)


def uniform(num_stages, wire=FREE, forward_s=1.0, backward_s=2.0):
    hops = [[[wire]]] * (num_stages - 1)
    return PipelineTimes([[forward_s]] * num_stages, [[backward_s]] * num_stages, hops, hops)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_uniform_pipeline_is_the_closed_form(num_stages, kind):
    n = 9
    warmup = range(num_stages, 0, -1)
    ends = finish_times_s(uniform(num_stages), [(0,) * num_stages] * n, warmup, kind)
    assert ends[0][0] == pytest.approx((n + num_stages - 1) * 3)


def test_latency_delays_and_bytes_occupy():
    n, routes = 4, [(0, 0)] * 4
    late = finish_times_s(uniform(2, Wire(0.0, 5.0), 1.0, 0.0), routes, (1, 1), "wavefront")
    assert late[1][0] == n + 5 + 1
    slow = finish_times_s(uniform(2, Wire(5.0, 0.0), 1.0, 0.0), routes, (1, 1), "wavefront")
    assert slow[1][0] == 1 + n * 5 + 1


def test_deeper_window_hides_a_slow_link():
    routes = [(0, 0)] * 16
    times = uniform(2, Wire(0.0, 6.0))
    ends = [finish_times_s(times, routes, (w, 1), "1f1b")[0][0] for w in (2, 4, 8)]
    assert ends[0] > 1.3 * ends[2]
    assert ends[0] > ends[1] > ends[2]


def test_ascending_windows_deadlock():
    with pytest.raises(ScheduleError, match="deadlock"):
        finish_times_s(uniform(2), [(0, 0)] * 3, (1, 2), "1f1b")


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


@st.composite
def problems(draw, max_devices=3, max_blocks=5):
    names = "abc"[: draw(st.integers(1, max_devices))]
    num_blocks = draw(st.integers(1, max_blocks))
    times = {n: draw(st.lists(seconds, min_size=num_blocks, max_size=num_blocks)) for n in names}
    devices = [
        make_device(
            n,
            memory_bytes=draw(st.sampled_from([6_000, 20_000, 10**9])),
            idle_w=draw(st.integers(0, 5)),
            busy_w=draw(st.integers(5, 30)),
            tx_j_per_byte=draw(st.sampled_from([0.0, 1e-5])),
        )
        for n in names
    ]
    rates = {p: draw(st.sampled_from([1e3, 1e5, 1e7])) for p in permutations(names, 2)}
    missing = draw(st.sampled_from([(), (("a", "b"),)]))
    cluster = make_cluster(
        devices,
        rate=lambda a, b: rates[a, b],
        latency_s=draw(st.sampled_from([0.0, 0.02])),
        missing=missing if len(names) > 1 else (),
    )
    tied = (TiedParameter(name="t", blocks=(0, num_blocks - 1), param_bytes=500),)
    profile = make_profile(
        times, tied=tied if num_blocks > 1 and draw(st.booleans()) else (), input_bytes=100
    )
    workload = Workload(
        kind=draw(st.sampled_from(["train", "infer"])),
        batch_size=4,
        num_microbatches=draw(st.sampled_from([None, 1, 2, 3, 4])),
    )
    return profile, cluster, workload


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


def all_layouts(profile, cluster, workload):
    """Yields (layout, setting) of every placement, without any bound."""
    for m in microbatch_choices(workload):
        known = setting(profile, cluster, workload, m)
        num_blocks = known.costs.num_blocks
        for order in groupings(range(len(cluster.devices))):
            for edges in cuts(num_blocks, len(order)) if order else ():
                groups = [Group(*s) for s in zip(edges, edges[1:], order, strict=False)]
                times = known.costs.forward_s + known.costs.backward_s
                counts = [
                    share_microbatches([times[d, g.first, g.end] for d in g.devices], m).tolist()
                    for g in groups
                ]
                if all(min(stage) > 0 for stage in counts) and is_linked(groups, known):
                    yield from ((layout, known) for layout in layouts(groups, counts, known))


def is_linked(groups, known):
    for a, b in zip(groups, groups[1:], strict=False):
        for d, e in product(a.devices, b.devices):
            both = [known.links.latency_s[d, e]]
            both += [known.links.latency_s[e, d]] if known.training else []
            if max(both) == float("inf"):
                return False
    return True


def brute_force(profile, cluster, workload, is_allowed=lambda p: True):
    """Returns the least (seconds, joules), each over all allowed plans, or None."""
    values = []
    for layout, known in all_layouts(profile, cluster, workload):
        if memory_share(layout, known)[0] <= 1:
            prediction = evaluate(layout, known)
            value = prediction.makespan_s, prediction.total_j
            if value[0] < float("inf") and is_allowed(value):
                values.append(value)
    return tuple(min(column) for column in zip(*values, strict=True)) if values else None


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_search_equals_brute_force(problem):
    best = brute_force(*problem)
    for i, objective in enumerate(("time", "energy")):
        result = search(*problem, QoE(objective=objective))
        assert bool(result.plans) == (best is not None)
        if best:
            cost = result.plans[0].cost
            assert (cost.makespan_s, cost.energy_j)[i] == pytest.approx(best[i], rel=1e-9)
            assert result.is_optimal


@settings(max_examples=15, deadline=None)
@given(problem=problems(), factor=st.floats(1.0, 1.5))
def test_search_equals_brute_force_under_a_bound(problem, factor):
    free = brute_force(*problem)
    if free is None:
        return
    limit = free[1] * factor
    best = brute_force(*problem, lambda value: value[1] <= limit * (1 + 1e-9))
    found = search(*problem, QoE(energy_j=limit)).plans[0]
    assert found.cost.makespan_s == pytest.approx(best[0], rel=1e-9)
    assert found.cost.energy_j <= limit * (1 + 1e-6)


@settings(max_examples=15, deadline=None)
@given(problem=problems())
def test_no_layout_beats_its_bounds(problem):
    suffixes = {}
    for layout, known in all_layouts(*problem):
        if memory_share(layout, known)[0] > 1:
            continue
        key = known.num_microbatches, tuple(g.devices for g in layout.groups)
        if key not in suffixes:
            bounds, suffix = Bounds(known, twins(known)), None
            for devices in reversed(key[1]):
                suffix = Suffix(devices, suffix, bounds)
            suffixes[key] = suffix
        prediction = evaluate(layout, known)
        if prediction.makespan_s == float("inf"):
            continue  # A link that only the all-reduce needs is missing.
        assert suffixes[key].bound_s <= prediction.makespan_s * (1 + 1e-9)
        assert suffixes[key].bound_j <= prediction.total_j * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(problem=problems())
def test_plans_are_a_front_within_memory(problem):
    profile, cluster, workload = problem
    result = search(*problem)
    memory = {d.name: d.memory_bytes for d in cluster.devices}
    values = []
    for found in result.plans:
        assert all(m.peak_bytes <= memory[m.device] for m in found.cost.memory)
        assert found.devices == tuple(d.name for d in cluster.devices)
        again = predict(profile, cluster, workload, found)
        assert again.cost.makespan_s == pytest.approx(found.cost.makespan_s)
        assert again.cost.energy_j == pytest.approx(found.cost.energy_j)
        assert [m.peak_bytes for m in again.cost.memory] == [
            m.peak_bytes for m in found.cost.memory
        ]
        share = max(m.peak_bytes / memory[m.device] for m in found.cost.memory)
        values.append((found.cost.makespan_s, found.cost.energy_j, share))
    assert len(set(result.plans)) == len(result.plans) <= 12
    assert values == sorted(values, key=lambda v: float(f"{v[0]:.9g}"))
    assert search(*problem) == result
    others = [v for v, p in zip(values, result.plans, strict=True) if p != result.best_single]
    for a, b in permutations(others, 2):
        assert not all(x <= y * (1 - 1e-6) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- what a user would expect


def two(times_a, times_b, **fields):
    devices = [make_device("a"), make_device("b")]
    profile = make_profile({"a": times_a, "b": times_b})
    return profile, make_cluster(devices, **fields), Workload(batch_size=16)


def devices_of(found: Plan) -> list[str]:
    return [r.device for stage in found.stages for r in stage.replicas]


def test_fast_link_uses_both_devices():
    problem = two([0.1] * 4, [0.1] * 4)
    best = plan(*problem)[0]
    assert sorted(devices_of(best)) == ["a", "b"]
    assert best.cost.makespan_s < 0.6 * search(*problem).best_single.cost.makespan_s


def test_slow_link_answers_one_device():
    best = plan(*two([0.1] * 4, [0.09] * 4, rate=100.0))[0]
    assert devices_of(best) == ["b"]


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
        (Workload(), QoE(step_s=1, percentile=95), "percentile"),
        (Workload(kind="generate"), QoE(), "workload.kind"),
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
    known = setting(profile, make_cluster(devices), Workload(batch_size=8), 8)
    assert twins(known) == {0: 0, 1: 0, 2: 0, 3: 0}
    orders = [s.stages for s in Bounds(known, twins(known)).suffixes(lambda *_: True)]
    # One per sequence of group sizes: the compositions of 1, 2, 3 and 4.
    assert len(orders) == 1 + 2 + 4 + 8


def test_only_the_fastest_of_many_devices_are_searched():
    devices = [make_device(f"d{i}") for i in range(8)]
    profile = make_profile({f"d{i}": [0.1 if i else 9.0] for i in range(8)})
    result = search(profile, make_cluster(devices), Workload(batch_size=4))
    assert result.plans[0].devices == tuple(d.name for d in devices)
    left_out = [text for text, reason in result.rejected if "fastest devices" in reason]
    assert left_out == ["d0", "d7"]


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
    with pytest.raises(ValueError, match="no link b -> a"):
        predict(profile, cluster, workload, Plan(devices=("a", "b"), stages=stages))


@pytest.mark.slow
def test_six_devices_and_32_blocks_take_seconds():
    names = [f"d{i}" for i in range(6)]
    devices = [make_device(n, busy_w=10 + i) for i, n in enumerate(names)]
    times = {n: [0.01 * (1 + i / 3) * (1 + b % 3) for b in range(32)] for i, n in enumerate(names)}
    cluster = make_cluster(devices, rate=1e6, latency_s=0.003)
    result = search(make_profile(times), cluster, Workload(batch_size=32))
    assert result.plans[0].cost.makespan_s < result.best_single.cost.makespan_s / 2
