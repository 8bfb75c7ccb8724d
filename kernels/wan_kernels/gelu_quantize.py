"""gelu_quantize: tanh-GELU of each row, rotated if wanted, as int8 with one scale a row.

g = h * sigmoid(2 sqrt(2/pi) (h + 0.044715 h^3))        q, scale = quantize_rows(g)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_kernels.hardware import row_launch
from wan_kernels.language import in_spans, jit, launchable, on_device_of, tl
from wan_kernels.linear_int8 import tanh_gelu
from wan_kernels.quantize_rows import check_rows, quantize_rows_reference, rotated, store_quantized


def gelu_quantize_reference(h: Tensor, rotate: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return q int8 [..., D] and scale float32 [...]; computed in `dtype`."""
    return quantize_rows_reference(F.gelu(h.to(dtype), approximate="tanh"), rotate, dtype)


@jit
def _gelu_quantize_kernel(  # type: ignore[no-untyped-def]
    h_ptr,  # [M, D] any float
    q_ptr,  # [M, D] int8
    scale_ptr,  # [M] float32
    D,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    g = tanh_gelu(tl.load(h_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32))
    if ROTATE:
        g = rotated(g, BLOCK)
    store_quantized(g, q_ptr, scale_ptr, row, D, BLOCK)


def gelu_quantize_triton(h: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel: one program a row."""
    launchable("gelu_quantize")
    check_rows(h, rotate)
    q, scale = _empty(h)
    if scale.numel():
        launch = row_launch(h.shape[-1])
        _gelu_quantize_kernel[(scale.numel(),)](
            h, q, scale, h.shape[-1], ROTATE=rotate, BLOCK=launch.block, num_warps=launch.num_warps
        )
    return q, scale


def _empty(h: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h, dtype=torch.int8), h.new_empty(h.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("wan_kernels::gelu_quantize", mutates_args=(), device_types="cuda")
def gelu_quantize(h: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """Return q int8 [..., D] and scale float32 [...] of g = tanh-GELU(h), h [..., D]; with `rotate`, of g R."""
    with on_device_of(h):
        return gelu_quantize_triton(h, rotate)


@gelu_quantize.register_kernel("cpu")
def _(h: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    q, scale = _empty(h)
    rows = h.reshape(-1, h.shape[-1])
    for span in in_spans(*rows.shape):
        q.view(rows.shape)[span], scale.view(-1)[span] = gelu_quantize_reference(rows[span], rotate)
    return q, scale


@gelu_quantize.register_fake
def _(h: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    return _empty(h)
