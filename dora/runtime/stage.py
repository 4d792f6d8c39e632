"""Runs one stage: the module's own forward with the blocks of other stages skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import GradientEdge
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from dora.errors import PartitionError
from dora.partition import Chain, UnitCall
from dora.runtime.batchnorm import frozen_statistics
from dora.runtime.boundary import BoundarySpec, LeafSpec, arrived, signature
from dora.runtime.seeds import SeedKey, seed_glue, seed_unit
from dora.spec import Action

# Distinct input shapes that are remembered; more start anew.
_MAX_SHAPES = 256


class _StageDone(BaseException):
    """Leaves the module's forward once the last block of a stage has its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Shapes(NamedTuple):
    """What crosses the boundaries of a stage; None where there is no boundary."""

    by_position: Mapping[int, BoundarySpec]
    received: BoundarySpec | None
    sent: BoundarySpec | None
    result: BoundarySpec | None


# Where backward begins: the loss, or the places in the graph of outputs that were sent. Unlike the
# outputs themselves, the places do not keep their memory.
Roots = Sequence[torch.Tensor] | Sequence[GradientEdge]


@dataclass
class Step:
    """One training step or one inference call, as this rank sees it.

    Attributes:
        inputs: (args, kwargs) of the model per micro-batch.
        targets: Per micro-batch, for the loss.
        weights: Share of each micro-batch in the loss.
        routes: Per micro-batch, the replica of each stage.
        loss_fn: (output, target) -> scalar; None for inference.
        key: Seed and step number of dropout.
        header: What all ranks must agree on, in words.
        deadlines: When the receiver of each SEND needs it, in any unit.
    """

    inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    routes: Sequence[Sequence[int]]
    header: str
    key: SeedKey
    targets: Sequence[Any] = ()
    weights: Sequence[float] = ()
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    deadlines: Mapping[Action, float] = field(default_factory=dict)

    shapes: dict[Any, Shapes] = field(default_factory=dict)
    received: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    outputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # until sent
    roots: dict[int, Roots] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)
    loss: torch.Tensor | None = None


class StageRunner:
    """Forward pass of blocks `first_block` to `last_block` of a chain.

    Backward needs nothing of its own: autograd runs from the output's gradient to the
    received tensors and the parameters of these blocks.

    Args:
        chain: The partitioned module.
        first_block: First block of the stage.
        last_block: Last block of the stage, included.
        checkpoint: Recompute each block's activations in backward instead of keeping them.
    """

    def __init__(
        self, chain: Chain, first_block: int, last_block: int, *, checkpoint: bool = False
    ) -> None:
        self.chain = chain
        self.units = chain.units(first_block, last_block)
        self.is_first = first_block == 0
        self.is_last = last_block == chain.num_blocks - 1
        self.checkpoint = checkpoint
        self._shapes: dict[Any, Shapes] = {}
        self._zeros: dict[LeafSpec, torch.Tensor] = {}
        self._fake_states: dict[int, dict[str, torch.Tensor]] = {}
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def shapes(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, whole: bool = False
    ) -> Shapes:
        """Returns what crosses the stage's boundaries for such inputs; remembered per shape.

        Args:
            args: The model's positional inputs for one micro-batch.
            kwargs: The model's keyword inputs for one micro-batch.
            whole: Follow the module to its end, so that `result` is known too.
        """
        key = (signature(args, kwargs), self.chain.module.training, whole)
        if key not in self._shapes:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
                self._zeros.clear()
            specs = self._infer(args, kwargs, whole)
            self._shapes[key] = Shapes(
                specs,
                received=specs.get(self.units.start - 1),
                sent=specs.get(self.units.stop - 1),
                result=specs.get(len(self.chain.calls)),
            )
        return self._shapes[key]

    def _infer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool
    ) -> dict[int, BoundarySpec]:
        """Runs every unit on fake tensors, which have shapes but no data, and glue on zeros."""
        specs: dict[int, BoundarySpec] = {}
        stop = len(self.chain.calls) if whole else self.units.stop

        def handler(position: int, unit: nn.Module, call: UnitCall) -> Any:
            with self._fake(unit) as to_fake:
                call.args, call.kwargs = to_fake(call.args), to_fake(call.kwargs)
                try:
                    output = call()
                except Exception as error:
                    raise PartitionError(
                        f"the output shape of {self.chain.calls[position]} can not be known "
                        f"without its data ({type(error).__name__}: {error}); name larger blocks"
                    ) from error
            specs[position] = BoundarySpec.of(output)
            if position == stop - 1 and not whole:
                raise _StageDone(None)
            return self._placeholder(specs[position], track_grad=True)

        with (
            torch.random.fork_rng(devices=[]),
            self.chain.intercept(handler),
            contextlib.suppress(_StageDone),
        ):
            specs[len(self.chain.calls)] = BoundarySpec.of(self.chain.module(*args, **kwargs))
        return specs

    @contextmanager
    def _fake(self, unit: nn.Module) -> Iterator[Any]:
        """Gives `unit` fake parameters; yields the function that makes tensors fake."""

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            device = self.device if tensor.is_meta else tensor.device
            twin = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            # Not a leaf, so that units may overwrite their input.
            return twin.requires_grad_() + 0 if tensor.requires_grad else twin

        with self._fake_mode:
            if id(unit) not in self._fake_states:
                state = {**dict(unit.named_parameters()), **dict(unit.named_buffers())}
                self._fake_states[id(unit)] = {name: fake(tensor) for name, tensor in state.items()}
            state = self._fake_states[id(unit)]
            with _reparametrize_module(unit, state), frozen_statistics(unit):
                yield lambda tree: tree_map_only(torch.Tensor, fake, tree)

    @cached_property
    def device(self) -> torch.device:
        """Where this stage computes."""
        tensors = self.chain.module.parameters()
        return next((p.device for p in tensors if not p.is_meta), torch.device("cpu"))

    def _placeholder(self, spec: BoundarySpec, *, track_grad: bool = False) -> Any:
        """Returns zeros of that shape for glue code whose result is thrown away.

        One zero repeated, which takes no memory, unless the code writes to it.
        """
        tensors = []
        for leaf in spec.tensors:
            if leaf not in self._zeros:
                zero = torch.zeros((), dtype=leaf.dtype, device=leaf.device)
                self._zeros[leaf] = zero.expand(leaf.shape)
            zeros = self._zeros[leaf]
            if track_grad and leaf.requires_grad and torch.is_grad_enabled():
                zeros = zeros.clone().requires_grad_() + 0
            elif self.chain.glue_writes:
                zeros = zeros.clone()
            tensors.append(zeros)
        return spec.fill(tensors)

    # ------------------------------------------------------------ forward

    def forward(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        received: list[torch.Tensor],
        shapes: Shapes,
        seed: SeedKey | None = None,
    ) -> Any:
        """Runs the stage on one micro-batch.

        Args:
            args: The model's own positional inputs for this micro-batch.
            kwargs: The model's own keyword inputs for this micro-batch.
            received: Tensors from the previous stage, leaves that may require gradients.
            shapes: What `self.shapes` returns for these inputs.
            seed: Identifies the dropout masks of this micro-batch; None leaves the generator be.

        Returns:
            The output of the last block, or of the whole module on the last stage.
        """
        specs = shapes.by_position

        def handler(position: int, unit: nn.Module, call: UnitCall) -> Any:
            if position < self.units.start - 1:
                output = self._placeholder(specs[position])
            elif position == self.units.start - 1:
                output = specs[position].fill([arrived(leaf) for leaf in received])
            else:
                seed_unit(seed, position)
                output = self._run(unit, call)
                if position == self.units.stop - 1 and not self.is_last:
                    raise _StageDone(output)
            seed_glue(seed, position)
            return output

        seed_glue(seed, -1)
        with self.chain.intercept(handler):
            try:
                return self.chain.module(*args, **kwargs)
            except _StageDone as done:
                return done.output

    def _run(self, unit: nn.Module, call: UnitCall) -> Any:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return call()
        if next(unit.parameters(), None) is None:  # cheap, and in-place ones can not run again
            return call()
        return checkpoint(
            call.forward,
            *call.args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), frozen_statistics(unit)),
            **call.kwargs,
        )
