"""A transformer block by the fused kernels: the plain path's modules and weights, no float32 of tokens x channels.

    norm, modulate, quantize -> q, k, v -> rms, rotary, quantize -> attention -> output with gated residual
    -> norm, quantize -> q -> rms -> attention over the context -> output with residual
    -> norm, modulate, quantize -> up -> GELU, quantize -> down with gated residual

`TransformerBlock.forward` is the truth that this is held to. Keys and values are whole, all else is done for
`chunk_tokens` tokens at a time, and the residual is updated in place.

Shape legend: B batch, which is 1 here, L tokens, D channels of a token, N heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import wan_local.fusions as fused
from wan_local.attention import OURS, KernelChoice, attend_int8, sdpa
from wan_local.fusions import Affine, Rows
from wan_local.layers import Rotary, split_heads

_KEYS_LOOKED_AT = 1024  # for the vector that is taken off all keys: softmax does not see it, int8 does
_KEY_BLOCK = 64  # keys that share a scale: chunks are whole blocks


def advance(
    block: Any,
    hidden_BLD: Tensor,
    projection_B6D: Tensor,
    context: Any,
    rotary: Rotary,
    *,
    chunk_tokens: int,
    choice: KernelChoice,
) -> None:
    """Advance `hidden_BLD` [1, L, D] in place by a `TransformerBlock`, given the `ContextKV` of its cross-attention.

    projection_B6D: of the modulation. chunk_tokens: worked on at a time, rounded down to whole blocks of 64.
    """
    assert hidden_BLD.shape[0] == 1 and hidden_BLD.is_contiguous(), "chunks of a batch are not contiguous"
    parts = [part.contiguous() for part in (block.scale_shift_table + projection_B6D).unbind(1)]
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = parts
    first, last = Affine(scale_a, shift_a, modulates=True), Affine(scale_f, shift_f, modulates=True)
    keys = _keys_and_values(block, hidden_BLD, first, rotary, chunk_tokens=chunk_tokens, choice=choice)
    own, cross, (up, _, down) = block.attn1, block.attn2, block.ffn.net
    for span in _spans(hidden_BLD.shape[1], chunk_tokens):
        x = hidden_BLD[:, span]
        rows = fused.norm_rows(x, None, block.norm1, first, [own.to_q])
        update = fused.project_onto(own.to_out[0], keys.attended(own, rows, rotary.tokens(span)), x, gate_a)
        rows = fused.norm_rows(x, update, block.norm2, fused.affine_of(block.norm2), [cross.to_q])
        update = fused.project_onto(cross.to_out[0], _over_context(cross, rows, context), x, None)
        rows = fused.norm_rows(x, update, block.norm3, last, [up.proj])
        fused.add(x, fused.project_onto(down, fused.gelu_rows(fused.project(up.proj, rows), down), x, gate_f))


def _spans(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    step = max(_KEY_BLOCK, chunk_tokens // _KEY_BLOCK * _KEY_BLOCK)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _over_context(attention: Any, rows: Rows, context: Any) -> Tensor:
    """Return the attention over text and over images, summed; exact, since it is 1 % of the work."""
    q = fused.turned(fused.project(attention.to_q, rows), attention.norm_q, None, attention.num_heads)
    out = sdpa(q, context.k, context.v, bias_M=context.text_bias)
    return out.add_(sdpa(q, context.k_image, context.v_image))


@dataclass(frozen=True, slots=True)
class _FloatKeys:
    """Whole keys and values, both [1, L, N, K] in the compute dtype, for a backend that takes floats."""

    choice: KernelChoice
    k: Tensor
    v: Tensor

    def attended(self, attention: Any, rows: Rows, rotary: Rotary) -> Tensor:
        """Return what the queries of `rows` see, [1, rows, D]."""
        q = fused.turned(fused.project(attention.to_q, rows), attention.norm_q, rotary, attention.num_heads)
        return self.choice.function(q, self.k, self.v).contiguous()


@dataclass(frozen=True, slots=True)
class _Int8Keys:
    """Whole keys int8 [1, N, L, K] with scales [1, N, ceil(L/64)], and values as `attend_int8` takes them."""

    k: Tensor
    k_scale: Tensor
    values: tuple[Tensor, Tensor, Tensor | None]

    def attended(self, attention: Any, rows: Rows, rotary: Rotary) -> Tensor:
        """Return what the queries of `rows` see, [1, rows, D]."""
        x = fused.project(attention.to_q, rows)
        q, q_scale = fused.int8_queries(x, attention.norm_q, rotary, attention.num_heads)
        return attend_int8(q, q_scale, self.k, self.k_scale, self.values, x.dtype)


def _keys_and_values(
    block: Any, hidden_BLD: Tensor, affine: Affine, rotary: Rotary, *, chunk_tokens: int, choice: KernelChoice
) -> _FloatKeys | _Int8Keys:
    """Return the keys and values of all tokens."""
    attention, (_, tokens, dim) = block.attn1, hidden_BLD.shape
    heads, compute = attention.num_heads, attention.to_q.compute_dtype
    v = hidden_BLD.new_empty((1, tokens, dim), dtype=compute)
    in_int8 = choice.attention in OURS
    if in_int8:
        centre = _centre(block, hidden_BLD, affine, rotary)
        k = v.new_empty((1, heads, tokens, dim // heads), dtype=torch.int8)
        k_scale = v.new_empty((1, heads, -(-tokens // _KEY_BLOCK)), dtype=torch.float32)
    else:
        k = torch.empty_like(v).view(1, tokens, heads, -1)
    for span in _spans(tokens, chunk_tokens):
        rows = fused.norm_rows(hidden_BLD[:, span], None, block.norm1, affine, [attention.to_k, attention.to_v])
        x = fused.project(attention.to_k, rows)
        if in_int8:
            blocks = slice(span.start // _KEY_BLOCK, -(-span.stop // _KEY_BLOCK))
            turned = fused.int8_keys(x, attention.norm_k, rotary.tokens(span), centre)
            k[:, :, span], k_scale[:, :, blocks] = turned
        else:
            k[:, span] = fused.turned(x, attention.norm_k, rotary.tokens(span), heads)
        v[:, span] = fused.project(attention.to_v, rows)
    v = split_heads(v, heads)
    return _Int8Keys(k, k_scale, choice.values(v)) if in_int8 else _FloatKeys(choice, k, v)


def _centre(block: Any, hidden_BLD: Tensor, affine: Affine, rotary: Rotary) -> Tensor:
    """Return the mean key [1, N, K] of tokens spread evenly; it depends on no chunk, so nor does the result."""
    attention, tokens = block.attn1, hidden_BLD.shape[1]
    some = torch.arange(0, tokens, -(-tokens // _KEYS_LOOKED_AT), device=hidden_BLD.device)
    rows = fused.norm_rows(hidden_BLD[:, some], None, block.norm1, affine, [attention.to_k])
    x = fused.project(attention.to_k, rows)
    k_BLNK = fused.turned(x, attention.norm_k, Rotary(rotary.cos[some], rotary.sin[some]), attention.num_heads)
    return k_BLNK.mean(dim=1, dtype=torch.float32)
