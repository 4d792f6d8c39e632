"""Which cuts `partition` finds, names, refuses, and that it leaves the module as it was."""

from __future__ import annotations

import pytest
import torch
from models import CASES, make
from torch import nn

from dora import partition
from dora.errors import PartitionError
from dora.runtime.batch import as_call


def cut(name: str, **options):
    case = make(name)
    args, kwargs = as_call(case.inputs)
    return partition(case.module, args, kwargs, **options)


def test_sequential_parameterless_layers_join_the_block_before():
    layers = (nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3))
    assert partition(nn.Sequential(*layers), (torch.randn(2, 3),)).names == ("0..1", "2..3", "4")


def test_unit_that_overwrites_its_input_joins_the_next_one():
    assert cut("mlp").names == ("0", "1..2", "3..4", "5..6", "7..8")


def test_bert_follows_its_module_list():
    names = cut("bert").names
    assert names[:4] == ("bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)))


def test_residual_inside_a_block_stays_inside():
    assert "layer1.1" in cut("cnn").names


@pytest.mark.parametrize("name", sorted(CASES))
def test_blocks_cover_every_parameter_and_state_is_untouched(name):
    case = make(name)
    before = {key: value.clone() for key, value in case.module.state_dict().items()}
    random = torch.get_rng_state()
    args, kwargs = as_call(case.inputs)
    chain = partition(case.module, args, kwargs)
    covered = {n for block in range(chain.num_blocks) for n in chain.parameters_of(block)}
    assert covered == {n for n, _ in case.module.named_parameters()}
    assert chain.num_blocks >= 4
    after = case.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in case.module.parameters())


@pytest.mark.parametrize("name", ["tied", "gpt2", "qwen3"])
def test_tied_weight_belongs_to_first_and_last_block(name):
    chain = cut(name)
    assert list(chain.tied().values()) == [(0, chain.num_blocks - 1)]


def test_root_parameters_belong_to_the_block_after_the_glue_that_uses_them():
    blocks = cut("patches").parameters.blocks
    assert blocks["token"] == blocks["positions"] == (1,)


def test_blocks_by_name():
    chain = cut("bert", blocks=["bert.encoder.layer"])
    assert chain.names[1:4] == tuple(f"bert.encoder.layer.{i}" for i in range(3))


def test_unknown_block_name_is_refused_with_the_known_lists():
    with pytest.raises(PartitionError, match=r"given 'layers'.*bert\.encoder\.layer"):
        cut("bert", blocks=["layers"])


class Skip(nn.Module):
    """Adds the first layer's output to the third's: no cut between them is valid."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](x)
        second = self.layers[1](first)
        third = self.layers[2](second) + first
        return self.layers[4](self.layers[3](third))


def test_cuts_under_a_skip_connection_are_not_offered():
    assert partition(Skip(), (torch.randn(2, 4),)).names == (
        "layers.0",
        "layers.1..layers.3",
        "layers.4",
    )


class Hidden(nn.Module):
    """Reads an early value through an attribute, which no argument shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.early = self.layers[0](x)
        x = self.layers[2](self.layers[1](self.early))
        x += self.early.mean().item()
        return self.layers[3](x)


def test_value_that_reaches_python_counts_as_needed():
    chain = partition(Hidden(), (torch.randn(2, 4),))
    assert chain.names[0] == "layers.0"
    assert len(chain.names) < 4


def test_shared_module_called_twice_is_tied():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(self.a(x)))

    chain = partition(Twice(), (torch.randn(2, 3),))
    assert chain.calls == ("a", "b", "a")
    assert chain.tied() == {"a.weight": (0, 2), "a.bias": (0, 2)}


def test_module_that_fails_on_the_sample_says_so():
    with pytest.raises(PartitionError, match="fails on the sample.*RuntimeError"):
        partition(nn.Sequential(nn.Linear(3, 3)), (torch.randn(2, 4),))


def test_changed_order_of_blocks_is_an_error():
    class Flip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            self.flip = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order = reversed(self.layers) if self.flip else self.layers
            for layer in order:
                x = layer(x)
            return x

    module = Flip()
    chain = partition(module, (torch.randn(2, 3),))
    module.flip = True
    with (
        pytest.raises(PartitionError, match=r"called layers\.1 where.*layers\.0"),
        chain.on_boundary(lambda _, output: output),
    ):
        module(torch.randn(2, 3))


def test_meta_module_can_be_cut():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    assert partition(module, (torch.randn(2, 4),)).num_blocks == 2


def test_on_boundary_can_replace_what_crosses():
    case = make("mlp")
    chain = partition(case.module, (case.inputs,))
    seen = []

    def zero(block, output):
        seen.append(block)
        return torch.zeros_like(output)

    with chain.on_boundary(zero):
        out = case.module(case.inputs)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(out, case.module[8](torch.zeros(8, 12)))
