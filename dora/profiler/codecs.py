"""Measures how fast this device encodes and decodes tensors, for the planner's choice of codecs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from dora.kernels import TILE, Format, channel_factors, quantize_pack, unpack_dequantize
from dora.profiler.probes import OWN_SHARE, Clock
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
# How long it takes to see whether the processor is shared, and then how much of it there is: the
# rounds are over within one period of a quota.
_GLANCE_S, _SHARE_S = 0.02, 0.2


def measure_codecs(device_name: str, device: torch.device) -> tuple[CodecRate, ...]:
    """Returns what each codec takes on this device; some tens of milliseconds on a CPU.

    Args:
        device_name: Name of this device in the cluster.
        device: To measure.
    """
    timer = _Timer(device)
    return tuple(_rate(name, format, device_name, timer) for name, format in FORMATS.items())


class _Timer:
    """Times short calls as if they had been long: a quota stops those and lets these pass.

    On a CPU it is the thread's own time that counts, over the share of the processor that this
    thread gets.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clock = Clock(device)
        self._share = _processor_share() if self._clock.is_cpu else 1.0

    def now_s(self) -> float:
        """Returns the seconds so far, once the device has done all work."""
        self._clock.synchronize()
        return time.thread_time() / self._share if self._clock.is_cpu else time.perf_counter()


def _processor_share() -> float:
    """Returns how much of a processor this thread gets while it computes, at most 1."""
    x, format = torch.ones(_ROWS, _CHANNELS), FORMATS["int8"]
    start_s, start_cpu_s = time.perf_counter(), time.thread_time()
    while True:
        quantize_pack(x, format)
        spent_s, share = time.perf_counter() - start_s, 1.0
        if spent_s >= _GLANCE_S:
            share = (time.thread_time() - start_cpu_s) / spent_s
        if spent_s >= _SHARE_S or (spent_s >= _GLANCE_S and share >= OWN_SHARE):
            return share if share < OWN_SHARE else 1.0


def _rate(name: str, format: Format, device_name: str, timer: _Timer) -> CodecRate:
    encode_s, decode_s = _seconds(format, _ROWS, timer)
    small_s = sum(_seconds(format, 1, timer)) / 2
    num_bytes = _ROWS * _CHANNELS * 4
    return CodecRate(
        device=device_name,
        codec=name,
        encode_s_per_byte=max(encode_s - small_s, 0.0) / num_bytes,
        decode_s_per_byte=max(decode_s - small_s, 0.0) / num_bytes,
        call_s=small_s,
    )


def _seconds(format: Format, rows: int, timer: _Timer) -> tuple[float, float]:
    """Returns the seconds of encoding and of decoding a tensor of so many rows."""
    device = timer.device
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

    return _each_s(encode, timer), _each_s(decode, timer)


def _each_s(work: Callable[[int], None], timer: _Timer) -> float:
    """Returns the seconds of one call, as the median over rounds of all tensors."""
    times_s = []
    for _ in range(_ROUNDS):
        start_s = timer.now_s()
        for i in range(_TENSORS):
            work(i)
        times_s.append((timer.now_s() - start_s) / _TENSORS)
    return median(times_s)
