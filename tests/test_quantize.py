from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wan_kernels.linear_int8 import linear_int8_reference
from wan_kernels.quantize_rows import quantize_rows_reference
from wan_local.layers import Linear, linear
from wan_local.quantize import (
    QuantizedWeight,
    dequantize,
    hadamard,
    integer_product,
    is_block_linear,
    linear_w8a8,
    pack_int4,
    quantize_tokens,
    quantize_weight,
    rotate,
    stored_shapes,
    unpack_int4,
)
from wan_local.weight_format import WeightFormat

FORMATS: list[WeightFormat] = ["int8", "fp8", "int4"]
# relative error of a Gaussian weight, as published for these formats: half a step of 2/254, 2^-4, 2/15 of the range
BOUNDS = {"int8": 0.012, "fp8": 0.03, "int4": 0.11}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("shape", [(1, 64), (63, 128), (257, 192), (1000, 1024)])
def test_a_weight_comes_back_within_the_formats_error_in_the_shapes_that_are_written_down(
    format_: WeightFormat, shape: tuple[int, int]
) -> None:
    weight = gaussian(*shape) * 0.02
    quantized = quantize_weight(weight, format_)
    assert quantized.shape == shape and quantized.format == format_
    held = {"weight": quantized.data, "weight_scale": quantized.scale, "weight_shift": quantized.shift}
    assert {k: tuple(v.shape) for k, v in held.items() if v is not None} == stored_shapes(format_, *shape)
    assert relative(dequantize(quantized, torch.float32), weight) < BOUNDS[format_]


@pytest.mark.parametrize("format_", ["int8", "fp8"])
def test_eight_bit_numbers_are_those_that_quanto_computes(format_: WeightFormat) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    kind = {"int8": quanto.qint8, "fp8": quanto.qfloat8_e4m3fn}[format_]
    weight = gaussian(300, 640) * 0.02
    theirs = quanto.quantize_weight(weight, kind, axis=0, scale=quanto.AbsmaxOptimizer()(weight, kind, axis=0))
    ours = quantize_weight(weight, format_)
    assert torch.equal(ours.data.view(torch.uint8), theirs._data.view(torch.uint8))
    assert torch.equal(ours.scale, theirs._scale.flatten())
    assert torch.equal(dequantize(ours, torch.float32), theirs.dequantize())


def test_four_bit_numbers_are_those_that_quanto_computes_with_the_same_scale_and_shift() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    weight = gaussian(300, 640) * 0.02
    ours = quantize_weight(weight, "int4")
    assert ours.scale.dtype == torch.bfloat16 and ours.shift is not None
    scale, shift = ours.scale.float().view(-1, 1), ours.shift.float().view(-1, 1)
    theirs = quanto.quantize_weight(weight, quanto.qint4, axis=0, scale=scale, shift=shift, group_size=64)
    assert torch.equal(dequantize(ours, torch.float32), theirs.dequantize())
    exact_scale, exact_shift = quanto.MaxOptimizer()(weight, quanto.qint4, axis=0, group_size=64)
    exact = quanto.quantize_weight(
        weight, quanto.qint4, axis=0, scale=exact_scale, shift=exact_shift, group_size=64
    ).dequantize()
    assert relative(theirs.dequantize(), weight) < 1.001 * relative(exact, weight)  # bfloat16 scales lose nothing


def test_the_even_input_is_in_the_low_nibble() -> None:
    numbers = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_int4(numbers).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack_int4(pack_int4(numbers)), numbers)


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_and_tokens_of_zeros_stay_zero_and_constant_rows_are_kept(format_: WeightFormat) -> None:
    weight = torch.stack((torch.zeros(64), torch.full((64,), 0.5), gaussian(64)))
    got = dequantize(quantize_weight(weight, format_), torch.float32)
    assert torch.equal(got[0], weight[0]) and torch.allclose(got[1], weight[1], atol=1e-6)
    data, scale = quantize_tokens(torch.zeros(2, 64))
    assert not data.any() and torch.isfinite(scale).all()


def test_a_weight_that_does_not_fall_into_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="3 x 100 does not fall into groups of 64"):
        quantize_weight(torch.zeros(3, 100), "int4")
    with pytest.raises(ValueError, match="3 x 100"):
        quantize_weight(torch.zeros(3, 100), "int8", rotated=True)


def test_the_rotation_is_a_regular_hadamard_matrix_and_its_own_inverse() -> None:
    matrix = hadamard(64)
    assert torch.equal(matrix, matrix.T) and torch.equal(matrix @ matrix, torch.eye(64))
    assert torch.equal(matrix.sum(dim=1), torch.ones(64))  # regular: a constant stays and does not pile up in one place
    assert matrix.abs().unique().tolist() == [0.125]
    x = gaussian(5, 192)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-6)


def test_the_rotation_is_brought_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the CPU to a card it would make the host wait for the card, at every linear."""
    moved: list[object] = []
    x, to = torch.randn(3, 128).bfloat16(), Tensor.to
    first = rotate(x)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *where, **how: moved.append(where) or to(tensor, *where, **how))
    assert torch.equal(rotate(x), first) and not moved


def test_tokens_are_rounded_as_the_kernels_reference_does_it() -> None:
    reference = pytest.importorskip("wan_kernels.quantize_rows").quantize_rows_reference
    x = gaussian(63, 512) * torch.logspace(-4, 3, 63).unsqueeze(1)
    for rotated in (False, True):
        data, scale = reference(x, rotated)
        ours, our_scale = quantize_tokens(rotate(x) if rotated else x)
        assert (ours.int() - data.int()).abs().max() <= rotated and (
            ours != data
        ).float().mean() < 1e-3 * rotated + 1e-9
        assert torch.allclose(our_scale, scale, rtol=1e-6)


@pytest.mark.parametrize("length", [64, 1024, 1088, 5120, 13824])
def test_integer_products_are_exact_whatever_computes_them(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    a = torch.randint(-127, 128, (9, length), dtype=torch.int8, generator=generator)
    b = torch.randint(-127, 128, (7, length), dtype=torch.int8, generator=generator)
    a[0], b[0] = 127, 127
    expected = (a.double() @ b.double().T).to(torch.int32)
    assert torch.equal(integer_product(a, b), expected)
    assert torch.equal(torch._int_mm(a, b.t()), expected)


def test_w8a8_is_the_sum_of_integers_times_both_scales_plus_bias() -> None:
    x, weight, bias = gaussian(33, 256), quantize_weight(gaussian(96, 256, seed=1), "int8"), gaussian(96, seed=2)
    data, scale = quantize_tokens(x)
    sums = (data.double() @ weight.data.double().T).float()
    expected = sums * scale.unsqueeze(1) * weight.scale + bias
    assert torch.equal(linear_w8a8(x, weight, bias), expected)
    assert relative(expected, x @ dequantize(weight, torch.float32).T + bias) < 0.015


def test_w8a8_on_a_cpu_is_what_the_kernels_references_compute() -> None:
    x, bias = gaussian(33, 256), gaussian(96, seed=2)
    weight = quantize_weight(gaussian(96, 256, seed=1), "int8")
    q, scale = quantize_rows_reference(x, False)
    data, token_scale = quantize_tokens(x)
    assert torch.equal(data, q) and torch.equal(token_scale, scale.flatten())
    expected = linear_int8_reference(q, scale, weight.data, weight.scale, bias)
    # the same integers; the reference may add the bias before it rounds, which some processors do in one
    assert torch.allclose(linear_w8a8(x, weight, bias), expected, rtol=1e-6, atol=1e-5)
    q, scale = quantize_rows_reference(x, True)  # turned by additions in another order: equal within rounding
    data, token_scale = quantize_tokens(rotate(x))
    assert int((data.int() - q.int()).abs().max()) <= 1
    assert torch.allclose(token_scale, scale.flatten(), rtol=1e-6)


def test_w8a8_does_not_depend_on_how_many_tokens_come_together() -> None:
    x, weight = gaussian(2500, 64), quantize_weight(gaussian(32, 64, seed=1), "int8")
    whole = linear_w8a8(x, weight, None)
    assert torch.equal(whole, torch.cat([linear_w8a8(part, weight, None) for part in x.split(700)]))


def test_rotation_saves_w8a8_from_outlier_channels() -> None:
    x, weight = gaussian(64, 512), gaussian(128, 512, seed=1)
    x[:, 7] *= 60
    expected = x @ weight.T
    errors = {}
    for rotated in (False, True):
        quantized = quantize_weight(weight, "int8", rotated=rotated)
        quantized = QuantizedWeight(quantized.data, quantized.scale, rotated=rotated, arithmetic="w8a8")
        errors[rotated] = relative(linear(x, quantized, None), expected)
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_holds_plain_or_quantized_weights_and_gives_what_it_was_given(
    format_: WeightFormat, dtype: torch.dtype
) -> None:
    layer, x = Linear(128, 48).requires_grad_(False), gaussian(2, 5, 128).to(dtype)
    weight, bias = gaussian(48, 128, seed=1), gaussian(48, seed=2)
    layer.weight.copy_(weight), layer.bias.copy_(bias)
    layer.to(dtype)
    plain = layer(x)
    assert torch.equal(plain, F.linear(x, weight.to(dtype), bias.to(dtype)))
    for rotated in (False, True) if format_ == "int8" else (False,):
        quantized = quantize_weight(weight, format_, rotated=rotated)
        held = {"weight": quantized.data, "weight_scale": quantized.scale}
        held |= {} if quantized.shift is None else {"weight_shift": quantized.shift}
        layer.hold(held, rotated=rotated, arithmetic="weight-only")
        out = layer(x)
        assert out.dtype == dtype and out.shape == plain.shape and layer.compute_dtype == dtype
        assert relative(out.float(), plain.float()) < BOUNDS[format_] + 0.006 * (dtype == torch.bfloat16)
        layer.arithmetic = "w8a8"
        assert relative(layer(x).float(), plain.float()) < BOUNDS[format_] + 0.012
        assert set(layer.state_dict()) == {"weight", "bias", *(name for name in held if name != "weight")}


def test_only_linears_inside_blocks_are_quantized() -> None:
    names = [
        "blocks.7.attn1.to_q.weight",
        "blocks.39.attn2.add_k_proj.weight",
        "blocks.0.attn2.to_out.0.weight",
        "blocks.0.ffn.net.0.proj.weight",
        "blocks.0.ffn.net.2.weight",
    ]
    others = [
        *("blocks.0.attn1.to_q.bias", "blocks.0.attn1.norm_q.weight", "blocks.0.scale_shift_table"),
        *("patch_embedding.weight", "proj_out.weight", "condition_embedder.time_proj.weight"),
        *("condition_embedder.image_embedder.ff.net.0.proj.weight", "condition_embedder.text_embedder.linear_1.weight"),
    ]
    assert all(is_block_linear("transformer", name) for name in names)
    assert not any(is_block_linear("transformer", name) for name in others)
    assert is_block_linear("text_encoder", "encoder.block.23.layer.1.DenseReluDense.wi_0.weight")
    assert is_block_linear("text_encoder", "encoder.block.0.layer.0.SelfAttention.o.weight")
    assert not is_block_linear("text_encoder", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    assert not is_block_linear("text_encoder", "shared.weight")
    assert is_block_linear("image_encoder", "encoder.layers.31.mlp.fc2.weight")
    assert not is_block_linear("vae", "decoder.conv_in.weight")
