"""A plan can be changed between steps: results are those of a run without the change."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, make
from plans import make_plan
from ranks import outcomes, run_ranks

from dora import DoraParallel, partition
from dora.errors import DoraError, InfeasiblePlanError, ProtocolError
from dora.runtime.batch import as_call
from dora.runtime.migration import Carrier, Shipment, shipments
from dora.runtime.parcel import CHUNK_BYTES, Parcel
from dora.spec import Plan, Replica, Stage

pytestmark = pytest.mark.timeout(120)

WORLD_SIZE = 3


def placed(num_blocks: int, stages: list[tuple[int, tuple[int, ...]]], **fields: Any) -> Plan:
    """Returns a plan of (first block, ranks) per stage, for `WORLD_SIZE` devices."""
    edges = [first for first, _ in stages] + [num_blocks]
    return Plan(
        devices=tuple(f"d{i}" for i in range(WORLD_SIZE)),
        stages=tuple(
            Stage(
                index=i,
                first_block=edges[i],
                last_block=edges[i + 1] - 1,
                replicas=tuple(Replica(device=f"d{r}", share=1 / len(ranks)) for r in ranks),
            )
            for i, (_, ranks) in enumerate(stages)
        ),
        num_microbatches=4,
        **fields,
    )


def plans_for(num_blocks: int) -> list[Plan]:
    """Returns plans of which each moves something of the one before."""
    last, middle = num_blocks - 1, num_blocks // 2
    return [
        placed(num_blocks, [(0, (0,)), (last, (1,))]),  # rank 2 is left out
        placed(num_blocks, [(0, (0,)), (1, (1,)), (last, (2,))]) if num_blocks > 2
        else placed(num_blocks, [(0, (1,)), (1, (2,))]),
        placed(num_blocks, [(0, (2,)), (middle, (1,))]),  # rank 0 keeps nothing
        placed(num_blocks, [(0, (0, 2)), (middle, (1,))]),
        placed(num_blocks, [(0, (0, 1, 2))]),
        placed(num_blocks, [(0, (0,)), (middle, (1,))]),
    ]  # fmt: skip


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    # A larger eps: rounding decides the direction of a gradient that is zero, as of a key's bias.
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3),
}


def build(name: str, plan_at: int = 0, **options: Any) -> tuple[Any, DoraParallel, list[Plan]]:
    case = make(name)
    args, kwargs = as_call(case.inputs)
    chain = partition(case.module, args, kwargs)
    plans = plans_for(chain.num_blocks)
    return case, DoraParallel(chain, plans[plan_at], seed=3, **options), plans


def train(
    name: str, optimizer_name: str, *, switches: bool, steps_each: int = 1, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains through all plans, or as many steps with the first one."""
    case, model, plans = build(name, **options)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    losses = []
    for i, plan in enumerate(plans):
        if switches and i > 0:
            model.switch(plan)
        for _ in range(steps_each):
            optimizer.zero_grad()
            losses.append(float(model.step(case.inputs, case.targets, case.loss_fn)))
            model.clip_grad_norm_(0.5)
            optimizer.step()
            schedule.step()
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
            id(p) for p in model.parameters()
        }
    state = model.state_dict()
    model.transport.close()
    return losses, state


def compare(rank: int, cases: list[tuple[str, str]], options: dict[str, Any]) -> list[float]:
    """Returns the largest relative differences of losses and state to runs without switches."""
    return [difference(name, optimizer, **options) for name, optimizer in cases]


def difference(name: str, optimizer_name: str, **options: Any) -> float:
    ours, state = train(name, optimizer_name, switches=True, **options)
    wanted, wanted_state = train(name, optimizer_name, switches=False, **options)
    assert wanted[-1] < wanted[0]
    error = max(abs(a - b) / abs(b) for a, b in zip(ours, wanted, strict=True))
    for key, value in wanted_state.items():
        scale = value.double().norm().clamp_min(0.01)  # some biases have no gradient
        error = max(error, float((state[key].double() - value.double()).norm() / scale))
    return error


def test_training_goes_on_as_if_nothing_had_been_switched():
    cases = [("mlp", "momentum"), ("tied_dropout", "adamw"), ("cnn", "adamw")]
    for errors in run_ranks(WORLD_SIZE, compare, cases, {}):
        assert max(errors) <= 2e-5, errors


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_all_models_switch():
    cases = [(name, "momentum") for name in sorted(CASES)]
    for errors in run_ranks(WORLD_SIZE, compare, cases, {}, timeout_s=170):
        assert max(errors) <= 5e-5, dict(zip(cases, errors, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gloo", "gloo-chunked"])
def test_other_transports_switch_too(transport):
    options = {"transport": transport}
    for errors in run_ranks(WORLD_SIZE, compare, [("mlp", "momentum")], options):
        assert max(errors) <= 2e-5


def several(rank: int) -> None:
    accumulate()
    groups_and_frozen()
    infer_ahead(rank)
    refused(rank)
    leaks(rank)


def accumulate() -> None:
    """Gradients of several calls are kept over a switch, as are the user's marks on parameters."""
    case, model, plans = build("mlp")
    for parameter in model.parameters():
        parameter.mark = "kept"  # type: ignore[attr-defined]
    whole = make("mlp")
    for i in range(3):
        model.switch(plans[i + 1])
        model.step(case.inputs, case.targets, case.loss_fn)
        whole.loss_fn(whole.module(whole.inputs), whole.targets).backward()
    wanted = dict(whole.module.named_parameters())
    for name, parameter in model.named_parameters():
        if name != "unused":
            torch.testing.assert_close(parameter.grad, wanted[name].grad)
    model.transport.close()


def groups_and_frozen() -> None:
    """Groups of parameters keep their options, and what is frozen stays so."""
    case = make("mlp")
    for parameter in list(case.module.parameters())[2:4]:
        parameter.requires_grad_(False)
    chain = partition(case.module, as_call(case.inputs)[0])
    plans = plans_for(chain.num_blocks)
    model = DoraParallel(chain, plans[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for plan in plans:
        if plan is not plans[0]:
            model.switch(plan)
        optimizer.zero_grad()
        model.step(case.inputs, case.targets, case.loss_fn)
        optimizer.step()
        held = {n: p for n, p in model.named_parameters() if n != "unused"}
        for group, is_decayed in zip(optimizer.param_groups, (True, False), strict=True):
            assert group["weight_decay"] == (0.1 if is_decayed else 0.0)
            wanted = {
                id(p) for p in held.values() if p.requires_grad and (p.dim() > 1) == is_decayed
            }
            listed = {id(p) for p in group["params"]} & {id(p) for p in held.values()}
            assert listed == wanted
    model.transport.close()


def infer_ahead(rank: int) -> None:
    """Weights come while requests go on; what has changed meanwhile comes again."""
    case, model, plans = build("mlp")
    model.eval()
    with torch.no_grad():
        wanted = model(case.inputs)
        model.prepare(plans[1])
        assert torch.equal(model(case.inputs), wanted)
        model.prepare(plans[1])  # nothing is left to fetch
        model.switch(plans[1])
        assert torch.equal(model(case.inputs), wanted)
        if rank == 2:
            assert model.events[-1].num_bytes == 0  # all of it had come ahead
        model.prepare(plans[2])
        for parameter in model.parameters():
            parameter.mul_(2)
        doubled = model(case.inputs)
        model.switch(plans[2])
        assert torch.equal(model(case.inputs), doubled)
        assert not torch.equal(doubled, wanted)
        if rank == 0:
            assert [name for name, _ in model.named_parameters()] == ["unused"]
    model.transport.close()


def refused(rank: int) -> None:
    """A plan that does not fit is refused, and the model goes on with the old one."""
    case, model, plans = build("mlp", memory_limit_bytes=None if rank else 5000)
    before = float(model.step(case.inputs, case.targets, case.loss_fn))
    for plan, error in (
        (plans[4], InfeasiblePlanError),  # all of the model on each device
        (make_plan(9, [[1], [1], [1]]), InfeasiblePlanError),
        (plans[1 + rank % 2], ProtocolError),
    ):
        with pytest.raises(error):
            model.switch(plan)
    assert float(model.step(case.inputs, case.targets, case.loss_fn)) == before
    model.transport.close()


def leaks(rank: int) -> None:
    """Ten switches leave no thread, no socket, no hook behind."""
    case, model, plans = build("mlp")
    optimizer = OPTIMIZERS["adamw"](model.parameters())

    def used() -> tuple[int, int, int]:
        hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
        return threading.active_count(), len(os.listdir("/proc/self/fd")), hooks

    seen = []
    for i in range(14):
        model.switch(plans[i % 2 * 4])
        model.step(case.inputs, case.targets, case.loss_fn)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(used())
        dist.barrier()
    assert seen[-2] == seen[2], seen
    assert seen[-1] == seen[3], seen
    model.transport.close()


def test_gradients_groups_prefetch_refusals_and_leaks():
    run_ranks(WORLD_SIZE, several)


def unknown(rank: int) -> None:
    case, model, plans = build("mlp")
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    model.switch(plans[2])
    model.step(case.inputs, case.targets, case.loss_fn)
    optimizer.step()


@pytest.mark.slow
def test_unknown_groups_are_refused():
    errors = [outcome.error for outcome in outcomes(WORLD_SIZE, unknown)]
    assert any("before the first optimizer.step()" in str(error) for error in errors)


class Wire:
    """Carries messages between carriers of one process, until it is cut."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.capacity = 1_000_000
        self.num_carried = 0

    def end(self, rank: int) -> WireEnd:
        return WireEnd(self, rank)


class WireEnd:
    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def send(self, tensor: torch.Tensor, dst: int, tag: int, action: str, **_: Any) -> Arrival:
        self.wire.sent.setdefault((self.rank, dst), []).append(tensor)
        return Arrival(None, None)

    def receive(self, tensor: torch.Tensor, src: int, tag: int, action: str) -> Arrival:
        if self.wire.num_carried >= self.wire.capacity:
            return Arrival(None, DoraError("the wire is cut"))
        self.wire.num_carried += 1
        tensor.copy_(self.wire.sent[src, self.rank].pop(0))
        return Arrival(tensor, None)


class Arrival:
    def __init__(self, tensor: torch.Tensor | None, error: DoraError | None) -> None:
        self.tensor, self.error = tensor, error

    def wait(self, timeout_s: float) -> None:
        if self.error is not None:
            raise self.error


@settings(max_examples=25)
@given(st.integers(0, 5), st.integers(0, 5))
def test_interrupted_transfer_goes_on_where_it_stopped(first, second):
    """However often it is cut, every chunk crosses once."""
    num_chunks = 4
    tensor = torch.arange(num_chunks * CHUNK_BYTES // 4 - 3, dtype=torch.float32)
    parcels = {"a": Parcel({"value": tensor}, None)}
    layouts = {"a": parcels["a"].layout()}
    wire = Wire()
    src, dst = (Carrier(wire.end(rank), rank, 7, 1.0) for rank in (0, 1))
    moves = [Shipment("a", 0, 1)]
    for capacity in (first, first + second, 1000):
        wire.capacity = capacity
        progress = {1: dst.progress()}
        src.start(moves, parcels, layouts, progress)
        dst.start(moves, {}, layouts, progress)
        if capacity < 1000:
            wire.sent.clear()
            src.interrupted()
            dst.interrupted()
    assert torch.equal(dst.collect(["a"])["a"].value, tensor)
    assert wire.num_carried == num_chunks


sets_of_ranks = st.sets(st.integers(0, 4), min_size=1)


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(sets_of_ranks, sets_of_ranks)))
def test_shipments_bring_all_that_is_missing_and_nothing_else(placements):
    needed = {name: sorted(new) for name, (_, new) in placements.items()}
    suppliers = {name: sorted(old) for name, (old, _) in placements.items()}
    moves = shipments(needed, suppliers, lambda src, dst: abs(src - dst))
    for name, (old, new) in placements.items():
        assert sorted(m.dst for m in moves if m.name == name) == sorted(new - old)
    for name, src, dst in moves:
        assert abs(src - dst) == min(abs(rank - dst) for rank in suppliers[name])


def test_shipments_of_what_nobody_has_are_an_error():
    with pytest.raises(DoraError, match="a: no rank has it"):
        shipments({"a": [1]}, {}, lambda src, dst: 0)
