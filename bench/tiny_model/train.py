"""Trains the tiny model from nothing: `python -m bench.tiny_model.train --work /some/scratch/folder`.

Stages run in order and are skipped once their result is in the work folder: a stopped run goes on where it was.
`--only` picks stages; `cache` and `transformer` may run side by side, since training picks up shards as they appear.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from bench.tiny_model import cache, train_transformer, train_vae
from bench.tiny_model.encoders import Encoders, build_encoders, load_encoders
from bench.tiny_model.export import build_vae_with_statistics, export, export_networks
from bench.tiny_model.log import Log
from bench.tiny_model.photos import held_out_photos, on_device, training_photos
from bench.tiny_model.transformer import build_transformer
from bench.tiny_model.vae import build_vae, channels_last

STAGES = ("images", "clips", "statistics", "cache", "transformer", "guidance", "decoder", "export")
SECONDS = {"images": 900.0, "clips": 900.0, "transformer": 3420.0, "guidance": 600.0, "decoder": 600.0}
PEAK_RATES = {"images": 1e-2, "clips": 2.5e-3, "decoder": 2e-3}
"""A clip's frames are alike, so the taps of a 3-D convolution move together: more than this undoes the image stage."""
DEFAULT_FOLDER = Path(__file__).parents[2] / "wan_local" / "tiny_model"
VALIDATION_SEED = 3 * 10**6
CACHE_SEED = 10**3


def main() -> None:
    """Run the chosen stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder: states, latents, intermediate results"
    )
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the model folder is written")
    parser.add_argument("--log", type=Path, default=None, help="log file (default: <work>/train.log)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the networks while they train and encode",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every stage's training time")
    parser.add_argument(
        "--base",
        type=Path,
        help="a model folder whose VAE, encoders and tokenizer are kept: only the transformer is made",
    )
    parser.add_argument(
        "--cache-processes", type=int, default=0, help="fill the cache by so many processes while the rest trains"
    )
    parser.add_argument("--rounds", type=int, default=5, help="size of the latent cache")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    log = Log(args.log or args.work / "train.log")
    encoders = load_encoders(args.base) if args.base else build_encoders(args.work / "tokenizer")
    if args.base:
        keep_vae(args.base, args.work)
    with cache_being_filled(args):
        for stage in STAGES:
            if stage in args.only:
                run(stage, args, encoders, log)


@contextmanager
def cache_being_filled(args: argparse.Namespace) -> Iterator[None]:
    """Let other processes fill the cache, on the device too, for as long as this one trains."""
    command = [sys.executable, "-m", "bench.tiny_model.train", "--only", "cache", "--threads", "1"]
    command += ["--work", str(args.work), "--device", args.device, "--dtype", args.dtype, "--rounds", str(args.rounds)]
    command += ["--base", str(args.base)] if args.base else []
    children = [
        subprocess.Popen([*command, "--log", str(args.work / f"cache_{index}.log")], stdout=subprocess.DEVNULL)
        for index in range(args.cache_processes)
    ]
    try:
        yield
    finally:
        for child in children:
            child.terminate()
            child.wait()


def run(stage: str, args: argparse.Namespace, encoders: Encoders, log: Log) -> None:
    """Run one stage."""
    if stage in ("images", "clips"):
        vae = build_vae()
        if stage == "clips":
            vae.load_state_dict(torch.load(args.work / "vae_images.pt", weights_only=True, map_location="cpu"))
        train_vae.train_stage(vae, vae_settings(stage, args, hold=0.4), args.work, log)
    elif stage == "statistics":
        measure(args, log)
    elif stage == "cache":
        if not args.cache_processes:
            fill_cache(args, encoders, log)
    elif stage == "transformer":
        settings = transformer_settings(stage, args)
        train_transformer.train(build_transformer(), settings, args.work, args.work / "latents", encoders, log)
    elif stage == "guidance":
        settings = transformer_settings(stage, args).for_guidance()
        taught = args.work / "transformer.pt"
        for stale in (args.work / "guidance.pt", args.work / "guidance_partial.pt"):
            if stale.exists() and stale.stat().st_mtime < taught.stat().st_mtime:
                stale.unlink()  # the transformer was trained further
        model = load_transformer(taught)
        train_transformer.train(model, settings, args.work, args.work / "latents", encoders, log)
    elif stage == "decoder":
        train_vae.train_stage(load_vae(args.work), vae_settings(stage, args, hold=0.2), args.work, log)
    else:
        write(args, encoders, log)


def transformer_settings(stage: str, args: argparse.Namespace) -> train_transformer.Settings:
    """Return how the transformer is trained on the device."""
    seconds, half = SECONDS[stage] * args.scale, args.dtype == "bfloat16"
    if args.device == "cpu":
        return train_transformer.Settings(seconds, half=half)
    return train_transformer.Settings.on_card(seconds, args.device, half=half)


def load_transformer(weights: Path) -> WanTransformer3DModel:
    """Return the transformer with weights of its training: finished ones, or a state's running average."""
    state = torch.load(weights, weights_only=True, map_location="cpu")
    transformer = build_transformer()
    transformer.load_state_dict(state.get("average", state))
    return transformer


def vae_settings(stage: train_vae.Stage, args: argparse.Namespace, *, hold: float) -> train_vae.Settings:
    """Return how a stage of the VAE is trained on the device."""
    seconds, rate = SECONDS[stage] * args.scale, PEAK_RATES[stage]
    if args.device == "cpu":
        return train_vae.Settings(stage, seconds, rate, hold=hold)
    return train_vae.Settings.on_card(stage, seconds, rate, args.device, hold=hold)


def measure(args: argparse.Namespace, log: Log) -> None:
    """Measure the latents of the frozen encoder once."""
    path = args.work / "statistics.pt"
    if path.exists():
        return
    vae = build_vae()
    vae.load_state_dict(torch.load(args.work / "vae_clips.pt", weights_only=True, map_location="cpu"))
    mean, std = train_vae.measure_latents(vae.to(args.device), args.device)
    torch.save({"mean": mean, "std": std}, path)
    log.write(f"latents: mean {[round(v, 3) for v in mean]} std {[round(v, 3) for v in std]}")


def keep_vae(base: Path, work: Path) -> None:
    """Put a finished model's VAE where its training would have left it, once."""
    if (work / "statistics.pt").exists():
        return
    vae = AutoencoderKLWan.from_pretrained(base / "vae", torch_dtype=torch.float32)
    for name in ("images", "clips"):
        torch.save(vae.state_dict(), work / f"vae_{name}.pt")
    torch.save({"mean": vae.config.latents_mean, "std": vae.config.latents_std}, work / "statistics.pt")


def load_vae(work: Path) -> AutoencoderKLWan:
    """Return the VAE with its statistics: with the refined decoder once there is one."""
    statistics = torch.load(work / "statistics.pt", weights_only=True, map_location="cpu")
    vae = build_vae_with_statistics(statistics["mean"], statistics["std"])
    refined = work / "vae_decoder.pt"
    vae.load_state_dict(
        torch.load(refined if refined.exists() else work / "vae_clips.pt", weights_only=True, map_location="cpu")
    )
    return channels_last(vae).eval()


def fill_cache(args: argparse.Namespace, encoders: Encoders, log: Log) -> None:
    """Encode validation and training clips."""
    device = torch.device(args.device)
    vae = load_vae(args.work).to(device, getattr(torch, args.dtype))
    source = cache.Source(vae, encoders, on_device(held_out_photos(), device), VALIDATION_SEED)
    cache.fill(source, args.work / "validation", cache.validation_plan(), log)
    source = dataclasses.replace(source, photos=on_device(training_photos(), device), first_seed=CACHE_SEED)
    cache.fill(source, args.work / "latents", cache.training_plan(args.rounds), log)


def write(args: argparse.Namespace, encoders: Encoders, log: Log) -> None:
    """Export the newest weights; while they are still trained, their running average."""
    found = [*args.work.glob("guidance*.pt"), *args.work.glob("transformer*.pt")]
    if not found:
        raise SystemExit(f"{args.work} holds no transformer yet: train one first")
    weights = max(found, key=lambda path: path.stat().st_mtime)
    transformer = load_transformer(weights)
    if args.base:
        export_networks(args.folder, args.work / "export", load_vae(args.work), transformer)
    else:
        export(args.folder, args.work / "export", encoders, load_vae(args.work), transformer)
    log.write(f"exported {weights.stem}")


if __name__ == "__main__":
    main()
