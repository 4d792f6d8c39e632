"""How a compressed tensor lies on the wire.

A tensor is taken in flat order and cut into groups of `group` elements, the last one padded with
zeros. Each group has one bfloat16 scale. `TILE` elements make a tile: the scales of its groups,
then their codes, both in order; the last tile holds only the groups that there are. A tile needs
nothing outside of itself, so that whole tiles of a message can be encoded and decoded as they
leave and arrive.

Codes: `int8` is a two's complement byte, `fp8` a byte of float8_e4m3fn. In `int4`, byte j of a
group holds code j in its low half and code j + group / 2 in its high half, so that vectors of codes
unpack into vectors of neighbours.

With `smooth`, a prefix of one bfloat16 factor per channel goes ahead of the tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

TILE = 2048
SCALE_BYTES = 2
# Parts of one buffer begin at a cache line.
ALIGNMENT_BYTES = 64
# The largest code.
QMAX = {"int8": 127, "int4": 7, "fp8": 448}
GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Format:
    """How to encode.

    Args:
        name: int8, int4 or fp8.
        group: Elements that share a scale: 32, 64, 128 or 256.
        stochastic: Rounds up as often as the value is near to the upper code, so that the mean is
            right, instead of to the nearest code. Not for fp8.
        smooth: Divides every channel by its largest value first, so that outlier channels do not
            cost the others their precision.
    """

    name: str
    group: int = 64
    stochastic: bool = False
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.name not in QMAX:
            raise ValueError(f"name: given {self.name!r}, allowed: {', '.join(QMAX)}")
        if self.group not in GROUPS:
            raise ValueError(f"group: given {self.group}, allowed: {', '.join(map(str, GROUPS))}")
        if self.stochastic and self.name == "fp8":
            raise ValueError("stochastic: given with fp8, allowed: with int8 and int4")

    @property
    def qmax(self) -> int:
        """Returns the largest code."""
        return QMAX[self.name]

    @property
    def group_bytes(self) -> int:
        """Returns the bytes of a group's codes."""
        return self.group // 2 if self.name == "int4" else self.group


def tile_bytes(format: Format) -> int:
    """Returns the bytes of a whole tile."""
    return TILE // format.group * (SCALE_BYTES + format.group_bytes)


def wire_bytes(numel: int, format: Format) -> int:
    """Returns the bytes of `numel` encoded elements, without the prefix."""
    return -(-numel // format.group) * (SCALE_BYTES + format.group_bytes)


def prefix_bytes(channels: int, format: Format) -> int:
    """Returns the bytes of the factors that go ahead of the tiles."""
    return channels * SCALE_BYTES if format.smooth else 0


def many_layout(shapes: Sequence[Sequence[int]], format: Format) -> tuple[list[int], int]:
    """Returns where the part of each tensor begins in one buffer, and the buffer's bytes."""
    offsets, total = [], 0
    for shape in shapes:
        offsets.append(total)
        used = total + wire_bytes(prod(shape), format)
        total = -(-used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, total
