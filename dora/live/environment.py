"""Who asks for the status of jobs by environment variables, so that a program can stay as it is.

DORA_STATUS: folder for rank-N.json. DORA_METRICS_PORT: rank N answers Prometheus at it + N, at the
address DORA_METRICS_HOST, 127.0.0.1 if that is not set.
"""

from __future__ import annotations

import os
from typing import Any

from dora.errors import SpecError
from dora.live.watch import Watch, watching

# The file and the port belong to the process: the latest model that it makes has them.
_latest: Watch | None = None


def watch_as_told(model: Any, adapter: Any, planner: Any) -> None:
    """Watches a model if the environment says so; the one before is not watched any more.

    Args:
        model: A `DoraParallel`.
        adapter: Of the model, or None.
        planner: What made its plan, which may know the bounds as `qoe`.
    """
    global _latest  # noqa: PLW0603
    folder, port = os.environ.get("DORA_STATUS"), os.environ.get("DORA_METRICS_PORT")
    if not folder and not port:
        return
    if _latest is not None:
        _latest.close()
    _latest = watching(
        model,
        folder=folder or None,
        metrics_port=_port(port) if port else None,
        metrics_host=os.environ.get("DORA_METRICS_HOST", "127.0.0.1"),
        adapter=adapter,
        qoe=getattr(adapter or planner, "qoe", None),
    )


def _port(text: str) -> int:
    if text.isdigit() and 0 < int(text) < 65536:
        return int(text)
    raise SpecError(f"DORA_METRICS_PORT: given {text!r}, allowed: a port, 1 to 65535")
