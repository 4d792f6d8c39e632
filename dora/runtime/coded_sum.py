"""Sums a vector over ranks that send codes instead of values, and ends with equal bits on all.

    rank 0   encode | part 1 to rank 1 | sum part 0, encode | to all | decode
    rank 1   encode | part 0 to rank 0 | sum part 1, encode | to all | decode

What the first encoding loses is added to the next vector (error feedback): a sum over steps then
misses no more than one step's rounding. That is sound for gradients, whose sums are what counts,
and only there. The second encoding is stochastic, so that its mean is right.
See Karimireddy et al., "Error Feedback Fixes SignSGD", 2019, https://arxiv.org/abs/1901.09847.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from dora.kernels import (
    TILE,
    Format,
    dequantize_reduce_requantize,
    quantize_pack,
    tile_bytes,
    unpack_dequantize,
    wire_bytes,
)
from dora.runtime.priority import Priority
from dora.runtime.transport import Pending, Transport

_ACTION = "REDUCE_GRAD"


class CodedSum:
    """One sum under way.

    Args:
        transport: Carries the codes.
        ranks: Who takes part, in the same order on all of them.
        rank: This one.
        vector: float32, float16 or bfloat16 on the CPU; becomes the sum.
        flags: 0 or 1 each; become their sums, as they are.
        error: float32, what earlier sums have lost; updated.
        format: Of the codes.
        seed: Of the second encoding.
        tag: Of the first messages; the second ones have the next.
        priority: Of all messages.
    """

    def __init__(
        self,
        transport: Transport,
        ranks: tuple[int, ...],
        rank: int,
        vector: torch.Tensor,
        flags: torch.Tensor,
        *,
        error: torch.Tensor,
        format: Format,
        seed: int,
        tag: int,
        priority: Priority,
    ) -> None:
        self._transport, self._ranks, self._own = transport, ranks, ranks.index(rank)
        self._vector, self._flags = vector, flags
        self._format, self._seed, self._tag = format, seed, tag
        self._priority = priority._replace(unit_bytes=tile_bytes(format))
        self._spans = _shares(vector.numel(), len(ranks))
        sizes = [wire_bytes(end - first, format) for first, end in self._spans]
        size = sizes[self._own] + flags.numel()
        self._codes = [torch.empty(size, dtype=torch.uint8) for _ in ranks]
        self._sums = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self._first = self._receives(self._codes, tag)
        self._second = self._receives(self._sums, tag + 1)
        self._sends = [
            self._send(self._encoded(i, error), i, tag) for i in range(len(ranks)) if i != self._own
        ]
        self._codes[self._own] = self._encoded(self._own, error)

    def pass_on(self, timeout_s: float) -> None:
        """Waits for the codes of the others, sums this rank's part and sends it to all."""
        for pending in self._first:
            pending.wait(timeout_s)
        size = self._sums[self._own].numel()
        stochastic = replace(self._format, stochastic=self._format.name != "fp8")
        first, end = self._spans[self._own]
        codes = [part[:size] for part in self._codes]
        try:
            total = dequantize_reduce_requantize(
                codes, [1.0] * len(codes), end - first, stochastic, seed=self._seed
            )
        except ValueError:
            total = _not_finite(size)
        self._sums[self._own] = total
        self._flags.copy_(torch.stack([part[size:] for part in self._codes]).sum(0))
        self._sends += [
            self._send(total, i, self._tag + 1) for i in range(len(self._ranks)) if i != self._own
        ]

    def wait(self, timeout_s: float) -> None:
        """Blocks until the vector is the sum; call `pass_on` before."""
        for pending in self._second:
            pending.wait(timeout_s)
        for (first, end), wire in zip(self._spans, self._sums, strict=True):
            out = self._vector[first:end]
            unpack_dequantize(wire, out.shape, out.dtype, self._format, out=out)
        for pending in self._sends:
            pending.wait(timeout_s)

    def _encoded(self, part: int, error: torch.Tensor) -> torch.Tensor:
        """Returns the message to a rank: the codes of its part, and all flags."""
        first, end = self._spans[part]
        values, lost = self._vector[first:end], error[first:end]
        try:
            wire = quantize_pack(values, self._format, error=lost, name="gradient")
        except ValueError:  # a gradient scaler looks for NaN; what was lost before is worth nothing
            lost.zero_()
            wire = _not_finite(wire_bytes(end - first, self._format))
        return torch.cat([wire, self._flags.to(torch.uint8)])

    def _receives(self, parts: list[torch.Tensor], tag: int) -> list[Pending]:
        return [
            self._transport.receive(part, self._ranks[i], tag, _ACTION)
            for i, part in enumerate(parts)
            if i != self._own
        ]

    def _send(self, message: torch.Tensor, to: int, tag: int) -> Pending:
        dst = self._ranks[to]
        return self._transport.send(message, dst, tag, _ACTION, priority=self._priority)


def _shares(numel: int, count: int) -> list[tuple[int, int]]:
    """Returns (first, end) of the part that each rank sums, in whole tiles."""
    num_tiles = -(-numel // TILE)
    edges = [min(num_tiles * i // count * TILE, numel) for i in range(count + 1)]
    return list(pairwise(edges))


def _not_finite(num_bytes: int) -> torch.Tensor:
    """Returns codes that decode to NaN, since their scales are."""
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
