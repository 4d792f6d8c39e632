"""What the Triton kernels are made of: functions on blocks of values, in registers of a GPU.

What makes the bits those of `reference`: inputs become float32 as they are loaded, divisions are
IEEE's, products and sums are never contracted (the kernels are compiled with
`enable_fp_fusion=False`), and rounding to nearest even is the addition of `_MAGIC`, since Triton's
casts to integers truncate.

A block is groups x elements. int4 is handled as two blocks, the halves of each group that share
their bytes, so that packing moves nothing between threads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# The parameters of Triton functions are pointers and blocks, for which there are no types.

from __future__ import annotations

import triton
import triton.language as tl

from dora.kernels.format import TILE

_TILE = tl.constexpr(TILE)
# 1.5 * 2^23: the last bit of a float32 of this size is worth 1, so that adding it rounds, and the
# low bits of the sum are the two's complement of the rounded number.
_MAGIC = tl.constexpr(12582912.0)
_ABS_MASK = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(27 << 23)  # 2^-100
_GOLDEN = tl.constexpr(0x9E3779B9)

# ------------------------------------------------------------ values


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _mixed(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _spread(index, seed, groups, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Returns what `_random` turns into random numbers, of the first `WIDTH` of each group.

    That is index * _GOLDEN + _mixed(seed), in parts, since most of it is the same for a group.
    """
    rows = (index + (groups * GROUP).to(tl.uint32)) * _GOLDEN + _mixed(seed.to(tl.uint32))
    return rows[:, None] + (tl.arange(0, WIDTH).to(tl.uint32) * _GOLDEN)[None, :]


@triton.jit
def _random(h):
    """Returns one of 65536 numbers from 1 up to 2 per count."""
    # The upper 16 bits become the first bits of a mantissa, which takes no cast.
    return (((_mixed(h) >> 9) & 0x7FFF80) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _scales(amax, QMAX: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Returns scales that fit bfloat16 and their inverses, from the bits of largest magnitudes."""
    bits = _bits(tl.div_rn(amax.to(tl.float32, bitcast=True), QMAX))
    up = 0xFFFF if STOCHASTIC else 0x7FFF + ((bits >> 16) & 1)
    scale = ((bits + up) & -65536).to(tl.float32, bitcast=True)
    is_zero = amax < _SMALLEST
    inverse = tl.div_rn(1.0, tl.where(is_zero, 1.0, scale))
    if STOCHASTIC:
        is_beyond = amax.to(tl.float32, bitcast=True) * inverse > QMAX
        inverse = (_bits(inverse) - tl.where(is_beyond, 4, 0)).to(tl.float32, bitcast=True)
    return tl.where(is_zero, 0.0, scale), tl.where(is_zero, 0.0, inverse)


@triton.jit
def _rounded(y, counts, STOCHASTIC: tl.constexpr, NATIVE: tl.constexpr):
    """Returns `_MAGIC` plus the code.

    None is beyond the last one: a scale rounded to nearest is at most 1 in 512 too small, which
    rounding to integers takes back.
    """
    if STOCHASTIC:
        y += _random(counts)
        if NATIVE:
            asm: tl.constexpr = "add.rm.f32 $0, $1, 0f4B3FFFFF;"  # _MAGIC - 1; the sum rounded down
            shifted = tl.inline_asm_elementwise(asm, "=f,f", [y], tl.float32, is_pure=True, pack=1)
        else:
            shifted = tl.floor(y) + (_MAGIC - 1.0)
    else:
        shifted = y + _MAGIC
    return shifted


@triton.jit
def _to_fp8(y, NATIVE: tl.constexpr):
    """Returns bits of float8_e4m3fn, rounded to nearest even, of |y| < 464."""
    if NATIVE:
        code = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        magnitude = _bits(y) & _ABS_MASK
        # From 2^-6 on: 20 bits fewer of mantissa, and 120 less in the exponent.
        normal = (magnitude + (0x7FFFF - (120 << 23)) + ((magnitude >> 20) & 1)) >> 20
        # Below: multiples of 2^-9, which is what the last bit of 2^14 is worth.
        subnormal = _bits(magnitude.to(tl.float32, bitcast=True) + 16384.0) & 15
        code = tl.where(magnitude < (121 << 23), subnormal, normal)
        code = (code | ((_bits(y) >> 24) & 128)).to(tl.uint8)
    return code


@triton.jit
def _from_fp8(codes):
    """Returns the float32 that bits of float8_e4m3fn stand for, by way of float16."""
    wide = codes.to(tl.uint16)
    half = ((wide & 127) << 7) | ((wide & 128) << 8)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


# ------------------------------------------------------------ blocks


@triton.jit
def block(KIND: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr):
    """Returns the groups of a program, and indices of their elements, of half of them for int4."""
    width: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
    groups = tl.arange(0, TILES * _TILE // GROUP)
    return groups, groups[:, None] * GROUP + tl.arange(0, width)[None, :]


@triton.jit
def tile_bytes(KIND: tl.constexpr, GROUP: tl.constexpr):
    """Returns the bytes of a whole tile."""
    width: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
    return _TILE // GROUP * (2 + width)


@triton.jit
def _places(
    groups, num_groups, KIND: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Returns the bytes of scales and codes, counted from the program's first tile.

    Threads take `VECTOR` codes at once, as many as values: more would have to be passed from
    thread to thread.
    """
    width: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
    per_tile: tl.constexpr = _TILE // GROUP
    tile = groups // per_tile
    within = groups % per_tile
    start = tile * (per_tile * (2 + width))
    if FULL:
        codes = start + 2 * per_tile
    else:
        codes = start + 2 * tl.minimum(num_groups - tile * per_tile, per_tile)
    columns = tl.arange(0, width)[None, :]
    codes = tl.max_contiguous((codes + within * width)[:, None] + columns, [1, VECTOR])
    return start + 2 * within, codes


@triton.jit
def load(pointer, at, left, FULL: tl.constexpr):
    """Returns elements as float32, with zeros in place of those from `left` on."""
    values = tl.load(pointer + at) if FULL else tl.load(pointer + at, mask=at < left, other=0)
    return values.to(tl.float32)


@triton.jit
def store(pointer, at, left, values, FULL: tl.constexpr):
    """Rounds to what the pointer is of, and writes elements before `left`."""
    values = values.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer + at, values)
    else:
        tl.store(pointer + at, values, mask=at < left)


@triton.jit
def _of_channel(
    pointer, groups, at, channel, num_channels, GROUP: tl.constexpr, IN_STEP: tl.constexpr
):
    """Returns what belongs to the channel of each element, as float32.

    Args:
        pointer: Of one number per channel.
        groups: As from `block`.
        at: Elements.
        channel: Of element 0.
        num_channels: A multiple of `GROUP`.
        GROUP: Elements of a group.
        IN_STEP: A group begins where one does in the channels, so that one division finds them all.
    """
    if IN_STEP:
        start = groups * GROUP
        channels = ((start + channel) % num_channels - start)[:, None] + at
    else:
        channels = (at + channel) % num_channels
    return tl.load(pointer + channels).to(tl.float32)


@triton.jit
def multiplied(
    values, factors, groups, at, channel, num_channels, GROUP: tl.constexpr, IN_STEP: tl.constexpr
):
    """Returns values times the factors of their channels, if there are any."""
    if factors is not None:
        values *= _of_channel(factors, groups, at, channel, num_channels, GROUP, IN_STEP)
    return values


@triton.jit
def read(
    x, error, inverses, groups, at, left, channel, num_channels,
    GROUP: tl.constexpr, IN_STEP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Returns elements with what was lost before, and those divided by the channels' factors."""
    exact = load(x, at, left, FULL)
    if error is not None:
        exact += load(error, at, left, FULL)
    return exact, multiplied(exact, inverses, groups, at, channel, num_channels, GROUP, IN_STEP)


@triton.jit
def decode(
    wire, groups, num_groups, KIND: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Returns codes times scales; of int4 both halves, else twice the same."""
    scale_at, code_at = _places(groups, num_groups, KIND, GROUP, FULL, VECTOR)
    words = (wire + scale_at).to(tl.pointer_type(tl.uint16))
    if FULL:
        bits = tl.load(words)
        codes = tl.load(wire + code_at)
    else:
        bits = tl.load(words, mask=groups < num_groups, other=0)
        codes = tl.load(wire + code_at, mask=(groups < num_groups)[:, None], other=0)
    scale = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)[:, None]
    if KIND == "int4":
        signed = codes.to(tl.int32) << 24
        low = ((signed << 4) >> 28).to(tl.float32) * scale
        high = (signed >> 28).to(tl.float32) * scale
    elif KIND == "int8":
        low = codes.to(tl.int8, bitcast=True).to(tl.float32) * scale
        high = low
    else:
        low = _from_fp8(codes) * scale
        high = low
    return low, high


@triton.jit
def encode(
    wire, flag, low, high, index, seed, groups, num_groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, STOCHASTIC: tl.constexpr,
    NATIVE: tl.constexpr, FULL: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes groups and returns their values as they will be decoded.

    Args:
        wire: Where the program's first tile goes.
        flag: Is set to 1 if a value is not finite.
        low: Values, float32, 0 where there is no element; for int4 the first half of each group.
        high: Used for int4 only: the second half.
        index: Of element 0 in the whole tensor, for random numbers.
        seed: Of random numbers.
        groups: As from `block`.
        num_groups: From the program's first one to the tensor's last.
        KIND: Name of the format.
        GROUP: Elements of a group.
        QMAX: Largest code.
        STOCHASTIC: How to round.
        NATIVE: The GPU converts to fp8, and adds rounding down.
        FULL: The tensor has all groups of the program.
        VECTOR: As for `_places`.
    """
    magnitude = _bits(low) & _ABS_MASK
    if KIND == "int4":
        magnitude = tl.maximum(magnitude, _bits(high) & _ABS_MASK)
    amax = tl.max(magnitude, 1)
    tl.store(flag + groups * 0, 1, mask=amax >= _INFINITY)
    scale, inverse = _scales(amax, QMAX, STOCHASTIC)
    inverse = inverse[:, None]
    if KIND == "fp8":
        # Not the product, which would keep the sign of what counts as zero.
        codes = _to_fp8(tl.where(inverse > 0, low * inverse, 0.0), NATIVE)
        low = _from_fp8(codes)
    else:
        width: tl.constexpr = GROUP // 2 if KIND == "int4" else GROUP
        counts = _spread(index, seed, groups, GROUP, width) if STOCHASTIC else 0
        shifted = _rounded(low * inverse, counts, STOCHASTIC, NATIVE)
        codes = _bits(shifted)
        low = shifted - _MAGIC
    if KIND == "int4":
        if STOCHASTIC:
            counts += GROUP // 2 * _GOLDEN & 0xFFFFFFFF
        shifted = _rounded(high * inverse, counts, STOCHASTIC, NATIVE)
        codes = (codes & 15) | (_bits(shifted) << 4)
        high = shifted - _MAGIC
    scale_at, code_at = _places(groups, num_groups, KIND, GROUP, FULL, VECTOR)
    words = (wire + scale_at).to(tl.pointer_type(tl.uint16))
    halves = (_bits(scale) >> 16).to(tl.uint16)
    if FULL:
        tl.store(words, halves)
        tl.store(wire + code_at, codes.to(tl.uint8))
    else:
        tl.store(words, halves, mask=groups < num_groups)
        tl.store(wire + code_at, codes.to(tl.uint8), mask=(groups < num_groups)[:, None])
    return low * scale[:, None], high * scale[:, None]
