"""The GPU part of `bench_compress.py`: the Triton kernels against a copy and torch.compile.

Rates are bytes read and written per second of GPU time (events), so that a kernel that moves each
byte once can reach the rate of `copy_` on the uncompressed tensor, taken next to it. Tensors are
larger than any cache. Bits are compared with those of `dora.kernels` on the CPU.

    python benchmarks/compress_gpu.py [--sweep | --out FILE.csv]

`--sweep` shows the rates of other launches than the default.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from common import Metric, Row, Samples, Table, finish, paired_ratio, write_csv

from dora import kernels
from dora.kernels import TILE, Format, reference, wire_bytes

NUMEL = 2**28
SAMPLES, LAUNCHES = 20, 5
BOUND = 0.85
FORMATS = (Format("int8"), Format("int4"), Format("fp8"), Format("int8", stochastic=True))
DTYPES = (torch.float32, torch.bfloat16)


class Rival(NamedTuple):
    """What is measured, and the bytes that it has to move."""

    run: Callable[[], object]
    num_bytes: int


def missing() -> str:
    """Returns why nothing can be measured here; empty if it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def gpu_rows() -> tuple[list[Row], dict[str, Metric]]:
    """Returns all rates and the verdicts; without a GPU no rates and verdicts that say so."""
    reason = missing()
    if reason:
        return [], {
            "gpu_worst_of_copy": Metric(None, "x", f">= {BOUND}", None, reason),
            "gpu_worst_of_compile": Metric(None, "x", "> 1", None, reason),
            "gpu_other_bits": Metric(None, "cases", "== 0", None, reason),
        }
    rows: list[Row] = []
    for dtype in DTYPES:
        x = torch.randn(NUMEL, device="cuda").to(dtype)
        for format in FORMATS:
            for name, rivals in (("encode", encoders(x, format)), ("decode", decoders(x, format))):
                case = f"gpu {name} {label(format)} {str(dtype).removeprefix('torch.')}"
                rates = measure({"copy": copier(x), **rivals})
                rows += [Row(case, who, "rate", "GB/s", rate) for who, rate in rates.items()]
    return rows, verdicts(rows)


def verdicts(rows: list[Row]) -> dict[str, Metric]:
    """Returns the worst cases."""
    by_case: dict[str, dict[str, Samples]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.contender] = row.samples
    copies = [paired_ratio(of["dora"], of["copy"]).median for of in by_case.values()]
    compiled = [
        paired_ratio(of["dora"], of["torch.compile"]).median
        for of in by_case.values()
        if "torch.compile" in of
    ]
    wrong = num_different()
    return {
        "gpu_worst_of_copy": Metric(min(copies), "x", f">= {BOUND}", min(copies) >= BOUND),
        "gpu_worst_of_compile": Metric(min(compiled), "x", "> 1", min(compiled) > 1),
        "gpu_other_bits": Metric(wrong, "cases", "== 0", wrong == 0),
    }


# ------------------------------------------------------------ rivals


def copier(x: torch.Tensor) -> Rival:
    """Returns a copy of the tensor as it is."""
    out = torch.empty_like(x)
    return Rival(lambda: out.copy_(x), 2 * x.nbytes)


def encoders(x: torch.Tensor, format: Format) -> dict[str, Rival]:
    """Returns our kernel and the reference, which need not join scales and codes to one buffer.

    Both also look for values that are not finite.
    """
    from dora.kernels import triton_kernels

    out = torch.empty(wire_bytes(x.numel(), format), dtype=torch.uint8, device=x.device)
    num_bytes = x.nbytes + out.nbytes

    @torch.compile(dynamic=False)
    def compiled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded = reference.encode_groups(x.float().view(-1, format.group), format, seed=1)
        return encoded.scales, encoded.codes, encoded.is_finite

    def ours() -> object:
        return triton_kernels.quantize_pack_unchecked(x, format, seed=1, out=out)

    rivals = {"dora": Rival(ours, num_bytes)}
    if not format.stochastic:  # its numbers have 32 bits, which Inductor puts into signed ones
        rivals["torch.compile"] = Rival(lambda: compiled(x), num_bytes)
    return rivals


def decoders(x: torch.Tensor, format: Format) -> dict[str, Rival]:
    """Returns our kernel and the reference."""
    wire = kernels.quantize_pack(x, format, seed=1)
    out = torch.empty_like(x)

    @torch.compile(dynamic=False)
    def compiled(wire: torch.Tensor) -> torch.Tensor:
        return reference.unpack_dequantize(wire, out.shape, out.dtype, format)

    def ours() -> torch.Tensor:
        return kernels.unpack_dequantize(wire, out.shape, out.dtype, format, out=out)

    num_bytes = wire.nbytes + out.nbytes
    return {
        "dora": Rival(ours, num_bytes),
        "torch.compile": Rival(lambda: compiled(wire), num_bytes),
    }


def measure(rivals: dict[str, Rival]) -> dict[str, Samples]:
    """Returns GB/s of all, taken in turns."""
    for rival in rivals.values():
        for _ in range(3):
            rival.run()
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(SAMPLES):
        for name, rival in rivals.items():
            rates[name].append(LAUNCHES * rival.num_bytes / gpu_s(rival.run) / 1e9)
    return {name: Samples(values) for name, values in rates.items()}


def gpu_s(run: Callable[[], object]) -> float:
    """Returns the time of `LAUNCHES` calls on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(LAUNCHES):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# ------------------------------------------------------------ bits


def num_different() -> int:
    """Returns in how many cases the GPU's bytes or values are not those of the CPU."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for numel in (1, 63, 3 * TILE, 2**20 + 77):
        spread = torch.randn(numel, generator=generator).mul(8).exp()
        values = torch.randn(numel, generator=generator) * spread
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            finite = torch.finfo(dtype)
            x = values.clamp(finite.min, finite.max).to(dtype)
            for name in ("int8", "int4", "fp8"):
                for group in (32, 64, 128, 256):
                    for is_random in (False, True)[: 1 if name == "fp8" else 2]:
                        wrong += not is_same(x, Format(name, group, is_random))
    return wrong


def is_same(x: torch.Tensor, format: Format) -> bool:
    """Returns whether both machines encode and decode alike, with error feedback too."""
    errors = [torch.randn(x.numel(), generator=torch.Generator().manual_seed(1))]
    errors.append(errors[0].cuda())
    here = kernels.quantize_pack(x, format, seed=5, error=errors[0])
    there = kernels.quantize_pack(x.cuda(), format, seed=5, error=errors[1])
    back = kernels.unpack_dequantize(here, x.shape, x.dtype, format)
    decoded = kernels.unpack_dequantize(there, x.shape, x.dtype, format)
    pairs = ((here, there), (errors[0], errors[1]), (back, decoded))
    return all(torch.equal(a, b.cpu()) for a, b in pairs)


# ------------------------------------------------------------ command


def label(format: Format) -> str:
    """Returns a name for a column."""
    return f"{format.name}{' stochastic' if format.stochastic else ''}"


def sweep() -> None:
    """Prints GB/s of launches of other sizes."""
    table = Table(("case", "encode GB/s", "decode GB/s"), width=(44, 26))
    for dtype in DTYPES:
        x = torch.randn(NUMEL, device="cuda").to(dtype)
        table.line(f"copy {dtype}", str(measure({"copy": copier(x)})["copy"]))
        for format in FORMATS:
            for launch in ((1, 2), (1, 4), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8), (8, 8)):
                rates = measure(launched(x, format, launch))
                case = f"{label(format)} {dtype}, {launch[0]} tiles, {launch[1]} warps"
                table.line(case, *(str(rate) for rate in rates.values()))


def launched(x: torch.Tensor, format: Format, launch: tuple[int, int]) -> dict[str, Rival]:
    """Returns our kernels with programs of another size."""
    from dora.kernels import triton_kernels

    at = triton_kernels.Launch(*launch)
    wire, _ = triton_kernels.quantize_pack_unchecked(x, format)
    out = torch.empty_like(x)
    runs = {
        "encode": partial(triton_kernels.quantize_pack_unchecked, x, format, out=wire, launch=at),
        "decode": partial(
            triton_kernels.unpack_dequantize, wire, x.shape, x.dtype, format, out=out, launch=at
        ),
    }
    return {name: Rival(run, x.nbytes + wire.nbytes) for name, run in runs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="try other launches")
    parser.add_argument("--out", metavar="FILE.csv", help="write one row per measured quantity")
    options = parser.parse_args()
    if options.sweep and not missing():
        sweep()
        return 0
    rows, metrics = gpu_rows()
    if rows:
        print(torch.cuda.get_device_name())
    table = Table(("case", "contender", "GB/s"), width=(44, 26))
    for row in rows:
        table.line(row.case, row.contender, str(row.samples))
    if options.out:
        write_csv(options.out, rows)
    return finish(metrics)


if __name__ == "__main__":
    sys.exit(main())
