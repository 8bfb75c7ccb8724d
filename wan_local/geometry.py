"""Pixels, latents and tokens: how large a video is at each stage of the story.

Takes resolution, aspect ratio, the start image's size and num_frames; gives pixels, latent and token counts. Pure
integers, no torch. The numbers 4, 8, 16, 81 live here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Resolution = Literal["480p", "720p"]
RESOLUTIONS: tuple[Resolution, ...] = ("480p", "720p")
AspectRatio = Literal["auto", "16:9", "9:16", "1:1"]

TEMPORAL_STRIDE = 4  # pixel frames per latent frame, but for the first
SPATIAL_STRIDE = 8  # pixels per latent cell, each way
PATCH = 2  # latent cells per token, each way
GRID = SPATIAL_STRIDE * PATCH  # a side is a multiple of this many pixels
NATIVE_FRAMES = 81  # what the model was trained on
NATIVE_FPS = 16

_ASPECT_MIN = (2, 5)  # width : height; beyond it the start image is cropped
_ASPECT_MAX = (5, 2)
_SNAP_LOG_RATIO = 0.015  # `auto` this close to a trained bucket takes the bucket
_RATIOS: Mapping[str, tuple[int, int]] = {"16:9": (16, 9), "9:16": (9, 16), "1:1": (1, 1)}


@dataclass(frozen=True, slots=True)
class Size:
    """A picture's size in pixels (or latent cells). Never a bare pair: half the field swaps (w, h)."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class Canvas:
    """What one resolution name means for one model: an area in pixels, and the size of each named aspect ratio."""

    area: int
    buckets: Mapping[str, Size]

    def __post_init__(self) -> None:
        assert set(self.buckets) == set(_RATIOS), f"buckets must be {sorted(_RATIOS)}, not {sorted(self.buckets)}"
        for size in self.buckets.values():
            assert size.height % GRID == 0 and size.width % GRID == 0, f"{size} is not a multiple of {GRID}"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything that follows from a size and a frame count."""

    size: Size
    num_frames: int

    @property
    def generated_frames(self) -> int:
        """Frames the model makes: the smallest 4k+1 that is not less than `num_frames`."""
        return TEMPORAL_STRIDE * math.ceil((self.num_frames - 1) / TEMPORAL_STRIDE) + 1

    @property
    def latent_frames(self) -> int:
        return (self.generated_frames - 1) // TEMPORAL_STRIDE + 1

    @property
    def latent_size(self) -> Size:
        return Size(self.size.height // SPATIAL_STRIDE, self.size.width // SPATIAL_STRIDE)

    @property
    def tokens(self) -> int:
        return self.latent_frames * (self.latent_size.height // PATCH) * (self.latent_size.width // PATCH)


def output_size(canvas: Canvas, aspect_ratio: AspectRatio, start: Size) -> Size:
    """Return the video's size for a start image of size `start` (already upright).

    `auto` is the official area rule in exact integers, with the aspect clamped to [0.4, 2.5] and snapped to a trained
    bucket within 1.5 %. Source: wan/first_last_frame2video.py, whose float floor turns 832x480 into 832x464.
    """
    assert start.height > 0 and start.width > 0, start
    if aspect_ratio != "auto":
        return canvas.buckets[aspect_ratio]
    width, height = _clamp_aspect(start)
    for name, (ratio_width, ratio_height) in _RATIOS.items():
        if abs(math.log(width * ratio_height / (height * ratio_width))) <= _SNAP_LOG_RATIO:
            return canvas.buckets[name]
    return Size(
        height=GRID * (math.isqrt(canvas.area * height // width) // GRID),
        width=GRID * (math.isqrt(canvas.area * width // height) // GRID),
    )


def _clamp_aspect(start: Size) -> tuple[int, int]:
    """Return (width, height) with width/height in [0.4, 2.5]."""
    width, height = start.width, start.height
    if width * _ASPECT_MAX[1] > height * _ASPECT_MAX[0]:
        return _ASPECT_MAX
    if width * _ASPECT_MIN[1] < height * _ASPECT_MIN[0]:
        return _ASPECT_MIN
    return width, height


def frames_to_drop(motion: Sequence[float], num_frames: int) -> list[int]:
    """Return the indices of the generated frames to leave out so that exactly `num_frames` remain, ascending.

    `motion[j]` is mean |f[j+1] - f[j-1]| for 0 < j < F-1 (the ends are never read). The least-moving interior frames
    go, no two within F // (2 * dropped) of each other; the first and the last frame always stay. Ties go to the
    lowest index.
    """
    generated = len(motion)
    excess = generated - num_frames
    assert 0 <= excess < TEMPORAL_STRIDE, f"{generated} frames generated for {num_frames} asked for"
    if excess == 0:
        return []
    distance = generated // (2 * excess)
    chosen: list[int] = []
    for index in sorted(range(2, generated - 2), key=lambda j: (motion[j], j)):
        if all(abs(index - other) > distance for other in chosen):
            chosen.append(index)
            if len(chosen) == excess:
                return sorted(chosen)
    kept = {round(i * (generated - 1) / (num_frames - 1)) for i in range(num_frames)}
    return sorted(set(range(generated)) - kept)
