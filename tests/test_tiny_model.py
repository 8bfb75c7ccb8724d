"""The embedded model is a model: on unseen clips of a moving shape it beats a cross-fade, and it keeps both images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.tiny_model.photos import held_out_photos
from bench.tiny_model.pools import Prompts
from bench.tiny_model.render import clip
from bench.tiny_model.scenes import Kind
from bench.tiny_model.transformer import build_transformer, halve_projections
from wan_local.checkpoint import find_model
from wan_local.conditioning import picture_tensor
from wan_local.pipeline import generate
from wan_local.preview import to_uint8
from wan_local.request import Request
from wan_local.settings import load_settings
from wan_local.stage import stage
from wan_local.video import read_video

Frames = NDArray[np.uint8]
TINY = load_settings(model="tiny", device="cpu")
WIDTH, HEIGHT, NUM_FRAMES = 112, 64, 81
STEPS = 3  # PSNR rewards the mean of all that may happen, which few steps give; more steps draw one of it, sharper
UNSEEN_SEED = 7 * 10**6  # training counts up from 0, the evaluation in bench/ from 5 * 10**6


def truth_of(seed: int, kind: Kind) -> tuple[Frames, str]:
    """Draw a clip that no training has seen, over photographs that no training has seen, and its caption."""
    video, caption = clip(seed, held_out_photos(), WIDTH, HEIGHT, torch.linspace(0, 1, NUM_FRAMES), kind)
    return to_uint8(video), caption


def generated(truth: Frames, prompt: str, folder: Path, **changes: object) -> Frames:
    arguments = {
        "prompt": prompt,
        "start_image_url": Image.fromarray(truth[0]),
        "end_image_url": Image.fromarray(truth[-1]),
        "resolution": "480p",
        "aspect_ratio": "16:9",
        "num_inference_steps": STEPS,
        "seed": 1,
    }
    output = folder / "clip.mp4"
    generate(Request.from_arguments({**arguments, **changes}), settings=TINY, output=output)
    return read_video(output)


def psnr(a: Frames, b: Frames) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9)))


def cross_fade(truth: Frames) -> Frames:
    weight = np.linspace(0, 1, len(truth)).reshape(-1, 1, 1, 1)
    return np.rint(truth[0] * (1 - weight) + truth[-1] * weight).astype(np.uint8)


def round_trip(picture: Frames) -> Frames:
    """Return a picture after the VAE alone: what its first frame can be at best."""
    files = find_model(TINY)
    with stage("vae", files, torch.device("cpu"), torch.float32) as vae:
        latents = vae.encode([picture_tensor(Image.fromarray(picture)).unsqueeze(0).unsqueeze(2)])
        [frame] = vae.decode(latents)
    return to_uint8(frame[0])[0]


@pytest.mark.slow
def test_it_beats_the_cross_fade_on_unseen_clips_of_a_moving_shape(tmp_path: Path) -> None:
    gains, firsts, lasts = [], [], []
    for seed in range(UNSEEN_SEED, UNSEEN_SEED + 8):
        truth, caption = truth_of(seed, "one_shape")
        video = generated(truth, caption, tmp_path)
        gains.append(psnr(video, truth) - psnr(cross_fade(truth), truth))
        firsts.append(psnr(video[0], truth[0]) - psnr(round_trip(truth[0]), truth[0]))
        lasts.append(psnr(video[-1], truth[-1]) - psnr(round_trip(truth[-1]), truth[-1]))
    assert sum(gain > 0 for gain in gains) >= 6 and np.mean(gains) > 1.7, gains
    assert np.mean(firsts) > -2, firsts
    assert np.mean(lasts) > -3, lasts


def test_its_checkpoint_is_small_and_its_card_says_what_it_is() -> None:
    folder = find_model(TINY).folder
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("trained", "photograph", "PSNR", "cross-fade"):
        assert word in card


def test_no_prompt_need_be_replaced_by_a_longer_one() -> None:
    short, long = (
        Prompts(torch.ones(2, tokens, 64, dtype=torch.float16), torch.tensor([tokens] * 2)) for tokens in (3, 9)
    )
    rows = torch.tensor([0, 1])
    assert short.texts(rows, long, torch.tensor([False, False])).embeds.shape == (2, 3 + 1, 64)
    mixed = short.texts(rows, long, torch.tensor([False, True])).embeds
    assert mixed.shape == (2, 9 + 1, 64) and mixed[0, 3:].eq(0).all() and mixed[1, :9].eq(1).all()


def test_projections_in_bfloat16_keep_their_weights_and_nearly_their_results() -> None:
    exact, half = (build_transformer().blocks[0].ffn.net[0].proj for _ in range(2))
    half.load_state_dict(exact.state_dict())
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([half])
    halve_projections(model)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    error = (half(x) - exact(x)).abs().max() / exact(x).abs().max()
    assert half(x).dtype == half.weight.dtype == torch.float32 and 0 < error < 0.02
