"""Everything that needs a card: correctness first, then 14B-size timings and memory beside diffusers in the same run.

python -m bench.gpu [--list] [--stage NAME ...] [--budget SECONDS] [--results DIR] [--device cuda:0]
                    [--size full|small] [--runs 2] [--guide-scale 5] [--kernels off|auto]

Stages run in the order in which they are named. Weights are random where the real ones would be 33 GB; time and memory
do not depend on their values. A stage whose check fails is reported, is not timed, and makes the exit code 1; the
others go on, in a new process where the card does not answer any more. Rows are written as they come. Once the budget
is used up, no stage is begun and nothing more is timed.

Needs torch with triton, transformers, safetensors, and wheels of diffusers, optimum-quanto, av, pydantic, ftfy, Pillow,
accelerate with psutil, without which diffusers' group offload does not run.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.gpu_kernels import kernel_speed, kernels
from bench.gpu_offload import offload
from bench.gpu_stage import SIZES, Bench, check, random_state
from bench.gpu_step import int8_step, int8_step_720p, int8_step_compiled
from bench.gpu_streaming import streaming
from bench.gpu_vae import vae
from bench.gpu_whole_run import whole_run
from bench.peer import peer_on_meta, with_weights
from bench.world import RESULTS, measure
from tests import parity
from wan_local.denoise import Guided
from wan_local.geometry import Geometry
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context, stays_float32
from wan_local.pipeline import generate
from wan_local.planner import chunk_tokens
from wan_local.request import Request
from wan_local.settings import load_settings
from wan_local.video import read_video

IMAGES = Path(__file__).parents[1] / "tests" / "images"
GPU_TOLERANCE = 10  # times the CPU's, as golden.json says for float32 with TF32 off


def correctness(bench: Bench) -> None:
    """Golden cases on the card in float32, and in the compute dtype as relative rms."""
    data, device = parity.tensors("dit_cases"), bench.device
    net = parity.official_transformer()
    net.context_embedder.to(device)
    net.transformer.to(device)
    text = torch.zeros(1, 512, data["A.context"].shape[1])
    text[0, : len(data["A.context"])] = data["A.context"]
    latents = torch.cat((data["A.x"], data["A.y"])).unsqueeze(0).to(device)
    images = data["A.clip_fea"].flatten(0, 1).unsqueeze(0).to(device)
    expected = data["A.out.t999"].unsqueeze(0)
    got = net(latents, 999, text.to(device), images).cpu()
    error = parity.relative_error(got, expected)
    check("transformer float32", error, GPU_TOLERANCE * parity.golden()["tolerances"]["dit"])
    for half in (net.context_embedder, net.transformer):
        _cast(half, bench.dtype)
    got = net(latents, 999, text.to(device), images).cpu()
    rms = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    check(f"transformer {bench.dtype}", rms, 0.02)
    vae_data, vae = parity.tensors("vae_cases"), parity.official_vae().to(device)
    decoded = torch.cat(list(vae.decode(vae_data["dec0.latent"].unsqueeze(0).to(device))), dim=2)[0].cpu()
    vae_error = parity.relative_error(decoded, vae_data["dec0.raw"])
    check("vae decode float32", vae_error, GPU_TOLERANCE * parity.golden()["tolerances"]["vae"])
    bench.report("correctness", transformer_max=error, transformer_rms_compute_dtype=rms, vae_max=vae_error)


def tiny(bench: Bench) -> None:
    """The embedded model from two real images to an mp4, on the card and on the CPU: nearly the same video."""
    request = Request(
        prompt="a small blue bird takes off",
        start_image_url=IMAGES / "first_frame.png",
        end_image_url=IMAGES / "last_frame.png",
        resolution="480p",
        acceleration="none",
        seed=42,
    )
    videos, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", str(bench.device)):
            settings = load_settings(model="tiny", device=device, precision="reference")
            started = time.perf_counter()
            generate(request, settings=settings, output=Path(folder) / f"{device.replace(':', '_')}.mp4")
            seconds.append(round(time.perf_counter() - started, 2))
            videos.append(read_video(Path(folder) / f"{device.replace(':', '_')}.mp4").astype(np.float64))
    mse = float(np.mean((videos[0] - videos[1]) ** 2))
    psnr = 99.0 if mse == 0 else float(10 * np.log10(255**2 / mse))
    check("dB below 30 between card and CPU", max(0.0, 30.0 - psnr), 0.0)
    bench.report("tiny", psnr_to_cpu=round(psnr, 2), seconds_cpu=seconds[0], seconds_device=seconds[1])


def transformer(bench: Bench) -> None:
    """One guided prediction of a whole transformer, ours and diffusers', on the same random weights."""
    config = bench.config.transformer
    with torch.device("meta"):
        once, ours = ContextEmbedder(config), Transformer(config)
    peer = peer_on_meta(config)
    state = random_state(peer, bench)
    once.load_state_dict({name: tensor for name, tensor in state.items() if in_context(name)}, assign=True)
    ours.load_state_dict({name: tensor for name, tensor in state.items() if not in_context(name)}, assign=True)
    with_weights(peer, state, bench.dtype, bench.device, config)
    for size in SIZES[bench.size]:
        _one_size_of_transformer(bench, (once.eval(), ours.eval()), peer.eval(), Geometry(size, 81))


def _one_size_of_transformer(
    bench: Bench, halves: tuple[ContextEmbedder, Transformer], peer: Any, geometry: Geometry
) -> None:
    once, ours = halves
    config, device = ours.config, bench.device
    grid = (geometry.latent_frames, geometry.latent_size.height, geometry.latent_size.width)
    latents = torch.randn(1, config.out_channels, *grid, device=device)
    condition = torch.randn(1, config.in_channels - config.out_channels, *grid, device=device)
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=bench.dtype)
    images = torch.randn(1, config.image_tokens, config.image_dim, device=device, dtype=bench.dtype)
    timestep = torch.tensor([700], device=device)
    context, chunk = once(text, images), chunk_tokens(config, geometry.tokens, bench.dtype.itemsize)
    guided = Guided(ours, condition, once.modulations(timestep), context, context, 5.0, chunk_tokens=chunk)
    inputs = torch.cat((latents, condition), dim=1).to(bench.dtype)
    two_rows = images.reshape(2, -1, config.image_dim)

    def peer_prediction() -> Tensor:
        both = [peer(inputs, timestep, text, two_rows, return_dict=False)[0].float() for _ in range(2)]
        return both[1] + 5.0 * (both[0] - both[1])

    got, expected = guided.predict(latents, 700)[0], peer_prediction()
    rms = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    check("transformer against diffusers", rms, 0.03 if bench.dtype == torch.bfloat16 else 1e-3)
    works: dict[str, Callable[[], Any]] = {
        "wan_local": lambda: guided.predict(latents, 700),
        "diffusers": peer_prediction,
    }
    for name, work in works.items():
        measured = measure(work, device, runs=bench.runs)
        bench.report(
            "transformer", who=name, size=str(geometry.size), tokens=geometry.tokens, rms=rms, **measured.row()
        )


def _cast(net: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in net.named_parameters():
        if not stays_float32(name):
            parameter.data = parameter.data.to(dtype)


STAGES: dict[str, Callable[[Bench], None]] = {
    "correctness": correctness,
    "tiny": tiny,
    "transformer": transformer,
    "streaming": streaming,
    "offload": offload,
    "vae": vae,
    "whole_run": whole_run,
    "kernels": kernels,
    "kernel_speed": kernel_speed,
    "int8_step": int8_step,
    "int8_step_720p": int8_step_720p,
    "int8_step_compiled": int8_step_compiled,
}


def _attempt(bench: Bench, name: str) -> bool:
    """Run a stage; what fails is reported and does not stop the others. Return whether it ended well."""
    try:
        STAGES[name](bench)
        _collect(bench.device)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other stages go on
        print("".join(traceback.format_exception(error)[-6:]), file=sys.stderr, flush=True)
        bench.report(name, failed=f"{type(error).__name__}: {error}"[:500])
        traceback.clear_frames(error.__traceback__)
        return False
    return True


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _answers(device: torch.device) -> bool:
    """Free what a failed stage left, and tell whether the card still works: after some errors it never does again."""
    try:
        _collect(device)
    except RuntimeError as error:
        print(f"the card does not answer any more: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _in_new_process(options: argparse.Namespace, names: list[str], seconds: float) -> int:
    command = [sys.executable, "-m", "bench.gpu", *(f"--stage={name}" for name in names)]
    same = ("device", "size", "runs", "results", "guide_scale", "kernels")
    command += [f"--{option.replace('_', '-')}={getattr(options, option)}" for option in same]
    if math.isfinite(seconds):
        command.append(f"--budget={seconds}")
    return subprocess.run(command, check=False).returncode


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="may be given several times")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where rows are appended")
    parser.add_argument("--guide-scale", type=float, default=5.0, help="of whole_run; 1 is half the work")
    parser.add_argument("--kernels", default="off", help="of whole_run; auto compiles and tries them first")
    return parser.parse_args()


def main() -> int:
    options = _options()
    if options.list:
        print("\n".join(f"{name:14} {(work.__doc__ or '').splitlines()[0]}" for name, work in STAGES.items()))
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)
    device, deadline = torch.device(options.device), time.monotonic() + options.budget
    bench = Bench(device, options.size, options.runs, options.results, deadline, options.guide_scale, options.kernels)
    left, failed = list(options.stage or STAGES), False
    while left:
        name = left.pop(0)
        print(f"== {name}, {bench.seconds_left():.0f} s left", flush=True)
        if not bench.has_time(name, "the stage", 1.0):
            continue
        if not _attempt(bench, name):
            failed = True
            if not _answers(device):
                return _in_new_process(options, left, bench.seconds_left()) or 1 if left else 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
