"""Rates of flows that share media: textbook cases, and what max-min fairness and priority mean."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora._C import share_media

Medium = tuple[float, tuple[float, ...]]
Instance = tuple[list[Medium], list[list[int]], list[float]]


def plain(*rates: float) -> list[Medium]:
    return [(rate, (1.0,)) for rate in rates]


def capacity(medium: Medium, num_flows: int) -> float:
    rate, efficiency = medium
    return rate * efficiency[min(max(num_flows, 1), len(efficiency)) - 1]


def used(paths: Sequence[Sequence[int]], rates: Sequence[float], medium: int) -> float:
    return sum(rate * path.count(medium) for path, rate in zip(paths, rates, strict=True))


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    num_media = draw(st.integers(1, 4))
    efficiency = st.lists(st.floats(0.2, 1), max_size=3).map(
        lambda values: (1.0, *sorted(values, reverse=True))
    )
    media = [(draw(st.floats(0.1, 100)), draw(efficiency)) for _ in range(num_media)]
    path = st.lists(st.integers(0, num_media - 1), min_size=1, max_size=3)
    paths = draw(st.lists(path, min_size=1, max_size=7))
    order = draw(st.lists(st.floats(0.1, 10), min_size=len(paths), max_size=len(paths)))
    return media, paths, order


def test_equal_flows_share_what_contention_leaves():
    media = [(100.0, (1.0, 0.8, 0.6))]
    for k, total in ((1, 100.0), (2, 80.0), (3, 60.0), (5, 60.0)):
        assert share_media(media, [[0]] * k, [1.0] * k, "fair") == pytest.approx([total / k] * k)


def test_fair_shares_follow_weights():
    assert share_media(plain(60), [[0]] * 3, [1, 2, 3], "fair") == pytest.approx([10, 20, 30])


def test_flow_that_crosses_a_medium_twice_gets_half():
    assert share_media(plain(60), [[0, 0]], [1], "fair") == [30]
    assert share_media(plain(60), [[0, 0]], [1], "priority") == [30]
    # Beside a flow that crosses it once: equal rates r, 2 r + r = 60.
    assert share_media(plain(60), [[0, 0], [0]], [1, 1], "fair") == pytest.approx([20, 20])


def test_max_min_with_different_bottlenecks():
    # Medium 1 is the tightest: its three flows get 2 each. That leaves 8 of medium 0 for flow 0,
    # while flow 4 has the rest of medium 2.
    paths = [[0], [0, 1], [1], [1, 2], [2]]
    rates = share_media(plain(10, 6, 5), paths, [1.0] * 5, "fair")
    assert rates == pytest.approx([8, 2, 2, 2, 3])


def test_priority_serves_the_most_urgent_first():
    paths = [[0], [0], [1]]
    assert share_media(plain(10, 4), paths, [1, 2, 0], "priority") == [0, 10, 4]
    # An urgent flow with another bottleneck leaves the rest.
    assert share_media(plain(10, 4), [[0], [0, 1]], [1, 2], "priority") == [6, 4]
    assert share_media(plain(10), [[0], [0]], [1, 1], "priority") == [10, 0]


def test_medium_without_rate_carries_nothing():
    for discipline in ("fair", "priority"):
        assert share_media(plain(0, 5), [[0, 1], [1]], [2, 1], discipline) == [0, 5]


def test_unknown_discipline_is_named():
    with pytest.raises(ValueError, match="'fifo'; use 'priority' or 'fair'"):
        share_media(plain(1), [[0]], [1], "fifo")


@given(instances(), st.sampled_from(["fair", "priority"]))
def test_no_medium_carries_more_than_its_capacity(instance, discipline):
    media, paths, order = instance
    rates = share_media(media, paths, order, discipline)
    for i, medium in enumerate(media):
        num_flows = sum(i in path and rate > 0 for path, rate in zip(paths, rates, strict=True))
        assert used(paths, rates, i) <= capacity(medium, num_flows) * (1 + 1e-9)


@given(instances())
def test_fair_flow_has_a_full_medium_where_none_gets_more(instance):
    """What defines max-min fairness, for rates divided by weights."""
    media, paths, weights = instance
    rates = share_media(media, paths, weights, "fair")
    level = [rate / weight for rate, weight in zip(rates, weights, strict=True)]

    def is_bottleneck(i: int, flow: int) -> bool:
        crossing = [f for f, path in enumerate(paths) if i in path]
        is_full = used(paths, rates, i) >= capacity(media[i], len(crossing)) * (1 - 1e-6)
        return is_full and level[flow] >= max(level[f] for f in crossing) * (1 - 1e-6)

    for flow, path in enumerate(paths):
        assert any(is_bottleneck(i, flow) for i in path)


@given(instances())
def test_urgent_flow_does_not_feel_the_others(instance):
    media, paths, priorities = instance
    rates = share_media(media, paths, priorities, "priority")
    ranked = sorted(range(len(paths)), key=lambda f: -priorities[f])
    for k in range(1, len(ranked) + 1):
        urgent = ranked[:k]
        alone = share_media(
            media, [paths[f] for f in urgent], [priorities[f] for f in urgent], "priority"
        )
        assert alone == [rates[f] for f in urgent]


@given(instances())
def test_priority_leaves_no_rate_that_a_flow_could_use(instance):
    media, paths, priorities = instance
    rates = share_media(media, paths, priorities, "priority")
    ranked = sorted(range(len(paths)), key=lambda f: -priorities[f])
    for place, flow in enumerate(ranked):
        before = ranked[: place + 1]

        def is_full(i: int, before: Sequence[int] = before, flow: int = flow) -> bool:
            load = sum(rates[f] * paths[f].count(i) for f in before)
            num_others = sum(i in paths[f] and rates[f] > 0 for f in before if f != flow)
            return load >= capacity(media[i], num_others + 1) * (1 - 1e-6)

        assert any(is_full(i) for i in paths[flow])


@given(instances(), st.sampled_from(["fair", "priority"]), st.floats(0.1, 10))
def test_rates_scale_with_media(instance, discipline, factor):
    media, paths, order = instance
    rates = share_media(media, paths, order, discipline)
    faster = [(rate * factor, efficiency) for rate, efficiency in media]
    expected = [rate * factor for rate in rates]
    # A billionth of a medium counts as nothing.
    tolerance = 1e-7 * max(rate for rate, _ in faster)
    assert share_media(faster, paths, order, discipline) == pytest.approx(expected, abs=tolerance)
