"""Predicts how long blocks take on a device where they were not measured.

    t = max(flops / (efficiency * peak), traffic / (mem_efficiency * bandwidth)) + ops * dispatch

One efficiency number per device is not enough. PyTorch on a Jetson AGX Orin reaches 2.15 TFLOP/s
on ResNet-50 at batch 16 (0.40 of peak) but 0.26 at batch 1 (0.05): with 0.40 for both, batch 1
comes out 8 times too fast, MobileNetV2 15 times. The missing time is dispatch: about 175 operations
at 190 us are 33 ms, the arithmetic of one image 4 ms. So operations are priced one by one. The
per-operation maximum is taken once per block, which is exact when a block is all compute-bound or
all memory-bound. See Williams et al., Roofline, CACM 2009; anchors: branes-ai/graphs (b6c5e829).
"""

from __future__ import annotations

from collections.abc import Sequence

from dora.spec import BlockCost, Cluster, Device, ModelProfile, Timing

# The gradient of the inputs and the gradient of the weights each cost one forward pass: as many
# multiplications, operands of the same size, and one operation each. Too much for frozen blocks.
BACKWARD_PER_FORWARD = 2.0


def roofline_s(
    device: Device,
    *,
    flops: float,
    traffic_bytes: float,
    num_ops: float,
    sustained: bool = True,
) -> float:
    """Returns the seconds that `device` takes for that work.

    Args:
        device: Peak rates, efficiencies and dispatch overhead.
        flops: Floating point operations, a multiply-add being two.
        traffic_bytes: Bytes read from and written to memory.
        num_ops: Operations dispatched, such as kernels launched.
        sustained: After minutes of full load. Throttling slows arithmetic, hardly memory.
    """
    heat = device.thermal_factor if sustained else 1.0
    compute_s = flops / (device.efficiency * heat * device.flops_per_s)
    memory_s = traffic_bytes / (device.mem_efficiency * device.mem_bandwidth_bytes_per_s)
    return max(compute_s, memory_s) + num_ops * device.dispatch_s


def scale_profile(
    profile: ModelProfile, device: Device, *, training: bool = True, sustained: bool = True
) -> ModelProfile:
    """Adds predicted times on `device` for every block and micro-batch size.

    Times that the profile already has for this device name stay: measured beats predicted.
    ::

        profile = scale_profile(profile, catalog.device("rpi5-8gb"))

    Args:
        profile: With FLOPs, traffic and operation counts.
        device: Its `name` is what the times are stored under.
        training: Adds the backward pass too, at twice the forward pass.
        sustained: Plan for a device that is warm; a plan has to hold after the first minute.
    """
    return _scaled(profile, [device], training, sustained)


def scale_to_cluster(
    profile: ModelProfile, cluster: Cluster, *, training: bool = True, sustained: bool = True
) -> ModelProfile:
    """Adds predicted times for every device of the cluster that the profile lacks."""
    return _scaled(profile, cluster.devices, training, sustained)


def _scaled(
    profile: ModelProfile, devices: Sequence[Device], training: bool, sustained: bool
) -> ModelProfile:
    blocks = tuple(
        block.model_copy(
            update={"costs": tuple(_timed(c, devices, training, sustained) for c in block.costs)}
        )
        for block in profile.blocks
    )
    return profile.model_copy(update={"blocks": blocks})


def _timed(
    cost: BlockCost, devices: Sequence[Device], training: bool, sustained: bool
) -> BlockCost:
    known = {timing.device for timing in cost.timings}
    new = [_timing(cost, d, training, sustained) for d in devices if d.name not in known]
    return cost.model_copy(update={"timings": (*cost.timings, *new)})


def _timing(cost: BlockCost, device: Device, training: bool, sustained: bool) -> Timing:
    forward_s = roofline_s(
        device,
        flops=cost.flops,
        traffic_bytes=cost.traffic_bytes,
        num_ops=cost.num_ops,
        sustained=sustained,
    )
    # All three terms double, and so does the maximum of the first two.
    backward_s = BACKWARD_PER_FORWARD * forward_s if training else 0.0
    return Timing(device=device.name, forward_s=forward_s, backward_s=backward_s)
