"""What a plan says of shared media, as the engine is told."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from engines import HOST, KEY, finish, receive, send
from models import make
from plans import make_plan
from ranks import run_ranks

from dora import _C, DoraParallel, partition
from dora.runtime.batch import as_call
from dora.runtime.media import shared_media
from dora.spec import Link


def links(*rows):
    return tuple(Link(src=src, dst=dst, media=media) for src, dst, media in rows)


WIFI = links(
    ("d0", "d1", ("wifi", "wifi")),
    ("d1", "d0", ("wifi", "wifi")),
    ("d1", "d2", ("wifi", "lan")),
    ("d2", "d1", ("cable",)),
)


def test_media_of_several_senders_are_shared():
    plan = make_plan(3, [[1], [1], [1]], links=WIFI)
    assert shared_media(plan, 0).media == {1: [0]}
    assert shared_media(plan, 1).media == {0: [0], 2: [0]}
    assert shared_media(plan, 2).media == {}


def test_lowest_sender_lends_a_medium():
    plan = make_plan(3, [[1], [1], [1]], links=WIFI[2:] + links(("d2", "d0", ("wifi",))))
    assert all(shared_media(plan, rank).arbiters == {0: 1} for rank in range(3))


def test_plan_without_links_shares_nothing():
    told = shared_media(make_plan(2, [[1], [1]]), 0)
    assert (told.media, told.arbiters) == ({}, {})


def test_link_of_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="link names device 'd9'"):
        make_plan(2, [[1], [1]], links=links(("d0", "d9", ("wifi",))))


def train_on_one_channel(rank: int) -> tuple[set[str], set[str]]:
    case = make("mlp")
    args, kwargs = as_call(case.inputs)
    chain = partition(case.module, args, kwargs)
    plan = make_plan(chain.num_blocks, [[1], [1]], links=WIFI[:2])
    model = DoraParallel(chain, plan)
    model.step(case.inputs, case.targets, case.loss_fn)
    lanes = {span.lane for span in model.timeline().spans if span.rank == rank}
    return lanes, {frame.kind for frame in model.transport.frames()}


@pytest.mark.timeout(120)
def test_training_on_a_shared_medium_asks_its_arbiter():
    (lanes, kinds), (other_lanes, other_kinds) = run_ranks(2, train_on_one_channel)
    assert lanes == other_lanes == {"compute", "network", "wait"}
    assert {"want", "return"} <= kinds  # rank 0 lends the channel, rank 1 asks for it
    assert "allow" in other_kinds


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(2))
def test_senders_that_need_several_media_do_not_block_one_another(seed):
    random, size, length = Random(seed), 4, 50_000
    pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
    paths = {pair: random.sample(range(3), random.randint(1, 3)) for pair in pairs}
    engines = [_C.Engine(rank, KEY, host=HOST) for rank in range(size)]
    try:
        for rank, engine in enumerate(engines):
            peers = {r: (HOST, e.port) for r, e in enumerate(engines) if r != rank}
            media = {r: paths[rank, r] for r in peers}
            engine.connect(peers, media=media, arbiters={m: m for m in range(3)})
        assert all(engine.wait_connected(10) == [] for engine in engines)
        rooms = {(pair, n): np.zeros(length, np.uint8) for pair in pairs for n in range(40)}
        done = [receive(engines[j], room, i, tag=n) for ((i, j), n), room in rooms.items()]
        data = np.ones(length, np.uint8)
        done += [send(engines[i], data, j, tag=n, deadline=random.random()) for (i, j), n in rooms]
        assert set(finish(*done)) == {"done"}
        assert all(room.all() for room in rooms.values())
    finally:
        for engine in engines:
            engine.close(0)
