"""Measures how fast this device encodes and decodes tensors, for the planner's choice of codecs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from dora.kernels import TILE, Format, channel_factors, quantize_pack, unpack_dequantize
from dora.profiler.probes import Clock
from dora.spec import CodecRate

FORMATS = {
    "int8": Format("int8"),
    "int4": Format("int4"),
    "int4-smooth": Format("int4", smooth=True),
    "fp8": Format("fp8"),
}
# As much as the runtime encodes at a time, out of so many tensors that no cache holds them all:
# what a stage has just computed is warm, what it has received is not.
_ROWS, _CHANNELS, _TENSORS = 64 * TILE // 1024, 1024, 16
# Rounds over all tensors; the median counts.
_ROUNDS = 5


def measure_codecs(device_name: str, device: torch.device) -> tuple[CodecRate, ...]:
    """Returns what each codec takes on this device; some tens of milliseconds on a CPU.

    Args:
        device_name: Name of this device in the cluster.
        device: To measure.
    """
    return tuple(_rate(name, format, device_name, device) for name, format in FORMATS.items())


def _rate(name: str, format: Format, device_name: str, device: torch.device) -> CodecRate:
    clock = Clock(device)
    encode_s, decode_s = _seconds(format, _ROWS, device, clock)
    small_s = sum(_seconds(format, 1, device, clock)) / 2
    num_bytes = _ROWS * _CHANNELS * 4
    return CodecRate(
        device=device_name,
        codec=name,
        encode_s_per_byte=max(encode_s - small_s, 0.0) / num_bytes,
        decode_s_per_byte=max(decode_s - small_s, 0.0) / num_bytes,
        call_s=small_s,
    )


def _seconds(format: Format, rows: int, device: torch.device, clock: Clock) -> tuple[float, float]:
    """Returns the seconds of encoding and of decoding a tensor of so many rows."""
    generator = torch.Generator(device).manual_seed(0)  # the user's own is left alone
    shape = _TENSORS, rows, _CHANNELS
    tensors = list(torch.randn(shape, device=device, generator=generator))
    scales = [channel_factors(x) if format.smooth else None for x in tensors]
    wires = [quantize_pack(x, format, factors=f) for x, f in zip(tensors, scales, strict=True)]

    def encode(i: int) -> None:
        factors = channel_factors(tensors[i]) if format.smooth else None
        quantize_pack(tensors[i], format, factors=factors, out=wires[i])

    def decode(i: int) -> None:
        x = tensors[i]
        unpack_dequantize(wires[i], x.shape, x.dtype, format, factors=scales[i], out=x)

    return _each_s(encode, clock), _each_s(decode, clock)


def _each_s(work: Callable[[int], None], clock: Clock) -> float:
    """Returns the seconds of one call, as the median over rounds of all tensors."""
    times_s = []
    for _ in range(_ROUNDS):
        clock.synchronize()
        start_s = time.perf_counter()
        for i in range(_TENSORS):
            work(i)
        clock.synchronize()
        times_s.append((time.perf_counter() - start_s) / _TENSORS)
    return median(times_s)
