"""Whether a video begins and ends as its two images do: what damaged weights make is finite, and looks like a success.

Takes the frames on their way to the file, and passes them on; gives two figures for the report, a note where one is far
too low, and an error where there is no picture at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wan_local.checkpoint import ModelFiles
from wan_local.decode import Decoded, Frames
from wan_local.errors import NumericalError
from wan_local.preview import to_uint8
from wan_local.report import Report

LOWEST_PSNR = 14.0  # dB. The embedded model gives 19 to 30, with damaged weights 8 to 12
PSNR_OF_EQUAL = 99.0  # infinite, by its formula
_FLAT, _NOT_FLAT = 0.5, 4.0  # standard deviation of a channel, of 255


def compared_frames(
    parts: Iterator[Decoded], images: tuple[Tensor, Tensor], files: ModelFiles, report: Report
) -> Iterator[Decoded]:
    """Pass frames on; at their end report the PSNR of the first and the last to `images`, each [3, H, W] in [-1, 1].

    Raises NumericalError where every frame is of one colour and an image is not.
    """
    start, end = (to_uint8(image.unsqueeze(1))[0] for image in images)
    first: NDArray[np.uint8] | None = None
    last, contrast = start, 0.0
    for part in parts:
        if len(part.frames):
            first = part.frames[0].copy() if first is None else first
            last = part.frames[-1].copy()
            contrast = contrast if contrast >= _FLAT else _contrast(part.frames)
        yield part
    assert first is not None, "a video has frames"
    if contrast < _FLAT and _contrast(np.stack((start, end))) >= _NOT_FLAT:
        raise NumericalError(f"every frame came out as one flat colour; no video is written. {_way_out(files)}")
    figures = {"first": psnr(first, start), "last": psnr(last, end)}
    report.likeness = {f"{name}_frame_psnr": round(value, 2) for name, value in figures.items()}
    low = [f"the {name} frame ({value:.1f} dB)" for name, value in figures.items() if value < LOWEST_PSNR]
    if low:
        report.note(f"{' and '.join(low)} of the video does not look like the image it is made from. {_way_out(files)}")


def _way_out(files: ModelFiles) -> str:
    if files.manifest is not None:
        return f"The weights may be damaged: `wan-local inspect --verify {files.folder}` reads them all and tells."
    return (
        f"The weights in {str(files.folder)!r} may be damaged: get them again, or convert them to a store, which "
        "`wan-local inspect --verify` can check."
    )


def _contrast(frames_NHW3: Frames) -> float:
    """Return the largest standard deviation of a channel within a frame."""
    return max(float(frame[..., channel].std()) for frame in frames_NHW3 for channel in range(frame.shape[-1]))


def psnr(a: Frames, b: Frames) -> float:
    """Return the peak signal-to-noise ratio over all of both arrays, in dB."""
    error = float(np.mean(np.square(a.astype(np.float32) - b.astype(np.float32))))
    return PSNR_OF_EQUAL if error == 0 else min(PSNR_OF_EQUAL, 10 * float(np.log10(255**2 / error)))
