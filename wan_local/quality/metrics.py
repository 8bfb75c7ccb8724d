"""Figures of a video: how far from another one, how true at its ends, how steady in between.

Videos are uint8 [frames, height, width, 3]. PSNR in dB, at most 99. Flow and warp error need opencv (extra `quality`).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from wan_local.likeness import psnr

Frames = NDArray[np.uint8]

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_OCCLUDED = 1.0  # pixels by which a flow and its way back may disagree


def worst_frame_psnr(a: Frames, b: Frames) -> float:
    return min(psnr(x, y) for x, y in zip(a, b, strict=True))


def ssim(a: Frames, b: Frames) -> float:
    """Return the mean structural similarity of the luma, by 11x11 Gaussian windows inside the frame.

    Source: Wang et al., Image quality assessment, 2004.
    """
    x, y = (torch.from_numpy(luma(frames))[:, None] for frames in (a, b))
    place = torch.arange(_SSIM_WINDOW, dtype=torch.float32) - _SSIM_WINDOW // 2
    line = torch.exp(-(place**2) / (2 * _SSIM_SIGMA**2))
    line /= line.sum()

    def blurred(value: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(value, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    shared = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * shared + c2)
    return float((similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def luma(frames: Frames) -> NDArray[np.float32]:
    """Return [frames, height, width] in 0..255."""
    return frames.astype(np.float32) @ _LUMA


def end_pop(frames: Frames) -> float:
    """Return the change into the last frame relative to the median change; above 3 it is seen as a pop."""
    grey = luma(frames)
    change = np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2))
    return float(change[-1] / max(float(np.median(change)), 1e-3))


def flicker(frames: Frames) -> float:
    """Return the mean absolute second difference of the frames' mean luma."""
    return float(np.abs(np.diff(luma(frames).mean(axis=(1, 2)), n=2)).mean())


def sharpness(frames: Frames) -> float:
    """Return the variance of the Laplacian of the luma, a mean over frames."""
    grey = luma(frames)
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    return float(laplacian.var(axis=(1, 2)).mean())


def motion_and_warp_error(frames: Frames) -> tuple[float, float]:
    """Return the mean length of the optical flow in pixels, and the warp error.

    The warp error is the mean squared difference between a frame and the next one warped back to it, where the flow and
    its way back agree, of values in 0..1.
    """
    import cv2

    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow_of = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    height, width = grey[0].shape
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    lengths, errors = [], []
    for now, after in itertools.pairwise(grey):
        there, back = (
            flow_of.calc(a, b, np.zeros((height, width, 2), np.float32)) for a, b in ((now, after), (after, now))
        )
        x, y = columns + there[..., 0], rows + there[..., 1]
        returned = cv2.remap(back, x, y, cv2.INTER_LINEAR)
        seen = np.linalg.norm(there + returned, axis=-1) < _OCCLUDED
        seen &= (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        warped = cv2.remap(after, x, y, cv2.INTER_LINEAR).astype(np.float32)
        lengths.append(float(np.linalg.norm(there, axis=-1).mean()))
        if seen.any():
            errors.append(float(np.square((warped - now)[seen] / 255).mean()))
    return float(np.mean(lengths)), float(np.mean(errors)) if errors else 0.0


def describe(frames: Frames, ends: tuple[Frames, Frames]) -> dict[str, float]:
    """Return the figures of one video. ends: the first and the last frame that were asked for, [height, width, 3]."""
    motion, warp_error = motion_and_warp_error(frames)
    return {
        "first_psnr": psnr(frames[0], ends[0]),
        "last_psnr": psnr(frames[-1], ends[1]),
        "motion": motion,
        "warp_error": warp_error,
        "end_pop": end_pop(frames),
        "flicker": flicker(frames),
        "sharpness": sharpness(frames),
    }


def compare(frames: Frames, exact: Frames) -> dict[str, float]:
    """Return how far a video is from the exact run's."""
    return {
        "psnr_to_exact": psnr(frames, exact),
        "worst_frame_psnr_to_exact": worst_frame_psnr(frames, exact),
        "ssim_to_exact": ssim(frames, exact),
    }


def ratio(value: float, to: float) -> float:
    return value / to if to else (1.0 if value == to else float("inf"))


Row = dict[str, Any]
