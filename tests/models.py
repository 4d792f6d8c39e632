"""Small models of every kind that Dora must cut, each with a batch of inputs and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


@dataclass
class Case:
    """A model, a batch for it, and a loss."""

    module: nn.Module
    inputs: Any
    targets: Any = None
    loss_fn: Callable[..., torch.Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x))) + x


class Cnn(nn.Module):
    """Like torchvision's ResNet: stem, layers of blocks, pooled head."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = norm(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.layer2(self.layer1(x))
        return self.head(torch.flatten(self.pool(x), 1))


class PatchTransformer(nn.Module):
    """A ViT whose class token and positions are parameters of the root, used by glue code."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True) for _ in range(3)
        )
        self.dropout = dropout
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x += self.positions
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Pair(nn.Module):
    """A block that takes and returns a nested structure."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        a, (b, count) = state["a"], state["rest"]
        return {"a": torch.tanh(self.left(a)) + b, "rest": (self.right(b), count + 1)}


class Nested(nn.Module):
    """Passes dictionaries of tuples, an integer tensor among them, from block to block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair(6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = {"a": x, "rest": (x * 2, torch.zeros(x.shape[0], dtype=torch.long))}
        for layer in self.layers:
            state = layer(state)
        return self.head(state["a"]) + state["rest"][1].unsqueeze(1)


class TiedLM(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self, vocabulary: int = 31, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True) for _ in range(3)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask)
        return self.head(self.norm(x))


def _lm_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _class_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(getattr(output, "logits", output), targets)


def _images(module: nn.Module, batch: int, **options: Any) -> Case:
    return Case(
        module, torch.randn(batch, 3, 32, 32), torch.randint(0, 5, (batch,)), _class_loss, options
    )


def _tokens(module: nn.Module, batch: int, vocabulary: int, **keywords: Any) -> Case:
    tokens = torch.randint(0, vocabulary, (batch, 10))
    mask = torch.ones(batch, 10, dtype=torch.long)
    mask[1::2, 7:] = 0
    return Case(
        module,
        {"input_ids": tokens, "attention_mask": mask, **keywords},
        torch.randint(0, vocabulary, (batch, 10)),
        _lm_loss,
    )


def _tied(batch: int, dropout: float) -> Case:
    mask = torch.zeros(batch, 10, dtype=torch.bool)
    mask[::2, 8:] = True
    tokens = torch.randint(0, 31, (batch, 10))
    return Case(TiedLM(dropout=dropout), {"tokens": tokens, "mask": mask}, tokens, _lm_loss)


def _bert(batch: int, dropout: float) -> Case:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        num_labels=5,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    case = _tokens(BertForSequenceClassification(config), batch, 50)
    return Case(case.module, case.inputs, torch.randint(0, 5, (batch,)), _class_loss)


def _vit(batch: int) -> Case:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _images(ViTForImageClassification(config), batch)


def _gpt2(batch: int, dropout: float) -> Case:
    config = GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=2,
        vocab_size=50,
        n_positions=32,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
    )
    return _tokens(GPT2LMHeadModel(config), batch, 50)


def _qwen3(batch: int) -> Case:
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        vocab_size=50,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return _tokens(Qwen3ForCausalLM(config), batch, 50)


def _encoder(batch: int) -> Case:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    return Case(
        nn.TransformerEncoder(layer, 4),
        torch.randn(batch, 7, 16),
        torch.randn(batch, 7, 16),
        F.mse_loss,
    )


def _mlp(batch: int) -> Case:
    layers: list[nn.Module] = [nn.Linear(6, 12)]
    for _ in range(4):
        layers += [nn.ReLU(inplace=True), nn.Linear(12, 12)]
    return Case(
        nn.Sequential(*layers), torch.randn(batch, 6), torch.randint(0, 12, (batch,)), _class_loss
    )


CASES: dict[str, Callable[[int], Case]] = {
    "mlp": _mlp,
    "cnn": lambda batch: _images(Cnn(), batch),
    "patches": lambda batch: _images(PatchTransformer(), batch),
    "patches_dropout": lambda batch: _images(PatchTransformer(0.3), batch),
    "nested": lambda batch: Case(
        Nested(), torch.randn(batch, 6), torch.randint(0, 3, (batch,)), _class_loss
    ),
    "tied": lambda batch: _tied(batch, 0.0),
    "tied_dropout": lambda batch: _tied(batch, 0.3),
    "encoder": _encoder,
    "bert": lambda batch: _bert(batch, 0.0),
    "bert_dropout": lambda batch: _bert(batch, 0.2),
    "vit": _vit,
    "gpt2": lambda batch: _gpt2(batch, 0.0),
    "gpt2_dropout": lambda batch: _gpt2(batch, 0.2),
    "qwen3": _qwen3,
}


def make(name: str, batch: int = 8, seed: int = 0) -> Case:
    """Builds a case; the same seed gives the same weights and data on every rank."""
    torch.manual_seed(seed)
    return CASES[name](batch)
