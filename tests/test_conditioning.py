from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image

from wan_local.conditioning import clean_prompt, frame_mask, initial_noise, load_tokenizer, picture_tensor, tokenize

TOKENIZER = Path(str(resources.files("wan_local"))) / "tiny_model" / "tokenizer"


@pytest.mark.parametrize("frames", [81, 85, 89, 93, 97, 101])
def test_mask_follows_the_real_frame_count(frames: int) -> None:
    latent_frames = (frames - 1) // 4 + 1
    mask = frame_mask(frames, torch.zeros(1, 16, latent_frames, 2, 3))
    assert mask.shape == (1, 4, latent_frames, 2, 3)
    assert (mask[:, :, 0] == 1).all()
    assert mask[0, :, -1, 0, 0].tolist() == [0, 0, 0, 1]
    assert not mask[:, :, 1:-1].any()


def test_noise_is_the_same_on_every_machine_for_a_seed_and_another_for_another() -> None:
    noise = initial_noise(42, (16, 3, 4, 6))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert noise.flatten()[:3].tolist() == pytest.approx([1.9269, 1.4873, 0.9007], abs=1e-4)
    assert torch.equal(noise, initial_noise(42, (16, 3, 4, 6)))
    assert not torch.equal(noise, initial_noise(43, (16, 3, 4, 6)))


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63)])
def test_every_seed_of_the_schema_makes_noise(seed: int) -> None:
    assert torch.isfinite(initial_noise(seed, (1, 1, 2, 2))).all()


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [("a\0b", "ab"), ("a\ud800b", "ab"), ("", ""), ("  a \n b ", "a b"), ("&amp;amp;", "&"), ("مرحبا", "مرحبا")],
)
def test_prompts_no_tokenizer_can_take_are_cleaned(given: str, cleaned: str) -> None:
    assert clean_prompt(given) == cleaned


def test_a_long_prompt_is_cut_at_the_limit_with_its_end_mark_and_the_cut_is_counted() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    whole = tokenize(tokenizer, "red square moving " * 300, limit=10_000)
    tokens = tokenize(tokenizer, "red square moving " * 300, limit=512)
    assert tokens.input_ids.shape == (1, 512)
    assert tokens.cut == whole.input_ids.shape[1] - 512 > 0
    assert tokens.input_ids[0, -1] == whole.input_ids[0, -1] == tokenizer.eos_token_id


def test_an_empty_prompt_is_its_end_mark() -> None:
    assert tokenize(load_tokenizer(TOKENIZER), "", limit=512).input_ids.tolist() == [[1]]


def test_pictures_span_minus_one_to_one() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 51))
    tensor = picture_tensor(image)
    assert tensor.shape == (3, 2, 4)
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, -0.6])
