"""The wire format and its kernels. `python tests/test_quantize.py` writes the golden file anew."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora.kernels import (
    TILE,
    Format,
    channel_factors,
    dequantize_reduce_requantize,
    many_layout,
    native,
    prefix_bytes,
    quantize_pack,
    quantize_pack_many,
    reference,
    tile_bytes,
    unpack_dequantize,
    unpack_dequantize_many,
    wire_bytes,
)

GOLDEN = Path(__file__).parent / "golden" / "quantize.txt"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = (32, 64, 128, 256)
CODES = (("int8", False), ("int8", True), ("int4", False), ("int4", True), ("fp8", False))
FORMATS = st.builds(
    lambda codes, group: Format(codes[0], group, stochastic=codes[1]),
    st.sampled_from(CODES),
    st.sampled_from(GROUPS),
)
SEEDS = st.integers(0, 2**32 - 1)
NUMELS = st.integers(0, 600) | st.sampled_from((TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 333))


def made(kind: str, numel: int, seed: int) -> torch.Tensor:
    """Returns float32 values of which the name says what is special about them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator)
    exponents = torch.randint(-148, 128, (numel,), generator=generator)
    if kind == "zeros":
        return torch.zeros(numel) * normal.sign()
    if kind == "ties":  # every 16th is 127, so that the scale of int8 is 1; halves and quarters
        values = (normal * 100).round() / 4
        values[::16] = 127.0
        return values
    if kind == "mixed":  # subnormals, too
        return normal.sign() * torch.ldexp(torch.ones(numel), exponents.clamp(max=126))
    return normal * {"normal": 1.0, "tiny": 2.0**-100, "huge": 2.0**125, "subnormal": 1e-40}[kind]


@st.composite
def tensors(draw, numels=NUMELS):
    kind = draw(
        st.sampled_from(("normal", "normal", "ties", "mixed", "zeros", "tiny", "huge", "subnormal"))
    )
    x = made(kind, draw(numels), draw(SEEDS))
    dtype = draw(st.sampled_from(DTYPES))
    if dtype == torch.float16:
        x = x.clamp(-65504, 65504)
    return x.clamp(-3.3e38, 3.3e38).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def relative_error(decoded: torch.Tensor, x: torch.Tensor) -> float:
    return ((decoded - x).norm() / x.norm()).item()


def round_trip(x: torch.Tensor, format: Format, **options) -> torch.Tensor:
    return unpack_dequantize(quantize_pack(x, format, **options), x.shape, x.dtype, format)


# ------------------------------------------------------------ the same bits everywhere


@settings(max_examples=120)
@given(tensors(), FORMATS, SEEDS, st.integers(0, 2**33), st.booleans(), st.booleans())
def test_quantize_native_equals_reference(x, format, seed, first_index, has_error, has_factors):
    size = x.double().abs().mean().clamp(max=1e30).float()
    error = made("normal", x.numel(), seed) * size if has_error else None
    factors = made("normal", 2 * format.group, seed).abs().bfloat16() + 1 if has_factors else None
    options = {"seed": seed, "first_index": first_index, "factors": factors}
    expected_error = None if error is None else error.clone()
    expected = reference.quantize_pack(x, format, error=expected_error, **options)
    add = made("normal", x.numel(), seed).to(x.dtype)
    decoding = {"first_index": first_index, "factors": factors, "add": add}
    decoded = reference.unpack_dequantize(expected, x.shape, x.dtype, format, **decoding)
    for instruction_set in native.INSTRUCTION_SETS:
        options["instruction_set"] = decoding["instruction_set"] = instruction_set
        our_error = None if error is None else error.clone()
        wire = native.quantize_pack(x, format, error=our_error, **options)
        assert torch.equal(wire, expected)
        assert error is None or torch.equal(bits(our_error), bits(expected_error))
        ours = native.unpack_dequantize(wire, x.shape, x.dtype, format, **decoding)
        assert torch.equal(bits(ours), bits(decoded))


@settings(max_examples=60)
@given(tensors(), FORMATS, st.sampled_from(DTYPES))
def test_quantize_native_decodes_as_reference(x, format, dtype):
    wire = reference.quantize_pack(x, format)
    expected = reference.unpack_dequantize(wire, x.shape, dtype, format)
    for instruction_set in native.INSTRUCTION_SETS:
        ours = native.unpack_dequantize(
            wire, x.shape, dtype, format, instruction_set=instruction_set
        )
        assert torch.equal(bits(ours), bits(expected))


def test_quantize_decodes_large_tensors_as_small_ones():
    format = Format("int4")
    x = made("normal", 2**21 + 77, 0)
    wire = quantize_pack(x, format)
    pieces = zip(x.split(64 * TILE), wire.split(64 * tile_bytes(format)), strict=True)
    expected = torch.cat([unpack_dequantize(w, p.shape, p.dtype, format) for p, w in pieces])
    assert torch.equal(unpack_dequantize(wire, x.shape, x.dtype, format), expected)
    shifted = torch.empty(x.numel() + 1)[1:]  # not where vectors should begin
    assert torch.equal(unpack_dequantize(wire, x.shape, x.dtype, format, out=shifted), expected)
    added = unpack_dequantize(wire, x.shape, x.dtype, format, add=x)
    assert torch.equal(added, expected + x)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_quantize_rounds_every_bfloat16_as_reference(name):
    format = Format(name, 32)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.float().abs() <= format.qmax]
    groups = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    scaled_by_one = torch.cat([torch.full((len(groups), 1), format.qmax), groups], 1).bfloat16()
    expected = reference.quantize_pack(scaled_by_one, format)
    for instruction_set in native.INSTRUCTION_SETS:
        ours = native.quantize_pack(scaled_by_one, format, instruction_set=instruction_set)
        assert torch.equal(ours, expected)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(0, 2 * TILE + 99), FORMATS, SEEDS)
def test_quantize_sum_equals_reference(num_wires, numel, format, seed):
    wires = [quantize_pack(made("normal", numel, seed + k), format) for k in range(num_wires)]
    weights = [0.3, -1.7, 1e-3][:num_wires]
    expected = reference.dequantize_reduce_requantize(wires, weights, numel, format, seed=seed)
    for instruction_set in native.INSTRUCTION_SETS:
        ours = native.dequantize_reduce_requantize(
            wires, weights, numel, format, seed=seed, instruction_set=instruction_set
        )
        assert torch.equal(ours, expected)


@settings(max_examples=40)
@given(st.integers(0, 5), st.sampled_from((1, 64, 100, TILE + 5)), st.sampled_from(DTYPES), SEEDS)
def test_quantize_channel_factors_equal_reference(rows, channels, dtype, seed):
    x = torch.stack([made(k, channels, seed) for k in ("normal", "zeros", "tiny", "huge", "mixed")])
    x = x[:rows].clamp(-65504, 65504).to(dtype)
    expected = reference.channel_factors(x)
    for instruction_set in native.INSTRUCTION_SETS:
        ours = native.channel_factors(x, instruction_set=instruction_set)
        assert torch.equal(bits(ours), bits(expected))


def test_quantize_golden_vectors():
    cases = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert cases
    for case in cases:
        x, format, seed, first_index, error, factors = parsed(case)
        options = {"first_index": first_index, "factors": factors}
        for kernels in (reference, native):
            after = None if error is None else error.clone()
            wire = kernels.quantize_pack(x, format, seed=seed, error=after, **options)
            decoded = kernels.unpack_dequantize(wire, x.shape, x.dtype, format, **options)
            assert [hexed(wire), hexed(decoded), hexed(after)] == case[9:]


# ------------------------------------------------------------ shapes


@settings(max_examples=40)
@given(FORMATS, st.integers(1, 4 * TILE), st.integers(1, 3), st.booleans(), SEEDS)
def test_quantize_pieces_equal_whole(format, numel, cut_tiles, has_factors, seed):
    x = made("normal", numel, seed)
    factors = made("normal", 3 * format.group, seed).abs().bfloat16() + 1 if has_factors else None
    wire = quantize_pack(x, format, seed=seed, factors=factors)
    decoded = unpack_dequantize(wire, x.shape, x.dtype, format, factors=factors)
    cut, cut_bytes = cut_tiles * TILE, cut_tiles * tile_bytes(format)
    for start in range(0, numel, cut):
        piece = x[start : start + cut]
        part = quantize_pack(piece, format, seed=seed, first_index=start, factors=factors)
        at = start // cut * cut_bytes
        assert torch.equal(part, wire[at : at + len(part)])
        again = unpack_dequantize(
            part, piece.shape, x.dtype, format, first_index=start, factors=factors
        )
        assert torch.equal(again, decoded[start : start + cut])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5, 7, 11), (1, 4097)])
@pytest.mark.parametrize(("name", "stochastic"), CODES)
def test_quantize_any_shape(shape, name, stochastic):
    format = Format(name, stochastic=stochastic)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wire = quantize_pack(x, format)
    assert wire.shape == (wire_bytes(x.numel(), format),)
    decoded = unpack_dequantize(wire, x.shape, x.dtype, format)
    assert decoded.shape == x.shape
    assert x.numel() == 0 or relative_error(decoded, x) < 0.25


def test_quantize_non_contiguous_tensor():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for view in (x.t(), x[::3, 1::2], x[:, :1].expand(64, 96)):
        for format in (Format("int4"), Format("fp8", 32)):
            assert torch.equal(
                quantize_pack(view, format), quantize_pack(view.contiguous(), format)
            )


def test_quantize_writes_where_told():
    x, format = torch.randn(3000), Format("int4")
    size = wire_bytes(3000, format)
    buffer = torch.full((size + 7,), 0xEE, dtype=torch.uint8)
    wire = quantize_pack(x, format, out=buffer[3 : 3 + size])
    assert torch.equal(wire, quantize_pack(x, format))
    assert buffer[:3].tolist() + buffer[-4:].tolist() == [0xEE] * 7
    total = torch.full((3000,), 2.0)
    added = unpack_dequantize(wire, x.shape, x.dtype, format, add=total, out=total)
    assert added.data_ptr() == total.data_ptr()
    assert torch.equal(total, unpack_dequantize(wire, x.shape, x.dtype, format) + 2)


@pytest.mark.parametrize("stochastic", [False, True])
def test_quantize_many_is_each_of_them(stochastic):
    format = Format("int4", stochastic=stochastic)
    shapes = [(3, 50), (0,), (), (2 * TILE,), (70,)]
    xs = [torch.randn(shape, dtype=torch.float32) for shape in shapes]
    errors = [torch.full(shape, 0.1) for shape in shapes]
    offsets, total = many_layout(shapes, format)
    assert [offset % 64 for offset in [*offsets, total]] == [0] * 6
    buffer = quantize_pack_many(xs, format, seed=3, errors=errors)
    assert buffer.shape == (total,)
    first_index = 0
    for x, offset, error in zip(xs, offsets, errors, strict=True):
        own = torch.full(x.shape, 0.1)
        part = quantize_pack(x, format, seed=3, first_index=first_index, error=own)
        assert torch.equal(buffer[offset : offset + len(part)], part)
        assert torch.equal(error, own)
        first_index += x.numel()
    decoded = unpack_dequantize_many(buffer, shapes, torch.float32, format)
    sums = [torch.ones(shape) for shape in shapes]
    unpack_dequantize_many(buffer, shapes, torch.float32, format, outs=sums, accumulate=True)
    for x, y, added in zip(xs, decoded, sums, strict=True):
        assert y.shape == x.shape
        assert torch.equal(added, y + 1)


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 77, TILE, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_names_tensor_that_is_not_finite(bad, at, dtype):
    x = torch.ones(TILE + 45, dtype=dtype)
    x[at] = bad
    for name, stochastic in CODES:
        with pytest.raises(ValueError, match="layer 3: given infinite values or NaN"):
            quantize_pack(x, Format(name, stochastic=stochastic), name="layer 3")


def test_quantize_names_what_becomes_infinite():
    x, format = torch.full((100,), 3e38), Format("int8", 32)
    with pytest.raises(ValueError, match="tensor: given infinite"):
        quantize_pack(x, format, error=x.clone())
    with pytest.raises(ValueError, match="tensor 1: given infinite"):
        quantize_pack_many([x, x / 0], format)
    wire = quantize_pack(x, format)
    with pytest.raises(ValueError, match="sum: given infinite"):
        dequantize_reduce_requantize([wire, wire], [1.0, 1.0], 100, format)


def test_quantize_infinite_channel_is_found():
    x = torch.ones(4, 64)
    x[2, 5] = float("inf")
    with pytest.raises(ValueError, match="given infinite"):
        quantize_pack(x, Format("int4", smooth=True), factors=channel_factors(x))


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (("int3",), "name: given 'int3', allowed: int8, int4, fp8"),
        (("int8", 48), "group: given 48, allowed: 32, 64, 128, 256"),
        (("fp8", 64, True), "stochastic: given with fp8"),
    ],
)
def test_quantize_refuses_format(given_, message):
    with pytest.raises(ValueError, match=message):
        Format(*given_)


def test_quantize_refuses_what_does_not_fit():
    x, format = torch.ones(10), Format("int8")
    wire = quantize_pack(x, format)
    with pytest.raises(ValueError, match=r"tensor: given torch\.int32"):
        quantize_pack(x.int(), format)
    with pytest.raises(ValueError, match="out: given 10 elements"):
        quantize_pack(x, format, out=torch.empty(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match="error: given 9 elements"):
        quantize_pack(x, format, error=torch.zeros(9))
    with pytest.raises(ValueError, match="factors: given 10 channels"):
        quantize_pack(x, format, factors=torch.ones(10, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="wire: given 66 elements"):
        unpack_dequantize(wire, (65,), torch.float32, format)
    with pytest.raises(ValueError, match=r"dtype: given torch\.float64"):
        unpack_dequantize(wire, (10,), torch.float64, format)
    with pytest.raises(ValueError, match="weights: given 1 for 2 wires"):
        dequantize_reduce_requantize([wire, wire], [1.0], 10, format)


# ------------------------------------------------------------ errors


def gaussian(rows: int = 1024, channels: int = 1024) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.0066), ("int4", 0.110), ("fp8", 0.027)])
def test_quantize_error_on_gaussian_values(name, bound):
    x = gaussian()
    assert relative_error(round_trip(x, Format(name)), x) <= bound


def test_quantize_smooth_keeps_ordinary_channels():
    x = gaussian()
    is_outlier = torch.rand(1024, generator=torch.Generator().manual_seed(1)) < 0.01
    x[:, is_outlier] *= 20
    format = Format("int4", smooth=True)
    plain = round_trip(x, Format("int4"))
    factors = channel_factors(x)
    assert factors.numel() * factors.element_size() == prefix_bytes(1024, format)
    wire = quantize_pack(x, format, factors=factors)
    smooth = unpack_dequantize(wire, x.shape, x.dtype, format, factors=factors)
    ordinary = ~is_outlier
    assert relative_error(smooth[:, ordinary], x[:, ordinary]) <= 0.13
    assert relative_error(smooth, x) <= 0.13
    assert relative_error(plain[:, ordinary], x[:, ordinary]) > 0.3


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantize_stochastic_rounding_is_unbiased(name):
    x, format = gaussian(1, 64)[0], Format(name, stochastic=True)
    decoded = torch.stack([round_trip(x, format, seed=seed) for seed in range(4096)])
    scale = quantize_pack(x, format)[:2].view(torch.bfloat16).float()
    up = torch.frac((x / scale).double() + format.qmax + 1)
    sigma = scale * (up * (1 - up)).sqrt() / sqrt(4096)
    # Random numbers have 16 bits, so that chances are right to half of the last.
    assert ((decoded.double().mean(0) - x).abs() <= 4 * sigma + scale / 2**16).all()
    assert len(decoded.unique(dim=0)) > 4000


def test_quantize_stochastic_rounding_differs_by_seed_and_place():
    x, format = torch.full((4, TILE), 0.3), Format("int4", stochastic=True)
    x[:, ::64] = 7.0
    wire = quantize_pack(x, format, seed=1)
    assert not torch.equal(wire, quantize_pack(x, format, seed=2))
    assert len(wire.view(4, -1).unique(dim=0)) == 4


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_quantize_error_feedback_loses_nothing_over_time(name):
    x, format, steps = gaussian(1, 1000)[0], Format(name), 50
    error, total = torch.zeros(1000), torch.zeros(1000)
    for _ in range(steps):
        wire = quantize_pack(x, format, error=error)
        total += unpack_dequantize(wire, x.shape, x.dtype, format)
    assert torch.allclose(total + error, x * steps, atol=1e-3)
    without = round_trip(x, format)
    assert relative_error(total / steps, x) < relative_error(without, x) / 10


# ------------------------------------------------------------ golden file


class GoldenCase(NamedTuple):
    group: int
    dtype: torch.dtype
    numel: int
    seed: int
    first_index: int
    kinds: tuple[str, ...]
    has_error: bool = False
    channels: int = 0
    codes: tuple[tuple[str, bool], ...] = CODES


def golden_values(case: GoldenCase) -> torch.Tensor:
    """Returns one group of each kind in turn."""
    parts = [
        made(case.kinds[i % len(case.kinds)], case.group, i)
        for i in range(-(-case.numel // case.group))
    ]
    limit = 65504 if case.dtype == torch.float16 else 3.3e38
    return torch.cat(parts)[: case.numel].clamp(-limit, limit).to(case.dtype)


GOLDEN_CASES = (
    GoldenCase(64, torch.float32, 300, 1, 0, ("normal", "ties", "zeros", "huge", "tiny")),
    GoldenCase(32, torch.float16, 77, 2, 1000, ("normal", "mixed"), has_error=True),
    GoldenCase(128, torch.bfloat16, 200, 3, 2**32 - 5, ("ties", "subnormal")),
    GoldenCase(32, torch.float32, 70, 4, 40, ("normal",), has_error=True, channels=64),
    GoldenCase(256, torch.bfloat16, TILE + 9, 5, 4096, ("normal", "mixed"), codes=CODES[1:3]),
    GoldenCase(64, torch.float32, 1, 6, 0, ("normal",)),
)


def hexed(x: torch.Tensor | None) -> str:
    return "-" if x is None else x.contiguous().view(torch.uint8).numpy().tobytes().hex()


def unhexed(text: str, dtype: torch.dtype) -> torch.Tensor | None:
    return None if text == "-" else torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


def parsed(case: list[str]) -> tuple:
    name, group, stochastic, seed, first_index, dtype, values, error, factors = case[:9]
    return (
        unhexed(values, getattr(torch, dtype)),
        Format(name, int(group), stochastic=bool(int(stochastic))),
        int(seed),
        int(first_index),
        unhexed(error, torch.float32),
        unhexed(factors, torch.bfloat16),
    )


def golden_line(case: GoldenCase, format: Format) -> str:
    x = golden_values(case)
    error = made("normal", case.numel, 99) / 8 if case.has_error else None
    factors = made("normal", case.channels, 98).abs().bfloat16() + 1 if case.channels else None
    before = hexed(error)
    options = {"first_index": case.first_index, "factors": factors}
    wire = reference.quantize_pack(x, format, seed=case.seed, error=error, **options)
    decoded = reference.unpack_dequantize(wire, x.shape, x.dtype, format, **options)
    numbers = (format.group, int(format.stochastic), case.seed, case.first_index)
    dtype = str(case.dtype).removeprefix("torch.")
    tensors = (hexed(x), before, hexed(factors), hexed(wire), hexed(decoded), hexed(error))
    return " ".join([format.name, *map(str, numbers), dtype, *tensors])


def write_golden() -> None:
    columns = "codes group stochastic seed first_index dtype values error factors wire decoded"
    lines = [f"# {columns} error_after; tensors as hexadecimal bytes, - for none"]
    for case in GOLDEN_CASES:
        for name, stochastic in case.codes:
            lines.append(golden_line(case, Format(name, case.group, stochastic=stochastic)))
    GOLDEN.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_golden()
