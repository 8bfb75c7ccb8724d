"""The fusions that work row by row, in Triton's interpreter against float64; run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.samples import activations, mismatches, poisoned, relative_rms
from wan_kernels.gate_norm_modulate import gate_norm_modulate_quantize_triton, gate_norm_modulate_triton
from wan_kernels.gelu_quantize import gelu_quantize_triton
from wan_kernels.quantize_rows import quantize_rows_triton, rotate_reference
from wan_kernels.rms_rope import rms_rope_quantize_keys_triton, rms_rope_quantize_triton, rms_rope_triton

EPS = 1e-6
# powers of two, a half more than one and a quarter more, the models' own and the widest
WIDTHS = [64, 448, 320, 5120, 704, 13_824]
ODD_WIDTHS = [1, 63, 257, 1000, 1283]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    return q.double() * scale.double().unsqueeze(-1)


def check_quantized(q: Tensor, scale: Tensor, expected: Tensor) -> None:
    """Assert int8 that is at most one step from the exact one, rarely, and the exact scale."""
    want_scale = expected.double().abs().amax(-1).clamp(min=1e-12) / 127
    share, largest = mismatches(q, (expected.double() / want_scale.unsqueeze(-1)).round())
    assert share < 1e-3 and largest <= 1
    assert torch.allclose(scale.double(), want_scale, rtol=1e-5)


def regular_hadamard() -> Tensor:
    small = torch.ones(4, 4, dtype=torch.float64) / 2 - torch.eye(4, dtype=torch.float64)
    return torch.kron(torch.kron(small, small), small)


def turned(x: Tensor) -> Tensor:
    """Return x R by a plain matrix product."""
    return (x.double().unflatten(-1, (-1, 64)) @ regular_hadamard()).flatten(-2)


def test_the_rotation_is_a_regular_hadamard_matrix_and_its_own_inverse() -> None:
    matrix = regular_hadamard()
    assert torch.equal(matrix @ matrix, torch.eye(64, dtype=torch.float64))
    assert torch.equal(matrix, matrix.t()) and torch.equal(matrix.sum(0), torch.ones(64, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.full((64, 64), 0.125, dtype=torch.float64))
    x = torch.randn(3, 192, dtype=torch.float64)
    assert torch.allclose(rotate_reference(x), turned(x), atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rotate", [False, True])
def test_rows_are_quantized_to_the_nearest_step(width: int, rotate: bool) -> None:
    x = activations(7, width, huge=True)
    q, scale = quantize_rows_triton(poisoned(x), rotate)
    check_quantized(q, scale, turned(x) if rotate else x)
    assert not q[3].any() and torch.isfinite(scale[3]) and scale[3] > 0


@pytest.mark.parametrize("width", ODD_WIDTHS)
def test_rows_of_an_odd_width_are_quantized_to_the_nearest_step(width: int) -> None:
    x = activations(7, width, huge=True)
    check_quantized(*quantize_rows_triton(poisoned(x), False), x)


def test_the_rotation_spreads_a_heavy_channel() -> None:
    x = activations(16, 320)
    plain, turned_back = quantize_rows_triton(x, False), quantize_rows_triton(x, True)
    error = relative_rms(dequantized(*plain), x)
    assert relative_rms(rotate_reference(dequantized(*turned_back)), x) < error / 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(bad: float) -> None:
    x = activations(5, 320)
    x[1, 17], x[3, 300] = bad, bad  # in the front and in the back
    for rotate in (False, True):
        _, scale = quantize_rows_triton(x, rotate)
        assert not torch.isfinite(scale[[1, 3]]).any() and torch.isfinite(scale[[0, 2, 4]]).all()


@pytest.mark.parametrize(("width", "rotate"), [(448, False), (448, True), (13_824, True), (257, False)])
def test_gelu_is_quantized_to_the_nearest_step(width: int, rotate: bool) -> None:
    h = activations(5, width, huge=True)
    expected = F.gelu(h.double(), approximate="tanh")
    q, scale = gelu_quantize_triton(poisoned(h), rotate)
    check_quantized(q, scale, turned(expected) if rotate else expected)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("update", ["none", "plain", "gated"])
@pytest.mark.parametrize("dim", [448, 320, 704, 5120])
def test_gate_norm_and_modulation_are_one(affine: bool, update: str, dim: int) -> None:
    batch, tokens = 2, 5
    x, y = activations(batch, tokens, dim, huge=True), activations(batch, tokens, dim, seed=1)
    gate, scale, shift = torch.randn(3, batch, dim).unbind(0)
    new = x.double()
    if update != "none":
        new = new + y.double() * (gate.double().unsqueeze(1) if update == "gated" else 1)
    factor = scale.double() if affine else 1 + scale.double()
    expected = F.layer_norm(new, (dim,), eps=EPS) * factor.unsqueeze(1) + shift.double().unsqueeze(1)
    rest = (None if update == "none" else y, gate if update == "gated" else None, scale, shift, affine, EPS)
    held = poisoned(x)
    got = gate_norm_modulate_triton(held, *rest, torch.float32)
    assert relative_rms(held, new) < 1e-7 and relative_rms(got, expected) < 1e-5
    for rotate in (False, True):
        held = poisoned(x)
        q, q_scale = gate_norm_modulate_quantize_triton(held, *rest, rotate)
        assert relative_rms(held, new) < 1e-7
        check_quantized(q, q_scale, turned(expected) if rotate else expected)


@pytest.mark.parametrize("dim", ODD_WIDTHS[1:])
def test_rows_of_an_odd_width_are_normed(dim: int) -> None:
    x, (scale, shift) = activations(2, 5, dim, huge=True), torch.randn(2, 2, dim).unbind(0)
    expected = F.layer_norm(x.double(), (dim,), eps=EPS) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    rest = (None, None, poisoned(scale), poisoned(shift), False, EPS)
    assert relative_rms(gate_norm_modulate_triton(poisoned(x), *rest, torch.float32), expected) < 1e-5
    check_quantized(*gate_norm_modulate_quantize_triton(poisoned(x), *rest, False), expected)


def test_the_residual_is_rounded_before_the_norm_reads_it() -> None:
    x, y = activations(1, 4, 320).half(), activations(1, 4, 320, seed=1).half()
    held, ones, zeros = poisoned(x), torch.ones(1, 320), torch.zeros(1, 320)
    got = gate_norm_modulate_triton(held, y, None, ones, zeros, True, EPS, torch.float32)
    assert torch.equal(held, (x.float() + y.float()).half())
    assert relative_rms(got, F.layer_norm(held.double(), (320,), eps=EPS)) < 1e-6


# (batch, tokens, heads, channels): odd counts of heads and tokens, the tiny and the real models' heads
HEADS = [(2, 5, 3, 32), (1, 67, 2, 64), (1, 3, 40, 128), (2, 5, 12, 128), (2, 5, 11, 64)]


def rotary(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(tokens, channels // 2) * 6
    return angle.cos(), angle.sin()


def normed_and_turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Return [B, L, H, K] in float64, the turn by complex numbers."""
    n = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight.double()
    pairs = torch.view_as_complex(n.unflatten(-1, (heads, -1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double()).unsqueeze(1)).flatten(-2)


@pytest.mark.parametrize("shape", HEADS)
def test_rms_norm_and_rotary_turn_are_one(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, channels = shape
    x, weight = activations(batch, tokens, heads * channels, huge=True), torch.randn(heads * channels)
    cos, sin = rotary(tokens, channels)
    expected = normed_and_turned(x, weight, cos, sin, heads)
    args = (poisoned(x), poisoned(weight), poisoned(cos), poisoned(sin), heads, EPS)
    assert relative_rms(rms_rope_triton(*args, torch.float32), expected) < 1e-6
    q, scale = rms_rope_quantize_triton(*args)
    check_quantized(q, scale, expected.transpose(1, 2))
    plain = rms_rope_triton(args[0], args[1], None, None, heads, EPS, torch.float32)
    still = normed_and_turned(x, weight, torch.ones_like(cos), torch.zeros_like(sin), heads)
    assert relative_rms(plain, still) < 1e-6
    q, scale = rms_rope_quantize_triton(args[0], args[1], None, None, heads, EPS)
    check_quantized(q, scale, still.transpose(1, 2))


@pytest.mark.parametrize("shape", HEADS)
def test_keys_share_a_scale_by_64_and_lose_their_centre(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, channels = shape
    x, weight = activations(batch, tokens, heads * channels, huge=True), torch.randn(heads * channels)
    cos, sin = rotary(tokens, channels)
    exact = normed_and_turned(x, weight, cos, sin, heads)
    centre = exact.mean(1).float().contiguous()
    q, scale = rms_rope_quantize_keys_triton(
        poisoned(x), poisoned(weight), poisoned(cos), poisoned(sin), poisoned(centre), EPS
    )
    left = (exact - centre.double().unsqueeze(1)).transpose(1, 2)
    for block in range(scale.shape[-1]):
        span = slice(64 * block, 64 * block + 64)
        want = left[:, :, span].abs().amax(dim=(2, 3)) / 127
        assert torch.allclose(scale[..., block].double(), want, rtol=1e-4)
        share, largest = mismatches(q[:, :, span], (left[:, :, span] / want[..., None, None]).round())
        assert share < 2e-3 and largest <= 1


def test_keys_far_from_zero_and_near_their_centre_keep_their_steps_in_the_last_block() -> None:
    """What is beyond the last key is zero, and less the centre it would be larger than all that is there."""
    x, weight, centre = 5 + torch.randn(1, 67, 64) / 10, torch.ones(64), torch.ones(1, 2, 32)
    cos, sin = torch.ones(67, 16), torch.zeros(67, 16)
    left = normed_and_turned(x, weight, cos, sin, 2).transpose(1, 2) - 1
    _, scale = rms_rope_quantize_keys_triton(*map(poisoned, (x, weight, cos, sin, centre)), EPS)
    assert left.abs().max() < 0.1
    assert torch.allclose(scale[..., 1].double(), left[:, :, 64:].abs().amax(dim=(2, 3)) / 127, rtol=1e-4)
