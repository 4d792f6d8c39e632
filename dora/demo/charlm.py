"""A small GPT-style character model and its text: the modules of Python's standard library.

Real text that every machine with Python has, so nothing is downloaded. Tensor names carry their
shape: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

# Printable ASCII and newline; everything else is read as '?'.
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))


class Layer(nn.Module):
    """Causal self-attention and an MLP, each with a norm before and a residual around."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states after this layer."""
        heads = self.qkv(self.norm1(x_BTD)).chunk(3, dim=-1)
        q, k, v = (h.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for h in heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.merge(attended.transpose(1, 2).flatten(2))
        out: torch.Tensor = x_BTD + self.mlp(self.norm2(x_BTD))
        return out


class CharLM(nn.Module):
    """Predicts the next character; nothing in it knows of Dora."""

    def __init__(
        self, *, width: int = 128, num_layers: int = 6, num_heads: int = 4, context: int = 96
    ) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET), bias=False)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text_BT: torch.Tensor) -> torch.Tensor:
        """Returns the scores of the next character, (B, T, V)."""
        x_BTD = self.characters(text_BT)
        x_BTD = x_BTD + self.positions(torch.arange(text_BT.shape[1], device=text_BT.device))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        scores_BTV: torch.Tensor = self.head(self.norm(x_BTD))
        return scores_BTV


def next_char_loss(scores_BTV: torch.Tensor, next_BT: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross entropy in nats per character; its exponential is the perplexity."""
    return F.cross_entropy(scores_BTV.flatten(0, 1), next_BT.flatten())


class Text(NamedTuple):
    """Encoded characters, split by file: no held-out module is seen in training."""

    train: torch.Tensor
    held_out: torch.Tensor
    num_files: int


def stdlib_text(max_chars: int = 4_000_000) -> Text:
    """Reads the modules of the running Python's standard library; every tenth is held out."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train: list[str] = []
    held_out: list[str] = []
    read = 0
    for i, path in enumerate(paths):
        if read >= max_chars:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        read += len(text)
        (held_out if i % 10 == 9 else train).append(text)
    return Text(encode("".join(train)), encode("".join(held_out)), len(train) + len(held_out))


def encode(text: str) -> torch.Tensor:
    """Returns the index of every character in ALPHABET."""
    codes = torch.tensor(list(text.encode("ascii", errors="replace")), dtype=torch.long)
    table = torch.full((128,), ALPHABET.index("?"))
    table[[ord(char) for char in ALPHABET]] = torch.arange(len(ALPHABET))
    return table[codes]


def decode(codes: torch.Tensor) -> str:
    """Inverse of `encode`."""
    return "".join(ALPHABET[code] for code in codes.tolist())


def batches(
    codes: torch.Tensor, *, num_batches: int, batch_size: int, context: int, seed: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (text, the same text one character later); equal on every rank with equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        starts = torch.randint(len(codes) - context - 1, (batch_size,), generator=generator)
        window = codes[starts[:, None] + torch.arange(context + 1)]
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()
