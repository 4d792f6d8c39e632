"""Mixes: against brute force, within every bound, and taken in turn evenly."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dora.adapter import Memory, Toll, compose, next_turn, phases, turns
from dora.spec import Forecast

values = st.floats(0.1, 10.0)
forecasts = st.builds(
    lambda time_s, energy_j, more, battery_j: Forecast(time_s, energy_j, (time_s, more), battery_j),
    values, values, st.floats(0.1, 1.5), st.floats(0.0, 5.0),
)  # fmt: skip


def mean(options, mix, value):
    return sum(w * value(options[i]) for i, w in mix.shares)


def brute_force(options, objective):
    """Returns the least value of one or two plans that keep both averages, by a fine grid."""
    best = min((o.value(objective) for o in options if o.worst <= 1), default=None)
    for a, b in combinations(options, 2):
        for k in range(1, 400):
            w = k / 400
            excess = [w * x + (1 - w) * y for x, y in zip(a.excess, b.excess, strict=True)]
            value = w * a.value(objective) + (1 - w) * b.value(objective)
            if max(excess) <= 1 and (best is None or value < best):
                best = value
    return best


@given(st.lists(forecasts, min_size=1, max_size=5), st.sampled_from(["time", "energy"]))
@settings(max_examples=60)
def test_mix_keeps_the_averages_and_beats_every_pair(options, objective):
    mix, best = compose(options, objective), brute_force(options, objective)
    if mix is None:
        assert best is None
        return
    assert sum(w for _, w in mix.shares) == pytest.approx(1)
    for k in range(2):
        assert mean(options, mix, lambda o, k=k: o.excess[k]) <= 1.002
    assert mix.value == pytest.approx(mean(options, mix, lambda o: o.value(objective)))
    assert best is None or mix.value <= best + 1e-6 + 1e-2 * best


@given(st.lists(forecasts, min_size=1, max_size=8))
def test_a_mix_is_never_worse_than_a_single_plan(options):
    mix = compose(options, "energy")
    for option in options:
        if option.worst <= 1:
            assert mix is not None
            assert mix.value <= option.energy_j * (1 + 1e-9)


def test_halfway_between_two_plans():
    slow, fast = Forecast(1.5, 1.0, (1.5,)), Forecast(0.5, 3.0, (0.5,))
    mix = compose([slow, fast], "energy")
    assert mix is not None
    assert dict(mix.shares) == pytest.approx({0: 0.5, 1: 0.5})
    assert mix.value == pytest.approx(2.0)
    assert mix.excess == pytest.approx(1.0)


def test_plans_that_can_not_run_are_left_out():
    mix = compose([None, Forecast(0.5, 3.0, (0.5,)), None], "energy")
    assert mix is not None
    assert mix.shares == ((1, 1.0),)
    assert compose([None], "energy") is None
    assert compose([Forecast(2.0, 1.0, (2.0,))], "energy") is None


def test_percentile_allows_a_share_of_late_items():
    frugal, safe = Forecast(1.0, 1.0, (0.9,)), Forecast(1.0, 2.0, (0.8,))
    mix = compose([frugal, safe], "energy", late=[0.2, 0.0], percentile=95)
    assert mix is not None
    assert dict(mix.shares) == pytest.approx({0: 0.25, 1: 0.75})


def test_battery_binds():
    phone = Forecast(0.5, 1.0, (0.5,), battery_j=4.0)
    box = Forecast(0.5, 5.0, (0.5,), battery_j=0.0)
    mix = compose([phone, box], "energy", battery_j=1.0)
    assert mix is not None
    assert dict(mix.shares) == pytest.approx({0: 0.25, 1: 0.75})


def memory(capacity: float) -> Memory:
    """Returns that of three plans: two of all blocks on one device each, one of both devices."""
    return Memory(
        held=[{"a": {0, 1}}, {"b": {0, 1}}, {"a": {0}, "b": {1}}],
        working=[{"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}],
        block_bytes=[10, 10],
        capacity={"a": capacity, "b": 100.0},
    )


def test_memory_excludes_what_does_not_fit_together():
    options = [
        Forecast(1.5, 1.0, (1.5,)),
        Forecast(0.5, 3.0, (0.5,)),
        Forecast(0.6, 4.0, (0.6,)),
    ]
    assert dict(compose(options, memory=memory(100.0)).shares) == pytest.approx({0: 0.5, 1: 0.5})
    # Device a has no room for all blocks: only plan 1 alone, or 1 and 2, are left.
    assert compose(options, memory=memory(15.0)).shares == ((1, 1.0),)


@given(
    st.lists(forecasts, min_size=3, max_size=3),
    st.floats(5.0, 40.0),
)
@settings(max_examples=40)
def test_memory_holds_in_every_mix(options, capacity):
    bounds = memory(capacity)
    mix = compose(options, memory=bounds)
    if mix is not None:
        assert bounds.fits([i for i, _ in mix.shares])


def test_toll_makes_a_mix_dearer_until_one_plan_wins():
    slow, fast = Forecast(1.2, 1.0, (1.2,)), Forecast(0.5, 2.0, (0.5,))
    free = compose([slow, fast])
    taxed = compose([slow, fast], toll=Toll(excess=0.1, value=0.05))
    forbidden = compose([slow, fast], toll=Toll(excess=0.1, value=9.0))
    assert free.value < taxed.value < 2.0
    assert dict(taxed.shares)[1] > dict(free.shares)[1]
    assert forbidden.shares == ((1, 1.0),)


@given(st.floats(0.01, 0.99), st.integers(1, 60), st.integers(0, 200))
def test_two_plans_in_turn_keep_their_weights_in_every_window(weight, width, start):
    order = turns([weight, 1 - weight], start + width)
    count = sum(i == 0 for i in order[start:])
    assert abs(count - weight * width) < 2


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5), st.integers(1, 200))
def test_turns_never_run_ahead_of_their_weights(raw, num_items):
    weights = [w / sum(raw) for w in raw]
    counts = [0] * len(weights)
    for n in range(1, num_items + 1):
        counts[next_turn(counts, weights)] += 1
        assert all(c < w * n + 1 + 1e-6 for c, w in zip(counts, weights, strict=True))


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), st.integers(1, 500))
def test_phases_cover_the_cycle(raw, cycle):
    assume(sum(raw) > 0)
    weights = [w / sum(raw) for w in raw]
    found = phases(weights, cycle)
    assert sum(steps for _, steps in found) == cycle
    assert len({plan for plan, _ in found}) == len(found)
    for plan, steps in found[1:]:
        assert steps <= weights[plan] * cycle
