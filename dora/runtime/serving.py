"""What the leader of a `generate` call knows; it outlives the plan with which the call began."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch

from dora.live.tokens import Tokens
from dora.runtime.batcher import Batcher, Generated
from dora.runtime.orders import Order
from dora.spec import Plan

OnToken = Callable[[int, int], None]


class Serving:
    """Prompts, where they come from, and who hears of their tokens.

    Args:
        prompts: None among them: nothing at the moment.
        limit_of: Of new tokens, by request.
        on_token: Called with (request, token) of every new token.
        max_in_flight: Requests that hold a cache at a time.
        prefill_chunk: Tokens of a prompt that run at a time.
        eos: Tokens that end a request.
        notes: Takes note of prompts and tokens, if somebody watches.
    """

    def __init__(
        self,
        prompts: Iterable[Sequence[int] | None],
        limit_of: Callable[[int], int],
        on_token: OnToken | None,
        *,
        max_in_flight: int,
        prefill_chunk: int,
        eos: Collection[int],
        notes: Tokens | None = None,
    ) -> None:
        self._source: Iterator[Sequence[int] | None] | None = iter(prompts)
        self._limit_of = limit_of
        self._on_token = on_token
        self._max_in_flight = max_in_flight
        self._prefill_chunk = prefill_chunk
        self._eos = eos
        self._notes = notes
        self._batcher: Batcher | None = None

    @property
    def batcher(self) -> Batcher:
        """Decides on orders; there is one after `begin`."""
        assert self._batcher is not None
        return self._batcher

    @property
    def may_get_more(self) -> bool:
        """Whether prompts may still come."""
        return self._source is not None

    def begin(self, plan: Plan) -> None:
        """Starts on a plan; what another one has begun runs anew, behind the tokens it has."""
        before, routes = self._batcher, distinct_routes(plan)
        self._batcher = Batcher(
            turns=[routes.index(route) for route in plan.routes],
            num_stages=len(plan.stages),
            max_in_flight=self._max_in_flight,
            prefill_chunk=self._prefill_chunk,
            eos=self._eos,
        )
        if before is not None:
            self._batcher.replay(before)

    def goes_on(self) -> bool:
        """Takes the prompts that are there; returns whether there is anything left to do."""
        for prompt in self._source or ():
            if prompt is None:
                return True
            request, now_s = self.batcher.num_requests, time.perf_counter()
            self.batcher.add(prompt, self._limit_of(request), now_s)
            if self._notes is not None:
                self._notes.arrived(request, now_s)
        self._source = None
        return not self.batcher.is_idle

    def account(self, order: Order, tokens: torch.Tensor) -> None:
        """Takes the tokens that came of an order."""
        now_s = time.perf_counter()
        for request, token in self.batcher.done(order, tokens.tolist(), now_s):
            if self._notes is not None:
                self._notes.came(request, now_s, is_last=request in self.batcher.results)
            if self._on_token is not None:
                self._on_token(request, token)

    def results(self) -> list[Generated]:
        """Returns what became of the prompts, in their order."""
        return [self.batcher.results[i] for i in range(self.batcher.num_requests)]


def distinct_routes(plan: Plan) -> list[tuple[int, ...]]:
    """Returns the routes of a plan without repetition."""
    return sorted(set(plan.routes))
