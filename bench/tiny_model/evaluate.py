"""Measures the shipped folder on held-out seeds and photographs: `python -m bench.tiny_model.evaluate --out <folder>`.

Writes one JSON file a case and contact sheets. PSNR is in dB against the true clip, averaged over clips; "middle" are
the frames between a quarter and three quarters of the clip; the cross-fade blends the two given images linearly.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from bench.tiny_model import vae as whole
from bench.tiny_model.cache import Shape, Shard, make_shard
from bench.tiny_model.encoders import Encoders, quantize
from bench.tiny_model.export import check
from bench.tiny_model.photos import held_out_photos
from bench.tiny_model.render import clip
from bench.tiny_model.sampling import Sampler, sample
from bench.tiny_model.scenes import KINDS, sample_scene
from bench.tiny_model.train import DEFAULT_FOLDER
from bench.tiny_model.train_vae import psnr

EVALUATION_SEED = 5 * 10**6
SHEET_FRAMES = 9


@dataclass(frozen=True)
class Case:
    """One table of the evaluation: a canvas, how many clips of each kind, and the guidance scales to try."""

    shape: Shape
    per_kind: int
    scales: tuple[float, ...]
    wrong_prompts: bool = False
    sheet: bool = False


CASES = (
    Case(Shape(112, 64, 21), 2, (1.0, 5.0), wrong_prompts=True, sheet=True),
    Case(Shape(80, 80, 21), 1, (1.0,)),
    Case(Shape(64, 112, 26), 1, (1.0,)),
    Case(Shape(176, 96, 21), 1, (1.0, 5.0), sheet=True),
    Case(Shape(128, 128, 26), 1, (1.0,)),
)


def main() -> None:
    """Run every case and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = check(args.folder)
    encoders = Encoders(pipeline.tokenizer, pipeline.text_encoder.eval(), pipeline.image_encoder.eval())
    vae = whole.channels_last(pipeline.vae.eval())
    world = {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": args.steps, "shift": args.shift}
    for index in args.cases:
        sampler = Sampler(1.0, args.shift, args.steps)
        result = run_case(CASES[index], sampler, vae, encoders, pipeline.transformer, args.out) | world
        (args.out / f"{CASES[index].shape.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({name: value for name, value in result.items() if name != "clips"}, indent=1))


@torch.no_grad()
def run_case(
    case: Case, sampler: Sampler, vae: AutoencoderKLWan, encoders: Encoders, transformer: torch.nn.Module, out: Path
) -> dict:
    """Return the figures of one case: means over all clips, and the clips one by one."""
    shape = case.shape
    seeds, kinds = choose_seeds(case)
    shard = make_shard(vae, encoders, shape, seeds, held_out_photos())
    times = torch.linspace(0, 1, shape.frames)
    truth = torch.stack(
        [quantize(clip(seed, held_out_photos(), shape.width, shape.height, times)[0]) for seed in seeds]
    )
    videos = {"fade": cross_fade(truth), "vae": decode(vae, shard.x_NCTHW.float())}
    seconds = {}
    for scale in case.scales:
        start = time.perf_counter()
        setting = replace(sampler, guide_scale=scale)
        videos[f"model, guidance {scale:g}"] = decode(vae, sample(transformer, encoders, shard, setting))
        seconds[f"guidance {scale:g}"] = round((time.perf_counter() - start) / len(seeds), 2)
    if case.wrong_prompts:
        wrong = shard.captions[1:] + shard.captions[:1]
        setting = replace(sampler, guide_scale=case.scales[-1])
        name = f"model, guidance {case.scales[-1]:g}, another clip's prompt"
        videos[name] = decode(vae, sample(transformer, encoders, shard, setting, wrong))
    if case.sheet:
        write_sheet(truth, videos, case.scales, shard, out / f"sheet_{shape.name}")
    figures = {name: measure(truth, video) for name, video in videos.items()}
    return summarize(case, kinds, shard, figures) | {"seconds a clip": seconds}


def choose_seeds(case: Case) -> tuple[list[int], list[str]]:
    """Return unseen seeds with the same number of clips of each kind, in the order of `KINDS`."""
    aspect = case.shape.width / case.shape.height
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    seed = EVALUATION_SEED + case.shape.tokens
    while any(len(seeds) < case.per_kind for seeds in found.values()):
        kind = sample_scene(seed, held_out_photos(), aspect).kind
        if len(found[kind]) < case.per_kind:
            found[kind].append(seed)
        seed += 1
    return [s for kind in KINDS for s in found[kind]], [kind for kind in KINDS for _ in found[kind]]


def cross_fade(truth_NCTHW: Tensor) -> Tensor:
    """Blend the first frame into the last one."""
    weight = torch.linspace(0, 1, truth_NCTHW.shape[2]).view(1, 1, -1, 1, 1)
    return torch.lerp(truth_NCTHW[:, :, :1], truth_NCTHW[:, :, -1:], weight)


def decode(vae: AutoencoderKLWan, latents_NCTHW: Tensor) -> Tensor:
    """Return the pixels of normalised latents, two clips at a time (one alone is slower on a CPU)."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return torch.cat([whole.decode(vae, z * std + mean).clamp(-1, 1) for z in latents_NCTHW.split(2)])


def measure(truth: Tensor, video: Tensor) -> dict[str, list[float]]:
    """Return PSNR by clip and the middle frames' gradient energy relative to the truth's."""
    frames = truth.shape[2]
    middle = slice(frames // 4, frames - frames // 4)
    return {
        "all": psnr(truth, video, (1, 2, 3, 4)).tolist(),
        "middle": psnr(truth[:, :, middle], video[:, :, middle], (1, 2, 3, 4)).tolist(),
        "first": psnr(truth[:, :, 0], video[:, :, 0], (1, 2, 3)).tolist(),
        "last": psnr(truth[:, :, -1], video[:, :, -1], (1, 2, 3)).tolist(),
        "sharpness": (energy(video[:, :, middle]) / energy(truth[:, :, middle]).clamp(min=1e-8)).tolist(),
    }


def energy(video: Tensor) -> Tensor:
    """Return each clip's mean squared spatial gradient."""
    return video.diff(dim=-1).square().mean((1, 2, 3, 4)) + video.diff(dim=-2).square().mean((1, 2, 3, 4))


def summarize(case: Case, kinds: list[str], shard: Shard, figures: dict[str, dict[str, list[float]]]) -> dict:
    """Return rounded means, means by kind, and every clip."""
    count = len(kinds)
    better = {
        name: f"{sum(a > b for a, b in zip(figure['all'], figures['fade']['all'], strict=True))} of {count}"
        for name, figure in figures.items()
        if name.startswith("model")
    }
    by_kind = {
        kind: {
            name: round(sum(v for v, k in zip(f["all"], kinds, strict=True) if k == kind) / kinds.count(kind), 2)
            for name, f in figures.items()
        }
        for kind in dict.fromkeys(kinds)
    }
    clips = [
        {"kind": kind, "caption": text} | {name: round(f["all"][i], 2) for name, f in figures.items()}
        for i, (kind, text) in enumerate(zip(kinds, shard.captions, strict=True))
    ]
    means = {n: {key: round(sum(v) / count, 2) for key, v in f.items()} for n, f in figures.items()}
    return {
        "canvas": f"{case.shape.width}x{case.shape.height}, {case.shape.frames} frames",
        "mean": means,
        "better than the cross-fade": better,
        "by kind": by_kind,
        "clips": clips,
    }


def write_sheet(truth: Tensor, videos: dict[str, Tensor], scales: tuple[float, ...], shard: Shard, stem: Path) -> None:
    """Write a contact sheet: for each clip the truth, the model at each guidance, and the cross-fade, one row each."""
    columns = torch.linspace(0, truth.shape[2] - 1, SHEET_FRAMES).round().long()
    rows = []
    names = [f"model, guidance {scale:g}" for scale in scales]
    for index in range(len(truth)):
        shown = [truth, *(videos[name] for name in names), videos["fade"]]
        rows.extend(torch.cat(list(video[index][:, columns].unbind(1)), 2) for video in shown)
        rows.append(torch.full((3, 4, rows[-1].shape[2]), 1.0))
    pixels = ((torch.cat(rows, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(stem.with_suffix(".png"), optimize=True)
    order = ["truth", *names, "cross-fade"]
    text = "\n".join(f"{i + 1}. {caption}" for i, caption in enumerate(shard.captions))
    stem.with_suffix(".txt").write_text(f"rows of each clip: {', '.join(order)}\n{text}\n")


if __name__ == "__main__":
    main()
