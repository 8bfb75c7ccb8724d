"""What the transformer and the encoders hold beside their weights, and what they compute, from shapes alone.

Held to the bytes that are counted while the real networks run on `meta` at full size by `tests/test_network_cost.py`.
Attention is taken for a fused kernel's, which keeps no scores. Integers, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from wan_local.geometry import PATCH, Geometry
from wan_local.settings import ModelConfig, TransformerConfig

BRANCHES = 2  # of guidance: with the prompt and with the negative one
HEADS_AT_A_TIME, KEYS_AT_A_TIME = 8, 4096  # that int8 attention of floats prepares; keys in whole blocks of 64
_FLOAT32_BYTES = 4
_INT8_VALUES = "int8_pv"
_INT8_KEYS = ("int8", _INT8_VALUES)
_SAGE = "sage"
_MARGIN = 1.02  # small buffers that are not counted one by one


@dataclass(frozen=True, slots=True)
class LoopKernels:
    """What the loop computes with, as far as its memory depends on it.

    fused: by the fused kernels, which hold no float32 of tokens x channels. int8_rows: between their linears rows are
    int8. attention: the backend. wide_residual: the hidden state is float32, whatever is computed in.
    """

    fused: bool = False
    int8_rows: bool = False
    attention: str = "sdpa"
    wide_residual: bool = False


PLAIN_LOOP = LoopKernels()


def loop_bytes(
    geometry: Geometry,
    config: ModelConfig,
    chunk: int,
    compute: int,
    *,
    together: bool,
    in_linear: int = 0,
    kernels: LoopKernels = PLAIN_LOOP,
) -> int:
    """Return hidden state, whole keys and values, one chunk's temporaries, rotary table and latents.

    together: both branches of guidance go block by block. in_linear: what a quantized linear takes while it runs.
    """
    transformer, tokens = config.transformer, geometry.tokens
    numbers = tokens * transformer.dim
    hidden = (BRANCHES if together else 1) * numbers * (_FLOAT32_BYTES if kernels.wide_residual else compute)
    rotary = tokens * transformer.attention_head_dim * _FLOAT32_BYTES
    latents = 4 * tokens * transformer.in_channels * PATCH * PATCH * _FLOAT32_BYTES
    if kernels.fused:
        return hidden + _fused(transformer, numbers, chunk, compute, kernels, in_linear) + rotary + latents
    turning, feeding = token_bytes(transformer, compute)
    linear = feeding - transformer.ffn_dim * compute  # while one runs, the middle is there once: its input or output
    working = max(chunk * turning, chunk * feeding, chunk * linear + in_linear)
    if kernels.attention in _INT8_KEYS:
        working = max(working, _attending(transformer, tokens, chunk, compute, kernels))
    if kernels.attention == _SAGE:
        working = max(
            working, chunk * transformer.dim * (2 * _FLOAT32_BYTES + 3 * compute) + _copied_by_sage(numbers, compute)
        )
    return hidden + 2 * numbers * compute + working + rotary + latents


def _fused(
    transformer: TransformerConfig, numbers: int, chunk: int, compute: int, kernels: LoopKernels, in_linear: int
) -> int:
    """Return whole keys and values and the most that a chunk holds, or what turning the values into int8 does."""
    dim, wide = transformer.dim, transformer.ffn_dim
    if kernels.int8_rows:
        working = chunk * (wide * (compute + 1) + dim)
    else:
        working = max(chunk * compute * 2 * (wide + dim), chunk * compute * (wide + 2 * dim) + in_linear)
    if kernels.attention == _SAGE:
        working = max(working, chunk * dim * 2 * compute + _copied_by_sage(numbers, compute))
    keys = 1 if kernels.attention in _INT8_KEYS else compute
    values = 1 if kernels.attention == _INT8_VALUES else compute
    made = max(working, numbers * compute) if kernels.attention == _INT8_VALUES else working
    return numbers * (keys + values) + made


def _attending(transformer: TransformerConfig, tokens: int, chunk: int, compute: int, kernels: LoopKernels) -> int:
    """Return what int8 attention of floats holds: a chunk's queries and output, and some heads' keys and values."""
    channels = min(HEADS_AT_A_TIME, transformer.num_attention_heads) * transformer.attention_head_dim
    made = channels * (tokens + 4 * min(tokens, KEYS_AT_A_TIME) * _FLOAT32_BYTES)
    held = channels * tokens * (1 + compute + (1 if kernels.attention == _INT8_VALUES else 0))
    return chunk * transformer.dim * (2 * _FLOAT32_BYTES + 3 * compute) + max(made, held)


def _copied_by_sage(numbers: int, compute: int) -> int:
    """Return what SageAttention makes of keys and values for each chunk, on the cards where that is most (sm_86).

    All keys less their mean and as int8, and all values as float16: see `per_block_int8` and
    `sageattn_qk_int8_pv_fp16_triton` in its source. With float8 values it is a fifth less.
    """
    return numbers * (2 * compute + 1)


def token_bytes(transformer: TransformerConfig, compute: int) -> tuple[int, int]:
    """Return what a token in flight takes: while q is turned in float32, and in the middle of the feed-forward."""
    turning = transformer.dim * (4 * _FLOAT32_BYTES + 4 * compute)
    feeding = transformer.dim * (2 * _FLOAT32_BYTES + compute) + 2 * transformer.ffn_dim * compute
    return turning, feeding


def contexts_bytes(config: ModelConfig, compute: int) -> int:
    """Return the bytes of keys and values of every block: of both prompts, and once of the images."""
    transformer = config.transformer
    tokens = BRANCHES * transformer.text_tokens + transformer.image_tokens
    return 2 * transformer.num_layers * tokens * transformer.dim * compute


def parked_bytes(config: ModelConfig, compute: int, slots: int) -> int:
    """Return what stays of them on the device where they wait in RAM: `slots` blocks' for each branch."""
    transformer = config.transformer
    tokens = BRANCHES * (transformer.text_tokens + transformer.image_tokens)
    return 2 * slots * tokens * transformer.dim * compute


def context_stage_bytes(config: ModelConfig, compute: int, *, parked: bool) -> int:
    """Return what making the keys and values holds: them, unless they go to RAM, and the tokens they are made of."""
    transformer = config.transformer
    tokens = BRANCHES * transformer.text_tokens + transformer.image_tokens
    embedded = tokens * transformer.dim * compute
    turning = transformer.image_tokens * transformer.dim * (2 * _FLOAT32_BYTES + 3 * compute)
    made = contexts_bytes(config, compute) // (transformer.num_layers if parked else 1)
    return int(_MARGIN * (made + embedded + turning))


def text_bytes(config: ModelConfig, compute: int, *, in_linear: int = 0) -> int:
    """Return what a prompt of full length holds in the text encoder.

    in_linear: what a quantized linear takes while it runs, when no scores are there.
    """
    encoder, tokens = config.text_encoder, config.transformer.text_tokens
    scores = encoder.num_heads * tokens * tokens * 12
    return tokens * compute * (8 * encoder.d_model + 3 * encoder.d_ff) + max(scores, in_linear)


def image_bytes(config: ModelConfig, compute: int) -> int:
    """Return what both images hold in the image encoder: every hidden state, one block's temporaries and its scores."""
    encoder = config.image_encoder
    kept = (encoder.num_hidden_layers + 8) * encoder.hidden_size
    scores = 2 * encoder.num_attention_heads * encoder.tokens
    norms = 10 * encoder.hidden_size
    return 2 * encoder.tokens * (kept * compute + (scores + norms) * _FLOAT32_BYTES)
