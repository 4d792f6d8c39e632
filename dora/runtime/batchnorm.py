"""Keeps batch-norm running statistics of replicas equal to those of one device.

A running statistic is an exponential average over micro-batches, r <- (1 - a) r + a s. The
average is linear in the statistics s, so each replica adds up its own micro-batches with the
weights they have in the whole sequence, and one sum over the replicas gives the same result as
one device that saw all micro-batches in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dora.errors import DoraError
from dora.runtime.transport import Transport


class BatchNormSync:
    """Running statistics of one replicated stage during one step.

    Args:
        modules: The stage's modules.
        transport: To sum over the replicas.
        ranks: The replicas.
    """

    def __init__(
        self, modules: Sequence[nn.Module], transport: Transport, ranks: tuple[int, ...]
    ) -> None:
        self._norms = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._transport = transport
        self._ranks = ranks

    def begin(self, num_microbatches: int) -> None:
        """Remembers the statistics before the step."""
        self._active = [norm for norm in self._norms if norm.training]
        self._num_microbatches = num_microbatches
        self._before = [(_stats(norm).clone(), _batches(norm)) for norm in self._active]
        self._sums = [torch.zeros_like(before) for before, _ in self._before]
        self._calls = [0] * len(self._active)

    def before_forward(self) -> None:
        """Clears the statistics, so that one forward leaves exactly its own contribution."""
        for norm in self._active:
            _store(norm, torch.zeros_like(_stats(norm)), 0)

    def after_forward(self, microbatch: int) -> None:
        """Adds the contribution of a micro-batch with its weight in the whole sequence."""
        for i, norm in enumerate(self._active):
            total, (_, batches) = self._sums[i], self._before[i]
            self._calls[i] += _batches(norm)
            if norm.momentum is None:  # a plain mean over all batches so far
                weight = 1 / (batches + self._num_microbatches)
            else:
                weight = (1 - norm.momentum) ** (self._num_microbatches - 1 - microbatch)
            total.add_(_stats(norm), alpha=weight)

    def finish(self, timeout_s: float) -> None:
        """Sums the contributions of all replicas and stores the new statistics."""
        if not self._active:
            return
        calls = torch.tensor(self._calls, dtype=torch.float64)
        flat = torch.cat([*(total.cpu() for total in self._sums), calls])
        self._transport.all_reduce(flat, self._ranks, "batch-norm statistics").wait(timeout_s)
        *parts, counts = flat.split([*(total.numel() for total in self._sums), len(calls)])
        for i, norm in enumerate(self._active):
            part, (before, batches) = parts[i], self._before[i]
            if counts[i] == 0:
                _store(norm, before, batches)
                continue
            if counts[i] != self._num_microbatches:
                raise DoraError(
                    f"batch norm of {norm.num_features} features ran {int(counts[i])} times for "
                    f"{self._num_microbatches} micro-batches, allowed on replicas: once for each"
                )
            count = batches + self._num_microbatches
            if norm.momentum is None:
                kept = batches / count
            else:
                kept = (1 - norm.momentum) ** self._num_microbatches
            _store(norm, before * kept + part.to(before.device), count)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Lets batch norm normalise as in training without counting the batch (once more)."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros((), dtype=torch.long)
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _stats(norm: _BatchNorm) -> torch.Tensor:
    """Returns running mean and variance as one float64 vector."""
    assert norm.running_mean is not None and norm.running_var is not None
    return torch.cat([norm.running_mean, norm.running_var]).double()


def _batches(norm: _BatchNorm) -> int:
    assert norm.num_batches_tracked is not None
    return int(norm.num_batches_tracked.item())


def _store(norm: _BatchNorm, stats: torch.Tensor, batches: int) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    mean, variance = stats.chunk(2)
    # Through .data, as batch norm's own update: backward of earlier micro-batches holds these
    # tensors, without reading them.
    norm.running_mean.data.copy_(mean)
    norm.running_var.data.copy_(variance)
    norm.num_batches_tracked.data.fill_(batches)
