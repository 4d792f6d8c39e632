"""Measures what the runtime itself takes on this device, beside the blocks of a model.

A rank runs the middle of a pipeline of three over the machine's own network, with the very
executor, reducer and engine of a job; its neighbours only post what it sends and needs:

    neighbour --F--> [ a middle block ] --F--> neighbour
    neighbour <--B-- [ a middle block ] <--B-- neighbour

What its thread takes beyond the same block run again and again is the overhead. Processor time
counts, which waiting for a message or for the next period of a quota takes none of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import fmean, median
from threading import Thread
from typing import Any, NamedTuple, cast

import torch
from torch._C._distributed_c10d import HashStore

from dora.keys import new_key
from dora.partition import Chain
from dora.runtime.boundary import LeafSpec, tensors_of
from dora.runtime.communicator import Communicator
from dora.runtime.executor import Executor
from dora.runtime.frames import Frame
from dora.runtime.handshake import Handshake
from dora.runtime.pending import Pending
from dora.runtime.priority import ACTIVATION
from dora.runtime.reduce import GradReducer
from dora.runtime.seeds import SeedKey
from dora.runtime.stage import Shapes, StageRunner, Step
from dora.runtime.tags import BACKWARD, FORWARD, LOSS_TAG, first_tag
from dora.runtime.transport import Transport
from dora.scheduler import build_schedule
from dora.spec import Action, Plan, Stage

_MICROBATCHES = 4
# Steps after the first, which infers shapes and opens the connections.
_STEPS = 3
# Between actions, as a stage waits for its neighbours: its caches are cold then.
_REST_S = 0.02
_TIMEOUT_S = 30.0
_HEADER = "overhead"
_BEFORE, _HERE, _BEHIND = range(3)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def measure_overhead(
    chain: Chain, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool
) -> tuple[float, float]:
    """Returns the processor seconds of an action beside its block, and of a message.

    Made for `profile_model(..., overhead=measure_overhead)`, which leaves the model as it was: this
    adds to gradients and drops them. A model of fewer than three blocks has no middle: (0, 0).

    Args:
        chain: The partitioned model, on the CPU.
        args: Positional inputs of one micro-batch; a small one shows the overhead best.
        kwargs: Keyword inputs of the same.
        training: With backward.
    """
    if chain.num_blocks < 3:
        return 0.0, 0.0
    with _wires() as wires:
        spent = _spent(chain, chain.num_blocks // 2, (args, dict(kwargs)), wires, training)
    action_s = spent.action_s - 2 * spent.message_s - spent.block_s / (1 + training)
    return max(action_s, 0.0), spent.message_s


class _Spent(NamedTuple):
    """Processor seconds of an action, of a message, and of a micro-batch of the block alone."""

    action_s: float
    message_s: float
    block_s: float


class _Wire:
    """A transport that counts messages and what they take."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.num_messages, self.cpu_s = 0, 0.0

    @property
    def transport(self) -> Transport:
        """Itself: a stage of one device neither reduces nor broadcasts."""
        return cast(Transport, self)

    def send(
        self, tensor: torch.Tensor, dst: int, tag: int, action: str, *, priority: Any = None
    ) -> Pending:
        start_s = time.thread_time()
        sent = self._communicator.send(
            tensor, dst, tag=tag, priority=priority or ACTIVATION, action=action
        )
        return self._counted(sent, start_s)

    def receive(self, tensor: torch.Tensor, src: int, tag: int, action: str) -> Pending:
        start_s = time.thread_time()
        return self._counted(
            self._communicator.receive(tensor, src, tag=tag, action=action), start_s
        )

    def _counted(self, pending: Pending, start_s: float) -> Pending:
        self.num_messages += 1
        self.cpu_s += time.thread_time() - start_s
        return pending

    def frames(self) -> Sequence[Frame]:
        return ()


@contextmanager
def _wires() -> Iterator[list[_Wire]]:
    """Connects three ranks of this process over its own network."""
    store, key = HashStore(), new_key()

    def create(rank: int) -> Communicator:
        # Not over the network that a testbed without namespaces emulates.
        return Communicator.create(store, rank, 3, key=key, timeout_s=_TIMEOUT_S, buckets="")

    with ThreadPoolExecutor(3) as pool:
        communicators = [*pool.map(create, range(3))]
    try:
        yield [_Wire(communicator) for communicator in communicators]
    finally:
        for communicator in communicators:
            communicator.close()


def _plan(num_blocks: int, block: int, training: bool) -> Plan:
    ends = [0, block, block + 1, num_blocks]
    stages = [
        Stage.model_validate(
            {"index": s, "first_block": first, "last_block": end - 1, "replicas": [{"device": d}]}
        )
        for s, (first, end, d) in enumerate(zip(ends, ends[1:], "abc", strict=False))
    ]
    return Plan(
        devices=("a", "b", "c"),
        stages=tuple(stages),
        num_microbatches=_MICROBATCHES,
        schedule_kind="1f1b" if training else "wavefront",
    )


def _spent(chain: Chain, block: int, call: Call, wires: Sequence[_Wire], training: bool) -> _Spent:
    """Runs the steps, and after each of them the block alone."""
    plan = _plan(chain.num_blocks, block, training)
    actions = build_schedule(plan, training=training).actions_by_rank[_HERE]
    runner, wire = StageRunner(chain, block, block), wires[_HERE]
    transport, parameters = wire.transport, chain.parameters_of(block)
    reducer = GradReducer(transport, parameters, dict.fromkeys(parameters, (_HERE,)), rank=_HERE)
    executor = Executor(
        plan, _HERE, runner, transport, reducer=reducer, batchnorm=None, timeout_s=_TIMEOUT_S
    )
    rows = []
    for i in range(1 + _STEPS):
        neighbours = _Neighbours(runner.shapes(*call), wires, training, i)
        playing = Thread(target=neighbours.play, args=(actions,))
        playing.start()
        wire.num_messages, wire.cpu_s = 0, 0.0
        start_s = time.thread_time()
        _run(executor, actions, _step(plan, call, training, i), training)
        spent_s = time.thread_time() - start_s
        playing.join()
        _drop_gradients(chain)
        block_s = fmean(_alone_s(runner, call, training) for _ in range(_MICROBATCHES))
        _drop_gradients(chain)
        num_actions = _MICROBATCHES * (1 + training)
        rows.append((spent_s / num_actions, wire.cpu_s / wire.num_messages, block_s))
    reducer.close()
    return _Spent(*(median(column) for column in zip(*rows[1:], strict=True)))


def _step(plan: Plan, call: Call, training: bool, number: int) -> Step:
    return Step(
        inputs=[call] * _MICROBATCHES,
        routes=plan.routes,
        header=_HEADER,
        key=SeedKey(0, number, 0),
        loss_fn=(lambda output, target: output) if training else None,
    )


def _run(executor: Executor, actions: Sequence[Action], step: Step, training: bool) -> None:
    with torch.set_grad_enabled(training):
        if training:
            executor.train(actions, step)
        else:
            executor.infer(actions, step, [])


def _alone_s(runner: StageRunner, call: Call, training: bool) -> float:
    """Returns the processor seconds of one micro-batch of the stage, with nothing around it."""
    shapes = runner.shapes(*call)
    assert shapes.received is not None
    received = [_ones(leaf).requires_grad_(leaf.requires_grad) for leaf in shapes.received.tensors]
    with torch.set_grad_enabled(training):
        start_s = time.thread_time()
        output = runner.forward(*call, received, shapes)
        roots = [x for x in tensors_of(output) if x.requires_grad]
        if training and roots:
            torch.autograd.backward(roots, [torch.ones_like(x) for x in roots])
    return time.thread_time() - start_s


def _drop_gradients(chain: Chain) -> None:
    for parameter in chain.module.parameters():
        parameter.grad = None


def _ones(leaf: LeafSpec) -> torch.Tensor:
    return torch.ones(leaf.shape, dtype=leaf.dtype)


class _Neighbours:
    """The two other ranks in one step; they let this one rest before each forward and backward."""

    def __init__(self, shapes: Shapes, wires: Sequence[_Wire], training: bool, number: int) -> None:
        assert shapes.received is not None and shapes.sent is not None
        self._before, self._behind = wires[_BEFORE], wires[_BEHIND]
        self._leaves = {
            "F": (shapes.received.tensors, shapes.sent.tensors),
            "B": (shapes.sent.returned, shapes.received.returned),
        }
        for rank, wire in ((_BEFORE, self._before), (_BEHIND, self._behind)):
            stamp = Handshake(wire.transport, rank, _TIMEOUT_S)
            gets, sends = rank == _BEHIND or training, rank == _BEFORE or training
            stamp.begin(number, _HEADER, dst=[_HERE] * sends, src=[_HERE] * gets)
        if training:
            self._loss = torch.cat([torch.zeros(1, dtype=torch.float64), stamp.stamp])
            self._told = self._behind.send(self._loss, _HERE, LOSS_TAG, "loss")

    def play(self, actions: Sequence[Action]) -> None:
        """Sends what each action needs, and waits for what comes of it."""
        for _, kind, m in actions:
            if kind not in ("F", "B"):
                continue
            direction = FORWARD if kind == "F" else BACKWARD
            ends = self._before, self._behind
            source, sink = ends if kind == "F" else ends[::-1]
            needed, given = self._leaves[kind]
            time.sleep(_REST_S)
            tag, pending = first_tag(direction, m), []
            for i, leaf in enumerate(given):
                pending.append(sink.receive(leaf.empty(), _HERE, tag + i, kind))
            for i, leaf in enumerate(needed):
                pending.append(source.send(_ones(leaf), _HERE, tag + i, kind))
            for one in pending:
                one.wait(_TIMEOUT_S)
