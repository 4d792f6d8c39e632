"""Export chains: outputs, gradients and names equal those of the plain module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from dora.errors import PartitionError
from dora.partition.export import ExportedChain, export_chain


class UNet(nn.Module):
    """Two levels, skips over the bottleneck, activations in place."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.down1 = self._stage(4, 8, norm)
        self.down2 = self._stage(8, 16, norm)
        self.middle = self._stage(16, 16, norm)
        self.up2 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge2 = self._stage(16, 8, norm)
        self.up1 = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.merge1 = self._stage(8, 4, norm)
        self.leave = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _stage(num_in: int, num_out: int, norm: bool) -> nn.Sequential:
        layers = [nn.Conv2d(num_in, num_out, 3, padding=1)]
        layers += [nn.BatchNorm2d(num_out)] if norm else []
        return nn.Sequential(*layers, nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        x = self.enter(x) + step[:, None, None, None]
        d1 = self.down1(x)
        d2 = self.down2(functional.max_pool2d(d1, 2))
        h = self.middle(functional.max_pool2d(d2, 2))
        h = self.merge2(torch.cat([self.up2(h), d2[:, :8]], dim=1))
        h = self.merge1(torch.cat([self.up1(h), d1[:, :4]], dim=1))
        return self.leave(h)


class Translator(nn.Module):
    """Encoder-decoder with a causal mask, dict output and tied embeddings."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, scale: float = 1.0
    ) -> dict[str, object]:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        memory = self.transformer.encoder(self.embed(source) * scale)
        # Without the hint, nn.Transformer looks into the mask's data, which can not be captured.
        out = self.transformer.decoder(
            self.embed(target), memory, tgt_mask=mask, tgt_is_causal=True
        )
        return {"logits": self.head(out), "states": (memory, [out.mean(1)]), "kind": 3, "no": None}


class Functional(nn.Module):
    """Parameters on the root, no child module, a skip, a buffer and a plain constant."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(6, 6) / 2) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(6))
        self.unused = nn.Parameter(torch.randn(2))
        self.register_buffer("scale", torch.rand(6))
        self.register_buffer("offset", torch.rand(6), persistent=False)
        self.table = torch.arange(6.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = functional.linear(x, self.w[0], self.bias)
        h = torch.tanh(first) * self.scale + self.table
        h = functional.linear(h, self.w[1]) + torch.ones(h.shape[0], 6)
        h = functional.linear(h.sin(), self.w[2], self.bias) + self.offset
        return functional.linear(h + first, self.w[3]), x * self.scale


class Normed(nn.Module):
    """Batch norm used alone and twice (one buffer, two writers), and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.own = nn.BatchNorm1d(6)
        self.twice = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.calls.add_(1)
            scale = self.calls / 2
        x = self.own(self.layers[0](x)) * scale
        x = self.twice(self.layers[1](x)).relu()
        x = self.twice(self.layers[2](x)).relu()
        for layer in self.layers[3:]:
            x = functional.relu_(layer(x)) + x
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.layers[4].weight = self.layers[0].weight
        self.layers[2] = self.layers[1]

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x if mask is None else x * mask


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, shape)


CASES = {
    "unet": (UNet, lambda b: ((torch.randn(b, 3, 8, 8), torch.randn(b)), {})),
    "unet_norm": (
        lambda: UNet(norm=True),
        lambda b: ((torch.randn(b, 3, 8, 8), torch.ones(b)), {}),
    ),
    "translator": (Translator, lambda b: ((_ids(b, 5), _ids(b, 4)), {"scale": 2.0})),
    "functional": (Functional, lambda b: ((torch.randn(b, 6),), {})),
    "normed": (Normed, lambda b: ((torch.randn(b, 6),), {})),
    "tied": (Tied, lambda b: ((torch.randn(b, 6),), {"mask": torch.rand(b, 6)})),
}


def _make(case: str, batch: int = 4):
    torch.manual_seed(0)
    build, sample = CASES[case]
    return build(), *sample(batch)


def _tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _loss(outputs) -> torch.Tensor:
    return sum((t.float() ** 2).mean() for t in _tensors(outputs))


def _run_by_hand(chain: ExportedChain, args, kwargs):
    """Runs each block on values that were cut off from the graph, as a rank receives them."""
    inputs = chain.flatten(args, kwargs)
    sent, received = [], []
    values: tuple = ()
    for block, indices in zip(chain.blocks, chain.input_indices, strict=True):
        received.append(values)
        sent.append(block(*values, *(inputs[i] for i in indices)))
        if block is not chain.blocks[-1]:
            assert all(isinstance(value, torch.Tensor) for value in sent[-1])
            values = tuple(v.detach().clone().requires_grad_(v.requires_grad) for v in sent[-1])
    outputs = chain.unflatten(sent[-1])
    _loss(outputs).backward()
    for i in range(len(sent) - 2, -1, -1):
        pairs = [(s, r.grad) for s, r in zip(sent[i], received[i + 1], strict=True)]
        pairs = [(s, g) for s, g in pairs if s.requires_grad and g is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
    return outputs


def _grads(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters(remove_duplicate=False)}


def _assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export_chain_equals_module(case: str, training: bool) -> None:
    module, args, kwargs = _make(case)
    module.train(training)
    before = copy.deepcopy(module)
    chain = export_chain(module, args, kwargs)
    assert len(chain.blocks) == len(chain.names) == len(chain.input_indices) >= 3
    assert chain.dynamic_batch
    _assert_close(module.state_dict(), before.state_dict())

    for batch in (4, 2, 6, 1):
        if batch == 1 and training and "norm" in case:
            continue  # torch refuses batch norm over one value
        _, args, kwargs = _make(case, batch)
        for by_hand in (False, True):
            plain = copy.deepcopy(module)
            module.zero_grad()
            plain.zero_grad()
            expected = plain(*args, **kwargs)
            _loss(expected).backward()
            if by_hand:
                outputs = _run_by_hand(chain, args, kwargs)
            else:
                outputs = chain(*args, **kwargs)
                _loss(outputs).backward()
            _assert_close(outputs, expected)
            _assert_close(_grads(module), _grads(plain))
            _assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("case", CASES)
def test_export_chain_keeps_tensors_and_names(case: str) -> None:
    module, args, kwargs = _make(case)
    frozen = next(module.parameters()).requires_grad_(False)
    chain = export_chain(module, args, kwargs)
    original = module.state_dict(keep_vars=True)
    state = chain.state_dict(keep_vars=True)
    assert {chain.original_name(key) for key in state} == set(original)
    assert all(tensor is original[chain.original_name(key)] for key, tensor in state.items())
    assert {id(p) for p in chain.parameters()} == {id(p) for p in module.parameters()}

    _loss(chain(*args, **kwargs)).backward()
    assert frozen.grad is None
    for key in ("w.0", "blocks.0.graph", "blocks.0.other.w"):
        with pytest.raises(KeyError, match="allowed"):
            chain.original_name(key)


def test_export_chain_trains_like_module() -> None:
    module, args, kwargs = _make("unet_norm")
    plain = copy.deepcopy(module)
    chain = export_chain(module, args, kwargs)
    ours = torch.optim.AdamW(chain.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(3):
        for model, optimizer in ((chain, ours), (plain, theirs)):
            optimizer.zero_grad()
            _loss(model(*args, **kwargs)).backward()
            optimizer.step()
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_export_chain_dropout_draws_like_module() -> None:
    _, args, kwargs = _make("translator")
    module = Translator(dropout=0.3)
    chain = export_chain(module, args, kwargs)
    torch.manual_seed(1)
    expected = module(*args, **kwargs)
    torch.manual_seed(1)
    _assert_close(chain(*args, **kwargs), expected)


def test_export_chain_written_buffer_has_one_block() -> None:
    module, args, kwargs = _make("normed")
    chain = export_chain(module, args, kwargs)
    for name in ("twice.running_mean", "own.running_mean", "own.num_batches_tracked", "calls"):
        assert sum(key.endswith(f"module.{name}") for key in chain.state_dict()) == 1


def test_export_chain_boundaries_carry_no_glue() -> None:
    module, args, kwargs = _make("translator")
    chain = export_chain(module, args, kwargs)
    inputs = chain.flatten(args, kwargs)
    values: tuple = ()
    for block, indices in zip(chain.blocks, chain.input_indices, strict=True):
        values = block(*values, *(inputs[i] for i in indices))
        if block is not chain.blocks[-1]:
            assert not any(tuple(value.shape) == (4, 4) for value in values)  # the causal mask
            assert not any(value is given for value in values for given in inputs)


def test_export_chain_hugging_face_output() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=20,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    module = transformers.BartForConditionalGeneration(config).eval()
    names = {"decoder_input_ids": _ids(4, 3), "use_cache": False}
    chain = export_chain(module, (), {"input_ids": _ids(4, 5), **names})
    expected = module(source := _ids(4, 5), **names)
    outputs = chain(source, **names)
    assert type(outputs) is type(expected)
    assert outputs.keys() == expected.keys()
    _assert_close(outputs.logits, expected.logits)
    assert {chain.original_name(key) for key in chain.state_dict()} == set(module.state_dict())


def test_export_chain_multiple_outputs_and_autocast() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(6, 8, 2, batch_first=True)
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, _ = self.cells(x)
            with torch.autocast("cpu", torch.bfloat16):
                h = self.layers[0](h)
            return self.layers[1](h.float())

    torch.manual_seed(0)
    module, x = Recurrent(), torch.randn(4, 5, 6)
    chain = export_chain(module, (x,))
    assert len(chain.blocks) == 3
    _assert_close(_run_by_hand(chain, (x,), {}), module(x))


@pytest.mark.parametrize("max_blocks", [1, 2, 3, 5, 100])
def test_export_chain_max_blocks_and_balance(max_blocks: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    args = (torch.randn(4, 8),)
    chains = [export_chain(module, args, max_blocks=max_blocks) for _ in range(2)]
    assert len(chains[0].blocks) == min(max_blocks, 12)
    assert [b.code for b in chains[0].blocks] == [b.code for b in chains[1].blocks]
    counts = [sum(p.numel() for p in block.parameters()) // 72 for block in chains[0].blocks]
    assert sum(counts) == 12
    assert max(counts) - min(counts) <= 1


def test_export_chain_cuts_where_few_bytes_cross() -> None:
    class Bottle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Linear(a, b) for a, b in [(8, 64), (64, 64), (64, 2), (2, 64), (64, 64)]
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    chain = export_chain(Bottle(), (torch.randn(4, 8),), max_blocks=2)
    assert chain.names == ("layers.0..layers.2", "layers.3..layers.4")


def test_export_chain_changed_input_moves_on() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            h = self.layers[0](x)
            y[:, :3].mul_(h[:, :3].detach())
            for layer in self.layers[1:]:
                h = layer(h) + y
            return h

    torch.manual_seed(0)
    module, x, y = Changing(), torch.randn(4, 6), torch.randn(4, 6)
    chain = export_chain(module, (x, y))
    assert len(chain.blocks) >= 2
    assert chain.input_indices[1:] == ((),) * (len(chain.blocks) - 1)
    expected = module(x, y.clone())
    _assert_close(_run_by_hand(chain, (x, y.clone()), {}), expected)


def test_export_chain_no_grad_region_is_glue() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                table = positions.float().cos()
            for layer in self.layers:
                x = layer(x) * table
            return x

    torch.manual_seed(0)
    module, args = Rotary(), (torch.randn(4, 6), torch.arange(6).repeat(4, 1))
    chain = export_chain(module, args)
    assert chain.input_indices == ((0, 1), (1,), (1,))
    _assert_close(_run_by_hand(chain, args, {}), module(*args))


def test_export_chain_accepts_inputs_as_the_signature_does() -> None:
    module, args, kwargs = _make("translator")
    chain = export_chain(module, args)
    expected = module(*args)
    _assert_close(chain(target=args[1], source=args[0]), expected)
    with pytest.raises(PartitionError, match="the sample had no scale"):
        chain(*args, scale=3.0)
    with pytest.raises(PartitionError, match="missing a required argument"):
        chain(args[0])
    with pytest.raises(
        PartitionError, match=r"input 1: given \(None, 3\), captured with \(None, 4\)"
    ):
        chain(args[0], args[1][:, :3])
    chain = export_chain(module, args, kwargs)
    with pytest.raises(PartitionError, match="input 2: given 3.0, captured with 2.0"):
        chain(*args, 3.0)


def test_export_chain_other_mode_is_refused() -> None:
    module, args, kwargs = _make("functional")
    chain = export_chain(module, args, kwargs)
    assert chain.train() is chain
    with pytest.raises(PartitionError, match=r"training=True, which.* call module.train\(False\)"):
        chain.eval()
    module.eval()
    chain = export_chain(module, args, kwargs)
    assert not any(block.training for block in chain.modules())
    with pytest.raises(PartitionError, match=r"training=False, which.* call module.train\(True\)"):
        chain.train()


def test_export_chain_fixed_batch_is_told() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.layer(x[i]) for i in range(x.shape[0])])

    module, x = Fixed(), torch.randn(4, 6)
    chain = export_chain(module, (x,))
    assert not chain.dynamic_batch
    _assert_close(chain(x), module(x))
    with pytest.raises(PartitionError, match=r"given \(2, 6\), captured with \(4, 6\)"):
        chain(x[:2])


def test_export_chain_bad_input_is_told() -> None:
    class DataDependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(
        PartitionError, match="capture DataDependent: .*; name the .*blocks="
    ) as info:
        export_chain(DataDependent(), (torch.randn(4, 6),))
    assert "\n" not in str(info.value)
    with pytest.raises(PartitionError, match="max_blocks: given 0, allowed: at least 1"):
        export_chain(nn.Linear(2, 2), (torch.randn(4, 2),), max_blocks=0)
