"""The runs of a study, up to their frames.

Prompts, images and condition are encoded once for each clip, by the base model: a variant changes what happens between
noise and latents, and nothing else.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_local.answers import Latents
from wan_local.decode import decode_frames
from wan_local.encoders import encode_frames, encode_images, encode_prompts
from wan_local.geometry import Geometry
from wan_local.image import fit
from wan_local.likeness import psnr
from wan_local.pipeline import Embeds, sample
from wan_local.preparation import Job, prepare
from wan_local.quality.metrics import Frames
from wan_local.quality.shelf import Shelf
from wan_local.quality.subject import EXACT, Cell, Clip, Unit, Variant
from wan_local.report import Report
from wan_local.request import Request
from wan_local.settings import Settings
from wan_local.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Encoded:
    """What is the same for all runs of a clip: embeddings, condition, and the video's fitted ends with their ceiling.

    ceiling: PSNR of the first and the last image after the VAE alone, each encoded and decoded as a still.
    """

    embeds: Embeds
    condition: Tensor
    ends: tuple[Frames, Frames]
    ceiling: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Made:
    """One run up to its frames; seconds of the denoising alone: of runs made at once, a share."""

    frames: Frames
    calls: int
    seconds: float


class Maker:
    """Makes the runs that the request `arguments` and a variant say, with one base model.

    folder: where nothing is written, which runs are planned for. edit: changes every planned run before its variant
    does. shelf: keeps networks between runs, and makes several runs at once; unless given every run loads its own.
    """

    def __init__(
        self,
        settings: Settings,
        arguments: Mapping[str, Any],
        folder: Path,
        *,
        edit: Callable[[Job], Job] = lambda job: job,
        shelf: Shelf | None = None,
    ) -> None:
        self._settings, self._arguments, self._folder = settings, dict(arguments), folder
        self._edit, self._shelf = edit, shelf
        self._ceilings: dict[str, tuple[float, float]] = {}  # by a clip's name: all runs have one canvas

    def job(self, unit: Unit, variant: Variant) -> Job:
        """Return a variant's run, checked and planned."""
        arguments = {
            "prompt": unit.clip.prompt,
            "start_image_url": unit.clip.start,
            "end_image_url": unit.clip.end,
            "num_inference_steps": unit.cell.num_inference_steps,
            "shift": unit.cell.shift,
            "acceleration": "none",
            **self._arguments,
            "seed": unit.seed + variant.seed_offset,
            **variant.request,
        }
        settings = replace(self._settings, **variant.settings)
        job = prepare(Request.from_arguments(arguments), settings, self._folder / "unused.mp4")
        return variant.edit(self._edit(job))

    def make(self, units: Sequence[Unit], encoded: Sequence[Encoded], variant: Variant) -> list[Made]:
        """Run one variant on every unit to its frames, at once where there is a shelf."""
        jobs = [self.job(unit, variant) for unit in units]
        works = [functools.partial(self._latents, job, of) for job, of in zip(jobs, encoded, strict=True)]
        started = time.perf_counter()
        latents = self._shelf.together(works) if self._shelf else [work() for work in works]
        if jobs[0].device.type == "cuda":
            torch.cuda.synchronize(jobs[0].device)
        seconds = (time.perf_counter() - started) / len(works)
        return [
            Made(self._frames(job, result), result.calls, seconds) for job, result in zip(jobs, latents, strict=True)
        ]

    def _latents(self, job: Job, encoded: Encoded) -> Latents:
        embeds = encoded.embeds
        if job.request.guide_scale == 1:
            embeds = Embeds(embeds.prompt, None, embeds.images)
        running = sample(job, self._space(job), embeds, encoded.condition)
        while True:
            try:
                next(running)
            except StopIteration as end:
                latents: Latents = end.value
                return latents

    def _frames(self, job: Job, final: Latents) -> Frames:
        space = self._space(job)
        for attempt in space.attempts("decode"):
            with attempt as rung, space.open("vae_decoder", rung) as vae:
                latents = final.latents.to(rung.device)
                decoded = decode_frames(vae, latents, job.geometry, tiling=rung.plan.tiling)
                frames: Frames = np.concatenate([part.frames for part in decoded])
        return frames

    def _space(self, job: Job) -> Workspace:
        space = job.workspace(Report(job.device))
        return space if self._shelf is None else self._shelf.furnish(space)

    def encode(self, clip: Clip) -> Encoded:
        """Encode a clip's prompts and images by the base model."""
        job = self.job(Unit(Cell(), clip, 0), Variant(EXACT))
        space, request = self._space(job), job.request
        prompts = encode_prompts({"prompt": request.prompt, "negative_prompt": request.negative_prompt}, space)
        images = encode_images(job.images, space)
        condition = encode_frames(job.images, job.geometry.generated_frames, space)
        size = job.geometry.size
        ends = (np.asarray(fit(clip.start, size)), np.asarray(fit(clip.end, size)))
        if clip.name not in self._ceilings:
            first, last = _through_vae(job, space)
            self._ceilings[clip.name] = (psnr(first, ends[0]), psnr(last, ends[1]))
        embeds = Embeds(prompts["prompt"], prompts["negative_prompt"], images)
        return Encoded(embeds, condition, ends, self._ceilings[clip.name])


def _through_vae(job: Job, space: Workspace) -> list[Frames]:
    """Return both images after the VAE's encoder and decoder, each alone, uint8 [height, width, 3]."""
    stills = [image[None, :, None] for image in job.images]
    for attempt in space.attempts("condition"):
        with attempt as rung, space.open("vae_encoder", rung) as vae:
            latents = [vae.encode([still.to(rung.device)], rung.plan.tiling) for still in stills]
    frame = Geometry(job.geometry.size, 1)
    for attempt in space.attempts("decode"):
        with attempt as rung, space.open("vae_decoder", rung) as vae:
            tiling = rung.plan.tiling
            decoded = [list(decode_frames(vae, one.to(rung.device), frame, tiling=tiling)) for one in latents]
    return [np.concatenate([part.frames for part in parts])[0] for parts in decoded]
