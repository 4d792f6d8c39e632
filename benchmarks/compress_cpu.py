"""Rates of the compression kernels on one thread of the processor, on memory that no cache holds.

Contenders, on the same float32 values: **copy** is `torch.Tensor.copy_`; **eager** is the shortest
way to write the codec in torch, groups apart and scales in a tensor of their own; **compile** is
that under `torch.compile`. Both compute what the reference defines, which is checked.

Every call takes the next of so many buffers that the last level of cache holds none of them when
its turn comes again. Contenders take turns, so that their ratios are of neighbours in time. Times
are those of the thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import Metric, Row, Samples, Table, paired_ratio

from dora.kernels import TILE, Format, native, wire_bytes

NUMEL = 4 * 2**20
COPY_BOUND, EAGER_BOUND, COMPILE_BOUND = 1.1, 5.0, 1.0
# The promises are about the first two.
FORMATS = (Format("int8"), Format("int4"), Format("fp8"), Format("int4", stochastic=True))
NUM_BOUND = 2

Call = Callable[[int], object]


class Buffers(NamedTuple):
    """Memory in rotation: values to encode, room to decode to."""

    sources: list[torch.Tensor]
    targets: list[torch.Tensor]


def make_buffers() -> Buffers:
    """Returns a quarter more of either than the last level of cache holds, 384 MiB at least."""
    key = "SC_LEVEL3_CACHE_SIZE"
    cache_bytes = os.sysconf(key) if key in os.sysconf_names else 0
    count = max(24, int(1.25 * cache_bytes / (4 * NUMEL)) + 1)
    first = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    return Buffers([first.clone() for _ in range(count)], [first.clone() for _ in range(count)])


# ------------------------------------------------------------ torch


def plain_quantize(x: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (scales [N, 1], codes [N, bytes])."""
    groups = x.view(-1, format.group)
    scales = (groups.abs().amax(1, keepdim=True) / format.qmax).bfloat16()
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    y = groups * inverse
    if format.name == "fp8":
        return scales, y.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = y.round().to(torch.int8).view(torch.uint8)
    if format.name == "int8":
        return scales, codes
    half = format.group // 2
    return scales, (codes[:, :half] & 15) | (codes[:, half:] << 4)


def plain_dequantize(
    scales: torch.Tensor, codes: torch.Tensor, out: torch.Tensor, format: Format
) -> None:
    """Decodes into `out`."""
    if format.name == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
    elif format.name == "int8":
        values = codes.view(torch.int8).float()
    else:
        signed = codes.view(torch.int8)
        values = torch.cat([(signed << 4) >> 4, signed >> 4], 1).float()
    torch.mul(values, scales.float(), out=out.view(-1, format.group))


def check_codes(wire: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
    """Raises AssertionError unless both hold the same."""
    num_tiles = NUMEL // TILE
    ours = wire.view(num_tiles, -1)
    split = 2 * len(scales) // num_tiles
    assert torch.equal(ours[:, :split].flatten(), scales.view(torch.uint8).flatten())
    assert torch.equal(ours[:, split:].flatten(), codes.flatten())


# ------------------------------------------------------------ contenders


def quantizers(format: Format, buffers: Buffers) -> dict[str, Call]:
    """Returns what encodes a source, by contender."""
    sources = buffers.sources
    size = wire_bytes(NUMEL, format)
    wires = [torch.zeros(size, dtype=torch.uint8) for _ in sources]
    calls: dict[str, Call] = {
        "dora": lambda i: native.quantize_pack(sources[i], format, out=wires[i])
    }
    if not format.stochastic:
        compiled = torch.compile(plain_quantize)
        for quantize in (plain_quantize, compiled):
            check_codes(native.quantize_pack(sources[0], format), *quantize(sources[0], format))
        calls["eager"] = lambda i: plain_quantize(sources[i], format)
        calls["compile"] = lambda i: compiled(sources[i], format)
    return calls


def dequantizers(format: Format, buffers: Buffers) -> dict[str, Call]:
    """Returns what decodes to a target, by contender."""
    targets = buffers.targets
    wires = [native.quantize_pack(x, format) for x in buffers.sources]
    shape, dtype = targets[0].shape, targets[0].dtype
    calls: dict[str, Call] = {
        "dora": lambda i: native.unpack_dequantize(wires[i], shape, dtype, format, out=targets[i])
    }
    if not format.stochastic:
        parts = [plain_quantize(x, format) for x in buffers.sources]
        compiled = torch.compile(plain_dequantize)
        calls["eager"] = lambda i: plain_dequantize(*parts[i], targets[i], format)
        calls["compile"] = lambda i: compiled(*parts[i], targets[i], format)
        for call in calls.values():
            call(0)
            expected = native.unpack_dequantize(wires[0], shape, dtype, format)
            assert torch.equal(targets[0], expected)
    return calls


def rates(calls: dict[str, Call], num_buffers: int, repeats: int) -> dict[str, Samples]:
    """Returns gigabytes of float32 per second of each repetition."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    turn = 0
    for repetition in range(repeats + 1):
        for name, call in calls.items():
            turn = (turn + 1) % num_buffers
            start_s = time.thread_time()
            call(turn)
            taken_s = time.thread_time() - start_s
            if repetition:  # the first only warms up
                found[name].append(4 * NUMEL / taken_s / 1e9)
    return {name: Samples(values) for name, values in found.items()}


# ------------------------------------------------------------ results


def name_of(format: Format, direction: str) -> str:
    """Returns the case's name."""
    rounding = " stochastic" if format.stochastic else ""
    return f"{format.name}{rounding} {direction}"


def promises(
    case: str, format: Format, direction: str, found: dict[str, Samples]
) -> dict[str, Metric]:
    """Returns the ratios that are promised."""
    bounds = {"copy": COPY_BOUND, "compile": COMPILE_BOUND}
    if format.name == "int4":
        bounds["eager"] = EAGER_BOUND
    metrics = {}
    for other, bound in bounds.items():
        ratio = paired_ratio(found["dora"], found[other]).median
        key = f"cpu_{case.replace(' ', '_')}_vs_{other}"
        metrics[key] = Metric(round(ratio, 3), "x", f">= {bound:g}", ratio >= bound)
    return metrics


def measure(*, is_quick: bool) -> tuple[list[Row], dict[str, Metric]]:
    """Measures formats in both directions, and prints a table; quickly, those with a promise."""
    torch.set_num_threads(1)
    buffers = make_buffers()
    copy: Call = lambda i: buffers.targets[i].copy_(buffers.sources[i])  # noqa: E731
    rows, metrics = [], {}
    print(f"GB/s of float32, one thread, {native.INSTRUCTION_SETS[0]}")
    table = Table(["case", "dora", "copy_", "eager", "compile", "dora / copy_"], width=(28, 22))
    for index, format in enumerate(FORMATS[:NUM_BOUND] if is_quick else FORMATS):
        for direction, make in (("quantize", quantizers), ("dequantize", dequantizers)):
            case = name_of(format, direction)
            calls = {"copy": copy, **make(format, buffers)}
            found = rates(calls, len(buffers.sources), 10 if is_quick else 60)
            contenders = ("dora", "copy", "eager", "compile")
            shown = [str(found[name]) if name in found else "" for name in contenders]
            table.line(case, *shown, str(paired_ratio(found["dora"], found["copy"])))
            rows += [Row(case, who, "rate", "GB/s", values) for who, values in found.items()]
            if index < NUM_BOUND:
                metrics |= promises(case, format, direction, found)
    return rows, metrics
