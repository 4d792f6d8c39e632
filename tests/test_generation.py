"""Tokens from a model over several devices are those of the plain model, whoever else is served."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make
from plans import make_plan
from ranks import outcomes, run_ranks
from test_examples import torchrun
from torch import nn

from dora import DoraParallel, partition
from dora.errors import DoraError, PeerLostError, ProtocolError
from dora.runtime.batcher import Batcher, Generated
from dora.runtime.inbox import ORDERS, PROMPTS, TOKENS, Inbox
from dora.runtime.kvcache import KVCache
from dora.runtime.orders import Kind, Order, empty_order

pytestmark = pytest.mark.timeout(120)

VOCABULARY = 31


class Block(nn.Module):
    """Attention and an MLP; `cache` is the whole protocol."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        q, k, v = (
            h.unflatten(-1, (2, -1)).transpose(1, 2) for h in self.qkv(self.norm(x)).chunk(3, -1)
        )
        if cache is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.update(k, v, self)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
        return x + self.mlp(x + attended.transpose(1, 2).flatten(2))


class TinyLM(nn.Module):
    """A decoder with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 16)
        self.positions = nn.Embedding(128, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        places = torch.arange(tokens.shape[1]) if cache is None else cache.positions
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x, cache=cache)
        return self.head(x)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = TinyLM() if name == "tiny" else make(name).module
    return module.eval()


def sample_of(name: str) -> Any:
    tokens = torch.zeros(2, 4, dtype=torch.long)
    return tokens if name == "tiny" else {"input_ids": tokens}


def build(
    name: str, shares: Any, *, idle: int = 0, plan: Any = None, **options: Any
) -> DoraParallel:
    chain = partition(model_of(name), *as_call(sample_of(name)))
    fields = {"num_microbatches": 1, **(plan or {})}
    made = make_plan(chain.num_blocks, shares, idle=idle, **fields)
    return DoraParallel(chain, made, seed=3, **options).eval()


def as_call(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), sample) if isinstance(sample, dict) else ((sample,), {})


def prompts_of(count: int, longest: int = 40) -> list[list[int]]:
    numbers = random.Random(count)
    return [
        [numbers.randrange(1, VOCABULARY) for _ in range(numbers.randint(1, longest))]
        for _ in range(count)
    ]


def plain_greedy(module: nn.Module, prompt: Sequence[int], limit: int, eos: int) -> list[int]:
    """Runs the plain module on all tokens, again for each new one."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        with torch.no_grad():
            output = module(torch.tensor([tokens]))
        tokens.append(int(getattr(output, "logits", output)[0, -1].argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


# ---------------------------------------------------------------- equal to the plain module

PLANS: dict[str, dict[str, Any]] = {
    "two": {"shares": [[1], [1]], "idle": 1},
    "three": {"shares": [[1], [1], [1]]},
    "two_to_one": {"shares": [[2, 1], [1]], "plan": {"num_microbatches": 3}},
    "one_to_two": {"shares": [[1], [1, 1]], "plan": {"num_microbatches": 2}},
    "single": {"shares": [[1]], "idle": 2},
}
EOS = 7


def generate_by_plans(rank: int, name: str, transport: str, plans: list[str]) -> dict[str, Any]:
    prompts, limits = prompts_of(6, 40 if name == "tiny" else 12), [1, 9, 3, 8, 5, 2]
    found: dict[str, Any] = {}
    for plan in plans:
        model = build(name, **PLANS[plan], transport=transport)
        options = {"eos": EOS, "max_in_flight": 4, "prefill_chunk": 8}
        found[plan] = [g.tokens for g in model.generate(prompts, limits, **options)]
        drawn = model.generate(prompts, 4, temperature=1.5, top_k=9, max_in_flight=3)
        found[f"{plan} drawn"] = [g.tokens for g in drawn]
        model.transport.close()
    if rank == 0:
        plain = model_of(name)
        found["plain"] = [
            tuple(plain_greedy(plain, prompt, limit, EOS))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
    return found


@pytest.mark.parametrize(
    ("name", "transport", "plans"),
    [
        ("tiny", "dora", list(PLANS)),
        ("qwen3", "gloo", ["single", "two_to_one"]),
        ("gpt2", "gloo-chunked", ["three"]),
    ],
)
def test_tokens_are_those_of_the_plain_module(name, transport, plans):
    by_rank = run_ranks(3, generate_by_plans, name, transport, plans, timeout_s=110)
    expected = by_rank[0].pop("plain")
    assert len(set(expected)) > 3, "the model says nothing of interest"
    for found in by_rank:
        for plan in plans:
            assert found[plan] == expected, plan
            # What is drawn depends on seed, request and position only.
            assert found[f"{plan} drawn"] == by_rank[0][f"{plans[0]} drawn"], plan


def serve(rank: int) -> dict[str, Any]:
    """Prompts that come one by one, and what is told on the way."""
    model = build("tiny", [[1], [1]], outputs_to=0)
    heard: list[tuple[int, int]] = []

    def arriving() -> Iterator[list[int] | None]:
        for prompt in prompts_of(5):
            yield prompt
            for _ in range(3):
                yield None

    found = model.generate(arriving(), 6, on_token=lambda *pair: heard.append(pair))
    again = model.generate(torch.tensor([[1, 2], [3, 4]]), 2)
    return {"found": found, "heard": heard, "again": again}


def test_prompts_may_arrive_while_others_are_served():
    first, second = run_ranks(2, serve)
    plain = model_of("tiny")
    assert [list(g.tokens) for g in first["found"]] == [
        plain_greedy(plain, prompt, 6, -1) for prompt in prompts_of(5)
    ]
    for request, generated in enumerate(first["found"]):
        assert generated.ended_by == "length"
        assert [token for r, token in first["heard"] if r == request] == list(generated.tokens)
        assert 0 < generated.ttft_s < generated.token_s[-1]
        assert generated.tpot_s > 0
    assert [len(g.tokens) for g in first["again"]] == [2, 2]
    assert second == {"found": [], "heard": [], "again": []}


@pytest.mark.slow
def test_example_says_what_the_plain_model_says():
    assert "as the plain model: True" in torchrun("generate_lm.py", 2, "--quick")


# ---------------------------------------------------------------- failures


def generate_with(rank: int, victim: int, action: Any, **options: Any) -> None:
    model = build("tiny", [[1], [1], [1]], idle=1, **options)
    model.generate(prompts_of(3), 4)
    if rank == victim:
        first = model.plan.stages[rank].first_block
        model.module.get_submodule(model.chain.names[first]).register_forward_pre_hook(action)
    try:
        model.generate(prompts_of(3), 4)
    finally:
        with pytest.raises(DoraError, match="failed before"):
            model.generate(prompts_of(3), 4)


def fail(*_: Any) -> None:
    raise ZeroDivisionError("the block divided by zero")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(unit: nn.Module, *_: Any) -> None:
    unit._forward_pre_hooks.clear()  # once
    time.sleep(7)


def generate_failing(rank: int, victim: int, transport: str) -> None:
    generate_with(rank, victim, fail, transport=transport)


def generate_dying(rank: int, victim: int) -> None:
    generate_with(rank, victim, die)


def generate_hanging(rank: int, victim: int) -> None:
    generate_with(rank, victim, hang, timeout_s=3.0)


@pytest.mark.parametrize(("victim", "transport"), [(0, "dora"), (1, "gloo")])
def test_failing_block_is_reported_on_every_rank(victim, transport):
    for rank, outcome in enumerate(outcomes(4, generate_failing, victim, transport)):
        if rank == victim:
            assert isinstance(outcome.error, ZeroDivisionError), outcome
        else:
            assert isinstance(outcome.error, PeerLostError), outcome
            assert f"rank {rank}:" in str(outcome.error)
            assert f"on rank {victim}: ZeroDivisionError: the block" in str(outcome.error)


def test_killed_rank_is_noticed_by_every_rank():
    results = outcomes(4, generate_dying, 2)
    assert results.pop(2).exitcode == -signal.SIGKILL
    assert all(isinstance(o.error, PeerLostError) for o in results), results
    assert any("of request" in str(o.error) and "rank 2 failed" in str(o.error) for o in results)


@pytest.mark.slow
def test_silent_rank_runs_into_the_timeout():
    results = outcomes(4, generate_hanging, 1)
    assert all(isinstance(o.error, PeerLostError) for o in results), results
    assert any("no answer within 3 s (timeout_s)" in str(o.error) for o in results)


def generate_and_lose(rank: int, victim: int) -> dict[str, Any]:
    """The victim is killed after some tokens; the others go on."""
    model = build("tiny", [[1], [1], [1]], snapshot_interval=1, timeout_s=10.0)
    passes: list[int] = []
    if rank == victim:
        first = model.plan.stages[rank].first_block
        unit = model.module.get_submodule(model.chain.names[first])
        unit.register_forward_pre_hook(lambda *_: passes.append(1) if len(passes) < 20 else die())
    heard: list[tuple[int, int]] = []
    options = {"max_in_flight": 3, "prefill_chunk": 16}
    found = model.generate(prompts_of(6), 8, on_token=lambda *pair: heard.append(pair), **options)
    again = model.generate(prompts_of(2), 3)
    facts = {"found": found, "heard": heard, "again": again, "leads": bool(heard)}
    model.close()
    return facts


@pytest.mark.parametrize("victim", [0, 1])
def test_requests_outlive_a_lost_device(victim):
    results = outcomes(3, generate_and_lose, victim)
    assert results.pop(victim).exitcode == -signal.SIGKILL
    plain = model_of("tiny")
    expected = [tuple(plain_greedy(plain, prompt, 8, -1)) for prompt in prompts_of(6)]
    for outcome in results:
        assert outcome.error is None, outcome.trace
        assert [g.tokens for g in outcome.value["found"]] == expected
        assert [len(g.tokens) for g in outcome.value["again"]] == [3, 3]
    (leader,) = [o.value for o in results if o.value["leads"]]
    for request, tokens in enumerate(expected):  # none lost, none told twice
        assert tuple(token for r, token in leader["heard"] if r == request) == tokens


class Cacheless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def misuse(rank: int) -> list[str]:
    model = build("tiny", [[1], [1]])
    chain = partition(Cacheless(), (torch.zeros(2, 3),))
    other = DoraParallel(chain, make_plan(chain.num_blocks, [[1], [1]])).eval()
    said = []
    for call in (
        lambda: model.train().generate([[1]], 1),
        lambda: model.eval().generate([[1], []], 1),
        lambda: model.generate([[1], [2]], [1]),
        lambda: model.generate([[1]], 1, temperature=-1.0),
        lambda: other.generate([[1]], 1),
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            call()
        said.append(str(caught.value))
    assert len(model.generate([], 1)) == 0
    assert len(model.generate([[1]], 1)) == 1  # none of it broke the job
    return said


def test_misuse_is_refused_before_anything_is_sent():
    for said in run_ranks(2, misuse):
        mode, empty, limits, heat, cacheless = said
        assert "model.eval()" in mode
        assert "prompts: given [], allowed: one token id or more" in empty
        assert "max_new_tokens: given 1 numbers" in limits
        assert "temperature: given -1.0" in heat
        assert "one that takes 'cache'" in cacheless


def other_prompts(rank: int) -> None:
    build("tiny", [[1], [1]]).generate([[1 + rank]], 1)


def test_different_prompts_are_a_protocol_error():
    errors = [o.error for o in outcomes(2, other_prompts)]
    assert all(isinstance(error, ProtocolError) for error in errors), errors


# ---------------------------------------------------------------- its parts


def next_token(request: int, position: int) -> int:
    return (request * 5 + position * 3) % 11


@settings(max_examples=60)
@given(
    prompts=st.lists(st.integers(1, 30), max_size=12),
    limit=st.integers(1, 9),
    turns=st.sampled_from([[0], [0, 1], [1, 0, 0]]),
    num_stages=st.integers(1, 4),
    max_in_flight=st.integers(1, 5),
    prefill_chunk=st.integers(1, 9),
    crash=st.sampled_from([0.0, 0.02]),
    seed=st.integers(0, 999),
)
def test_every_request_ends_with_its_tokens(
    prompts, limit, turns, num_stages, max_in_flight, prefill_chunk, crash, seed
):
    """Plays the devices: each lane of each route in order, the lanes at random, and crashes."""
    options = {"max_in_flight": max_in_flight, "prefill_chunk": prefill_chunk, "eos": [0]}
    batcher = Batcher(turns=turns, num_stages=num_stages, **options)
    dice = random.Random(seed)
    lanes: dict[tuple[Kind, int], list[Order]] = {}
    held: dict[int, int] = {}  # request -> tokens in its cache
    waiting = list(enumerate(prompts))
    while waiting or not batcher.is_idle:
        if dice.random() < crash:
            before, turns, num_stages = batcher, [0], dice.randint(1, 3)
            batcher = Batcher(turns=turns, num_stages=num_stages, **options)
            batcher.replay(before)
            lanes, held = {}, {}
        if waiting and dice.random() < 0.5:
            index, length = waiting.pop(0)
            batcher.add([index] * length, limit, 0.0)
        order = batcher.next_order()
        if order is not None and order.kind is not Kind.FREE:
            assert order.route == turns[order.requests[0] % len(turns)]
            lanes.setdefault((order.kind, order.route), []).append(order)
            assert len(lanes[order.kind, order.route]) <= num_stages
            assert len(order.rows) <= max_in_flight
        elif order is None and any(lanes.values()):
            lane = dice.choice([lane for lane in lanes.values() if lane])
            run_order(batcher, lane.pop(0), held, prompts)
            assert len(held) <= max_in_flight
    for index, length in enumerate(prompts):
        tokens = [next_token(index, length + i) for i in range(limit)]
        expected = tokens[: tokens.index(0) + 1] if 0 in tokens else tokens
        assert list(batcher.results[index].tokens) == expected
    assert not held


def run_order(batcher: Batcher, order: Order, held: dict[int, int], prompts: Sequence[int]) -> None:
    if order.kind is Kind.PREFILL:
        (request,) = order.requests
        length = prompts[request]
        assert list(batcher.prompt(order)) == [
            request if at < length else next_token(request, at)
            for at in range(order.start, order.end)
        ]
        assert held.get(request, 0) == order.start
        held[request] = order.end
    for request, token in order.rows if order.kind is Kind.DECODE else ():
        assert token == next_token(request, held[request])
        held[request] += 1
    batcher.done(order, [next_token(r, held[r]) for r in order.requests], 1.0)
    for request in order.requests:
        if request in batcher.results:
            del held[request]


def test_prompts_wait_for_what_is_decoded_but_do_not_starve():
    batcher = Batcher(turns=[0], num_stages=1, max_in_flight=3, prefill_chunk=1)
    batcher.add([1], 50, 0.0)
    batcher.done(batcher.next_order(), [1], 0.0)
    batcher.add([1] * 10, 1, 0.0)
    kinds = []
    while len(kinds) < 20:
        order = batcher.next_order()
        kinds.append(order.kind)
        batcher.done(order, [1], 0.0)
    assert kinds == [Kind.DECODE, Kind.PREFILL] * 10


def test_results_tell_their_times():
    result = Generated((4, 5, 6), (0.5, 0.75, 1.25), "eos")
    assert result.ttft_s == 0.5
    assert result.tpot_s == 0.375
    assert result._replace(token_s=(0.5,)).tpot_s == 0


def test_inbox_takes_the_most_urgent_first():
    inbox = Inbox(1.0)
    for urgency, item in ((PROMPTS, "prompt"), (TOKENS, "a"), (TOKENS, "b"), (ORDERS, "order")):
        inbox.put(urgency, item)
    assert [inbox.take(0) for _ in range(5)] == ["order", "a", "b", "prompt", None]


@given(
    kind=st.sampled_from(Kind),
    numbers=st.tuples(*[st.integers(0, 99)] * 4),
    is_last=st.booleans(),
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**40)), max_size=4),
)
def test_order_survives_the_wire(kind, numbers, is_last, rows):
    order = Order(kind, *numbers, is_last, tuple(rows))
    tensor = order.to_tensor(4)
    assert tensor.shape == empty_order(4).shape
    assert Order.from_tensor(tensor) == order


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    steps=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=6),
    tokens_per_step=st.integers(1, 40),
)
def test_cache_returns_every_rows_own_tokens(lengths, steps, tokens_per_step):
    """Rows join as one batch, grow, and leave; the reference is a list of tensors per row."""
    torch.manual_seed(0)
    caches, rows = [], []
    for length in lengths:
        cache, row = KVCache([0]), torch.randn(2, length, 3)
        cache.begin(length)
        cache.update(row[None], -row[None, ..., :2], "layer")
        cache.commit()
        caches.append(cache)
        rows.append(row)
    batch = KVCache.gathered([(cache, 0) for cache in caches])
    for stays in steps:
        kept = [i for i in range(len(rows)) if stays[i]] or [0]
        batch, rows = KVCache.gathered([(batch, i) for i in kept]), [rows[i] for i in kept]
        new = torch.randn(len(rows), 2, tokens_per_step, 3)
        batch.begin(tokens_per_step)
        keys, values = batch.update(new, -new[..., :2], "layer")
        rows = [torch.cat([row, new[i]], 1) for i, row in enumerate(rows)]
        for i, row in enumerate(rows):
            seen = row.shape[1] - tokens_per_step
            assert batch.positions[i].tolist() == list(range(seen, row.shape[1]))
            assert int(batch.is_token[i].sum()) == row.shape[1]
            assert torch.equal(keys[i, :, batch.is_token[i].bool()], row)
            assert torch.equal(values[i, :, batch.is_token[i].bool()], -row[..., :2])
            if batch.mask is not None:
                expected = torch.ones(tokens_per_step, row.shape[1]).tril(seen).bool()
                assert torch.equal(batch.mask[i, 0][:, batch.is_token[i].bool()], expected)
        batch.commit()


def test_cache_names_the_layout_it_wants():
    cache = KVCache([0])
    cache.begin(5)
    with pytest.raises(ValueError, match=r"allowed: \(1, heads, 5, width\)"):
        cache.update(torch.zeros(1, 5, 2, 3), torch.zeros(1, 5, 2, 3), 0)
