"""Runs a module once and records which unit's output every later value depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dora.errors import PartitionError

# Operators that hand a value to Python, where it can steer control flow unseen.
_TO_PYTHON = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


@dataclass
class Trace:
    """What one forward call showed.

    Attributes:
        calls: Unit names in call order; a unit whose output depends on no parameter is glue
            (rotary tables, masks): every stage runs it, so it is not listed.
        invalid_cuts: Positions c such that a value from before c is needed after c.
        glue_parameters: Parameters used outside all units -> positions of the next unit call.
        glue_writes: Code between units overwrites what a unit returned.
    """

    calls: list[str] = field(default_factory=list)
    invalid_cuts: set[int] = field(default_factory=set)
    glue_parameters: dict[str, set[int]] = field(default_factory=dict)
    glue_writes: bool = False


def trace(
    module: nn.Module, candidates: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Trace:
    """Runs `module` on the sample in its present mode, without gradients or side effects.

    Raises:
        PartitionError: The module fails on the sample.
    """
    units = {id(module.get_submodule(name)): name for name in reversed(candidates)}
    constant = set(units.values())
    while True:
        flow = _Flow(module, units)
        try:
            with _undisturbed(module), flow.watched(), flow, _Reads(flow):
                flow.finish(module(*_to_device(module, args), **_to_device(module, kwargs)))
        except Exception as error:
            raise PartitionError(
                f"{type(module).__name__} fails on the sample: {type(error).__name__}: {error}"
            ) from error
        # Units that proved to be glue are dropped, and positions counted again without them.
        constant = {name for name in flow.outcome if not flow.outcome[name]}
        if not constant:
            return Trace(flow.calls, flow.invalid_cuts(), flow.glue_parameters, flow.glue_writes)
        units = {key: name for key, name in units.items() if name not in constant}


def _to_device(module: nn.Module, tree: Any) -> Any:
    """Moves the sample to where the first parameter lives, the meta device included."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


class _Flow(TorchDispatchMode):
    """Marks every storage with the units whose parameters it depends on directly.

    Unit j marks its outputs {j}; glue code after unit p that touches a parameter adds p + 0.5.
    Reading mark k inside unit j, or returning it (j = end), makes the cuts k < c < j invalid:
    after such a cut the value would be missing.
    """

    def __init__(self, module: nn.Module, units: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.units = units
        self.calls: list[str] = []
        self.outcome: dict[str, bool] = {}
        self.glue_parameters: dict[str, set[int]] = {}
        self.glue_writes = False
        self._needs: set[tuple[float, float]] = set()
        self._inside: int | None = None
        self._marks: dict[int, frozenset[float]] = {}
        self._before: dict[int, frozenset[float]] = {}
        self._alive: list[Any] = []  # storages, so that no address is used twice
        self._parameters = {_key(p): name for name, p in module.named_parameters()}

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        marks = self._marks_of((args, kwargs))
        if self._inside is not None:
            self._needs.update((k, self._inside) for k in marks if k != self._inside)
        elif func.name() in _TO_PYTHON:
            self.read(marks)
        result = func(*args, **kwargs)
        if marks:
            self._mark(result, marks)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._mark(value, marks | self._marks_of(value))
                    self.glue_writes |= self._inside is None
        return result

    def read(self, marks: frozenset[float]) -> None:
        """Counts values that Python saw outside all units as needed by everything after."""
        if self._inside is None:
            self._needs.update((k, float("inf")) for k in marks)

    def _marks_of(self, tree: Any) -> frozenset[float]:
        found: set[float] = set()
        for tensor in _tensors(tree):
            key = _key(tensor)
            found |= self._marks.get(key, frozenset())
            name = self._parameters.get(key)
            if name is not None:
                found.add(self._parameter_mark(name))
        return frozenset(found)

    def _parameter_mark(self, name: str) -> float:
        if self._inside is not None:
            return self._inside
        self.glue_parameters.setdefault(name, set()).add(len(self.calls))
        return len(self.calls) - 0.5

    def _mark(self, tree: Any, marks: frozenset[float]) -> None:
        for tensor in _tensors(tree):
            if _key(tensor) not in self._parameters:
                self._marks[_key(tensor)] = marks
                self._alive.append(tensor.untyped_storage())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks all units for the time of the trace."""
        hooks = []
        for unit in self.module.modules():
            if id(unit) in self.units:
                hooks.append(unit.register_forward_pre_hook(self._enter))
                hooks.append(unit.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, unit: nn.Module, args: Any) -> None:
        if self._inside is None:
            self._inside = len(self.calls)
            self._entered = unit
            self._before = dict(self._marks)
            self.calls.append(self.units[id(unit)])

    def _leave(self, unit: nn.Module, args: Any, output: Any) -> None:
        if self._inside is None or unit is not self._entered:
            return
        name = self.units[id(unit)]
        depends = bool(self._marks_of(output)) or any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in unit.modules()
        )
        self.outcome[name] = self.outcome.get(name, False) or depends
        if depends:
            for tensor in _tensors(output):
                # Memory that others may still read under its old meaning keeps its old marks:
                # units that overwrite or pass on their input.
                shared = self._before.get(_key(tensor), frozenset())
                self._mark(tensor, shared | {float(self._inside)})
        self._inside = None

    def finish(self, output: Any) -> None:
        """Counts what the module returns as needed at the end."""
        self._needs.update((k, float("inf")) for k in self._marks_of(output))

    def invalid_cuts(self) -> set[int]:
        """Returns the cuts that some need spans."""
        return {
            cut for cut in range(len(self.calls) - 1) if any(k < cut < j for k, j in self._needs)
        }


class _Reads(TorchFunctionMode):
    """Notices tensors that become Python or numpy values without passing the dispatcher."""

    def __init__(self, flow: _Flow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__"):
            self._flow.read(self._flow._marks_of(args))
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
