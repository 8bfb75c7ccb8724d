"""rms_rope: root-mean-square norm over all heads together, then the rotary turn; as floats, or as int8 for attention.

    n = x / sqrt(mean(x^2) + eps) * weight                            over all H * K channels
    (e, o) of each neighbouring pair  ->  (e cos - o sin, e sin + o cos)
    queries: int8 with one scale a token and head
    keys:    a vector `centre` is taken off, which softmax does not see; int8 with one scale for 64 keys of a head

Without cos and sin there is no turn (queries of cross-attention).

Shape legend: B batch, L tokens, H heads, K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_kernels.attention_int8 import KEY_BLOCK
from wan_kernels.hardware import split_launch
from wan_kernels.language import ceil_div, check_float32, in_spans, jit, launchable, on_device_of, tl
from wan_kernels.quantize_rows import INT8_MAX, SMALLEST, check_rows, quantize_rows_reference, rounded_int8, scale_of
from wan_kernels.row_piece import columns_of, piece_of, sum_of, there_of


def rms_rope_reference(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the normed and turned x as [B, L, H, K] in `dtype`."""
    n_BLHK: Tensor = F.rms_norm(x.to(dtype), (x.shape[-1],), weight.to(dtype), eps).unflatten(-1, (heads, -1))
    if cos is None or sin is None:
        return n_BLHK
    cos_L1K, sin_L1K = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    even, odd = n_BLHK.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos_L1K - odd * sin_L1K, even * sin_L1K + odd * cos_L1K), dim=-1).flatten(-2)


def quantize_keys_reference(k_BLHK: Tensor, centre_BHK: Tensor) -> tuple[Tensor, Tensor]:
    """Return k - centre as int8 [B, H, L, K], and its scales float32 [B, H, ceil(L/64)]."""
    k_BHLK = (k_BLHK - centre_BHK.to(k_BLHK.dtype).unsqueeze(1)).transpose(1, 2)
    tokens = k_BHLK.shape[2]
    blocks = F.pad(k_BHLK, (0, 0, 0, -tokens % KEY_BLOCK)).unflatten(2, (-1, KEY_BLOCK))
    scale = blocks.abs().amax(dim=(-2, -1)).clamp(min=SMALLEST) / INT8_MAX
    q = (blocks / scale[..., None, None]).round().clamp(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8).flatten(2, 3)[:, :, :tokens].contiguous(), scale.float()


@jit
def _turned(x, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x [ROWS, COLUMNS] with each neighbouring pair turned; cos and sin [ROWS, COLUMNS / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, COLUMNS))


@jit
def _rms_rope_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, L, H * K] any float
    weight_ptr,  # [H * K] float32
    cos_ptr,  # [L, K / 2] float32, or None
    sin_ptr,  # [L, K / 2] float32
    out_ptr,  # [B, L, H, K] any float, or [B, H, L, K] int8
    out_scale_ptr,  # [B, H, L] float32, or None for float output
    L, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    batch, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = batch * L + token
    D: tl.constexpr = HEADS * HEAD_DIM
    cos, sin = None, None
    if cos_ptr is not None:  # asked for with the row: after its sum the wait for them would be a second one
        pairs = token * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)
        cos, sin = tl.load(cos_ptr + pairs)[None, :], tl.load(sin_ptr + pairs)[None, :]
    front, back = piece_of(x_ptr, row, D, 0, FRONT), None
    if BACK:
        back = piece_of(x_ptr, row, D, FRONT, BACK)
    tl.debug_barrier()  # holds the loads in that order: ptxas would put the tables' after the wait for the row
    inverse = _inverse_rms(front, back, eps, D, FRONT, BACK)
    front = _weighted(front * inverse, weight_ptr, D, 0, FRONT)
    if BACK:
        back = _weighted(back * inverse, weight_ptr, D, FRONT, BACK)
    _store_heads(front, cos, sin, out_ptr, out_scale_ptr, batch, token, L, HEADS, HEAD_DIM, 0, FRONT)
    if BACK:
        _store_heads(back, cos, sin, out_ptr, out_scale_ptr, batch, token, L, HEADS, HEAD_DIM, FRONT, BACK)


@jit
def _inverse_rms(front, back, eps, D: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    squares = None
    if BACK:
        squares = back * back
    return 1.0 / tl.sqrt(sum_of(front * front, squares, FRONT, BACK) / D + eps)


@jit
def _weighted(x, weight_ptr, D: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = columns_of(START, LANES)
    return x * tl.load(weight_ptr + columns, mask=there_of(columns, START, LANES, D), other=0.0)


@jit
def _store_heads(  # type: ignore[no-untyped-def]
    x, cos, sin, out_ptr, out_scale_ptr, batch, token, L,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, START: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Turn the heads of a piece and store them as the kernel's output lies."""
    COUNT: tl.constexpr = LANES // HEAD_DIM
    x = tl.reshape(x, (COUNT, HEAD_DIM))
    if cos is not None:
        x = _turned(x, cos, sin, COUNT, HEAD_DIM)
    head, channel = START // HEAD_DIM + tl.arange(0, COUNT), columns_of(0, HEAD_DIM)
    there = there_of(head, START // HEAD_DIM, COUNT, HEADS)
    if out_scale_ptr is None:
        offsets = ((batch * L + token) * HEADS + head)[:, None] * HEAD_DIM + channel[None, :]
        tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=there[:, None])
    else:
        scale = scale_of(x, 1)
        rows = (batch * HEADS + head) * L + token
        q = rounded_int8(x * (1.0 / scale)[:, None])
        tl.store(out_ptr + rows[:, None] * HEAD_DIM + channel[None, :], q, mask=there[:, None])
        tl.store(out_scale_ptr + rows, scale, mask=there)


@jit
def _inverse_rms_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, D] any float
    out_ptr,  # [M] float32
    eps,
    D: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    front, back = piece_of(x_ptr, row, D, 0, FRONT), None
    if BACK:
        back = piece_of(x_ptr, row, D, FRONT, BACK)
    tl.store(out_ptr + row, _inverse_rms(front, back, eps, D, FRONT, BACK))


@jit
def _keys_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, L, H * K] any float
    inverse_rms_ptr,  # [B, L] float32
    weight_ptr,  # [H * K] float32
    cos_ptr,  # [L, K / 2] float32
    sin_ptr,  # [L, K / 2] float32
    centre_ptr,  # [B, H, K] float32
    out_ptr,  # [B, H, L, K] int8
    out_scale_ptr,  # [B, H, ceil(L/64)] float32
    L, heads,
    HEAD_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens, channel = block * KEYS + tl.arange(0, KEYS), tl.arange(0, HEAD_DIM)
    there = tokens < L
    rows = batch * L + tokens
    x_offsets = (rows[:, None] * heads + head) * HEAD_DIM + channel[None, :]
    x = tl.load(x_ptr + x_offsets, mask=there[:, None], other=0.0).to(tl.float32)
    x *= tl.load(inverse_rms_ptr + rows, mask=there, other=0.0)[:, None]
    x *= tl.load(weight_ptr + head * HEAD_DIM + channel)[None, :]
    pairs = tokens[:, None] * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[None, :]
    cos = tl.load(cos_ptr + pairs, mask=there[:, None], other=0.0)
    sin = tl.load(sin_ptr + pairs, mask=there[:, None], other=0.0)
    x = _turned(x, cos, sin, KEYS, HEAD_DIM)
    batch_head = batch * heads + head
    x -= tl.load(centre_ptr + batch_head * HEAD_DIM + channel)[None, :]
    x = tl.where(there[:, None], x, 0.0)
    scale = scale_of(x, None)
    out_offsets = (batch_head * L + tokens[:, None]) * HEAD_DIM + channel[None, :]
    tl.store(out_ptr + out_offsets, rounded_int8(x * (1.0 / scale)), mask=there[:, None])
    tl.store(out_scale_ptr + batch_head * tl.cdiv(L, KEYS) + block, scale)


def rms_rope_triton(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel: one program a row."""
    out = _empty(x, heads, out_dtype)
    _launch_rows((x, weight, cos, sin), out, None, heads, eps)
    return out


def rms_rope_quantize_triton(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the kernel with int8 output: one program a row."""
    q, scale = _empty_queries(x, heads)
    _launch_rows((x, weight, cos, sin), q, scale, heads, eps)
    return q, scale


def _launch_rows(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    out: Tensor,
    out_scale: Tensor | None,
    heads: int,
    eps: float,
) -> None:
    x, weight, cos, sin = operands
    launchable("rms_rope")
    _check(x, weight, cos, sin, heads)
    batch, tokens, dim = x.shape
    if x.numel() == 0:
        return
    launch = split_launch(dim)
    _rms_rope_kernel[(tokens, batch)](
        x, weight, cos, sin, out, out_scale, tokens, eps,
        HEADS=heads, HEAD_DIM=dim // heads, FRONT=launch.front, BACK=launch.back, num_warps=launch.num_warps,
    )  # fmt: skip


def rms_rope_quantize_keys_triton(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, centre: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch two kernels: each row's norm, then one program for 64 keys of a head; neighbours read the same rows."""
    launchable("rms_rope_quantize_keys")
    heads, (batch, tokens, dim) = centre.shape[1], x.shape
    _check(x, weight, cos, sin, heads)
    assert centre.shape == (batch, heads, dim // heads) and centre.is_contiguous(), f"centre {tuple(centre.shape)}"
    check_float32(centre=centre)
    q, scale = _empty_keys(x, heads)
    inverse_rms, launch = x.new_empty((batch, tokens), dtype=torch.float32), split_launch(dim)
    _inverse_rms_kernel[(batch * tokens,)](
        x, inverse_rms, eps, D=dim, FRONT=launch.front, BACK=launch.back, num_warps=launch.num_warps
    )
    _keys_kernel[(heads, scale.shape[-1], batch)](
        x, inverse_rms, weight, cos, sin, centre, q, scale, tokens, heads,
        HEAD_DIM=dim // heads, KEYS=KEY_BLOCK, num_warps=4,
    )  # fmt: skip
    return q, scale


def _check(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int) -> None:
    check_rows(x, rotate=False)
    (_, tokens, dim), head_dim = x.shape, x.shape[-1] // heads
    assert heads * head_dim == dim and head_dim & (head_dim - 1) == 0, f"{dim} channels in {heads} heads"
    assert weight.shape == (dim,), f"weight {tuple(weight.shape)}"
    assert (cos is None) == (sin is None), "cos and sin come together"
    for table in (cos, sin):
        assert table is None or table.shape == (tokens, head_dim // 2), f"rotary table {tuple(table.shape)}"
        assert table is None or table.is_contiguous(), f"rotary table of strides {table.stride()}"
    check_float32(weight=weight, cos=cos, sin=sin)


def _empty(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:2], heads, x.shape[2] // heads), dtype=dtype)


def _empty_queries(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape
    q = x.new_empty((batch, heads, tokens, dim // heads), dtype=torch.int8)
    return q, x.new_empty((batch, heads, tokens), dtype=torch.float32)


def _empty_keys(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape
    q = x.new_empty((batch, heads, tokens, dim // heads), dtype=torch.int8)
    return q, x.new_empty((batch, heads, ceil_div(tokens, KEY_BLOCK)), dtype=torch.float32)


@torch.library.custom_op("wan_kernels::rms_rope", mutates_args=(), device_types="cuda")
def rms_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return x [B, L, H*K] normed and turned as [B, L, H, K] in `out_dtype`.

    weight float32 [H*K]; cos, sin float32 [L, K/2], or None for no turn; all contiguous, K a power of two.
    """
    with on_device_of(x):
        return rms_rope_triton(x, weight, cos, sin, heads, eps, out_dtype)


@rms_rope.register_kernel("cpu")
def _(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    out = _empty(x, heads, out_dtype)
    for span in in_spans(*x.shape[1:]):
        cos_here, sin_here = (cos[span], sin[span]) if cos is not None and sin is not None else (None, None)
        out[:, span] = rms_rope_reference(x[:, span], weight, cos_here, sin_here, heads, eps)
    return out


@rms_rope.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    return _empty(x, heads, out_dtype)


@torch.library.custom_op("wan_kernels::rms_rope_quantize", mutates_args=(), device_types="cuda")
def rms_rope_quantize(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the queries of `attention_int8`: int8 [B, H, L, K], scale float32 [B, H, L]; arguments of `rms_rope`."""
    with on_device_of(x):
        return rms_rope_quantize_triton(x, weight, cos, sin, heads, eps)


@rms_rope_quantize.register_kernel("cpu")
def _(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    q_BHLK = rms_rope_reference(x, weight, cos, sin, heads, eps).transpose(1, 2)
    return quantize_rows_reference(q_BHLK.contiguous(), rotate=False)


@rms_rope_quantize.register_fake
def _(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    return _empty_queries(x, heads)


@torch.library.custom_op("wan_kernels::rms_rope_quantize_keys", mutates_args=(), device_types="cuda")
def rms_rope_quantize_keys(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, centre: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the keys of `attention_int8`: int8 [B, H, L, K] and scale float32 [B, H, ceil(L/64)].

    centre: float32 [B, H, K], any vector near the keys' mean; the rest as in `rms_rope`.
    """
    with on_device_of(x):
        return rms_rope_quantize_keys_triton(x, weight, cos, sin, centre, eps)


@rms_rope_quantize_keys.register_kernel("cpu")
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, centre: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return quantize_keys_reference(rms_rope_reference(x, weight, cos, sin, centre.shape[1], eps), centre)


@rms_rope_quantize_keys.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, centre: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_keys(x, centre.shape[1])
