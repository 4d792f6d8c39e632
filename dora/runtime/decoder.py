"""Runs orders on one stage: its caches, its part of the forward pass, and the choice of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dora.runtime.batch import as_call
from dora.runtime.boundary import digest, tensors_of
from dora.runtime.kvcache import AsInputs, KVCache
from dora.runtime.orders import Kind, Order
from dora.runtime.stage import Shapes, StageRunner

_NO_TOKEN = -1
_NO_SHAPES = Shapes({}, None, None, None)


class Sampling(NamedTuple):
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_k: Among so many of the likeliest; 0: among all.
        seed: A token depends on it, on the request and on the position, on nothing else.
    """

    temperature: float
    top_k: int
    seed: int

    def choose(self, scores_BV: torch.Tensor, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Returns the next token of every row.

        Args:
            scores_BV: Of every token of the vocabulary.
            keys: (request, position) of every row.
        """
        if self.temperature == 0:
            return scores_BV.argmax(-1).cpu()
        scores_BV = scores_BV.float().cpu() / self.temperature
        if 0 < self.top_k < scores_BV.shape[-1]:
            least = scores_BV.topk(self.top_k).values[:, -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < least, -torch.inf)
        chosen = [
            torch.multinomial(row, 1, generator=self._generator(key))
            for row, key in zip(scores_BV.softmax(-1), keys, strict=True)
        ]
        return torch.cat(chosen)

    def _generator(self, key: tuple[int, int]) -> torch.Generator:
        return torch.Generator().manual_seed(digest((self.seed, *key)))


class _Batch(NamedTuple):
    requests: tuple[int, ...]
    cache: KVCache


class StageDecoder:
    """Caches and forward passes of one stage.

    Args:
        runner: The stage.
        as_inputs: How the module is called with tokens and a cache.
        sampling: How the last stage chooses tokens.
    """

    def __init__(self, runner: StageRunner, as_inputs: AsInputs, sampling: Sampling) -> None:
        self.runner = runner
        self._as_inputs = as_inputs
        self._sampling = sampling
        self._batches: dict[int, _Batch] = {}
        self._shapes: dict[tuple[int, int], Shapes] = {}

    def buffers(self, order: Order) -> list[torch.Tensor]:
        """Returns memory for what the previous stage sends for an order."""
        spec = self._shapes_of(order).received
        return [] if spec is None else [leaf.empty() for leaf in spec.tensors]

    def run(
        self, order: Order, prompt: torch.Tensor, received: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Runs one order.

        Args:
            order: PREFILL or DECODE.
            prompt: Tokens of the chunk; of a DECODE they are in its rows.
            received: From the previous stage.

        Returns:
            What the next stage gets; of the last stage, one token per row.
        """
        batch = self._batch_of(order)
        batch.cache.begin(order.size)
        newest = torch.tensor([token for _, token in order.rows])
        tokens = prompt if order.kind is Kind.PREFILL else newest
        tokens_BT = tokens.view(len(order.rows), -1).to(self.runner.device)
        output = self._forward(tokens_BT, batch.cache, received, self._shapes_of(order))
        batch.cache.commit()
        return [self._choose(output, batch, order)] if self.runner.is_last else _sent(output)

    def free(self, slot: int) -> None:
        """Drops the cache of a slot."""
        self._batches.pop(slot, None)

    # ------------------------------------------------------------ parts of it

    def _forward(
        self,
        tokens_BT: torch.Tensor,
        cache: KVCache,
        received: Sequence[torch.Tensor],
        shapes: Shapes,
    ) -> Any:
        args, kwargs = as_call(self._as_inputs(tokens_BT, cache))
        arrived = [tensor.to(self.runner.device) for tensor in received]
        return self.runner.forward(args, kwargs, arrived, shapes)

    def _choose(self, output: Any, batch: _Batch, order: Order) -> torch.Tensor:
        if not order.is_last:
            return torch.tensor([_NO_TOKEN])
        scores = getattr(output, "logits", output)
        scores = scores[0] if isinstance(scores, tuple) else scores
        keys = list(zip(batch.requests, batch.cache.lengths, strict=True))
        return self._sampling.choose(scores[:, -1], keys)

    def _shapes_of(self, order: Order) -> Shapes:
        """Finds what crosses stages, once per size: tokens that were seen do not change it."""
        if self.runner.is_first:
            return _NO_SHAPES
        size = len(order.rows), order.size
        if size not in self._shapes:
            device = self.runner.device
            sketch = KVCache([0] * size[0], device, is_sketch=True)
            sketch.begin(order.size)
            tokens = torch.zeros(size, dtype=torch.int64, device=device)
            self._shapes[size] = self.runner.shapes(*as_call(self._as_inputs(tokens, sketch)))
        return self._shapes[size]

    def _batch_of(self, order: Order) -> _Batch:
        """Returns the cache of an order's rows, after others have joined or left."""
        batch = self._batches.get(order.slot)
        if order.kind is Kind.PREFILL and order.start == 0:
            batch = _Batch(order.requests, KVCache([0], self.runner.device))
        elif batch is None or batch.requests != order.requests:
            batch = self._regrouped(order)
        self._batches[order.slot] = batch
        return batch

    def _regrouped(self, order: Order) -> _Batch:
        """Gathers a batch from the group's old one and from prompts that are done."""
        places = {
            request: (slot, row)
            for slot, batch in self._batches.items()
            for row, request in enumerate(batch.requests)
        }
        found = [places[request] for request in order.requests]
        cache = KVCache.gathered([(self._batches[slot].cache, row) for slot, row in found])
        for slot, _ in found:
            self._batches.pop(slot, None)
        return _Batch(order.requests, cache)


def _sent(output: Any) -> list[torch.Tensor]:
    return [tensor.contiguous().cpu() for tensor in tensors_of(output)]
