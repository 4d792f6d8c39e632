"""Codecs on the wire: a tensor is encoded, sent and decoded in pieces, so that the three overlap.

    sender     encode 0 | encode 1 | encode 2 | ...
    network             | piece 0     | piece 1     | piece 2 ...
    receiver                          | decode 0    | decode 1 ...

A piece is a message of whole tiles. Both ends take the format from the boundary's codec and what
they know of the tensor, and the pieces from its size, so that nothing is said about them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from dora.kernels import (
    TILE,
    Format,
    channel_factors,
    prefix_bytes,
    quantize_pack,
    tile_bytes,
    unpack_dequantize,
    wire_bytes,
)
from dora.runtime.boundary import LeafSpec
from dora.runtime.seeds import SeedKey
from dora.runtime.tags import BACKWARD
from dora.spec import BoundaryCodec

FORMATS = {
    "int8": Format("int8"),
    "int4": Format("int4"),
    "int4-smooth": Format("int4", smooth=True),
    "fp8": Format("fp8"),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Encoding and decoding so little takes 24 us on a 2020s server, and saves 49 us at 1 Gbit/s.
MIN_BYTES = 8192
# Elements of a piece. 16 MiB as int8 over the engine on loopback, encoded, sent and decoded, take
# 80 ms in pieces of 8 tiles, 32 ms of 64, 22 ms of 256 and 17 ms in one: a message costs 0.2 ms. At
# 1 Gbit/s one of 256 tiles is 4.3 ms long, and 0.2 ms of encoding before the first is all that
# nothing hides.
PIECE = 256 * TILE
# Fewer rows say little about a channel.
_MIN_ROWS = 16


def format_of(codec: str, leaf: LeafSpec, *, is_gradient: bool) -> Format | None:
    """Returns how a tensor travels; None: as it is, since it is no float or not worth it.

    Channels that do not fill groups can not be smoothed; int8 bears them better than int4.
    """
    if codec == "none" or leaf.dtype not in DTYPES:
        return None
    if leaf.shape.numel() * leaf.dtype.itemsize < MIN_BYTES:
        return None
    format = FORMATS[codec]
    if format.smooth and leaf.shape[-1] % format.group:
        format = FORMATS["int8"]
    return replace(format, stochastic=True) if is_gradient and format.name != "fp8" else format


def seed_of(key: SeedKey, rank: int, leaf: int) -> int:
    """Returns a seed of stochastic rounding: equal in every run, other for every tensor."""
    return zlib.crc32(f"{key.seed} {key.step} {key.microbatch} {rank} {leaf}".encode())


def pieces(numel: int) -> list[tuple[int, int]]:
    """Returns (first, end) of each piece, in elements."""
    return [(first, min(first + PIECE, numel)) for first in range(0, numel, PIECE)]


@dataclass
class Sample:
    """How much of some tensors was lost: the root mean square of the channels' relative errors.

    By channel, the last dimension, because a few channels with large values would hide that others
    have lost theirs.
    """

    squares: float = 0.0
    count: int = 0

    def add(self, sent: torch.Tensor, decoded: torch.Tensor) -> None:
        """Counts a tensor, and what its receiver makes of it; one of few rows as one channel."""
        width = sent.shape[-1] if sent.numel() >= _MIN_ROWS * sent.shape[-1] else 1
        lost = (decoded.double() - sent.double()).square().reshape(-1, width).sum(0)
        total = sent.double().square().reshape(-1, width).sum(0)
        self.squares += float((lost / total)[total > 0].sum())
        self.count += int((total > 0).sum())

    @property
    def error(self) -> float:
        """Relative L2 error of a channel."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


@dataclass
class Encoder:
    """Makes the messages of one tensor.

    Attributes:
        name: Of the tensor, for errors.
        format: None sends it as it is.
        seed: Of stochastic rounding.
        is_gradient: Values that are not finite become NaN at the receiver, where a gradient scaler
            looks for them; in an activation they are an error.
        sample: Counts what is lost, if given.
    """

    name: str
    format: Format | None
    seed: int = 0
    is_gradient: bool = False
    sample: Sample | None = None

    @property
    def unit_bytes(self) -> int:
        """Bytes of a tile, at whose ends messages may be cut on their way."""
        return 1 if self.format is None else tile_bytes(self.format)

    def parts(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the messages in order; each may leave while the next one is made."""
        if self.format is None:
            yield x.contiguous().cpu()
            return
        flat, factors = x.detach().reshape(-1), None
        if self.format.smooth:
            factors = channel_factors(x)
            yield factors.view(torch.uint8).cpu()
        for first, end in pieces(flat.numel()):
            yield self._packed(flat[first:end], first, factors, self.format).cpu()
        if self.sample is not None:
            wire = self._packed(flat, 0, factors, self.format)
            back = unpack_dequantize(wire, x.shape, x.dtype, self.format, factors=factors)
            self.sample.add(x, back)

    def _packed(
        self, piece: torch.Tensor, first: int, factors: torch.Tensor | None, format: Format
    ) -> torch.Tensor:
        try:
            return quantize_pack(
                piece, format, seed=self.seed, first_index=first, factors=factors, name=self.name
            )
        except ValueError:
            if not self.is_gradient:
                raise
            size = wire_bytes(piece.numel(), format)
            # Scales that are NaN.
            return torch.full((size,), 0xFF, dtype=torch.uint8, device=piece.device)


@dataclass
class Arrival:
    """A tensor on its way here.

    Attributes:
        leaf: What it will be.
        format: As the sender's.
        device: Where it is wanted.
        parts: CPU memory for its messages, in order; each is decoded once it is there.
        tensor: The result, once all are.
    """

    leaf: LeafSpec
    format: Format | None
    device: torch.device
    parts: list[torch.Tensor] = field(default_factory=list)
    _factors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        leaf, format = self.leaf, self.format
        if format is None:
            self.tensor = leaf.empty()
            self.parts = [self.tensor]
            return
        self.tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=self.device)
        self._pieces = pieces(leaf.shape.numel())
        sizes = [wire_bytes(end - first, format) for first, end in self._pieces]
        if format.smooth:
            sizes.insert(0, prefix_bytes(leaf.shape[-1], format))
        self.parts = [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def decode(self, part: int) -> None:
        """Takes a message that has arrived."""
        if self.format is None:
            self.tensor = self.tensor.to(self.device)
            return
        wire = self.parts[part].to(self.device)
        if self.format.smooth and part == 0:
            self._factors = wire.view(torch.bfloat16)
            return
        first, end = self._pieces[part - self.format.smooth]
        unpack_dequantize(
            wire,
            (end - first,),
            self.leaf.dtype,
            self.format,
            first_index=first,
            factors=self._factors,
            out=self.tensor.view(-1)[first:end],
        )


class Crossing(NamedTuple):
    """A way over a stage boundary.

    Attributes:
        boundary: Number of the stage before it.
        direction: FORWARD or BACKWARD.
    """

    boundary: int
    direction: int


class Coder:
    """Makes the encoders and decoders of one rank.

    Attributes:
        codecs: Of each boundary, () for none; change them between calls, alike on all ranks.
        samples: (boundary, direction) -> what is lost of the first message that this rank sends
            there; None counts nothing.
    """

    def __init__(self, codecs: tuple[BoundaryCodec, ...], rank: int) -> None:
        self.codecs = codecs
        self.samples: dict[tuple[int, int], Sample] | None = None
        self._rank = rank

    def formats(self, leaves: Sequence[LeafSpec], at: Crossing) -> list[Format | None]:
        """Returns how each tensor of a boundary travels.

        One that no gradient returns for, beside others that one does for, is a mask or a constant,
        whose values may be far apart or infinite: it travels as it is.
        """
        codec = self.codecs[at.boundary] if self.codecs else BoundaryCodec()
        is_gradient = at.direction == BACKWARD
        name = codec.backward if is_gradient else codec.forward
        is_known = any(leaf.requires_grad for leaf in leaves)
        return [
            format_of(name, leaf, is_gradient=is_gradient)
            if leaf.requires_grad or not is_known
            else None
            for leaf in leaves
        ]

    def encoders(
        self, leaves: Sequence[LeafSpec], at: Crossing, action: str, key: SeedKey
    ) -> list[Encoder]:
        """Returns what makes the messages of each tensor."""
        sample, place = None, (at.boundary, at.direction)
        if self.samples is not None and place not in self.samples:
            sample = self.samples[place] = Sample()
        return [
            Encoder(
                f"tensor {i} of {action}",
                format,
                seed=seed_of(key, self._rank, i),
                is_gradient=at.direction == BACKWARD,
                sample=sample,
            )
            for i, format in enumerate(self.formats(leaves, at))
        ]

    def arrivals(
        self, leaves: Sequence[LeafSpec], at: Crossing, device: torch.device
    ) -> list[Arrival]:
        """Returns memory for the messages of each tensor."""
        pairs = zip(leaves, self.formats(leaves, at), strict=True)
        return [Arrival(leaf, format, device) for leaf, format in pairs]
