"""Cuts the exported graph of a model into a chain of blocks: the way for models with skips.

`blocks.py` needs one value per boundary, so it can not cut a U-Net, an encoder-decoder or a
model written with functional calls. Here `torch.export` captures one flat graph, and every
boundary carries a tuple with all that later blocks need: block 0 -> (h, skip) -> block 1 -> ...

Cuts lie only before a node that reads a parameter, never inside the life of a value that is
not a tensor or is still changed in place, never between two uses of a buffer that is written.
The share of a node is the mean of its part of all FLOPs and of all parameter bytes. Around each
k / max_blocks of the cumulated share, a window of 1 / max_blocks yields the cut with the fewest
live bytes; ties go to the cut nearest to the middle, then to the first.

What depends on no parameter (masks, positions, sizes) is *glue*: no boundary carries it, each
block that needs it computes it again from the model inputs, which every rank has.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from dora.errors import PartitionError

_HigherOrder = torch._ops.HigherOrderOperator
# They write their running statistics (arguments 3, 4) when argument 5 is set; no schema says so.
_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


class ExportedChain(nn.Module):
    """A model as a chain of graph segments; called like the model, it returns the same.

    The segments hold the model's own parameters and buffers as `blocks.<i>.module.<name>`: one
    that several segments use is in each of them, one that none uses is in the last. Tuples of
    tensors, some without gradient, go from block to block: `forward` shows how.

    Attributes:
        blocks: The segments.
        names: One per block: the modules of its first and its last parameter.
        input_indices: For each block, the flat model inputs that it takes after the values.
        dynamic_batch: Whether other batch sizes than that of the sample can run.
    """

    def __init__(self, module: nn.Module, exported: ExportedProgram, max_blocks: int) -> None:
        """Cuts a captured module; `export_chain` captures it and calls this."""
        super().__init__()
        program = _Program(exported)
        cuts = _choose_cuts(program, max_blocks)
        bounds = [*zip([0, *cuts], [*cuts, len(program.nodes)], strict=True)]
        segments = [program.segment(start, stop) for start, stop in bounds]
        self.blocks = _build_blocks(module, program, [graph for graph, _ in segments])
        self.names = tuple(program.name(start, stop) for start, stop in bounds)
        self.input_indices = tuple(tuple(map(program.inputs.index, used)) for _, used in segments)
        self._samples = [_describe(node.meta["val"]) for node in program.inputs]
        self.dynamic_batch = any(None in s for s in self._samples if isinstance(s, tuple))
        self._in_spec, self._out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
        self._signature = inspect.signature(module.forward)
        bound = self._signature.bind(*exported.example_inputs[0], **exported.example_inputs[1])
        self._argument_names = {*bound.arguments, *bound.kwargs}
        super().train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs all blocks in order; the arguments and the result are those of the model."""
        inputs = self.flatten(args, kwargs)
        values: tuple[Any, ...] = ()
        for block, indices in zip(self.blocks, self.input_indices, strict=True):
            values = block(*values, *(inputs[i] for i in indices))
        return self.unflatten(values)

    def train(self, mode: bool = True) -> ExportedChain:
        """Raises PartitionError for the mode that was not captured: the graph fixes dropout."""
        if mode != self.training:
            raise PartitionError(
                f"the chain was captured with training={self.training}, which fixes dropout and "
                f"batch norm: call module.train({mode}) and export_chain again"
            )
        return self

    def original_name(self, key: str) -> str:
        """Returns the key of the model's state dict for a key of this chain's state dict."""
        blocks, _, holder, name = key.split(".", 3) if key.count(".") > 2 else ("", "", "", "")
        if (blocks, holder) != ("blocks", "module"):
            raise KeyError(f"given {key!r}, allowed: blocks.<index>.module.<name>")
        return name

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Returns the leaves of the model inputs, in the order that `input_indices` counts.

        Raises PartitionError where structure, constants or fixed sizes are not the sample's.
        """
        positional, keyword = self._in_spec.children()
        try:
            bound = self._signature.bind(*args, **kwargs)
            if extra := {*bound.arguments, *bound.kwargs} - self._argument_names:
                raise TypeError(f"the sample had no {', '.join(sorted(extra))}")
            bound.apply_defaults()
            named = {**bound.arguments, **bound.kwargs}
            # The sample decides which inputs are positional, however the caller gives them.
            has_star = any(p.kind is p.VAR_POSITIONAL for p in self._signature.parameters.values())
            ordered = bound.args if has_star else bound.args[: positional.num_children]
            leaves, spec = pytree.tree_flatten((ordered, {n: named[n] for n in keyword.context}))
            if spec != self._in_spec:
                raise TypeError(f"given {spec}, the sample had {self._in_spec}")
        except (TypeError, KeyError) as error:
            raise PartitionError(f"inputs: {error}; give those of the capture") from error
        for index, (leaf, sample) in enumerate(zip(leaves, self._samples, strict=True)):
            given = _describe(leaf, sample)
            if type(given) is not type(sample) or given != sample:
                raise PartitionError(
                    f"input {index}: given {given}, captured with {sample} (None is a free size): "
                    "for other sizes or constants call export_chain again"
                )
        return leaves

    def unflatten(self, values: Iterable[Any]) -> Any:
        """Returns the model's output, of which `values`, from the last block, are the leaves."""
        return pytree.tree_unflatten(values, self._out_spec)


def export_chain(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    max_blocks: int = 32,
    batch_dim: int = 0,
) -> ExportedChain:
    """Captures `module` with `torch.export` and cuts the graph into at most `max_blocks` blocks.

    The capture fixes the module's present mode and the device of tensors made in `forward`.

    Args:
        module: Any module that `torch.export` can capture; it stays usable as before.
        args: Positional inputs of one forward call; a batch of two or more leaves the batch
            size free unless the model fixes it, a batch of one fixes it.
        kwargs: Keyword inputs.
        max_blocks: Upper bound on the number of blocks, at least 1.
        batch_dim: Dimension of the batch, in each tensor that has the first one's size there.

    Returns:
        The chain; the same module and sample give the same cuts.

    Raises:
        PartitionError: `max_blocks` is not positive, or the capture fails.
    """
    if max_blocks < 1:
        raise PartitionError(f"max_blocks: given {max_blocks}, allowed: at least 1")
    return ExportedChain(module, _capture(module, args, dict(kwargs or {}), batch_dim), max_blocks)


def _capture(module: nn.Module, args: Any, kwargs: Any, batch_dim: int) -> ExportedProgram:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
    tensors = filter(torch.is_tensor, pytree.tree_leaves((args, kwargs)))
    batched = [tensor for tensor in tensors if tensor.dim() > batch_dim]
    free: Any = ShapesCollection()
    for tensor in batched:
        if tensor.shape[batch_dim] == batched[0].shape[batch_dim]:
            free[tensor] = {batch_dim: Dim.AUTO}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused layer can not be cut
    try:
        with torch.enable_grad():
            try:
                return torch.export.export(module, args, kwargs, dynamic_shapes=free)
            except Exception:  # some operators take no free sizes; AUTO covers other reasons
                return torch.export.export(module, args, kwargs)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PartitionError(
            f"torch.export can not capture {type(module).__name__}: {reason}; name the block "
            "lists by hand instead: blocks=['name.of.layers']"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _Program:
    """The captured graph, sorted into nodes that run once and glue that any segment can redo.

    `nodes` run once, in this order (an input that is changed in place is one of them); `anchors`
    are those that read a parameter; `position` and `last_use` are indices in `nodes`.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        graph = exported.module(check_guards=False).graph
        self.order = list(graph.nodes)
        self.inputs = graph.find_nodes(op="placeholder")
        self.output = graph.output_node()
        self.read = {node: _attribute(node) for node in graph.find_nodes(op="get_attr")}
        self.parameters = {n: p for n, p in self.read.items() if isinstance(p, nn.Parameter)}
        self.changed = _changed_groups(graph)
        fixed = set(self.parameters).union(*(members for members, _ in self.changed))
        glue: set[fx.Node] = set()
        self.nodes: list[fx.Node] = []
        for node in graph.nodes:
            runs = node.op in ("call_function", "placeholder")
            acts = node in fixed or any(map(_acts, _inner(node)))
            if not acts and glue.issuperset(node.all_input_nodes):
                glue.add(node)
            elif runs and not str(node.target).startswith(("aten._assert", "aten.sym_constrain")):
                self.nodes.append(node)
        parameters = self.parameters.keys()
        self.anchors = [n for n in self.nodes if parameters & set(n.all_input_nodes)]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        ends = {**self.position, self.output: len(self.nodes)}
        self.last_use = {n: max((ends.get(u, -1) for u in n.users), default=-1) for n in self.nodes}

    def crossing(self, cut: int) -> list[fx.Node]:
        """Returns the nodes before the cut whose values are needed after it."""
        return [node for node in self.nodes[:cut] if self.last_use[node] >= cut]

    def live_bytes(self) -> list[float]:
        """Returns for each cut the bytes that cross it; inf where it must not be."""
        live = [0.0] * (len(self.nodes) + 1)
        for node, start in self.position.items():
            val: Any = node.meta.get("val")
            size = math.prod(_sizes(val)) * val.itemsize if torch.is_tensor(val) else math.inf
            for cut in range(start + 1, self.last_use[node] + 1):
                live[cut] += size
        for members, writers in self.changed:
            touched = {user for node in members for user in (node, *node.users)}
            uses = {self.position[node] for node in touched if node in self.position}
            # Readers of a written buffer stay with it; a value moves on after the last write.
            is_buffer = any(node.op == "get_attr" for node in members)
            stop = max(uses) if is_buffer else max(self.position[node] for node in writers)
            live[min(uses) + 1 : stop + 1] = [math.inf] * (stop - min(uses))
        return live

    def segment(self, start: int, stop: int) -> tuple[fx.Graph, list[fx.Node]]:
        """Builds the graph of `nodes[start:stop]`; returns it and the model inputs it takes."""
        outputs: Any = tuple(self.crossing(stop)) if stop < len(self.nodes) else self.output.args[0]
        values = self.crossing(start)
        body = {*self.nodes[start:stop], *pytree.tree_leaves(outputs)}
        for node in reversed(self.order):
            if node in body and node not in values:
                body.update(node.all_input_nodes)
        ordered = [node for node in self.order if node in body and node not in values]
        inputs = [node for node in ordered if node.op == "placeholder"]
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in [*values, *inputs]}
        for node in ordered:
            if node.op != "placeholder":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta.pop("val", None)  # a fake tensor can not be copied or saved
                if node.op == "get_attr":
                    copies[node].target = f"module.{node.target}"
        graph.output(fx.map_arg(outputs, copies.__getitem__))
        return graph, inputs

    def name(self, start: int, stop: int) -> str:
        """Names a segment after the modules of its first and its last anchor."""
        anchors = [n for n in self.anchors if start <= self.position[n] < stop]
        stacks = [n.meta.get("nn_module_stack", {}).values() for n in anchors]
        paths = [path or "(root)" for stack in stacks for path, _ in [*stack][-1:]] or ["(root)"]
        return paths[0] if paths[0] == paths[-1] else f"{paths[0]}..{paths[-1]}"


def _choose_cuts(program: _Program, max_blocks: int) -> list[int]:
    """Returns the cuts, as indices into `program.nodes`; see the module docstring."""
    live, shares = program.live_bytes(), _shares(program)
    best: dict[int, tuple[float, float, int]] = {}
    for node in program.anchors[1:]:
        cut = program.position[node]
        place = math.fsum(shares[:cut]) * max_blocks
        # A write that nothing reads, such as a batch norm's counter, goes with the next node.
        while not program.nodes[cut - 1].users and _effects(program.nodes[cut - 1])[1]:
            cut -= 1
        choice = (live[cut], abs(place - round(place)), cut)
        if 0 < round(place) < max_blocks and live[cut] != math.inf:
            best[round(place)] = min(best.get(round(place), choice), choice)
    return sorted(cut for _, _, cut in best.values())


def _shares(program: _Program) -> list[float]:
    flops, num_bytes, counted = [], [], set[fx.Node]()
    for node in program.nodes:
        read = program.parameters.keys() & set(node.all_input_nodes)
        flops.append(_flops(node, [program.parameters[arg] for arg in read]))
        num_bytes.append(sum(program.parameters[arg].nbytes for arg in read - counted))
        counted |= read
    total_flops, total_bytes = sum(flops) or 1, sum(num_bytes) or 1
    return [(f / total_flops + b / total_bytes) / 2 for f, b in zip(flops, num_bytes, strict=True)]


def _flops(node: fx.Node, parameters: Sequence[nn.Parameter]) -> int:
    """Estimates FLOPs: two per weight of a matrix and output position, one per other element."""
    tensors = filter(torch.is_tensor, pytree.tree_leaves(node.meta.get("val")))
    shapes, name = [_sizes(tensor) for tensor in tensors], str(node.target)
    num_elements = sum(map(math.prod, shapes))
    num_weights = sum(weight.numel() for weight in parameters if weight.dim() > 1)
    if not num_weights or not any(shapes[:1]) or "embedding" in name:
        return num_elements
    num_channels = shapes[0][1 if "conv" in name and len(shapes[0]) > 1 else -1]
    return 2 * num_weights * num_elements // max(num_channels, 1)


def _changed_groups(graph: fx.Graph) -> list[tuple[set[fx.Node], list[fx.Node]]]:
    """Returns the groups of nodes that may share memory which is changed, with their writers."""
    group = {node: {node} for node in graph.nodes}
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        aliased, written = _effects(node)
        for arg in aliased:
            group[arg] |= group[node]
            group.update(dict.fromkeys(group[arg], group[arg]))
        for arg in written:
            writers.setdefault(arg, []).append(node)
    groups = {id(group[arg]): group[arg] for arg in writers}
    return [(g, [w for arg in g for w in writers.get(arg, ())]) for g in groups.values()]


def _effects(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Returns the arguments whose memory the result may share, and those changed in place."""
    target, args = node.target, node.all_input_nodes
    if isinstance(target, _HigherOrder):
        args = [arg for arg in args if not isinstance(_attribute(arg), nn.Module)]
        return args, args if any(_effects(inner)[1] for inner in _inner(node)) else []
    if not isinstance(target, torch._ops.OpOverload):
        return args[:1] if target is operator.getitem else [], []
    if target in _NORMS:
        return [], [arg for arg in node.args[3:5] if isinstance(arg, fx.Node) and node.args[5]]
    if torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return args[:1], []  # such as dropout, which in eval mode returns its input itself
    alias = [(a.alias_info, v) for a, v in zip(target._schema.arguments, node.args, strict=False)]
    shared = [(a.is_write, n) for a, v in alias if a for n in pytree.tree_leaves(v) if n]
    return [n for _, n in shared], [n for is_write, n in shared if is_write]


def _acts(node: fx.Node) -> bool:
    """Whether a second run of an operator would give another value or change something."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or bool(_effects(node)[1])


def _inner(node: fx.Node) -> list[fx.Node]:
    """Returns the operators that a higher-order operator (no_grad, autocast) runs, or itself."""
    if not isinstance(node.target, _HigherOrder):
        return [node]
    graphs = [m.graph for m in map(_attribute, node.all_input_nodes) if hasattr(m, "graph")]
    return [inner for graph in graphs for n in graph.nodes for inner in _inner(n)]


def _attribute(node: fx.Node) -> Any:
    path = str(node.target).split(".") if node.op == "get_attr" else None
    return functools.reduce(getattr, path, node.graph.owning_module) if path else None


def _build_blocks(module: nn.Module, program: _Program, graphs: list[fx.Graph]) -> nn.ModuleList:
    """Returns graph modules that hold the tensors they read, under all names of each."""
    named: dict[str, Any] = {str(node.target): value for node, value in program.read.items()}
    named.update(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    saved = module.state_dict(keep_vars=True).keys()
    unused = {id(value) for value in named.values()}
    blocks = nn.ModuleList()
    for graph in graphs:
        targets = [str(n.target).removeprefix("module.") for n in graph.find_nodes(op="get_attr")]
        used = {id(named[target]) for target in targets}
        unused -= used
        block = fx.GraphModule(nn.Module(), fx.Graph(), "Block")
        for name, value in named.items():
            if id(value) in used or (graph is graphs[-1] and id(value) in unused):
                _place(block, f"module.{name}", value, is_saved=name in saved)
        block.graph = graph
        blocks.append(block)
    return blocks


def _place(owner: Any, name: str, value: Any, *, is_saved: bool) -> None:
    *path, leaf = name.split(".")
    for part in path:
        owner = owner._modules.setdefault(part, nn.Module())
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        owner.register_buffer(leaf, value, persistent=is_saved)
    else:
        setattr(owner, leaf, value)


def _describe(value: Any, like: Any = None) -> Any:
    """Returns a shape, with None for sizes that are free (in `like`), or else the value itself."""
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [s.node.maybe_as_int() if isinstance(s, torch.SymInt) else s for s in value.shape]
    free = like if isinstance(like, tuple) and len(like) == len(sizes) else sizes
    return tuple(None if f is None else s for s, f in zip(sizes, free, strict=True))


def _sizes(tensor: torch.Tensor) -> list[int]:
    """Returns the sizes in the sample; a size that only data decide counts as 1."""
    return [s if isinstance(s, int) else int(s.node.hint or 1) for s in tensor.shape]
