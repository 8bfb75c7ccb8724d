"""Encoders of ggml's block types for tests: the gguf package's where it has them, plain ones of our own for K blocks.

Ours aim at being right, not good: each group of a block gets the scale and minimum that span its numbers.
"""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def encode(block: str, numbers: Array) -> NDArray[np.generic]:
    """Return rows of numbers as rows of blocks: uint8 (float16 and float32 as they are)."""
    if block in ("F16", "F32"):
        return numbers.astype(np.float16 if block == "F16" else np.float32)
    if block in ("Q4_K", "Q5_K", "Q6_K"):
        blocks = numbers.reshape(-1, 256)
        encoded = _q6_k(blocks) if block == "Q6_K" else _k(blocks, bits=int(block[1]))
        return encoded.reshape(*numbers.shape[:-1], -1)
    encoded_by_package: NDArray[np.generic] = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[block])
    return encoded_by_package


def _half(numbers: Array) -> Bytes:
    return numbers.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _k(blocks: Array, bits: int) -> Bytes:
    """Q4_K and Q5_K: x = d * scale * q - dmin * minimum, with 6-bit scales and minima of eight groups of 32."""
    groups = blocks.reshape(-1, 8, 32)
    low = np.minimum(groups.min(axis=2), 0)
    step = (groups.max(axis=2) - low) / (2**bits - 1)
    d = (step.max(axis=1) / 63).astype(np.float16).astype(np.float32)
    dmin = (-low.min(axis=1) / 63).astype(np.float16).astype(np.float32)
    scales = np.round(_divide(step, d[:, None])).clip(0, 63).astype(np.uint8)
    mins = np.round(_divide(-low, dmin[:, None])).clip(0, 63).astype(np.uint8)
    steps, floors = (d[:, None] * scales)[..., None], (dmin[:, None] * mins)[..., None]
    quants = np.round(_divide(groups + floors, steps)).clip(0, 2**bits - 1).astype(np.uint8)
    nibbles = (quants & 15).reshape(-1, 4, 2, 32)
    packed = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(-1, 128)
    places = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = np.bitwise_or.reduce((quants >> 4) << places, axis=1)
    rest = [fifth, packed] if bits == 5 else [packed]
    return np.concatenate([_half(d), _half(dmin), _six_bits(scales, mins), *rest], axis=1)


def _six_bits(scales: Bytes, mins: Bytes) -> Bytes:
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = mins[:, :4] | ((mins[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1)


def _q6_k(blocks: Array) -> Bytes:
    """Q6_K: x = d * scale * (q - 32), with int8 scales of sixteen groups of 16."""
    groups = blocks.reshape(-1, 16, 16)
    step = np.abs(groups).max(axis=2) / 31
    d = (step.max(axis=1) / 127).astype(np.float16).astype(np.float32)
    scales = np.round(_divide(step, d[:, None])).clip(0, 127).astype(np.int8)
    quants = np.round(_divide(groups, (d[:, None] * scales)[..., None])).clip(-32, 31) + 32
    quarters = quants.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = quarters & 15
    packed = np.concatenate([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=2)
    places = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    high = np.bitwise_or.reduce((quarters >> 4) << places, axis=2)
    return np.concatenate([packed.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), _half(d)], axis=1)


def _divide(numbers: Array, by: Array) -> Array:
    return np.divide(numbers, by, out=np.zeros_like(numbers), where=by != 0)
