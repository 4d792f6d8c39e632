"""Four ranks send, receive and cancel at random for a long time, with every byte checked."""

import os
import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import HOST, KEY, finish, pattern, receive, send
from ranks import run_ranks

from dora import _C

WORLD = 4
SOAK_S = float(os.environ.get("DORA_SOAK_S", "600"))
ROUND = 60  # messages of each pair, between two barriers
SIZES = [0, 1, 1000, 16_384, 16_385, 100_000, 1_000_000, 5_000_000]


def program(turn, src, dst):
    """What one rank sends to another in a turn; both sides compute it.

    Returns (tag, size, class, sender cancels, receiver cancels) of each message.
    """
    rng = random.Random(f"{turn} {src} {dst}")
    return [
        (
            rng.randrange(8),
            rng.choices(SIZES, [1, 1, 8, 4, 4, 4, 2, 1])[0],
            rng.randint(1, 4),
            rng.random() < 0.05,
            rng.random() < 0.05,
        )
        for _ in range(rng.randint(0, ROUND))
    ]


class Turn:
    """One rank's share of a turn."""

    def __init__(self, engine, rank, turn):
        self.engine = engine
        self.rank = rank
        self.rng = random.Random(f"{turn} {rank}")
        self.steps = []  # no bound methods: such a cycle keeps gigabytes until it is collected
        for other in range(WORLD):
            if other == rank:
                continue
            for i, message in enumerate(program(turn, rank, other)):
                self.steps.append((i, Turn.send, other, message))
            for i, message in enumerate(program(turn, other, rank)):
                self.steps.append((i, Turn.receive, other, message))
        # Out of order between peers and directions, in order on each channel.
        self.steps.sort(key=lambda step: step[0] + 8 * self.rng.random() * (step[1] is Turn.send))
        order = {}
        for i, action, other, message in sorted(self.steps, key=lambda step: step[0]):
            order.setdefault((action, other), []).append((i, message))
        self.steps = [
            (action, other, *order[action, other].pop(0)) for _, action, other, _ in self.steps
        ]
        self.open = []

    def send(self, other, i, message):
        tag, size, traffic_class, is_cancelled, _ = message
        data = pattern(size, 1000 * self.rank + i)
        operation = send(self.engine, data, other, tag=tag, traffic_class=traffic_class)
        self.open.append((operation, data, None, any(message[3:])))
        if is_cancelled:
            self.engine.cancel(operation)

    def receive(self, other, i, message):
        tag, size, _, _, is_cancelled = message
        room = np.full(size, 0x55, np.uint8)
        operation = receive(self.engine, room, other, tag=tag)
        self.open.append((operation, room, 1000 * other + i, any(message[3:])))
        if is_cancelled:
            self.engine.cancel(operation)

    def run(self):
        for action, other, i, message in self.steps:
            action(self, other, i, message)
            if self.rng.random() < 0.02:
                time.sleep(self.rng.random() * 0.01)
        for operation, memory, seed, may_fail in self.open:
            finish(operation, timeout_s=60)
            if operation.outcome == "done":
                assert seed is None or np.array_equal(memory, pattern(memory.size, seed))
            else:
                assert may_fail, operation.error
                memory[:] = 0x66
        for operation, memory, _, _ in self.open:
            if operation.outcome != "done":
                assert np.all(memory == 0x66), "written after it had ended"


def soak(rank, seconds):
    engine = _C.Engine(rank, KEY, host=HOST, eager_credit_bytes=1 << 20)
    ports = [None] * WORLD
    dist.all_gather_object(ports, engine.port)
    engine.connect({r: (HOST, port) for r, port in enumerate(ports) if r != rank})
    assert engine.wait_connected(30) == []
    end_s = time.monotonic() + seconds
    turn = messages = 0
    is_over = torch.zeros(1)
    while not is_over.item():
        share = Turn(engine, rank, turn)
        share.run()
        turn, messages = turn + 1, messages + len(share.open)
        is_over[0] = time.monotonic() > end_s
        work = engine.all_reduce(
            is_over.data_ptr(), 1, "float32", "max", list(range(WORLD)), timeout_s=60
        )
        assert finish(work, timeout_s=61) == ["done"], work.error
        peers = engine.stats()["peers"]
        assert all(peer["unexpected_bytes"] <= 1 << 20 for peer in peers.values())
    stats = engine.stats()
    assert stats["protocol_errors"] == 0
    assert [event for event in engine.events() if event[0] == "peer_lost"] == []
    dist.barrier()
    engine.close()
    return turn, messages


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 180)
def test_random_traffic_of_four_ranks():
    results = run_ranks(WORLD, soak, SOAK_S, timeout_s=SOAK_S + 150)
    assert len({turns for turns, _ in results}) == 1
    assert all(messages > 0 for _, messages in results)
    print(results)
