"""The ways to carry messages, by name; docs/transports.md says what each can promise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dora.runtime.chunked import ChunkedTransport
from dora.runtime.engine_transport import EngineTransport
from dora.runtime.transport import GlooTransport, Transport

TRANSPORTS: dict[str, Callable[..., Transport]] = {
    "dora": EngineTransport,
    "gloo": GlooTransport,
    "gloo-chunked": partial(ChunkedTransport, backend="gloo"),
    "nccl": partial(ChunkedTransport, backend="nccl"),
}


def open_transport(name: str, *, timeout_s: float, **options: Any) -> Transport:
    """Connects all ranks; a collective call.

    Args:
        name: One of `TRANSPORTS`.
        timeout_s: Of waits inside the transport.
        options: Of that transport, such as `key` for 'dora'.

    Raises:
        ValueError: No such transport.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"transport: given {name!r}, allowed: {', '.join(TRANSPORTS)}")
    if options and name != "dora":
        raise ValueError(f"{', '.join(options)}: given for {name!r}, allowed: with 'dora' only")
    return TRANSPORTS[name](timeout_s=timeout_s, **options)
