"""Latents to the video's frames: uint8, exactly as many as were asked for, the first and the last always among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_local.errors import NumericalError
from wan_local.geometry import Geometry, frames_to_drop
from wan_local.models.vae import Vae
from wan_local.preview import to_uint8
from wan_local.request import Check, unchecked

Frames = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Decoded:
    """`done` of the generated frames are decoded; `frames` [N, H, W, 3] are ready to be written, N may be 0."""

    done: int
    frames: Frames


def decode_frames(vae: Vae, latents: Tensor, geometry: Geometry, *, check: Check = unchecked) -> Iterator[Decoded]:
    """Yield the frames of normalised latents [1, C, T, h, w], a few at a time.

    Where the model made up to three frames more than were asked for, all are kept as uint8 until the least-moving
    interior ones are known. check: called after each chunk. Raises NumericalError.
    """
    streams = geometry.generated_frames == geometry.num_frames
    kept: list[Frames] = []
    done = 0
    for chunk in vae.decode(latents):
        check()
        if not torch.isfinite(chunk).all():
            raise NumericalError(
                "decoding gave NaN or infinity; no video is written. The VAE's weights may be damaged."
            )
        frames = to_uint8(chunk[0])
        done += len(frames)
        if streams:
            yield Decoded(done, frames)
        else:
            kept.append(frames)
            yield Decoded(done, frames[:0])
    if kept:
        yield Decoded(done, without_excess(np.concatenate(kept), geometry.num_frames))


def without_excess(frames: Frames, num_frames: int) -> Frames:
    """Return `num_frames` of [F, H, W, 3], leaving out the interior frames whose neighbours differ least."""
    dropped = frames_to_drop(_motion(frames), num_frames)
    return np.delete(frames, dropped, axis=0)


def _motion(frames: Frames) -> list[float]:
    """Return mean |f[j+1] - f[j-1]| for every interior frame j, 0 for the ends."""
    pairs = zip(frames[:-2], frames[2:], strict=True)
    interior = [float(np.abs(after.astype(np.int16) - before).mean()) for before, after in pairs]
    return [0.0, *interior, 0.0]
