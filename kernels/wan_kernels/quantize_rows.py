"""quantize_rows: bring each row to int8 with one scale of its own, after a rotation if wanted.

    scale_m = max(max_d |x_md|, 1e-12) / 127        q_md = round_half_even(x_md / scale_m)        x ~ q * scale

A zero row gives q = 0, so whatever is multiplied with it comes out exact. A row with NaN or infinity gives a scale that
is not finite, so that it cannot hide in the integers.

The rotation multiplies each group of 64 columns with R = (J/2 - I) x (J/2 - I) x (J/2 - I) (Kronecker product, J the
4 x 4 matrix of ones). R is a regular Hadamard matrix (each row sums to 1; ConvRot, arXiv 2512.03673), symmetric and its
own inverse: (x R)(W R)^T = x W^T, and outlier channels are spread over their group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wan_kernels.hardware import split_launch
from wan_kernels.language import in_spans, jit, launchable, on_device_of, tl
from wan_kernels.row_piece import columns_of, largest_of, piece_of, there_of

ROTATION_GROUP = 64
INT8_MAX = 127.0
SMALLEST = 1e-12  # of a row's largest value: 0/0 must not happen, and 1e-12/127 is an ordinary float32
ROUND_TO_EVEN = 12_582_912.0  # 1.5 * 2^23: adding it leaves an integer, rounded half to even, in the low bits


def rotate_reference(x: Tensor) -> Tensor:
    """Return x R, group by group of 64 along the last axis; applied twice it gives x back."""
    assert x.shape[-1] % ROTATION_GROUP == 0, f"{x.shape[-1]} columns are not whole groups of {ROTATION_GROUP}"
    small = torch.ones(4, 4, dtype=x.dtype, device=x.device) / 2 - torch.eye(4, dtype=x.dtype, device=x.device)
    turned: Tensor = (x.unflatten(-1, (-1, ROTATION_GROUP)) @ torch.kron(torch.kron(small, small), small)).flatten(-2)
    return turned


def quantize_rows_reference(x: Tensor, rotate: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return q int8 [..., D] and scale float32 [...]; computed in `dtype`."""
    x = x.to(dtype)
    if rotate:
        x = rotate_reference(x)
    largest = torch.maximum(x.amax(dim=-1), -x.amin(dim=-1))  # of |x|, without a tensor for it
    scale = largest.clamp_(min=SMALLEST).div_(INT8_MAX)
    q = torch.div(x, scale.unsqueeze(-1)).round_().to(torch.int8)  # within +-127 by the choice of the scale
    return q, scale.float()


@jit
def rotated(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x R for a row of BLOCK float32 columns."""
    x = tl.reshape(x, (BLOCK // 64, 4, 4, 4))
    x = 0.5 * tl.sum(x, axis=1, keep_dims=True) - x
    x = 0.5 * tl.sum(x, axis=2, keep_dims=True) - x
    x = 0.5 * tl.sum(x, axis=3, keep_dims=True) - x
    return tl.reshape(x, (BLOCK,))


@jit
def rounded_int8(x):  # type: ignore[no-untyped-def]
    """Return float32 within +-127 as int8, rounded half to even, without a conversion instruction."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@jit
def scale_of(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return max(max |x|, 1e-12) / 127 over an axis, or over all for None; NaN where there is one.

    Without its sign a float32 orders as its bits do, with infinity and then NaN at the end: a maximum of floats would
    step over NaN, and integers need no shuffles within a warp. 730643660 are the bits of 1e-12.
    """
    return _scale_from(tl.max(_bits(x), axis=axis))


@jit
def _bits(x):  # type: ignore[no-untyped-def]
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _scale_from(bits):  # type: ignore[no-untyped-def]
    return tl.maximum(bits, 730643660).to(tl.float32, bitcast=True) / 127.0


@jit
def store_quantized(x, q_ptr, scale_ptr, row, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantize a row of float32, zero beyond D, and store it: q_ptr [M, D] int8, scale_ptr [M] float32."""
    columns = tl.arange(0, BLOCK)
    scale = scale_of(x, None)
    tl.store(q_ptr + row * D + columns, rounded_int8(x * (1.0 / scale)), mask=columns < D)
    tl.store(scale_ptr + row, scale)


@jit
def store_quantized_pieces(  # type: ignore[no-untyped-def]
    front,  # [FRONT] float32
    back,  # [BACK] float32, zero beyond the row; None where BACK is 0
    q_ptr,  # [M, D] int8
    scale_ptr,  # [M] float32
    row,
    D: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Do as `store_quantized` with a row in two pieces."""
    back_bits = None
    if BACK:
        back_bits = _bits(back)
    scale = _scale_from(largest_of(_bits(front), back_bits, FRONT, BACK))
    _store_steps(front * (1.0 / scale), q_ptr, row, D, 0, FRONT)
    if BACK:
        _store_steps(back * (1.0 / scale), q_ptr, row, D, FRONT, BACK)
    tl.store(scale_ptr + row, scale)


@jit
def _store_steps(  # type: ignore[no-untyped-def]
    x, q_ptr, row, D: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr
):
    columns = columns_of(START, LANES)
    tl.store(q_ptr + row * D + columns, rounded_int8(x), mask=there_of(columns, START, LANES, D))


@jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, D] any float
    q_ptr,  # [M, D] int8
    scale_ptr,  # [M] float32
    D: tl.constexpr, ROTATE: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    front, back = piece_of(x_ptr, row, D, 0, FRONT), None
    if BACK:
        back = piece_of(x_ptr, row, D, FRONT, BACK)
    if ROTATE:
        front = rotated(front, FRONT)
        if BACK:
            back = rotated(back, BACK)
    store_quantized_pieces(front, back, q_ptr, scale_ptr, row, D, FRONT, BACK)


def quantize_rows_triton(x: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel: one program a row."""
    launchable("quantize_rows")
    check_rows(x, rotate)
    q, scale = _empty(x)
    if scale.numel():
        launch = split_launch(x.shape[-1])
        _quantize_rows_kernel[(scale.numel(),)](
            x, q, scale, x.shape[-1], ROTATE=rotate, FRONT=launch.front, BACK=launch.back, num_warps=launch.num_warps
        )
    return q, scale


def check_rows(x: Tensor, rotate: bool) -> None:
    """Assert what every kernel that works row by row takes for granted."""
    assert x.is_contiguous(), f"rows of shape {tuple(x.shape)} are not contiguous: strides {x.stride()}"
    assert not rotate or x.shape[-1] % ROTATION_GROUP == 0, f"{x.shape[-1]} columns are not whole groups of 64"


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("wan_kernels::quantize_rows", mutates_args=(), device_types="cuda")
def quantize_rows(x: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """Return q int8 [..., D] and scale float32 [...] of x [..., D]; with `rotate`, of x R (D a multiple of 64)."""
    with on_device_of(x):
        return quantize_rows_triton(x, rotate)


@quantize_rows.register_kernel("cpu")
def _(x: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    q, scale = _empty(x)
    rows = x.reshape(-1, x.shape[-1])
    for span in in_spans(*rows.shape):
        q.view(rows.shape)[span], scale.view(-1)[span] = quantize_rows_reference(rows[span], rotate)
    return q, scale


@quantize_rows.register_fake
def _(x: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    return _empty(x)
