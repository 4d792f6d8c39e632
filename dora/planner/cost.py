"""What a placement costs: seconds per block and transfer, bytes per device.

Pure functions of the profile, the cluster and the workload. `links` gives what each ordered pair
of devices has alone, whatever else is sent; contention is priced where a step is played.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dora import _C
from dora.spec import BlockCost, BlockProfile, Cluster, Device, ModelProfile, Workload

Array = NDArray[np.float64]

# Per direction: one buffer is read while the next micro-batch, posted ahead, fills another.
RECEIVE_BUFFERS = 2


class StageCosts(NamedTuple):
    """What a stage of blocks `first` to `end - 1` costs for one micro-batch.

    Every array but the last ends in the axes `[first, end]`; entries with end <= first mean
    nothing.

    Attributes:
        forward_s, backward_s: Leading axis: device.
        state_bytes: Parameters, and for training their gradients and optimizer state.
        gradient_bytes: Of the gradients that replicas reduce.
        activation_bytes: Kept from forward to backward.
        buffer_bytes: Receive buffers; forward only, also the largest block at work.
        boundary_bytes: `[k]` is sent into block k; entry 0 is the model's input.
        tied_bytes: (blocks, gradient bytes) of each parameter that several blocks use.
    """

    forward_s: Array
    backward_s: Array
    state_bytes: Array
    gradient_bytes: Array
    activation_bytes: Array
    buffer_bytes: Array
    boundary_bytes: Array
    tied_bytes: tuple[tuple[tuple[int, ...], float], ...]

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.boundary_bytes)


class Links(NamedTuple):
    """Delay and seconds per byte between devices by index; infinite where no link is."""

    latency_s: Array
    s_per_byte: Array


def microbatch_size(workload: Workload, num_microbatches: int) -> int:
    """Returns the samples of the largest micro-batch; of 'generate', the tokens of the prompt."""
    samples = workload.batch_size
    if workload.kind == "generate":
        samples *= max(workload.prompt_tokens, 1)
    return -(-samples // num_microbatches)


def interpolate(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """Returns the value at `size`, linear between the measured sizes.

    Outside of them the nearest two points are extended, but never below what proportionality
    gives; a single point is scaled in proportion.
    """
    i = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    if len(sizes) == 1:
        return values[0] * size / sizes[0]
    slope = (values[i] - values[i - 1]) / (sizes[i] - sizes[i - 1])
    value = values[i - 1] + slope * (size - sizes[i - 1])
    if size < sizes[0]:
        return max(value, values[0] * size / sizes[0])
    # Noise may make the larger of two measured sizes the faster one.
    return max(value, values[-1]) if size > sizes[-1] else value


def block_time_s(block: BlockProfile, device: str, size: int) -> tuple[float, float]:
    """Returns (forward, backward) seconds of a block for one micro-batch on a device.

    Raises:
        ValueError: The block has no timing for that device.
    """
    rows = [
        (cost.microbatch_size, timing)
        for cost in block.costs
        for timing in cost.timings
        if timing.device == device
    ]
    if not rows:
        raise ValueError(
            f"block {block.name!r} has no timing for device {device!r}; measure it there, or call "
            "dora.catalog.scale_profile(profile, device)"
        )
    sizes = [size for size, _ in rows]
    forward_s = interpolate(sizes, [t.forward_s for _, t in rows], size)
    return forward_s, interpolate(sizes, [t.backward_s for _, t in rows], size)


def stage_costs(
    profile: ModelProfile, devices: Sequence[Device], workload: Workload, num_microbatches: int
) -> StageCosts:
    """Returns what every stage costs on every device at that number of micro-batches.

    Raises:
        ValueError: A block has no timing for one of the devices.
    """
    size = microbatch_size(workload, num_microbatches)
    return costs_at_size(profile, devices, workload, size)


def costs_at_size(
    profile: ModelProfile, devices: Sequence[Device], workload: Workload, size: int
) -> StageCosts:
    """Returns the same for micro-batches of `size` samples."""
    training = workload.kind == "train"
    times = np.array([[block_time_s(b, d.name, size) for b in profile.blocks] for d in devices])
    gradients = [b.trainable_bytes if training else 0 for b in profile.blocks]
    states = [_state_bytes(b, workload) for b in profile.blocks]
    activations = [_at_size(b.costs, "activation_bytes", size) for b in profile.blocks]
    outputs = [_at_size(b.costs, "output_bytes", size) for b in profile.blocks]
    boundaries = np.array([profile.input_bytes * size, *outputs[:-1]], dtype=float)
    tied_gradients = _tied(profile, gradients)
    return StageCosts(
        forward_s=_spans(times[:, :, 0]),
        backward_s=_spans(times[:, :, 1] * training),
        state_bytes=_spans(states) - _duplicates(_tied(profile, states), len(states)),
        gradient_bytes=_spans(gradients) - _duplicates(tied_gradients, len(states)),
        activation_bytes=_spans(activations) * training,
        buffer_bytes=_buffers(boundaries, _working(activations, outputs, workload), training),
        boundary_bytes=boundaries,
        tied_bytes=tied_gradients,
    )


def _working(activations: Sequence[float], outputs: Sequence[float], workload: Workload) -> Array:
    """Returns what a block without backward needs while it works; a cache is kept, not working."""
    if workload.kind == "generate":
        return np.array(outputs)
    return np.maximum(activations, outputs)


def _at_size(costs: Sequence[BlockCost], field: str, size: int) -> float:
    sizes = [cost.microbatch_size for cost in costs]
    return interpolate(sizes, [getattr(cost, field) for cost in costs], size)


def _state_bytes(block: BlockProfile, workload: Workload) -> float:
    """Returns bytes of what is kept: parameters, gradients and optimizer state, or the cache."""
    if workload.kind == "generate":
        tokens = workload.batch_size * (workload.prompt_tokens + workload.new_tokens)
        return block.param_bytes + _at_size(block.costs, "activation_bytes", max(tokens, 1))
    if workload.kind != "train":
        return block.param_bytes
    trained = block.trainable_bytes / block.param_bytes if block.param_bytes else 0.0
    optimizer = workload.optimizer_bytes_per_param * block.num_params * trained
    return block.param_bytes + block.trainable_bytes + optimizer


def _tied(
    profile: ModelProfile, values: Sequence[float]
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Returns, per tied parameter, its blocks and its part of the first one's value."""
    copies = []
    for tied in profile.tied:
        whole = profile.blocks[tied.blocks[0]].param_bytes
        part = min(1.0, tied.param_bytes / whole) if whole else 0.0
        copies.append((tied.blocks, part * values[tied.blocks[0]]))
    return tuple(copies)


def _spans(values: Sequence[float] | Array) -> Array:
    """Returns sums over blocks as `[first, end]`, replacing the last axis."""
    sums = np.cumsum(np.asarray(values, dtype=float), axis=-1)
    sums = np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], axis=-1)
    return np.asarray(sums[..., None, :] - sums[..., :, None])


def _duplicates(copies: Sequence[tuple[tuple[int, ...], float]], num_blocks: int) -> Array:
    """Returns `[first, end]` bytes that a stage counts again although it keeps one copy."""
    again = np.zeros((num_blocks + 1, num_blocks + 1))
    for blocks, copy_bytes in copies:
        uses = np.zeros(num_blocks)
        uses[list(blocks)] = 1
        again += np.maximum(_spans(uses) - 1, 0) * copy_bytes
    return again


def _buffers(boundaries: Array, working: Array, training: bool) -> Array:
    """Returns `[first, end]` bytes that are neither state nor kept activations."""
    # The input of the model is not received, and nothing is sent behind its last block.
    received = np.array([0.0, *boundaries[1:], 0.0])
    ends = received[:, None] + received[None, :]
    if training:
        return np.asarray(RECEIVE_BUFFERS * ends)
    largest = np.zeros((len(received), len(received)))
    for first in range(len(working)):
        largest[first, first + 1 :] = np.maximum.accumulate(working[first:])
    return np.asarray((RECEIVE_BUFFERS - 1) * received[:, None] + ends + largest)


def links(cluster: Cluster, devices: Sequence[Device]) -> Links:
    """Returns latency and inverse rate of each ordered pair, as if it were alone."""
    latency = np.full((len(devices), len(devices)), np.inf)
    s_per_byte = latency.copy()
    index = {device.name: i for i, device in enumerate(devices)}
    media = {medium.name: medium for medium in cluster.media}
    for link in cluster.links:
        if link.src in index and link.dst in index:
            pair = index[link.src], index[link.dst]
            crossed = [media[name] for name in link.media]
            s_per_byte[pair] = max(
                link.media.count(medium.name) / medium.rate_bytes_per_s for medium in crossed
            )
            latency[pair] = sum(medium.latency_s for medium in crossed)
    return Links(latency, s_per_byte)


def share_microbatches(
    times_s: Sequence[float] | Array, num_microbatches: int
) -> NDArray[np.int64]:
    """Returns how many micro-batches each replica gets so that the last ends earliest.

    Each micro-batch goes to the replica that would finish it first, which is optimal for the
    latest finish; ties go to the lower index.

    Args:
        times_s: Per replica, seconds of one micro-batch.
        num_microbatches: To be spread.
    """
    times = [float(time) for time in times_s]
    return np.array(_C.share_microbatches(times, num_microbatches), dtype=np.int64)
