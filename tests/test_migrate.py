"""Migrations: what has to move and nothing else, from whom, how long, and what is left of it."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan

from dora.adapter import migration, placed, relabelled, remaining, switch_cost, twins
from dora.spec import Cluster, Conditions, Device, Link, Medium, Plan, Replica, Stage

NAMES = ("d0", "d1", "d2", "d3")


def make_cluster(*, is_wired: bool = False, odd: str = "") -> Cluster:
    """Returns four equal devices on one channel, or with a port each; `odd` has more memory."""
    devices = tuple(
        Device(
            name=name,
            flops_per_s=1e9,
            mem_bandwidth_bytes_per_s=1e9,
            memory_bytes=2 * 10**9 if name == odd else 10**9,
            tx_j_per_byte=1e-9,
            rx_j_per_byte=2e-9,
        )
        for name in NAMES
    )
    if is_wired:
        media = tuple(Medium(name=f"{n}.port", rate_bytes_per_s=1e6) for n in NAMES)
        path = {(a, b): (f"{a}.port", f"{b}.port") for a in NAMES for b in NAMES}
    else:
        media = (Medium(name="wifi", rate_bytes_per_s=1e6),)
        path = {(a, b): ("wifi", "wifi") for a in NAMES for b in NAMES}
    links = tuple(Link(src=a, dst=b, media=path[a, b]) for a in NAMES for b in NAMES if a != b)
    return Cluster(devices=devices, media=media, links=links)


def chain(*spans: tuple[str, int, int]) -> Plan:
    """Returns one stage per (device, first block, last block)."""
    stages = tuple(
        Stage(index=i, first_block=a, last_block=b, replicas=(Replica(device=name),))
        for i, (name, a, b) in enumerate(spans)
    )
    return Plan(devices=NAMES, stages=stages)


@st.composite
def chains(draw, num_blocks=8):
    count = draw(st.integers(1, 4))
    names = draw(st.permutations(NAMES))[:count]
    cuts = draw(st.lists(st.integers(1, num_blocks - 1), min_size=count - 1, max_size=count - 1,
                         unique=True))  # fmt: skip
    edges = [0, *sorted(cuts), num_blocks]
    return chain(*((n, a, b - 1) for n, a, b in zip(names, edges, edges[1:], strict=False)))


sizes = st.lists(st.integers(1, 10**6), min_size=8, max_size=8)


@given(chains(), chains(), sizes, st.booleans())
def test_moves_are_exactly_what_is_missing(old, new, block_bytes, is_wired):
    cluster, held = make_cluster(is_wired=is_wired), placed(old)
    found = migration(held, new, block_bytes, cluster)
    needed = {(b, name) for name, blocks in placed(new).items() for b in blocks}
    missing = {(b, name) for b, name in needed if b not in held.get(name, ())}
    assert {(m.block, m.dst) for m in found.moves} == missing
    assert len(found.moves) == len(missing)
    assert all(m.block in held[m.src] and m.src != m.dst for m in found.moves)
    assert found.num_bytes + found.kept_bytes == sum(block_bytes[b] for b, _ in needed)
    assert not found.lost


@given(chains(), sizes)
def test_the_same_placement_moves_nothing(plan, block_bytes):
    found = migration(placed(plan), plan, block_bytes, make_cluster())
    assert found.num_bytes == 0
    assert found.transfer_s == 0.0


@given(chains(), chains(), sizes)
def test_transfer_time_on_one_channel_is_twice_the_bytes_over_its_rate(old, new, block_bytes):
    found = migration(placed(old), new, block_bytes, make_cluster())
    assert found.transfer_s == pytest.approx(2 * found.num_bytes / 1e6)


def test_a_slower_channel_takes_longer():
    old, new = chain(("d0", 0, 1)), chain(("d1", 0, 1))
    slow = Conditions.of({"wifi": 0.5})
    found = [
        migration(placed(old), new, [100, 100], make_cluster(), conditions=c)
        for c in (Conditions(), slow)
    ]
    assert found[1].transfer_s == pytest.approx(2 * found[0].transfer_s)


def test_sources_share_the_load():
    # d0 and d1 both hold everything, on ports of their own: each gives half.
    held = {"d0": {0, 1, 2, 3}, "d1": {0, 1, 2, 3}}
    new = chain(("d2", 0, 1), ("d3", 2, 3))
    found = migration(held, new, [10] * 4, make_cluster(is_wired=True))
    given_by = {name: sum(m.src == name for m in found.moves) for name in ("d0", "d1")}
    assert given_by == {"d0": 2, "d1": 2}


def test_blocks_without_a_holder_are_lost():
    held = placed(chain(("d0", 0, 1), ("d1", 2, 3)))
    found = migration(held, chain(("d0", 0, 3)), [10] * 4, make_cluster(), gone={"d1"})
    assert found.lost == ((2, "d0"), (3, "d0"))
    assert found.transfer_s == inf
    assert found.moves == ()


@given(chains(), chains(), sizes, st.data())
def test_what_remains_is_what_has_not_arrived(old, new, block_bytes, data):
    cluster = make_cluster()
    found = migration(placed(old), new, block_bytes, cluster)
    done = data.draw(st.sets(st.sampled_from([(m.block, m.dst) for m in found.moves])
                             if found.moves else st.nothing()))  # fmt: skip
    rest = remaining(found, done, cluster)
    assert {(m.block, m.dst) for m in rest.moves} == {(m.block, m.dst) for m in found.moves} - done
    assert rest.num_bytes + rest.kept_bytes == found.num_bytes + found.kept_bytes
    assert rest.transfer_s <= found.transfer_s + 1e-9


def test_twins_are_equal_devices_on_equal_paths():
    assert twins(make_cluster()) == (NAMES,)
    assert twins(make_cluster(is_wired=True)) == (NAMES,)
    assert twins(make_cluster(odd="d1")) == (("d0", "d2", "d3"),)


@given(chains(), chains(), sizes)
@settings(max_examples=50)
def test_relabelling_never_moves_more(old, new, block_bytes):
    cluster, held = make_cluster(), placed(old)
    other = relabelled(new, held, twins(cluster), block_bytes)
    before, after = (migration(held, p, block_bytes, cluster).num_bytes for p in (new, other))
    assert after <= before
    assert [(s.first_block, s.last_block) for s in other.stages] == [
        (s.first_block, s.last_block) for s in new.stages
    ]


def test_relabelling_swaps_roles_that_are_in_place():
    old, new = chain(("d0", 0, 1), ("d1", 2, 3)), chain(("d1", 0, 1), ("d0", 2, 3))
    other = relabelled(new, placed(old), twins(make_cluster()), [10] * 4)
    assert placed(other) == placed(old)


def test_unlike_devices_keep_their_roles():
    old, new = chain(("d0", 0, 1), ("d1", 2, 3)), chain(("d1", 0, 1), ("d0", 2, 3))
    other = relabelled(new, placed(old), twins(make_cluster(odd="d1")), [10] * 4)
    assert placed(other)["d1"] == frozenset({0, 1})


def test_live_weights_pause_and_others_move_before():
    found = migration(placed(chain(("d0", 0, 1))), chain(("d1", 0, 1)), [500, 500], make_cluster())
    live = switch_cost(found, make_cluster(), is_live=True)
    serving = switch_cost(found, make_cluster(), is_live=False)
    assert live.pause_s == pytest.approx(serving.pause_s + found.transfer_s)
    assert serving.background_s == pytest.approx(found.transfer_s)
    assert live.energy_j == pytest.approx(1000 * 3e-9)


def test_replicas_each_get_their_copy():
    new = make_plan(4, [[1.0, 1.0], [1.0]])
    found = migration({"d3": set(range(4))}, new, [10] * 4, make_cluster())
    assert sorted((m.dst, m.block) for m in found.moves) == [
        ("d0", 0), ("d0", 1), ("d1", 0), ("d1", 1), ("d2", 2), ("d2", 3),
    ]  # fmt: skip
