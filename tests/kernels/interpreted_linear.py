"""linear_int8 and decode_int4 in Triton's interpreter against float64; run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.samples import mismatches, poisoned, relative_rms
from wan_kernels.decode_int4 import decode_int4_reference, decode_int4_triton
from wan_kernels.linear_int8 import (
    linear_int8_reference,
    linear_int8_residual_reference,
    linear_int8_residual_triton,
    linear_int8_triton,
)
from wan_kernels.quantize_rows import quantize_rows_reference

# (rows, outputs, inputs): one row, inputs that are no whole steps, tiles that are not full, both shape classes, and of
# either class more rows of tiles than are taken together, the last of them fewer
SHAPES = [(1, 64, 64), (63, 96, 100), (130, 257, 384), (200, 136, 1000), (1100, 96, 64), (1300, 300, 128)]


def operands(rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    a = torch.randint(-127, 128, (1, rows, inputs), dtype=torch.int8, generator=generator)
    w = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    a[0, rows // 2] = 0
    a[0, -1] = 127  # the largest sums there can be
    w[-1] = -127
    a_scale, w_scale = torch.rand(1, rows, generator=generator) / 500, torch.rand(outputs, generator=generator) / 50
    bias = torch.randn(outputs, generator=generator)
    return poisoned(a), poisoned(a_scale), poisoned(w), poisoned(w_scale), poisoned(bias)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_exact_but_for_the_rounding_of_its_scales(shape: tuple[int, int, int], gelu: bool) -> None:
    a, a_scale, w, w_scale, bias = operands(*shape)
    expected = a.double() @ w.double().t() * a_scale.double().unsqueeze(-1) * w_scale.double() + bias.double()
    if gelu:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    got = linear_int8_triton(a, a_scale, w, w_scale, bias, gelu, torch.float32)
    assert relative_rms(got, expected) < 1e-6
    assert relative_rms(linear_int8_reference(a, a_scale, w, w_scale, bias, gelu), expected) < 1e-6
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_zero_row_gives_the_bias_exactly() -> None:
    a, a_scale, w, w_scale, bias = operands(63, 96, 128)
    got = linear_int8_triton(a, a_scale, w, w_scale, bias, False, torch.float32)
    assert torch.equal(got[0, 31], bias)


def test_without_a_bias_nothing_is_added() -> None:
    a, a_scale, w, w_scale, _ = operands(63, 96, 128)
    got = linear_int8_triton(a, a_scale, w, w_scale, None, False, torch.float32)
    exact = a.double() @ w.double().t() * a_scale.double().unsqueeze(-1) * w_scale.double()
    assert relative_rms(got, exact) < 1e-6 and not got[0, 31].any()
    x = torch.randn(1, 63, 96)
    expected = x + exact
    linear_int8_residual_triton(a, a_scale, w, w_scale, None, x, None)
    assert relative_rms(x, expected) < 1e-6


def test_a_residual_of_half_precision_is_rounded_once() -> None:
    a, a_scale, w, w_scale, bias = operands(130, 160, 128)
    x, gate = poisoned(torch.randn(1, 130, 160).half()), torch.randn(1, 160)
    expected = linear_int8_residual_reference(a, a_scale, w, w_scale, bias, x, gate, torch.float64)
    linear_int8_residual_triton(a, a_scale, w, w_scale, bias, x, gate)
    error = (x.double() - expected).abs()
    assert (error <= 2**-11 * 1.001 * expected.abs() + 2**-20).all()  # float32 sums of terms of up to 8


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_residual_is_added_in_place(batch: int, gated: bool) -> None:
    a, a_scale, w, w_scale, bias = operands(60, 96, 128)
    a, a_scale = a.view(batch, -1, 128), a_scale.view(batch, -1)
    x, gate = poisoned(torch.randn(batch, a.shape[1], 96)), torch.randn(batch, 96) if gated else None
    expected = linear_int8_residual_reference(a, a_scale, w, w_scale, bias, x, gate, torch.float64)
    linear_int8_residual_triton(a, a_scale, w, w_scale, bias, x, gate)
    assert relative_rms(x, expected) < 1e-6


def test_a_row_with_an_infinite_scale_stays_visible() -> None:
    a, a_scale, w, w_scale, bias = operands(63, 96, 128)
    a_scale[0, 5] = float("nan")
    got = linear_int8_triton(a, a_scale, w, w_scale, bias, False, torch.float32)
    assert got[0, 5].isnan().all() and torch.isfinite(got[0, :5]).all()


@pytest.mark.parametrize("inputs", [64, 320])
def test_int4_is_decoded_exactly(inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    packed = poisoned(torch.randint(0, 256, (9, inputs // 2), dtype=torch.uint8, generator=generator))
    scale = poisoned(torch.rand(9, inputs // 64, generator=generator))
    shift = poisoned(torch.rand(9, inputs // 64, generator=generator) * 8)
    expected = torch.empty(9, inputs, dtype=torch.float64)
    for row in range(9):
        for column in range(inputs):
            byte = int(packed[row, column // 2])
            q = byte & 15 if column % 2 == 0 else byte >> 4
            expected[row, column] = q * scale[row, column // 64].double() - shift[row, column // 64].double()
    assert relative_rms(decode_int4_reference(packed, scale, shift, torch.float64), expected) < 1e-15
    floats = torch.full((9, inputs), float("nan"))
    decode_int4_triton(packed, scale, shift, floats)
    assert relative_rms(floats, expected) < 1e-6
    eights = torch.empty(9, inputs, dtype=torch.int8)
    row_scale = decode_int4_triton(packed, scale, shift, eights)
    want, want_scale = quantize_rows_reference(expected, rotate=False, dtype=torch.float64)
    share, largest = mismatches(eights, want)
    assert share < 1e-3 and largest <= 1 and torch.allclose(row_scale, want_scale)


def test_int4_of_bfloat16_scales_and_of_rows_that_are_zero_or_huge_is_decoded() -> None:
    packed = torch.randint(0, 256, (5, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    scale, shift = torch.rand(5, 5).bfloat16(), (torch.rand(5, 5) * 8).bfloat16()
    scale[1, 2], shift[1, 2] = 0, 0  # a group
    scale[2], shift[2] = 0, 0  # and a row
    scale[3] *= 1e30
    eights = torch.empty(5, 320, dtype=torch.int8)
    row_scale = decode_int4_triton(poisoned(packed), poisoned(scale), poisoned(shift), eights)
    exact = decode_int4_reference(packed, scale, shift, torch.float64)
    want, want_scale = quantize_rows_reference(exact, rotate=False, dtype=torch.float64)
    share, largest = mismatches(eights, want)
    assert share < 1e-3 and largest <= 1 and torch.allclose(row_scale.double(), want_scale.double())
    assert not eights[1, 128:192].any() and not eights[2].any() and torch.isfinite(row_scale).all()
