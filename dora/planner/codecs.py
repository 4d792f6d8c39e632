"""What each codec saves on the wire and costs, for the planner's choice per boundary.

Sizes follow the wire layout (docs/compression.md): codes of a group of 64 values and its bfloat16
scale. Errors are relative L2 errors on Gaussian values, of activations, which are rounded to
nearest, and of gradients, which are rounded stochastically. Their squares are the accuracy that a
codec may cost, in the unit in which the runtime measures it (`dora.runtime.guard`): a user's own
data may be kinder or harsher, so that is a first filter. Seconds come from the profile where a
device has measured its kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from dora.spec import BoundaryCodec, CodecRate, Device

_GROUP = 64
_SCALE_BITS = 16
# A smoothed tensor also has a factor per channel; a micro-batch has at least about as many rows.
_ROWS = 128
_BITS_PER_VALUE = {"float32": 32, "float16": 16, "bfloat16": 16}

Way = Literal["encode", "decode"]
# (name of the device, codec) -> what it takes there.
Rates = Mapping[tuple[str, str], CodecRate]


class CodecCost(NamedTuple):
    """Bits per value on the wire, and the relative L2 errors.

    Attributes:
        error: Of activations.
        gradient_error: Of gradients.
    """

    bits: float
    error: float
    gradient_error: float

    @property
    def loss(self) -> float:
        """Energy of the error of activations, over theirs."""
        return self.error**2

    @property
    def gradient_loss(self) -> float:
        """Energy of the error of gradients, over theirs."""
        return self.gradient_error**2


# Errors of 2^22 Gaussian values; tests/test_codecs.py measures them again.
CODECS: dict[str, CodecCost] = {
    "none": CodecCost(32, 0.0, 0.0),
    "int8": CodecCost(8 + _SCALE_BITS / _GROUP, 0.0060, 0.0085),
    "fp8": CodecCost(8 + _SCALE_BITS / _GROUP, 0.0251, 0.0251),
    "int4": CodecCost(4 + _SCALE_BITS / _GROUP, 0.108, 0.153),
    "int4-smooth": CodecCost(4 + _SCALE_BITS / _GROUP + _SCALE_BITS / _ROWS, 0.110, 0.156),
}


def wire_ratio(name: str, dtype: str) -> float:
    """Returns the bytes on the wire over the bytes of the tensor."""
    return 1.0 if name == "none" else CODECS[name].bits / _BITS_PER_VALUE.get(dtype, 32)


def codec_s(
    device: Device,
    name: str,
    num_bytes: float,
    dtype: str,
    way: Way = "encode",
    rates: Rates | None = None,
) -> float:
    """Returns the seconds of encoding or decoding `num_bytes` of a tensor.

    Without a measured rate: one pass over memory, one launch.
    """
    if name == "none":
        return 0.0
    rate = (rates or {}).get((device.name, name))
    if rate is not None:
        s_per_byte = rate.encode_s_per_byte if way == "encode" else rate.decode_s_per_byte
        return num_bytes * s_per_byte + rate.call_s
    moved = num_bytes * (1 + wire_ratio(name, dtype))
    return moved / (device.mem_efficiency * device.mem_bandwidth_bytes_per_s) + device.dispatch_s


def loss(codecs: Iterable[BoundaryCodec], sums: Iterable[str]) -> float:
    """Returns the accuracy loss of the codec of a plan that costs most."""
    pairs = list(codecs)
    found = [CODECS[codec.forward].loss for codec in pairs]
    found += [CODECS[name].gradient_loss for name in (*sums, *(c.backward for c in pairs))]
    return max(found, default=0.0)


def boundary_codecs(max_loss: float, *, training: bool) -> list[BoundaryCodec]:
    """Returns the codecs of a boundary that lose at most `max_loss`, the plain one first.

    A gradient is sent by the same codec as the activation, or by a better one if it has to be.
    """
    found = []
    for name, cost in CODECS.items():
        if cost.loss <= max_loss:
            back = name if cost.gradient_loss <= max_loss else smallest(CODECS, max_loss)
            pair = {"forward": name, "backward": back if training else "none"}
            found.append(BoundaryCodec.model_validate(pair))
    return found


def gradient_codecs(max_loss: float) -> list[str]:
    """Returns the codecs of sums of gradients that lose at most `max_loss`, the plain one first."""
    # A sum of gradients has no channels to smooth.
    return [n for n, c in CODECS.items() if c.gradient_loss <= max_loss and n != "int4-smooth"]


def smallest(names: Iterable[str], max_loss: float) -> str:
    """Returns the codec of gradients with the fewest bits that loses at most `max_loss`."""
    allowed = [name for name in names if CODECS[name].gradient_loss <= max_loss]
    return min(allowed, key=lambda name: CODECS[name].bits)
