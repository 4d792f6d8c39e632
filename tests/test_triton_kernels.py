"""The Triton kernels against the reference, bit for bit.

Without a GPU they run in Triton's interpreter, which has to be chosen before anything imports
Triton: the first test runs this file once more, in a process of its own. The interpreter cuts
bfloat16 results off instead of rounding them, so there they may differ by one unit.

With a GPU: pytest -m cuda tests/test_triton_kernels.py
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from dora.kernels import TILE, Format, many_layout, reference, tile_bytes, wire_bytes

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
on_each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not IS_INTERPRETED, reason="runs under the interpreter"),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
            ],
        ),
    ],
)

INT8, INT4, FP8 = Format("int8"), Format("int4"), Format("fp8")
RANDOM8, RANDOM4 = Format("int8", stochastic=True), Format("int4", stochastic=True)


def kernels():
    from dora.kernels import triton_kernels

    return triton_kernels


def numbers(numel, dtype=torch.float32, seed=0):
    """Many magnitudes, groups of zeros and of what counts as zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    x = x * torch.randn(numel, generator=generator).mul(3).exp()
    x[256:512] *= 1e-32
    x[512:768] = -0.0
    return x.to(dtype)


def assert_decoded(ours, expected):
    ours = ours.cpu()
    if IS_INTERPRETED and expected.dtype == torch.bfloat16:
        difference = ours.view(torch.int16).int() - expected.view(torch.int16).int()
        assert difference.abs().max() <= 1
    else:
        assert torch.equal(ours, expected)


@pytest.mark.skipif(IS_INTERPRETED, reason="is it")
def test_kernels_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not cuda", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr


@on_each_device
@pytest.mark.parametrize(
    ("name", "group", "stochastic", "dtype"),
    [
        ("int8", 64, False, torch.float32), ("int8", 256, True, torch.float16),
        ("int8", 32, False, torch.bfloat16), ("int4", 64, True, torch.float32),
        ("int4", 256, False, torch.float16), ("int4", 32, False, torch.bfloat16),
        ("fp8", 128, False, torch.float32), ("fp8", 64, False, torch.bfloat16),
    ],
)  # fmt: skip
def test_bits_are_those_of_the_reference(device, name, group, stochastic, dtype):
    format = Format(name, group, stochastic)
    for numel in (1, 2 * TILE + 300):
        x = numbers(numel).clamp(-6e4, 6e4).to(dtype)
        wire = reference.quantize_pack(x, format, seed=-3, first_index=2**33 + 5)
        ours = kernels().quantize_pack(x.to(device), format, seed=-3, first_index=2**33 + 5)
        assert torch.equal(ours.cpu(), wire)
        decoded = kernels().unpack_dequantize(wire.to(device), x.shape, dtype, format)
        assert_decoded(decoded, reference.unpack_dequantize(wire, x.shape, dtype, format))


@on_each_device
@pytest.mark.parametrize("first_index", [128, 5])  # 5: groups begin anywhere in the channels
@pytest.mark.parametrize("format", [INT8, INT4, FP8, RANDOM4])
def test_factors_and_error_feedback(device, format, first_index):
    x, lost = numbers(15 * 192), numbers(15 * 192, seed=1)
    factors = reference.channel_factors(x.view(15, 192))
    ours_lost = lost.to(device, copy=True)
    settings = {"seed": 1, "first_index": first_index}
    wire = reference.quantize_pack(x, format, error=lost, factors=factors, **settings)
    ours = kernels().quantize_pack(
        x.to(device), format, error=ours_lost, factors=factors.to(device), **settings
    )
    assert torch.equal(ours.cpu(), wire)
    assert torch.equal(ours_lost.cpu(), lost)
    settings = {"first_index": first_index, "factors": factors.to(device), "add": lost.to(device)}
    decoded = kernels().unpack_dequantize(ours, x.shape, torch.float32, format, **settings)
    expected = reference.unpack_dequantize(
        wire, x.shape, torch.float32, format, first_index=first_index, factors=factors, add=lost
    )
    assert torch.equal(decoded.cpu(), expected)


@on_each_device
def test_fp8_rounds_each_tie_to_even(device):
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    near = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0)])
    near = torch.nn.functional.pad(near, (0, -len(near) % 31)).view(-1, 31)
    groups = torch.cat([torch.full((len(near), 1), 448.0), near], 1)  # so that the scale is 1
    format = Format("fp8", 32)
    for x in (groups, -groups):
        ours = kernels().quantize_pack(x.to(device), format)
        assert torch.equal(ours.cpu(), reference.quantize_pack(x, format))


@on_each_device
@pytest.mark.parametrize("format", [INT8, RANDOM4])
def test_many_tensors_in_one_launch(device, format):
    shapes = [(300,), (0, 4), (1,), (2, TILE), (63,)]
    dtypes = [torch.float32, torch.float32, torch.float16, torch.float32, torch.bfloat16]
    tensors = [numbers(torch.Size(s).numel(), seed=i).view(s) for i, s in enumerate(shapes)]
    tensors = [x.to(d) for x, d in zip(tensors, dtypes, strict=True)]
    lost = [numbers(x.numel(), seed=9) for x in tensors]
    offsets, total = many_layout(shapes, format)
    expected, first_index = torch.zeros(total, dtype=torch.uint8), 0
    ours_lost = [x.to(device, copy=True) for x in lost]
    for x, error, offset in zip(tensors, lost, offsets, strict=True):
        out = expected[offset : offset + wire_bytes(x.numel(), format)]
        reference.quantize_pack(x, format, seed=4, first_index=first_index, error=error, out=out)
        first_index += x.numel()
    out = torch.full((total,), 255, dtype=torch.uint8, device=device)
    kernels().quantize_pack_many(
        [x.to(device) for x in tensors], format, seed=4, errors=ours_lost, out=out
    )
    assert torch.equal(out.cpu(), expected)
    for error, ours in zip(lost, ours_lost, strict=True):
        assert torch.equal(error, ours.cpu())


@on_each_device
@pytest.mark.parametrize("format", [INT8, INT4, FP8, RANDOM8])
def test_reduce_is_that_of_the_reference(device, format):
    numel, weights = TILE + 77, [0.3, -1.7, 0.1]
    wires = [reference.quantize_pack(numbers(numel, seed=i), format) for i in range(3)]
    expected = reference.dequantize_reduce_requantize(wires, weights, numel, format, seed=2)
    ours = kernels().dequantize_reduce_requantize(
        [wire.to(device) for wire in wires], weights, numel, format, seed=2
    )
    assert torch.equal(ours.cpu(), expected)


@on_each_device
def test_tiles_are_encoded_and_decoded_alone(device):
    x = numbers(2 * TILE + 40).to(device)
    whole = kernels().quantize_pack(x, RANDOM8, seed=6)
    size = tile_bytes(RANDOM8)
    second = kernels().quantize_pack(x[TILE : 2 * TILE], RANDOM8, seed=6, first_index=TILE)
    assert torch.equal(second, whole[size : 2 * size])
    last = kernels().unpack_dequantize(whole[2 * size :], (40,), torch.float32, RANDOM8)
    decoded = kernels().unpack_dequantize(whole, x.shape, torch.float32, RANDOM8)
    assert torch.equal(last, decoded[2 * TILE :])


@on_each_device
def test_a_wire_may_begin_at_an_odd_address(device):
    wire = reference.quantize_pack(numbers(300), INT4)
    shifted = torch.cat([wire[:1], wire]).to(device)[1:]
    decoded = kernels().unpack_dequantize(shifted, (300,), torch.float32, INT4)
    expected = reference.unpack_dequantize(wire, (300,), torch.float32, INT4)
    assert torch.equal(decoded.cpu(), expected)


@on_each_device
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_values_that_are_not_finite_are_named(device, value):
    x = numbers(TILE + 70).to(device)
    x[TILE + 60] = value
    with pytest.raises(ValueError, match="head.weight: given infinite values or NaN"):
        kernels().quantize_pack(x, INT8, name="head.weight")
    with pytest.raises(ValueError, match="second: given infinite values or NaN"):
        kernels().quantize_pack_many([x[:9], x], INT4, names=["first", "second"])


@on_each_device
def test_nothing_is_encoded_to_nothing(device):
    x = torch.empty(3, 0, device=device)
    wire = kernels().quantize_pack(x, INT8)
    assert wire.numel() == 0
    assert kernels().unpack_dequantize(wire, x.shape, x.dtype, INT8).shape == x.shape


# ------------------------------------------------------------ what a GPU runs


def compiled(program, types, **constants):
    """Returns the instructions for an H100; needs no GPU."""
    import triton

    signature, constexprs, attributes = {}, {}, {}
    types = {"seed": "i32", "numel": "i64", "num_channels": "i32", "first_index": "i64", **types}
    for i, name in enumerate(program.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "constexpr")
        if signature[name] == "constexpr":
            constexprs[i,] = constants.get(name)
        elif signature[name][0] == "*":
            attributes[i,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(program, signature, constexprs, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]


@pytest.mark.skipif(IS_INTERPRETED, reason="compiles nothing")
def test_compiled_kernels_contract_nothing_and_move_vectors():
    import triton.language as tl

    from dora.kernels import triton_programs as programs

    constants = {"KIND": "int4", "GROUP": 64, "TILES": 1, "IN_STEP": False}
    rounding = {"QMAX": 7.0, "STOCHASTIC": False, "NATIVE": True}
    table = {"X_TYPE": tl.float32, "HAS_ERROR": True, "IS_ALIGNED": True}
    bytes_and_flag = {"wire": "*u8", "out": "*u8", "flag": "*i32", "flags": "*i32"}
    many = {"wires": ("*u8",) * 3, "weights": ("fp32",) * 3, "table": "*i64", "tensor_of": "*i32"}
    encode = {"x": "*fp32", "error": "*fp32"}
    decode = {"out": "*fp32", "add": "*fp32"}
    for program, types, settings in (
        (programs.quantize, encode, {**constants, **rounding}),
        (programs.dequantize, decode, constants),
        (programs.quantize_many, many, {**constants, **rounding, **table}),
        (programs.reduce, many, {**constants, **rounding}),
    ):
        ptx = compiled(program, {**bytes_and_flag, **types}, **settings)
        assert not re.search(r"\bfma\.rn\.(ftz\.)?f32|\.ftz|div\.(full|approx)", ptx)
        if program is not programs.reduce:
            assert "ld.global.v4.b32" in ptx
            assert "st.global.v4.b32" in ptx
        if program is not programs.dequantize:
            assert "div.rn.f32" in ptx
