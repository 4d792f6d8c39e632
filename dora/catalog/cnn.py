"""Convolutional networks of the catalogue as chains of blocks: ResNet-50 and MobileNetV2.

Both as in torchvision, for images of 224 x 224 and 1000 classes, activations in place. Images are
received as uint8 and normalised by the stem: sent by a camera as float32 they would be four times
as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from dora.catalog.layers import (
    Block,
    Op,
    Pass,
    batch_norm,
    convolution,
    cross_entropy,
    elementwise,
    linear,
)

IMAGE_SIDE = 224
IMAGE_CHANNELS = 3
IMAGE_ELEMENTS = IMAGE_CHANNELS * IMAGE_SIDE**2
# One byte each, which is a quarter of a float32.
IMAGE_BYTES = IMAGE_ELEMENTS
RECEIVED_IMAGE = IMAGE_BYTES // 4
NUM_CLASSES = 1000

# Bottlenecks of each stage and their inner width; the outer one is four times that. He et al.,
# Deep Residual Learning for Image Recognition, 2016, table 1. The stride is in the 3 x 3
# convolution, as torchvision and NVIDIA have it ('v1.5').
_RESNET_50 = ((3, 64), (4, 128), (6, 256), (3, 512))
_EXPANSION = 4

# (expansion, channels, repeats, stride). Sandler et al., MobileNetV2: Inverted Residuals and
# Linear Bottlenecks, 2018, table 2.
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_MOBILENET_LAST = 1280


class _Unit(NamedTuple):
    """Convolution, batch norm and perhaps an activation; `side` is that of the output."""

    channels: tuple[int, int]
    kernel: int
    side: int
    stride: int = 1
    groups: int = 1
    activation: bool = True
    # False for the last one of a block: its result is kept by the block that receives it.
    keeps: bool = True


def resnet_50() -> tuple[Block, ...]:
    """Returns stem, 16 bottlenecks and head."""
    side, width = IMAGE_SIDE // 4, 64
    blocks = [Block("stem", _resnet_stem, RECEIVED_IMAGE, width * side**2)]
    for stage, (repeats, inner) in enumerate(_RESNET_50):
        for i in range(repeats):
            stride = 2 if stage and not i else 1
            ops = partial(_bottleneck, width, inner, side, stride)
            received, side, width = width * side**2, side // stride, inner * _EXPANSION
            blocks.append(Block(f"layer{stage + 1}.{i}", ops, received, width * side**2))
    head = partial(_head, width, side)
    return (*blocks, Block("head", head, width * side**2, NUM_CLASSES))


def mobilenet_v2() -> tuple[Block, ...]:
    """Returns stem, 17 inverted residuals, and head with the last 1 x 1 convolution."""
    side, width = IMAGE_SIDE // 2, 32
    blocks = [Block("stem", _mobilenet_stem, RECEIVED_IMAGE, width * side**2)]
    for expansion, channels, repeats, first_stride in _MOBILENET_V2:
        for i in range(repeats):
            stride = 1 if i else first_stride
            ops = partial(_inverted_residual, (width, channels), expansion, side, stride)
            received, side, width = width * side**2, side // stride, channels
            blocks.append(Block(f"features.{len(blocks)}", ops, received, width * side**2))
    head = partial(_mobilenet_head, width, side)
    return (*blocks, Block("head", head, width * side**2, NUM_CLASSES))


def normalise(given: Pass) -> Op:
    """Returns uint8 to float, minus mean, over deviation; the result is kept for the backward."""
    images = IMAGE_ELEMENTS * given.samples
    return elementwise(images, kernels=3, saved=images)


def _unit(unit: _Unit, given: Pass) -> list[Op]:
    elements = unit.channels[1] * unit.side**2 * given.samples
    ops = [
        convolution(
            given.samples,
            unit.channels,
            unit.kernel,
            unit.side,
            stride=unit.stride,
            groups=unit.groups,
        ),
        batch_norm(elements, unit.channels[1], given.training),
    ]
    if unit.activation:
        # Its result is kept, not its input: it is written over that.
        ops.append(elementwise(elements, saved=elements * unit.keeps))
    return ops


def _units(units: Sequence[_Unit], given: Pass) -> list[Op]:
    return [op for unit in units for op in _unit(unit, given)]


def _bottleneck(width: int, inner: int, side: int, stride: int, given: Pass) -> list[Op]:
    outer, out_side = inner * _EXPANSION, side // stride
    units = [
        _Unit((width, inner), 1, side),
        _Unit((inner, inner), 3, out_side, stride),
        _Unit((inner, outer), 1, out_side, activation=False),
    ]
    if width != outer:
        units.append(_Unit((width, outer), 1, out_side, stride, activation=False))
    out = outer * out_side**2 * given.samples
    return [*_units(units, given), elementwise(out, inputs=2), elementwise(out)]


def _inverted_residual(
    channels: tuple[int, int], expansion: int, side: int, stride: int, given: Pass
) -> list[Op]:
    width, out_width = channels
    inner, out_side = width * expansion, side // stride
    expand = [_Unit((width, inner), 1, side)] if expansion > 1 else []
    units = [
        *expand,
        _Unit((inner, inner), 3, out_side, stride, groups=inner),
        _Unit((inner, out_width), 1, out_side, activation=False),
    ]
    out = out_width * out_side**2 * given.samples
    has_shortcut = stride == 1 and width == out_width
    return [*_units(units, given), *[elementwise(out, inputs=2)] * has_shortcut]


def _resnet_stem(given: Pass) -> list[Op]:
    side, pooled = IMAGE_SIDE // 2, 64 * (IMAGE_SIDE // 4) ** 2 * given.samples
    # The pool keeps the place of each maximum, an int64.
    pool = Op(read=64 * side**2 * given.samples, written=pooled, saved=2 * pooled)
    conv = _Unit((IMAGE_CHANNELS, 64), 7, side, 2)
    return [normalise(given), *_unit(conv, given), pool]


def _mobilenet_stem(given: Pass) -> list[Op]:
    conv = _Unit((IMAGE_CHANNELS, 32), 3, IMAGE_SIDE // 2, 2, keeps=False)
    return [normalise(given), *_unit(conv, given)]


def _mobilenet_head(width: int, side: int, given: Pass) -> list[Op]:
    conv = _Unit((width, _MOBILENET_LAST), 1, side)
    dropout = elementwise(_MOBILENET_LAST * given.samples)
    head = _head(_MOBILENET_LAST, side, given)
    return [*_unit(conv, given), *[dropout] * given.training, *head]


def _head(width: int, side: int, given: Pass) -> list[Op]:
    """Returns global pooling, classifier and, in training, the loss."""
    pooled = width * given.samples
    return [
        Op(read=pooled * side**2, written=pooled),
        linear(given.samples, width, NUM_CLASSES),
        *[cross_entropy(given.samples, NUM_CLASSES)] * given.training,
    ]
