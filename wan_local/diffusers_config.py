"""The small files of a model's folder in diffusers' layout, from its configuration: what each part's class is told.

So a folder made of single files has them too, and diffusers and transformers open it as they open a downloaded one.
"""

from __future__ import annotations

import json
from typing import Any

from wan_local.settings import (
    ImageEncoderConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
)

_DIFFUSERS = "0.42.1"  # whose names these are
_PIPELINE = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": (None, None),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


def config_files(config: ModelConfig) -> dict[str, bytes]:
    """Return the content of each file by its path in the model's folder."""
    tables: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": "WanImageToVideoPipeline", "_diffusers_version": _DIFFUSERS, **_PIPELINE},
        "transformer/config.json": _transformer(config.transformer),
        "vae/config.json": _vae(config.vae),
        "text_encoder/config.json": _text_encoder(config.text_encoder),
        "image_encoder/config.json": _image_encoder(config.image_encoder),
        "image_processor/preprocessor_config.json": _image_processor(config.image_encoder),
        "scheduler/scheduler_config.json": _scheduler(),
    }
    return {path: (json.dumps(table, indent=2, sort_keys=True) + "\n").encode() for path, table in tables.items()}


def _transformer(config: TransformerConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": _DIFFUSERS,
        "added_kv_proj_dim": config.dim,
        "attention_head_dim": config.attention_head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": config.image_tokens,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def _vae(config: VaeConfig) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": _DIFFUSERS,
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def _text_encoder(config: TextEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def _image_encoder(config: ImageEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": 1e-5,
        "num_channels": 3,
    }


def _image_processor(config: ImageEncoderConfig) -> dict[str, Any]:
    side = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def _scheduler() -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": _DIFFUSERS,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 5.0,
        "solver_order": 2,
        "solver_type": "bh2",
    }
