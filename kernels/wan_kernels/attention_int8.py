"""attention_int8: softmax(q k^T / sqrt(K)) v with int8 logits, and values in fp16 or int8.

    s_ij = (q8_i . k8_j) * q_scale_i * k_scale_[j/64] / sqrt(K)
    fp16 values:  o_i = sum_j exp(s_ij - m_i) v_j / sum_j exp(s_ij - m_i)          v = v16 * v_scale
    int8 values:  each block of 64 keys has its own maximum m_ib; round(127 exp(s_ij - m_ib)) meets v8 in int32, and
                  block b weighs exp(m_ib - m_i) / 127                             v = v8 * v_scale + v_mean

After SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958), Apache-2.0; no code of theirs is used.
Any constant vector may be taken off all keys before they are quantized: softmax does not see it. fp16 sums run over one
block of 64 keys only, where they stay below 64 * 256 (see `values.py`); between blocks the sum is float32.

Shape legend: B batch, H heads, L queries, M keys, K channels of a head (32, 64 or 128).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wan_kernels.hardware import TileLaunch, tile_launch
from wan_kernels.language import ceil_div, check_float32, jit, launchable, on_device_of, tl

KEY_BLOCK = 64  # keys that share a scale
HEAD_DIMS = (32, 64, 128)  # what the kernel's tiles are made for
_REFERENCE_QUERIES = 512  # whose logits the reference holds at a time


def attention_int8_reference(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_mean: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return [B, L, H*K] in `dtype`, from the same numbers as the kernel; a block of queries at a time."""
    keys, softmax_scale = k.shape[2], 1 / math.sqrt(q.shape[-1])
    scale_of_key = k_scale.to(dtype).repeat_interleave(KEY_BLOCK, dim=-1)[..., :keys]
    k_BHMK = k.to(dtype) * scale_of_key.unsqueeze(-1)
    rows = []
    for q8, scale in zip(q.split(_REFERENCE_QUERIES, 2), q_scale.split(_REFERENCE_QUERIES, 2), strict=True):
        logits = (q8.to(dtype) * (scale.to(dtype) * softmax_scale).unsqueeze(-1)) @ k_BHMK.mT
        rows.append(_weighted(logits, v, keys, dtype))
    out_BHLK = torch.cat(rows, dim=2) * v_scale.to(dtype).unsqueeze(2)
    if v_mean is not None:
        out_BHLK = out_BHLK + v_mean.to(dtype).unsqueeze(2)
    return out_BHLK.transpose(1, 2).flatten(2)


def _weighted(logits: Tensor, v: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Return softmax(logits) v [B, H, L, K]; int8 values meet probabilities that are rounded block by block."""
    if v.dtype != torch.int8:
        return torch.softmax(logits, dim=-1) @ v.to(dtype).transpose(1, 2)
    probabilities = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    blocks = []
    for block in logits.split(KEY_BLOCK, dim=-1):
        own = block.amax(dim=-1, keepdim=True)
        weight = torch.exp(own - logits.amax(dim=-1, keepdim=True)) / 127
        blocks.append((torch.exp(block - own) * 127).round() * weight)
    return torch.cat(blocks, dim=-1) @ v[..., :keys].to(dtype).mT / probabilities.sum(dim=-1, keepdim=True)


@jit
def _absorb(  # type: ignore[no-untyped-def]
    acc, total, top, q, q_scale, k_ptr, k_scale_ptr, v_ptr, start, keys, v_row,
    HEAD_DIM: tl.constexpr, INT8_VALUES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take in 64 keys from `start` on: return the weighted sum of values, the sum of weights, the largest logit."""
    columns = start + tl.arange(0, 64)
    dims = tl.arange(0, HEAD_DIM)
    valid = columns < keys
    k_ptrs = k_ptr + columns[None, :].to(tl.int64) * HEAD_DIM + dims[:, None]
    if INT8_VALUES:
        v_ptrs = v_ptr + dims[None, :].to(tl.int64) * v_row + columns[:, None]
    else:
        v_ptrs = v_ptr + columns[:, None].to(tl.int64) * v_row + dims[None, :]
    if TAIL:
        k = tl.load(k_ptrs, mask=valid[None, :], other=0)
    else:
        k = tl.load(k_ptrs)
    logits = tl.dot(q, k).to(tl.float32)
    scale = q_scale * tl.load(k_scale_ptr + start // 64)
    if TAIL:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    highest = tl.max(logits, axis=1)
    largest = highest * scale
    new_top = tl.maximum(top, largest)
    alpha = tl.exp2(top - new_top)
    if INT8_VALUES:
        # Multiplied and added in one rounding, the largest logit less its rounded self is not 0 where logits are huge,
        # and a weight of 128 would be int8's -128. So weights are taken relative to the largest one.
        unit = tl.exp2(-tl.fma(highest, scale, -largest))
        p = tl.exp2(tl.fma(logits, scale[:, None], -largest[:, None]))
        beta = tl.exp2(largest - new_top)
        total = total * alpha + tl.sum(p, axis=1) * (unit * beta)
        p8 = (p * (unit * 127.0)[:, None] + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        v = tl.load(v_ptrs)  # its rows are padded with zeros to whole blocks
        acc = acc * alpha[:, None] + tl.dot(p8, v).to(tl.float32) * (beta * (1.0 / 127.0))[:, None]
    else:
        p = tl.exp2(logits * scale[:, None] - new_top[:, None])
        total = total * alpha + tl.sum(p, axis=1)
        if TAIL:
            v = tl.load(v_ptrs, mask=valid[:, None], other=0.0)
        else:
            v = tl.load(v_ptrs)
        acc = acc * alpha[:, None] + tl.dot(p.to(tl.float16), v, out_dtype=tl.float16).to(tl.float32)
    return acc, total, new_top


@jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [B, H, L, K] int8
    q_scale_ptr,  # [B, H, L] float32
    k_ptr,  # [B, H, M, K] int8
    k_scale_ptr,  # [B, H, ceil(M/64)] float32
    v_ptr,  # [B, M, H, K] float16, or [B, H, K, ceil(M/64)*64] int8
    v_scale_ptr,  # [B, H, K] float32
    v_mean_ptr,  # [B, H, K] float32, read with int8 values only
    out_ptr,  # [B, L, H, K] any float
    heads, queries, keys, v_row, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, INT8_VALUES: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    there = rows < queries
    q_rows = batch_head * queries + rows
    q = tl.load(q_ptr + q_rows[:, None] * HEAD_DIM + dims[None, :], mask=there[:, None], other=0)
    q_scale = tl.load(q_scale_ptr + q_rows, mask=there, other=1.0) * softmax_scale
    k_ptr += batch_head * keys * HEAD_DIM
    k_scale_ptr += batch_head * tl.cdiv(keys, 64)
    v_ptr += batch_head * HEAD_DIM * v_row if INT8_VALUES else batch * keys * v_row + head * HEAD_DIM
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = keys // 64 * 64
    for start in range(0, whole, 64):
        acc, total, top = _absorb(
            acc, total, top, q, q_scale, k_ptr, k_scale_ptr, v_ptr, start, keys, v_row,
            HEAD_DIM, INT8_VALUES, False,
        )  # fmt: skip
    if whole < keys:
        acc, total, top = _absorb(
            acc, total, top, q, q_scale, k_ptr, k_scale_ptr, v_ptr, whole, keys, v_row,
            HEAD_DIM, INT8_VALUES, True,
        )  # fmt: skip
    channels = batch_head * HEAD_DIM + dims
    out = acc / total[:, None] * tl.load(v_scale_ptr + channels)[None, :]
    if INT8_VALUES:
        out += tl.load(v_mean_ptr + channels)[None, :]
    out_rows = ((batch * queries + rows) * heads + head) * HEAD_DIM
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=there[:, None])


def attention_int8_triton(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_mean: Tensor | None,
    out_dtype: torch.dtype,
    launch: TileLaunch | None = None,
) -> Tensor:
    """Launch the kernel: one program for BLOCK_M queries of a head; programs of one head are neighbours.

    launch: what tuning tries; from the table unless given.
    """
    launchable("attention_int8")
    _check(q, q_scale, k, k_scale, v, v_scale, v_mean)
    batch, heads, queries, head_dim = q.shape
    out = _empty(q, out_dtype)
    launch = launch or tile_launch("attention_int8", "int8" if v.dtype == torch.int8 else "fp16", q.device)
    _attention_kernel[(ceil_div(queries, launch.block_m), batch * heads)](
        q, q_scale, k, k_scale, v, v_scale, v_scale if v_mean is None else v_mean, out,
        heads, queries, k.shape[2], v.shape[-1] if v.dtype == torch.int8 else heads * head_dim,
        1.4426950408889634 / math.sqrt(head_dim),  # exp(x) = exp2(x * log2(e))
        HEAD_DIM=head_dim, BLOCK_M=launch.block_m, INT8_VALUES=v.dtype == torch.int8,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out


def _check(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, v_mean: Tensor | None
) -> None:
    """Assert the layout that the kernel's pointers take for granted."""
    (batch, heads, _, head_dim), keys = q.shape, k.shape[2]
    padded = ceil_div(keys, KEY_BLOCK) * KEY_BLOCK
    wanted = {
        "q_scale": (q_scale, q.shape[:3]),
        "k": (k, (batch, heads, keys, head_dim)),
        "k_scale": (k_scale, (batch, heads, ceil_div(keys, KEY_BLOCK))),
        "v": (v, (batch, heads, head_dim, padded) if v.dtype == torch.int8 else (batch, keys, heads, head_dim)),
        "v_scale": (v_scale, (batch, heads, head_dim)),
    }
    if v_mean is not None:
        wanted["v_mean"] = (v_mean, (batch, heads, head_dim))
    for name, (tensor, shape) in {"q": (q, q.shape), **wanted}.items():
        assert tuple(tensor.shape) == tuple(shape), f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}"
        assert tensor.is_contiguous(), f"{name} is not contiguous: strides {tensor.stride()}"
    assert q.dtype == k.dtype == torch.int8, f"q is {q.dtype} and k {k.dtype}, not int8"
    assert v.dtype in (torch.int8, torch.float16), f"v is {v.dtype}, neither int8 nor float16"
    check_float32(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, v_mean=v_mean)
    assert head_dim in HEAD_DIMS, f"heads of {head_dim} channels; the kernel has tiles for {HEAD_DIMS}"
    assert (v_mean is not None) == (v.dtype == torch.int8), "int8 values come with their mean, fp16 values without"


def _empty(q: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads * head_dim), dtype=dtype)


@torch.library.custom_op("wan_kernels::attention_int8", mutates_args=(), device_types="cuda")
def attention_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_mean: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v as [B, L, H*K] in `out_dtype`.

    q [B, H, L, K] int8 with q_scale [B, H, L]; k [B, H, M, K] int8 with k_scale [B, H, ceil(M/64)]. v either float16
    [B, M, H, K] with v_scale [B, H, K], or int8 [B, H, K, ceil(M/64)*64], zero beyond M, with v_scale and v_mean.
    Scales and mean are float32. All contiguous.
    """
    with on_device_of(q):
        return attention_int8_triton(q, q_scale, k, k_scale, v, v_scale, v_mean, out_dtype)


@attention_int8.register_kernel("cpu")
def _(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_mean: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return attention_int8_reference(q, q_scale, k, k_scale, v, v_scale, v_mean).to(out_dtype).contiguous()


@attention_int8.register_fake
def _(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_mean: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return _empty(q, out_dtype)
