"""What is watched while a model runs: time, operations and bytes, block by block."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# A thread that got less of the time than this shares its processor, with other processes or under a
# quota. A block is over before it is taken away, or waits for the rest of a quota's period: a
# median shows nothing of that, and a mean over a few passes shows which blocks were unlucky. So
# blocks are timed in processor time there, and all are stretched alike.
OWN_SHARE = 0.9
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# These read only the chosen rows of their first tensor, not all of it.
_ROW_READERS = {"embedding", "gather", "index", "index_select"}


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Returns the FLOPs of query x key and scores x value, from the shapes."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# What PyTorch's own table lacks: attention on CPU would count as nothing.
FLOP_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class Probe:
    """Told when a block begins and ends; the base class ignores it."""

    def begin(self, block: int, received: Any) -> None:
        """The block starts with this input."""

    def end(self, block: int, output: Any) -> None:
        """The block has produced this output."""


class Clock:
    """Marks points in time on a device.

    CUDA and XPU run behind the host, so there a mark is an event in the stream: blocks are timed
    back to back, as a stage runs them. Elsewhere the host waits for the device at each mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._backend = torch.get_device_module(device)
        self._device = device
        self._has_events = device.type in ("cuda", "xpu")
        self.is_cpu = device.type == "cpu"

    def synchronize(self) -> None:
        """Waits until the device has done all work."""
        if self._has_events:
            self._backend.synchronize(self._device)
        else:
            self._backend.synchronize()

    def mark(self) -> Any:
        """Returns now, on the device."""
        if not self._has_events:
            self._backend.synchronize()
            return time.perf_counter()
        event = self._backend.Event(enable_timing=True)
        event.record(self._backend.current_stream(self._device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Returns the time between two marks; on accelerators synchronize first."""
        return float(start.elapsed_time(end)) / 1e3 if self._has_events else float(end - start)


class ThreadClock:
    """Marks the processor time of this thread: what stops it for a while does not count."""

    def mark(self) -> float:
        """Returns the seconds so far."""
        return time.thread_time()

    def seconds(self, start: float, end: float) -> float:
        """Returns the processor time between two marks."""
        return end - start


class Stopwatch(Probe):
    """Marks begin and end of every block; a block that never began took no time."""

    def __init__(self, clock: Clock | ThreadClock, num_blocks: int) -> None:
        self._clock = clock
        self._marks: list[tuple[Any, Any] | None] = [None] * num_blocks
        self._start: Any = None

    def begin(self, block: int, received: Any) -> None:
        """Starts the time of a block."""
        self._start = self._clock.mark()

    def end(self, block: int, output: Any) -> None:
        """Stops the time of a block."""
        self._marks[block] = (self._start, self._clock.mark())

    def seconds(self) -> list[float]:
        """Returns the time of each block."""
        return [self._clock.seconds(*marks) if marks else 0.0 for marks in self._marks]


class Both(Probe):
    """Tells two."""

    def __init__(self, outer: Probe, inner: Probe) -> None:
        self._outer, self._inner = outer, inner

    def begin(self, block: int, received: Any) -> None:
        """The inner one starts last."""
        self._outer.begin(block, received)
        self._inner.begin(block, received)

    def end(self, block: int, output: Any) -> None:
        """The inner one ends first."""
        self._inner.end(block, output)
        self._outer.end(block, output)


class KeptBytes(Probe):
    """Counts what each block keeps for its backward pass: distinct storages, weights excluded.

    A boundary tensor counts for the block that receives it, whether or not that block saved it.
    """

    def __init__(self, num_blocks: int, owned: set[int]) -> None:
        self.kept_bytes = [0] * num_blocks
        self._owned = owned
        self._received: list[torch.Tensor] = []
        self._saved: list[torch.Tensor] = []

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Notes a tensor that autograd saves."""
        self._saved.append(x)
        return x

    def begin(self, block: int, received: Any) -> None:
        """Forgets what earlier blocks saved."""
        self._received, self._saved = tensors_of(received), []

    def end(self, block: int, output: Any) -> None:
        """Sums what the block saved and received."""
        is_last = block == len(self.kept_bytes) - 1
        left_to_receiver = set() if is_last else {address(x) for x in tensors_of(output)}
        kept = {
            address(x): x.untyped_storage().nbytes()
            for x in self._saved
            if address(x) not in left_to_receiver
        }
        kept |= {address(x): x.untyped_storage().nbytes() for x in self._received}
        self.kept_bytes[block] = sum(n for at, n in kept.items() if at not in self._owned)
        self._received, self._saved = [], []


class OpCounter(TorchDispatchMode, Probe):
    """Counts FLOPs, operations, memory traffic and the largest live set of each block.

    Views and allocations are no operations. Traffic is the bytes of all inputs and outputs.
    """

    def __init__(self, num_blocks: int, flop_counter: FlopCounterMode, owned: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = [0] * num_blocks
        self.num_ops = [0] * num_blocks
        self.traffic_bytes = [0] * num_blocks
        self.peak_bytes = [0] * num_blocks
        self.output_bytes = [0] * num_blocks
        self._flop_counter = flop_counter
        self._owned = owned
        self._block = 0
        self._live: dict[StorageWeakRef, int] = {}

    def begin(self, block: int, received: Any) -> None:
        """Counts for this block from now on."""
        self._block, self._live = block, {}
        self._hold(tensors_of(received))

    def end(self, block: int, output: Any) -> None:
        """Notes the block's FLOPs and the size of its output."""
        self.flops[block] = self._flop_counter.get_total_flops() - sum(self.flops)
        self.output_bytes[block] = sent_bytes(output)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and counts it."""
        out = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload):
            self._note(func, tensors_of((args, kwargs)), tensors_of(out))
        return out

    def _note(
        self, func: torch._ops.OpOverload, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        known = {address(x) for x in inputs}
        fresh = [x for x in outputs if address(x) not in known]
        self._hold(fresh)
        name = func._overloadpacket.__name__
        if name in _ALLOCATIONS or not (fresh or func._schema.is_mutable):
            return
        written = sum(touched_bytes(x) for x in outputs)
        read = [touched_bytes(x) for x in inputs]
        if name in _ROW_READERS:
            read[0] = written
        self.num_ops[self._block] += 1
        self.traffic_bytes[self._block] += written + sum(read)

    def _hold(self, tensors: list[torch.Tensor]) -> None:
        for x in tensors:
            if address(x) not in self._owned:
                storage = x.untyped_storage()
                self._live[StorageWeakRef(storage)] = storage.nbytes()
        self._live = {ref: n for ref, n in self._live.items() if not ref.expired()}
        peak = self.peak_bytes[self._block]
        self.peak_bytes[self._block] = max(peak, sum(self._live.values()))


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Returns the tensor leaves of a nested value in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(x: torch.Tensor) -> int:
    """Returns what tells live storages apart; views have the address of their base."""
    return x.untyped_storage().data_ptr()


def storages_of(module: nn.Module) -> set[int]:
    """Returns the addresses of all parameters and buffers."""
    return {address(x) for x in (*module.parameters(), *module.buffers())}


def sent_bytes(tree: Any) -> int:
    """Returns the bytes of the distinct tensors in a tree, as they would be sent."""
    return sum(x.nbytes for x in {id(x): x for x in tensors_of(tree)}.values())


def touched_bytes(x: torch.Tensor) -> int:
    """Returns the bytes that reading a tensor moves; a broadcast dimension repeats none."""
    return min(x.nbytes, x.untyped_storage().nbytes())
