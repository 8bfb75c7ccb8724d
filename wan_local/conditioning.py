"""What the denoiser is told: prompt embeddings, image embeddings, and the condition made of both frames and a mask.

Shape legend: B batch, C channels, T latent frames, H W latent rows and columns.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan_local.errors import CorruptModel
from wan_local.geometry import TEMPORAL_STRIDE
from wan_local.models.image_encoder import clip_pixels, encode_pixels
from wan_local.models.text_encoder import encode_tokens
from wan_local.models.vae import Vae
from wan_local.request import Check, unchecked
from wan_local.settings import ImageEncoderConfig
from wan_local.tiling import WHOLE, Tiling
from wan_local.tokenizer_file import GET_TOKENIZER

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as token ids [1, L]; `cut` counts the tokens that did not fit."""

    input_ids: Tensor
    cut: int


def clean_prompt(text: str) -> str:
    """Return the prompt as the official code cleans it: mend encodings, unescape HTML twice, fold white space.

    Characters that no tokenizer can take (NUL, lone surrogates) are left out.
    """
    import ftfy

    text = text.encode("utf-8", "ignore").decode("utf-8").replace("\0", "")
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the model's own folder; nothing is ever fetched. Raises CorruptModel if it is damaged."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise CorruptModel(
            f"the tokenizer in {str(folder)!r} can't be loaded: {type(error).__name__}: {error}. {GET_TOKENIZER}"
        ) from error
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, *, limit: int) -> Tokens:
    """Return the cleaned prompt's tokens, at most `limit` of them with the end mark as the last."""
    ids: list[int] = tokenizer(clean_prompt(prompt), add_special_tokens=True)["input_ids"]
    cut = max(len(ids) - limit, 0)
    if cut:
        ids = [*ids[: limit - 1], ids[-1]]
    return Tokens(torch.tensor([ids]), cut)


def embed_prompt(text_encoder: UMT5EncoderModel, tokens: Tokens, *, length: int) -> Tensor:
    """Return prompt_embeds [1, length, text_dim] in float32, zero beyond the prompt's true length.

    Only the true tokens go through the encoder: with padding masked, the result is the same.
    """
    device = text_encoder.encoder.final_layer_norm.weight.device
    input_ids = tokens.input_ids.to(device)
    hidden = encode_tokens(text_encoder, input_ids, torch.ones_like(input_ids))
    padded = hidden.new_zeros((1, length, hidden.shape[2]))
    padded[:, : hidden.shape[1]] = hidden
    return padded


def embed_images(image_encoder: CLIPVisionModel, images: tuple[Tensor, Tensor], config: ImageEncoderConfig) -> Tensor:
    """Return image_embeds [1, 2 * tokens, image_dim] in float32: the start image's tokens and then the end image's.

    images: each [3, H, W] in [-1, 1].
    """
    parameter = next(image_encoder.parameters())
    pixels = torch.cat([clip_pixels(image, config) for image in images])
    return encode_pixels(image_encoder, pixels.to(parameter.device, parameter.dtype)).flatten(0, 1).unsqueeze(0)


def picture_tensor(image: Image) -> Tensor:
    """Return an RGB picture as float32 [3, H, W] in [-1, 1]."""
    assert image.mode == "RGB", image.mode
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1.0


def encode_condition(
    vae: Vae,
    images: tuple[Tensor, Tensor],
    generated_frames: int,
    *,
    tiling: Tiling = WHOLE,
    check: Check = unchecked,
) -> Tensor:
    """Return the condition [1, 4 + z_dim, T, H, W]: the mask, then the latents of [start, zeros ..., end].

    images: each [3, height, width] in [-1, 1]. Zero is mid-grey. Source: wan/first_last_frame2video.py of Wan2.1.
    tiling: of the VAE. check: called before each chunk of each tile.
    """
    chunks = _condition_clip(images, generated_frames, vae.device)
    latents = vae.encode(chunks, tiling, check=check)
    return torch.cat((frame_mask(generated_frames, latents), latents), dim=1)


def _condition_clip(images: tuple[Tensor, Tensor], generated_frames: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the clip in the VAE's chunks: the start image alone, then four frames at a time, the end image last."""
    start, end = (image.to(device).unsqueeze(0).unsqueeze(2) for image in images)
    yield start
    blank = torch.zeros_like(start).expand(-1, -1, TEMPORAL_STRIDE, -1, -1)
    chunks = (generated_frames - 1) // TEMPORAL_STRIDE
    for _ in range(chunks - 1):
        yield blank
    yield torch.cat((blank[:, :, 1:], end), dim=2)


def frame_mask(generated_frames: int, like: Tensor) -> Tensor:
    """Return the mask [1, 4, T, H, W] for latents `like`: 1 where a pixel frame is given, four frames in four channels.

    The first pixel frame stands for a whole group of four, so latent frame 0 is all ones; the last is one only in
    channel 3.
    """
    frames = torch.zeros(generated_frames)
    frames[0] = frames[-1] = 1.0
    groups = torch.cat((frames[:1].repeat(TEMPORAL_STRIDE), frames[1:])).view(-1, TEMPORAL_STRIDE)
    mask = groups.T.view(1, TEMPORAL_STRIDE, -1, 1, 1)
    assert mask.shape[2] == like.shape[2], f"{generated_frames} frames do not make {like.shape[2]} latent frames"
    return mask.expand(-1, -1, -1, *like.shape[-2:]).to(like)


def initial_noise(seed: int, latent_shape: tuple[int, int, int, int]) -> Tensor:
    """Return noise [1, C, T, H, W] in float32 from a CPU generator: a seed is the same noise on every machine."""
    assert -(2**63) <= seed <= _MAX_SEED, seed
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(latent_shape, generator=generator, dtype=torch.float32).unsqueeze(0)
