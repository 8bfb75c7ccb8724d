"""Values of an attention, brought to what `attention_int8` multiplies with: scaled fp16 in place, or int8 transposed.

    fp16:  v_scale_c = 2^(ceil(log2(max_m |v_mc|)) - 8)      v16 = v / v_scale, |v16| <= 256
    int8:  v_mean_c = mean_m v_mc      v_scale_c = max_m |v_mc - v_mean_c| / 127      v8 = round((v - v_mean) / v_scale)

A channel's power of two costs no bit, keeps sums over 64 keys under 2^14, and lifts small channels out of fp16's
subnormal numbers: bf16 values beyond 65,504 are met in video models. int8 values lie transposed, keys innermost: the
tensor cores' 8-bit operand wants it, and turning it inside the kernel costs more than the multiplication.

Shape legend: B batch, M keys, H heads, K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wan_kernels.attention_int8 import KEY_BLOCK
from wan_kernels.language import ceil_div, jit, launchable, on_device_of, tl
from wan_kernels.quantize_rows import INT8_MAX, SMALLEST, rounded_int8

_LARGEST_EXPONENT = 8
_KEYS, _COLUMNS = 16, 512  # that a program of the elementwise kernel takes
_PART, _PART_COLUMNS = 512, 256  # whose statistics one program takes, 16 keys at a time


def scale_values_reference(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return v16 float16 [B, M, H, K] and v_scale float32 [B, H, K]."""
    v_scale = _power_of_two_scale(v)
    return (v.float() / v_scale.unsqueeze(1)).half(), v_scale


def _power_of_two_scale(v: Tensor) -> Tensor:
    low, high = torch.aminmax(v, dim=1)
    absmax = torch.maximum(-low, high).float()
    _, exponent = torch.frexp(absmax.clamp(min=SMALLEST))  # absmax < 2^exponent
    return torch.ldexp(torch.ones_like(absmax), exponent - _LARGEST_EXPONENT) + absmax * 0  # NaN and infinity stay


def quantize_values_reference(v: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return v8 int8 [B, H, K, ceil(M/64)*64], v_scale and v_mean float32 [B, H, K]."""
    v_scale, v_mean = _scale_and_mean(v, dtype)
    keys = v.shape[1]
    v8 = _empty_values(v).zero_()
    q = ((v.to(dtype) - v_mean.unsqueeze(1)) / v_scale.unsqueeze(1)).round().clamp(-INT8_MAX, INT8_MAX)
    v8[..., :keys] = q.permute(0, 2, 3, 1).to(torch.int8)
    return v8, v_scale.float(), v_mean.float()


def _scale_and_mean(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = (x.to(dtype) for x in torch.aminmax(v, dim=1))
    v_mean = v.mean(dim=1, dtype=dtype)
    return _centred_scale(low, high, v_mean), v_mean


def _centred_scale(low: Tensor, high: Tensor, v_mean: Tensor) -> Tensor:
    absmax = torch.maximum(high - v_mean, v_mean - low)
    return absmax.clamp(min=SMALLEST) / INT8_MAX + absmax * 0  # NaN and infinity stay


def _empty_values(v: Tensor) -> Tensor:
    batch, keys, heads, head_dim = v.shape
    return v.new_empty((batch, heads, head_dim, ceil_div(keys, KEY_BLOCK) * KEY_BLOCK), dtype=torch.int8)


@jit
def _scale_values_kernel(  # type: ignore[no-untyped-def]
    v_ptr,  # [B, M, C] bfloat16 or float16
    v16_ptr,  # [B, M, C] float16; may be the same memory
    inverse_ptr,  # [B, C] float32, 1 / v_scale
    keys,
    C,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch, pieces = tl.program_id(1).to(tl.int64), tl.cdiv(C, COLUMNS)
    rows = tl.program_id(0) // pieces * KEYS + tl.arange(0, KEYS)
    columns = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    there = (rows < keys)[:, None] & (columns < C)[None, :]
    offsets = (batch * keys + rows)[:, None] * C + columns[None, :]
    v = tl.load(v_ptr + offsets, mask=there, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + batch * C + columns, mask=columns < C, other=0.0)
    tl.store(v16_ptr + offsets, (v * inverse[None, :]).to(tl.float16), mask=there)


@jit
def _value_statistics_kernel(  # type: ignore[no-untyped-def]
    v_ptr,  # [B, M, C] any float
    low_ptr,  # [B, P, C] float32, of P parts of the keys
    high_ptr,  # [B, P, C] float32
    total_ptr,  # [B, P, C] float32
    keys, C,
    PART: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns, part, batch = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1), tl.program_id(2)
    low = tl.full((KEYS, COLUMNS), float("inf"), tl.float32)
    high, total = -low, tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(0, PART, KEYS):
        rows = part * PART + start + tl.arange(0, KEYS)
        there = (rows < keys)[:, None] & (columns < C)[None, :]
        offsets = (batch.to(tl.int64) * keys + rows)[:, None] * C + columns[None, :]
        v = tl.load(v_ptr + offsets, mask=there, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(there, v, float("inf")))
        high = tl.maximum(high, tl.where(there, v, float("-inf")))
        total += v  # a NaN shows here, where the others step over it
    out = (batch.to(tl.int64) * tl.num_programs(1) + part) * C + columns
    tl.store(low_ptr + out, tl.min(low, axis=0), mask=columns < C)
    tl.store(high_ptr + out, tl.max(high, axis=0), mask=columns < C)
    tl.store(total_ptr + out, tl.sum(total, axis=0), mask=columns < C)


@jit
def _quantize_values_kernel(  # type: ignore[no-untyped-def]
    v_ptr,  # [B, M, H, K] any float
    v8_ptr,  # [B, H, K, P] int8, P keys with padding
    v_scale_ptr,  # [B, H, K] float32
    v_mean_ptr,  # [B, H, K] float32
    heads,
    keys,
    padded,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, dims = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.arange(0, HEAD_DIM)
    there = rows < keys
    channels = (batch * heads + head) * HEAD_DIM + dims
    v_rows = ((batch * keys + rows) * heads + head) * HEAD_DIM
    v = tl.load(v_ptr + v_rows[:, None] + dims[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(v_scale_ptr + channels)
    x = (v - tl.load(v_mean_ptr + channels)[None, :]) * inverse[None, :]
    x = tl.where(there[:, None], tl.clamp(x, -127.0, 127.0), 0.0)
    tl.store(v8_ptr + channels[None, :] * padded + rows[:, None], rounded_int8(x))


def scale_values_triton(v: Tensor) -> Tensor:
    """Launch the elementwise kernel in place; float32 values (tests) go to memory of their own first."""
    launchable("scale_values_")
    assert v.is_contiguous() and v.element_size() == 2, f"{v.dtype} values, strides {v.stride()}"
    v_scale = _power_of_two_scale(v)
    batch, keys, heads, head_dim = v.shape
    channels = heads * head_dim
    programs = ceil_div(keys, _KEYS) * ceil_div(channels, _COLUMNS)
    _scale_values_kernel[(programs, batch)](
        v, v.view(torch.float16), 1 / v_scale, keys, channels, KEYS=_KEYS, COLUMNS=_COLUMNS, num_warps=4
    )
    return v_scale


def quantize_values_triton(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch two kernels: statistics, then one program for 64 keys of a head; neighbours read the same rows."""
    launchable("quantize_values")
    assert v.is_contiguous(), f"values are not contiguous: strides {v.stride()}"
    v_scale, v_mean = _scale_and_mean_triton(v)
    v8 = _empty_values(v)
    batch, keys, heads, head_dim = v.shape
    _quantize_values_kernel[(heads, v8.shape[-1] // KEY_BLOCK, batch)](
        v, v8, v_scale, v_mean, heads, keys, v8.shape[-1], HEAD_DIM=head_dim, KEYS=KEY_BLOCK, num_warps=4
    )
    return v8, v_scale, v_mean


def _scale_and_mean_triton(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return v_scale and v_mean [B, H, K] after reading v once; torch reads it for the extremes and for the mean."""
    batch, keys, heads, head_dim = v.shape
    low, high, total = v.new_empty((3, batch, ceil_div(keys, _PART), heads, head_dim), dtype=torch.float32).unbind(0)
    channels = heads * head_dim
    _value_statistics_kernel[(ceil_div(channels, _PART_COLUMNS), low.shape[1], batch)](
        v, low, high, total, keys, channels, PART=_PART, KEYS=_KEYS, COLUMNS=_PART_COLUMNS, num_warps=4
    )
    v_mean = total.sum(dim=1) / keys
    return _centred_scale(low.amin(dim=1), high.amax(dim=1), v_mean), v_mean


@torch.library.custom_op("wan_kernels::scale_values_", mutates_args=("v",), device_types="cuda")
def scale_values_(v: Tensor) -> Tensor:
    """Turn v [B, M, H, K], bfloat16 or float16, into v16 in its own memory; return v_scale float32 [B, H, K].

    Afterwards the memory holds float16, whatever the tensor says: read it as `v.view(torch.float16)`.
    """
    with on_device_of(v):
        return scale_values_triton(v)


@scale_values_.register_kernel("cpu")
def _(v: Tensor) -> Tensor:
    v16, v_scale = scale_values_reference(v)
    v.view(torch.float16).copy_(v16)
    return v_scale


@scale_values_.register_fake
def _(v: Tensor) -> Tensor:
    return v.new_empty((v.shape[0], v.shape[2], v.shape[3]), dtype=torch.float32)


@torch.library.custom_op("wan_kernels::quantize_values", mutates_args=(), device_types="cuda")
def quantize_values(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return v8 int8 [B, H, K, ceil(M/64)*64], v_scale and v_mean float32 [B, H, K], of v [B, M, H, K]."""
    with on_device_of(v):
        return quantize_values_triton(v)


@quantize_values.register_kernel("cpu")
def _(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_values_reference(v)


@quantize_values.register_fake
def _(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    statistics = v.new_empty((v.shape[0], v.shape[2], v.shape[3]), dtype=torch.float32)
    return _empty_values(v), statistics, torch.empty_like(statistics)
