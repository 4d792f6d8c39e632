"""Runs a chain of blocks, each with a graph of its own, and measures one micro-batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import fmean, median
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from dora.errors import PartitionError, SpecError
from dora.profiler.probes import (
    FLOP_FORMULAS,
    OWN_SHARE,
    Both,
    Clock,
    KeptBytes,
    OpCounter,
    Probe,
    Stopwatch,
    ThreadClock,
    storages_of,
    tensors_of,
)
from dora.spec import BlockCost, Timing

# Fast models are timed for at least this long. 40 profiles of a 0.25 ms pass: the middle 60 % of
# the results lie within 0.8 % of each other, with 5 passes only within 4 %.
_MIN_TIMED_S = 0.1
_MAX_ROUNDS_FACTOR = 20
_MIN_SHARED_S = 2.0

LossFn = Callable[[Any, Any], torch.Tensor]
Progress = Callable[[int, int], None]


class BlockChain(Protocol):
    """What the profiler needs of a partitioned model; `dora.partition.Chain` offers it."""

    @property
    def module(self) -> nn.Module:
        """The module that the blocks make up."""

    @property
    def names(self) -> tuple[str, ...]:
        """One name per block."""

    def parameters_of(self, block: int, /) -> Mapping[str, nn.Parameter]:
        """Returns the parameters that a block uses, by state-dict name."""

    def tied(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the parameters that several blocks share, with those blocks."""

    def on_boundary(self, callback: Callable[[int, Any], Any], /) -> AbstractContextManager[object]:
        """Calls `callback(block, output)` after each block but the last; replaces its output."""


def resize_batch(tree: Any, size: int, batch_dim: int = 0) -> Any:
    """Returns `tree` with `size` samples: the first ones, repeated if there are too few.

    The first tensor that has `batch_dim` sets the batch size. Every tensor of the same size
    there is resized, into new contiguous memory and without gradient; the rest stays as it is.

    Raises:
        SpecError: No tensor has that dimension, or the batch is empty.
    """
    tensors = [x for x in tensors_of(tree) if x.dim() > batch_dim]
    if size < 1 or not tensors or tensors[0].shape[batch_dim] == 0:
        raise SpecError(
            f"batch: given size {size} and {len(tensors)} tensors with dimension {batch_dim}, "
            "allowed: size >= 1 and at least one such tensor that is not empty"
        )
    batch_size = tensors[0].shape[batch_dim]

    def resize(x: torch.Tensor) -> torch.Tensor:
        if x.dim() <= batch_dim or x.shape[batch_dim] != batch_size:
            return x.detach()
        samples = torch.arange(size, device=x.device) % batch_size
        return x.detach().index_select(batch_dim, samples)

    return tree_map_only(torch.Tensor, resize, tree)


class Batch(NamedTuple):
    """One batch of inputs, its targets, and the loss function if the last block includes it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    loss_fn: LossFn | None

    def resized(self, size: int, batch_dim: int) -> Batch:
        """Returns the batch with `size` samples, see `resize_batch`."""
        args, kwargs, targets = resize_batch(
            (self.args, self.kwargs, self.targets), size, batch_dim
        )
        return Batch(args, kwargs, targets, self.loss_fn)


class PassCounter:
    """Reports how many of the planned passes are done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def done(self) -> None:
        """One more pass is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Pass(NamedTuple):
    """What each block took in one pass: seconds, and processor seconds."""

    forward_s: list[float]
    backward_s: list[float]
    forward_cpu_s: list[float]
    backward_cpu_s: list[float]


class _Graph(NamedTuple):
    """One block's differentiable outputs and, for each, the leaf that collects its gradient."""

    outputs: list[torch.Tensor]
    leaves: list[torch.Tensor]


class Meter:
    """Measures all blocks of a chain for one micro-batch."""

    def __init__(
        self,
        chain: BlockChain,
        batch: Batch,
        device: torch.device,
        training: bool,
        passes: PassCounter,
    ) -> None:
        self._chain = chain
        self._batch = batch
        self._clock = Clock(device)
        self._training = training
        self._passes = passes
        self._num_blocks = len(chain.names)
        # True if glue code between the blocks computes a trainable value that several blocks use.
        self._shared_graph = False

    def costs(self, size: int, device_name: str, warmup: int, repeats: int) -> list[BlockCost]:
        """Returns one cost row per block."""
        ops = self._count()
        kept = self._kept_bytes() if self._training else ops.peak_bytes
        forward_s, backward_s = self._time(warmup, repeats)
        return [
            BlockCost(
                microbatch_size=size,
                flops=ops.flops[i],
                traffic_bytes=ops.traffic_bytes[i],
                num_ops=max(1, ops.num_ops[i]),
                activation_bytes=kept[i],
                output_bytes=ops.output_bytes[i],
                timings=(
                    Timing(device=device_name, forward_s=forward_s[i], backward_s=backward_s[i]),
                ),
            )
            for i in range(self._num_blocks)
        ]

    def _count(self) -> OpCounter:
        # The fused encoder layer of inference hides its matrix products from the counters.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                torch.no_grad(),
                FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as flops,
            ):
                ops = OpCounter(self._num_blocks, flops, storages_of(self._chain.module))
                with ops:
                    self._forward(ops)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        self._passes.done()
        return ops

    def _kept_bytes(self) -> list[int]:
        probe = KeptBytes(self._num_blocks, storages_of(self._chain.module))
        with saved_tensors_hooks(probe.pack, lambda x: x):
            graphs = self._forward(probe)
        try:
            self._backward(graphs, Probe())
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            self._shared_graph = True
        self._passes.done()
        return probe.kept_bytes

    def _time(self, warmup: int, repeats: int) -> tuple[list[float], list[float]]:
        """Returns seconds of each block's forward and backward pass; see OWN_SHARE."""
        passes: list[_Pass] = []
        for _ in range(warmup):
            self._timed_pass()
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        while True:
            passes.append(self._timed_pass(counts=len(passes) < repeats))
            spent_s = time.perf_counter() - start_s
            spent_cpu_s = time.thread_time() - start_cpu_s
            is_shared = self._clock.is_cpu and spent_cpu_s < OWN_SHARE * spent_s
            has_enough = len(passes) >= (1 if is_shared else repeats)
            least_s = _MIN_SHARED_S if is_shared else _MIN_TIMED_S
            is_at_limit = not is_shared and len(passes) >= _MAX_ROUNDS_FACTOR * repeats
            if has_enough and (spent_s >= least_s or is_at_limit):
                break
        if is_shared:
            stretch = spent_s / spent_cpu_s
            return (
                [stretch * t for t in _each(fmean, (p.forward_cpu_s for p in passes))],
                [stretch * t for t in _each(fmean, (p.backward_cpu_s for p in passes))],
            )
        return (
            _each(median, (p.forward_s for p in passes)),
            _each(median, (p.backward_s for p in passes)),
        )

    def _timed_pass(self, counts: bool = True) -> _Pass:
        clocks = (self._clock, self._clock, ThreadClock(), ThreadClock())
        watches = [Stopwatch(clock, self._num_blocks) for clock in clocks]
        forward, backward, forward_cpu, backward_cpu = watches
        self._clock.synchronize()
        graphs = self._forward(Both(forward, forward_cpu))
        if self._training:
            self._backward(graphs, Both(backward, backward_cpu))
        self._clock.synchronize()
        if counts:
            self._passes.done()
        return _Pass(*(watch.seconds() for watch in watches))

    def _forward(self, probe: Probe) -> list[_Graph]:
        """Runs all blocks, each on cut-off inputs, and returns their graphs."""
        last = self._num_blocks - 1
        graphs: list[_Graph] = []

        def boundary(block: int, output: Any) -> Any:
            probe.end(block, output)
            if block != len(graphs):
                raise PartitionError(f"block {block} ended where block {len(graphs)} should have")
            # Weights that autocast has converted belong to the graph of the block that did it.
            torch.clear_autocast_cache()
            graph, received = _cut(output)
            graphs.append(graph)
            probe.begin(block + 1, received)
            return received

        batch = self._batch
        torch.clear_autocast_cache()
        with self._chain.on_boundary(boundary):
            probe.begin(0, (batch.args, batch.kwargs))
            output = self._chain.module(*batch.args, **batch.kwargs)
            result = batch.loss_fn(output, batch.targets) if batch.loss_fn else output
            probe.end(last, output)
        torch.clear_autocast_cache()
        if len(graphs) != last:
            raise PartitionError(
                f"only {len(graphs) + 1} of {last + 1} blocks ran: control flow between blocks "
                "must not depend on the data or on chance"
            )
        graphs.append(_seeded(result))
        return graphs

    def _backward(self, graphs: list[_Graph], probe: Probe) -> None:
        """Runs the blocks' backward passes, last block first; frees each graph as it goes."""
        for block in reversed(range(self._num_blocks)):
            graph = graphs.pop()
            pairs = [
                (output, leaf.grad)
                for output, leaf in zip(graph.outputs, graph.leaves, strict=True)
                if leaf.grad is not None
            ]
            if not pairs:
                continue
            outputs, grads = zip(*pairs, strict=True)
            probe.begin(block, None)
            torch.autograd.backward(outputs, grads, retain_graph=self._shared_graph)
            probe.end(block, None)


def _each(typical: Callable[[Sequence[float]], float], rows: Iterable[list[float]]) -> list[float]:
    """Returns what is typical of each column."""
    return [typical(column) for column in zip(*rows, strict=True)]


def _cut(output: Any) -> tuple[_Graph, Any]:
    """Returns the graph that ends here, and the output for the next block, cut off from it."""
    graph = _Graph([], [])
    received: dict[int, torch.Tensor] = {}

    def receive(x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return x
        if id(x) not in received:
            leaf = x.detach().requires_grad_()
            graph.outputs.append(x)
            graph.leaves.append(leaf)
            # A copy, because the next block may overwrite its input, which no leaf allows.
            received[id(x)] = leaf.clone()
        return received[id(x)]

    return graph, tree_map_only(torch.Tensor, receive, output)


def _seeded(result: Any) -> _Graph:
    """Returns the graph of the last block with ones as the gradients of its outputs."""
    loss = getattr(result, "loss", None)
    chosen = loss if isinstance(loss, torch.Tensor) else result
    outputs = list({id(x): x for x in tensors_of(chosen) if x.requires_grad}.values())
    leaves = [x.detach() for x in outputs]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    return _Graph(outputs, leaves)
