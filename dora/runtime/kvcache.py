"""Keys and values of earlier tokens, for the layers that one stage runs.

The protocol between a module and its cache is one call: attention gives what it has computed for
the new tokens and gets all that it may look at::

    def forward(self, x, cache):
        q, k, v = ...                                # (batch, heads, new tokens, width)
        k, v = cache.update(k, v, self)              # (batch, heads, all tokens, width)
        return scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)

Rows of a batch may be of unlike length. They end in the same column, so that a new token is one
more column for all of them and nothing is copied; the shorter rows are padded on the left::

    row 0   . . a b c d | e        `.` padding: zeros, which `mask` hides
    row 1   . . . . p q | r        `|` tokens of the forward pass that runs
    row 2   s t u v w x | y
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

# Columns of the first allocation; they double from there.
_MIN_ROOM = 64

AsInputs = Callable[[torch.Tensor, "KVCache"], Any]


class KVCache:
    """Keys and values of a batch of requests, by layer.

    Args:
        lengths: Tokens that each row has seen.
        device: Of masks and positions.
        is_sketch: Keeps nothing: for finding shapes without data, with no token seen before.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        is_sketch: bool = False,
    ) -> None:
        self.lengths = tuple(lengths)
        self.device = torch.device(device)
        self._is_sketch = is_sketch
        self._layers: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._width = max(self.lengths)
        self._end = self._width
        self._room = 0
        self._new = 0

    def __repr__(self) -> str:
        """Names what shapes depend on."""
        return f"KVCache({'sketch' if self._is_sketch else self.lengths})"

    # ------------------------------------------------------------ what a module uses

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: Hashable, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values of the new tokens, returns those of all tokens.

        Args:
            keys: (batch, heads, new tokens, width), or any shape with tokens in the last but one
                dimension and the batch in the first.
            values: The same; their width may differ.
            layer: Tells the layers apart: a number, or the module itself.
        """
        for tensor in (keys, values):
            if tensor.shape[0] != len(self.lengths) or tensor.shape[-2] != self._new:
                raise ValueError(
                    f"cache.update: given shape {tuple(tensor.shape)}, allowed: "
                    f"({len(self.lengths)}, heads, {self._new}, width): batch first, new tokens "
                    "last but one"
                )
        if self._is_sketch:
            return keys, values
        if layer not in self._layers:
            self._layers[layer] = (self._empty(keys), self._empty(values))
        whole = []
        for kept, new in zip(self._layers[layer], (keys, values), strict=True):
            kept.narrow(-2, self._end, self._new).copy_(new)
            whole.append(kept.narrow(-2, self._end - self._width, self._width + self._new))
        return whole[0], whole[1]

    @cached_property
    def positions(self) -> torch.Tensor:
        """Place of every new token in its request, (batch, new tokens)."""
        seen = torch.tensor(self.lengths, device=self.device)
        return seen[:, None] + torch.arange(self._new, device=self.device)

    @cached_property
    def is_token(self) -> torch.Tensor:
        """Which columns are no padding: ones and zeros, (batch, all tokens)."""
        padding = self._width - torch.tensor(self.lengths, device=self.device)
        columns = torch.arange(self._width + self._new, device=self.device)
        return (columns >= padding[:, None]).long()

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """What each new token may look at, (batch, 1, new tokens, all tokens); None: everything."""
        if self._new == 1 and min(self.lengths) == self._width:
            return None
        columns = torch.arange(self._width + self._new, device=self.device)
        causal = columns <= self._width + torch.arange(self._new, device=self.device)[:, None]
        return causal & self.is_token[:, None, None, :].bool()

    # ------------------------------------------------------------ what transformers' models ask

    is_compileable = False

    @property
    def is_sliding(self) -> list[bool]:
        """Every layer keeps all tokens; the mask of a sliding window hides the old ones."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of columns before the new tokens, also for layers of other stages."""
        return self._width

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Returns the number of columns with the new tokens, and the first of them."""
        return self._width + self._new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no limit."""
        return -1

    # ------------------------------------------------------------ what the runtime does with it

    def begin(self, num_tokens: int) -> None:
        """Makes room for a forward pass of so many tokens per row."""
        self._new = num_tokens
        for name in ("positions", "is_token", "mask"):
            self.__dict__.pop(name, None)
        if self._is_sketch:
            # Read once here: a tensor made inside a block would have no data.
            _ = self.positions, self.mask, self.is_token
        elif self._end + num_tokens > self._room:
            self._grow()

    def commit(self) -> None:
        """Counts the new tokens as seen, after the forward pass."""
        self.lengths = tuple(length + self._new for length in self.lengths)
        self._width += self._new
        self._end += self._new
        self._new = 0

    @classmethod
    def gathered(cls, rows: Sequence[tuple[KVCache, int]]) -> KVCache:
        """Returns a copy of the given rows of the given caches as one batch."""
        first = rows[0][0]
        batch = cls([cache.lengths[row] for cache, row in rows], first.device)
        batch._room = _room_for(batch._width)
        for layer, tensors in first._layers.items():
            batch._layers[layer] = (
                batch._collect(tensors[0], [(c, c._layers[layer][0][r], r) for c, r in rows]),
                batch._collect(tensors[1], [(c, c._layers[layer][1][r], r) for c, r in rows]),
            )
        return batch

    def _collect(
        self, like: torch.Tensor, rows: Sequence[tuple[KVCache, torch.Tensor, int]]
    ) -> torch.Tensor:
        # Zeros, since garbage may be NaN, which no mask hides.
        whole = like.new_zeros(len(rows), *like.shape[1:-2], self._room, like.shape[-1])
        for target, (cache, source, row) in zip(whole, rows, strict=True):
            count = cache.lengths[row]
            target.narrow(-2, self._width - count, count).copy_(
                source.narrow(-2, cache._end - count, count)
            )
        return whole

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(*like.shape[:-2], self._room, like.shape[-1])

    def _grow(self) -> None:
        """Doubles the columns and drops those on the left that no row needs any more."""
        self._room = _room_for(self._width + self._new)
        start = self._end - self._width
        for layer, tensors in self._layers.items():
            grown = [self._empty(tensor) for tensor in tensors]
            for new, old in zip(grown, tensors, strict=True):
                new.narrow(-2, 0, self._width).copy_(old.narrow(-2, start, self._width))
            self._layers[layer] = (grown[0], grown[1])
        self._end = self._width


def _room_for(num_tokens: int) -> int:
    return max(_MIN_ROOM, 2 * num_tokens)


def inputs_of(module: nn.Module) -> AsInputs:
    """Returns how a module is called with new tokens and a cache, by what its forward takes.

    Raises:
        ValueError: It takes no cache.
    """
    names = inspect.signature(module.forward).parameters
    if "past_key_values" in names:
        return lambda tokens, cache: {
            name: value
            for name, value in {
                "input_ids": tokens,
                "attention_mask": cache.is_token,
                "position_ids": cache.positions,
                "past_key_values": cache,
                "use_cache": True,
                "logits_to_keep": 1,
            }.items()
            if name in names
        }
    if "cache" in names:
        first = next(iter(names))
        return lambda tokens, cache: {first: tokens, "cache": cache}
    raise ValueError(
        f"{type(module).__name__}.forward: given {list(names)}, allowed: one that takes 'cache' "
        "(see docs/generation.md) or 'past_key_values'; or pass as_inputs"
    )
