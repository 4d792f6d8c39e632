"""`DoraParallel.generate`: tokens from a language model whose blocks are on several devices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from dora.errors import DoraError, ProtocolError
from dora.runtime.batcher import Generated
from dora.runtime.boundary import digest
from dora.runtime.decoder import Sampling, StageDecoder
from dora.runtime.kvcache import AsInputs, inputs_of
from dora.runtime.serving import OnToken, Serving
from dora.runtime.token_loop import TokenLoop

if TYPE_CHECKING:
    from dora.runtime.parallel import DoraParallel

Prompts = Iterable[Sequence[int] | torch.Tensor | None]

_STREAM = "an iterator"


def generate(  # noqa: D417 - a method of DoraParallel
    self: DoraParallel,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int],
    *,
    eos: int | Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int | None = None,
    max_in_flight: int = 8,
    prefill_chunk: int = 64,
    as_inputs: AsInputs | None = None,
    on_token: OnToken | None = None,
) -> list[Generated]:
    """Continues prompts; several are under way at a time. A collective call.

    Every device keeps the keys and values of its own blocks. Requests join as others end, prompts
    run in chunks behind what is decoded, and with temperature 0 the tokens are those of the plain
    module. docs/generation.md says what a module must do with its cache.

    Args:
        prompts: Token ids, one sequence per request, equal on all ranks. Or an iterator, which is
            read on the first device of the first stage only, while others are served: it may
            yield None for "nothing at the moment" and must not block.
        max_new_tokens: Limit per request, or one for each.
        eos: The token or tokens that end a request.
        temperature: 0 takes the likeliest token.
        top_k: Sample among so many of the likeliest; 0: among all.
        seed: Of sampling; None takes the model's. What is drawn does not depend on the plan, nor
            on the other requests.
        max_in_flight: Requests that hold a cache at a time; the others wait.
        prefill_chunk: Tokens of a prompt that run at a time; more of them delay tokens of other
            requests, fewer delay the first token.
        as_inputs: (tokens, cache) -> inputs of the module, as for `step`; None finds it out.
        on_token: Called on the first device with (request, token) as they come.

    Returns:
        One result per prompt, in their order, on the ranks of `outputs_to`; [] on the others.

    Raises:
        PeerLostError: A peer failed or was silent for `timeout_s`.
        ProtocolError: Ranks passed different prompts or options.
        ValueError: The module takes no cache, or an argument is out of range.
    """
    if self.training:
        raise RuntimeError("generate: the model is in training mode, call model.eval() before")
    if isinstance(prompts, Sequence | torch.Tensor):
        prompts = [_checked(prompt) for prompt in prompts]
    ends = (eos,) if isinstance(eos, int) else tuple(eos)
    chosen = Sampling(temperature, top_k, self._seed if seed is None else seed)
    _check(chosen, max_in_flight, prefill_chunk)
    serving = Serving(
        (prompt if prompt is None else _checked(prompt) for prompt in prompts),
        _limits(max_new_tokens, prompts),
        on_token,
        max_in_flight=max_in_flight,
        prefill_chunk=prefill_chunk,
        eos=ends,
        notes=self.watch.recorder.tokens if self.watch is not None else None,
    )
    given = prompts if isinstance(prompts, list) else _STREAM
    text = f"generate {given} {(max_new_tokens, ends, chosen, max_in_flight, prefill_chunk)}"
    call = as_inputs or inputs_of(self.chain.module)
    self._take_in("generate")
    attempt = _attempt(self, serving, chosen, call, text=text, max_rows=max_in_flight)
    watched = nullcontext() if self.watch is None else self.watch.recorder.generating(max_in_flight)
    with watched:
        results: list[Generated] = self._call("generate", attempt)
    return results


def _attempt(
    model: DoraParallel,
    serving: Serving,
    sampling: Sampling,
    as_inputs: AsInputs,
    *,
    text: str,
    max_rows: int,
) -> Callable[[], list[Generated]]:
    """Returns what runs the call on the model's plan; once more if the plan changes meanwhile."""
    leaders: list[int] = []

    def attempt() -> list[Generated]:
        with torch.no_grad(), model._seeded():
            leaders[:] = [_agree(model, text, leaders)]
            loop = TokenLoop(
                model.plan,
                model.rank,
                StageDecoder(model._executor.runner, as_inputs, sampling),
                model.transport,
                leader=leaders[0],
                members=model.members,
                max_rows=max_rows,
                timeout_s=model.timeout_s,
            )
            if model.rank != leaders[0]:
                return loop.follow()
            serving.begin(model.plan)
            return loop.lead(serving, model.output_ranks)

    return attempt


def _agree(model: DoraParallel, text: str, leaders: Sequence[int]) -> int:
    """Returns the rank that leads: the one that did before the plan changed, if there is one.

    Raises:
        ProtocolError: Ranks were given different things.
        DoraError: The rank that has led is gone, and nobody else knows the prompts.
    """
    # 50 bits: exact in the float64 in which they travel.
    row = [model._calls, digest(text) >> 12, *(leaders or [-1])]
    rows = model._agreement.rows(row, "start of generate")
    for rank, other in zip(model.members, rows, strict=True):
        if other[:2] != rows[0][:2]:
            raise ProtocolError(
                f"generate: rank {rank} was given other prompts or options than rank "
                f"{model.members[0]}, or comes after other calls; allowed: the same on all"
            )
    known = {int(leader) for *_, leader in rows if leader >= 0}
    if known and _STREAM in text and not known & set(model.members):
        raise DoraError(
            f"generate: rank {known.pop()} is lost, which read the iterator of prompts; allowed: a "
            "list of prompts, which all ranks know"
        )
    return min(known & set(model.members), default=model.plan.rank_of(0, 0))


def _checked(prompt: Any) -> list[int]:
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not tokens or not all(isinstance(t, int) and t >= 0 for t in tokens):
        raise ValueError(f"prompts: given {tokens!r:.80}, allowed: one token id or more each")
    return tokens


def _limits(max_new_tokens: int | Sequence[int], prompts: Prompts) -> Any:
    """Returns a function from request to its limit."""
    if isinstance(max_new_tokens, int):
        _check_least("max_new_tokens", max_new_tokens, 1)
        return lambda request: max_new_tokens
    if not isinstance(prompts, list) or len(max_new_tokens) != len(prompts):
        raise ValueError(
            f"max_new_tokens: given {len(max_new_tokens)} numbers, allowed: one for all, or one "
            "per prompt of a list"
        )
    for limit in max_new_tokens:
        _check_least("max_new_tokens", limit, 1)
    return max_new_tokens.__getitem__


def _check(sampling: Sampling, max_in_flight: int, prefill_chunk: int) -> None:
    _check_least("temperature", sampling.temperature, 0)
    _check_least("top_k", sampling.top_k, 0)
    _check_least("max_in_flight", max_in_flight, 1)
    _check_least("prefill_chunk", prefill_chunk, 1)


def _check_least(name: str, given: float, least: int) -> None:
    if given < least:
        raise ValueError(f"{name}: given {given}, allowed: {least} or more")
