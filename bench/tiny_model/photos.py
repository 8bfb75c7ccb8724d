"""Photographs for the procedural clips, as pyramids of float tensors in [0, 1].

They come from the installed scikit-image package and, when a folder with them is given, from scikit-learn's two sample
images; licences are listed in the model card. `HELD_OUT` is never trained on.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MAX_SHORT_SIDE = 384
PYRAMID_LEVELS = 4
EXTRA_FOLDER_VARIABLE = "TINY_MODEL_EXTRA_PHOTOS"

TRAINING: dict[str, str] = {
    "astronaut.png": "an astronaut in an orange suit",
    "coffee.png": "a cup of coffee on a wooden table",
    "hubble_deep_field.jpg": "distant galaxies in black space",
    "retina.jpg": "a red retina",
    "ihc.png": "stained tissue under a microscope",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera on a tripod",
    "moon.png": "the surface of the moon",
    "coins.png": "ancient coins",
}
EXTRA: dict[str, str] = {
    "china.jpg": "a palace in china under a blue sky",
    "flower.jpg": "an orange flower with green leaves",
}
HELD_OUT: dict[str, str] = {
    "chelsea.png": "a tabby cat",
    "rocket.jpg": "a rocket at the launch pad in the evening",
}
PLAIN = ("grass.png", "gravel.png", "brick.png", "camera.png", "moon.png", "coins.png")
"""Grey or uniform photographs: drawn half as often as the others."""


@dataclass(frozen=True)
class Photo:
    """A photograph with its anti-aliased half sizes; `levels[k]` is [3, H/2^k, W/2^k] in [0, 1]."""

    subject: str
    levels: tuple[Tensor, ...]

    def to(self, device: torch.device) -> "Photo":
        """Return the photograph on a device."""
        return Photo(self.subject, tuple(level.to(device) for level in self.levels))

    @property
    def height(self) -> int:
        return int(self.levels[0].shape[1])

    @property
    def width(self) -> int:
        return int(self.levels[0].shape[2])

    @property
    def short_side(self) -> int:
        return min(self.height, self.width)


def _read(path: Path, subject: str) -> Photo:
    with Image.open(path) as file:
        image = file.convert("RGB")
    factor = min(1.0, MAX_SHORT_SIDE / min(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / 255
    levels = [torch.from_numpy(pixels).permute(2, 0, 1).contiguous()]
    for _ in range(PYRAMID_LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1][None], 2)[0])
    return Photo(subject, tuple(levels))


@cache
def _skimage_folder() -> Path:
    import skimage

    return Path(skimage.__file__).parent / "data"


@cache
def training_photos() -> tuple[Photo, ...]:
    """Return the photographs that clips for training draw from; frequent ones stand in the list twice."""
    found: list[Photo] = []
    for name, subject in TRAINING.items():
        photo = _read(_skimage_folder() / name, subject)
        found += [photo] if name in PLAIN else [photo, photo]
    extra = os.environ.get(EXTRA_FOLDER_VARIABLE)
    if extra:
        for name, subject in EXTRA.items():
            found += [_read(Path(extra) / name, subject)] * 2
    return tuple(found)


@cache
def held_out_photos() -> tuple[Photo, ...]:
    """Return the photographs that only evaluation sees."""
    return tuple(_read(_skimage_folder() / name, subject) for name, subject in HELD_OUT.items())


def on_device(photos: Sequence[Photo], device: torch.device) -> tuple[Photo, ...]:
    """Return photographs on a device; one that stands in the list twice stays one object."""
    moved = {id(photo): photo.to(device) for photo in photos}
    return tuple(moved[id(photo)] for photo in photos)


def sample_photo(photo: Photo, x_THW: Tensor, y_THW: Tensor, pixels_per_unit: float) -> Tensor:
    """Look a photograph up at world coordinates and return [3, T, H, W].

    The origin is the photograph's centre and its short side is one unit long; outside it is mirrored.
    `pixels_per_unit` is the output's sampling density there, from which the pyramid level follows.
    """
    density = photo.short_side / max(pixels_per_unit, 1e-6)
    level = min(max(int(math.log2(max(density, 1.0)) + 0.4), 0), PYRAMID_LEVELS - 1)
    image = photo.levels[level]
    unit_x, unit_y = 2 * photo.short_side / photo.width, 2 * photo.short_side / photo.height
    grid = torch.stack((x_THW * unit_x, y_THW * unit_y), -1)
    frames = F.grid_sample(
        image[None].expand(grid.shape[0], -1, -1, -1), grid, padding_mode="reflection", align_corners=False
    )
    return frames.transpose(0, 1)
