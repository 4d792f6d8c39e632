"""Profiles of well-known models, counted from their configuration: no torch and no weights.

::

    profile = model_profile("qwen3-0.6b", kind="generate", microbatch_sizes=(1, 128))
    profile = scale_to_cluster(profile, cluster, training=False)

| name | sample | head | parameters |
|---|---|---|---|
| mobilenet-v2 | image of 224 x 224 | 1000 classes | 3.5 M |
| resnet-50 | image of 224 x 224 | 1000 classes | 25.6 M |
| vit-base | image of 224 x 224, patches of 16 | 1000 classes | 86.6 M |
| bert-base | 128 tokens | classification of a sequence, 2 labels | 109.5 M |
| qwen3-0.6b, -1.7b, -4b | 256 tokens; to generate, 1 | next token | 0.60, 1.72, 4.02 B |

Images arrive as uint8 (150,528 bytes), tokens as int32. layers.py tells how operations are counted.
There are no times: `scale_to_cluster` adds them. Qwen3's head shares its matrix with the embedding
(`tied`).

**Types.** Everything is float32, except that Qwen3 infers and generates in bfloat16, the type
of its published weights. That halves its bytes, and only its bytes: a `Device` has one rate of
arithmetic, for fp32, so half-precision tensor cores (2 to 8 times that rate, see devices.csv) are
not credited. A pass over many tokens comes out too slow on devices that have them; a pass over
one token, which memory bounds, does not.

**Generation.** A row of size n is a pass over n tokens of one sequence whose cache is empty before.
Reading the cache of earlier tokens is not in it: it takes the time of reading their
`activation_bytes`. The head makes logits of the last token only, whatever n.

**Eager mode.** Qwen3 launches 1,600 to 2,000 kernels a pass, each at the device's `dispatch_s`:
0.3 to 0.4 s on a Jetson AGX Orin, even for one token. Runtimes that fuse kernels or replay graphs
are several times faster there; a profile measured with one replaces this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from dora.catalog import cnn, tables, transformer
from dora.catalog.layers import Block, Kind, profile_block
from dora.errors import SpecError
from dora.spec import BlockProfile, ModelProfile, TiedParameter


class _Model(NamedTuple):
    """How to build one model, and what one sample of its input is in bytes."""

    blocks: Callable[[Kind], tuple[Block, ...]]
    input_bytes: int
    is_language_model: bool = False


def _qwen(shape: transformer.Transformer, kind: Kind) -> tuple[Block, ...]:
    return transformer.qwen3(shape, generate=kind == "generate")


_MODELS = {
    "mobilenet-v2": _Model(lambda _: cnn.mobilenet_v2(), cnn.IMAGE_BYTES),
    "resnet-50": _Model(lambda _: cnn.resnet_50(), cnn.IMAGE_BYTES),
    "bert-base": _Model(
        lambda _: transformer.bert(transformer.BERT_BASE),
        transformer.BERT_BASE.tokens * transformer.TOKEN_BYTES,
    ),
    "vit-base": _Model(lambda _: transformer.vit(transformer.VIT_BASE), cnn.IMAGE_BYTES),
    **{
        name: _Model(partial(_qwen, shape), shape.tokens * transformer.TOKEN_BYTES, True)
        for name, shape in transformer.QWEN3.items()
    },
}


def model_names() -> tuple[str, ...]:
    """Returns the names that `model_profile` knows."""
    return tuple(_MODELS)


def model_profile(
    name: str, *, kind: Kind = "train", microbatch_sizes: Sequence[int] = (1, 2, 4, 8)
) -> ModelProfile:
    """Returns what the model costs per block and micro-batch size, without times.

    Args:
        name: One of `model_names()`.
        kind: As in `Workload`; 'generate' is for the language models only.
        microbatch_sizes: Samples of the cost rows; for 'generate' tokens, such as (1, 128).

    Raises:
        SpecError: Unknown name, a kind that the model does not have, or a size below one.
    """
    if name not in _MODELS:
        raise SpecError(f"model: given {name!r}, {tables.closest(name, _MODELS)}")
    model = _MODELS[name]
    kinds = ("train", "infer", "generate") if model.is_language_model else ("train", "infer")
    if kind not in kinds:
        raise SpecError(f"kind: given {kind!r}, allowed for {name}: {', '.join(kinds)}")
    sizes = sorted(set(microbatch_sizes))
    if not sizes or sizes[0] < 1:
        raise SpecError(f"microbatch_sizes: given {tuple(sizes)}, allowed: counts of at least 1")
    dtype = "bfloat16" if model.is_language_model and kind != "train" else "float32"
    blocks = tuple(profile_block(block, kind, sizes, dtype) for block in model.blocks(kind))
    return ModelProfile(
        name=name,
        blocks=blocks,
        tied=_tied(blocks) if model.is_language_model else (),
        input_bytes=transformer.TOKEN_BYTES if kind == "generate" else model.input_bytes,
        dtype=dtype,
    )


def _tied(blocks: Sequence[BlockProfile]) -> tuple[TiedParameter, ...]:
    """Returns the embedding, which is also the matrix of the last block."""
    shared = TiedParameter(
        name="embed_tokens.weight",
        blocks=(0, len(blocks) - 1),
        param_bytes=blocks[0].param_bytes,
    )
    return (shared,)
