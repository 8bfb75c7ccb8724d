"""attention_int8 and the values it takes, in Triton's interpreter against float64; run by test_interpreter.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.samples import OUTLIER, mismatches, poisoned, quantized_keys, relative_rms
from wan_kernels.attention_int8 import attention_int8_reference, attention_int8_triton
from wan_kernels.quantize_rows import quantize_rows_reference
from wan_kernels.values import (
    quantize_values_reference,
    quantize_values_triton,
    scale_values_reference,
    scale_values_triton,
)

# (batch, heads, queries, keys, channels): one key, one block, odd lengths, exact blocks, every head size
SHAPES = [(1, 1, 1, 1, 32), (2, 2, 63, 64, 32), (1, 2, 130, 257, 64), (1, 1, 70, 128, 128), (1, 1, 33, 300, 128)]


def inputs(shape: tuple[int, ...], *, outliers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, keys, channels = shape
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(batch, heads, queries, channels, generator=generator)
    k = torch.randn(batch, heads, keys, channels, generator=generator)
    v = torch.randn(batch, keys, heads, channels, generator=generator) + 3  # values have a mean
    if outliers:
        v[..., 5] *= OUTLIER
        q[..., 3] *= 8
    q[:, :, queries // 2] = 0
    return q, k, v


def run(q: Tensor, k: Tensor, v: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel's output, the same numbers in float64, and plain attention in float64."""
    q8, q_scale = quantize_rows_reference(q, rotate=False)
    k8, k_scale = quantized_keys(k)
    values = (*scale_values_reference(v), None) if mode == "fp16" else quantize_values_reference(v)
    args = (q8, q_scale, k8, k_scale, *values)
    got = attention_int8_triton(*(None if x is None else poisoned(x) for x in args), torch.float32)
    exact = torch.softmax(q.double() @ k.double().mT / q.shape[-1] ** 0.5, dim=-1) @ v.double().transpose(1, 2)
    return got, attention_int8_reference(*args, dtype=torch.float64), exact.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mode", ["fp16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_computes_its_formula_at_any_length(shape: tuple[int, ...], mode: str) -> None:
    got, formula, exact = run(*inputs(shape), mode)
    assert relative_rms(got, formula) < (1e-3 if mode == "fp16" else 1e-5)
    assert relative_rms(got, exact) < 0.015


@pytest.mark.parametrize("mode", ["fp16", "int8"])
def test_heavy_channels_cost_little(mode: str) -> None:
    got, formula, exact = run(*inputs((1, 2, 96, 200, 64), outliers=True), mode)
    assert relative_rms(got, formula) < 1e-3
    assert relative_rms(got, exact) < 0.02


@pytest.mark.parametrize("mode", ["fp16", "int8"])
def test_values_beyond_half_precision_come_through(mode: str) -> None:
    q, k, v = inputs((1, 1, 32, 100, 32))
    got, _, exact = run(q, k, v * 1e6, mode)
    assert torch.isfinite(got).all()
    assert relative_rms(got, exact) < 0.015


@pytest.fixture
def products_that_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter add to a product as a card does: rounded once, and a * b - c is computed so, too."""
    multiply, subtract = InterpreterBuilder.create_fmul, InterpreterBuilder.create_fsub

    def exact(a: Any, b: Any) -> Any:
        return a.data.astype(np.float64) * b.data

    def multiplied(builder: Any, a: Any, b: Any) -> Any:
        product = multiply(builder, a, b)
        product.attr["exact"] = exact(a, b)
        return product

    def subtracted(builder: Any, a: Any, b: Any) -> Any:
        difference = subtract(builder, a, b)
        if "exact" in a.attr:
            difference.data = (a.attr["exact"] - b.data).astype(difference.data.dtype)
        return difference

    def added(_: Any, a: Any, b: Any, c: Any) -> Any:
        return TensorHandle((exact(a, b) + c.data).astype(c.data.dtype), c.dtype.scalar)

    for name, computed in (("create_fmul", multiplied), ("create_fsub", subtracted), ("create_fma", added)):
        monkeypatch.setattr(InterpreterBuilder, name, computed)


@pytest.mark.usefixtures("products_that_are_not_rounded")
@pytest.mark.parametrize("factor", [300, 3000])
@pytest.mark.parametrize("mode", ["fp16", "int8"])
def test_huge_logits_do_not_turn_the_sign_of_the_largest_weight(mode: str, factor: float) -> None:
    """Where logits are 1e6, the largest less its own rounded self is not zero; a weight of 128 would be int8's -128."""
    q, k, v = inputs((1, 1, 70, 300, 64))
    got, formula, _ = run(q * factor, k * factor, v, mode)
    assert relative_rms(got, formula) < 0.02


@pytest.mark.parametrize("mode", ["fp16", "int8"])
def test_a_key_that_is_not_finite_shows_in_every_query(mode: str) -> None:
    q, k, v = inputs((1, 1, 40, 90, 32))
    q += 0.1  # a zero query and an infinite key
    k[0, 0, 70, 3] = float("inf")
    got, _, _ = run(q, k, v, mode)
    assert (~torch.isfinite(got)).all()


def test_keys_that_are_all_zero_give_the_mean_of_the_values() -> None:
    q, k, v = inputs((1, 1, 40, 90, 32))
    got, _, _ = run(q, k * 0, v, "fp16")
    assert relative_rms(got, v.mean(dim=1).flatten(1).expand(1, 40, 32)) < 1e-3


def test_nan_in_a_query_stays_visible() -> None:
    q, k, v = inputs((1, 1, 40, 90, 32))
    q[0, 0, 7, 3] = float("nan")
    got, _, _ = run(q, k, v, "fp16")
    assert got[0, 7].isnan().all()
    assert torch.isfinite(got[0, :7]).all() and torch.isfinite(got[0, 8:]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_values_are_exact_in_place(dtype: torch.dtype) -> None:
    v = torch.randn(2, 77, 3, 32).to(dtype) * torch.logspace(-4, 4, 32).to(dtype)
    expected, expected_scale = scale_values_reference(v)
    held = poisoned(v)
    scale = scale_values_triton(held)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(held.view(torch.float16), expected)
    assert relative_rms(expected.double() * scale.unsqueeze(1).double(), v) < 1e-4
    assert expected.abs().max() <= 256


@pytest.mark.parametrize("keys", [1, 63, 64, 130, 1100])
def test_quantized_values_are_transposed_and_padded_with_zeros(keys: int) -> None:
    v = torch.randn(2, keys, 3, 32) + 2
    got, scale, mean = quantize_values_triton(poisoned(v))
    expected, expected_scale, expected_mean = quantize_values_reference(v, torch.float64)
    share, largest = mismatches(got, expected)
    assert share < 1e-3 and largest <= 1
    assert torch.allclose(scale, expected_scale) and torch.allclose(mean, expected_mean, atol=1e-6)
    assert not got[..., keys:].any()


def test_channels_of_values_that_are_zero_constant_or_extreme_come_back() -> None:
    v = torch.randn(1, 200, 2, 32)
    v[..., 3], v[..., 4] = 0, 5
    v[..., 5] *= 1e30
    v[..., 6] *= 1e-30
    q, scale, mean = quantize_values_triton(poisoned(v))
    back = q[..., :200].double() * scale.double().unsqueeze(-1) + mean.double().unsqueeze(-1)
    exact = v.permute(0, 2, 3, 1).double()
    assert not back[:, :, 3].any() and relative_rms(back[:, :, 4], exact[:, :, 4]) < 1e-6
    assert relative_rms(back[:, :, 5], exact[:, :, 5]) < 0.01 and back[:, :, 6].abs().max() < 1e-13
    half = poisoned(v.bfloat16())
    exact = half.double()
    scale = scale_values_triton(half)
    back = half.view(torch.float16).double() * scale.double().unsqueeze(1)
    assert not back[..., 3].any()
    for channel in (4, 5):
        assert relative_rms(back[..., channel], exact[..., channel]) < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_channel_of_values_that_is_not_finite_has_a_scale_that_is_not(bad: float) -> None:
    v = torch.randn(1, 600, 3, 32)
    v[0, 550, 1, 7] = bad
    _, scale, _ = quantize_values_triton(v)
    assert not torch.isfinite(scale[0, 1, 7]) and int(torch.isfinite(scale).sum()) == 3 * 32 - 1
