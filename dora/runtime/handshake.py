"""Tells peers what this rank runs before any data of a step, so that mismatches are errors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dora.errors import ProtocolError
from dora.runtime.boundary import digest
from dora.runtime.priority import URGENT
from dora.runtime.tags import HEADER_TAG
from dora.runtime.transport import Pending, Transport


class Handshake:
    """Stamps of one step: the number of the call and a digest of batch shapes and mode.

    Args:
        transport: Carries the stamps.
        rank: This process.
        timeout_s: Limit of every wait.
    """

    def __init__(self, transport: Transport, rank: int, timeout_s: float) -> None:
        self._transport = transport
        self._rank = rank
        self._timeout_s = timeout_s

    def begin(self, call: int, text: str, *, dst: Iterable[int], src: Iterable[int]) -> None:
        """Sends this rank's stamp to `dst` and expects those of `src`.

        Args:
            call: Steps and inference calls before this one.
            text: What all ranks must agree on, in words.
            dst: Ranks that will get data from this one.
            src: Ranks that will send data to this one.
        """
        self._text = text
        # 50 bits: exact also where a stamp travels as float64.
        self.stamp = torch.tensor([call, digest(text) >> 12])
        self._sends = [
            self._transport.send(self.stamp, rank, HEADER_TAG, "header", priority=URGENT)
            for rank in sorted(dst)
        ]
        self._expected: dict[int, tuple[torch.Tensor, Pending]] = {}
        for rank in sorted(src):
            theirs = torch.empty_like(self.stamp)
            self._expected[rank] = (
                theirs,
                self._transport.receive(theirs, rank, HEADER_TAG, "header"),
            )

    def check(self, src: int) -> None:
        """Waits for the stamp of `src`, once per step; call before receiving its data."""
        theirs, pending = self._expected.pop(src, (None, None))
        if theirs is not None and pending is not None:
            pending.wait(self._timeout_s)
            self.compare(theirs, src)

    def compare(self, theirs: torch.Tensor, src: int) -> None:
        """Raises ProtocolError if rank `src` runs something else."""
        if not torch.equal(theirs.long(), self.stamp):
            raise ProtocolError(
                f"rank {self._rank} runs call {self.stamp[0].item()}: {self._text}; rank {src} "
                f"runs call {int(theirs[0])} with another batch shape or mode: give every rank "
                "the same batches in the same order"
            )

    def finish(self) -> None:
        """Waits until the own stamps are sent."""
        for operation in self._sends:
            operation.wait(self._timeout_s)
