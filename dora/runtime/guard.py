"""Keeps codecs on only while the user's own model and data bear them.

**Accuracy loss** of a plan's codecs is measured over `PROBES` calls. Each runs twice, with codecs
and without, on the same batch, weights and dropout masks; what the user gets is the one without.

    training     the larger of  |L' - L| / |L|  and  sum |g' - g|^2 / sum |g|^2
    inference    sum |y' - y|^2 / sum |y|^2

L is the sum of the losses, g the gradients of all parameters, y the floating-point outputs, each
over all probed calls; a dash marks those with codecs. The first term of training says what the
codecs cost now, the second what they cost per step from now on: SGD on unbiased gradients with a
relative variance w takes up to 1 + w times as many steps. See Alistarh et al., "QSGD:
Communication-Efficient SGD via Gradient Quantization", 2017, https://arxiv.org/abs/1610.02132.

Codecs that lose more than `Plan.max_accuracy_loss` are refused: the coarsest of them is replaced by
the next better one and measured again, until they pass or none is left. Afterwards every
`CHECK_CALLS`-th call measures the error of the first message that each rank sends over each
boundary; where it has become `DRIFT` times what it was in the probe, all is measured anew.
All ranks decide alike, on figures that they have exchanged; training and inference apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, NamedTuple

import torch

from dora.runtime.agreement import Agreement
from dora.runtime.boundary import tensors_of
from dora.runtime.executor import Executor, Step
from dora.runtime.state import ModelState
from dora.spec import Action, BoundaryCodec, Plan

PROBES = 3
# A check encodes and decodes one message more per boundary, and sums a number per rank.
CHECK_CALLS = 50
# Batches differ by less, and data that grow outliers pass it soon: 1 % of channels at 20 times the
# others make the error of the others 6 times as large as int8, 5 times as int4.
DRIFT = 2.0

# From the coarsest, by their error on values with outliers; docs/compression.md has the figures.
_BETTER = {"int4": "int4-smooth", "int4-smooth": "int8", "fp8": "int8", "int8": "none"}


class Codecs(NamedTuple):
    """What is in use: a codec per boundary and direction, and per stage for gradients."""

    boundaries: tuple[BoundaryCodec, ...] = ()
    gradients: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """All that occur, beside 'none'."""
        pairs = {name for c in self.boundaries for name in (c.forward, c.backward)}
        return (pairs | set(self.gradients)) - {"none"}

    def better(self) -> Codecs:
        """Returns the same with the next better codec in place of the coarsest."""
        coarsest = next((name for name in _BETTER if name in self.names), "none")

        def step(name: str) -> str:
            return _BETTER.get(name, name) if name == coarsest else name

        pairs = [
            {"forward": step(c.forward), "backward": step(c.backward)} for c in self.boundaries
        ]
        # A sum of gradients has no channels to smooth.
        sums = ["int8" if name == coarsest == "int4" else step(name) for name in self.gradients]
        return Codecs(tuple(map(BoundaryCodec.model_validate, pairs)), tuple(sums))

    def __str__(self) -> str:
        """Returns for example 'int4/int8 | int8/int8, gradients int8'."""
        text = " | ".join(f"{c.forward}/{c.backward}" for c in self.boundaries)
        names = " ".join(self.gradients)
        return ", gradients ".join(part for part in (text, names) if part)


class CodecState(NamedTuple):
    """What is decided so far about the codecs of training or of inference; equal on all ranks.

    Attributes:
        codecs: In use now, or being measured; all 'none', or empty, if none is.
        accuracy_loss: Of them, as measured last; None: not measured.
        max_accuracy_loss: What is allowed; None trusts the plan and measures nothing.
        is_measuring: Whether the next call runs with and without them.
        refused: (codecs, accuracy loss) of what was measured and switched off, in that order.
    """

    codecs: Codecs
    accuracy_loss: float | None
    max_accuracy_loss: float | None
    is_measuring: bool
    refused: tuple[tuple[Codecs, float], ...]

    def __str__(self) -> str:
        """Returns for example 'int8/int8, loses 0.0002 of 0.03; refused: int4/int4 (0.041)'."""
        loss, limit = self.accuracy_loss, self.max_accuracy_loss
        names = f"{self.codecs}" if self.codecs.names else "none"
        known = f"loses {loss:.2g} of {limit:.2g}" if loss is not None else "not measured"
        gone = ", ".join(f"{codecs} ({lost:.2g})" for codecs, lost in self.refused)
        return f"{names}, {known}" + (f"; refused: {gone}" if gone else "")


class CodecReport(NamedTuple):
    """What is decided so far about the codecs of a plan."""

    training: CodecState
    inference: CodecState


@dataclass
class Guard:
    """Whether codecs stay on, for training or for inference; equal on all ranks.

    Attributes:
        codecs: In use now, or being measured.
        limit: Accuracy loss that is allowed; None allows all.
        loss: Accuracy loss of `codecs` as measured last; None: not measured.
        refused: (codecs, accuracy loss) of what was measured and switched off.
    """

    codecs: Codecs
    limit: float | None
    loss: float | None = None
    refused: list[tuple[Codecs, float]] = field(default_factory=list)
    _probes: list[tuple[float, float, float, float]] = field(default_factory=list)
    _errors: dict[Any, float] = field(default_factory=dict)
    _calls: int = 0

    @property
    def is_probing(self) -> bool:
        """Whether the next call has to run with and without codecs."""
        is_guarded = self.limit is not None and bool(self.codecs.names)
        return is_guarded and len(self._probes) < PROBES

    @property
    def state(self) -> CodecState:
        """What is decided so far."""
        return CodecState(self.codecs, self.loss, self.limit, self.is_probing, tuple(self.refused))

    def is_checking(self) -> bool:
        """Counts a call without a probe; tells whether errors are to be sampled in it."""
        self._calls += 1
        is_guarded = self.limit is not None and bool(self.codecs.names)
        return is_guarded and self._calls % CHECK_CALLS == 0

    def drift(self, errors: dict[Any, float]) -> float:
        """Returns by which factor errors of this rank have grown since the probe, at most."""
        grown = [e / self._errors[k] for k, e in errors.items() if self._errors.get(k)]
        return max((factor for factor in grown if isfinite(factor)), default=0.0)

    def measure_again(self) -> None:
        """Starts new probes."""
        self._probes, self._errors, self._calls = [], {}, 0

    def add_errors(self, errors: dict[Any, float]) -> None:
        """Remembers the errors of this rank's messages during a probe."""
        for key, error in errors.items():
            self._errors[key] = max(error, self._errors.get(key, 0.0))

    def add_probe(self, coded: float, plain: float, lost: float, total: float) -> str:
        """Counts a probe; after the last one, decides.

        Args:
            coded: Loss with codecs; 0 in inference.
            plain: Loss without.
            lost: Sum of squares of what gradients or outputs differ by, over all ranks.
            total: Sum of squares of those without codecs.

        Returns:
            What was refused and why, '' if nothing was.
        """
        if not (isfinite(plain) and isfinite(total)):
            return ""  # a gradient scaler lets such steps be; they say nothing about codecs
        self._probes.append((coded, plain, lost, total))
        if len(self._probes) < PROBES:
            return ""
        coded, plain, lost, total = (sum(column) for column in zip(*self._probes, strict=True))
        shift = abs(coded - plain) / abs(plain) if plain else 0.0
        noise = lost / total if total else 0.0
        self.loss = max(shift, noise) if isfinite(shift + noise) else float("inf")
        assert self.limit is not None
        if self.loss <= self.limit:
            return ""
        old, loss = self.codecs, self.loss
        self.refused.append((old, loss))
        self.codecs, self.loss = old.better(), None
        self.measure_again()
        return (
            f"codecs {old} lose {loss:.2g} of accuracy on this data, allowed {self.limit:.2g} "
            f"(max_accuracy_loss): {self.codecs if self.codecs.names else 'none'} instead"
        )


class GuardedExecutor(Executor):
    """An executor that measures codecs before it relies on them.

    Args:
        plan: See Executor, as for the others.
        state: This rank's parameters and buffers.
        agreement: Exchanges figures between all ranks.

    Attributes:
        training, inference: What is decided so far for each.
    """

    def __init__(
        self, plan: Plan, *args: Any, state: ModelState, agreement: Agreement, **options: Any
    ) -> None:
        super().__init__(plan, *args, **options)
        chosen = Codecs(plan.codecs, plan.gradient_codecs)
        self.training = Guard(chosen, plan.max_accuracy_loss)
        self.inference = Guard(chosen._replace(gradients=()), plan.max_accuracy_loss)
        self._state, self._agreement = state, agreement

    @property
    def codec_report(self) -> CodecReport:
        """What is decided so far."""
        return CodecReport(self.training.state, self.inference.state)

    def train(self, actions: Sequence[Action], step: Step) -> float:
        """See Executor; the first calls run twice."""
        guard = self.training
        if not guard.is_probing:
            with self._using(guard, is_sampled=guard.is_checking()):
                loss = super().train(actions, step)
            self._check(guard)
            return loss
        before = _Before(self._state)
        with self._using(guard, is_sampled=True):
            coded_loss = super().train(actions, _again(step))
        guard.add_errors(self._errors())
        coded = before.rewind()
        self.reducer.forget()
        with self._using(None):
            loss = super().train(actions, step)
        holders, parameters = self._state.holders, self._state.parameters
        mine = [name for name in coded if holders[name][0] == self.rank]
        plain = [parameters[name].grad for name in mine]
        figures = _energies([coded[name] for name in mine], plain)
        before.resume()
        self._conclude(guard, coded_loss, loss, figures)
        return loss

    def infer(self, actions: Sequence[Action], step: Step, to_ranks: Sequence[int]) -> list[Any]:
        """See Executor; the first calls run twice."""
        guard = self.inference
        if not guard.is_probing:
            with self._using(guard, is_sampled=guard.is_checking()):
                outputs = super().infer(actions, step, to_ranks)
            self._check(guard)
            return outputs
        before = _Before(self._state)
        with self._using(guard, is_sampled=True):
            coded = super().infer(actions, _again(step), to_ranks)
        guard.add_errors(self._errors())
        before.rewind()
        before.resume()
        with self._using(None):
            outputs = super().infer(actions, step, to_ranks)
        is_judge = self.rank == to_ranks[0]
        figures = _energies(tensors_of(coded), tensors_of(outputs)) if is_judge else (0.0, 0.0)
        self._conclude(guard, 0.0, 0.0, figures)
        return outputs

    @contextmanager
    def _using(self, guard: Guard | None, *, is_sampled: bool = False) -> Iterator[None]:
        """Runs with the codecs of a guard, or without any."""
        codecs = guard.codecs if guard is not None else Codecs()
        self.coder.codecs, self.reducer.codecs = codecs
        self.coder.samples = {} if is_sampled else None
        yield

    def _errors(self) -> dict[tuple[int, int], float]:
        return {place: sample.error for place, sample in (self.coder.samples or {}).items()}

    def _conclude(
        self, guard: Guard, coded: float, plain: float, figures: tuple[float, float]
    ) -> None:
        """Adds a probe and tells the user on rank 0 if it was one too many."""
        rows = self._agreement.rows(figures, "probe of the codecs")
        lost, total = (sum(column) for column in zip(*rows, strict=True))
        self._tell(guard.add_probe(coded, plain, lost, total))

    def _check(self, guard: Guard) -> None:
        if self.coder.samples is None:
            return
        rows = self._agreement.rows([guard.drift(self._errors())], "check of the codecs")
        grown = max(row[0] for row in rows)
        if grown > DRIFT:
            guard.measure_again()
            self._tell(
                f"codecs {guard.codecs}: the error of what is sent has grown {grown:.1f} times "
                "since it was measured; their effect is measured again"
            )

    def _tell(self, text: str) -> None:
        if text and self.rank == 0:
            warnings.warn(text, stacklevel=2)


class _Before:
    """Gradients and buffers as they were before a call that is to leave no trace."""

    def __init__(self, state: ModelState) -> None:
        self._parameters, self._buffers = state.parameters, state.buffers
        self._grads = {name: p.grad for name, p in self._parameters.items()}
        self._values = {name: b.detach().clone() for name, b in self._buffers.items()}
        self._clear()

    def rewind(self) -> dict[str, torch.Tensor | None]:
        """Returns the gradients that the call has made; then nothing of it is left."""
        made = {name: p.grad for name, p in self._parameters.items()}
        self._clear()
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(self._values[name])
        return made

    def resume(self) -> None:
        """Adds the gradients of a second call to those of earlier ones, as autograd does."""
        for name, parameter in self._parameters.items():
            grad = self._grads[name]
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)

    def _clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def _again(step: Step) -> Step:
    """Returns the step as it was before any of it was run."""
    fresh: dict[str, Any] = {n: {} for n in ("shapes", "received", "outputs", "roots", "results")}
    return replace(step, **fresh, loss=None)


def _energies(
    coded: Sequence[torch.Tensor | None], plain: Sequence[torch.Tensor | None]
) -> tuple[float, float]:
    """Returns the sums of squares of the differences, and of the tensors without codecs."""
    lost = total = 0.0
    for a, b in zip(coded, plain, strict=True):
        if b is not None and b.is_floating_point():
            total += float(b.double().square().sum())
            lost += float((b if a is None else b - a).double().square().sum())
    return lost, total
