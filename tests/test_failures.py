"""Whatever goes wrong on one rank ends on every rank with a clear error, and never hangs."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from models import make
from plans import make_plan
from ranks import outcomes

from dora import DoraParallel, partition
from dora.errors import DoraError, InfeasiblePlanError, PeerLostError, ProtocolError
from dora.runtime.batch import as_call

pytestmark = pytest.mark.timeout(120)


def build(name: str, shares, *, idle: int = 0, plan_fields=None, **options):
    case = make(name)
    args, kwargs = as_call(case.inputs)
    chain = partition(case.module, args, kwargs)
    plan = make_plan(chain.num_blocks, shares, idle=idle, **(plan_fields or {}))
    return case, DoraParallel(chain, plan, **options)


def step_with(action, rank: int, victim: int, options: dict) -> None:
    """Runs two good steps, then `action` inside a block of rank `victim`."""
    case, model = build("mlp", [[1], [1], [1]], idle=1, **options)
    for _ in range(2):
        model.step(case.inputs, case.targets, case.loss_fn)
    if rank == victim:
        first = model.chain.units(
            model.plan.stages[rank].first_block,
            9 if rank > 2 else model.plan.stages[rank].last_block,
        )[0]
        unit = model.module.get_submodule(model.chain.calls[first])
        unit.register_forward_pre_hook(lambda *_: action())
    try:
        model.step(case.inputs, case.targets, case.loss_fn)
    finally:
        with pytest.raises(DoraError, match="failed before"):
            model.step(case.inputs, case.targets, case.loss_fn)


def fail() -> None:
    raise ZeroDivisionError("the block divided by zero")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(100)


def run_failing(rank: int, victim: int) -> None:
    step_with(fail, rank, victim, {})


def run_dying(rank: int, victim: int) -> None:
    step_with(die, rank, victim, {})


def run_hanging(rank: int, victim: int) -> None:
    step_with(hang, rank, victim, {"timeout_s": 3.0})


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_failing_block_is_reported_on_every_rank(victim):
    results = outcomes(4, run_failing, victim)
    for rank, outcome in enumerate(results):
        if rank == victim:
            assert isinstance(outcome.error, ZeroDivisionError), outcome
        else:
            assert isinstance(outcome.error, PeerLostError), outcome
            assert f"rank {rank}:" in str(outcome.error)
            assert f"on rank {victim}: ZeroDivisionError: the block" in str(outcome.error)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_killed_rank_is_noticed_by_every_rank(victim):
    results = outcomes(4, run_dying, victim)
    for rank, outcome in enumerate(results):
        if rank == victim:
            assert outcome.exitcode == -signal.SIGKILL
        else:
            assert isinstance(outcome.error, PeerLostError), outcome
            assert "connection was closed" in str(outcome.error)
    told = [str(o.error) for o in results if o.error is not None]
    assert any(f"with rank {victim} failed" in text for text in told)


@pytest.mark.slow
def test_silent_rank_runs_into_the_timeout():
    results = outcomes(4, run_hanging, 1, timeout_s=20)
    assert isinstance(results[1].error, TimeoutError)  # the test's own limit ended its sleep
    others = [results[rank].error for rank in (0, 2, 3)]
    assert all(isinstance(error, PeerLostError) for error in others), others
    assert any("with rank 1 failed: no answer within 3 s (timeout_s)" in str(e) for e in others)


def other_batch(rank: int) -> None:
    case, model = build("mlp", [[1], [1]])
    inputs = case.inputs[:6] if rank == 1 else case.inputs
    targets = case.targets[:6] if rank == 1 else case.targets
    model.step(inputs, targets, case.loss_fn)


def test_different_batches_are_a_protocol_error():
    errors = [o.error for o in outcomes(2, other_batch)]
    assert any(isinstance(error, ProtocolError) for error in errors), errors
    assert all("another batch shape or mode" in str(error) for error in errors)


def other_mode(rank: int) -> None:
    case, model = build("mlp", [[1], [1]])
    if rank == 0:
        model.step(case.inputs, case.targets, case.loss_fn)
    else:
        with torch.no_grad():
            model(case.inputs)


def test_training_against_inference_is_a_protocol_error():
    errors = [o.error for o in outcomes(2, other_mode)]
    assert any(isinstance(error, ProtocolError) for error in errors), errors


def bad_targets(rank: int) -> None:
    case, model = build("mlp", [[1], [1]])
    model.step(case.inputs, case.targets[:, None].expand(-1, 3), case.loss_fn)


def test_failing_loss_is_reported_on_every_rank():
    first, last = outcomes(2, bad_targets)
    assert isinstance(first.error, PeerLostError)
    assert "first failure, on rank 1" in str(first.error)
    assert last.error is not None
    assert not isinstance(last.error, PeerLostError)


def too_small(rank: int) -> None:
    build("mlp", [[1], [1]], memory_limit_bytes=1000 if rank == 1 else None)


def test_memory_limit_is_refused_on_every_rank():
    errors = [o.error for o in outcomes(2, too_small)]
    assert all(isinstance(error, InfeasiblePlanError) for error in errors), errors
    assert len({str(error) for error in errors}) == 1
    assert "device d1 (rank 1) needs at least" in str(errors[0])


def other_plans(rank: int) -> None:
    build("mlp", [[1], [1]], plan_fields={"num_microbatches": 2 + rank})


def test_different_plans_are_refused_on_every_rank():
    errors = [o.error for o in outcomes(2, other_plans)]
    assert all(isinstance(error, ProtocolError) for error in errors), errors


def wrong_world(rank: int) -> None:
    build("mlp", [[1], [1]], idle=1)


def test_plan_for_other_devices_is_refused():
    for outcome in outcomes(2, wrong_world):
        assert isinstance(outcome.error, InfeasiblePlanError)
        assert "made for 3 devices" in str(outcome.error)


def misuse(rank: int) -> list[str]:
    case, model = build("mlp", [[1], [1]])
    said = []
    for call in (
        lambda: model(case.inputs),
        lambda: model.step(case.inputs[:3], case.targets[:3], case.loss_fn),
        lambda: model.to(torch.float64),
        lambda: model.step({}, case.targets, case.loss_fn),
    ):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    model.step(case.inputs, case.targets, case.loss_fn)  # none of it broke the job
    return said


def test_misuse_is_refused_before_anything_is_sent():
    for outcome in outcomes(2, misuse):
        assert outcome.error is None, outcome.trace
        backward, batch, cast, empty = outcome.value
        assert "model.step(inputs, targets, loss_fn)" in backward
        assert "given 3 samples, allowed at least 4" in batch
        assert "before it is partitioned" in cast
        assert "given no tensor" in empty
