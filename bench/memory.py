"""What the planner predicts beside what is measured, and the VAE beside diffusers' in the same run.

python -m bench.memory [--device cpu] [--runs 3] [--stage encode|decode|plan ...]

A VAE of the real one's depth and a third of its width, random weights, float32. On a card peaks are the allocator's, on
a CPU the growth of the resident set while the work runs. Rows go to bench/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.world import append_row, describe
from tests import parity
from wan_local.conditioning import encode_condition
from wan_local.decode import decode_frames
from wan_local.device import held_bytes, peak_bytes, reset_peak
from wan_local.geometry import Geometry, Size
from wan_local.models.vae import Vae
from wan_local.pipeline import generate
from wan_local.request import Request
from wan_local.settings import VaeConfig, load_settings
from wan_local.tiling import WHOLE, Tiling
from wan_local.vae_cost import kept_bytes, vae_bytes, vae_flops

IMAGES = Path(__file__).parents[1] / "tests" / "images"
CONFIG = VaeConfig(32, 16, (1, 2, 4, 4), 2, (False, True, True), (0.0,) * 16, (1.0,) * 16)
DECODED = Geometry(Size(384, 512), 17)
ENCODED = Geometry(Size(192, 256), 81)
PEER_TILES = 256  # pixels, diffusers' default, with a stride of 192


def networks(device: torch.device) -> tuple[Vae, Any]:
    """Return our VAE and diffusers' with the same random weights."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    peer = AutoencoderKLWan(base_dim=CONFIG.base_dim, latents_mean=[0.0] * 16, latents_std=[1.0] * 16).eval()
    ours = Vae(CONFIG).eval()
    ours.load_state_dict(peer.state_dict())
    for module in (peer, ours):
        module.requires_grad_(False)
        if device.type == "cpu":
            for parameter in module.parameters():
                if parameter.dim() == 5:  # the layout that our stage loads them in, for both
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        module.to(device)
    return ours, peer


def measured(work: Callable[[], Any], device: torch.device, runs: int) -> dict[str, Any]:
    """Return the median of `runs` and the most that was held on top of what was there before."""
    seconds, peaks = [], []
    for _ in range(runs):
        reset_peak(device)
        before, started = held_bytes(device), time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        peaks.append((peak_bytes(device) or 0) - before)
    spread = [round(min(seconds), 2), round(max(seconds), 2)]
    return {
        "n": runs,
        "median_seconds": round(statistics.median(seconds), 2),
        "spread_seconds": spread,
        "grown_bytes": max(peaks),
    }


def decode(device: torch.device, runs: int) -> None:
    """Latents to uint8 frames: whole, in exact tiles, and by diffusers' blended tiles."""
    ours, peer = networks(device)
    latent = DECODED.latent_size
    latents = torch.randn(1, 16, DECODED.latent_frames, latent.height, latent.width, device=device) * 0.5
    peer.enable_tiling()

    def frames(tiling: Tiling) -> Callable[[], Any]:
        return lambda: [part.frames.sum() for part in decode_frames(ours, latents, DECODED, tiling=tiling)]

    whole = torch.cat(list(ours.decode(latents)), dim=2)
    for tiling in (WHOLE, Tiling(1, 2), Tiling(2, 2)):
        predicted = vae_bytes("decoder", DECODED, CONFIG, tiling) + kept_bytes("decoder", DECODED, CONFIG, tiling)
        row = measured(frames(tiling), device, runs)
        tiled = torch.empty_like(whole)
        for tile in ours.decode_tiles(latents, tiling):
            until = tile.first + tile.pixels.shape[2]
            tiled[:, :, tile.first : until, tile.window.rows.slice, tile.window.columns.slice] = tile.pixels
        report(
            "decode", device, DECODED, who=f"wan_local, {tiling} tiles", predicted_bytes=predicted,
            flops=vae_flops("decoder", DECODED, CONFIG, tiling), error=parity.relative_error(tiled, whole), **row,
        )  # fmt: skip
    row = measured(lambda: peer.decode(latents).sample, device, runs)
    blended = peer.decode(latents).sample
    error = parity.relative_error(blended, whole.clamp(-1, 1))
    report("decode", device, DECODED, who=f"diffusers, tiles of {PEER_TILES} pixels", error=error, **row)


def encode(device: torch.device, runs: int) -> None:
    """The condition of 81 frames: ours without what repeats, in tiles too, and diffusers' whole clip."""
    ours, peer = networks(device)
    start, end = (torch.rand(3, ENCODED.size.height, ENCODED.size.width) * 2 - 1 for _ in range(2))
    clip = torch.zeros(1, 3, ENCODED.num_frames, ENCODED.size.height, ENCODED.size.width, device=device)
    clip[:, :, 0], clip[:, :, -1] = start, end
    expected: Tensor = peer.encode(clip).latent_dist.mode()

    def ours_encode(tiling: Tiling) -> Tensor:
        return encode_condition(ours, (start, end), ENCODED.num_frames, tiling=tiling)[:, 4:]

    for tiling in (WHOLE, Tiling(1, 2)):
        predicted = vae_bytes("encoder", ENCODED, CONFIG, tiling) + kept_bytes("encoder", ENCODED, CONFIG, tiling)
        error = parity.relative_error(ours_encode(tiling), expected)
        row = measured(lambda tiling=tiling: ours_encode(tiling), device, runs)
        report(
            "encode", device, ENCODED, who=f"wan_local, {tiling} tiles", predicted_bytes=predicted, error=error, **row
        )
    row = measured(lambda: peer.encode(clip), device, runs)
    report("encode", device, ENCODED, who="diffusers", error=0.0, **row)


def plan(device: torch.device, runs: int) -> None:
    """A whole run of the tiny model: planned and measured bytes by stage."""
    request = Request(
        prompt="a small blue bird takes off",
        start_image_url=IMAGES / "first_frame.png",
        end_image_url=IMAGES / "last_frame.png",
        resolution="480p",
        num_inference_steps=4,
        seed=42,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(model="tiny", device=str(device), state_dir=folder, cache_dir=f"{folder}/cache")
        result = generate(request, settings=settings, output=Path(folder) / "out.mp4")
    size = Geometry(Size(result.report["height"], result.report["width"]), result.report["num_frames"])
    for name, figures in result.report["memory"].items():
        report("plan", device, size, who=name, **figures)


def report(stage: str, device: torch.device, geometry: Geometry, **row: Any) -> None:
    append_row(
        "memory",
        {"stage": stage, "size": str(geometry.size), "frames": geometry.num_frames, **row, "world": describe(device)},
    )


STAGES: dict[str, Callable[[torch.device, int], None]] = {"decode": decode, "encode": encode, "plan": plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=list(STAGES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)
    for name in options.stage or STAGES:
        STAGES[name](torch.device(options.device), options.runs)


if __name__ == "__main__":
    main()
