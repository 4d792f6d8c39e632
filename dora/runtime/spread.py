"""What a spread-out model has in common with any module: parameters, state, files.

A rank sees the parameters of its own blocks under the plain module's names; the whole state is put
together from all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import nn

from dora.partition import Chain
from dora.runtime.agreement import Agreement
from dora.runtime.state import ModelState


class SpreadModule(nn.Module):
    """The module's interface; `DoraParallel` makes the attributes."""

    rank: int
    chain: Chain
    _state: ModelState
    _agreement: Agreement
    _unused: nn.Parameter

    def _guarded(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters of this rank's blocks under the plain module's names."""
        dot, keys = f"{prefix}." if prefix else "", self.chain.parameters.keys
        for name, parameter in self._state.parameters.items():
            for key in keys[name][:1] if remove_duplicate else keys[name]:
                yield f"{dot}{key}", parameter
        if not self._state.parameters:
            yield f"{dot}unused", self._unused

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the buffers of this rank's blocks under the plain module's names."""
        dot, keys = f"{prefix}." if prefix else "", self.chain.buffers.keys
        yield from ((f"{dot}{keys[name][0]}", b) for name, b in self._state.buffers.items())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NoReturn:
        raise RuntimeError("move or cast the module before it is partitioned, not DoraParallel")

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scales all gradients so that their norm over all ranks is at most `max_norm`.

        A collective call; shared parameters count once.

        Returns:
            The norm before scaling, equal on all ranks.
        """
        norms = torch.tensor(self._call("clip", lambda: self._norms(norm_type)))
        total: torch.Tensor = torch.linalg.vector_norm(norms.double(), norm_type)
        torch.nn.utils.clip_grads_with_norm_(self._state.parameters.values(), max_norm, total)
        return total

    def _norms(self, norm_type: float) -> list[list[float]]:
        """Returns the norm of each rank's gradients; shared ones count at their first holder."""
        mine = [
            p.grad
            for name, p in self._state.parameters.items()
            if p.grad is not None and self._state.holders[name][0] == self.rank
        ]
        norm = float(torch.nn.utils.get_total_norm(mine, norm_type)) if mine else 0.0
        return self._agreement.rows([norm], "clip_grad_norm_")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns the plain module's whole state on every rank; a collective call."""
        if args or kwargs:
            raise TypeError("state_dict() of DoraParallel takes no arguments")
        state: dict[str, Any] = self._call("state_dict", self._state.gather)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes this rank's blocks from the plain module's state."""
        missing, unexpected = self._state.load(state_dict, strict=strict)
        self._loaded()
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes safetensors files on the first rank, one per stage; a collective call."""
        self._call("save", lambda: self._state.save(directory))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads this rank's blocks, and nothing else, from safetensors files."""
        self._state.read(path)
        self._loaded()

    # ------------------------------------------------------------ of the running job

    def _call(self, kind: str, attempt: Callable[[], Any]) -> Any:
        """Runs one collective call to its end."""
        with self._guarded():
            return attempt()

    def _loaded(self) -> None:
        """Notes that the user has changed the parameters."""
