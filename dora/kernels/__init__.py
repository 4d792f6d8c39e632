"""Compressed tensors: quantises and packs them for the wire, and back, in one pass over memory.

`Format` says how a tensor is encoded, `quantize` encodes and decodes, `reference` defines each bit
of the result in plain torch.
"""

from __future__ import annotations

from dora.kernels.format import TILE, Format, many_layout, prefix_bytes, tile_bytes, wire_bytes
from dora.kernels.quantize import (
    channel_factors,
    dequantize_reduce_requantize,
    quantize_pack,
    quantize_pack_many,
    unpack_dequantize,
    unpack_dequantize_many,
)

__all__ = [
    "TILE",
    "Format",
    "channel_factors",
    "dequantize_reduce_requantize",
    "many_layout",
    "prefix_bytes",
    "quantize_pack",
    "quantize_pack_many",
    "tile_bytes",
    "unpack_dequantize",
    "unpack_dequantize_many",
    "wire_bytes",
]
