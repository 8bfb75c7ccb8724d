"""A mid-size model on a CPU, ours and diffusers', each in a process of its own: seconds, RAM, and what was planned.

python -m bench.memory --scratch DIR [--runs 2] [--stage denoise|decode|encode|plan ...]

    denoise    a guided step of 16 blocks of dim 1536, 1.8 GB of random weights in bfloat16 files: every block in RAM,
               or each brought from its file while the one before it computes; the files need 7 GB of disk
    decode     a VAE of the real one's depth and a third of its width: latents to uint8 frames, whole and in tiles
    encode     the same VAE: the condition of 81 frames
    plan       a whole run of the embedded model: planned and measured bytes by stage, as its report has them

RAM is what a process takes beside mapped files. Rows go to bench/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.int8_block import mid_size
from bench.own_process import Contender, Work, in_own_process, measure_here, result_of
from bench.peer import peer_on_meta
from bench.random_model import TINY, random_source, write_random_part
from bench.world import append_row, describe
from tests import parity
from wan_local.checkpoint import ModelFiles
from wan_local.conditioning import encode_condition
from wan_local.convert import Conversion, convert
from wan_local.decode import decode_frames
from wan_local.denoise import Guided
from wan_local.geometry import Geometry, Size
from wan_local.key_map import PARTS
from wan_local.manifest import read_manifest
from wan_local.pipeline import generate
from wan_local.planner import Machine, plan_within
from wan_local.quantize import default_arithmetic
from wan_local.request import Request
from wan_local.settings import VaeConfig, known_models, load_settings
from wan_local.stage import network_sizes, stage
from wan_local.tiling import WHOLE, Tiling
from wan_local.vae_cost import kept_bytes, vae_bytes
from wan_local.weight_files import read_part
from wan_local.weight_format import PLAIN, WeightFormats

CPU = torch.device("cpu")
IMAGES = Path(__file__).parents[1] / "tests" / "images"
SMALL = known_models()[1]
LAYERS, GUIDE_SCALE, TIMESTEP = 16, 5.0, 700
VAE = VaeConfig(32, 16, (1, 2, 4, 4), 2, (False, True, True), (0.0,) * 16, (1.0,) * 16)
CONFIG = replace(SMALL, transformer=mid_size(LAYERS), vae=VAE)
DENOISED = Geometry(Size(256, 448), 17)
DECODED = Geometry(Size(384, 512), 17)
ENCODED = Geometry(Size(192, 256), 81)
PEER_TILES = 256  # pixels, diffusers' default, with a stride of 192
_PLENTY, _SOME = 2**40, 22 * 2**30 // 10


def write_files(scratch: Path, stages: list[str]) -> None:
    """Write the weights that every contender reads: both networks in diffusers' layout, and an int8 store."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=VAE.base_dim, latents_mean=[0.0] * 16, latents_std=[1.0] * 16).save_pretrained(
        scratch / "model" / "vae"
    )
    if "denoise" in stages:
        for part in PARTS:
            if part != "vae":
                write_random_part(scratch / "model", part, CONFIG, "diffusers")
        peer_on_meta(CONFIG.transformer).save_config(scratch / "model" / "transformer")
        (scratch / "model" / "tokenizer").symlink_to(TINY / "tokenizer")
        convert(Conversion(random_source(scratch / "model", CONFIG), WeightFormats("int8")), scratch / "store")


def warm_up() -> None:
    """Import and start what every contender's process has: libraries are not what is measured here."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401

    network_sizes(CONFIG)
    for _ in range(2):
        torch.nn.functional.conv3d(torch.ones(1, 8, 3, 16, 16), torch.ones(8, 8, 3, 3, 3)).sum()
        torch.nn.functional.conv2d(torch.ones(1, 8, 16, 16), torch.ones(8, 8, 3, 3)).sum()
        torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64)).sum()


def _files(scratch: Path, formats: WeightFormats = PLAIN) -> ModelFiles:
    folder = scratch / ("model" if formats is PLAIN else "store")
    parts = [part for part in PARTS if (folder / part).is_dir()]
    tensors = {part: read_part(folder / part).tensors for part in parts}
    return ModelFiles(folder, CONFIG, tensors, read_manifest(folder))


@dataclass(frozen=True)
class _Inputs:
    """What a guided step is given."""

    latents: Tensor
    condition: Tensor
    texts: Tensor
    images: Tensor


def _inputs() -> _Inputs:
    transformer, latent = CONFIG.transformer, DENOISED.latent_size
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    grid = (DENOISED.latent_frames, latent.height, latent.width)
    return _Inputs(
        noise(1, transformer.out_channels, *grid),
        noise(1, transformer.in_channels - transformer.out_channels, *grid),
        noise(2, transformer.text_tokens, transformer.text_dim),
        noise(1, transformer.image_tokens, transformer.image_dim),
    )


@contextmanager
def _our_step(scratch: Path, *, formats: WeightFormats, free: int) -> Iterator[Work]:
    """A guided step as a run makes it, planned for so many free bytes; for none it is the least that can be done."""
    given = _inputs()
    machine = Machine("cpu", free, free, 4, default_arithmetic(CPU))
    planned = plan_within(DENOISED, CONFIG, network_sizes(CONFIG, formats), machine)
    files, context, loop = _files(scratch, formats), planned.stage("context"), planned.stage("denoise")
    with stage("context_embedder", files, CPU, torch.float32, plan=context) as embedder:
        contexts = embedder.contexts(list(given.texts.split(1)), given.images)
        modulations = embedder.modulations(torch.tensor([TIMESTEP]))
    with stage("transformer", files, CPU, torch.float32, plan=loop) as network:
        guided = Guided(
            network, given.condition, modulations, *contexts, GUIDE_SCALE, loop.together, planned.chunk_tokens
        )
        yield Work(
            lambda: guided.predict(given.latents, TIMESTEP)[0],
            max(context.peak_bytes, loop.peak_bytes),
        )


@contextmanager
def _their_step(scratch: Path, *, dtype: torch.dtype, offload: bool) -> Iterator[Work]:
    from diffusers import WanTransformer3DModel

    given = _inputs()
    peer = WanTransformer3DModel.from_pretrained(scratch / "model" / "transformer", torch_dtype=dtype)
    if offload:
        peer.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1,
            offload_to_disk_path=str(scratch / "offload"),
        )  # fmt: skip
    inputs = torch.cat((given.latents, given.condition), dim=1).to(dtype)
    timestep = torch.tensor([TIMESTEP])
    images = given.images.reshape(2, -1, CONFIG.transformer.image_dim).to(dtype)

    def step() -> Tensor:
        conditional, unconditional = (
            peer(inputs, timestep, text[None].to(dtype), images, return_dict=False)[0].float() for text in given.texts
        )
        return unconditional + GUIDE_SCALE * (conditional - unconditional)

    yield Work(step)


def _vae_bytes(half: Any, geometry: Geometry, tiling: Tiling) -> int:
    """Return what weights and tensors are planned for, without what the C library keeps of freed memory."""
    weights = network_sizes(CONFIG)[f"vae_{half}"].weight_bytes(4)
    return weights + vae_bytes(half, geometry, VAE, tiling) + kept_bytes(half, geometry, VAE, tiling)


@contextmanager
def _our_decode(scratch: Path, *, tiling: Tiling) -> Iterator[Work]:
    latents = _latents()
    with stage("vae_decoder", _files(scratch), CPU, torch.float32) as vae:

        def frames() -> Tensor:
            parts = decode_frames(vae, latents, DECODED, tiling=tiling)
            return torch.from_numpy(np.concatenate([part.frames for part in parts]))

        yield Work(frames, _vae_bytes("decoder", DECODED, tiling))


def _latents() -> Tensor:
    latent = DECODED.latent_size
    shape = (1, VAE.z_dim, DECODED.latent_frames, latent.height, latent.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 0.5


@contextmanager
def _their_vae(scratch: Path) -> Iterator[Any]:
    """diffusers' VAE with its weights laid out as ours has them on a CPU, which makes both twice as fast."""
    from diffusers import AutoencoderKLWan

    peer = AutoencoderKLWan.from_pretrained(scratch / "model" / "vae")
    for parameter in peer.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    yield peer


@contextmanager
def _their_decode(scratch: Path, *, tiled: bool) -> Iterator[Work]:
    latents = _latents()
    with _their_vae(scratch) as peer:
        if tiled:
            peer.enable_tiling()

        def frames() -> Tensor:
            pixels = peer.decode(latents).sample[0].clamp(-1, 1)
            return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)

        yield Work(frames)


def _pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    start, end = torch.rand(2, 3, ENCODED.size.height, ENCODED.size.width, generator=generator) * 2 - 1
    return start, end


@contextmanager
def _our_encode(scratch: Path, *, tiling: Tiling) -> Iterator[Work]:
    pictures = _pictures()
    with stage("vae_encoder", _files(scratch), CPU, torch.float32) as vae:

        def condition() -> Tensor:
            return encode_condition(vae, pictures, ENCODED.num_frames, tiling=tiling)[:, 4:]

        yield Work(condition, _vae_bytes("encoder", ENCODED, tiling))


@contextmanager
def _their_encode(scratch: Path) -> Iterator[Work]:
    pictures = _pictures()
    with _their_vae(scratch) as peer:

        def condition() -> Tensor:
            clip = torch.zeros(1, 3, ENCODED.num_frames, ENCODED.size.height, ENCODED.size.width)
            clip[0, :, 0], clip[0, :, -1] = pictures
            latents: Tensor = peer.encode(clip).latent_dist.mode()
            return latents

        yield Work(condition)


_INT8 = WeightFormats.converted("int8")
# the first of each stage is what the others' results are held to
CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    "denoise": {
        "diffusers, float32": functools.partial(_their_step, dtype=torch.float32, offload=False),
        "diffusers, float32, group offload to disk": functools.partial(_their_step, dtype=torch.float32, offload=True),
        "diffusers, bfloat16": functools.partial(_their_step, dtype=torch.bfloat16, offload=False),
        "wan_local, whole": functools.partial(_our_step, formats=PLAIN, free=_PLENTY),
        "wan_local, streamed from file as if 2.2 GiB were free": functools.partial(
            _our_step, formats=PLAIN, free=_SOME
        ),
        "wan_local, streamed from file": functools.partial(_our_step, formats=PLAIN, free=0),
        "wan_local, int8 store, streamed from file": functools.partial(_our_step, formats=_INT8, free=0),
    },
    "decode": {
        "diffusers": functools.partial(_their_decode, tiled=False),
        f"diffusers, tiles of {PEER_TILES} pixels": functools.partial(_their_decode, tiled=True),
        "wan_local": functools.partial(_our_decode, tiling=WHOLE),
        "wan_local, 1 x 2 tiles": functools.partial(_our_decode, tiling=Tiling(1, 2)),
        "wan_local, 2 x 2 tiles": functools.partial(_our_decode, tiling=Tiling(2, 2)),
    },
    "encode": {
        "diffusers": _their_encode,
        "wan_local": functools.partial(_our_encode, tiling=WHOLE),
        "wan_local, 1 x 2 tiles": functools.partial(_our_encode, tiling=Tiling(1, 2)),
    },
}
GEOMETRIES = {"denoise": DENOISED, "decode": DECODED, "encode": ENCODED}


def beside_diffusers(name: str, scratch: Path, runs: int) -> None:
    """Measure every contender of a stage, one after the other, and hold its result to the first one's."""
    expected: Tensor | None = None
    for who in CONTENDERS[name]:
        key = f"{name}: {who}"
        row = in_own_process("bench.memory", key, scratch, runs)
        got = result_of(scratch, key).float()
        expected = got if expected is None else expected
        rms = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        report(name, GEOMETRIES[name], who=who, error_max=parity.relative_error(got, expected), error_rms=rms, **row)


def plan(scratch: Path, device: str) -> None:
    """A whole run of the tiny model: planned and measured bytes by stage."""
    request = Request(
        prompt="a small blue bird takes off",
        start_image_url=IMAGES / "first_frame.png",
        end_image_url=IMAGES / "last_frame.png",
        resolution="480p",
        num_inference_steps=4,
        seed=42,
    )
    settings = load_settings(
        model="tiny", device=device, state_dir=str(scratch / "state"), cache_dir=str(scratch / "cache")
    )
    result = generate(request, settings=settings, output=scratch / "out.mp4")
    made = Geometry(Size(result.report["height"], result.report["width"]), result.report["num_frames"])
    for name, figures in result.report["memory"].items():
        report("plan", made, who=name, **figures)


def report(name: str, geometry: Geometry, **row: Any) -> None:
    made = {"size": str(geometry.size), "frames": geometry.num_frames, "tokens": geometry.tokens}
    append_row("memory", {"stage": name, **made, **row, "threads": torch.get_num_threads(), "world": describe(CPU)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=[*CONTENDERS, "plan"])
    parser.add_argument("--scratch", type=Path, required=True, help="where there is room")
    parser.add_argument("--device", default="cpu", help="of the stage plan")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.only:
        name, _, who = options.only.partition(": ")
        warm_up()
        measure_here(options.only, CONTENDERS[name][who], options.scratch, options.runs)
        return
    stages = options.stage or [*CONTENDERS, "plan"]
    options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        write_files(Path(folder), stages)
        for name in stages:
            if name == "plan":
                plan(Path(folder), options.device)
            else:
                beside_diffusers(name, Path(folder), options.runs)


if __name__ == "__main__":
    main()
