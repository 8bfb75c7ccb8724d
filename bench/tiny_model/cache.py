"""Latents of clips on disk, so that training the transformer never runs the VAE.

A shard is one file with clips of one size and length: `x` latents of the clip, `y` latents of its condition [first, grey..., last],
CLIP states of both ends, and captions. Latents are normalised with the VAE's own statistics and kept in fp16.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from . import vae as whole
from .encoders import Encoders, quantize
from .log import Log
from .photos import training_photos
from .render import clip

TIME_STRIDE = 4
SPEED_OF_SHORT_CLIPS = 1.0


@dataclass(frozen=True)
class Shape:
    """Width and height in pixels, length in latent frames."""

    width: int
    height: int
    latent_frames: int

    @property
    def frames(self) -> int:
        return TIME_STRIDE * (self.latent_frames - 1) + 1

    @property
    def tokens(self) -> int:
        return self.latent_frames * (self.width // 16) * (self.height // 16)

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}x{self.latent_frames}"


@dataclass
class Shard:
    """Clips of one shape."""

    x_NCTHW: Tensor
    y_NCTHW: Tensor
    images_NKLD: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


@torch.no_grad()
def make_shard(vae: AutoencoderKLWan, encoders: Encoders, shape: Shape, seeds: list[int], device: str) -> Shard:
    """Render and encode the clips of `seeds`."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    times = torch.linspace(0, 1, shape.frames)
    xs, ys, images, captions = [], [], [], []
    for seed in seeds:
        frames, text = clip(seed, training_photos(), shape.width, shape.height, times)
        frames = quantize(frames)[None].to(device)
        first, last = frames[:, :, 0], frames[:, :, -1]
        xs.append(((whole.encode(vae, frames).cpu() - mean) / std).half())
        ys.append(((whole.encode_ends(vae, first, last, shape.frames).cpu() - mean) / std).half())
        images.append(encoders.encode_images(torch.cat((first, last)).cpu()).half()[None])
        captions.append(text)
    return Shard(torch.cat(xs), torch.cat(ys), torch.cat(images), captions)


def save_shard(shard: Shard, path: Path) -> None:
    """Write a shard under a temporary name, then rename it."""
    part = path.with_suffix(".part")
    torch.save({"x": shard.x_NCTHW, "y": shard.y_NCTHW, "images": shard.images_NKLD, "captions": shard.captions}, part)
    part.rename(path)


def load_shard(path: Path) -> Shard:
    """Read a shard."""
    data = torch.load(path, weights_only=True)
    return Shard(data["x"], data["y"], data["images"], data["captions"])


def fill(
    vae: AutoencoderKLWan,
    encoders: Encoders,
    folder: Path,
    plan: list[tuple[Shape, int]],
    first_seed: int,
    device: str,
    log: Log,
) -> None:
    """Make the shards of a plan that are not there yet; each entry is a shape and a number of clips."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = first_seed
    for index, (shape, count) in enumerate(plan):
        path = folder / f"{first_seed:09d}_{index:05d}_{shape.name}.pt"
        seeds = list(range(seed, seed + count))
        seed += count
        if path.exists():
            continue
        save_shard(make_shard(vae, encoders, shape, seeds, device), path)
        log.write(f"cache {path.name} {count} clips")


def any_size(rng: np.random.Generator, area: int, latent_frames: int) -> Shape:
    """Draw a canvas of about `area` pixels whose sides are multiples of 16, as aspect_ratio="auto" gives."""
    aspect = float(np.exp(rng.uniform(np.log(0.4), np.log(2.5))))
    width = 16 * max(1, int((area * aspect) ** 0.5 / 16))
    height = 16 * max(1, int((area / aspect) ** 0.5 / 16))
    return Shape(width, height, latent_frames)
