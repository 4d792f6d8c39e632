"""Cuts an `nn.Module` into a chain of blocks that different devices can run.

Every stage runs the module's own `forward`; the child modules ("units") of other stages are
skipped. So hooks, masks, keyword arguments, dynamic shapes and the glue code between blocks
stay what they are in the plain module::

    unit           embeddings   layer.0   layer.1   layer.2   pooler
    stage 1 runs       skip      given     RUN       RUN      (never reached)
                                   ^                     ^
                     what stage 0 sent                   sent to stage 2

`partition` finds the units (children of module lists and of the modules around them), traces
one sample, and follows which values depend on which unit. A cut after unit c is valid if
nothing later needs a unit before c except through the output of c. Units between valid cuts
form one block; parameter-free blocks join the one before them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dora.errors import PartitionError
from dora.partition.export import export_chain
from dora.partition.trace import trace


class UnitCall:
    """One call of a unit that has not happened yet; its inputs may be replaced.

    Attributes:
        args, kwargs: What the unit is called with.
    """

    def __init__(self, chain: Chain, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self._chain = chain
        self._forward = forward

    def __call__(self) -> Any:
        """Runs the unit and returns its output."""
        return self.forward(*self.args, **self.kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the unit on other inputs; modules inside it are not intercepted."""
        chain = self._chain
        handler, chain._handler = chain._handler, None
        try:
            return self._forward(*args, **kwargs)
        finally:
            chain._handler = handler


Handler = Callable[[int, nn.Module, UnitCall], Any]


@dataclass(frozen=True)
class Tensors:
    """The parameters or buffers of the whole module and which blocks use each.

    Attributes:
        names: All paths of each tensor in the module tree, tied ones under the first.
        blocks: Blocks that use it, by first path; a buffer of no unit belongs to all blocks.
        keys: State-dict names of each tensor in the module as the user made it, by first path.
    """

    names: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, tuple[str, ...]]


class Chain:
    """A module as a chain of blocks; the module itself stays usable as before.

    Attributes:
        module: The traced module.
        names: One per block, such as 'encoder.layer.3'.
        ends: Index of the last unit call of each block.
        parameters, buffers: Who uses which tensor.
        state_keys: The user's module's state-dict names, in order.
        glue_writes: Code between units overwrites what a unit returned.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: Sequence[str],
        ends: Sequence[int],
        parameters: Tensors,
        buffers: Tensors,
        state_keys: Sequence[str],
        *,
        glue_writes: bool = False,
    ) -> None:
        self.module = module
        self.calls = tuple(calls)
        self.ends = tuple(ends)
        self.parameters = parameters
        self.buffers = buffers
        self.state_keys = tuple(state_keys)
        self.glue_writes = glue_writes
        starts = [0, *(end + 1 for end in self.ends[:-1])]
        self.names = tuple(
            self.calls[a] if a == b else f"{self.calls[a]}..{self.calls[b]}"
            for a, b in zip(starts, self.ends, strict=True)
        )
        self._handler: Handler | None = None
        self._position = 0
        for name in dict.fromkeys(self.calls):
            _redirect(module.get_submodule(name), self, name)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, at least 1."""
        return len(self.ends)

    def units(self, first_block: int, last_block: int) -> range:
        """Returns the unit calls of those blocks, both included."""
        start = self.ends[first_block - 1] + 1 if first_block else 0
        return range(start, self.ends[last_block] + 1)

    def parameters_of(self, block: int) -> dict[str, nn.Parameter]:
        """Returns the parameters that a block uses, tied ones included, by first name."""
        named = dict(self.module.named_parameters(remove_duplicate=False))
        return {
            name: named[name] for name, users in self.parameters.blocks.items() if block in users
        }

    def tied(self) -> dict[str, tuple[int, ...]]:
        """Returns the parameters that several blocks share, with those blocks."""
        return {name: users for name, users in self.parameters.blocks.items() if len(users) > 1}

    @contextmanager
    def intercept(self, handler: Handler) -> Iterator[None]:
        """Sends every unit call in `module.forward` through `handler(position, unit, call)`.

        What the handler returns is the unit's output; `call()` runs the unit itself.
        """
        self._handler, self._position = handler, 0
        try:
            yield
        finally:
            self._handler = None

    @contextmanager
    def on_boundary(self, callback: Callable[[int, Any], Any]) -> Iterator[None]:
        """Calls `callback(block, output)` after each block but the last; replaces its output."""
        boundary = {end: block for block, end in enumerate(self.ends[:-1])}

        def handler(position: int, unit: nn.Module, call: UnitCall) -> Any:
            output = call()
            block = boundary.get(position)
            return output if block is None else callback(block, output)

        with self.intercept(handler):
            yield

    def _call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        handler = self._handler
        if handler is None:
            return forward(*args, **kwargs)
        position, self._position = self._position, self._position + 1
        if position >= len(self.calls) or self.calls[position] != name:
            expected = self.calls[position] if position < len(self.calls) else "the end"
            raise PartitionError(
                f"the module called {name} where the traced sample called {expected}: control "
                "flow between blocks must not depend on the data"
            )

        return handler(
            position, self.module.get_submodule(name), UnitCall(self, forward, args, kwargs)
        )


def _redirect(unit: nn.Module, chain: Chain, name: str) -> None:
    forward = getattr(unit.forward, "dora_forward", unit.forward)

    @functools.wraps(forward)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        return chain._call(name, forward, args, kwargs)

    redirected.dora_forward = forward  # type: ignore[attr-defined]
    unit.forward = redirected


def partition(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[str] | None = None,
    method: Literal["auto", "modules", "export"] = "auto",
) -> Chain:
    """Cuts `module` into the finest chain of blocks that one sample shows to be valid.

    Args:
        module: Any module; its weights stay in place.
        args: Positional inputs of one forward call; a batch of two samples is enough.
        kwargs: Keyword inputs.
        blocks: Names of module lists or of single modules to cut at, such as
            ('encoder.layer',); None finds the lists.
        method: 'modules' follows the module's own forward, 'export' cuts the graph that
            torch.export captures (skip connections, no module lists; the mode of dropout and
            batch norm is fixed then), 'auto' exports only if nothing else can be cut.

    Returns:
        The chain; it covers every parameter.

    Raises:
        PartitionError: A name does not exist, or the sample does not run.
    """
    kwargs = dict(kwargs or {})
    if method == "export":
        return _cut_exported(module, args, kwargs)
    chain = _cut_modules(module, args, kwargs, blocks)
    if chain.num_blocks == 1 and method == "auto" and blocks is None:
        with contextlib.suppress(PartitionError):  # then one block is the answer
            return _cut_exported(module, args, kwargs)
    return chain


def _cut_exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chain:
    exported = export_chain(module, args, kwargs)
    return _cut_modules(exported, args, kwargs, ["blocks"], exported.original_name)


def _cut_modules(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: Sequence[str] | None,
    original_name: Callable[[str], str] = str,
) -> Chain:
    for encoder in module.modules():
        # The nested-tensor fast path changes what flows between layers, not the result.
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.enable_nested_tensor = False
            encoder.use_nested_tensor = False
    candidates = _named_units(module, blocks) if blocks else _found_units(module)
    traced = trace(module, candidates, args, kwargs)
    if not traced.calls:
        raise PartitionError(
            f"{type(module).__name__}: no child module was called with the sample, nothing to "
            "cut: try method='export'"
        )
    owners = _owners(module, traced.calls, traced.glue_parameters)
    ends = _block_ends(len(traced.calls), traced.invalid_cuts, owners)
    block_of = [sum(position > end for end in ends) for position in range(len(traced.calls))]
    names = _all_names(module.named_parameters)
    buffer_names = _all_names(module.named_buffers)
    return Chain(
        module,
        traced.calls,
        ends,
        Tensors(names, _in_blocks(owners, block_of), _keys(names, original_name)),
        Tensors(
            buffer_names,
            _buffer_blocks(buffer_names, traced.calls, block_of),
            _keys(buffer_names, original_name),
        ),
        list(dict.fromkeys(original_name(key) for key in module.state_dict())),
        glue_writes=traced.glue_writes,
    )


def _keys(
    names: Mapping[str, tuple[str, ...]], original_name: Callable[[str], str]
) -> dict[str, tuple[str, ...]]:
    return {
        first: tuple(dict.fromkeys(original_name(name) for name in paths))
        for first, paths in names.items()
    }


def _found_units(module: nn.Module) -> list[str]:
    """Names the children of every module list and of the modules that contain one.

    Elements of a list are units as they are; only `nn.Sequential` elements are opened.
    """
    units: list[str] = []

    def visit(parent: nn.Module, prefix: str, in_list: bool) -> None:
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            is_list = isinstance(child, nn.ModuleList | nn.Sequential)
            if is_list or (not in_list and _contains_list(child)):
                visit(child, f"{path}.", is_list)
            else:
                units.append(path)

    visit(module, "", isinstance(module, nn.ModuleList | nn.Sequential))
    return units


def _contains_list(module: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) and len(child) > 1 for child in module.modules())


def _named_units(module: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names the units when the user names the lists: those, and the siblings of their parents."""
    opened = {""}
    for name in blocks:
        try:
            named = module.get_submodule(name)
        except AttributeError:
            known = [n for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
            raise PartitionError(
                f"blocks: given {name!r}, allowed: names of modules, module lists are {known}"
            ) from None
        if isinstance(named, nn.ModuleList | nn.Sequential):
            opened.add(name)
        parts = name.split(".")
        opened.update(".".join(parts[:i]) for i in range(1, len(parts)))
    units = []
    for path in sorted(opened):
        for name, _ in module.get_submodule(path).named_children():
            child = f"{path}.{name}" if path else name
            if child not in opened:
                units.append(child)
    return units


def _owners(
    module: nn.Module, calls: Sequence[str], glue_parameters: Mapping[str, set[int]]
) -> dict[str, set[int]]:
    """Returns for each parameter, by first name, the unit calls that use it.

    Parameters that glue code uses belong to the next unit call; unused ones to the last.
    """
    first_name: dict[int, str] = {}
    owners: dict[str, set[int]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = first_name.setdefault(id(parameter), name)
        users = owners.setdefault(first, set())
        users.update(p for p, call in enumerate(calls) if name.startswith(f"{call}."))
        users.update(min(p, len(calls) - 1) for p in glue_parameters.get(name, ()))
    for users in owners.values():
        if not users:
            users.add(len(calls) - 1)
    return owners


def _block_ends(
    num_calls: int, invalid_cuts: set[int], owners: Mapping[str, set[int]]
) -> list[int]:
    """Returns the last unit call of each block; a block without parameters joins the last one."""
    with_parameters = {position for users in owners.values() for position in users}
    ends: list[int] = []
    start = 0
    for position in range(num_calls):
        if position in invalid_cuts and position < num_calls - 1:
            continue
        has_parameters = any(p in with_parameters for p in range(start, position + 1))
        if ends and not has_parameters:
            ends[-1] = position
        else:
            ends.append(position)
        start = position + 1
    return ends


def _all_names(
    named: Callable[..., Iterator[tuple[str, torch.Tensor]]],
) -> dict[str, tuple[str, ...]]:
    first_name: dict[int, str] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name, tensor in named(remove_duplicate=False):
        first = first_name.setdefault(id(tensor), name)
        names[first] = (*names.get(first, ()), name)
    return names


def _in_blocks(
    owners: Mapping[str, set[int]], block_of: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted({block_of[p] for p in users})) for name, users in owners.items()}


def _buffer_blocks(
    names: Mapping[str, tuple[str, ...]], calls: Sequence[str], block_of: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    everywhere = tuple(sorted(set(block_of)))
    blocks = {}
    for first, paths in names.items():
        users = {
            block_of[p]
            for p, call in enumerate(calls)
            if any(path.startswith(f"{call}.") for path in paths)
        }
        blocks[first] = tuple(sorted(users)) or everywhere
    return blocks
