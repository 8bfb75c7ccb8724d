"""CLIP, vision half, from the transformers library: pixels to image embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_local.layers import adopt_linears
from wan_local.settings import ImageEncoderConfig

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def build_image_encoder(config: ImageEncoderConfig) -> CLIPVisionModel:
    """Return the module on the current default device (`meta` while loading)."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.hidden_act,
        )
    )
    adopt_linears(encoder)
    for module in encoder.modules():  # in no checkpoint, so it must not stay on `meta`
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.register_buffer("position_ids", torch.arange(config.tokens, device="cpu")[None], persistent=False)
    return encoder


def clip_pixels(image: Tensor, config: ImageEncoderConfig) -> Tensor:
    """Squash an image [3, H, W] in [-1, 1] to the encoder's square, as official: bicubic, no antialias, no crop.

    Returns [1, 3, S, S], normalised with CLIP's mean and standard deviation.
    Source: https://github.com/Wan-Video/Wan2.1 (wan/modules/clip.py, `CLIPModel.visual`).
    """
    side = config.image_size
    square = F.interpolate(image.float().unsqueeze(0), size=(side, side), mode="bicubic", align_corners=False)
    mean = square.new_tensor(_MEAN).view(1, 3, 1, 1)
    std = square.new_tensor(_STD).view(1, 3, 1, 1)
    return (square * 0.5 + 0.5 - mean) / std


def encode_pixels(image_encoder: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Return the tokens after every block but the last, without the final norm: [B, tokens, hidden_size] in float32."""
    output = image_encoder(pixel_values=pixels, output_hidden_states=True)
    hidden: Tensor = output.hidden_states[-2]
    return hidden.float()
