"""Golden data of the official modules, and our networks loaded with the official weights that come with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wan_local.key_map import Part, convert_official
from wan_local.models.image_encoder import build_image_encoder
from wan_local.models.text_encoder import build_text_encoder
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context
from wan_local.models.vae import Vae
from wan_local.settings import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from wan_local.stage import load_strictly

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    return content


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def weights(name: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in tensors(name).items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|, the measure of `golden.json`."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} against {tuple(expected.shape)}"
    return float((got - expected).abs().max() / expected.abs().max())


def frames_tensor(image: Tensor) -> Tensor:
    """Return a uint8 image [H, W, 3] as [3, H, W] in [-1, 1]."""
    return image.permute(2, 0, 1).float() / 127.5 - 1.0


def _loaded(part: Part, module: nn.Module, official: dict[str, Tensor]) -> Any:
    load_strictly(module, part, convert_official(part, official), lambda _, tensor: tensor)
    return module.eval().requires_grad_(False)


def transformer_config(name: str) -> TransformerConfig:
    numbers = golden()["configs"][name]
    return TransformerConfig(
        num_layers=numbers["num_layers"],
        num_attention_heads=numbers["num_heads"],
        attention_head_dim=numbers["dim"] // numbers["num_heads"],
        ffn_dim=numbers["ffn_dim"],
        freq_dim=numbers["freq_dim"],
        text_dim=numbers["text_dim"],
        image_dim=numbers["image_dim"],
        image_tokens=numbers["image_pos_tokens"],
        text_tokens=numbers["text_len"],
        in_channels=numbers["in_dim"],
        out_channels=numbers["out_dim"],
        patch_size=tuple(numbers["patch_size"]),
        eps=numbers["eps"],
    )


def vae_config() -> VaeConfig:
    numbers = golden()["configs"]["vae"]
    return VaeConfig(
        base_dim=numbers["dim"],
        z_dim=numbers["z_dim"],
        dim_mult=tuple(numbers["dim_mult"]),
        num_res_blocks=numbers["num_res_blocks"],
        temporal_downsample=tuple(numbers["temperal_downsample"]),
        latents_mean=tuple(numbers["latent_mean"]),
        latents_std=tuple(numbers["latent_std"]),
    )


def text_encoder_config() -> TextEncoderConfig:
    numbers = golden()["configs"]["t5"]
    return TextEncoderConfig(
        vocab_size=numbers["vocab"],
        d_model=numbers["dim"],
        d_kv=numbers["dim_attn"] // numbers["num_heads"],
        d_ff=numbers["dim_ffn"],
        num_layers=numbers["num_layers"],
        num_heads=numbers["num_heads"],
    )


def image_encoder_config() -> ImageEncoderConfig:
    numbers = golden()["configs"]["clip"]
    return ImageEncoderConfig(
        hidden_size=numbers["vision_dim"],
        intermediate_size=numbers["vision_dim"] * numbers["vision_mlp_ratio"],
        num_hidden_layers=numbers["vision_layers"],
        num_attention_heads=numbers["vision_heads"],
        image_size=numbers["image_size"],
        patch_size=numbers["patch_size"],
        hidden_act=numbers["activation"],
    )


@dataclass(frozen=True)
class Denoiser:
    """The whole transformer: what runs once a prompt, and what runs at every step."""

    context_embedder: ContextEmbedder
    transformer: Transformer

    def __call__(self, latents: Tensor, timestep: int, text: Tensor, images: Tensor, **how: Any) -> Tensor:
        modulation = self.context_embedder.modulations(torch.tensor([timestep]))[timestep]
        [velocity] = self.transformer(latents, modulation, [self.context_embedder(text, images)], **how)
        assert isinstance(velocity, Tensor)
        return velocity


def _denoiser(config: TransformerConfig, official: dict[str, Tensor]) -> Denoiser:
    ours = convert_official("transformer", official)
    halves: list[Any] = []
    for module, wanted in ((ContextEmbedder(config), True), (Transformer(config), False)):
        half = {name: tensor for name, tensor in ours.items() if in_context(name) is wanted}
        load_strictly(module, "transformer", half, lambda _, tensor: tensor)
        halves.append(module.eval().requires_grad_(False))
    return Denoiser(*halves)


@cache
def official_transformer() -> Denoiser:
    return _denoiser(transformer_config("dit"), weights("dit_official"))


@cache
def official_transformer_1280() -> Denoiser:
    """The untouched official image width and token count; its largest tensors come from a formula."""
    table = golden()["dit1280"]["formula_tensors"]
    formula = {key: formula_tensor(row) for key, row in table.items() if row["where"] == "state dict"}
    state = {**weights("dit1280_official_partial"), **formula}
    return _denoiser(transformer_config("dit1280"), state)


@cache
def official_vae() -> Vae:
    module: Vae = _loaded("vae", Vae(vae_config()), weights("vae_official"))
    return module


@cache
def official_text_encoder() -> Any:
    return _loaded("text_encoder", build_text_encoder(text_encoder_config()), weights("t5_official"))


@cache
def official_image_encoder() -> Any:
    return _loaded("image_encoder", build_image_encoder(image_encoder_config()), weights("clip_official"))


def formula_tensor(row: dict[str, Any]) -> Tensor:
    """Make the tensor that `golden.json` describes by `dit1280.formula`; all arithmetic modulo 2**32."""
    x = np.arange(int(np.prod(row["shape"])), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(row["seed"])
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    values = (2.0 * ((x >> np.uint32(8)).astype(np.float64) / 2**24) - 1.0) * row["scale"]
    return torch.from_numpy(values.astype(np.float32)).reshape(row["shape"])
