"""Latents of clips on disk, so that training the transformer never runs the VAE.

A shard is one file with clips of one size and length: `x` latents of the clip, `y` latents of its condition
[first, grey..., last], CLIP states of both ends, and captions. Latents are normalised with the VAE's own statistics and
kept in fp16.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from bench.tiny_model import vae as whole
from bench.tiny_model.encoders import Encoders, quantize
from bench.tiny_model.log import Log
from bench.tiny_model.photos import Photo
from bench.tiny_model.render import clip

TIME_STRIDE = 4
SMALL_AREA = 112 * 64
LARGE_AREA = 176 * 96
ASPECTS = 9


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
    motion_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.captions)


@torch.no_grad()
def make_shard(
    vae: AutoencoderKLWan,
    encoders: Encoders,
    shape: Shape,
    seeds: list[int],
    photos: Sequence[Photo],
) -> Shard:
    """Render and encode the clips of `seeds`, on the VAE's device; the photos lie there already."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    xs, ys, images, captions = [], [], [], []
    for chunk in torch.tensor(seeds).split(_at_once(vae)):
        times = torch.linspace(0, 1, shape.frames, device=vae.device)
        drawn = [clip(seed, photos, shape.width, shape.height, times) for seed in chunk.tolist()]
        frames = quantize(torch.stack([pixels for pixels, _ in drawn])).to(vae.dtype)
        captions += [text for _, text in drawn]
        first, last = frames[:, :, 0], frames[:, :, -1]
        xs.append(((whole.encode(vae, frames).float().cpu() - mean) / std).half())
        ys.append(((whole.encode_ends(vae, first, last, shape.frames).float().cpu() - mean) / std).half())
        both = encoders.encode_images(torch.cat((first, last)).float().cpu()).half()
        images.append(both.unflatten(0, (2, len(chunk))).transpose(0, 1))
    return Shard(torch.cat(xs), torch.cat(ys), torch.cat(images), captions)


def _at_once(vae: AutoencoderKLWan) -> int:
    """Return how many clips to encode together: in float32 a CPU takes a far slower convolution for one alone."""
    if vae.device.type != "cpu":
        return 8
    return 2 if vae.dtype == torch.float32 else 1


def save_shard(shard: Shard, path: Path) -> None:
    """Write a shard under a temporary name, then rename it."""
    part = path.with_suffix(".part")
    torch.save({"x": shard.x_NCTHW, "y": shard.y_NCTHW, "images": shard.images_NKLD, "captions": shard.captions}, part)
    part.rename(path)


def load_shard(path: Path) -> Shard:
    """Read a shard."""
    data = torch.load(path, weights_only=True)
    return Shard(data["x"], data["y"], data["images"], data["captions"])


@dataclass(frozen=True)
class Source:
    """What shards are made from."""

    vae: AutoencoderKLWan
    encoders: Encoders
    photos: Sequence[Photo]
    first_seed: int


def fill(source: Source, folder: Path, plan: list[tuple[Shape, int]], log: Log) -> None:
    """Make the shards of a plan that are not there yet; each entry is a shape and a number of clips.

    Several processes may fill a folder together: each takes the next entry that nobody has claimed. Claims end with
    the process that made them, so what a killed one had begun is made by the next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = source.first_seed
    for index, (shape, count) in enumerate(plan):
        path = folder / f"{source.first_seed:09d}_{index:05d}_{shape.name}.pt"
        seeds = list(range(seed, seed + count))
        seed += count
        if path.exists() or not _claim(path.with_suffix(".claim")):
            continue
        start = time.perf_counter()
        save_shard(make_shard(source.vae, source.encoders, shape, seeds, source.photos), path)
        log.write(f"cache {path.name} {count} clips, {(time.perf_counter() - start) / count:.2f} s each")


def _claim(path: Path) -> bool:
    """Say whether the work is this process's; a claim of a process that is gone is taken over."""
    with contextlib.suppress(FileExistsError):
        path.symlink_to(str(os.getpid()))
        return True
    owner = os.readlink(path)
    if Path(f"/proc/{owner}").exists():
        return False
    path.unlink(missing_ok=True)
    return _claim(path)


def training_plan(rounds: int) -> list[tuple[Shape, int]]:
    """Return shapes and clip counts: short and small ones first, then every canvas that the package offers.

    Its canvases have about 112x64 or 176x96 pixels, any aspect from 0.4 to 2.5 and 21 to 26 latent frames.
    """
    rng = np.random.default_rng(5)
    plan: list[tuple[Shape, int]] = []
    for _ in range(rounds):
        plan += [(Shape(64, 64, 5), 64), (Shape(48, 48, 21), 48), (Shape(64, 64, 9), 40), (Shape(64, 64, 21), 32)]
        plan += [(Shape(64, 48, 21), 12), (Shape(48, 64, 21), 12)]
        for _ in range(2):
            plan += [(Shape(112, 64, 21), 32), (Shape(64, 112, 21), 16), (Shape(80, 80, 21), 16)]
            plan += [(any_size(rng, SMALL_AREA, int(rng.integers(21, 27))), 16)]
        plan += [(Shape(176, 96, 21), 16), (Shape(96, 176, 21), 8), (Shape(128, 128, 21), 8)]
        plan += [(any_size(rng, LARGE_AREA, int(rng.integers(21, 27))), 8)]
    return plan


def validation_plan() -> list[tuple[Shape, int]]:
    """Return the held-out shards that training reports on."""
    return [(Shape(64, 64, 9), 12), (Shape(64, 64, 21), 12), (Shape(112, 64, 21), 6), (Shape(176, 96, 21), 4)]


def any_size(rng: np.random.Generator, area: int, latent_frames: int) -> Shape:
    """Draw a canvas of about `area` pixels whose sides are multiples of 16, as aspect_ratio="auto" gives."""
    aspect = float(np.exp(rng.choice(np.linspace(np.log(0.4), np.log(2.5), ASPECTS))))
    width = 16 * max(1, int((area * aspect) ** 0.5 / 16))
    height = 16 * max(1, int((area / aspect) ** 0.5 / 16))
    return Shape(width, height, latent_frames)
