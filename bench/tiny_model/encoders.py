"""The frozen parts: a BPE tokenizer, and a random UMT5 encoder and CLIP vision tower of the 14B model's classes.

They are random functions that keep what matters apart (words, image patches); the transformer learns to read them.
"""

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from bench.tiny_model.photos import held_out_photos, training_photos
from bench.tiny_model.scenes import caption, sample_scene
from bench.tiny_model.sentences import corpus

TEXT_DIM = 64
IMAGE_DIM = 64
IMAGE_SIZE = 32
IMAGE_TOKENS = 17
VOCABULARY = 1024
MAX_TOKENS = 512
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SEED = 7


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer: lower case, BPE, T5's special tokens (pad 0, end 1, unknown 2), end token appended."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    alphabet = list(string.ascii_lowercase + string.digits + string.punctuation)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    photos = training_photos() + held_out_photos()
    captions = [caption(sample_scene(seed, photos, 1.75)) for seed in range(3000)]
    tokenizer.train_from_iterator(corpus(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder() -> UMT5EncoderModel:
    """Return the random text encoder, rounded to the fp16 values that the folder stores."""
    torch.manual_seed(SEED)
    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config).half().float().eval().requires_grad_(False)


def build_image_encoder() -> CLIPVisionModel:
    """Return the random image encoder, rounded to the fp16 values that the folder stores."""
    torch.manual_seed(SEED + 1)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return CLIPVisionModel(config).half().float().eval().requires_grad_(False)


def build_image_processor() -> CLIPImageProcessor:
    """Return the preprocessing settings for stock pipelines; `encode_images` squashes instead of cropping."""
    return CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        resample=3,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )


@dataclass(frozen=True)
class Encoders:
    """Tokenizer and both encoders."""

    tokenizer: PreTrainedTokenizerFast
    text: UMT5EncoderModel
    image: CLIPVisionModel

    @torch.no_grad()
    def encode_texts(self, prompts: list[str]) -> list[Tensor]:
        """Return one [length, 64] tensor a prompt, its padding left out."""
        batch = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=MAX_TOKENS, add_special_tokens=True, return_tensors="pt"
        )
        states = self.text(batch.input_ids, batch.attention_mask).last_hidden_state
        lengths = batch.attention_mask.sum(1).tolist()
        return [state[:length] for state, length in zip(states, lengths, strict=True)]

    @torch.no_grad()
    def encode_images(self, frames_BCHW: Tensor) -> Tensor:
        """Return the penultimate hidden state [B, 17, 64] for frames in [-1, 1]."""
        small = F.interpolate(quantize(frames_BCHW), (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
        mean, std = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), torch.tensor(CLIP_STD).view(1, 3, 1, 1)
        pixels = (small * 0.5 + 0.5 - mean) / std
        return self.image(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


def quantize(x: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to the 256 values that an image file has."""
    return (x * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1


def build_encoders(tokenizer_folder: Path) -> Encoders:
    """Return the frozen parts, with the tokenizer trained once and kept in `tokenizer_folder`."""
    if not (tokenizer_folder / "tokenizer.json").exists():
        build_tokenizer().save_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    return Encoders(tokenizer, build_text_encoder(), build_image_encoder())


def load_encoders(folder: Path) -> Encoders:
    """Return the frozen parts of a finished model folder."""
    return Encoders(
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval().requires_grad_(False),
        CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval().requires_grad_(False),
    )


def noisy_caption(text: str, rng: np.random.Generator, sentence: str) -> str:
    """Return the caption with an unrelated sentence before or after it."""
    return f"{sentence} {text}." if rng.random() < 0.5 else f"{text}. {sentence}"
