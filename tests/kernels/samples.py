"""Tensors as real activations are: heavy channels, a zero row, odd lengths, and poison beyond what may be read."""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER = 60.0  # times the ordinary size; a few channels of video transformers are like this


def activations(*shape: int, seed: int = 0, huge: bool = False) -> Tensor:
    """Return normal numbers with one heavy channel, one zero row, and with `huge` one row of 1e6."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[..., shape[-1] // 3] *= OUTLIER
    rows = x.view(-1, shape[-1])
    rows[len(rows) // 2] = 0
    if huge:
        rows[-1] *= 1e6
    return x


def poisoned(x: Tensor) -> Tensor:
    """Return x as a view in the middle of memory that holds NaN (floats) or 127 (integers) on both sides of it."""
    bad = float("nan") if x.is_floating_point() else 127
    around = torch.full((x.numel() + 8192,), bad, dtype=x.dtype)
    middle = around[4096 : 4096 + x.numel()].view(x.shape)
    middle.copy_(x)
    return middle


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def mismatches(got: Tensor, expected: Tensor) -> tuple[float, int]:
    """Return the share of int8 numbers that differ, and the largest difference."""
    difference = (got.int() - expected.int()).abs()
    return float((difference > 0).float().mean()), int(difference.max())


def quantized_keys(k_BHMK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 keys with one scale for 64 of them, by a loop."""
    q, scales = torch.empty_like(k_BHMK, dtype=torch.int8), []
    for start in range(0, k_BHMK.shape[2], 64):
        block = k_BHMK[:, :, start : start + 64]
        scale = block.abs().amax(dim=(2, 3)).clamp(min=1e-12) / 127
        q[:, :, start : start + 64] = (block / scale[..., None, None]).round().to(torch.int8)
        scales.append(scale)
    return q, torch.stack(scales, dim=-1)
