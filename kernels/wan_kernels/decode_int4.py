"""decode_int4: a layer's int4 weights into a buffer that every layer uses again, as int8 or as floats.

    w_nk = q_nk * scale_[n, k/64] - shift_[n, k/64]        q = 0 .. 15, even k in the low nibble
    int8:  row_scale_n = max_k |w_nk| / 127        w8 = round_half_even(w / row_scale)

At the token counts of video a linear reads its weights once and computes for milliseconds: decoding first costs 1 % of
it, and decoding inside costs more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wan_kernels.hardware import row_launch
from wan_kernels.language import jit, launchable, on_device_of, tl
from wan_kernels.quantize_rows import quantize_rows_reference, store_quantized

INT4_GROUP = 64


def decode_int4_reference(packed: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return w [N, K] in `dtype` of packed uint8 [N, K/2], scale and shift [N, K/64]."""
    q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(dtype).unflatten(-1, (-1, INT4_GROUP))
    w: Tensor = (q * scale.to(dtype).unsqueeze(-1) - shift.to(dtype).unsqueeze(-1)).flatten(-2)
    return w


@jit
def _decode_int4_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,  # [N, K / 2] uint8
    scale_ptr,  # [N, K / 64] any float
    shift_ptr,  # [N, K / 64] any float
    out_ptr,  # [N, K] int8 or any float
    row_scale_ptr,  # [N] float32, or None for float output
    K,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK // 2)
    packed = tl.load(packed_ptr + row * (K // 2) + pairs, mask=pairs < K // 2, other=0)
    q = tl.interleave((packed & 15).to(tl.float32), (packed >> 4).to(tl.float32))
    groups = tl.arange(0, BLOCK // 64)
    scale = tl.load(scale_ptr + row * (K // 64) + groups, mask=groups < K // 64, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + row * (K // 64) + groups, mask=groups < K // 64, other=0.0).to(tl.float32)
    w = tl.reshape(tl.reshape(q, (BLOCK // 64, 64)) * scale[:, None] - shift[:, None], (BLOCK,))
    if row_scale_ptr is None:
        columns = tl.arange(0, BLOCK)
        tl.store(out_ptr + row * K + columns, w.to(out_ptr.dtype.element_ty), mask=columns < K)
    else:
        store_quantized(w, out_ptr, row_scale_ptr, row, K, BLOCK)


def decode_int4_triton(packed: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Launch the kernel: one program a row of weights."""
    launchable("decode_int4_")
    rows, columns = out.shape
    assert packed.shape == (rows, columns // 2), f"{tuple(packed.shape)} packed for {tuple(out.shape)}"
    assert scale.shape == shift.shape == (rows, columns // INT4_GROUP), f"scales {scale.shape}, shifts {shift.shape}"
    assert packed.dtype == torch.uint8, f"packed weights are {packed.dtype}, not uint8"
    for tensor in (packed, scale, shift, out):
        assert tensor.is_contiguous(), f"strides {tensor.stride()}"
    launch, row_scale = row_launch(columns), _row_scale(out)
    _decode_int4_kernel[(rows,)](
        packed, scale, shift, out, row_scale if out.dtype == torch.int8 else None, columns,
        BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return row_scale


def _row_scale(out: Tensor) -> Tensor:
    return out.new_ones(out.shape[0], dtype=torch.float32)


@torch.library.custom_op("wan_kernels::decode_int4_", mutates_args=("out",), device_types="cuda")
def decode_int4_(packed: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Write the weights into `out` [N, K], int8 or any float, and return its row_scale float32 [N] (ones for floats).

    packed uint8 [N, K/2]; scale, shift any float [N, K/64]; all contiguous, K a multiple of 64.
    """
    with on_device_of(packed):
        return decode_int4_triton(packed, scale, shift, out)


@decode_int4_.register_kernel("cpu")
def _(packed: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    w = decode_int4_reference(packed, scale, shift)
    if out.dtype != torch.int8:
        out.copy_(w)
        return _row_scale(out)
    q, row_scale = quantize_rows_reference(w, rotate=False)
    out.copy_(q)
    return row_scale


@decode_int4_.register_fake
def _(packed: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    return _row_scale(out)
