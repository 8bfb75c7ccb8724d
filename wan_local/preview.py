"""Small pictures of a video that is still noise: latents to RGB by a linear map fitted to this very run's two images.

Both images and their latents are known before the first step, so the 16-to-3 map needs no table of any model.

Shape legend: C latent channels, H W latent rows and columns, N cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from wan_local.geometry import SPATIAL_STRIDE

_RIDGE = 1e-2  # of the mean squared latent: few cells must not be fitted to the last digit


@dataclass(frozen=True, slots=True)
class LatentToRgb:
    """rgb = weight^T [latent, 1]; weight is [C + 1, 3], rgb in [-1, 1]."""

    weight: Tensor

    def picture(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return the middle latent frame of [1, C, T, H, W] as uint8 [8H, 8W, 3]."""
        middle_CHW = latents[0, :, latents.shape[2] // 2].float().cpu()
        rgb = torch.einsum("chw,cr->rhw", _with_one(middle_CHW), self.weight)
        large = F.interpolate(rgb.unsqueeze(0), scale_factor=float(SPATIAL_STRIDE), mode="bilinear")[0]
        pixels: NDArray[np.uint8] = to_uint8(large.unsqueeze(1))[0]
        return pixels


def fit_latent_to_rgb(latents: Tensor, images: tuple[Tensor, Tensor]) -> LatentToRgb:
    """Fit the map by ridge regression on the first and the last latent frame.

    latents: normalised, [1, C, T, H, W], of a clip that begins and ends with `images`, each [3, 8H, 8W] in [-1, 1].
    """
    ends = (latents[0, :, 0], latents[0, :, -1])
    known_NC = torch.cat([_with_one(end.float().cpu()).flatten(1).T for end in ends]).double()
    small = [F.avg_pool2d(image.float().cpu().unsqueeze(0), SPATIAL_STRIDE)[0] for image in images]
    wanted_N3 = torch.cat([image.flatten(1).T for image in small]).double()
    gram = known_NC.T @ known_NC
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return LatentToRgb(torch.linalg.solve(gram + ridge, known_NC.T @ wanted_N3).float())


def to_uint8(video_CTHW: Tensor) -> NDArray[np.uint8]:
    """Return frames in [-1, 1], clamped and rounded, as uint8 [T, H, W, 3]."""
    pixels = video_CTHW.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
    frames: NDArray[np.uint8] = pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames


def _with_one(latent_CHW: Tensor) -> Tensor:
    return torch.cat((latent_CHW, torch.ones_like(latent_CHW[:1])))
