"""The loop of one `generate` call: one device leads, the others follow its orders.

    leader    order ------------------> every device of the route
              tokens of prompts ------> every device of the route
    stage k   hidden states ----------> stage k + 1
    last      tokens -----------------> leader

The leader is the first device of the first stage, unless the plan changes meanwhile. Orders are
small, urgent, and do not go through the stages, so that a device has posted its receive by the time
the hidden states come. Tokens and the hidden states of tokens that are decoded are urgent; those of
prompts are not, and a device that has both runs what is decoded first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from dora.runtime.batcher import Batcher, Generated
from dora.runtime.decoder import StageDecoder
from dora.runtime.inbox import ORDERS, PROMPTS, TOKENS, Inbox, Outbox
from dora.runtime.orders import Kind, Order, empty_order
from dora.runtime.priority import ACTIVATION, URGENT, Priority
from dora.runtime.serving import Serving, distinct_routes
from dora.runtime.tags import FORWARD, HEADER_TAG, LOSS_TAG, RESULT, first_tag
from dora.runtime.transport import Transport
from dora.spec import Plan

# How often a leader with nothing to run looks for prompts: a thousandth of what a user notices,
# and next to no processor time.
_POLL_S = 0.002
# Messages to a silent device per timeout, so that one late message fails nothing.
_BEATS = 4


class _Work(NamedTuple):
    """An order whose inputs have arrived."""

    order: Order
    prompt: torch.Tensor
    received: list[torch.Tensor]


class _Answer(NamedTuple):
    """What came of an order."""

    order: Order
    tokens: torch.Tensor


class TokenLoop:
    """This rank's part in one `generate` call.

    Args:
        plan: The placement.
        rank: This process.
        leader: Rank that gives the orders.
        members: Ranks that take part.
        decoder: Runs this rank's stage.
        transport: Carries the messages.
        max_rows: Of one order.
        timeout_s: Limit of every single wait.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        decoder: StageDecoder,
        transport: Transport,
        *,
        leader: int,
        members: Sequence[int],
        max_rows: int,
        timeout_s: float,
    ) -> None:
        self._rank = rank
        self._decoder = decoder
        self._transport = transport
        self._max_rows = max_rows
        self._timeout_s = timeout_s
        self._leader = leader
        self._routes = [
            [plan.rank_of(stage, replica) for stage, replica in enumerate(route)]
            for route in distinct_routes(plan)
        ]
        self._inbox = Inbox(timeout_s)
        # A route has at most as many chunks under way as stages: the sends before have arrived.
        self._outbox = Outbox(len(plan.stages), timeout_s)
        self._commanded_s = dict.fromkeys(set(members) - {rank}, time.monotonic())

    # ------------------------------------------------------------ following

    def follow(self) -> list[Generated]:
        """Runs the leader's orders until it stops; returns what it then sends of the results."""
        try:
            self._expect_order()
            while True:
                item = self._inbox.take()
                if isinstance(item, _Work):
                    self._run(item)
                    continue
                order = Order.from_tensor(item)
                if order.kind is Kind.STOP:
                    return self._receive_results(order.size)
                if order.kind is not Kind.BEAT:
                    self._take_part(order)
                self._expect_order()
        finally:
            self._inbox.close()

    def _expect_order(self) -> None:
        order = empty_order(self._max_rows)
        pending = self._transport.receive(order, self._leader, HEADER_TAG, "the next order")
        self._inbox.expect(ORDERS, self._leader, order, [pending])

    def _receive_results(self, num_bytes: int) -> list[Generated]:
        self._outbox.finish()
        if not num_bytes:
            return []
        data = torch.empty(num_bytes, dtype=torch.uint8)
        pending = self._transport.receive(data, self._leader, LOSS_TAG, "the results")
        pending.wait(self._timeout_s)
        rows = json.loads(data.numpy().tobytes())
        return [Generated(tuple(tokens), tuple(times), end) for tokens, times, end in rows]

    # ------------------------------------------------------------ leading

    def lead(self, serving: Serving, output_ranks: Collection[int]) -> list[Generated]:
        """Gives orders until every prompt has its tokens; returns them if this rank gets any."""
        try:
            while serving.goes_on():
                item, order = self._inbox.take(0), None
                if item is None and (order := serving.batcher.next_order()) is not None:
                    self._issue(order, serving.batcher)
                elif item is None:
                    beat_s = self._timeout_s / _BEATS
                    item = self._inbox.take(_POLL_S if serving.may_get_more else beat_s)
                if isinstance(item, _Work):
                    self._run(item)
                elif item is not None:
                    serving.account(*item)
                self._beat()
            self._stop(serving.results(), output_ranks)
            return serving.results() if self._rank in output_ranks else []
        finally:
            self._inbox.close()

    def _issue(self, order: Order, batcher: Batcher) -> None:
        ranks = self._routes[order.route]
        is_prefill = order.kind is Kind.PREFILL
        prompt = torch.tensor(batcher.prompt(order) if is_prefill else [], dtype=torch.int64)
        for rank in ranks:
            if rank != self._rank:
                self._command(rank, order, prompt)
        if order.kind is not Kind.FREE and ranks[-1] != self._rank:
            tokens = torch.empty(len(order.rows), dtype=torch.int64)
            tag, action = first_tag(RESULT, order.slot), f"tokens of {order}"
            pending = self._transport.receive(tokens, ranks[-1], tag, action)
            self._inbox.expect(_urgency(order), ranks[-1], _Answer(order, tokens), [pending])
        if self._rank in ranks:
            self._take_part(order, prompt)

    def _command(self, rank: int, order: Order, prompt: torch.Tensor | None = None) -> None:
        self._commanded_s[rank] = time.monotonic()
        action, numbers = str(order), order.to_tensor(self._max_rows)
        sends = [self._transport.send(numbers, rank, HEADER_TAG, action, priority=URGENT)]
        if prompt is not None and len(prompt):
            tag, priority = _forward_tag(order), _priority(order)
            sends.append(self._transport.send(prompt, rank, tag, action, priority=priority))
        self._outbox.put((rank, order.slot), sends)

    def _beat(self) -> None:
        """Lets devices without work know that this one is alive."""
        latest_s = time.monotonic() - self._timeout_s / _BEATS
        for rank, commanded_s in self._commanded_s.items():
            if commanded_s < latest_s:
                self._command(rank, Order(Kind.BEAT))

    def _stop(self, results: Sequence[Generated], output_ranks: Collection[int]) -> None:
        data = torch.frombuffer(bytearray(json.dumps(results).encode()), dtype=torch.uint8)
        for rank in list(self._commanded_s):
            wanted = rank in output_ranks
            self._command(rank, Order(Kind.STOP, size=len(data) if wanted else 0))
            if wanted:
                send = self._transport.send(data, rank, LOSS_TAG, "the results")
                self._outbox.put((rank, -1), [send])
        self._outbox.finish()

    # ------------------------------------------------------------ both

    def _take_part(self, order: Order, prompt: torch.Tensor | None = None) -> None:
        """Gets what an order needs on this stage; the leader has the prompt."""
        if order.kind is Kind.FREE:
            self._decoder.free(order.slot)
            return
        ranks, tag, action = self._routes[order.route], _forward_tag(order), str(order)
        place = ranks.index(self._rank)
        src = ranks[place - 1] if place else self._leader
        received = self._decoder.buffers(order)
        pending = [
            self._transport.receive(x, src, tag + 1 + i, action) for i, x in enumerate(received)
        ]
        if prompt is None:
            prompt = torch.empty(order.size if order.kind is Kind.PREFILL else 0, dtype=torch.int64)
            if len(prompt):
                pending.append(self._transport.receive(prompt, self._leader, tag, action))
        work = _Work(order, prompt, received)
        if pending:
            self._inbox.expect(_urgency(order), src, work, pending)
        else:
            self._inbox.put(_urgency(order), work)

    def _run(self, work: _Work) -> None:
        """Runs an order on this stage and passes on what came of it."""
        order = work.order
        tensors = self._decoder.run(order, work.prompt, work.received)
        ranks = self._routes[order.route]
        place = ranks.index(self._rank)
        if place + 1 < len(ranks):
            dst, tag, priority = ranks[place + 1], _forward_tag(order) + 1, _priority(order)
        elif self._rank == self._leader:
            self._inbox.put(_urgency(order), _Answer(order, tensors[0]))
            return
        else:
            dst, tag, priority = self._leader, first_tag(RESULT, order.slot), URGENT
        sends = [
            self._transport.send(tensor, dst, tag + i, str(order), priority=priority)
            for i, tensor in enumerate(tensors)
        ]
        self._outbox.put(order.slot, sends)


def _forward_tag(order: Order) -> int:
    """Returns the tag of a chunk's tokens; those of the hidden states follow."""
    return first_tag(FORWARD, order.slot)


def _urgency(order: Order) -> int:
    return TOKENS if order.kind is Kind.DECODE else PROMPTS


def _priority(order: Order) -> Priority:
    if order.kind is Kind.DECODE:
        return URGENT
    return ACTIVATION._replace(deadline=float(order.requests[0]))
