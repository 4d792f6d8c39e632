"""What each rank does in which order, and the messages between ranks."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from dora.spec.base import Bytes, Count, Index, NonNegative, Positive, Spec

ACTION_KINDS = ("F", "B", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_GRAD", "OPT")
_ACTION = re.compile(r"^(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|B|REDUCE_GRAD|OPT)(\d*)$")


class Action(NamedTuple):
    """One thing a rank does for `stage`; written `2F0`, `1SEND_B3`, `0REDUCE_GRAD`.

    RECV posts a receive and SEND starts a send, both without waiting; F and B wait for the
    data they need. REDUCE_GRAD and OPT belong to no micro-batch and hold -1.
    """

    stage: int
    kind: str
    microbatch: int = -1

    def __repr__(self) -> str:
        """Returns the compact form that `from_str` reads."""
        return f"{self.stage}{self.kind}{self.microbatch if self.microbatch >= 0 else ''}"

    @classmethod
    def from_str(cls, text: str) -> Action:
        """Inverse of `str`; ValueError names the text that is no action."""
        match = _ACTION.match(text)
        if match is None or (match[2] in ("REDUCE_GRAD", "OPT")) == bool(match[3]):
            raise ValueError(f"not an action: {text!r}, allowed: like '2F0' or '0REDUCE_GRAD'")
        return cls(int(match[1]), match[2], int(match[3]) if match[3] else -1)


ActionField = Annotated[
    Action,
    BeforeValidator(lambda v: Action.from_str(v) if isinstance(v, str) else v),
    PlainSerializer(str, return_type=str),
]


class Transfer(Spec):
    """One message between two ranks and how the network should treat it.

    Attributes:
        action: The SEND, or REDUCE_GRAD, that it belongs to.
        priority: Larger goes first; the length in seconds of the path that waits for it.
        chunk_bytes: Piece after which a more urgent transfer may go first; None: unchunked.
        pace_bytes_per_s: Upper limit of its rate.   not_before_s: Earliest start in the step.
    """

    src: Index
    dst: Index
    num_bytes: Bytes
    action: ActionField
    priority: float = 0.0
    chunk_bytes: Count | None = None
    pace_bytes_per_s: Positive | None = None
    not_before_s: NonNegative = 0.0


class Schedule(Spec):
    """What every rank does, in order, and how its messages are sent."""

    actions_by_rank: tuple[tuple[ActionField, ...], ...]
    transfers: tuple[Transfer, ...] = ()
