"""Everything that needs a card: correctness first, then 14B-size timings and memory beside diffusers in the same run.

python -m bench.gpu [--list] [--stage NAME ...] [--device cuda:0] [--size full|small] [--runs 3]

Weights are random where the real ones would be 33 GB; time and memory do not depend on their values. A stage whose
check fails is reported, is not timed, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.gpu_kernels import kernel_speed, kernels
from bench.gpu_stage import SIZES, Bench, CheckFailed, check, random_state
from bench.gpu_step import int8_step, int8_step_720p, int8_step_compiled
from bench.world import measure
from tests import parity
from wan_local.checkpoint import ModelFiles, find_model
from wan_local.denoise import Guided
from wan_local.geometry import Geometry
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context, stays_float32
from wan_local.models.vae import Vae
from wan_local.offload import FlatBlock, Residency, StreamedBlocks
from wan_local.pipeline import generate
from wan_local.planner import StagePlan, chunk_tokens, spread
from wan_local.request import Request
from wan_local.settings import load_settings
from wan_local.stage import stage
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
    from diffusers import WanTransformer3DModel

    config = bench.config.transformer
    with torch.device("meta"):
        once, ours = ContextEmbedder(config), Transformer(config)
        peer = WanTransformer3DModel(
            num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
            freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers, image_dim=config.image_dim,
            added_kv_proj_dim=config.dim, pos_embed_seq_len=config.image_tokens,
        )  # fmt: skip
    state = random_state(peer, bench)
    once.load_state_dict({name: tensor for name, tensor in state.items() if in_context(name)}, assign=True)
    ours.load_state_dict({name: tensor for name, tensor in state.items() if not in_context(name)}, assign=True)
    kept = peer._keep_in_fp32_modules
    peer_state = {k: v.float() if any(part in k for part in kept) else v.to(bench.dtype) for k, v in state.items()}
    peer.load_state_dict(peer_state, assign=True)
    peer.rope.to_empty(device=bench.device)
    peer.rope.__init__(config.attention_head_dim, config.patch_size, 1024)  # its tables are no parameters
    peer.rope.to(bench.device)
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


def streaming(bench: Bench) -> None:
    """Streamed blocks against resident ones: bit-equal on the tiny model, step time and peak at full size."""
    files = find_model(load_settings(model="tiny"))
    expected = _tiny_velocities(bench, files, None)
    for resident in range(files.config.transformer.num_layers - 1):
        for source in ("ram", "file"):
            plan = StagePlan("denoise", 0, 0, resident_blocks=resident, source=source)
            for _ in range(5):
                got = _tiny_velocities(bench, files, plan)
                unequal = sum(not torch.equal(a, b) for a, b in zip(got, expected, strict=True))
                check(f"unequal tensors, {resident} resident, from {source}", unequal, 0)
    bench.report("streaming", who="tiny model, every resident count, from RAM and from file", bit_equal=True)
    for size in SIZES[bench.size]:
        for resident in (None, 0):
            _streamed_step(bench, Geometry(size, 81), resident)


def _tiny_velocities(bench: Bench, files: ModelFiles, plan: StagePlan | None) -> list[Tensor]:
    config = files.config.transformer
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, config.in_channels, 21, 10, 10, generator=generator).to(bench.device)
    text = torch.randn(2, 1, config.text_tokens, config.text_dim, generator=generator).to(bench.device)
    images = torch.randn(1, config.image_tokens, config.image_dim, generator=generator).to(bench.device)
    with stage("context_embedder", files, bench.device, bench.dtype, plan=plan) as embedder:
        contexts = [embedder(prompt, images) for prompt in text]
        modulations = embedder.modulations(torch.tensor([500, 900]))
    with stage("transformer", files, bench.device, bench.dtype, plan=plan) as network:
        return [v for modulation in modulations.values() for v in network(latents, modulation, contexts)]


def _streamed_step(bench: Bench, geometry: Geometry, resident: int | None) -> None:
    """One guided prediction with random weights; `resident` None keeps every block on the card."""
    config, device = bench.config.transformer, bench.device
    with torch.device("meta"):
        network, once = Transformer(config), ContextEmbedder(config)
    blocks = list(network.blocks)
    layouts = [FlatBlock(block, lambda name: torch.float32 if stays_float32(name) else bench.dtype) for block in blocks]
    example = {name: tensor.cpu() for name, tensor in random_state(blocks[0], bench).items()}

    def fill(_: int, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            view.copy_(example[name])

    keep = spread(len(blocks), len(blocks) if resident is None else resident)
    for index in keep:
        layouts[index].onto(blocks[index], torch.empty(layouts[index].nbytes, dtype=torch.uint8, device=device))
        fill(index, dict(blocks[index].named_parameters()))
    network.blocks = StreamedBlocks(blocks, layouts, fill, Residency(keep, "ram"), device)
    rest = {name: tensor for name, tensor in random_state(network, bench).items() if not name.startswith("blocks.")}
    network.load_state_dict(rest, strict=False, assign=True)
    once.load_state_dict(random_state(once, bench), assign=True)
    grid = (geometry.latent_frames, geometry.latent_size.height, geometry.latent_size.width)
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=bench.dtype)
    images = torch.randn(1, config.image_tokens, config.image_dim, device=device, dtype=bench.dtype)
    context, modulations = once(text, images), once.modulations(torch.tensor([700]))
    condition = torch.randn(1, config.in_channels - config.out_channels, *grid, device=device)
    chunk = chunk_tokens(config, geometry.tokens, bench.dtype.itemsize)
    guided = Guided(network, condition, modulations, context, context, 5.0, together=True, chunk_tokens=chunk)
    del once
    latents = torch.randn(1, config.out_channels, *grid, device=device)
    measured = measure(lambda: guided.predict(latents, 700), device, runs=bench.runs)
    who = "all blocks resident" if resident is None else f"{resident} blocks resident, the others from RAM"
    bench.report("streaming", who=who, size=str(geometry.size), tokens=geometry.tokens, **measured.row())
    network.blocks.close()


def vae(bench: Bench) -> None:
    """Decode 81 frames in float32: ours streamed in time, diffusers' with its spatial tiling."""
    from diffusers import AutoencoderKLWan

    config = bench.config.vae
    with torch.device("meta"):
        ours = Vae(config)
    ours.load_state_dict(random_state(ours, bench, dtype=torch.float32), assign=True)
    peer = AutoencoderKLWan(base_dim=config.base_dim, num_res_blocks=config.num_res_blocks).to(bench.device).eval()
    peer.load_state_dict(ours.state_dict())
    for size in SIZES[bench.size]:
        geometry = Geometry(size, 81)
        shape = (1, config.z_dim, geometry.latent_frames, geometry.latent_size.height, geometry.latent_size.width)
        latents = torch.randn(shape, device=bench.device) * 0.1

        def stream(latents: Tensor = latents) -> Tensor:
            return torch.cat([chunk[..., :8, :8].clamp(-1, 1) for chunk in ours.decode(latents)], dim=2)

        def whole(latents: Tensor = latents) -> Tensor:
            return peer.decode(ours.denormalize(latents)).sample

        peer.disable_tiling()
        short = latents[:, :, :3]
        check("vae against diffusers", parity.relative_error(stream(short), whole(short)[..., :8, :8]), 1e-3)
        peer.enable_tiling()
        for name, work in (("wan_local", stream), ("diffusers tiled", whole)):
            measured = measure(work, bench.device, runs=bench.runs)
            bench.report("vae", who=name, size=str(size), frames=81, **measured.row())


def _cast(net: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in net.named_parameters():
        if not stays_float32(name):
            parameter.data = parameter.data.to(dtype)


STAGES: dict[str, Callable[[Bench], None]] = {
    "correctness": correctness,
    "tiny": tiny,
    "transformer": transformer,
    "streaming": streaming,
    "vae": vae,
    "kernels": kernels,
    "kernel_speed": kernel_speed,
    "int8_step": int8_step,
    "int8_step_720p": int8_step_720p,
    "int8_step_compiled": int8_step_compiled,
}


@contextmanager
def _fresh_memory(device: torch.device) -> Iterator[None]:
    yield
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=list(STAGES))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:12} {(work.__doc__ or '').splitlines()[0]}" for name, work in STAGES.items()))
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)
    bench = Bench(torch.device(options.device), options.size, options.runs)
    failed = []
    for name in options.stage or STAGES:
        print(f"== {name}", flush=True)
        with _fresh_memory(bench.device):
            try:
                STAGES[name](bench)
            except (CheckFailed, torch.cuda.OutOfMemoryError) as error:
                failed.append(name)
                bench.report(name, failed=str(error)[:300])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
