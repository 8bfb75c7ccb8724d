"""Latents to the video's frames: uint8, exactly as many as were asked for, the first and the last always among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_local.errors import NumericalError
from wan_local.geometry import TEMPORAL_STRIDE, Geometry, frames_to_drop
from wan_local.models.vae import Vae
from wan_local.preview import to_uint8
from wan_local.request import Check, unchecked
from wan_local.tiling import WHOLE, Tiling

Frames = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Decoded:
    """`done` of the generated frames are decoded; `frames` [N, H, W, 3] are ready to be written, N may be 0.

    Where frames are decoded in tiles, `done` is how many frames the pixels so far would make.
    """

    done: int
    frames: Frames


def decode_frames(
    vae: Vae, latents: Tensor, geometry: Geometry, *, tiling: Tiling = WHOLE, check: Check = unchecked
) -> Iterator[Decoded]:
    """Yield the frames of normalised latents [1, C, T, h, w], a few at a time.

    They are kept as uint8 in RAM and come at the end where frames are decoded in tiles, and where the model made up to
    three frames more than were asked for: the least-moving interior ones are left out. check: called after each chunk.
    Raises NumericalError.
    """
    if tiling.count > 1:
        parts = _tiles(vae, latents, geometry, tiling)
    else:
        parts = _whole_frames(vae, latents, geometry)
    for part in parts:
        check()
        yield part


def _whole_frames(vae: Vae, latents: Tensor, geometry: Geometry) -> Iterator[Decoded]:
    streams, done = geometry.generated_frames == geometry.num_frames, 0
    video = _room_for(geometry, 0 if streams else geometry.generated_frames)
    for chunk in vae.decode(latents):
        frames = _checked_frames(chunk)
        if not streams:
            video[done : done + len(frames)] = frames
        done += len(frames)
        yield Decoded(done, frames if streams else frames[:0])
    if not streams:
        yield from _without_excess(video, geometry.num_frames)


def _tiles(vae: Vae, latents: Tensor, geometry: Geometry, tiling: Tiling) -> Iterator[Decoded]:
    video, size, pixels = _room_for(geometry, geometry.generated_frames), geometry.size, 0
    for tile in vae.decode_tiles(latents, tiling):
        part = _checked_frames(tile.pixels)
        video[tile.first : tile.first + len(part), tile.window.rows.slice, tile.window.columns.slice] = part
        pixels += len(part) * tile.window.area
        yield Decoded(pixels // (size.height * size.width), video[:0])
    yield from _without_excess(video, geometry.num_frames)


def _room_for(geometry: Geometry, num_frames: int) -> Frames:
    return np.empty((num_frames, geometry.size.height, geometry.size.width, 3), dtype=np.uint8)


def _checked_frames(chunk: Tensor) -> Frames:
    if not torch.isfinite(chunk).all():
        raise NumericalError("decoding gave NaN or infinity; no video is written. The VAE's weights may be damaged.")
    return to_uint8(chunk[0])


def _without_excess(video: Frames, num_frames: int) -> Iterator[Decoded]:
    """Yield `num_frames` of all, a few at a time, without the interior frames whose neighbours differ least."""
    stays = np.ones(len(video), dtype=bool)
    stays[frames_to_drop(_motion(video), num_frames) if num_frames < len(video) else []] = False
    for first in range(0, len(video), TEMPORAL_STRIDE):
        some = slice(first, first + TEMPORAL_STRIDE)
        yield Decoded(len(video), video[some][stays[some]])


def _motion(frames: Frames) -> list[float]:
    """Return mean |f[j+1] - f[j-1]| for every interior frame j, 0 for the ends."""
    pairs = zip(frames[:-2], frames[2:], strict=True)
    interior = [float(np.abs(after.astype(np.int16) - before).mean()) for before, after in pairs]
    return [0.0, *interior, 0.0]
