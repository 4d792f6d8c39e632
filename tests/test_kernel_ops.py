"""The operators of torch: schemas, fake kernels, compilation, gradients."""

import pytest
import torch
from torch.library import opcheck

from dora.kernels import (
    Format,
    channel_factors,
    ops,
    quantize_pack,
    reference,
    unpack_dequantize,
)

INT8, INT4, FP8 = Format("int8"), Format("int4"), Format("fp8")


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype):
    x = numbers(5, 64).to(dtype).requires_grad_()
    factors = channel_factors(x)
    opcheck(torch.ops.dora.quantize_pack, (x, "int8"))
    opcheck(torch.ops.dora.quantize_pack, (x, "int4", 32, True, 3, 64, factors))
    wire = quantize_pack(x, INT4, factors=factors)
    add = numbers(5, 64).requires_grad_()
    arguments = (wire, [5, 64], dtype, "int4", 64, 0, add, factors)
    opcheck(torch.ops.dora.unpack_dequantize, arguments)
    formats = ("int4", 64, False, True, "int8", 32, True, False)
    opcheck(torch.ops.dora.fake_quantize, (x, *formats, 7))


def test_operators_are_the_kernels():
    x = numbers(7, 33)
    wire = torch.ops.dora.quantize_pack(x, "int8", 32, True, 5, 1)
    format = Format("int8", 32, stochastic=True)
    assert torch.equal(wire, reference.quantize_pack(x, format, seed=5, first_index=1))
    decoded = torch.ops.dora.unpack_dequantize(wire, [7, 33], torch.float16, "int8", 32)
    assert torch.equal(decoded, reference.unpack_dequantize(wire, (7, 33), torch.float16, format))


def test_compiled_whole_for_any_size():
    def there_and_back(x):
        wire = torch.ops.dora.quantize_pack(x * 2, "int4", 64)
        return torch.ops.dora.unpack_dequantize(wire, x.shape, x.dtype, "int4", 64, add=x) + 1

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 50), (4, 700), (9,)):
        x = numbers(*shape)
        assert torch.equal(compiled(x), there_and_back(x))


def test_gradient_of_a_residual_passes():
    add = numbers(4, 16).half().requires_grad_()
    wire = quantize_pack(numbers(64), INT8)
    out = torch.ops.dora.unpack_dequantize(wire, [64], torch.float32, "int8", add=add)
    assert out.requires_grad
    out.backward(torch.arange(64.0))
    assert torch.equal(add.grad, torch.arange(64.0).half().view(4, 16))


def test_bytes_carry_no_gradient():
    wire = torch.ops.dora.quantize_pack(numbers(64).requires_grad_(), "int8")
    assert not wire.requires_grad
    assert not torch.ops.dora.unpack_dequantize(wire, [64], torch.float32, "int8").requires_grad


@pytest.mark.parametrize("gradient", [None, FP8, Format("int8", 32, stochastic=True)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradient_goes_straight_through(gradient, is_compiled):
    def loss(x, weight):
        seen = ops.fake_quantize(x, Format("int4", smooth=True), gradient=gradient, seed=3)
        return (seen * weight).sum()

    x, weight = numbers(6, 128).requires_grad_(), numbers(6, 128).flip(0)
    loss = torch.compile(loss, fullgraph=True, backend="aot_eager") if is_compiled else loss
    loss(x, weight).backward()
    expected = weight
    if gradient is not None:
        wire = quantize_pack(weight, gradient, seed=3)
        expected = unpack_dequantize(wire, weight.shape, weight.dtype, gradient)
    assert torch.equal(x.grad, expected)


def test_fake_quantize_is_what_the_receiver_sees():
    x = numbers(3, 5, 64).transpose(0, 1)
    seen = ops.fake_quantize(x, INT4)
    wire = quantize_pack(x, INT4)
    assert torch.equal(seen, unpack_dequantize(wire, x.shape, x.dtype, INT4))
    assert seen.is_contiguous()


def test_values_that_are_not_finite_are_named_by_the_operator():
    x = torch.tensor([1.0, torch.nan])
    with pytest.raises(ValueError, match="dora::fake_quantize: given infinite"):
        ops.fake_quantize(x, INT8)
