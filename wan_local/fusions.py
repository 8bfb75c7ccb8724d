"""A block's linears and what lies between them, by the fused kernels: rows stay int8 from one linear to the next.

Each function takes the modules of the plain path, so both compute with the same weights. A linear takes int8 rows where
its arithmetic is "w8a8" and its weights are int8, or int4, which is decoded to int8 for the call.

Shape legend: B batch (1: rows of a chunk are contiguous), L tokens, D channels, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import wan_kernels as kernels
from wan_local.layers import LayerNorm, Linear, RMSNorm, Rotary


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows as int8 [B, L, D] with a scale each, float32 [B, L]; of x R where `rotated` (see `quantize_rows`)."""

    q: Tensor
    scale: Tensor
    rotated: bool


Rows = Tensor | Int8Rows


@dataclass(frozen=True, slots=True)
class Update:
    """What a linear gave and is still to be added to the residual: y * gate; a gate of None counts as 1."""

    y: Tensor
    gate: Tensor | None


@dataclass(frozen=True, slots=True)
class Affine:
    """Factor and offset after a norm, float32 [B, D]; `modulates`: the factor is what is added to 1."""

    scale: Tensor
    shift: Tensor
    modulates: bool


def affine_of(norm: LayerNorm) -> Affine:
    """Return a norm's own weight and bias."""
    assert norm.weight is not None and norm.bias is not None, "the norm has no weights"
    return Affine(norm.weight.unsqueeze(0), norm.bias.unsqueeze(0), modulates=False)


def takes_int8(linear: Linear) -> bool:
    """Tell whether a linear's weights are to meet int8 rows; a LoRA's side branch wants floats."""
    return linear.arithmetic == "w8a8" and linear.weight.dtype in (torch.int8, torch.uint8) and not linear.branched


def norm_rows(x_BLD: Tensor, update: Update | None, norm: LayerNorm, affine: Affine, into: Sequence[Linear]) -> Rows:
    """Add `update` to x in place; return its norm as the linears `into` take it: int8 if all of them do."""
    y, gate = (None, None) if update is None else (update.y, update.gate)
    operands = (x_BLD, y, gate, affine.scale, affine.shift, not affine.modulates, norm.eps)
    rotated = into[0].rotated
    if all(takes_int8(linear) and linear.rotated == rotated for linear in into):
        q, scale = kernels.gate_norm_modulate_quantize_(*operands, rotated)
        return Int8Rows(q, scale, rotated)
    n_BLD: Tensor = kernels.gate_norm_modulate_(*operands, into[0].compute_dtype)
    return n_BLD


def project(linear: Linear, rows: Rows) -> Tensor:
    """Return x W^T + bias in the linear's compute dtype."""
    out: Tensor
    if isinstance(rows, Tensor):
        out = linear(rows)
    else:
        weight, scale = _int8_weight(linear)
        out = kernels.linear_int8(rows.q, rows.scale, weight, scale, linear.bias, False, linear.compute_dtype)
    return out


def _int8_weight(linear: Linear) -> tuple[Tensor, Tensor]:
    """Return the weight as int8 [N, K] with its scales [N]; int4 is decoded into memory that lasts for the call."""
    assert linear.weight_scale is not None, "the linear is not quantized"
    if linear.weight.dtype == torch.int8:
        return linear.weight, linear.weight_scale
    assert linear.weight_shift is not None, "int4 weights come with a shift"
    rows, half = linear.weight.shape
    weight = linear.weight.new_empty((rows, 2 * half), dtype=torch.int8)
    return weight, kernels.decode_int4_(linear.weight, linear.weight_scale, linear.weight_shift, weight)


def project_onto(linear: Linear, y_BLD: Tensor | Int8Rows, x_BLD: Tensor, gate: Tensor | None) -> Update | None:
    """Add the linear of y, times a gate [B, D], to the residual x in place; or return what is still to be added.

    An int8 linear adds in its last step. Another's output is added by the norm that reads the residual next.
    """
    if not takes_int8(linear):
        assert isinstance(y_BLD, Tensor), "the linear takes floats"
        return Update(linear(y_BLD), gate)
    if isinstance(y_BLD, Tensor):
        q, q_scale = kernels.quantize_rows(y_BLD, linear.rotated)
        y_BLD = Int8Rows(q, q_scale, linear.rotated)
    weight, scale = _int8_weight(linear)
    kernels.linear_int8_residual_(y_BLD.q, y_BLD.scale, weight, scale, linear.bias, x_BLD, gate)
    return None


def add(x_BLD: Tensor, update: Update | None) -> None:
    """Add what is left to add, where no norm follows; the sum is computed in float32 on the way."""
    if update is None:
        return
    if update.gate is None:
        x_BLD.add_(update.y)
    else:
        x_BLD.addcmul_(update.y, update.gate.unsqueeze(1))


def gelu_rows(h_BLD: Tensor, into: Linear) -> Rows:
    """Return tanh-GELU of h as the linear `into` takes it."""
    if takes_int8(into):
        q, scale = kernels.gelu_quantize(h_BLD, into.rotated)
        return Int8Rows(q, scale, into.rotated)
    return F.gelu(h_BLD, approximate="tanh")


def turned(x_BLD: Tensor, norm: RMSNorm, rotary: Rotary | None, heads: int) -> Tensor:
    """Return the norm of all heads together, turned, as [B, L, H, K] in the dtype of x."""
    cos, sin = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    out_BLHK: Tensor = kernels.rms_rope(x_BLD, norm.weight, cos, sin, heads, norm.eps, x_BLD.dtype)
    return out_BLHK


def int8_queries(x_BLD: Tensor, norm: RMSNorm, rotary: Rotary, heads: int) -> tuple[Tensor, Tensor]:
    """Return normed and turned queries as int8 [B, H, L, K], with scales [B, H, L]."""
    q, scale = kernels.rms_rope_quantize(x_BLD, norm.weight, rotary.cos, rotary.sin, heads, norm.eps)
    return q, scale


def int8_keys(x_BLD: Tensor, norm: RMSNorm, rotary: Rotary, centre_BHK: Tensor) -> tuple[Tensor, Tensor]:
    """Return normed and turned keys less `centre` as int8 [B, H, L, K], with scales [B, H, ceil(L/64)]."""
    k, scale = kernels.rms_rope_quantize_keys(x_BLD, norm.weight, rotary.cos, rotary.sin, centre_BHK, norm.eps)
    return k, scale
