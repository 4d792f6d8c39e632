"""A model's costs per block, the work it is run for, and the quality that the user wants."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dora.spec.base import Bytes, Count, Index, Name, NonNegative, Positive, Spec, check


class Timing(Spec):
    """Seconds that one block takes for one micro-batch on the named device."""

    device: Name
    forward_s: NonNegative
    backward_s: NonNegative = 0.0


class BlockCost(Spec):
    """What one block costs for one micro-batch of `microbatch_size` samples.

    Attributes:
        flops: Floating point operations of the forward pass.
        traffic_bytes: Memory read and written by the forward pass.
        num_ops: Operations dispatched by the forward pass.
        activation_bytes: Kept from forward to backward.
        output_bytes: Sent to the next stage if the model is cut after this block.
        timings: Measured or roofline-scaled, one per device.
    """

    microbatch_size: Count
    flops: NonNegative
    traffic_bytes: Bytes = 0
    num_ops: Count = 1
    activation_bytes: Bytes = 0
    output_bytes: Bytes = 0
    timings: tuple[Timing, ...] = ()


class BlockProfile(Spec):
    """One block of the chain, with a cost row per micro-batch size, ascending.

    A parameter that two blocks share counts in both; `ModelProfile.tied` names it.
    """

    name: Name
    num_params: Index = 0
    param_bytes: Bytes = 0
    trainable_bytes: Bytes = 0
    costs: Annotated[tuple[BlockCost, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _sizes_ascend(self) -> BlockProfile:
        sizes = [cost.microbatch_size for cost in self.costs]
        check(sizes == sorted(set(sizes)), f"costs of {self.name}: sizes {sizes} must ascend")
        check(self.trainable_bytes <= self.param_bytes, "trainable_bytes exceeds param_bytes")
        return self


class TiedParameter(Spec):
    """A parameter that several blocks use; each stage that holds one of them keeps a copy."""

    name: Name
    blocks: Annotated[tuple[Index, ...], Field(min_length=2)]
    param_bytes: Bytes


class CodecRate(Spec):
    """Seconds that the named device takes to encode and decode a tensor with one codec.

    Attributes:
        encode_s_per_byte, decode_s_per_byte: Per byte of the tensor, not of its codes.
        call_s: Of every tensor, however small.
    """

    device: Name
    codec: Name
    encode_s_per_byte: NonNegative
    decode_s_per_byte: NonNegative
    call_s: NonNegative = 0.0


class Overhead(Spec):
    """What the named device takes beside its blocks, and what a rest is good for; measured.

    Seconds are such as its timings are: at its steady speed.

    Attributes:
        action_s: Of every forward and every backward that a running stage adds to its blocks.
        message_s: Of its own computing per message that it sends or receives.
        saved_s: Work that it is ahead after it has waited as long, such as an unused quota.
        sprint: Its speed while it uses that up, over the steady one.
    """

    device: Name
    action_s: NonNegative = 0.0
    message_s: NonNegative = 0.0
    saved_s: NonNegative = 0.0
    sprint: Annotated[float, Field(ge=1)] = 1.0


class ModelProfile(Spec):
    """The chain of blocks that a plan splits, and what each block costs.

    Attributes:
        input_bytes: Bytes of one input sample.
        dtype: Of the parameters, such as 'float32'.
        codec_rates: Measured, one per device and codec; others follow the memory bandwidth.
        overheads: Measured, one per device; others have none.
    """

    name: str = "model"
    blocks: Annotated[tuple[BlockProfile, ...], Field(min_length=1)]
    tied: tuple[TiedParameter, ...] = ()
    input_bytes: Bytes = 0
    dtype: str = "float32"
    codec_rates: tuple[CodecRate, ...] = ()
    overheads: tuple[Overhead, ...] = ()

    @model_validator(mode="after")
    def _tied_blocks_exist(self) -> ModelProfile:
        for tied in self.tied:
            check(max(tied.blocks) < len(self.blocks), f"tied {tied.name}: no such block")
        return self


class Workload(Spec):
    """What the model is run for.

    Attributes:
        batch_size: Samples in one step or one request.
        num_microbatches: Pieces a batch is cut into; None lets the planner choose.
        optimizer_bytes_per_param: Optimizer state per parameter, 8 for Adam in fp32.
        prompt_tokens, new_tokens: Of one request, for 'generate'. There a sample of the profile
            is one token: a row at size n is a pass over n tokens, `activation_bytes` what they
            keep in the cache.
        source: Device where the inputs are, such as a camera; a first stage elsewhere has to
            receive them. None: they are wherever the first stage is.
    """

    kind: Literal["train", "infer", "generate"] = "train"
    batch_size: Count = 1
    num_microbatches: Count | None = None
    optimizer_bytes_per_param: NonNegative = 8.0
    prompt_tokens: Index = 0
    new_tokens: Index = 0
    source: Name | None = None

    @model_validator(mode="after")
    def _microbatches_fit(self) -> Workload:
        n = self.num_microbatches
        check(
            n is None or n <= self.batch_size,
            f"num_microbatches: given {n}, allowed 1 to batch_size = {self.batch_size}",
        )
        return self


class QoE(Spec):
    """Quality of experience: hard bounds, and what to minimise inside them.

    Attributes:
        latency_s: Per inference request.   step_s: Per training step.
        deadline_s: For the whole job.      frame_rate_hz: Requests per second to sustain.
        ttft_s, tpot_s: Time to first token, time per output token.
        percentile: Of the time bounds; 50 bounds the median.
        energy_j: Per request or step, all devices.   power_w: Mean power, all devices.
        battery_j: Per request or step, devices on battery.
        max_accuracy_loss: Share of accuracy that compression may cost.
    """

    latency_s: Positive | None = None
    step_s: Positive | None = None
    deadline_s: Positive | None = None
    frame_rate_hz: Positive | None = None
    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    percentile: Annotated[float, Field(gt=0, lt=100)] = 50.0
    energy_j: Positive | None = None
    power_w: Positive | None = None
    battery_j: Positive | None = None
    max_accuracy_loss: NonNegative = 0.0
    objective: Literal["time", "energy"] = "time"
