"""What each codec saves on the wire and costs, for the planner's choice per boundary.

Sizes follow the wire layout: codes of a group of 64 values and its fp16 scale. Errors are relative
L2 errors on Gaussian values; a user's own data may be kinder or harsher, so the planner takes them
as the accuracy that a codec may cost until a probe has measured that.
"""

from __future__ import annotations

from typing import NamedTuple

from dora.spec import BoundaryCodec, Device

_GROUP = 64
_SCALE_BITS = 16
_BITS_PER_VALUE = {"float32": 32, "float16": 16, "bfloat16": 16}


class CodecCost(NamedTuple):
    """Bits per value on the wire, and the relative L2 error."""

    bits: float
    error: float


CODECS: dict[str, CodecCost] = {
    "none": CodecCost(32, 0.0),
    "int8": CodecCost(8 + _SCALE_BITS / _GROUP, 0.0066),
    "fp8": CodecCost(8 + _SCALE_BITS / _GROUP, 0.027),
    "int4": CodecCost(4 + _SCALE_BITS / _GROUP, 0.110),
}


def wire_ratio(name: str, dtype: str) -> float:
    """Returns the bytes on the wire over the bytes of the tensor."""
    return 1.0 if name == "none" else CODECS[name].bits / _BITS_PER_VALUE.get(dtype, 32)


def codec_s(device: Device, name: str, num_bytes: float, dtype: str) -> float:
    """Returns the seconds of encoding or decoding `num_bytes`: one pass over memory, one launch."""
    if name == "none":
        return 0.0
    moved = num_bytes * (1 + wire_ratio(name, dtype))
    return moved / (device.mem_efficiency * device.mem_bandwidth_bytes_per_s) + device.dispatch_s


def error(codec: BoundaryCodec) -> float:
    """Returns the larger error of both directions."""
    return max(CODECS[codec.forward].error, CODECS[codec.backward].error)
