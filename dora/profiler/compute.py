"""Measures what every block of a model costs on this device.

One pass runs the module's own forward; at each boundary the output is cut off and handed on as
a leaf, as if it had just arrived from another device, so each block has a backward of its own:

    forward    [ block 0 ] cut [ block 1 ] cut [ block 2 + loss ]
    backward   [ block 0 ] <-- [ block 1 ] <-- [ block 2 + loss ]   leaf.grad goes back

Per micro-batch size there are three kinds of pass, since counting slows down what it watches:
one counts FLOPs, operations and bytes, one finds what stays in memory, the others only time.
Parameter gradients accumulate over the passes, as they do over the micro-batches of a step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dora.errors import SpecError
from dora.profiler.codecs import measure_codecs
from dora.profiler.passes import Batch, BlockChain, LossFn, Meter, PassCounter, Progress
from dora.profiler.probes import sent_bytes, tensors_of
from dora.profiler.rest import measure_rest
from dora.spec import BlockCost, BlockProfile, ModelProfile, Overhead, TiedParameter

# (chain, args, kwargs, training) -> processor seconds of an action and of a message.
OverheadOf = Callable[[Any, tuple[Any, ...], Mapping[str, Any], bool], tuple[float, float]]


def profile_model(
    chain: BlockChain,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    device_name: str,
    microbatch_sizes: Sequence[int] = (1, 2, 4, 8),
    training: bool = True,
    loss_fn: LossFn | None = None,
    targets: Any = None,
    warmup: int = 2,
    repeats: int = 5,
    batch_dim: int = 0,
    name: str = "model",
    progress: Progress | None = None,
    overhead: OverheadOf | None = None,
) -> ModelProfile:
    """Runs a chain on this device and returns the cost of each block.

    Weights, gradients, buffers, training flags and random state are as before afterwards.
    An autocast context around the call is honoured.
    ::

        chain = partition(model, (sample,))
        profile = profile_model(chain, (sample,), device_name="laptop")

    Args:
        chain: The partitioned model, on the device to be measured.
        args: Positional inputs of one batch of any size; resized to each micro-batch size.
        kwargs: Keyword inputs of the same batch.
        device_name: Name of this device in the cluster; the timings carry it.
        microbatch_sizes: Samples per micro-batch, one cost row each.
        training: Measure forward and backward; False measures forward without gradients.
        loss_fn: `loss_fn(output, targets)`, part of the last block. Without one, backward starts
            from the output's `loss` where it has one, else from ones for the whole output.
        targets: Second argument of `loss_fn`, resized like the inputs.
        warmup: Passes that are run first and not timed.
        repeats: Least number of timed passes; more run if they are very short. Medians count,
            or means where this process shares the processor or has a quota.
        batch_dim: Dimension of the samples in every input.
        name: Name of the profile.
        progress: Called with passes done and passes in all.
        overhead: Measures that of a runtime (`dora.runtime.overhead`); then a rest counts too.

    Returns:
        Block costs in seconds and bytes. `activation_bytes` is what a block keeps between its
        forward and backward pass, its received input included and its output left to the
        receiver, so the sum over a stage is what the stage keeps; without training it is
        the largest live set of the forward pass, parameters excluded.

    Raises:
        SpecError: An argument is out of range, or the inputs hold no tensor with `batch_dim`.
        PartitionError: The module did not run its blocks in the order of the chain.
    """
    sizes = _checked_sizes(microbatch_sizes, warmup, repeats)
    if loss_fn is None and targets is not None:
        raise SpecError("loss_fn: given None with targets, allowed: a function of both")
    batch = Batch(args, dict(kwargs or {}), targets, loss_fn if training else None)
    device = _device_of(chain.module, batch)
    passes = PassCounter(progress, len(sizes) * (1 + training + warmup + repeats))
    rows = []
    with _undisturbed(chain.module, device, training), torch.set_grad_enabled(training):
        for size in sizes:
            meter = Meter(chain, batch.resized(size, batch_dim), device, training, passes)
            rows.append(meter.costs(size, device_name, warmup, repeats))
        small = batch.resized(sizes[0], batch_dim)
        overheads = _overheads(overhead, chain, small, training, device_name)
    one = batch.resized(1, batch_dim)
    return ModelProfile(
        name=name,
        blocks=tuple(
            _block_profile(block_name, chain.parameters_of(i), tuple(row[i] for row in rows))
            for i, block_name in enumerate(chain.names)
        ),
        tied=_tied(chain),
        input_bytes=sent_bytes((one.args, one.kwargs)),
        dtype=_main_dtype(chain.module),
        codec_rates=measure_codecs(device_name, device),
        overheads=overheads,
    )


@contextmanager
def _undisturbed(module: nn.Module, device: torch.device, training: bool) -> Iterator[None]:
    """Sets the mode; afterwards flags, gradients, buffers and random state are as before.

    The flags of submodules are set only if the root has the other mode: a user may train a
    model of which parts stay in evaluation mode.
    """
    flags = [(m, m.training) for m in module.modules()]
    grads = [(p, p.grad) for p in module.parameters()]
    buffers = [
        (m, name, buffer, buffer.detach().clone())
        for m in module.modules()
        for name, buffer in m._buffers.items()
        if buffer is not None
    ]
    python_state = random.getstate()
    accelerators = [device] if device.type in ("cuda", "xpu") else []
    kind = device.type if accelerators else "cuda"
    with torch.random.fork_rng(accelerators, device_type=kind):
        try:
            for parameter, _ in grads:
                parameter.grad = None
            if module.training != training:
                module.train(training)
            yield
        finally:
            random.setstate(python_state)
            for m, flag in flags:
                m.training = flag
            for parameter, grad in grads:
                parameter.grad = grad
            with torch.no_grad():
                for m, name, buffer, saved in buffers:
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)
                    m._buffers[name] = buffer


def _checked_sizes(sizes: Sequence[int], warmup: int, repeats: int) -> list[int]:
    if not sizes or min(sizes) < 1:
        raise SpecError(f"microbatch_sizes: given {tuple(sizes)}, allowed: counts of at least 1")
    if warmup < 0 or repeats < 1:
        raise SpecError(f"warmup, repeats: given {warmup} and {repeats}, allowed: at least 0 and 1")
    return sorted(set(sizes))


def _block_profile(
    name: str, parameters: Mapping[str, nn.Parameter], costs: tuple[BlockCost, ...]
) -> BlockProfile:
    distinct = list({id(p): p for p in parameters.values()}.values())
    return BlockProfile(
        name=name,
        num_params=sum(p.numel() for p in distinct),
        param_bytes=sum(p.nbytes for p in distinct),
        trainable_bytes=sum(p.nbytes for p in distinct if p.requires_grad),
        costs=costs,
    )


def _tied(chain: BlockChain) -> tuple[TiedParameter, ...]:
    named = dict(chain.module.named_parameters(remove_duplicate=False))
    return tuple(
        TiedParameter(name=name, blocks=blocks, param_bytes=named[name].nbytes)
        for name, blocks in chain.tied().items()
    )


def _device_of(module: nn.Module, batch: Batch) -> torch.device:
    tensors = [*module.parameters(), *tensors_of((batch.args, batch.kwargs))]
    return tensors[0].device if tensors else torch.device("cpu")


def _overheads(
    measure: OverheadOf | None, chain: BlockChain, batch: Batch, training: bool, device_name: str
) -> tuple[Overhead, ...]:
    """Returns what there is beside the blocks, in seconds of this thread's share."""
    if measure is None or _device_of(chain.module, batch).type != "cpu":
        return ()
    action_cpu_s, message_cpu_s = measure(chain, batch.args, batch.kwargs, training)
    rest = measure_rest()
    found = Overhead(
        device=device_name,
        action_s=action_cpu_s * rest.sprint,
        message_s=message_cpu_s * rest.sprint,
        saved_s=rest.saved_s,
        sprint=rest.sprint,
    )
    return (found,)


def _main_dtype(module: nn.Module) -> str:
    """Returns the dtype that holds most parameter bytes."""
    num_bytes: dict[torch.dtype, int] = {}
    for p in module.parameters():
        num_bytes[p.dtype] = num_bytes.get(p.dtype, 0) + p.nbytes
    dtype = max(num_bytes, key=lambda d: num_bytes[d], default=torch.get_default_dtype())
    return str(dtype).removeprefix("torch.")
