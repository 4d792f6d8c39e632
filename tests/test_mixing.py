"""Plans that take turns in a running job: results are those of one plan, and nothing moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import run_ranks
from test_adapt_hook import (
    BATCH,
    NAMES,
    NAP_S,
    Block,
    batches,
    call,
    make_bank,
    make_cluster,
    make_module,
    make_profile,
    plain,
)
from torch.nn import functional as F  # noqa: N812

from dora import DoraParallel
from dora.adapt import Adapting, adapting, handover
from dora.adapt.corrected import MOST, Corrected
from dora.adapt.course import Course
from dora.adapt.forecast import Predictor, scaled_profile
from dora.adapt.gauges import DOUBT, LONG, believable
from dora.adapt.notes import NUM_NOTED, Lap, Notes, is_asked, laps_of, noted
from dora.adapt.pace import FIRST_CALLS, SHARE, Pace, Plea
from dora.adapter import Rules, placed
from dora.errors import InfeasiblePlanError
from dora.files import save
from dora.runtime.adaptive import adapter_of
from dora.search import planned
from dora.spec import Cluster, CodecRate, Conditions, ModelProfile, Plan, QoE, Workload

pytestmark = pytest.mark.timeout(60)

LONG_S = 0.01


# ------------------------------------------------------------ holding several plans


def hold_and_turn(rank: int, limit_bytes: int | None) -> Any:
    """Returns (outputs, losses, placements, events) of requests in turn, then of training."""
    plans = make_bank(3)[:3]
    data = batches(8, 1)
    model = DoraParallel(make_module(), plans[0], sample=data[0][0], memory_limit_bytes=limit_bytes)
    outputs, losses, ran = [], [], []
    model.hold(plans)
    with torch.no_grad():
        for i, (x, _) in enumerate(data):
            model.turn_to(plans[i % 3])
            outputs.append(float(model(x).square().sum()))
            ran.append(tuple(placed(model.plan)))
    kept = {key: float(value.sum()) for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        losses.append(float(model.step(x, y, F.mse_loss)))
        optimizer.step()
    held = len(model.resident)
    model.close()
    return outputs, losses, ran, list(model.events), kept, held


def test_requests_go_from_plan_to_plan_and_training_ends_it():
    wanted = [tuple(placed(plan)) for plan in make_bank(3)[:3]]
    sums = {key: float(value.sum()) for key, value in make_module().state_dict().items()}
    for outputs, losses, ran, events, kept, held in run_ranks(3, hold_and_turn, None):
        assert outputs == pytest.approx(plain("infer", 8), rel=1e-5)
        assert ran == [wanted[i % 3] for i in range(8)]
        # Weights came once, before the first request.
        assert [event.kind for event in events] == ["hold", "switch"]
        assert events[1].num_bytes == 0
        assert kept == pytest.approx(sums)
        assert losses == pytest.approx(plain("train", 8), rel=1e-5)
        assert held == 1


def hold_too_much(rank: int) -> Any:
    plans = make_bank(2)
    x = batches(1, 1)[0][0]
    size = sum(p.nbytes for p in make_module().parameters())
    model = DoraParallel(make_module(), plans[0], sample=x, memory_limit_bytes=int(1.2 * size))
    with pytest.raises(InfeasiblePlanError, match="to hold all 2"):
        model.hold([plans[0], plans[0].model_copy(update={"stages": _swapped(plans[0])})])
    with torch.no_grad():
        output = float(model(x).square().sum())
    with pytest.raises(ValueError, match="not held"):
        model.turn_to(plans[1])
    model.close()
    return output


def _swapped(plan: Plan) -> Any:
    """Returns two stages whose devices have changed places."""
    first, second = plan.stages
    return (
        first.model_copy(update={"replicas": second.replicas}),
        second.model_copy(update={"replicas": first.replicas}),
    )


def test_plans_that_do_not_fit_together_are_refused():
    for output in run_ranks(2, hold_too_much):
        assert output == pytest.approx(plain("infer", 1)[0], rel=1e-5)


# ------------------------------------------------------------ the adapter mixes


def powered() -> Cluster:
    """Returns devices that draw much while they wait, so that one alone saves energy."""
    cluster = make_cluster(3)
    devices = [d.model_copy(update={"idle_w": 9.0, "busy_w": 10.0}) for d in cluster.devices]
    return cluster.model_copy(update={"devices": tuple(devices)})


def between(kind: str) -> QoE:
    """Returns a bound that one device alone breaks and all keep, even if all take 1.7 times it."""
    alone = _predict(kind, QoE())(make_bank(3)[2], Conditions())
    assert alone is not None
    field = "step_s" if kind == "train" else "latency_s"
    return QoE.model_validate({field: 0.9 * alone.time_s, "objective": "energy"})


def _predict(kind: str, qoe: QoE) -> Predictor:
    workload = Workload(kind=kind, batch_size=BATCH, num_microbatches=4)
    return Predictor(long_profile(), powered(), workload, qoe)


def long_profile() -> ModelProfile:
    """Returns a profile of blocks that take so long that nothing else counts."""
    return scaled_profile(make_profile(3, 1), dict.fromkeys(NAMES, NAP_S / LONG_S))


def mixed_job(rank: int, kind: str, calls: int) -> Any:
    handover.BARRIER_S, handover.TOLL_SHARE = 0.0, 0.002  # or a cycle would be hundreds of steps
    Block.nap_s = LONG_S
    adapter = adapting(
        long_profile(),
        powered(),
        Workload(kind=kind, batch_size=BATCH, num_microbatches=4),
        between(kind),
        bank=make_bank(3),
        rules=Rules(objective="energy", reading="average"),
        every=3,
    )
    data, results, ran = batches(calls, 1), [], []
    model = DoraParallel(make_module(), make_bank(3)[0], sample=data[0][0], adapter=adapter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        results.append(call(model, optimizer, kind, x, y))
        ran.append(len(placed(model.plan)))
    model.close()
    return results, ran, list(model.events)


@pytest.mark.parametrize("kind", ["infer", pytest.param("train", marks=pytest.mark.slow)])
def test_plans_take_turns_where_an_average_counts(kind):
    calls = 24
    found = run_ranks(3, mixed_job, kind, calls)
    for results, ran, events in found:
        assert results == pytest.approx(plain(kind, calls), rel=1e-5)
        assert ran == found[0][1]
        # One device alone and several, over and over.
        assert 1 in ran[6:] and max(ran[6:]) > 1
        assert sum(a != b for a, b in zip(ran, ran[1:], strict=False)) >= 2
        kinds = {event.kind for event in events}
        assert ("switch" if kind == "train" else "hold") in kinds


# ------------------------------------------------------------ on by default


def test_whoever_planned_adapts_unless_told_not_to(tmp_path):
    save(make_profile(2, 1), tmp_path / "profile.json")
    workload = Workload(batch_size=BATCH)
    files = [tmp_path / "profile.json"]
    plan = planned(make_cluster(2), workload, QoE(step_s=1.0), profiles=files)
    for is_lasting in (False, True):
        found = adapter_of("auto", plan, is_lasting=is_lasting)
        assert isinstance(found, Adapting) and found.qoe == plan.qoe
        assert adapter_of("off", plan, is_lasting=is_lasting) is None
        assert adapter_of(found, make_bank(2)[0], is_lasting=is_lasting) is found
        # A plan alone says nothing to decide by.
        assert adapter_of("auto", make_bank(2)[0], is_lasting=is_lasting) is None
    # Who comes later has measured nothing.
    assert adapter_of("auto", planned(make_cluster(2), workload), is_lasting=True) is None
    with pytest.raises(ValueError, match="given 'on'"):
        adapter_of("on", plan, is_lasting=False)


# ------------------------------------------------------------ what it is made of


@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    cycle=st.sampled_from([1, 7, 40]),
)
def test_a_course_keeps_the_shares(weights, cycle):
    plans = [make_bank(2)[0].model_copy() for _ in weights]
    shares = [w / sum(weights) for w in weights]
    course, calls = Course(plans, shares, cycle), 280
    ran = [course.next() for _ in range(calls)]
    for plan, share in zip(plans, shares, strict=True):
        counted = sum(each is plan for each in ran)
        slack = 1 if cycle == 1 else len(plans) * calls / cycle
        assert abs(counted - share * calls) <= slack
    if cycle > 1:  # one piece each
        pieces = 1 + sum(a is not b for a, b in zip(ran[:cycle], ran[1:cycle], strict=False))
        assert pieces <= len(plans)


@given(costs_s=st.lists(st.floats(1e-4, 0.5), min_size=3, max_size=40))
def test_exchanges_are_earned_before_they_are_made(costs_s):
    pace, call_s, calls, spent_s, left = Pace(None), 0.5, 0, [0.0], FIRST_CALLS
    for cost_s in costs_s:
        calls += left
        plea = pace.next(left * call_s, left)
        if len(spent_s) > 2:  # all but the last, which nobody could foresee
            assert spent_s[-2] <= SHARE * calls * call_s + max(costs_s)
        spent_s.append(spent_s[-1] + cost_s)
        pace.pay(cost_s, has_decided=plea.is_due)
        left = plea.left
    assert calls * call_s * SHARE >= 0.5 * (spent_s[-1] - 3 * max(costs_s))


def test_an_alarm_is_followed_by_exchanges_at_once_until_they_cost_too_much():
    pace = Pace(None)
    pace.next(1.0, 10)
    pace.alarm()
    assert [pace.next(0.1, 1) for _ in range(6)] == [Plea(1, True)] * 6
    pace.pay(5.0, has_decided=True)
    pace.alarm()
    assert not pace.next(0.1, 1).is_due
    assert Pace(5).next(1.0, 5) == Plea(5, True)


PLEA = Plea(7, is_due=False)


def test_notes_come_to_what_the_slowest_watcher_saw():
    notes = Notes(usual_s=0.5)
    notes.begin([{"0F0": 0.2}, {}])
    for turn, seconds in ((0, 9.0), (0, 0.4), (1, 9.0), (0, 0.6), (1, 0.3)):
        notes.add(turn, [("0F0", 0.4)], seconds)
    assert notes.worked == (pytest.approx(1.3), 3)
    row = notes.row(0.01, PLEA, is_watching=True)
    assert noted(row) == (0.5, 0.01, pytest.approx(1.3), 0, 7, 0)
    assert notes.worked == (0, 0)
    other = [*[0.0] * 6, 2.0, 2.0, 8.0, *[0.0] * 9]
    assert len(row) == len(other) == NUM_NOTED
    both = laps_of({0: row, 1: other}, [(0, 1), (0,)])
    assert both == [Lap(2, 2, 8.0), Lap(1, 0, pytest.approx(0.3))]
    assert laps_of({0: row, 1: other}, [(0,), (1,)])[0] == Lap(2, 1, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("seconds", "is_watching", "is_alarmed"),
    [(0.42, True, False), (0.8, True, True), (0.2, True, True), (0.8, False, False)],
)
def test_who_sees_calls_change_asks_for_a_decision(seconds, is_watching, is_alarmed):
    notes, rows = Notes(usual_s=1.0), []
    notes.begin([{}])
    for each in (9.0, 0.4, 0.4, 0.4, 0.4, seconds):
        notes.add(0, [], each)
        rows.append(notes.row(0.0, PLEA, is_watching=is_watching))
    calm, last = rows[-2:]
    assert not is_asked([calm, calm])
    assert is_asked([calm, last]) == is_alarmed


def test_forecasts_follow_what_is_measured():
    calm, (pair, other, alone) = Conditions(), make_bank(3)[:3]
    predict = _predict("infer", between("infer"))
    corrected = Corrected(predict)
    assert corrected(pair, calm) == predict(pair, calm)
    expected = predict(pair, calm)
    assert expected is not None
    for _ in range(8):
        corrected.observe(pair, 1.1 * expected.time_s, calm)
        corrected.observe(alone, 1e3, calm)
    found = corrected(pair, calm)
    assert found.time_s == pytest.approx(1.1 * expected.time_s, rel=1e-3)
    assert found.worst == pytest.approx(1.1 * expected.worst, rel=1e-3)
    assert corrected(alone, calm).time_s == pytest.approx(MOST * predict(alone, calm).time_s)
    usual = corrected(other, calm).time_s / predict(other, calm).time_s
    assert 1.1 < usual < MOST


@given(shown=st.floats(0.05, 1.0), true=st.floats(0.05, 1.0))
@example(shown=0.75, true=1.0)
@example(shown=1.0, true=0.2)
def test_rates_explain_how_long_calls_take(shown, true):
    # So narrow that messages are most of it.
    cluster = powered()
    media = tuple(m.model_copy(update={"rate_bytes_per_s": 2e5}) for m in cluster.media)
    workload = Workload(kind="train", batch_size=BATCH, num_microbatches=4)
    narrow = cluster.model_copy(update={"media": media})
    predict = Predictor(make_profile(3, 1), narrow, workload, QoE())
    plan = make_bank(3)[0]
    took_s = predict(plan, Conditions.of({"lan": true})).time_s
    shown_s = predict(plan, Conditions.of({"lan": shown})).time_s
    rate = believable({"lan": shown}, {}, plan, predict, took_s)["lan"]
    if took_s * DOUBT < shown_s or took_s > LONG * shown_s:
        assert rate == pytest.approx(true, rel=0.2)
    else:
        assert rate == shown
    assert believable({"lan": shown}, {}, plan, predict, 0.0) == {"lan": shown}


def test_rates_do_not_explain_what_no_rate_does():
    workload = Workload(kind="train", batch_size=BATCH, num_microbatches=4)
    predict = Predictor(make_profile(3, 1), powered(), workload, QoE())
    alone = next(plan for plan in make_bank(3) if len(placed(plan)) == 1)
    long_s = 3 * predict(alone, Conditions()).time_s
    assert believable({"lan": 1.0}, {}, alone, predict, long_s) == {"lan": 1.0}


def test_a_slowed_device_encodes_as_much_slower():
    rate = CodecRate(
        device="d0", codec="int8", encode_s_per_byte=1e-9, decode_s_per_byte=2e-9, call_s=1e-4
    )
    other = rate.model_copy(update={"device": "d1"})
    profile = make_profile(2, 1).model_copy(update={"codec_rates": (rate, other)})
    slow, same = scaled_profile(profile, {"d0": 0.5}).codec_rates
    assert same == other
    assert slow.encode_s_per_byte == pytest.approx(2e-9)
    assert (slow.decode_s_per_byte, slow.call_s) == pytest.approx((4e-9, 2e-4))
