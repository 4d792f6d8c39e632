"""Counts what the layers of a neural network cost, from their shapes alone.

An `Op` is what one layer does in one forward pass; `profile_block` adds up those of a block. What
is counted, and how:

- flops: multiply-adds of convolutions, linear layers and attention, times two. Elementwise work
  counts as none, as in `torch.utils.flop_counter`: it is bound by memory, which `traffic_bytes`
  has.
- traffic_bytes: inputs, outputs and weights of every operation, as if nothing stayed in a cache
  between two of them.
- num_ops: kernels that eager PyTorch launches; views are none.
- activation_bytes: training: the received input and what autograd saves of each layer; a tensor
  that several layers save counts once, and the block's output counts for the block that receives
  it. Inference: the received input and the largest kernel's inputs and outputs. Generation:
  keys and values that stay in the cache.

Attention is a fused kernel (`scaled_dot_product_attention`): its score matrix costs FLOPs, but is
neither kept nor moved. Where PyTorch has no fused kernel for a dtype and mask it costs memory too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, NamedTuple

from dora.spec import BlockCost, BlockProfile

Kind = Literal["train", "infer", "generate"]

# Of the types that the catalogue's models have.
WIDTH_BYTES = {"float32": 4, "bfloat16": 2}


class Pass(NamedTuple):
    """One forward pass over so many samples."""

    kind: Kind
    samples: int

    @property
    def training(self) -> bool:
        """Whether a backward pass follows."""
        return self.kind == "train"


class Op(NamedTuple):
    """One layer in one forward pass; all but flops and kernels count elements.

    Attributes:
        read, written: Of activations.
        params: Weights, read once per pass whatever the number of samples.
        is_lookup: Reads only as many weights as it writes elements.
        saved: Kept for the backward pass, beyond what the other layers of the block keep.
        cached: Kept for the tokens that follow.
        kernels: Launched in eager mode.
    """

    flops: float = 0
    read: float = 0
    written: float = 0
    params: int = 0
    is_lookup: bool = False
    saved: float = 0
    cached: float = 0
    kernels: int = 1

    @property
    def moved(self) -> float:
        """Elements that it moves between memory and processor."""
        return self.read + self.written + (self.written if self.is_lookup else self.params)


class Block(NamedTuple):
    """A block of a model: its layers for a given pass, and what it receives and sends.

    Attributes:
        received, sent: Elements of the model's type per sample.
        sent_width_bytes: Of an element that is sent, if it is not of the model's type.
    """

    name: str
    ops: Callable[[Pass], Sequence[Op]]
    received: int
    sent: int
    sent_width_bytes: int | None = None


def linear(rows: int, n_in: int, n_out: int, *, bias: bool = True, saves: bool = True) -> Op:
    """Returns a linear layer; `saves` is False if its input is kept already."""
    return Op(
        flops=2 * rows * n_in * n_out,
        read=rows * n_in,
        written=rows * n_out,
        params=n_in * n_out + bias * n_out,
        saved=rows * n_in * saves,
    )


def elementwise(elements: float, *, inputs: int = 1, saved: float = 0, kernels: int = 1) -> Op:
    """Returns an activation or sum of `inputs` tensors, each kernel passing over them once."""
    return Op(
        read=elements * inputs * kernels,
        written=elements * kernels,
        saved=saved,
        kernels=kernels,
    )


def layer_norm(rows: int, width: int, *, saves: bool = True) -> Op:
    """Returns a layer norm, which keeps its input (if `saves`) and two statistics of each row."""
    elements = rows * width
    saved = elements * saves + 2 * rows
    return Op(read=elements, written=elements, params=2 * width, saved=saved)


def lookup(rows: int, num_rows: int, width: int) -> Op:
    """Returns an embedding of `num_rows` rows of which `rows` are read."""
    return Op(written=rows * width, params=num_rows * width, is_lookup=True)


def attention(sequences: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Op:
    """Returns fused attention of each sequence to itself; half-empty causal masks cost the same.

    It keeps queries, keys, values, its output and one statistic per head and token. The output
    is also the input of the projection that follows, which therefore must not save it again.
    """
    rows = sequences * tokens
    queries, keys = rows * heads * head_dim, rows * kv_heads * head_dim
    return Op(
        flops=4 * sequences * tokens**2 * heads * head_dim,
        read=queries + 2 * keys,
        written=queries,
        saved=2 * queries + 2 * keys + rows * heads,
        cached=2 * keys,
    )


def cross_entropy(rows: int, num_classes: int) -> Op:
    """Returns the loss: log-softmax, whose result is kept, and the choice of one class."""
    logits = rows * num_classes
    return Op(read=logits + rows, written=logits, saved=logits, kernels=2)


def convolution(
    images: int,
    channels: tuple[int, int],
    kernel: int,
    out_side: int,
    *,
    stride: int = 1,
    groups: int = 1,
) -> Op:
    """Returns a square convolution without bias, from and to so many channels.

    It keeps nothing here: its input is the output of an activation, which keeps that, or what
    the block received.
    """
    n_in, n_out = channels
    params = kernel**2 * n_in // groups * n_out
    positions = images * out_side**2
    return Op(
        flops=2 * params * positions,
        read=positions * stride**2 * n_in,
        written=positions * n_out,
        params=params,
    )


def batch_norm(elements: int, channels: int, training: bool) -> Op:
    """Returns a batch norm, which keeps its input; in training it also counts its batches."""
    return Op(
        read=elements,
        written=elements,
        params=2 * channels,
        saved=elements,
        kernels=1 + training,
    )


def profile_block(block: Block, kind: Kind, sizes: Sequence[int], dtype: str) -> BlockProfile:
    """Returns the block with one cost row, without times, per micro-batch size."""
    width = WIDTH_BYTES[dtype]
    num_params = sum(op.params for op in block.ops(Pass(kind, 1)))
    return BlockProfile(
        name=block.name,
        num_params=num_params,
        param_bytes=num_params * width,
        trainable_bytes=num_params * width,
        costs=tuple(_cost(block, Pass(kind, size), width) for size in sizes),
    )


def _cost(block: Block, given: Pass, width_bytes: int) -> BlockCost:
    ops = block.ops(given)
    sent_bytes = prod((block.sent, given.samples, block.sent_width_bytes or width_bytes))
    return BlockCost(
        microbatch_size=given.samples,
        flops=sum(op.flops for op in ops),
        traffic_bytes=round(sum(op.moved for op in ops) * width_bytes),
        num_ops=sum(op.kernels for op in ops),
        activation_bytes=round(_kept(block, ops, given) * width_bytes),
        output_bytes=sent_bytes,
    )


def _kept(block: Block, ops: Sequence[Op], given: Pass) -> float:
    if given.kind == "generate":
        return sum(op.cached for op in ops)
    received = block.received * given.samples
    if given.training:
        return received + sum(op.saved for op in ops)
    return received + max((op.read + op.written) / op.kernels for op in ops)
