"""linear_int8: rows and weights in int8, exact sums in int32, scales, bias and what follows in float32.

    y_mn = (sum_k a_mk w_nk) * a_scale_m * w_scale_n + bias_n          |a|, |w| <= 127, so sums stay below 2^31
    none: y        gelu: tanh-GELU(y)        gated residual: x_mn <- x_mn + y_mn * gate_bn

GELU cannot be quantized here: a row's scale is known when all its columns are, and a tile has 256 of 13,824. So `gelu`
is for a next linear that is not int8, and `gelu_quantize` for one that is.

A step of the loop has two `tl.dot`: with one, Triton 3.8 and 3.9 unpack and repack every byte of loop-carried fragments
on sm_86 and sm_89.

Shape legend: M rows (tokens), N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_kernels.hardware import TileLaunch, tile_launch
from wan_kernels.language import ceil_div, check_float32, in_spans, jit, launchable, on_device_of, tl

_EXACT_IN_FLOAT32 = 1024  # products of int8 whose sum stays below 2^24
_LEAST_ROWS = 32  # cuBLAS multiplies more than 16 rows in int8
_ROWS_AT_A_TIME = 4096  # of int32 sums that the reference holds
_SMALL = 128  # rows, columns or inputs below this get the small tiles
_SWIZZLE = 8  # rows of tiles that walk along together, so that they share weights in the L2 cache


def linear_int8_reference(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gelu: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return y [..., N] in `dtype`, or its tanh-GELU."""
    outs = [_finished(sums, scale, w_scale, bias, gelu, dtype) for _, sums, scale in _sums(a, a_scale, w)]
    y = outs[0] if len(outs) == 1 else torch.cat(outs)
    return y.unflatten(0, a.shape[:-1]) if a.dim() > 2 else y


def _sums(a: Tensor, a_scale: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows, their exact sums [rows, N], and their scales [rows], as many rows at a time as may be held."""
    rows, scales = a.flatten(0, -2), a_scale.flatten()
    for start in range(0, max(len(rows), 1), _ROWS_AT_A_TIME):
        span = slice(start, start + _ROWS_AT_A_TIME)
        yield span, matmul_int8(rows[span], w), scales[span]


def _finished(
    sums_MN: Tensor, scale_M: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, dtype: torch.dtype
) -> Tensor:
    """Return what follows the sums, [M, N] in `dtype`."""
    y = torch.mul(sums_MN, scale_M.to(dtype).unsqueeze(1))
    y = y.mul_(w_scale.to(dtype)) if bias is None else torch.addcmul(bias.to(dtype), y, w_scale.to(dtype))
    return F.gelu(y, approximate="tanh") if gelu else y


def linear_int8_residual_reference(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x + y * gate [B, L, N] in `dtype`; a gate of None counts as 1."""
    y = linear_int8_reference(a, a_scale, w, w_scale, bias, dtype=dtype)
    return x.to(dtype) + (y if gate is None else y * gate.to(dtype).unsqueeze(1))


def matmul_int8(a_MK: Tensor, w_NK: Tensor) -> Tensor:
    """Return a w^T exactly, int32 or float32 that holds integers.

    On a CPU with VNNI by torch's int8 multiplication. Without VNNI that is a plain loop, twenty times slower than the
    float32 multiplication, which is exact as well if it is done 1,024 inputs at a time.
    """
    if a_MK.device.type != "cpu":
        rows = a_MK.shape[0]
        return torch._int_mm(F.pad(a_MK, (0, 0, 0, max(0, _LEAST_ROWS - rows))), w_NK.t())[:rows]
    if torch.cpu._is_vnni_supported():
        return torch._int_mm(a_MK, w_NK.t())
    inputs = a_MK.shape[1]
    if inputs <= _EXACT_IN_FLOAT32:
        return a_MK.float() @ w_NK.float().t()
    total = torch.zeros((a_MK.shape[0], w_NK.shape[0]), dtype=torch.int32)
    for start in range(0, inputs, _EXACT_IN_FLOAT32):
        span = slice(start, start + _EXACT_IN_FLOAT32)
        total += (a_MK[:, span].float() @ w_NK[:, span].float().t()).to(torch.int32)
    return total


@jit
def _products(  # type: ignore[no-untyped-def]
    acc, a_ptrs, w_ptrs, k, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_K inputs from k on to the sums."""
    if EVEN_K:
        return tl.dot(tl.load(a_ptrs), tl.load(w_ptrs), acc, out_dtype=tl.int32)
    inputs = k + tl.arange(0, BLOCK_K)
    a = tl.load(a_ptrs, mask=inputs[None, :] < K, other=0)
    return tl.dot(a, tl.load(w_ptrs, mask=inputs[:, None] < K, other=0), acc, out_dtype=tl.int32)


@jit
def tanh_gelu(x):  # type: ignore[no-untyped-def]
    """Return tanh-GELU as x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3))), the same function.

    -2 sqrt(2/pi) log2(e) = -2.302208...; 1/y as rsqrt(y)^2, since a division takes eight instructions more.
    """
    inverse_root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))
    return x * (inverse_root * inverse_root)


@jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    a_ptr,  # [M, K] int8
    a_scale_ptr,  # [M] float32
    w_ptr,  # [N, K] int8
    w_scale_ptr,  # [N] float32
    bias_ptr,  # [N] any float, or None
    x_ptr,  # [M, N] any float, the residual, or None
    gate_ptr,  # [B, N] float32, or None
    out_ptr,  # [M, N] any float; with a residual the same memory as x
    M, N, K, rows_per_batch,
    GELU: tl.constexpr, ONE_BATCH: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (SWIZZLE * tiles_n)
    height = tl.minimum(tiles_m - group * SWIZZLE, SWIZZLE)
    tile_m = group * SWIZZLE + (program % (SWIZZLE * tiles_n)) % height
    tile_n = (program % (SWIZZLE * tiles_n)) // height
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    # rows and columns beyond the end read the last one: the loop needs no mask, and they are not stored
    a_ptrs = a_ptr + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * K + inputs[None, :]
    w_ptrs = w_ptr + tl.minimum(columns, N - 1)[None, :].to(tl.int64) * K + inputs[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, 2 * BLOCK_K):
        acc = _products(acc, a_ptrs, w_ptrs, k, K, BLOCK_K, EVEN_K)
        acc = _products(acc, a_ptrs + BLOCK_K, w_ptrs + BLOCK_K, k + BLOCK_K, K, BLOCK_K, EVEN_K)
        a_ptrs += 2 * BLOCK_K
        w_ptrs += 2 * BLOCK_K
    there_m, there_n = rows < M, columns < N
    y = acc.to(tl.float32) * tl.load(a_scale_ptr + rows, mask=there_m, other=0.0)[:, None]
    y *= tl.load(w_scale_ptr + columns, mask=there_n, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=there_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = tanh_gelu(y)
    offsets, there = rows[:, None].to(tl.int64) * N + columns[None, :], there_m[:, None] & there_n[None, :]
    if x_ptr is not None:
        if gate_ptr is not None:
            if ONE_BATCH:
                y *= tl.load(gate_ptr + columns, mask=there_n, other=0.0)[None, :]
            else:
                gates = gate_ptr + (rows // rows_per_batch)[:, None] * N + columns[None, :]
                y *= tl.load(gates, mask=there, other=0.0)
        y += tl.load(x_ptr + offsets, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=there)


def linear_int8_triton(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    out_dtype: torch.dtype,
    launch: TileLaunch | None = None,
) -> Tensor:
    """Launch the kernel into a new tensor. launch: what tuning tries; from the table unless given."""
    launchable("linear_int8")
    out = _empty(a, w, out_dtype)
    _launch((a, a_scale, w, w_scale, bias), None, None, out, gelu=gelu, launch=launch)
    return out


def linear_int8_residual_triton(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor | None
) -> None:
    """Launch the kernel onto x."""
    launchable("linear_int8_residual_")
    assert x.shape == (*a.shape[:-1], w.shape[0]), f"x is {tuple(x.shape)} for rows {tuple(a.shape)}"
    assert gate is None or gate.shape == (x.shape[0], x.shape[2]), f"gate of shape {gate.shape}"
    _launch((a, a_scale, w, w_scale, bias), x, gate, x, gelu=False)


def _launch(
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    x: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    *,
    gelu: bool,
    launch: TileLaunch | None = None,
) -> None:
    a, a_scale, w, w_scale, bias = operands
    (n, k), m = w.shape, a.numel() // a.shape[-1]
    assert a.shape[-1] == k and a_scale.numel() == m and w_scale.shape == (n,), f"{a.shape} rows, {w.shape} weights"
    for tensor in (a, a_scale, w, w_scale, bias, x, gate):
        assert tensor is None or tensor.is_contiguous(), f"strides {tensor.stride()} of shape {tuple(tensor.shape)}"
    assert a.dtype == w.dtype == torch.int8, f"rows are {a.dtype} and weights {w.dtype}, not int8"
    check_float32(a_scale=a_scale, w_scale=w_scale, gate=gate)
    if m == 0:
        return
    launch = launch or _tiles(m, n, k, a.device)
    tiles = ceil_div(m, launch.block_m) * ceil_div(n, launch.block_n)
    _linear_kernel[(tiles,)](
        a, a_scale, w, w_scale, bias, x, gate, out,
        m, n, k, x.shape[1] if x is not None else m,
        GELU=gelu, ONE_BATCH=x is None or x.shape[0] == 1, EVEN_K=k % (2 * launch.block_k) == 0,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, SWIZZLE=_SWIZZLE,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def _tiles(m: int, n: int, k: int, device: torch.device) -> TileLaunch:
    return tile_launch("linear_int8", shape_class(m, n, k), device)


def shape_class(rows: int, outputs: int, inputs: int) -> str:
    """Return which of the table's classes a product is of; a chunk's tail is "small" where the rest is "large"."""
    return "small" if min(rows, outputs, inputs) < _SMALL else "large"


def _empty(a: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=dtype)


@torch.library.custom_op("wan_kernels::linear_int8", mutates_args=(), device_types="cuda")
def linear_int8(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, out_dtype: torch.dtype
) -> Tensor:
    """Return a w^T with scales and bias, [..., N] in `out_dtype`; with `gelu` its tanh-GELU.

    a int8 [..., K], a_scale float32 [...], w int8 [N, K], w_scale float32 [N], bias any float [N]; all contiguous.
    """
    with on_device_of(a):
        return linear_int8_triton(a, a_scale, w, w_scale, bias, gelu, out_dtype)


@linear_int8.register_kernel("cpu")
def _(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, out_dtype: torch.dtype
) -> Tensor:
    out = _empty(a, w, out_dtype)
    for rows, sums, scale in _sums(a, a_scale, w):
        y = out.view(-1, len(w))[rows]
        for span in in_spans(*sums.shape):
            y[span] = _finished(sums[span], scale[span], w_scale, bias, gelu, torch.float32)
    return out


@linear_int8.register_fake
def _(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, gelu: bool, out_dtype: torch.dtype
) -> Tensor:
    return _empty(a, w, out_dtype)


@torch.library.custom_op("wan_kernels::linear_int8_residual_", mutates_args=("x",), device_types="cuda")
def linear_int8_residual_(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor | None
) -> None:
    """Add (a w^T with scales and bias) * gate to x [B, L, N] in place, in float32; a gate of None counts as 1.

    a int8 [B, L, K], a_scale float32 [B, L], gate float32 [B, N], the rest as in `linear_int8`; all contiguous.
    """
    with on_device_of(a):
        linear_int8_residual_triton(a, a_scale, w, w_scale, bias, x, gate)


@linear_int8_residual_.register_kernel("cpu")
def _(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor | None
) -> None:
    for batch in range(len(x)):
        for rows, sums, scale in _sums(a[batch], a_scale[batch], w):
            held = x[batch, rows]
            for span in in_spans(*sums.shape):
                y = _finished(sums[span], scale[span], w_scale, bias, False, torch.float32)
                held[span] = held[span] + (y if gate is None else y * gate[batch])


@linear_int8_residual_.register_fake
def _(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor | None
) -> None:
    return None
