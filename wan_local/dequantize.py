"""Numbers out of ggml's blocks, and out of scaled 8-bit floats: bytes in, float32 out, in whole-tensor torch.

Each block type is a few lines of what its bytes mean; see https://github.com/ggml-org/ggml (src/ggml-common.h and
src/ggml-quants.c, MIT) for the layouts. A scale that is NaN or infinite is damage, and is said to be.

Shape legend: N blocks, and bytes or items of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wan_local.errors import CorruptModel
from wan_local.gguf_header import TYPES

_ITEMS_AT_ONCE = 2**19  # 2 MB of float32: temporaries that stay in the cache are twice as fast on K blocks
_ITEMS_AND_BYTES = {kind.name: (kind.items, kind.nbytes) for kind in TYPES.values()}


def dequantize_blocks(dtype: str, content: Tensor) -> Tensor:
    """Return the numbers of whole blocks of a ggml type: uint8 [bytes] in, float32 [items] out.

    Raises CorruptModel where a scale is not finite.
    """
    items, nbytes = _ITEMS_AND_BYTES[dtype]
    blocks = content.view(-1, nbytes)
    out = torch.empty(blocks.shape[0], items)
    step = _ITEMS_AT_ONCE // items
    for first in range(0, blocks.shape[0], step):
        some = slice(first, first + step)
        out[some] = _BLOCKS[dtype](blocks[some])
    if not torch.isfinite(out.sum()):  # a sum is not finite if a term is not; it may overflow, so look closer
        bad = (~torch.isfinite(out)).any(dim=1).sum().item()
        if bad:
            raise CorruptModel(f"{bad} of {len(out)} {dtype} blocks have a scale that is NaN or infinite")
    return out.view(-1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at byte `at` of each block as float32 [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(content: Tensor) -> Tensor:
    """Return the low halves of all bytes, then the high ones, along the last axis."""
    return torch.cat((content & 15, content >> 4), dim=-1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Return 32 bits from byte `at` on, one each, as [N, 32] of 0 and 16."""
    places = torch.arange(8, dtype=torch.uint8)
    bits = (blocks[:, at : at + 4].unsqueeze(-1) >> places) & 1
    return bits.flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight 6-bit scales and minima of a K block from their 12 bytes, float32 [N, 8] each."""
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((low & 63, (rest & 15) | ((low >> 6) << 4)), dim=1)
    mins = torch.cat((high & 63, (rest >> 4) | ((high >> 6) << 4)), dim=1)
    return scales.float(), mins.float()


def _k_block(blocks: Tensor, quants: Tensor) -> Tensor:
    """Return scale * quant - minimum for eight groups of 32: quants [N, 8, 32]."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scales, mins = _half(blocks, 0) * scales, _half(blocks, 2) * mins
    return (scales.unsqueeze(-1) * quants.float() - mins.unsqueeze(-1)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_block(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8).view(8, 1)
    fifth = ((blocks[:, 16:48].unsqueeze(1) >> places) & 1) << 4
    return _k_block(blocks, _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32) | fifth)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 2, 4, 32)
    places = torch.tensor((0, 2, 4, 6), dtype=torch.uint8).view(4, 1)
    high = ((blocks[:, 128:192].view(-1, 2, 1, 32) >> places) & 3) << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    quants = ((low | high).float() - 32).view(-1, 16, 16)
    return (scales.unsqueeze(-1) * quants).flatten(1)


_BLOCKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
