"""Which tokens run next: continuous batching at the granularity of tokens, as pure bookkeeping.

A request waits for a place, runs its prompt in chunks, then joins the smallest group of its route;
a group is a batch that is decoded together, and there are as many groups as stages, so that each
stage has one. Requests leave a group with their last token. One order of a group is under way at a
time, because the next needs its tokens.

Decoding goes before prompts, but no prompt starves: after an order of every group, a chunk has its
turn (as in: Sarathi-Serve, Agrawal et al., 2024, https://arxiv.org/abs/2403.02310).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from dora.runtime.orders import Kind, Order


class Generated(NamedTuple):
    """What became of one prompt.

    Attributes:
        tokens: New ones, without the prompt; an end token is the last of them.
        token_s: When each was there, in seconds since the prompt was.
        ended_by: 'eos', or 'length' at `max_new_tokens`.
    """

    tokens: tuple[int, ...]
    token_s: tuple[float, ...]
    ended_by: Literal["eos", "length"]

    @property
    def ttft_s(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.token_s[0]

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; 0 if there is one only."""
        later = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / later if later else 0.0


@dataclass
class Request:
    """One prompt on its way; times are those of the caller's clock."""

    index: int
    prompt: Sequence[int]  # what has to run before its next token
    limit: int
    arrived_s: float
    route: int = 0
    slot: int = -1
    issued: int = 0  # tokens of the prompt
    num_replayed: int = 0  # tokens of it that are no new ones
    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    def replayed(self, route: int) -> Request:
        """Returns it as it comes anew, with the tokens that it has as a part of its prompt."""
        prompt = [*self.prompt, *self.tokens[self.num_replayed :]]
        return replace(
            self, prompt=prompt, route=route, slot=-1, issued=0, num_replayed=len(self.tokens)
        )

    def result(self, ended_by: Literal["eos", "length"]) -> Generated:
        """Returns what became of it."""
        times_s = tuple(time_s - self.arrived_s for time_s in self.token_s)
        return Generated(tuple(self.tokens), times_s, ended_by)


@dataclass
class _Group:
    slot: int
    route: int
    members: list[Request] = field(default_factory=list)
    is_busy: bool = False
    issued: int = 0  # number of its latest order


class Batcher:
    """Decides on orders; knows nothing of ranks or tensors.

    Args:
        turns: Route of request i, as an index, is turns[i % len(turns)].
        num_stages: Of a route.
        max_in_flight: Requests that hold a cache at a time.
        prefill_chunk: Tokens of a prompt that run at a time.
        eos: Tokens that end a request.

    Attributes:
        results: Of the requests that have ended, by index.
    """

    def __init__(
        self,
        *,
        turns: Sequence[int],
        num_stages: int,
        max_in_flight: int,
        prefill_chunk: int,
        eos: Collection[int] = (),
    ) -> None:
        self._turns = turns
        self._num_stages = num_stages
        self._prefill_chunk = prefill_chunk
        self._eos = frozenset(eos)
        self._slots = list(range(max_in_flight))[::-1]
        routes = sorted(set(turns))
        self._groups = [
            _Group(max_in_flight + i, route)
            for i, route in enumerate(r for r in routes for _ in range(num_stages))
        ]
        self._num_requests = 0
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._freed: list[Order] = []
        self._chunks = [0] * (max(turns) + 1)  # under way, by route
        self._orders = 0
        self._latest_chunk = 0
        self.results: dict[int, Generated] = {}

    @property
    def num_requests(self) -> int:
        """Prompts so far."""
        return self._num_requests

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended and is forgotten everywhere."""
        return not self._requests and not self._freed

    def add(self, prompt: Sequence[int], limit: int, now_s: float) -> None:
        """Takes a prompt that arrived now; at most `limit` tokens follow it."""
        index, self._num_requests = self._num_requests, self._num_requests + 1
        self._queue(Request(index, prompt, limit, now_s, self._route(index)))

    def replay(self, before: Batcher) -> None:
        """Takes all that another one knows, whose caches are lost."""
        self.results = before.results
        self._num_requests = before._num_requests
        for index, request in sorted(before._requests.items()):
            self._queue(request.replayed(self._route(index)))

    def prompt(self, order: Order) -> Sequence[int]:
        """Returns the tokens of a PREFILL order."""
        return self._requests[order.rows[0][0]].prompt[order.start : order.end]

    def next_order(self) -> Order | None:
        """Returns what to run next, which counts as under way; None: wait for tokens."""
        if self._freed:
            return self._freed.pop()
        while self._waiting and self._slots:
            request = self._waiting.popleft()
            request.slot = self._slots.pop()
            self._prefilling.append(request)
        groups = [g for g in self._groups if g.members and not g.is_busy]
        chunk = next(
            (r for r in self._prefilling if self._chunks[r.route] < self._num_stages), None
        )
        in_use = sum(1 for group in self._groups if group.members)
        if groups and (chunk is None or self._orders - self._latest_chunk < in_use):
            return self._decode(min(groups, key=lambda group: group.issued))
        return None if chunk is None else self._prefill(chunk)

    def done(self, order: Order, tokens: Sequence[int], now_s: float) -> list[tuple[int, int]]:
        """Takes the tokens that came of an order, one per row.

        Returns:
            (request, token) of every new token.
        """
        requests = [self._requests[index] for index in order.requests]
        if order.kind is Kind.DECODE:
            group = next(group for group in self._groups if group.slot == order.slot)
            group.is_busy = False
        else:
            self._chunks[order.route] -= 1
            if not order.is_last:
                return []
            group = self._smallest_group(order.route)
            group.members += requests
        for request, token in zip(requests, tokens, strict=True):
            request.tokens.append(token)
            request.token_s.append(now_s)
            if token in self._eos:
                self._end(request, group, "eos", order)
            elif len(request.tokens) == request.limit:
                self._end(request, group, "length", order)
        return list(zip(order.requests, tokens, strict=True))

    # ------------------------------------------------------------ orders

    def _route(self, index: int) -> int:
        return self._turns[index % len(self._turns)]

    def _queue(self, request: Request) -> None:
        self._requests[request.index] = request
        self._waiting.append(request)

    def _decode(self, group: _Group) -> Order:
        self._orders += 1
        group.is_busy, group.issued = True, self._orders
        rows = tuple((request.index, request.tokens[-1]) for request in group.members)
        return Order(Kind.DECODE, group.slot, group.route, rows=rows)

    def _prefill(self, request: Request) -> Order:
        self._latest_chunk = self._orders
        self._chunks[request.route] += 1
        start = request.issued
        request.issued = min(start + self._prefill_chunk, len(request.prompt))
        is_last = request.issued == len(request.prompt)
        if is_last:
            self._prefilling.remove(request)
        count = request.issued - start
        rows = ((request.index, 0),)
        return Order(
            Kind.PREFILL, request.slot, request.route, start, count, is_last=is_last, rows=rows
        )

    def _smallest_group(self, route: int) -> _Group:
        groups = (group for group in self._groups if group.route == route)
        return min(groups, key=lambda group: len(group.members))

    def _end(
        self, request: Request, group: _Group, ended_by: Literal["eos", "length"], order: Order
    ) -> None:
        """Forgets a request; its cache goes with the next order of its group, or by FREE."""
        self.results[request.index] = request.result(ended_by)
        del self._requests[request.index]
        self._slots.append(request.slot)
        group.members.remove(request)
        if order.kind is Kind.PREFILL:
            self._freed.append(Order(Kind.FREE, request.slot, request.route))
        elif not group.members:
            self._freed.append(Order(Kind.FREE, group.slot, group.route))
