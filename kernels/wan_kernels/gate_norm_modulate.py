"""gate_norm_modulate: what lies between two linears of a block: gated residual, layer norm, modulation, quantization.

    x <- x + y * gate            (only where there is a y; a gate of None counts as 1)
    n = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift         affine: * scale + shift
    n as any float, or as int8 with one scale a row (quantize_rows), rotated if wanted

The residual is rounded to its own dtype before the norm reads it, as it would be between two operations. Statistics and
everything else are float32, in registers: nothing of M x D in float32 is ever in memory.

Shape legend: B batch, L tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_kernels.hardware import split_launch
from wan_kernels.language import check_float32, in_spans, jit, launchable, on_device_of, tl
from wan_kernels.quantize_rows import check_rows, quantize_rows_reference, rotated, store_quantized_pieces
from wan_kernels.row_piece import columns_of, piece_of, sum_of, there_of


def gate_norm_modulate_reference(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the new x in its own dtype and n [B, L, D] in `dtype`."""
    if y is not None:
        update = y.to(dtype) if gate is None else y.to(dtype) * gate.to(dtype).unsqueeze(1)
        x = (x.to(dtype) + update).to(x.dtype)
    factor, offset = scale.to(dtype).unsqueeze(1), shift.to(dtype).unsqueeze(1)
    normed = F.layer_norm(x.to(dtype), (x.shape[-1],), eps=eps)
    return x, normed * (factor if affine else 1 + factor) + offset


@jit
def _gate_norm_modulate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, L, D] any float; written where there is a y
    y_ptr,  # [B, L, D] any float, or None
    gate_ptr,  # [B, D] float32, or None
    scale_ptr,  # [B, D] float32
    shift_ptr,  # [B, D] float32
    out_ptr,  # [B, L, D] any float, or int8
    out_scale_ptr,  # [B, L] float32, or None for float output
    L, eps,
    D: tl.constexpr, AFFINE: tl.constexpr, ROTATE: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = batch * L + tl.program_id(0)
    front, front_y = piece_of(x_ptr, row, D, 0, FRONT), piece_of(y_ptr, row, D, 0, FRONT)
    back, back_y = None, None
    if BACK:
        back, back_y = piece_of(x_ptr, row, D, FRONT, BACK), piece_of(y_ptr, row, D, FRONT, BACK)
    if y_ptr is not None:  # after all of the row is on its way: a load is not moved before a store
        front = _updated(front, front_y, x_ptr, gate_ptr, row, batch, D, 0, FRONT)
        if BACK:
            back = _updated(back, back_y, x_ptr, gate_ptr, row, batch, D, FRONT, BACK)
    mean = sum_of(front, back, FRONT, BACK) / D
    front = _centred(front, mean, D, 0, FRONT)
    squares = None
    if BACK:
        back = _centred(back, mean, D, FRONT, BACK)
        squares = back * back
    inverse = 1.0 / tl.sqrt(sum_of(front * front, squares, FRONT, BACK) / D + eps)
    front = _modulated(front * inverse, scale_ptr, shift_ptr, batch, D, AFFINE, ROTATE, 0, FRONT)
    if BACK:
        back = _modulated(back * inverse, scale_ptr, shift_ptr, batch, D, AFFINE, ROTATE, FRONT, BACK)
    if out_scale_ptr is None:
        _store_floats(front, out_ptr, row, D, 0, FRONT)
        if BACK:
            _store_floats(back, out_ptr, row, D, FRONT, BACK)
    else:
        store_quantized_pieces(front, back, out_ptr, out_scale_ptr, row, D, FRONT, BACK)


@jit
def _updated(  # type: ignore[no-untyped-def]
    x, y, x_ptr, gate_ptr, row, batch, D: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr
):
    """Store a piece of x + y * gate and return it as float32, as it was rounded."""
    columns = columns_of(START, LANES)
    there = there_of(columns, START, LANES, D)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + batch * D + columns, mask=there, other=0.0)
    rounded = (x + y).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row * D + columns, rounded, mask=there)
    return rounded.to(tl.float32)


@jit
def _centred(x, mean, D: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where(there_of(columns_of(START, LANES), START, LANES, D), x - mean, 0.0)


@jit
def _modulated(  # type: ignore[no-untyped-def]
    n, scale_ptr, shift_ptr, batch, D: tl.constexpr,
    AFFINE: tl.constexpr, ROTATE: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    columns = columns_of(START, LANES)
    there = there_of(columns, START, LANES, D)
    factor = tl.load(scale_ptr + batch * D + columns, mask=there, other=0.0)
    if not AFFINE:
        factor += 1.0
    n = n * factor + tl.load(shift_ptr + batch * D + columns, mask=there, other=0.0)
    if ROTATE:
        n = rotated(n, LANES)
    return n


@jit
def _store_floats(n, out_ptr, row, D: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = columns_of(START, LANES)
    tl.store(out_ptr + row * D + columns, n.to(out_ptr.dtype.element_ty), mask=there_of(columns, START, LANES, D))


def _launch(operands: Any, out: Tensor, out_scale: Tensor | None, *, affine: bool, eps: float, rotate: bool) -> None:
    x, y, gate, scale, shift = operands
    launchable("gate_norm_modulate")
    check_rows(x, rotate)
    batch, tokens, dim = x.shape
    assert y is None or (y.shape == x.shape and y.is_contiguous()), f"y {y.shape} beside x {x.shape}"
    for vector in (gate, scale, shift):
        assert vector is None or (vector.shape == (batch, dim) and vector.is_contiguous()), f"vector {vector.shape}"
    check_float32(gate=gate, scale=scale, shift=shift)
    if x.numel() == 0:
        return
    launch = split_launch(dim)
    _gate_norm_modulate_kernel[(tokens, batch)](
        x, y, gate, scale, shift, out, out_scale, tokens, eps,
        D=dim, AFFINE=affine, ROTATE=rotate, FRONT=launch.front, BACK=launch.back, num_warps=launch.num_warps,
    )  # fmt: skip


def gate_norm_modulate_triton(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel: one program a row; x is written where there is a y."""
    out = torch.empty_like(x, dtype=out_dtype)
    _launch((x, y, gate, scale, shift), out, None, affine=affine, eps=eps, rotate=False)
    return out


def gate_norm_modulate_quantize_triton(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    rotate: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel with int8 output."""
    q, q_scale = _empty_quantized(x)
    _launch((x, y, gate, scale, shift), q, q_scale, affine=affine, eps=eps, rotate=rotate)
    return q, q_scale


def _of(span: slice, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x[:, span], None if y is None else y[:, span]


def _empty_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("wan_kernels::gate_norm_modulate_", mutates_args=("x",), device_types="cuda")
def gate_norm_modulate_(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Add y * gate to x in place where there is a y; return the modulated norm n [B, L, D] in `out_dtype`.

    x, y any float [B, L, D]; gate, scale, shift float32 [B, D]; all contiguous. affine: `scale` is the factor itself,
    not what is added to 1.
    """
    with on_device_of(x):
        return gate_norm_modulate_triton(x, y, gate, scale, shift, affine, eps, out_dtype)


@gate_norm_modulate_.register_kernel("cpu")
def _(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    out = torch.empty_like(x, dtype=out_dtype)
    for span in in_spans(*x.shape[1:]):
        new, out[:, span] = gate_norm_modulate_reference(*_of(span, x, y), gate, scale, shift, affine, eps)
        if y is not None:
            x[:, span] = new
    return out


@gate_norm_modulate_.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype)


@torch.library.custom_op("wan_kernels::gate_norm_modulate_quantize_", mutates_args=("x",), device_types="cuda")
def gate_norm_modulate_quantize_(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    rotate: bool,
) -> tuple[Tensor, Tensor]:
    """Do as `gate_norm_modulate_`; return n as int8 [B, L, D] with its scale float32 [B, L].

    rotate: quantize n R instead of n (see `quantize_rows`).
    """
    with on_device_of(x):
        return gate_norm_modulate_quantize_triton(x, y, gate, scale, shift, affine, eps, rotate)


@gate_norm_modulate_quantize_.register_kernel("cpu")
def _(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    rotate: bool,
) -> tuple[Tensor, Tensor]:
    q, q_scale = _empty_quantized(x)
    for span in in_spans(*x.shape[1:]):
        new, n = gate_norm_modulate_reference(*_of(span, x, y), gate, scale, shift, affine, eps)
        if y is not None:
            x[:, span] = new
        q[:, span], q_scale[:, span] = quantize_rows_reference(n, rotate)
    return q, q_scale


@gate_norm_modulate_quantize_.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    affine: bool,
    eps: float,
    rotate: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(x)
