"""Takes back what an interrupted training call has done to gradients and buffers."""

from __future__ import annotations

from dora.runtime.state import ModelState


class Undo:
    """Gradients and buffers of this rank as they were; weights change only in the optimizer.

    Args:
        state: Of this rank, before the call.
    """

    def __init__(self, state: ModelState) -> None:
        grads = {p: None if p.grad is None else p.grad.clone() for p in state.parameters.values()}
        self._grads = list(grads.items())
        self._buffers = [(b, b.detach().clone()) for b in state.buffers.values()]

    def has_grads(self) -> bool:
        """Tells whether there was a gradient other than zero."""
        return any(grad is not None and bool(grad.any()) for _, grad in self._grads)

    def apply(self) -> None:
        """Puts them back, once."""
        for parameter, grad in self._grads:
            parameter.grad = grad
        for buffer, value in self._buffers:
            buffer.data.copy_(value)
        self._grads, self._buffers = [], []
