"""DoraParallel computes what the plain module computes: gradients, steps, outputs, state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CASES, Case, make
from plans import make_plan
from ranks import run_ranks

from dora import DoraParallel, partition
from dora.runtime.batch import as_call, microbatch_sizes, split, split_inputs
from dora.runtime.boundary import tensors_of
from dora.runtime.seeds import SeedKey, seeded_units

WORLD_SIZE = 4
NUM_MICROBATCHES = 4
SEED = 5

# Replica shares by stage; ranks beyond the plan are left out.
PLANS: dict[str, dict[str, Any]] = {
    "two": {"shares": [[1], [1]]},
    "three_uneven": {"shares": [[1], [1], [1]], "cuts": (1, 2)},
    "four": {"shares": [[1], [1], [1], [1]]},
    "two_to_one": {"shares": [[1, 1], [1]]},
    "one_to_two": {"shares": [[1], [1, 1]]},
    "two_to_two": {"shares": [[1, 1], [1, 1]]},
    "three_to_one_shares": {"shares": [[3, 1], [1]]},
    "data_parallel": {"shares": [[2, 1, 1]]},
    "gpipe": {"shares": [[1], [1], [1]], "schedule_kind": "gpipe"},
    "deep_warmup": {"shares": [[1], [1]], "warmup": (4, 1)},
}
# Batch norm sees micro-batches one by one, and dropout draws per micro-batch.
PER_MICROBATCH = {"cnn", "patches_dropout", "tied_dropout", "bert_dropout", "gpt2_dropout"}


def plain_step(case: Case, step: int, *, per_microbatch: bool) -> float:
    """Runs the plain module on the whole batch, or as the seed policy says."""
    args, kwargs = as_call(case.inputs)
    assert case.loss_fn is not None
    if not per_microbatch:
        loss = case.loss_fn(case.module(*args, **kwargs), case.targets)
        loss.backward()
        return loss.item()
    chain = partition(case.module, args, kwargs)
    sizes = microbatch_sizes(8, NUM_MICROBATCHES)
    pieces = split_inputs(args, kwargs, sizes, 0, ())
    total = 0.0
    for m, ((piece, keywords), target) in enumerate(
        zip(pieces, split(case.targets, sizes), strict=True)
    ):
        with seeded_units(chain, SeedKey(SEED, step, m)):
            loss = case.loss_fn(case.module(*piece, **keywords), target) / NUM_MICROBATCHES
        loss.backward()
        total += loss.item()
    return total


def relative_error(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> float:
    """Largest difference over all tensors, relative to each tensor's largest entry.

    A tensor that is zero but for rounding (a bias before batch norm) is measured against the
    largest tensor instead of against its own noise.
    """
    sizes = {name: float(x.abs().max()) for name, x in plain.items() if x.numel()}
    largest = max(sizes.values())
    return max(
        float((ours[name] - plain[name]).abs().max()) / (size if size > 1e-5 * largest else largest)
        for name, size in sizes.items()
        if name in ours
    )


def grads(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def compare(rank: int, name: str, **plan_fields: Any) -> dict[str, float]:
    """Three optimizer steps and one inference on both; returns the largest errors."""
    ours, plain = make(name), make(name)
    args, kwargs = as_call(ours.inputs)
    chain = partition(ours.module, args, kwargs)
    shares = plan_fields.pop("shares")
    idle = WORLD_SIZE - sum(len(row) for row in shares)
    plan = make_plan(chain.num_blocks, shares, idle=idle, **plan_fields)
    model = DoraParallel(chain, plan, seed=SEED)
    sgd = {"lr": 0.05, "momentum": 0.9}
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    reference = torch.optim.SGD(plain.module.parameters(), **sgd)
    errors = {"loss": 0.0, "grad": 0.0}
    for step in range(3):
        optimizer.zero_grad()
        reference.zero_grad()
        loss = model.step(ours.inputs, ours.targets, ours.loss_fn)
        expected = plain_step(plain, step, per_microbatch=name in PER_MICROBATCH)
        errors["loss"] = max(errors["loss"], abs(float(loss) - expected) / abs(expected))
        mine, whole = grads(model), grads(plain.module)
        held = {n for n, _ in model.named_parameters()}
        assert set(mine) == held & set(whole), "a gradient is missing or should not be there"
        if mine:
            errors["grad"] = max(errors["grad"], relative_error(mine, whole))
        optimizer.step()
        reference.step()
    state, expected_state = model.state_dict(), plain.module.state_dict()
    assert list(state) == list(expected_state)
    floats = {n: x for n, x in expected_state.items() if x.is_floating_point()}
    errors["state"] = relative_error(state, floats)
    assert all(torch.equal(state[n], x) for n, x in expected_state.items() if n not in floats)
    model.eval()
    plain.module.load_state_dict(state)
    plain.module.eval()
    with torch.no_grad():
        output, wanted = model(*args, **kwargs), plain.module(*args, **kwargs)
    assert type(output) is type(wanted)
    errors["output"] = relative_error(
        {str(i): x for i, x in enumerate(tensors_of(output))},
        {str(i): x for i, x in enumerate(tensors_of(wanted))},
    )
    return errors


def compare_all(rank: int, name: str) -> dict[str, dict[str, float]]:
    return {plan: compare(rank, name, **dict(fields)) for plan, fields in PLANS.items()}


# One with dropout, which takes half as long again, and one of a kind are enough for every day.
SLOW = (
    "bert_dropout",
    "encoder",
    "gpt2",
    "gpt2_dropout",
    "mlp",
    "patches",
    "patches_dropout",
    "qwen3",
    "tied",
    "vit",
)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in sorted(CASES)],
)
def test_equal_to_plain_module(name):
    for by_plan in run_ranks(WORLD_SIZE, compare_all, name, timeout_s=170):
        for plan, errors in by_plan.items():
            assert errors["loss"] <= 1e-5, (plan, errors)
            assert errors["grad"] <= 1e-5, (plan, errors)
            assert errors["state"] <= 1e-5, (plan, errors)
            assert errors["output"] <= 1e-6, (plan, errors)
