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

from wan_kernels.hardware import row_launch
from wan_kernels.language import in_spans, jit, launchable, on_device_of, tl
from wan_kernels.quantize_rows import check_rows, quantize_rows_reference, rotated, store_quantized


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
    L, D, eps,
    AFFINE: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < D
    vectors = (row // L) * D + columns
    # rows go out of the L1 cache first, so that it keeps the vectors: they are as large, and always the same
    x = tl.load(x_ptr + row * D + columns, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + row * D + columns, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if gate_ptr is not None:
            y *= tl.load(gate_ptr + vectors, mask=there, other=0.0)
        rounded = (x + y).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * D + columns, rounded, mask=there)
        x = rounded.to(tl.float32)
    centred = tl.where(there, x - tl.sum(x) / D, 0.0)
    n = centred / tl.sqrt(tl.sum(centred * centred) / D + eps)
    factor = tl.load(scale_ptr + vectors, mask=there, other=0.0)
    if not AFFINE:
        factor += 1.0
    n = n * factor + tl.load(shift_ptr + vectors, mask=there, other=0.0)
    if out_scale_ptr is None:
        tl.store(out_ptr + row * D + columns, n.to(out_ptr.dtype.element_ty), mask=there)
    else:
        if ROTATE:
            n = rotated(n, BLOCK)
        store_quantized(n, out_ptr, out_scale_ptr, row, D, BLOCK)


def _launch(operands: Any, out: Tensor, out_scale: Tensor | None, *, affine: bool, eps: float, rotate: bool) -> None:
    x, y, gate, scale, shift = operands
    launchable("gate_norm_modulate")
    check_rows(x, rotate)
    batch, tokens, dim = x.shape
    assert y is None or (y.shape == x.shape and y.is_contiguous()), f"y {y.shape} beside x {x.shape}"
    for vector in (gate, scale, shift):
        assert vector is None or (vector.shape == (batch, dim) and vector.is_contiguous()), f"vector {vector.shape}"
    if x.numel() == 0:
        return
    launch = row_launch(dim)
    _gate_norm_modulate_kernel[(batch * tokens,)](
        x, y, gate, scale, shift, out, out_scale, tokens, dim, eps,
        AFFINE=affine, ROTATE=rotate, BLOCK=launch.block, num_warps=launch.num_warps,
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
