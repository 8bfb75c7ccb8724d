"""The name and shape of every tensor of every part of a model, from its configuration. No torch, no files.

What a checkpoint must hold, no more and no less. Names are ours: diffusers' for transformer and VAE, transformers' for
the two encoders (`wan_local.key_map.canonical`).
"""

from __future__ import annotations

from collections.abc import Mapping

from wan_local.key_map import Part
from wan_local.settings import (
    ImageEncoderConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)

Shapes = dict[str, tuple[int, ...]]

_CONTEXT_LEAVES = ("to_k.", "to_v.", "norm_k.", "add_k_proj.", "add_v_proj.", "norm_added_k.")
_UMT5_BUCKETS = 32  # relative positions, in transformers' and the official code alike


def in_context(name: str) -> bool:
    """Tell whether parameter `name` of the transformer is needed before the denoising loop only.

    The keys and values of cross-attention and the embeddings of text, images and time depend on the request alone.
    """
    _, in_cross_attention, leaf = name.partition(".attn2.")
    return name.startswith("condition_embedder.") or (bool(in_cross_attention) and leaf.startswith(_CONTEXT_LEAVES))


def part_shapes(part: Part, config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor of `part`, by our name."""
    if part == "transformer":
        return transformer_shapes(config.transformer)
    if part == "vae":
        return vae_shapes(config.vae)
    if part == "text_encoder":
        return text_encoder_shapes(config.text_encoder)
    return image_encoder_shapes(config.image_encoder)


def transformer_shapes(config: TransformerConfig) -> Shapes:
    dim, image_dim = config.dim, config.image_dim
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    embedder = "condition_embedder"
    shapes: Shapes = {
        **_affine("patch_embedding", dim, config.in_channels, *config.patch_size),
        **_affine(f"{embedder}.text_embedder.linear_1", dim, config.text_dim),
        **_affine(f"{embedder}.text_embedder.linear_2", dim, dim),
        **_affine(f"{embedder}.time_embedder.linear_1", dim, config.freq_dim),
        **_affine(f"{embedder}.time_embedder.linear_2", dim, dim),
        **_affine(f"{embedder}.time_proj", 6 * dim, dim),
        **_affine(f"{embedder}.image_embedder.norm1", image_dim),
        **_affine(f"{embedder}.image_embedder.ff.net.0.proj", image_dim, image_dim),
        **_affine(f"{embedder}.image_embedder.ff.net.2", dim, image_dim),
        **_affine(f"{embedder}.image_embedder.norm2", dim),
        f"{embedder}.image_embedder.pos_embed": (1, config.image_tokens, image_dim),
        "scale_shift_table": (1, 2, dim),
        **_affine("proj_out", config.out_channels * patch, dim),
    }
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        shapes[f"{block}.scale_shift_table"] = (1, 6, dim)
        shapes |= _affine(f"{block}.norm2", dim)
        for attention in ("attn1", "attn2"):
            for linear in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= _affine(f"{block}.{attention}.{linear}", dim, dim)
            shapes |= {f"{block}.{attention}.{norm}.weight": (dim,) for norm in ("norm_q", "norm_k")}
        for linear in ("add_k_proj", "add_v_proj"):
            shapes |= _affine(f"{block}.attn2.{linear}", dim, dim)
        shapes[f"{block}.attn2.norm_added_k.weight"] = (dim,)
        shapes |= _affine(f"{block}.ffn.net.0.proj", config.ffn_dim, dim)
        shapes |= _affine(f"{block}.ffn.net.2", dim, config.ffn_dim)
    return shapes


def vae_shapes(config: VaeConfig) -> Shapes:
    latent, widest = config.z_dim, config.base_dim * config.dim_mult[-1]
    return {
        **_affine("quant_conv", 2 * latent, 2 * latent, 1, 1, 1),
        **_affine("post_quant_conv", latent, latent, 1, 1, 1),
        **_affine("encoder.conv_in", config.base_dim, 3, 3, 3, 3),
        **_down_blocks(config),
        **_middle_and_head("encoder", widest, widest, 2 * latent),
        **_affine("decoder.conv_in", widest, latent, 3, 3, 3),
        **_up_blocks(config),
        **_middle_and_head("decoder", widest, config.base_dim, 3),
    }


def text_encoder_shapes(config: TextEncoderConfig) -> Shapes:
    width, inner, wide = config.d_model, config.num_heads * config.d_kv, config.d_ff
    shapes: Shapes = {"shared.weight": (config.vocab_size, width), "encoder.final_layer_norm.weight": (width,)}
    for index in range(config.num_layers):
        attention = f"encoder.block.{index}.layer.0"
        feed_forward = f"encoder.block.{index}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{letter}.weight": (inner, width) for letter in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (_UMT5_BUCKETS, config.num_heads)
        shapes |= {f"{layer}.layer_norm.weight": (width,) for layer in (attention, feed_forward)}
        shapes |= {f"{feed_forward}.DenseReluDense.{name}.weight": (wide, width) for name in ("wi_0", "wi_1")}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, wide)
    return shapes


def image_encoder_shapes(config: ImageEncoderConfig) -> Shapes:
    width, patch = config.hidden_size, config.patch_size
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (config.tokens, width),
        **_affine("pre_layrnorm", width),
        **_affine("post_layernorm", width),
    }
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"{layer}.self_attn.{linear}", width, width)
        shapes |= _affine(f"{layer}.layer_norm1", width) | _affine(f"{layer}.layer_norm2", width)
        shapes |= _affine(f"{layer}.mlp.fc1", config.intermediate_size, width)
        shapes |= _affine(f"{layer}.mlp.fc2", width, config.intermediate_size)
    return shapes


def _affine(name: str, *shape: int) -> Shapes:
    """Return a weight of `shape` and its bias, which is as long as the first axis."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _residual(name: str, width_in: int, width_out: int) -> Shapes:
    shapes: Shapes = {f"{name}.norm1.gamma": (width_in, 1, 1, 1), f"{name}.norm2.gamma": (width_out, 1, 1, 1)}
    shapes |= _affine(f"{name}.conv1", width_out, width_in, 3, 3, 3)
    shapes |= _affine(f"{name}.conv2", width_out, width_out, 3, 3, 3)
    if width_in != width_out:
        shapes |= _affine(f"{name}.conv_shortcut", width_out, width_in, 1, 1, 1)
    return shapes


def _middle_and_head(half: str, width: int, last_width: int, channels_out: int) -> Shapes:
    attention = f"{half}.mid_block.attentions.0"
    return {
        **_residual(f"{half}.mid_block.resnets.0", width, width),
        **_residual(f"{half}.mid_block.resnets.1", width, width),
        f"{attention}.norm.gamma": (width, 1, 1),
        **_affine(f"{attention}.to_qkv", 3 * width, width, 1, 1),
        **_affine(f"{attention}.proj", width, width, 1, 1),
        f"{half}.norm_out.gamma": (last_width, 1, 1, 1),
        **_affine(f"{half}.conv_out", channels_out, last_width, 3, 3, 3),
    }


def _down_blocks(config: VaeConfig) -> Shapes:
    """Return the encoder's blocks, which are counted in one flat list, as diffusers and the official code do."""
    shapes: Shapes = {}
    width, flat = config.base_dim, 0
    for level, factor in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            shapes |= _residual(f"encoder.down_blocks.{flat}", width, config.base_dim * factor)
            width, flat = config.base_dim * factor, flat + 1
        if level < len(config.dim_mult) - 1:
            shapes |= _affine(f"encoder.down_blocks.{flat}.resample.1", width, width, 3, 3)
            if config.temporal_downsample[level]:
                shapes |= _affine(f"encoder.down_blocks.{flat}.time_conv", width, width, 3, 1, 1)
            flat += 1
    return shapes


def _up_blocks(config: VaeConfig) -> Shapes:
    """Return the decoder's blocks; an upsampler halves the width."""
    shapes: Shapes = {}
    width = config.base_dim * config.dim_mult[-1]
    temporal_upsample = config.temporal_downsample[::-1]
    for level, factor in enumerate(reversed(config.dim_mult)):
        block, wide = f"decoder.up_blocks.{level}", config.base_dim * factor
        for index in range(config.num_res_blocks + 1):
            shapes |= _residual(f"{block}.resnets.{index}", width, wide)
            width = wide
        if level < len(config.dim_mult) - 1:
            shapes |= _affine(f"{block}.upsamplers.0.resample.1", wide // 2, wide, 3, 3)
            if temporal_upsample[level]:
                shapes |= _affine(f"{block}.upsamplers.0.time_conv", 2 * wide, wide, 3, 1, 1)
            width = wide // 2
    return shapes
