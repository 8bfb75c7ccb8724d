"""What `acceleration="regular"` saves and costs on the embedded model: model calls, and dB to the run with every step.

python -m bench.acceleration [--clips 6]

Unseen clips, 30 steps, shift 5, guide_scale 5, compared as decoded frames before the mp4. Another seed is the
yardstick: a change that is smaller than that is smaller than chance.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.tiny_model.photos import held_out_photos
from bench.tiny_model.render import clip
from bench.world import append_row, describe
from wan_local.conditioning import embed_images, embed_prompt, encode_condition, load_tokenizer, tokenize
from wan_local.decode import decode_frames
from wan_local.geometry import Size
from wan_local.image import fit
from wan_local.pipeline import Embeds, sample
from wan_local.preparation import Job, prepare
from wan_local.preview import to_uint8
from wan_local.report import Report
from wan_local.request import Request
from wan_local.settings import load_settings
from wan_local.stage import stage

UNSEEN_SEED = 9 * 10**6
CPU = torch.device("cpu")
Frames = NDArray[np.uint8]


def make_job(pictures: tuple[Image.Image, Image.Image], prompt: str, folder: Path, **changes: Any) -> Job:
    arguments = {
        "prompt": prompt,
        "start_image_url": pictures[0],
        "end_image_url": pictures[1],
        "resolution": "480p",
        "aspect_ratio": "16:9",
        "seed": 1,
    }
    settings = load_settings(model="tiny", device="cpu")
    return prepare(Request.from_arguments({**arguments, **changes}), settings, folder / "unused.mp4")


def frames_of(job: Job) -> tuple[Frames, int]:
    """Run a job up to its decoded frames; return them and the number of model calls."""
    placed = (job.files, job.device, job.dtype)
    config, request = job.files.config, job.request
    length = config.transformer.text_tokens
    tokenizer = load_tokenizer(job.files.folder / "tokenizer")
    with stage("text_encoder", *placed) as encoder:
        prompts = [
            embed_prompt(encoder, tokenize(tokenizer, text, limit=length), length=length)
            for text in (request.prompt, request.negative_prompt)
        ]
    with stage("image_encoder", *placed) as encoder:
        images = embed_images(encoder, job.images, config.image_encoder)
    with stage("vae", *placed) as vae:
        condition = encode_condition(vae, job.images, job.geometry.generated_frames)
    running = sample(job, job.workspace(Report(CPU)), Embeds(prompts[0], prompts[1], images), condition)
    while True:
        try:
            next(running)
        except StopIteration as end:
            state = end.value
            break
    with stage("vae", *placed) as vae:
        return np.concatenate([d.frames for d in decode_frames(vae, state.latents, job.geometry)]), state.calls


def psnr(a: Frames, b: Frames) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=6)
    options = parser.parse_args()
    size = Size(height=64, width=112)
    rows: dict[str, list[dict[str, float]]] = {"regular": [], "another seed": []}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(UNSEEN_SEED, UNSEEN_SEED + options.clips):
            video, caption = clip(seed, held_out_photos(), size.width, size.height, torch.linspace(0, 1, 81))
            frames = to_uint8(video)
            pictures = (fit(Image.fromarray(frames[0]), size), fit(Image.fromarray(frames[-1]), size))
            exact, calls = frames_of(make_job(pictures, caption, Path(name), acceleration="none"))
            for label, changes in (("regular", {}), ("another seed", {"acceleration": "none", "seed": 2})):
                got, taken = frames_of(make_job(pictures, caption, Path(name), **changes))
                last = psnr(got[-1], frames[-1]) - psnr(exact[-1], frames[-1])
                rows[label].append(
                    {"calls": taken, "of": calls, "psnr_to_exact": psnr(got, exact), "last_frame_psnr_change": last}
                )
    for label, measured in rows.items():
        summary = {key: round(statistics.mean(row[key] for row in measured), 3) for key in measured[0]}
        worst = round(min(row["psnr_to_exact"] for row in measured), 2)
        append_row(
            "acceleration",
            {"who": label, "clips": len(measured), **summary, "worst_psnr_to_exact": worst, "world": describe(CPU)},
        )


if __name__ == "__main__":
    main()
