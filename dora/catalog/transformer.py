"""Transformers of the catalogue as chains of blocks: BERT, ViT and Qwen3.

Layer by layer as in Hugging Face transformers with fused attention. Only hidden states cross a
boundary; each stage works out masks and positions by itself. Token ids are received as int32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from dora.catalog.cnn import IMAGE_CHANNELS, IMAGE_SIDE, NUM_CLASSES, RECEIVED_IMAGE, normalise
from dora.catalog.layers import (
    Block,
    Op,
    Pass,
    attention,
    cross_entropy,
    elementwise,
    layer_norm,
    linear,
    lookup,
)

TOKEN_BYTES = 4


class Transformer(NamedTuple):
    """Shape of a transformer.

    Attributes:
        tokens: Of one sample, except for 'generate', where a sample is a token.
        intermediate: Width inside the feed-forward layers.
    """

    tokens: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 0

    def rows(self, given: Pass) -> int:
        """Returns the tokens of a pass."""
        return self.sequences(given) * self.tokens_each(given)

    def sequences(self, given: Pass) -> int:
        """Returns the sequences of a pass; generation runs one at a time."""
        return 1 if given.kind == "generate" else given.samples

    def tokens_each(self, given: Pass) -> int:
        """Returns the tokens of each of them."""
        return given.samples if given.kind == "generate" else self.tokens


# Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, 2019 (base, uncased).
BERT_BASE = Transformer(128, 768, 12, 12, 12, 64, 3072, vocab=30522)
_BERT_POSITIONS, _BERT_SEGMENTS, _BERT_LABELS = 512, 2, 2

# Dosovitskiy et al., An Image is Worth 16x16 Words, 2021 (base); one token is the class.
_PATCH = 16
VIT_BASE = Transformer(1 + (IMAGE_SIDE // _PATCH) ** 2, 768, 12, 12, 12, 64, 3072)

# config.json of Qwen/Qwen3-*. Sequences of 256 tokens, short as fine-tuning on a device is: at
# 256 the logits of one sequence are already 156 MB.
QWEN3 = {
    "qwen3-0.6b": Transformer(256, 1024, 28, 16, 8, 128, 3072, vocab=151936),
    "qwen3-1.7b": Transformer(256, 2048, 28, 16, 8, 128, 6144, vocab=151936),
    "qwen3-4b": Transformer(256, 2560, 36, 32, 8, 128, 9728, vocab=151936),
}


def bert(shape: Transformer) -> tuple[Block, ...]:
    """Returns embedding, layers, and a pooler with a classifier of two labels."""
    width = shape.hidden * shape.tokens
    return (
        Block("embeddings", partial(_bert_embeddings, shape), shape.tokens, width),
        *(_layers(shape, _bert_layer, width)),
        Block("classifier", partial(_bert_head, shape), width, _BERT_LABELS),
    )


def vit(shape: Transformer) -> tuple[Block, ...]:
    """Returns patch embedding, layers, and a classifier of 1000 labels on the first token."""
    width = shape.hidden * shape.tokens
    return (
        Block("embeddings", partial(_vit_embeddings, shape), RECEIVED_IMAGE, width),
        *(_layers(shape, _vit_layer, width)),
        Block("classifier", partial(_vit_head, shape), width, NUM_CLASSES),
    )


def qwen3(shape: Transformer, *, generate: bool) -> tuple[Block, ...]:
    """Returns embedding, layers, and a head that shares the embedding's weights.

    To generate, the head makes logits of the last token of a pass and sends token ids; else it
    makes those of all tokens.
    """
    tokens = 1 if generate else shape.tokens
    width = shape.hidden * tokens
    sent = (1, TOKEN_BYTES) if generate else (shape.vocab * tokens, None)
    return (
        Block("embed_tokens", partial(_qwen_embeddings, shape), tokens, width),
        *(_layers(shape, _qwen_layer, width)),
        Block("lm_head", partial(_qwen_head, shape), width, *sent),
    )


def _layers(
    shape: Transformer, ops: Callable[[Transformer, Pass], Sequence[Op]], width: int
) -> list[Block]:
    return [Block(f"layers.{i}", partial(ops, shape), width, width) for i in range(shape.layers)]


def _bert_embeddings(shape: Transformer, given: Pass) -> list[Op]:
    rows, width = shape.rows(given), shape.hidden
    return [
        lookup(rows, shape.vocab, width),
        lookup(rows, _BERT_POSITIONS, width),
        lookup(rows, _BERT_SEGMENTS, width),
        *[elementwise(rows * width, inputs=2)] * 2,
        layer_norm(rows, width),
        *_dropout(rows * width, given),
    ]


def _bert_layer(shape: Transformer, given: Pass) -> list[Op]:
    rows, width = shape.rows(given), shape.hidden
    end = [
        *_dropout(rows * width, given),
        elementwise(rows * width, inputs=2),
        layer_norm(rows, width),
    ]
    return [*_attend(shape, given, saves_input=False), *end, *_feed_forward(shape, given), *end]


def _bert_head(shape: Transformer, given: Pass) -> list[Op]:
    n, width = given.samples, shape.hidden
    return [
        linear(n, width, width, saves=False),
        elementwise(n * width, saved=n * width),
        *_dropout(n * width, given),
        linear(n, width, _BERT_LABELS),
        *[cross_entropy(n, _BERT_LABELS)] * given.training,
    ]


def _vit_embeddings(shape: Transformer, given: Pass) -> list[Op]:
    rows, width = shape.rows(given), shape.hidden
    # A convolution whose stride is its size is a linear layer of each patch, pixels in full.
    patches, pixels = rows - given.samples, IMAGE_CHANNELS * _PATCH**2
    return [
        normalise(given),
        linear(patches, pixels, width, saves=False),
        elementwise(rows * width)._replace(params=width),
        elementwise(rows * width)._replace(params=shape.tokens * width),
    ]


def _vit_layer(shape: Transformer, given: Pass) -> list[Op]:
    rows, width = shape.rows(given), shape.hidden
    add = elementwise(rows * width, inputs=2)
    return [
        layer_norm(rows, width, saves=False),
        *_attend(shape, given, saves_input=True),
        add,
        layer_norm(rows, width),
        *_feed_forward(shape, given),
        add,
    ]


def _vit_head(shape: Transformer, given: Pass) -> list[Op]:
    rows, width = shape.rows(given), shape.hidden
    return [
        layer_norm(rows, width, saves=False),
        # What it reads is a slice, but the whole of it stays in memory.
        linear(given.samples, width, NUM_CLASSES)._replace(saved=rows * width),
        *[cross_entropy(given.samples, NUM_CLASSES)] * given.training,
    ]


def _qwen_embeddings(shape: Transformer, given: Pass) -> list[Op]:
    # Cosine and sine of the positions, once for all layers and sequences.
    positions = elementwise(shape.tokens_each(given) * shape.head_dim, kernels=8)
    return [lookup(shape.rows(given), shape.vocab, shape.hidden), positions]


def _qwen_layer(shape: Transformer, given: Pass) -> list[Op]:
    rows, width = shape.rows(given), shape.hidden
    queries, keys = rows * shape.heads, rows * shape.kv_heads
    add = elementwise(rows * width, inputs=2)
    append = elementwise(keys * shape.head_dim)
    return [
        _rms_norm(rows, width, given, saves=False),
        *_attend(shape, given, bias=False, saves_input=True),
        _rms_norm(queries, shape.head_dim, given),
        _rms_norm(keys, shape.head_dim, given),
        _rotate(queries * shape.head_dim),
        _rotate(keys * shape.head_dim),
        *[append] * (2 * (given.kind == "generate")),
        add,
        _rms_norm(rows, width, given),
        *_gated_feed_forward(shape, given),
        add,
    ]


def _qwen_head(shape: Transformer, given: Pass) -> list[Op]:
    rows = shape.rows(given)
    predicted = 1 if given.kind == "generate" else rows
    choose = Op(read=shape.vocab)
    return [
        _rms_norm(rows, shape.hidden, given, saves=False),
        linear(predicted, shape.hidden, shape.vocab, bias=False),
        *[choose] * (given.kind == "generate"),
        *[cross_entropy(rows, shape.vocab)] * given.training,
    ]


def _attend(shape: Transformer, given: Pass, *, saves_input: bool, bias: bool = True) -> list[Op]:
    """Returns the three projections, attention, and the projection of its result."""
    rows, queries = shape.rows(given), shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    return [
        linear(rows, shape.hidden, queries, bias=bias, saves=saves_input),
        *[linear(rows, shape.hidden, keys, bias=bias, saves=False)] * 2,
        attention(
            shape.sequences(given),
            shape.tokens_each(given),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
        ),
        linear(rows, queries, shape.hidden, bias=bias, saves=False),
    ]


def _feed_forward(shape: Transformer, given: Pass) -> list[Op]:
    rows, inner = shape.rows(given), shape.intermediate
    return [
        linear(rows, shape.hidden, inner),
        elementwise(rows * inner, saved=rows * inner),
        linear(rows, inner, shape.hidden),
    ]


def _gated_feed_forward(shape: Transformer, given: Pass) -> list[Op]:
    rows, inner = shape.rows(given), shape.intermediate
    return [
        linear(rows, shape.hidden, inner, bias=False),
        linear(rows, shape.hidden, inner, bias=False, saves=False),
        elementwise(rows * inner, saved=rows * inner),
        elementwise(rows * inner, inputs=2, saved=2 * rows * inner),
        linear(rows, inner, shape.hidden, bias=False),
    ]


def _dropout(elements: int, given: Pass) -> list[Op]:
    """Returns a dropout, which keeps a mask of one byte per element; nothing in inference."""
    return [elementwise(elements, saved=elements / 4)] * given.training


def _rms_norm(rows: int, width: int, given: Pass, *, saves: bool = True) -> Op:
    """Returns an RMS norm as eager code writes it out: power, mean, sum, root, two products.

    Inference is in bfloat16 and adds a conversion to float32 and one back. It keeps its input
    (if `saves`) and the normalised rows.
    """
    elements, casts = rows * width, 0 if given.training else 2
    return Op(
        read=(4 + casts) * elements,
        written=(3 + casts) * elements,
        params=width,
        saved=elements * (1 + saves) + rows,
        kernels=6 + casts,
    )


def _rotate(elements: int) -> Op:
    """Returns a rotary embedding: negation of one half, concatenation, two products, a sum."""
    return Op(read=5.5 * elements, written=4.5 * elements, kernels=5)
