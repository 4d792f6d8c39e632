"""Defects that were found in use, each with a short account of what went wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import Case, make
from plans import make_plan
from ranks import outcomes, run_ranks
from test_parallel import build, step
from torch import nn

from dora import DoraParallel, partition
from dora.errors import PartitionError, ProtocolError

pytestmark = pytest.mark.timeout(120)


class PassOn(nn.Module):
    """Uses a value after a unit that passes on, or overwrites, that value's memory."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.fc1, self.middle = nn.Linear(4, 4), middle
        self.fc2, self.fc3 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = self.fc1(x)
        return self.fc3(self.fc2(self.middle(early)) + early)


# A unit's output took over the marks of its memory. Where the unit returned its input, or wrote
# to it, later readers of the input looked as if they read the output, and a cut that loses the
# input was offered: the next stage computed with zeros.
@pytest.mark.parametrize(
    "middle", [nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(0.0).eval()], ids=repr
)
def test_value_that_shares_memory_with_a_later_output_is_not_cut_off(middle):
    names = partition(PassOn(middle), (torch.randn(2, 4),)).names
    assert names == ("fc1..middle..fc2..fc3",) or names[0] in ("fc1", "fc1..fc3")
    assert "fc1..middle" not in names


class ToList(nn.Module):
    """Reads a value as a Python list, which no operator of torch shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = self.layers[0](x)
        shift = early.mean(1).tolist()[0]
        return self.layers[2](self.layers[1](early) + shift)


# `tolist` and `numpy` do not pass torch's dispatcher, so their readers were not seen.
def test_value_read_as_a_list_counts_as_needed():
    assert len(partition(ToList(), (torch.randn(2, 4),)).names) < 3


def other_batch(rank: int, shares) -> None:
    case = make("mlp")
    model = build(case, shares, plan_fields={"idle": 3 - sum(map(len, shares))})
    size = 4 if rank == 2 else 8
    for _ in range(3):  # ranks that need nothing of the other one notice when it has failed
        model.step(case.inputs[:size], case.targets[:size], case.loss_fn)


# Only ranks joined by a stage boundary compared their batches: replicas of a single stage, and
# a rank that is left out, trained on with another batch.
@pytest.mark.parametrize("shares", [[[1, 1, 1]], [[1], [1]]], ids=["replicas", "left_out"])
def test_other_batch_without_a_boundary_is_a_protocol_error(shares):
    errors = [o.error for o in outcomes(3, other_batch, shares)]
    assert any(isinstance(error, ProtocolError) for error in errors), errors
    assert all(error is not None for error in errors)


def unfreeze(rank: int) -> None:
    case = make("mlp")
    case.module[0].requires_grad_(False)
    model = build(case, [[1, 1]])
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(True)
    step(model, case)


# Which gradients are summed and sent was fixed at the start: a parameter that was unfrozen later
# silently kept each replica's own gradient.
def test_unfreezing_later_is_refused():
    for outcome in outcomes(2, unfreeze):
        assert "requires_grad given True, allowed False" in str(outcome.error)


class Trim(nn.Module):
    """Cuts its input to a length that is a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        x = x[:, : int(length.max())]
        for layer in self.layers:
            x = layer(x)
        return x


def trimmed(rank: int) -> None:
    torch.manual_seed(0)
    x, length = torch.randn(4, 6, 4), torch.full((4,), 3)
    chain = partition(Trim(), (x, length))
    model = DoraParallel(chain, make_plan(chain.num_blocks, [[1], [1]])).eval()
    with torch.no_grad():
        assert model(x, length).shape == (4, 3, 4)
        model(x, length + 2)


# Shapes between stages are remembered per input shape. Glue code that reads a value made them
# stale, and the peer received into the wrong shape.
def test_shape_that_depends_on_a_value_is_an_error():
    errors = [o.error for o in outcomes(2, trimmed)]
    assert any(isinstance(error, PartitionError) for error in errors), errors
    assert all("may depend on the shapes of the inputs, not" in str(error) for error in errors)


class Flat(nn.Module):
    """Returns rows of all samples below one another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.flatten(0, 1)


def flattened(rank: int) -> str:
    x = torch.randn(4, 3, 4)
    chain = partition(Flat(), (x,))
    model = DoraParallel(chain, make_plan(chain.num_blocks, [[1], [1]])).eval()
    try:
        with torch.no_grad():
            model(x)
    except ValueError as error:
        return str(error)
    return ""


# Outputs without the batch in front were cut to those of the first micro-batch.
def test_outputs_that_can_not_be_joined_are_refused():
    assert all("can be joined" in text for text in run_ranks(2, flattened))


class DeviceOfParameters(nn.Module):
    """Makes a mask where its first parameter lives, and draws noise between units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(4, device=next(self.parameters()).device)
        x = self.layers[0](x)
        noise = torch.rand(4)
        return self.layers[2](self.layers[1](x) * ones) * noise


def glue(rank: int) -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    chain = partition(DeviceOfParameters(), (x,))
    plan = make_plan(chain.num_blocks, [[1], [1], [1]], num_microbatches=1)
    model = DoraParallel(chain, plan, seed=1)
    loss = model.step(x, None, lambda y: y.sum())
    single = make_plan(chain.num_blocks, [[1]], idle=2, num_microbatches=1)
    del model
    torch.manual_seed(0)
    torch.randn(4, 4)
    again = partition(DeviceOfParameters(), (x,))
    return [
        float(loss),
        float(DoraParallel(again, single, seed=1).step(x, None, lambda y: y.sum())),
    ]


# Parameters of other stages moved to the meta device, which glue code then took for its own; and
# glue between skipped units drew other random numbers than on the stage before.
def test_glue_code_sees_real_devices_and_the_same_random_numbers():
    for spread, alone in run_ranks(3, glue):
        assert spread == pytest.approx(alone, rel=1e-6)


class TwiceNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.norm(self.a(x))))


def twice(rank: int) -> None:
    x = torch.randn(8, 4)
    case = Case(TwiceNormed(), x, x, F.mse_loss)
    step(build(case, [[1, 1]]), case)


# Statistics of replicas are summed with weights for one call per micro-batch.
def test_batch_norm_called_twice_on_replicas_is_refused():
    for outcome in outcomes(2, twice):
        assert "ran 8 times for 4 micro-batches" in str(outcome.error)


def wrong_shape(rank: int) -> str:
    model = build(make("mlp"))
    state = model.state_dict()
    state["0.weight"] = torch.zeros(12)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    return ""


# A smaller tensor was broadcast into the parameter.
def test_load_state_dict_refuses_another_shape():
    assert all("0.weight: given shape (12,)" in text for text in run_ranks(2, wrong_shape))


def sequence_first(rank: int) -> float:
    """`sample` with another batch dimension and a keyword input that must stay whole."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0)
    x = torch.randn(4, 4, 8)  # length 4, batch 4: the mask has the batch size too
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    plain = nn.TransformerEncoder(layer, 3).eval()
    model = DoraParallel(
        plain,
        make_plan(3, [[1], [1]]),
        sample={"src": x, "mask": mask},
        batch_dim=1,
        whole_inputs=("mask",),
    )
    torch.manual_seed(0)
    reference = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0), 3).eval()
    with torch.no_grad():
        return float((model(src=x, mask=mask) - reference(x, mask=mask)).abs().max())


# The sample was cut along dimension 0, masks included.
def test_sample_follows_batch_dim_and_whole_inputs():
    assert max(run_ranks(2, sequence_first)) <= 1e-6
