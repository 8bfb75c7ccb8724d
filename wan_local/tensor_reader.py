"""Reads stored tensors: bytes of a file, times scales, out of blocks, a third of a joint projection.

`wan_local.stored_tensor` says where the numbers of a tensor are; here they become a tensor on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan_local.dequantize import dequantize_blocks
from wan_local.errors import CorruptModel
from wan_local.extent import read_extent, read_once
from wan_local.gguf_header import TYPES
from wan_local.header import TensorInfo
from wan_local.stored_tensor import EIGHT_BITS, WHOLE_SHIFTS, StoredTensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,  # alphas of LoRAs
}  # fmt: skip
_GIVEN = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16}  # all else: see given_dtype
_BLOCK_ITEMS = {kind.name: (kind.items, kind.nbytes) for kind in TYPES.values()}
_WITHOUT_HIGHEST_EXPONENT_BIT = -0x4001  # 0xBFFF as int16: the sign has filled it
_FLOATS_AT_ONCE = 2**17  # temporaries that stay in a core's cache


def given_dtype(stored: StoredTensor) -> torch.dtype:
    """Return the dtype that a stored tensor is read in: its own where it is a float of 16 or 32 bits."""
    if stored.scale is not None:
        return torch.float32
    if stored.info.dtype in ("BF16", *EIGHT_BITS):
        return torch.bfloat16
    return _GIVEN.get(stored.info.dtype, torch.float32)


def read_stored(stored: StoredTensor, start: int = 0, stop: int | None = None, *, once: bool = False) -> Tensor:
    """Return rows `start` to `stop` of a tensor (all unless told), on the CPU, in `given_dtype`.

    once: these rows will not be read again, so the page cache need not keep them.
    Raises CorruptModel where numbers can't be right: scales that are negative, NaN, infinite or zero; a file that was
    cut short, or changed since its header was read.
    """
    if stored.shift is not None:
        return _read_packed(stored)[start:stop]
    strided = stored.info.strides is not None
    numbers = _read_strided(stored, start, stop) if strided else _read_rows(stored, start, stop, once=once)
    if stored.scale is not None:
        numbers = numbers.float().mul_(_read_scale(stored, start, stop, numbers.dim()))
    return numbers.to(given_dtype(stored))


def _read_rows(stored: StoredTensor, start: int, stop: int | None, *, once: bool) -> Tensor:
    info, read = stored.info, read_once if once else _bytes
    if not stored.shape:
        return _numbers(info.dtype, _bytes(info, info.offset, info.nbytes)).view(())
    start, stop, _ = slice(start, stop).indices(stored.shape[0])
    width = math.prod(stored.shape[1:])
    first, count = (stored.first_row + start) * width, max(0, stop - start) * width
    items, nbytes = _BLOCK_ITEMS.get(info.dtype, (1, 0))
    if items == 1:
        item = _DTYPES[info.dtype].itemsize
        content = read(info, info.offset + first * item, count * item)
        return _numbers(info.dtype, content).view(-1, *stored.shape[1:])
    from_block, to_block = first // items, -(-(first + count) // items)  # rows may begin inside a block
    content = read(info, info.offset + from_block * nbytes, (to_block - from_block) * nbytes)
    try:
        numbers = dequantize_blocks(info.dtype, content)
    except CorruptModel as error:
        raise CorruptModel(f"{stored.stored_name!r} in {info.file.name!r}: {error}. Download it again.") from error
    begin = first - from_block * items
    return numbers[begin : begin + count].view(-1, *stored.shape[1:])


def _read_strided(stored: StoredTensor, start: int, stop: int | None) -> Tensor:
    """Return rows of what does not lie row by row: what lies between its first and its last is read."""
    whole = _whole(stored.info)
    rows = whole if stored.third is None else whole[stored.first_row : stored.first_row + stored.shape[0]]
    return rows.reshape(stored.shape)[start:stop] if stored.shape else rows.reshape(())


def _whole(info: TensorInfo) -> Tensor:
    """Return all numbers of a tensor that is not in blocks, in its stored shape."""
    content = _bytes(info, info.offset, info.span * _DTYPES[info.dtype].itemsize)
    numbers = _numbers(info.dtype, content)
    return numbers.view(info.shape) if info.strides is None else numbers.as_strided(info.shape, info.strides)


def _read_packed(stored: StoredTensor) -> Tensor:
    """Return int4 as numbers, group by group, as quanto does: scale * q - shift; where shifts are whole numbers, those
    of q that stand for zero: scale * (q - shift)."""
    info, shift = stored.info, stored.shift
    assert shift is not None, stored
    packed = _whole(info)
    halves = (packed & 15, packed >> 4)
    numbers = torch.stack(halves, dim=2).flatten(1) if stored.pairs else torch.cat(halves)
    groups = numbers.float().view(math.prod(shift.shape), -1)
    shifts = _whole(shift).float().reshape(-1, 1)
    scales = _scale_numbers(stored).view(-1, 1)
    whole = shift.dtype in WHOLE_SHIFTS
    return (groups.sub_(shifts).mul_(scales) if whole else groups.mul_(scales).sub_(shifts)).view(stored.shape)


def _numbers(dtype: str, content: Tensor) -> Tensor:
    """Return the numbers in these bytes; 8-bit floats in float32."""
    if dtype not in EIGHT_BITS:
        return content.view(_DTYPES[dtype])
    out = torch.empty(content.numel())
    for some, numbers in zip(content.split(_FLOATS_AT_ONCE), out.split(_FLOATS_AT_ONCE), strict=True):
        _widen(dtype, some, numbers)
    return out


def _widen(dtype: str, content: Tensor, numbers: Tensor) -> None:
    """Write what 8-bit floats are into float32 `numbers`, by moving bits: six times as fast as torch's cast."""
    halves = content.view(torch.int8).to(torch.int16)  # an e5m2 is the upper half of a float16
    if dtype == "F8_E5M2":
        numbers.copy_(halves.mul_(256).view(torch.float16))
        return
    # e4m3's exponent has a bit less and counts from 7 where float16's counts from 15: a factor of 2^8
    numbers.copy_(halves.mul_(128).bitwise_and_(_WITHOUT_HIGHEST_EXPONENT_BIT).view(torch.float16)).mul_(256)
    if int((content & 127).amax()) == 127:  # e4m3's NaN
        numbers.masked_fill_(numbers.abs() > torch.finfo(torch.float8_e4m3fn).max, math.nan)


def _scale_numbers(stored: StoredTensor) -> Tensor:
    """Return all of a tensor's scales, float32 [count]."""
    scale = stored.scale
    assert scale is not None
    numbers = _whole(scale).float().reshape(-1)
    zero = numbers.numel() == 1 and not numbers.all()  # a row or a group may be all zero
    if zero or not torch.isfinite(numbers).all() or (numbers < 0).any():
        raise CorruptModel(
            f"a scale of {stored.stored_name!r} in {scale.file.name!r} is negative, NaN, infinite or zero. "
            "Download it again."
        )
    return numbers


def _read_scale(stored: StoredTensor, start: int, stop: int | None, dimensions: int) -> Tensor:
    numbers = _scale_numbers(stored)
    if numbers.numel() > 1:
        numbers = numbers[stored.first_row :][: stored.shape[0]][slice(start, stop)]
    return numbers.view(-1, *(1,) * (dimensions - 1))


def _bytes(info: TensorInfo, offset: int, count: int) -> Tensor:
    content = torch.empty(count, dtype=torch.uint8)
    read_extent(info.file, offset, content, info.stamp)
    return content
