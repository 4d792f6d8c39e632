"""The loss of one micro-batch as (output, target) -> scalar, however the user gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LossFn = Callable[[Any, Any], torch.Tensor]


def as_loss_fn(loss_fn: LossFn | None, targets: Any) -> LossFn:
    """Takes the output's own loss if there is no function, and leaves out targets of None."""
    if loss_fn is None:
        return _own_loss
    if targets is not None:
        return loss_fn
    return lambda output, _: loss_fn(output)  # type: ignore[call-arg]


def _own_loss(output: Any, target: Any) -> torch.Tensor:
    loss: torch.Tensor = getattr(output, "loss", output)
    return loss
