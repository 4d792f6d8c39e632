"""The Triton kernels: what one program does to whole tiles, each byte read and written once.

Only the last program of a tensor masks what it loads; all others use whole vectors. Offsets of
tiles are 64-bit, those within a program 32-bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# The parameters of Triton functions are pointers and blocks, for which there are no types.

from __future__ import annotations

import triton
import triton.language as tl

from dora.kernels.format import TILE
from dora.kernels.triton_blocks import (
    block,
    decode,
    encode,
    load,
    multiplied,
    read,
    store,
    tile_bytes,
)

_TILE = tl.constexpr(TILE)


@triton.jit
def _quantize_tiles(
    x, wire, flag, error, factors, inverses, numel, num_channels, first_index, seed, first_tile,
    KIND: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr, TILES: tl.constexpr, IN_STEP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    vector: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # 16 bytes
    start = first_tile * _TILE
    left = tl.minimum(numel - start, TILES * _TILE).to(tl.int32)
    channel = 0
    if factors is not None:
        channel = ((first_index + start) % num_channels).to(tl.int32)
    if error is not None:
        error += start
    groups, at = block(KIND, GROUP, TILES)
    exact_low, low = read(
        x + start, error, inverses, groups, at, left, channel, num_channels, GROUP, IN_STEP, FULL
    )
    exact_high, high = exact_low, low
    if KIND == "int4":
        exact_high, high = read(
            x + start, error, inverses, groups, at + GROUP // 2, left, channel, num_channels,
            GROUP, IN_STEP, FULL,
        )  # fmt: skip
    low, high = encode(
        wire + first_tile * tile_bytes(KIND, GROUP), flag, low, high,
        (first_index + start).to(tl.uint32), seed, groups, tl.cdiv(left, GROUP),
        KIND, GROUP, QMAX, STOCHASTIC, NATIVE, FULL, vector,
    )  # fmt: skip
    if error is not None:
        low = multiplied(low, factors, groups, at, channel, num_channels, GROUP, IN_STEP)
        store(error, at, left, exact_low - low, FULL)
        if KIND == "int4":
            at += GROUP // 2
            high = multiplied(high, factors, groups, at, channel, num_channels, GROUP, IN_STEP)
            store(error, at, left, exact_high - high, FULL)


@triton.jit(do_not_specialize=["numel", "num_channels", "first_index", "seed"])
def quantize(
    x, wire, flag, error, factors, inverses, numel, num_channels, first_index, seed,
    KIND: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr, IN_STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Encodes one tensor."""
    first_tile = tl.program_id(0).to(tl.int64) * TILES
    if (first_tile + TILES) * _TILE <= numel:
        _quantize_tiles(
            x, wire, flag, error, factors, inverses, numel, num_channels, first_index, seed,
            first_tile, KIND, GROUP, QMAX, STOCHASTIC, NATIVE, TILES, IN_STEP, True,
        )  # fmt: skip
    else:
        _quantize_tiles(
            x, wire, flag, error, factors, inverses, numel, num_channels, first_index, seed,
            first_tile, KIND, GROUP, QMAX, STOCHASTIC, NATIVE, TILES, IN_STEP, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def quantize_many(
    table, tensor_of, wire, flags, seed, X_TYPE: tl.constexpr, HAS_ERROR: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr, IS_ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Encodes the tensor of each program; rows of `table` are as `_table` makes them."""
    tensor = tl.load(tensor_of + tl.program_id(0))
    row = table + tensor * 6
    x = tl.load(row).to(tl.pointer_type(X_TYPE))
    error = None
    if HAS_ERROR:
        error = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    if IS_ALIGNED:
        x = tl.multiple_of(x, 16)
        if HAS_ERROR:
            error = tl.multiple_of(error, 16)
    numel = tl.load(row + 2)
    part = wire + tl.load(row + 3) * 64
    first_index = tl.load(row + 4)
    first_tile = (tl.program_id(0) - tl.load(row + 5)) * TILES
    if (first_tile + TILES) * _TILE <= numel:
        _quantize_tiles(
            x, part, flags + tensor, error, None, None, numel, 1, first_index, seed, first_tile,
            KIND, GROUP, QMAX, STOCHASTIC, NATIVE, TILES, False, True,
        )  # fmt: skip
    else:
        _quantize_tiles(
            x, part, flags + tensor, error, None, None, numel, 1, first_index, seed, first_tile,
            KIND, GROUP, QMAX, STOCHASTIC, NATIVE, TILES, False, False,
        )  # fmt: skip
    if (first_tile + TILES) * _TILE >= numel:
        # The gap before the next part: nobody wants to send what was in this memory before.
        end = tl.cdiv(numel, GROUP) * (tile_bytes(KIND, GROUP) // (_TILE // GROUP))
        gap = end + tl.arange(0, 64)
        tl.store(part + gap, 0, mask=gap < tl.cdiv(end, 64) * 64)


@triton.jit
def _dequantize_tiles(
    wire, out, add, factors, numel, num_channels, first_index, first_tile,
    KIND: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, IN_STEP: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    start = first_tile * _TILE
    left = tl.minimum(numel - start, TILES * _TILE).to(tl.int32)
    channel = 0
    if factors is not None:
        channel = ((first_index + start) % num_channels).to(tl.int32)
    groups, at = block(KIND, GROUP, TILES)
    tiles = wire + first_tile * tile_bytes(KIND, GROUP)
    vector: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # 16 bytes
    low, high = decode(tiles, groups, tl.cdiv(left, GROUP), KIND, GROUP, FULL, vector)
    low = multiplied(low, factors, groups, at, channel, num_channels, GROUP, IN_STEP)
    if add is not None:
        low += load(add + start, at, left, FULL)
    store(out + start, at, left, low, FULL)
    if KIND == "int4":
        at += GROUP // 2
        high = multiplied(high, factors, groups, at, channel, num_channels, GROUP, IN_STEP)
        if add is not None:
            high += load(add + start, at, left, FULL)
        store(out + start, at, left, high, FULL)


@triton.jit(do_not_specialize=["numel", "num_channels", "first_index"])
def dequantize(
    wire, out, add, factors, numel, num_channels, first_index,
    KIND: tl.constexpr, GROUP: tl.constexpr, IN_STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Decodes one tensor."""
    first_tile = tl.program_id(0).to(tl.int64) * TILES
    if (first_tile + TILES) * _TILE <= numel:
        _dequantize_tiles(
            wire, out, add, factors, numel, num_channels, first_index, first_tile,
            KIND, GROUP, TILES, IN_STEP, True,
        )  # fmt: skip
    else:
        _dequantize_tiles(
            wire, out, add, factors, numel, num_channels, first_index, first_tile,
            KIND, GROUP, TILES, IN_STEP, False,
        )  # fmt: skip


@triton.jit
def _reduce_tiles(
    wires, weights, out, flag, numel, seed, first_tile,
    KIND: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    start = first_tile * _TILE
    left = tl.minimum(numel - start, TILES * _TILE).to(tl.int32)
    groups, at = block(KIND, GROUP, TILES)
    num_groups = tl.cdiv(left, GROUP)
    offset = first_tile * tile_bytes(KIND, GROUP)
    low, high = decode(wires[0] + offset, groups, num_groups, KIND, GROUP, FULL, 16)
    low, high = low * weights[0], high * weights[0]
    for i in tl.static_range(1, len(wires)):
        more_low, more_high = decode(wires[i] + offset, groups, num_groups, KIND, GROUP, FULL, 16)
        low += more_low * weights[i]
        high += more_high * weights[i]
    if not FULL:
        # Zero times a negative weight is a negative zero, which fp8 can tell from padding.
        low = tl.where(at < left, low, 0.0)
        high = tl.where(at + GROUP // 2 < left, high, 0.0) if KIND == "int4" else low
    encode(
        out + offset, flag, low, high, start.to(tl.uint32), seed, groups, num_groups,
        KIND, GROUP, QMAX, STOCHASTIC, NATIVE, FULL, 16,
    )  # fmt: skip


@triton.jit(do_not_specialize=["numel", "seed"])
def reduce(
    wires, weights, out, flag, numel, seed,
    KIND: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Decodes one tensor from each of `wires`, and encodes their weighted sum."""
    first_tile = tl.program_id(0).to(tl.int64) * TILES
    if (first_tile + TILES) * _TILE <= numel:
        _reduce_tiles(
            wires, weights, out, flag, numel, seed, first_tile,
            KIND, GROUP, QMAX, STOCHASTIC, NATIVE, TILES, True,
        )  # fmt: skip
    else:
        _reduce_tiles(
            wires, weights, out, flag, numel, seed, first_tile,
            KIND, GROUP, QMAX, STOCHASTIC, NATIVE, TILES, False,
        )  # fmt: skip
