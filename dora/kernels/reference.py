"""The definition of the wire format in plain torch; all other kernels give the same bits.

All arithmetic is float32, one rounded operation at a time. No intermediate value is subnormal
unless the input is, and then it does not matter: a processor that flushes them gets the same codes.

Stochastic rounding takes its random numbers from the seed and the index of the element (the
finaliser of Austin Appleby's MurmurHash3), so that they do not depend on who computes what. Its
scales are rounded up, not to nearest: a largest value beyond the last code would have to be cut
off, which no random number makes up for (a bias of 1 in 512 of that value).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from dora.kernels.format import TILE, Format

_ABS_MASK = 0x7FFFFFFF
_INFINITY = 0x7F800000
# 2^-100. What is smaller counts as zero: far above float32's subnormals, far below any activation.
_SMALLEST = 27 << 23
# 2^126: the largest factor whose inverse is not subnormal.
_LARGEST_FACTOR = 253 << 23
_MASK32 = 0xFFFFFFFF


class Encoded(NamedTuple):
    """Groups in order: bfloat16 `scales` [N], `codes` [N, bytes], `values` [N, G] as decoded.

    `values` lacks the factors. `is_finite` is a tensor, so that nobody has to wait for it.
    """

    scales: torch.Tensor
    codes: torch.Tensor
    values: torch.Tensor
    is_finite: torch.Tensor


def quantize_pack(
    x: torch.Tensor,
    format: Format,
    *,
    seed: int = 0,
    first_index: int = 0,
    error: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    name: str = "tensor",
) -> torch.Tensor:
    """Defines the bits that `dora.kernels.quantize_pack` returns; it has the arguments."""
    y = x.detach().reshape(-1).float()
    if error is not None:
        y = y + error.reshape(-1)
    scaled = y if factors is None else y * _spread(1 / factors.float(), y.numel(), first_index)
    encoded = encode_groups(_grouped(scaled, format), format, seed=seed, first_index=first_index)
    check_finite(bool(encoded.is_finite), name)
    if error is not None:
        lossy = _scaled_back(encoded.values.reshape(-1)[: y.numel()], factors, first_index)
        error.copy_((y - lossy).view_as(error))
    wire = join_tiles(encoded.scales, encoded.codes, format)
    return wire if out is None else out.copy_(wire)


def unpack_dequantize(
    wire: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    format: Format,
    *,
    first_index: int = 0,
    add: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Defines the values that `dora.kernels.unpack_dequantize` returns; it has the arguments."""
    numel = torch.Size(shape).numel()
    values = _decode_groups(wire, numel, format).reshape(-1)[:numel]
    values = _scaled_back(values, factors, first_index)
    if add is not None:
        values = values + add.detach().reshape(-1).float()
    result = values.to(dtype).view(torch.Size(shape))
    return result if out is None else out.copy_(result)


def channel_factors(x: torch.Tensor) -> torch.Tensor:
    """Returns the largest magnitude of each channel, bfloat16 [C]; 1 for channels of zeros."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    if rows.shape[0] == 0:
        return torch.ones(x.shape[-1], dtype=torch.bfloat16, device=x.device)
    amax = (rows.view(torch.int32) & _ABS_MASK).amax(0)
    factors = amax.clamp(max=_LARGEST_FACTOR).view(torch.float32).to(torch.bfloat16)
    return torch.where(amax < _SMALLEST, torch.ones_like(factors), factors)


def dequantize_reduce_requantize(
    wires: Sequence[torch.Tensor],
    weights: Sequence[float],
    numel: int,
    format: Format,
    *,
    seed: int = 0,
    name: str = "sum",
) -> torch.Tensor:
    """Returns the wire bytes of the weighted sum of what `wires` hold.

    Products and sums are rounded one by one, in the order of the list.
    """
    shares = [
        unpack_dequantize(wire, (numel,), torch.float32, format)
        * torch.full((), weight, dtype=torch.float32, device=wire.device)
        for wire, weight in zip(wires, weights, strict=True)
    ]
    total = reduce(torch.add, shares)
    return quantize_pack(total, format, seed=seed, name=name)


def encode_groups(
    groups: torch.Tensor, format: Format, *, seed: int = 0, first_index: int = 0
) -> Encoded:
    """Encodes float32 groups [N, G]; traces under torch.compile."""
    amax = (groups.view(torch.int32) & _ABS_MASK).amax(1)
    # A tensor as divisor: a plain number would become a multiplication by its inverse on a GPU.
    qmax = torch.full_like(amax, format.qmax, dtype=torch.float32)
    exact = amax.view(torch.float32) / qmax
    scales = _rounded_up(exact) if format.stochastic else exact.to(torch.bfloat16)
    is_zero = amax < _SMALLEST
    scales = torch.where(is_zero, torch.zeros_like(scales), scales)
    scale = scales.float().unsqueeze(1)
    inverse = 1 / scale
    if format.stochastic:
        inverse = _kept_within(inverse, amax.view(torch.float32).unsqueeze(1), format)
    y = torch.where(is_zero.unsqueeze(1), torch.zeros_like(groups), groups * inverse)
    if format.stochastic:
        y = torch.floor(y + _random(y, seed, first_index)) - 1
    if format.name == "fp8":
        q = y.clamp(-448, 448).to(torch.float8_e4m3fn)
        codes, integers = q.view(torch.uint8), q.float()
    else:
        q = torch.round(y).to(torch.int8)
        codes, integers = _packed(q, format), q.float()
    return Encoded(scales, codes, integers * scale, (amax < _INFINITY).all())


def join_tiles(scales: torch.Tensor, codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Returns the wire bytes of groups in order."""
    per_tile = TILE // format.group
    whole = len(scales) // per_tile * per_tile
    head = scales.view(-1, 1).view(torch.uint8)
    tiles = torch.cat([_by_tile(head[:whole], per_tile), _by_tile(codes[:whole], per_tile)], 1)
    return torch.cat([tiles.reshape(-1), head[whole:].reshape(-1), codes[whole:].reshape(-1)])


def check_finite(is_finite: bool, name: str) -> None:
    """Raises ValueError that names the tensor unless `is_finite`."""
    if not is_finite:
        raise ValueError(f"{name}: given infinite values or NaN, allowed to compress: finite ones")


def _by_tile(groups: torch.Tensor, per_tile: int) -> torch.Tensor:
    return groups.reshape(-1, per_tile * groups.shape[1])


def _grouped(flat: torch.Tensor, format: Format) -> torch.Tensor:
    padding = -flat.numel() % format.group
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, format.group)


def _spread(by_channel: torch.Tensor, numel: int, first_index: int) -> torch.Tensor:
    index = torch.arange(first_index, first_index + numel, device=by_channel.device)
    return by_channel[index % by_channel.numel()]


def _scaled_back(
    values: torch.Tensor, factors: torch.Tensor | None, first_index: int
) -> torch.Tensor:
    if factors is None:
        return values
    return values * _spread(factors.float(), values.numel(), first_index)


def _rounded_up(x: torch.Tensor) -> torch.Tensor:
    """Returns the least bfloat16 that is not below positive `x`."""
    upper = (x.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return upper.view(torch.float32).to(torch.bfloat16)


def _kept_within(inverse: torch.Tensor, amax: torch.Tensor, format: Format) -> torch.Tensor:
    """Returns inverses of scales with which no value goes beyond the largest code.

    From there a random number could take it to the next code. Three roundings, of the scale before
    it is rounded up, of its inverse and of the product, make at most 3 units in the last place.
    """
    less = (inverse.view(torch.int32) - 4).view(torch.float32)
    return torch.where(amax * inverse > format.qmax, less, inverse)


def _random(like: torch.Tensor, seed: int, first_index: int) -> torch.Tensor:
    """Returns one of 65536 numbers from 1 up to 2 per element: a mantissa of random bits."""
    index = torch.arange(like.numel(), device=like.device) + first_index
    mixed = (index * 0x9E3779B9 + _mixed_seed(seed)) & _MASK32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK32
    bits = (mixed ^ (mixed >> 16)) >> 16
    return (1 + bits.float() / 65536).view_as(like)


def _mixed_seed(seed: int) -> int:
    mixed = seed & _MASK32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK32
    return mixed ^ (mixed >> 16)


def _packed(q: torch.Tensor, format: Format) -> torch.Tensor:
    if format.name == "int8":
        return q.view(torch.uint8)
    low, high = (q.view(torch.uint8) & 15).chunk(2, 1)
    return low | (high << 4)


def _decode_groups(wire: torch.Tensor, numel: int, format: Format) -> torch.Tensor:
    num_groups = -(-numel // format.group)
    per_tile, width = TILE // format.group, format.group_bytes
    whole = num_groups // per_tile
    size = per_tile * (2 + width)
    parts = [(wire[: whole * size].view(-1, size), per_tile)]
    if num_groups % per_tile:
        parts.append((wire[whole * size :].view(1, -1), num_groups % per_tile))
    decoded = [_decode_tiles(tiles, groups, format) for tiles, groups in parts]
    return torch.cat(decoded)


def _decode_tiles(tiles: torch.Tensor, num_groups: int, format: Format) -> torch.Tensor:
    """Decodes [tiles, bytes], all of `num_groups` groups, into [groups, G]."""
    head = tiles[:, : 2 * num_groups].clone(memory_format=torch.contiguous_format)
    codes = tiles[:, 2 * num_groups :].reshape(-1, format.group_bytes)
    scales = head.view(torch.bfloat16).reshape(-1, 1).float()
    return _unpacked(codes, format) * scales


def _unpacked(codes: torch.Tensor, format: Format) -> torch.Tensor:
    if format.name == "fp8":
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    if format.name == "int8":
        return codes.contiguous().view(torch.int8).float()
    halves = torch.cat([codes & 15, codes >> 4], 1).to(torch.int8)
    return ((halves ^ 8) - 8).float()
