"""What int8 costs on the embedded model: dB of the video to the one computed exactly, for each approximation and all.

python -m bench.int8_quality [--clips 2] [--steps 15]
python -m bench.int8_quality --table        the last rows into kernels/README.md

Unseen clips, shift 5, guide_scale 5, compared as decoded frames before the mp4. Another seed is the
yardstick. On a CPU the kernels' references run: the same arithmetic, so what is measured is rounding, not speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bench.acceleration import CPU, UNSEEN_SEED, Frames, make_job, psnr
from bench.tiny_model.photos import held_out_photos
from bench.tiny_model.render import clip
from bench.world import RESULTS, append_row, describe
from wan_local.acceleration import EveryStep
from wan_local.attention import PLAIN_KERNELS, KernelChoice
from wan_local.conditioning import (
    embed_images,
    embed_prompt,
    encode_condition,
    initial_noise,
    load_tokenizer,
    tokenize,
)
from wan_local.decode import decode_frames
from wan_local.denoise import Guided, denoise
from wan_local.geometry import Size
from wan_local.image import fit
from wan_local.layers import Linear
from wan_local.preparation import Job
from wan_local.preview import to_uint8
from wan_local.quantize import quantize_weight
from wan_local.scheduler import Scheduler
from wan_local.stage import load_network, stage
from wan_local.weight_format import Int8Arithmetic, WeightFormat

README = Path(__file__).parents[1] / "kernels" / "README.md"
BEGIN, END = "<!-- measured: python -m bench.int8_quality --table -->", "<!-- end of measured -->"
SIZE = Size(height=64, width=112)
SHIFT = 5.0


@dataclass(frozen=True)
class Variant:
    """What a run computes with: weights of the blocks' linears, what they meet, and the attention."""

    choice: KernelChoice = PLAIN_KERNELS
    weights: WeightFormat = "bf16"
    arithmetic: Int8Arithmetic = "w8a8"
    rotated: bool = False
    seed: int = 1


FUSED = KernelChoice(fused=True)
VARIANTS: Mapping[str, Variant] = {
    "fused block, plain weights": Variant(FUSED),
    "int8 weights only": Variant(weights="int8", arithmetic="weight-only"),
    "int8 linears (W8A8)": Variant(FUSED, "int8"),
    "int8 linears, rotated": Variant(FUSED, "int8", rotated=True),
    "int8 QK": Variant(KernelChoice("int8", fused=True)),
    "int8 QK and PV": Variant(KernelChoice("int8_pv", fused=True)),
    "int8 linears rotated, int8 QK": Variant(KernelChoice("int8", fused=True), "int8", rotated=True),
    "all: int8 linears rotated, QK and PV": Variant(KernelChoice("int8_pv", fused=True), "int8", rotated=True),
    "int4 weights, int8 rows (W4A8), rotated": Variant(FUSED, "int4", rotated=True),
    "another seed": Variant(seed=2),
}


@dataclass(frozen=True)
class Inputs:
    """What one clip's sampling starts from."""

    job: Job
    prompts: list[Tensor]
    images: Tensor
    condition: Tensor


def encode(job: Job) -> Inputs:
    placed, request = (job.files, job.device, job.dtype), job.request
    config = job.files.config
    length = config.transformer.text_tokens
    tokenizer = load_tokenizer(job.files.folder / "tokenizer")
    with stage("text_encoder", *placed) as encoder:
        texts = (request.prompt, request.negative_prompt)
        prompts = [embed_prompt(encoder, tokenize(tokenizer, text, limit=length), length=length) for text in texts]
    with stage("image_encoder", *placed) as encoder:
        images = embed_images(encoder, job.images, config.image_encoder)
    with stage("vae", *placed) as vae:
        return Inputs(job, prompts, images, encode_condition(vae, job.images, job.geometry.generated_frames))


def frames_of(inputs: Inputs, variant: Variant, steps: int) -> Frames:
    """Sample with a variant and return the decoded frames."""
    job, scheduler = inputs.job, Scheduler(steps, SHIFT)
    placed = (job.files, job.device, job.dtype)
    embedder, network = load_network("context_embedder", *placed), load_network("transformer", *placed)
    for module in (embedder, network):
        quantize_blocks(module, variant)
    contexts = [embedder(prompt, inputs.images) for prompt in inputs.prompts]
    guided = Guided(
        network, inputs.condition, embedder.modulations(scheduler.timesteps), *contexts, job.request.guide_scale,
        choice=variant.choice,
    )  # fmt: skip
    latent = job.geometry.latent_size
    shape = (job.files.config.transformer.out_channels, job.geometry.latent_frames, latent.height, latent.width)
    for state in denoise(guided, scheduler, initial_noise(variant.seed, shape), EveryStep()):
        latents = state.latents
    with stage("vae", *placed) as vae:
        return np.concatenate([decoded.frames for decoded in decode_frames(vae, latents, job.geometry)])


def quantize_blocks(module: nn.Module, variant: Variant) -> None:
    """Let every linear of every block hold its weight in the variant's format."""
    if variant.weights == "bf16":
        return
    for name, linear in module.named_modules():
        if isinstance(linear, Linear) and "blocks." in name:
            weight = quantize_weight(linear.weight.data, variant.weights, rotated=variant.rotated)
            tensors = {"weight": weight.data, "weight_scale": weight.scale, "weight_shift": weight.shift}
            held = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            linear.hold(held, rotated=variant.rotated, arithmetic=variant.arithmetic)


def table() -> str:
    """Return the last rows as Markdown."""
    rows = {row["who"]: row for row in map(json.loads, (RESULTS / "int8_quality.jsonl").read_text().splitlines())}
    lines = ["| against the exact video | mean | worst of the clips |", "|---|---|---|"]
    lines += [f"| {name} | {row['mean_db']:.1f} dB | {row['worst_db']:.1f} dB |" for name, row in rows.items()]
    return "\n".join(lines)


def write_table() -> None:
    """Put the table between its marks in kernels/README.md."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="only write the last rows into kernels/README.md")
    options = parser.parse_args()
    if options.table:
        write_table()
        return
    torch.set_grad_enabled(False)
    decibels: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(UNSEEN_SEED, UNSEEN_SEED + options.clips):
            video, caption = clip(seed, held_out_photos(), SIZE.width, SIZE.height, torch.linspace(0, 1, 81))
            frames = to_uint8(video)
            pictures = (fit(Image.fromarray(frames[0]), SIZE), fit(Image.fromarray(frames[-1]), SIZE))
            inputs = encode(make_job(pictures, caption, Path(folder), acceleration="none"))
            exact = frames_of(inputs, Variant(), options.steps)
            for name, variant in VARIANTS.items():
                decibels[name].append(psnr(frames_of(inputs, variant, options.steps), exact))
                print(f"  clip {seed}: {name} {decibels[name][-1]:.2f} dB", flush=True)
    for name, values in decibels.items():
        row = {"mean_db": round(statistics.mean(values), 2), "worst_db": round(min(values), 2)}
        append_row(
            "int8_quality", {"who": name, "clips": len(values), "steps": options.steps, **row, "world": describe(CPU)}
        )


if __name__ == "__main__":
    main()
