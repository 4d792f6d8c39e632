"""The adapter: estimates and alarms, when it switches and when not, and whole runs in traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import exp, inf, log
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan

from dora.adapt import (
    Predictor,
    best_static,
    make_bank,
    play_adapter,
    play_oracle,
    play_replanning,
    play_static,
    pricer,
    segments,
    under,
)
from dora.adapt.forecast import STEP, scaled_profile
from dora.adapt.machine import Residence
from dora.adapt.tally import Tally
from dora.adapter import (
    Arrivals,
    Monitor,
    Rules,
    Standing,
    Tracker,
    decide,
    event,
    placed,
    reshared,
    speeds,
)
from dora.adapter.score import NODES, late_share
from dora.planner import predict as planner_predict
from dora.planner import step_costs
from dora.scheduler import build_schedule
from dora.simulator import Dynamics, simulate
from dora.spec import (
    BlockCost,
    BlockProfile,
    Cluster,
    Conditions,
    Device,
    Forecast,
    Link,
    Medium,
    ModelProfile,
    Plan,
    QoE,
    Replica,
    Span,
    Stage,
    SwitchCost,
    Timeline,
    Timing,
    Workload,
)

# ------------------------------------------------------------ estimates


def test_gaussian_noise_raises_no_alarm():
    for sigma in (0.02, 0.1, 0.3, 0.6):
        random, tracker = Random(1), Tracker(spread=0.1)
        alarms = sum(tracker.observe(exp(random.gauss(0, sigma)), t) for t in range(20_000))
        # The first guess of the noise may be far too small.
        assert alarms <= (1 if sigma <= 0.3 else 2), sigma


def test_outliers_raise_no_alarm():
    random, tracker = Random(2), Tracker(spread=0.1)
    for t in range(5000):
        factor = 0.01 if t % 50 == 49 else exp(random.gauss(0, 0.1))
        assert not tracker.observe(factor, t)
    assert tracker.estimate(5000).factor == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("sigma", "after", "most"), [(0.3, 0.3, 6), (0.1, 0.3, 2), (0.05, 0.4, 2), (0.05, 0.8, 6)]
)
def test_changes_are_found_within_a_few_observations(sigma, after, most):
    for seed in range(30):
        random, tracker = Random(seed), Tracker(spread=sigma)
        for t in range(100):
            tracker.observe(exp(random.gauss(0, sigma)), t)
        found = [
            tracker.observe(after * exp(random.gauss(0, sigma)), t) for t in range(100, 100 + most)
        ]
        assert any(found), seed
        assert tracker.estimate(200).factor == pytest.approx(after, rel=max(4 * sigma, 0.1))


@given(st.floats(0.05, 5.0), st.floats(0.0, 0.3), st.integers(0, 10**6))
@settings(max_examples=30)
def test_level_and_noise_are_learned(factor, sigma, seed):
    random, tracker = Random(seed), Tracker()
    for t in range(200):
        tracker.observe(factor * exp(random.gauss(0, sigma)), t)
    found = tracker.estimate(200)
    assert abs(log(found.factor / factor)) <= 4 * sigma / 3 + 0.01
    assert sigma / 2 <= found.spread <= 2 * sigma + 0.1


def test_what_was_seen_long_ago_is_uncertain():
    tracker = Tracker(drift=0.05)
    for t in range(50):
        tracker.observe(1.0, t)
    assert tracker.estimate(1000).spread > 5 * tracker.estimate(50).spread


def test_a_device_that_gets_hot_has_a_trend():
    tracker, random = Tracker(spread=0.02), Random(3)
    for t in range(60):
        tracker.observe(exp(-0.004 * t + random.gauss(0, 0.01)), t)
    assert tracker.estimate(60).slope_per_s == pytest.approx(-0.004, rel=0.4)


@given(st.floats(0.01, 100.0), st.floats(0.0, 0.1))
def test_deadline_follows_the_arrivals(interval_s, jitter):
    random, arrivals, now_s = Random(4), Arrivals(first_s=1e4, least_s=0.0), 0.0
    for _ in range(50):
        now_s += interval_s * exp(random.gauss(0, jitter))
        assert not arrivals.is_late(now_s)
        arrivals.observe(now_s)
    assert now_s + interval_s < arrivals.deadline_s < now_s + 6 * interval_s


def test_nothing_is_late_before_it_ever_came():
    assert Arrivals().deadline_s == inf


# ------------------------------------------------------------ monitor


def compute(rank, label, length_s, start_s=0.0):
    return Span(rank=rank, lane="compute", label=label, start_s=start_s, end_s=start_s + length_s)


def test_speeds_are_medians_over_actions():
    labels = ["0F0", "0F1", "0F2", "0B0", "0B1"]
    predicted = Timeline(
        source="predicted", num_ranks=1, spans=tuple(compute(0, n, 1.0) for n in labels)
    )
    lengths = [9.0, 2.0, 2.0, 2.0, 0.1]
    measured = Timeline(
        source="measured",
        num_ranks=1,
        spans=tuple(compute(0, n, s) for n, s in zip(labels, lengths, strict=True)),
    )
    assert speeds(predicted, measured) == {0: pytest.approx(0.5)}


def test_lost_devices_come_back_as_new():
    monitor = Monitor(["wifi"], ["phone", "box"])
    monitor.speed("box", 0.3, 0.0)
    monitor.lost("box", 1.0)
    view = monitor.view(1.0)
    assert view.gone == view.changed == {"box"}
    monitor.alive("box", 2.0)
    view = monitor.view(2.0)
    assert not view.gone
    assert view.changed == {"box"}
    assert view.estimates["box"].num_seen == 0
    assert not monitor.view(3.0).changed


def test_an_unseen_device_is_as_slow_as_all_others_are():
    monitor = Monitor(["wifi"], ["phone", "box", "hub"])
    monitor.speed("box", 0.4, 0.0)
    assert monitor.view(0.0).estimates["phone"].factor == 1  # that is its own slowness
    monitor.speed("hub", 0.8, 1.0)
    monitor.lost("box", 2.0)
    estimates = monitor.view(2.0).estimates
    assert estimates["phone"].factor == pytest.approx(0.8)
    assert estimates["wifi"].factor == 1
    assert estimates["phone"].num_seen == 0


def test_silent_devices_are_late():
    monitor = Monitor([], ["phone", "box"])
    for t in range(20):
        monitor.alive("phone", float(t))
        if t < 10:
            monitor.alive("box", float(t))
    assert monitor.late(19.5) == ("box",)


def test_unused_media_are_to_be_probed():
    monitor = Monitor(["wifi"], ["phone"])
    monitor.speed("phone", 1.0, 9.5)
    assert monitor.unseen(10.0) == ("wifi",)


def test_battery_lasts_as_long_as_it_is_drained():
    monitor = Monitor([], ["phone"])
    for t in range(10):
        monitor.battery("phone", 1000.0 - 5 * t, float(t))
    assert monitor.view(9.0).batteries_s["phone"] == pytest.approx(955 / 5)


# ------------------------------------------------------------ policy


def alone(name: str, num_blocks: int = 4) -> Plan:
    stage = Stage(index=0, first_block=0, last_block=num_blocks - 1,
                  replicas=(Replica(device=name),))  # fmt: skip
    return Plan(devices=("phone", "box", "hub"), stages=(stage,), schedule_kind="wavefront")


PHONE, BOX, HUB = alone("phone"), alone("box"), alone("hub")
BANK = [PHONE, BOX, HUB]
# Seconds on a given device, seconds on a given network, joules.
TAKES = {id(PHONE): (0.8, 0.0, 1.0), id(BOX): (0.1, 0.3, 3.0), id(HUB): (0.3, 0.3, 6.0)}
NAMES = {id(PHONE): "phone", id(BOX): "box", id(HUB): "hub"}


def takes(plan: Plan, conditions: Conditions) -> Forecast | None:
    """Returns a made-up forecast with a bound of one second."""
    factors = dict(conditions.factors)
    compute_s, network_s, energy_j = TAKES[id(plan)]
    if factors.get(NAMES[id(plan)], 1.0) <= 0:
        return None
    time_s = compute_s / factors.get(NAMES[id(plan)], 1.0)
    time_s += network_s / factors.get("wifi", 1.0)
    return Forecast(time_s, energy_j, (time_s,))


def free(running, plan, conditions) -> SwitchCost:
    return SwitchCost()


def seen(*, seconds: int = 20, **factors: float) -> Monitor:
    """Returns a monitor that saw those factors for a while."""
    monitor = Monitor(["wifi"], ["phone", "box", "hub"])
    show(monitor, 0, seconds, **factors)
    return monitor


def show(monitor, start, seconds, **factors):
    random = Random(start)
    for t in range(start, start + seconds):
        for name in ("wifi", "phone", "box", "hub"):
            factor = factors.get(name, 1.0) * exp(random.gauss(0, 0.02))
            (monitor.rate if name == "wifi" else monitor.speed)(name, factor, float(t))


def settle(monitor, standing, now_s, *, price=free, rules=Rules(), bank=BANK):  # noqa: B008
    """Returns (decisions that change something, standing) after five decisions."""
    made = []
    for k in range(5):
        decision, standing, _ = decide(bank, standing, monitor.view(now_s + k), takes, price, rules)
        made.append(decision)
    return [d for d in made if d.kind != "keep"], standing


def test_the_best_plan_is_kept():
    made, standing = settle(seen(), Standing((PHONE,)), 20.0)
    assert made == []
    assert standing.plans == (PHONE,)


def test_the_cheaper_plan_is_found():
    made, standing = settle(seen(), Standing((BOX,)), 20.0)
    assert [d.kind for d in made] == ["switch"]
    assert standing.plans == (PHONE,)


def test_a_slow_device_is_left():
    monitor = seen()
    show(monitor, 20, 5, phone=0.5)
    made, standing = settle(monitor, Standing((PHONE,)), 25.0)
    assert [d.kind for d in made] == ["switch"]
    assert standing.plans == (BOX,)


def test_a_switch_that_costs_more_than_it_gains_is_not_made():
    def dear(running, plan, conditions):
        return SwitchCost(pause_s=1e4)

    made, _ = settle(seen(), Standing((BOX,)), 20.0, price=dear)
    assert made == []


@pytest.mark.parametrize(("background_s", "chosen"), [(0.0, PHONE), (60.0, HUB)])
def test_what_is_in_place_takes_over_after_a_jump(background_s, chosen):
    def price(running, plan, conditions):
        return SwitchCost(background_s=background_s if plan is PHONE else 0.0)

    monitor = seen()
    show(monitor, 20, 3, box=0.05)
    view = monitor.view(23.0)
    _, standing, _ = decide(BANK, Standing((BOX,)), view, takes, price, Rules())
    assert standing.plans == (chosen,)


def test_who_is_lost_goes_where_weights_are_soon():
    def price(running, plan, conditions):
        return SwitchCost(background_s=80.0 if plan is PHONE else 5.0)

    monitor = seen()
    monitor.lost("box", 20.0)
    view = monitor.view(20.0)
    _, standing, _ = decide(BANK, Standing((BOX,)), view, takes, price, Rules(period_s=20.0))
    assert standing.plans == (HUB,)


@pytest.mark.parametrize(
    ("ages_s", "is_made"), [((), True), ((10.0,), False), ((10.0, 20.0), False), ((4000.0,), True)]
)
def test_what_has_failed_is_not_gone_back_to_as_soon(ages_s, is_made):
    failed = tuple(("phone", 25.0 - age_s) for age_s in ages_s)
    rules = Rules(horizon_s=2.0)
    made, _ = settle(seen(), Standing((BOX,), failed=failed), 20.0, rules=rules)
    assert [d.kind for d in made] == ["switch"] * is_made


def test_what_was_left_because_it_was_late_has_failed():
    monitor = seen()
    show(monitor, 20, 5, phone=0.5)
    _, standing = settle(monitor, Standing((PHONE,)), 25.0)
    assert [name for name, _ in standing.failed] == ["phone"]
    _, standing = settle(seen(), Standing((BOX,)), 20.0)
    assert standing.failed == ()


def slow(running, plan, conditions) -> SwitchCost:
    return SwitchCost(pause_s=9.0)


@pytest.mark.parametrize(
    ("paused_s", "since_s", "is_made"),
    [(12.0, 5.0, False), (12.0, 600.0, True), (11.5, 5.0, False), (0.0, 5.0, True)],
)
def test_switches_pause_within_a_budget(paused_s, since_s, is_made):
    standing = Standing((BOX,), paused_s=paused_s, switched_s=30.0 - since_s)
    made, standing = settle(seen(seconds=30), standing, 30.0, price=slow)
    assert [d.kind for d in made] == ["switch"] * is_made
    assert standing.switched_s >= 30.0 or not is_made


def test_there_is_no_budget_at_first_nor_for_who_is_late():
    monitor = seen(seconds=30)
    assert settle(monitor, Standing((BOX,)), 30.0, price=slow)[0] == []
    monitor.items(100, 3)
    standing = Standing((BOX,), paused_s=0.0, switched_s=0.0)
    assert settle(monitor, standing, 30.0, price=slow)[0] == []


def test_a_dead_plan_is_left_whatever_it_costs():
    def dear(running, plan, conditions):
        return SwitchCost(pause_s=1e4)

    monitor = seen()
    monitor.lost("phone", 20.0)
    decision, standing, _ = decide(
        BANK, Standing((PHONE,)), monitor.view(20.0), takes, dear, Rules()
    )
    assert decision.kind == "switch"
    assert decision.is_replanning
    assert standing.plans == (BOX,)


def test_noise_around_a_bound_does_not_make_it_flutter():
    random, monitor, standing = Random(5), seen(), Standing((BOX,))
    rules, switches = Rules(), 0
    for t in range(20, 320):
        # The box takes a second at wifi = 1/3, around which the network wanders.
        monitor.rate("wifi", exp(random.gauss(log(0.35), 0.3)), float(t))
        for name in ("phone", "box", "hub"):
            monitor.speed(name, 0.4 if name == "phone" else 1.0, float(t))
        decision, standing, _ = decide(BANK, standing, monitor.view(float(t)), takes, free, rules)
        switches += decision.kind == "switch"
    assert switches <= 6


@given(
    st.sets(st.sampled_from(["phone", "box", "hub"]), max_size=2),
    st.sampled_from(BANK),
    st.floats(0.05, 2.0),
)
def test_no_decision_names_a_device_that_has_gone(gone, plan, rate):
    monitor = seen(wifi=rate)
    for name in gone:
        monitor.lost(name, 20.0)
    decision, standing, _ = decide(
        BANK, Standing((plan,)), monitor.view(20.0), takes, free, Rules()
    )
    for named in (*decision.plans, *decision.prepare):
        assert not gone & set(placed(named))
    if gone & set(placed(plan)):
        assert decision.kind == "switch"
    assert standing.gone == gone


@given(st.sampled_from(BANK), st.floats(0.05, 2.0), st.floats(0.1, 1.5))
@settings(max_examples=30)
def test_decisions_are_pure(plan, rate, speed):
    view = seen(wifi=rate, phone=speed).view(20.0)
    first = decide(BANK, Standing((plan,)), view, takes, free, Rules())
    assert decide(BANK, Standing((plan,)), view, takes, free, Rules()) == first


def test_a_change_that_moves_no_plan_orders_transfers_anew():
    two = make_plan(4, [[1.0], [1.0]], links=(Link(src="d0", dst="d1", media=("wifi",)),))

    def only(plan, conditions):
        return Forecast(0.5, 1.0, (0.5,))

    monitor = Monitor(["wifi"], ["d0", "d1"])
    for t in range(30):
        monitor.rate("wifi", 1.0 if t < 20 else 0.3, float(t))
    decision, _, _ = decide([two], Standing((two,)), monitor.view(30.0), only, free, Rules())
    assert decision.kind == "reschedule"
    assert "wifi" in decision.reason


def test_nothing_that_keeps_the_bounds_asks_for_a_search_and_waits_longer_each_time():
    monitor, standing, asked = seen(wifi=0.1, phone=0.1), Standing((PHONE,)), []
    for t in range(20, 200):
        decision, standing, _ = decide(BANK, standing, monitor.view(float(t)), takes, free, Rules())
        if decision.is_replanning:
            asked.append(t)
    gaps = [b - a for a, b in zip(asked, asked[1:], strict=False)]
    assert len(gaps) >= 2
    assert all(b >= a for a, b in zip(gaps, gaps[1:], strict=False))


def test_an_average_is_kept_by_a_mix():
    monitor = seen(phone=0.5)
    made, standing = settle(monitor, Standing((BOX,)), 20.0, rules=Rules(reading="average"))
    assert made[0].kind == "mix"
    mean_s = sum(
        w * takes(p, Conditions.of({"phone": 0.5})).time_s
        for p, w in zip(standing.plans, standing.weights, strict=True)
    )
    assert mean_s == pytest.approx(1.0, rel=0.05)
    assert len(made) == 1


def test_seen_late_items_count_more_than_predicted_ones():
    monitor = seen()
    monitor.items(50, 50)
    made, standing = settle(monitor, Standing((PHONE,)), 20.0)
    assert standing.plans == (BOX,)


def decided_when_late(monitor: Monitor, times: dict[int, Callable[..., float]], *plans: Plan):
    """Returns the plan after half a dozen late items of the first one."""

    def predict(plan, conditions):
        factors = dict(conditions.factors)
        time_s = times[id(plan)](lambda name: factors.get(name, 1.0))
        return Forecast(time_s, 1.0, (time_s,))

    monitor.items(6, 6)
    _, standing, _ = decide(plans, Standing(plans[:1]), monitor.view(20.0), predict, free, Rules())
    return standing.plans[0]


def test_after_a_loss_the_plan_is_kept_that_is_as_late_as_any():
    monitor = Monitor(["wifi"], ["phone", "box", "hub"])
    for t in range(10):
        monitor.speed("box", 0.78, float(t))
        monitor.speed("hub", 0.7, float(t))
    monitor.lost("hub", 10.0)
    times = {id(BOX): lambda of: 0.8 / of("box"), id(PHONE): lambda of: 0.9 / of("phone")}
    assert decided_when_late(monitor, times, BOX, PHONE) is BOX


def test_plans_that_are_late_are_not_left_for_their_likes():
    like = Plan(**{**BOX.model_dump(include={"devices", "stages", "schedule_kind"}),
                   "num_microbatches": 2})  # fmt: skip
    times = {id(BOX): lambda of: 0.7, id(like): lambda of: 0.65, id(PHONE): lambda of: 0.8}
    assert decided_when_late(seen(), times, BOX, like, PHONE) is PHONE
    times[id(like)] = lambda of: 0.5
    assert decided_when_late(seen(), times, BOX, like) is like


def test_late_share_follows_the_distribution():
    def at(excess):
        return [Forecast(e, 1.0, (e,)) for e in excess]

    assert late_share(at([0.5] * 4)) == 0.0
    assert late_share(at([2.0] * 4)) == 1.0
    assert late_share([None, *at([0.5] * 3)]) == 1.0
    # exp(-node): above 1 exactly below the median.
    assert late_share(at([exp(-n) for n in NODES])) == pytest.approx(0.5)
    assert 0 < late_share(at([0.9 * exp(-n / 10) for n in NODES])) < 0.16


def test_shares_follow_speeds():
    plan = make_plan(4, [[1.0, 1.0], [1.0]], num_microbatches=8)
    other = reshared(plan, {"d0": 0.33})
    assert other is not None
    assert [r.share for r in other.stages[0].replicas] == [0.25, 0.75]
    assert placed(other) == placed(plan)
    assert reshared(plan, {"d0": 0.9, "d1": 0.9}) is None


@given(st.integers(1, 12), st.lists(st.floats(0.01, 3.0), min_size=3, max_size=3))
def test_shares_always_sum_to_one(n, factors):
    plan = make_plan(4, [[1.0, 1.0, 1.0], [1.0]], num_microbatches=n)
    other = reshared(plan, dict(zip(("d0", "d1", "d2"), factors, strict=True)))
    if other is not None:
        counts = [r.share * n for r in other.stages[0].replicas]
        assert sum(counts) == pytest.approx(n)
        assert min(counts) >= 1 - 1e-9


def test_events_say_what_and_why():
    monitor = seen()
    show(monitor, 20, 5, phone=0.4)
    view = monitor.view(25.0)
    decision, _, forecast = decide(BANK, Standing((PHONE,)), view, takes, free, Rules())
    line = json.loads(event(decision, view, step=7, forecast=forecast).line())
    assert line["decision"]["kind"] == "switch"
    assert line["decision"]["plans"] == ["box 0-3"]
    assert line["step"] == 7
    assert "phone" in {s["name"] for s in line["seen"]}


# ------------------------------------------------------------ forecasts


def make_problem(kind="infer", **qoe):
    """Returns a predictor of three devices on one channel, and a few plans."""
    speeds_of = {"phone": 0.05, "box": 0.01, "hub": 0.02}
    devices = tuple(
        Device(name=n, flops_per_s=1e12, mem_bandwidth_bytes_per_s=1e11, memory_bytes=10**9,
               idle_w=w / 5, busy_w=w, tx_j_per_byte=1e-8, rx_j_per_byte=1e-8)
        for n, w in (("phone", 5.0), ("box", 80.0), ("hub", 20.0))
    )  # fmt: skip
    pairs = [(a.name, b.name) for a in devices for b in devices if a is not b]
    cluster = Cluster(
        devices=devices,
        media=(Medium(name="wifi", rate_bytes_per_s=1e7, latency_s=0.001),),
        links=tuple(Link(src=a, dst=b, media=("wifi", "wifi")) for a, b in pairs),
    )
    blocks = tuple(
        BlockProfile(
            name=f"b{i}", num_params=10**5, param_bytes=4 * 10**5, trainable_bytes=4 * 10**5,
            costs=(
                BlockCost(
                    microbatch_size=1, flops=1e9, output_bytes=10**5, activation_bytes=10**5,
                    timings=tuple(
                        Timing(device=n, forward_s=s, backward_s=2 * s)
                        for n, s in speeds_of.items()
                    ),
                ),
            ),
        )
        for i in range(4)
    )  # fmt: skip
    profile = ModelProfile(blocks=blocks, input_bytes=10**5)
    source = "phone" if kind == "infer" else None
    workload = Workload(kind=kind, batch_size=1 if kind == "infer" else 4, source=source)
    bound = qoe or ({"latency_s": 0.3} if kind == "infer" else {"step_s": 5.0})
    predict = Predictor(profile, cluster, workload, QoE(objective="energy", **bound))
    return predict, [chain(cluster, kind, *spans) for spans in SPANS]


SPANS = [
    [("phone", 0, 3)],
    [("hub", 0, 3)],
    [("box", 0, 3)],
    [("phone", 0, 0), ("box", 1, 3)],
    [("hub", 0, 1), ("box", 2, 3)],
]


def chain(cluster, kind, *spans):
    stages = tuple(
        Stage(index=i, first_block=a, last_block=b, replicas=(Replica(device=name),))
        for i, (name, a, b) in enumerate(spans)
    )
    return Plan(
        devices=tuple(d.name for d in cluster.devices),
        stages=stages,
        num_microbatches=1 if kind == "infer" else 4,
        schedule_kind="wavefront" if kind == "infer" else "1f1b",
        links=cluster.links,
    )


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_forecast_as_given_is_the_planners_prediction(kind):
    predict, bank = make_problem(kind)
    for plan in bank:
        cost = planner_predict(predict.profile, predict.cluster, predict.workload, plan).cost
        found = predict(plan, Conditions())
        assert found.time_s == pytest.approx(cost.makespan_s)
        assert found.energy_j == pytest.approx(cost.energy_j)


@pytest.mark.parametrize("kind", ["infer", "train"])
@given(steps=st.fixed_dictionaries({n: st.integers(-60, 20) for n in ("wifi", "box", "phone")}))
@settings(max_examples=15)
def test_forecast_is_what_the_simulator_plays(kind, steps):
    # Powers of the step, so that rounding changes nothing.
    factors = {name: STEP**k for name, k in steps.items()}
    predict, bank = make_problem(kind)
    cluster = under(predict.cluster, Conditions.of({"wifi": factors["wifi"]}))
    profile = scaled_profile(predict.profile, factors)
    for plan in bank:
        costs = step_costs(profile, cluster, predict.workload, plan)
        schedule = build_schedule(plan, training=kind == "train")
        played = simulate(plan, schedule, costs, cluster)
        found = predict(plan, Conditions.of(factors))
        assert found.time_s == pytest.approx(played.makespan_s, rel=1e-6)
        assert found.energy_j == pytest.approx(played.energy_j, rel=1e-3)
        assert found.excess[0] == pytest.approx(found.time_s / predict.usual_s)


def test_forecast_of_a_plan_without_its_device_is_none():
    predict, bank = make_problem()
    gone = Conditions.of({"box": 0.0})
    assert [predict(plan, gone) is None for plan in bank] == [False, False, True, True, True]
    # Without the device that has the inputs there is nothing to do.
    assert predict(bank[1], Conditions.of({"phone": 0.0})) is None


def test_forecasts_are_remembered_for_what_a_plan_touches():
    predict, bank = make_problem()
    predict(bank[0], Conditions())
    before = predict.num_priced
    predict(bank[0], Conditions.of({"wifi": 0.1, "hub": 0.2}))
    assert predict.num_priced == before  # the phone alone does not care


# ------------------------------------------------------------ whole runs


@given(
    st.lists(st.tuples(st.floats(0.05, 3.0), st.floats(0.1, 5.0)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.7]),
)
def test_tally_counts_as_if_items_were_played_one_by_one(pieces, period_s):
    tally = Tally(period_s, 1.0)
    done, progress, wait_s = 0, 0.0, 0.4 * period_s
    spent_s = 0.0
    for time_s, length_s in pieces:
        tally.run(Forecast(time_s, 1.0, (time_s,)), length_s)
        left_s = length_s
        while left_s > 1e-9:
            waited = min(wait_s, left_s)
            wait_s, left_s = wait_s - waited, left_s - waited
            step_s = min((1 - progress) * time_s, left_s)
            progress, spent_s, left_s = (
                progress + step_s / time_s,
                spent_s + step_s,
                left_s - step_s,
            )
            if progress >= 1 - 1e-9:
                done, progress = done + 1, 0.0
                wait_s, spent_s = max(0.0, period_s - spent_s), 0.0
    assert abs(tally.totals().items - done) <= 1


def test_an_item_over_a_change_takes_the_sum_of_its_parts():
    tally = Tally(0.0, 1.0)
    tally.run(Forecast(2.0, 4.0, (2.0,)), 1.0)
    tally.run(Forecast(0.5, 1.0, (0.5,)), 0.25)
    totals = tally.totals()
    assert totals.items == 1
    assert totals.time_s == pytest.approx(1.25)
    assert totals.energy_j == pytest.approx(2.5)
    assert totals.attained == 0.0


@pytest.mark.parametrize(("worst", "share"), [(0.9, 0.0), (0.97, 0.16), (1.0, 0.5), (1.2, 1.0)])
def test_of_items_close_to_a_bound_a_share_is_late(worst, share):
    tally = Tally(0.0, 1.0)
    tally.run(Forecast(worst, 1.0, (worst,)), 1000 * worst)
    items, late = tally.counts
    assert late / items == pytest.approx(share, abs=0.01)


def test_a_bank_begins_with_a_plan_that_has_room():
    for latency_s, name in ((0.2, "hub"), (0.3, "phone")):  # the phone takes 0.2 s
        predict, _ = make_problem(latency_s=latency_s)
        assert set(placed(make_bank(predict, max_worlds=1)[0])) == {name}


def test_an_outage_weighs_as_long_as_it_lasts():
    tally = Tally(1.0, inf)
    tally.run(Forecast(0.1, 1.0, (0.5,)), 50.0)
    tally.pause(50.0)
    assert tally.totals().attained == pytest.approx(0.5, abs=0.03)


@given(st.lists(st.floats(0.0, 100.0), max_size=6))
def test_segments_cover_the_trace(times):
    entries = tuple((at, "wifi", 0.5) for at in sorted(times))
    parts = segments(Dynamics(entries), 120.0)
    assert parts[0].start_s == pytest.approx(0.0, abs=1e-6)
    assert parts[-1].end_s == pytest.approx(120.0)
    assert all(
        a.end_s == pytest.approx(b.start_s, abs=1e-6)
        for a, b in zip(parts, parts[1:], strict=False)
    )


DROP = Dynamics(((0.0, "wifi", 1.0), (60.0, "wifi", 0.05), (140.0, "wifi", 1.0)))


def rules_of(predict):
    return Rules.of(predict.qoe, period_s=1.0 if predict.workload.kind == "infer" else 0.0)


def test_a_calm_run_does_not_switch_from_the_best_plan():
    predict, bank = make_problem(latency_s=1.0)
    run = play_adapter(predict, bank, segments(Dynamics(()), 100.0), rules_of(predict))
    assert run.totals.switches == 0
    assert run.totals.attained == 1.0
    assert run.totals.energy_j == pytest.approx(predict(bank[0], Conditions()).energy_j)


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_runs_repeat(kind):
    predict, bank = make_problem(kind)
    runs = [play_adapter(predict, bank, segments(DROP, 200.0), rules_of(predict)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_drop_of_the_network_is_survived_on_other_devices():
    predict, bank = make_problem(latency_s=0.25)
    parts, rules = segments(DROP, 200.0), rules_of(predict)
    ours = play_adapter(predict, bank, parts, rules).totals
    stays = play_static(predict, bank[1], parts, rules)
    oracle = play_oracle(predict, bank, parts, rules)
    assert ours.attained >= 0.95 * oracle.attained
    assert ours.attained > stays.attained + 0.2
    assert ours.energy_j <= 1.1 * oracle.energy_j


def test_a_lost_device_is_replaced():
    predict, bank = make_problem(latency_s=0.2)
    dynamics = Dynamics(((60.0, "hub", 0.0),))
    run = play_adapter(predict, bank, segments(dynamics, 200.0), rules_of(predict))
    assert "hub" not in set().union(*(placed(plan) for plan in run.plans))
    assert run.totals.attained > 0.9
    assert any(e.decision.is_replanning for e in run.events)


def test_rivals_live_through_the_same_trace():
    predict, bank = make_problem(latency_s=0.21)
    parts, rules = segments(DROP, 200.0), rules_of(predict)
    plan, best = best_static(predict, bank, parts, rules)
    assert plan in bank
    assert best.attained >= max(play_static(predict, p, parts, rules).attained for p in bank) - 0.01
    anew = play_replanning(predict, bank[1], parts, rules, effort_s=0.02)
    assert 0 <= anew.totals.attained <= 1
    assert anew.totals.replans > 0


def test_moves_are_priced_by_what_is_in_place():
    predict, bank = make_problem()
    nothing = pricer(predict, lambda: {"phone": frozenset(range(4))})
    everything = pricer(predict, lambda: placed(bank[2]))
    far = nothing((bank[0],), bank[2], Conditions())
    near = everything((bank[0],), bank[2], Conditions())
    assert far.background_s == pytest.approx(2 * 4 * 4e5 / 1e7)
    assert near.background_s == 0.0
    slow = nothing((bank[0],), bank[2], Conditions.of({"wifi": 0.1}))
    assert slow.background_s == pytest.approx(10 * far.background_s)


def test_weights_that_were_fetched_in_part_are_kept_in_part():
    predict, bank = make_problem()
    plan = bank[2]
    (name, blocks), *_ = placed(plan).items()
    residence = Residence(predict, (bank[0],))
    residence.keep(plan, 0.5)
    assert len(residence.held()[name] & blocks) == len(blocks) // 2
    residence.lose(frozenset({name}))
    residence.keep(plan)
    assert name not in residence.held()


def test_no_weights_cross_a_medium_that_carries_nothing():
    predict, bank = make_problem()
    residence = Residence(predict, (bank[0],))
    assert residence.pause_s((bank[2],), Conditions()) < inf
    assert residence.pause_s((bank[2],), Conditions.of({"wifi": 0.0})) == inf
