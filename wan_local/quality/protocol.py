"""Runs clips with and without a change and measures the difference; every row is kept as it comes.

A `Clip` is two images and a prompt, with the true video where there is one. A `Variant` is a change of the request or
of the settings. A `Cell` is a number of steps and a shift. Prompts, images and condition are encoded once for each
clip, by the base model: a variant changes what happens between noise and latents, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from wan_local.conditioning import embed_images, embed_prompt, encode_condition, load_tokenizer, tokenize
from wan_local.decode import decode_frames
from wan_local.image import fit
from wan_local.models.vae import Vae
from wan_local.pipeline import Embeds, sample
from wan_local.planner import StagePlan
from wan_local.preparation import Job, prepare
from wan_local.preview import to_uint8
from wan_local.quality import metrics
from wan_local.quality.metrics import Frames
from wan_local.quality.shelf import Shelf
from wan_local.report import Report
from wan_local.request import Request
from wan_local.settings import Settings
from wan_local.stage import Network, stage
from wan_local.workspace import Workspace

EXACT = "none"
_STRIP_FRAMES, _STRIP_WIDTH = 9, 176


@dataclass(frozen=True, slots=True)
class Clip:
    """Two images and a prompt; truth: the video they are the ends of, at the size and length that is made, or None."""

    name: str
    start: Image.Image
    end: Image.Image
    prompt: str
    truth: Frames | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """A change to measure. request and settings are laid over the base's; `seed_offset` is added to the seed.

    edit: changes the planned run, where neither says it.
    """

    label: str
    request: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    edit: Callable[[Job], Job] = lambda job: job


@dataclass(frozen=True, slots=True)
class Cell:
    """Where the variants are compared. A variant's own number of steps goes before the cell's."""

    num_inference_steps: int = 30
    shift: float = 5.0

    @property
    def name(self) -> str:
        return f"{self.num_inference_steps} steps, shift {self.shift:g}"


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
    """One run up to its frames; seconds of the denoising alone."""

    frames: Frames
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Unit:
    """What one exact run is for: all variants are compared with it. shown: they leave strips for the contact sheets."""

    cell: Cell
    clip: Clip
    seed: int
    shown: bool = False


def units(clips: Iterable[Clip], cells: Sequence[Cell], seeds: Sequence[int], *, shown: int = 3) -> Iterator[Unit]:
    """Return every unit, the first cell's first; the first clips of the first cell and seed are shown."""
    kept = list(clips)
    for cell in cells:
        for number, clip in enumerate(kept):
            for seed in seeds:
                yield Unit(cell, clip, seed, cell == cells[0] and seed == seeds[0] and number < shown)


class Study:
    """A protocol: the request that all runs share, measured with one base model.

    edit: changes every planned run before its variant does. shelf: keeps networks between runs; each run loads its own
    and frees it unless given.
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
        self.settings, self.arguments, self.folder = settings, dict(arguments), folder
        self._edit, self._shelf = edit, shelf
        self._rows_file = folder / "rows.jsonl"
        self._encoded: tuple[str, Encoded] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[metrics.Row]:
        """Return what was measured so far; a line that was cut off by a stop is left out."""
        if not self._rows_file.exists():
            return []
        rows = []
        for line in self._rows_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def sort(self, key: Callable[[metrics.Row], Any]) -> None:
        """Put the rows in an order that does not depend on who measured what when."""
        lines = [json.dumps(row) + "\n" for row in sorted(self.rows(), key=key)]
        part = self._rows_file.with_suffix(".part")
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(self._rows_file)

    def run(
        self, wanted: Iterable[Unit], variants: Sequence[Variant], *, deadline: float = math.inf
    ) -> Iterator[metrics.Row]:
        """Measure everything that is not measured yet, unit by unit; yield and keep each row.

        deadline: of `time.monotonic`, after which no run is begun.
        """
        done = {key_of(row) for row in self.rows()}
        self._end_cut_line()
        for unit in wanted:
            missing = [v for v in variants if (v.label, unit.cell.name, unit.clip.name, unit.seed) not in done]
            if missing and time.monotonic() < deadline:
                yield from self._run_unit(unit, missing, deadline)

    def _run_unit(self, unit: Unit, variants: Sequence[Variant], deadline: float) -> Iterator[metrics.Row]:
        clip = unit.clip
        if self._encoded is None or self._encoded[0] != clip.name:
            self._encoded = clip.name, self.encode(clip)
        encoded = self._encoded[1]
        exact = self.make(clip, encoded, Variant(EXACT), unit.cell, unit.seed)
        exact_figures = metrics.describe(exact.frames, encoded.ends)
        for variant in variants:
            if time.monotonic() >= deadline:
                return
            made = exact
            if variant.label != EXACT:
                made = self.make(clip, encoded, variant, unit.cell, unit.seed)
            row = {
                "variant": variant.label,
                "cell": unit.cell.name,
                "clip": clip.name,
                "seed": unit.seed,
                **measured(made, exact, exact_figures, encoded, clip),
            }
            if unit.shown:
                save_strip(made.frames, self.strip(clip.name, variant.label))
            with self._rows_file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            yield row

    def _end_cut_line(self) -> None:
        if self._rows_file.exists() and not self._rows_file.read_bytes().endswith(b"\n"):
            with self._rows_file.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def strip(self, clip: str, variant: str) -> Path:
        """Return where a run's strip of frames is kept."""
        return self.folder / "strips" / f"{_file_name(clip)}--{_file_name(variant)}.jpg"

    def job(self, clip: Clip, variant: Variant, cell: Cell, seed: int) -> Job:
        """Return a variant's run, checked and planned."""
        arguments = {
            "prompt": clip.prompt,
            "start_image_url": clip.start,
            "end_image_url": clip.end,
            "num_inference_steps": cell.num_inference_steps,
            "shift": cell.shift,
            "acceleration": "none",
            **self.arguments,
            "seed": seed + variant.seed_offset,
            **variant.request,
        }
        settings = replace(self.settings, **variant.settings)
        job = prepare(Request.from_arguments(arguments), settings, self.folder / "unused.mp4")
        return variant.edit(self._edit(job))

    def make(self, clip: Clip, encoded: Encoded, variant: Variant, cell: Cell, seed: int) -> Made:
        """Run one variant on one clip to its frames."""
        job = self.job(clip, variant, cell, seed)
        embeds = encoded.embeds
        if job.request.guide_scale == 1:
            embeds = Embeds(embeds.prompt, None, embeds.images)
        running = sample(job, self._space(job), embeds, encoded.condition)
        started = time.perf_counter()
        while True:
            try:
                next(running)
            except StopIteration as end:
                state = end.value
                break
        seconds = time.perf_counter() - started
        with self._open("vae", job) as vae:
            frames = np.concatenate([decoded.frames for decoded in decode_frames(vae, state.latents, job.geometry)])
        return Made(frames, state.calls, seconds)

    def _space(self, job: Job) -> Workspace:
        space = job.workspace(Report(job.device))
        return space if self._shelf is None else self._shelf.furnish(space)

    @contextlib.contextmanager
    def _open(self, network: Network, job: Job, plan: StagePlan | None = None) -> Iterator[Any]:
        if self._shelf is not None:
            yield self._shelf.network(network, job.files, job.device, job.dtype, plan)
            return
        with stage(network, job.files, job.device, job.dtype, plan=plan) as module:
            yield module

    def encode(self, clip: Clip) -> Encoded:
        """Encode a clip's prompts and images by the base model."""
        job = self.job(clip, Variant(EXACT), Cell(), seed=0)
        config = job.files.config
        length, tokenizer = config.transformer.text_tokens, load_tokenizer(job.files.folder / "tokenizer")
        with self._open("text_encoder", job, job.plan.stage("text")) as encoder:
            prompts = [
                embed_prompt(encoder, tokenize(tokenizer, text, limit=length), length=length)
                for text in (job.request.prompt, job.request.negative_prompt)
            ]
        with self._open("image_encoder", job) as encoder:
            images = embed_images(encoder, job.images, config.image_encoder)
        size = job.geometry.size
        ends = (np.asarray(fit(clip.start, size)), np.asarray(fit(clip.end, size)))
        with self._open("vae", job) as vae:
            condition = encode_condition(vae, job.images, job.geometry.generated_frames)
            first, last = (_through(vae, image.to(condition)) for image in job.images)
        ceiling = (metrics.psnr(first, ends[0]), metrics.psnr(last, ends[1]))
        return Encoded(Embeds(prompts[0], prompts[1], images), condition, ends, ceiling)


def save_strip(frames: Frames, path: Path) -> None:
    """Write a few frames of a video side by side."""
    chosen = frames[np.linspace(0, len(frames) - 1, _STRIP_FRAMES).round().astype(int)]
    picture = Image.fromarray(np.concatenate(list(chosen), axis=1))
    picture.thumbnail((_STRIP_FRAMES * _STRIP_WIDTH, _STRIP_FRAMES * _STRIP_WIDTH))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=90)


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in label)


def key_of(row: metrics.Row) -> tuple[str, str, str, int]:
    return row["variant"], row["cell"], row["clip"], row["seed"]


def _through(vae: Vae, image_3HW: Tensor) -> Frames:
    """Return an image after the VAE's encoder and decoder, uint8 [height, width, 3]."""
    [decoded_B3THW] = vae.decode(vae.encode([image_3HW[None, :, None]]))
    frame: Frames = to_uint8(decoded_B3THW[0])[0]
    return frame


def measured(
    made: Made, exact: Made, exact_figures: Mapping[str, float], encoded: Encoded, clip: Clip
) -> dict[str, float]:
    """Return a row's figures: alone, beside the exact run's, and to the truth where there is one."""
    figures = exact_figures if made is exact else metrics.describe(made.frames, encoded.ends)
    row = {
        "calls": made.calls,
        "seconds": round(made.seconds, 3),
        **metrics.compare(made.frames, exact.frames),
        **figures,
        "first_below_vae": encoded.ceiling[0] - figures["first_psnr"],
        "last_below_vae": encoded.ceiling[1] - figures["last_psnr"],
        "last_psnr_change": figures["last_psnr"] - exact_figures["last_psnr"],
        "motion_ratio": metrics.ratio(figures["motion"], exact_figures["motion"]),
        "sharpness_ratio": metrics.ratio(figures["sharpness"], exact_figures["sharpness"]),
        "warp_error_ratio": metrics.ratio(figures["warp_error"], exact_figures["warp_error"]),
    }
    if clip.truth is not None:
        row |= {
            "psnr_to_truth": metrics.psnr(made.frames, clip.truth),
            "ssim_to_truth": metrics.ssim(made.frames, clip.truth),
        }
    return {name: round(value, 6) for name, value in row.items()}
