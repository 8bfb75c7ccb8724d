"""The VAE stage of `bench/gpu.py`: decoding in tiles and encoding FLF2V's condition, ours and diffusers' in one run.

Both convolve as they do on a card: float32 numbers, TF32 where cuDNN likes it, which is torch's default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu_stage import SIZES, Bench, check, random_state, seconds_of, synchronize
from tests import parity
from wan_local import layers
from wan_local.conditioning import encode_condition
from wan_local.decode import decode_frames
from wan_local.device import capped
from wan_local.geometry import Geometry
from wan_local.models import causal_layers
from wan_local.models.vae import Vae
from wan_local.planner import GIB
from wan_local.settings import VaeConfig
from wan_local.tiling import WHOLE, Tiling
from wan_local.vae_cost import tilings, vae_bytes

CAP_BYTES = 2 * GIB
_USED = 0.9  # of the cap by the plan, as in a run
_MASK = 4  # channels before the condition's latents
_SECONDS = {"ours": 12.0, "diffusers": 20.0}  # of one work at 720p, the first time, with some to spare


def vae(bench: Bench) -> None:
    """Decode 81 frames within 2 GiB and encode the condition: seconds, peaks and errors beside diffusers' VAE."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True  # as torch comes
    try:
        _stage(bench, Geometry(SIZES[bench.size][-1], 81))
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _stage(bench: Bench, geometry: Geometry) -> None:
    config, device = bench.config.vae, bench.device
    with torch.device("meta"):
        halves = [Vae(config, encodes=encodes, decodes=not encodes) for encodes in (False, True)]
    states = [random_state(half, bench, dtype=torch.float32) for half in halves]
    decoder, encoder = (half.eval().requires_grad_(False) for half in halves)
    decoder.load_state_dict(states[0], assign=True)
    encoder.load_state_dict({name: tensor.cpu() for name, tensor in states[1].items()}, assign=True)
    states.clear()  # as in a run, only the half that is needed is on the card
    latent = geometry.latent_size
    shape = (1, config.z_dim, geometry.latent_frames, latent.height, latent.width)
    latents = torch.randn(shape, device=device) * 0.1
    within = _within_cap(geometry, config, _bytes_of(decoder))
    with capped(device, CAP_BYTES):
        _decode(bench, geometry, decoder, latents, within, cap_bytes=CAP_BYTES)
    _decode(bench, geometry, decoder, latents, WHOLE, cap_bytes=None)
    with _whole_convolutions():
        _decode(bench, geometry, decoder, latents, within, cap_bytes=None, how=", torch's 3-D convolutions")
    encoder.to(device)
    _encode(bench, geometry, encoder, peer := _peer(bench, config, (encoder, decoder)))
    _against_diffusers(bench, decoder, peer, latents)
    peer.enable_tiling()
    normal = decoder.denormalize(latents)
    _timed(bench, geometry, "diffusers", "diffusers decode, tiled", lambda: peer.decode(normal).sample)


@contextmanager
def _whole_convolutions() -> Iterator[None]:
    """Let the VAE convolve in three dimensions at once, as it would without `conv3d_by_frames`."""

    def at_once(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        return torch.nn.functional.conv3d(x, weight, bias, stride, padding)

    before = layers.conv3d
    for module in (layers, causal_layers):
        module.conv3d = at_once
    try:
        yield
    finally:
        for module in (layers, causal_layers):
            module.conv3d = before


def _encode(bench: Bench, geometry: Geometry, encoder: Vae, peer: Any) -> None:
    """Encode the condition, ours and diffusers' whole clip."""
    pictures = [torch.rand(3, geometry.size.height, geometry.size.width) * 2 - 1 for _ in range(2)]
    ours = _timed(bench, geometry, "ours", "wan_local encode", lambda: _condition(encoder, pictures, geometry))
    clip = torch.zeros(1, 3, geometry.num_frames, geometry.size.height, geometry.size.width, device=bench.device)
    clip[0, :, 0], clip[0, :, -1] = pictures
    theirs = _timed(bench, geometry, "diffusers", "diffusers encode", lambda: _mean(peer, clip))
    if ours is None or theirs is None:
        return
    normal = encoder.normalize(theirs)
    error = parity.relative_error(ours.cpu(), normal.cpu())
    equal = bool(torch.equal(ours, normal))
    bench.report("vae", who="encode against diffusers", size=str(geometry.size), error=error, bit_equal=equal)
    check("encode against diffusers", error, 1e-2)


def _mean(peer: Any, clip: Tensor) -> Tensor:
    mean: Tensor = peer.encode(clip).latent_dist.mode()
    return mean


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _within_cap(geometry: Geometry, config: VaeConfig, weights: int) -> Tiling:
    """Return the tiling that computes least of those that fit below the cap."""
    fitting = (
        tiling
        for tiling in tilings(geometry, config, "decoder")
        if weights + vae_bytes("decoder", geometry, config, tiling) <= _USED * CAP_BYTES
    )
    return next(fitting, tilings(geometry, config, "decoder")[-1])


def _peer(bench: Bench, config: VaeConfig, halves: tuple[Vae, Vae]) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        peer = AutoencoderKLWan(base_dim=config.base_dim, num_res_blocks=config.num_res_blocks)
    peer.load_state_dict(halves[0].state_dict() | halves[1].state_dict(), assign=True)
    return peer.to(bench.device).eval().requires_grad_(False)


def _condition(encoder: Vae, pictures: Sequence[Tensor], geometry: Geometry) -> Tensor:
    start, end = pictures
    return encode_condition(encoder, (start, end), geometry.num_frames)[:, _MASK:]


def _decode(
    bench: Bench,
    geometry: Geometry,
    ours: Vae,
    latents: Tensor,
    tiling: Tiling,
    *,
    cap_bytes: int | None,
    how: str = "",
) -> None:
    def frames() -> int:
        return sum(len(part.frames) for part in decode_frames(ours, latents, geometry, tiling=tiling))

    planned = vae_bytes("decoder", geometry, ours.config, tiling) + _bytes_of(ours)
    count = _timed(
        bench,
        geometry,
        "ours",
        f"wan_local decode, {tiling} tiles{how}",
        frames,
        planned_bytes=planned,
        cap_bytes=cap_bytes,
    )
    if count is not None:
        check("frames that are missing", geometry.num_frames - count, 0)


def _timed(bench: Bench, geometry: Geometry, whose: str, who: str, work: Callable[[], Any], **row: Any) -> Any:
    """Do `work` once on the clock and report it; return what it returned, None where it failed or there is no time.

    Nothing warms up: a first call's planning of convolutions is part of every run of a user's, too.
    """
    if not bench.has_time("vae", who, _SECONDS[whose] if bench.size == "full" else 0.0):
        return None
    results: list[Any] = []
    with _peak(bench) as peaks:
        try:
            seconds = seconds_of(lambda: results.append(work()), bench.device)
        except torch.OutOfMemoryError as error:
            bench.report("vae", who=who, size=str(geometry.size), failed=str(error)[:200], **row)
            return None
    bench.report("vae", who=who, size=str(geometry.size), frames=geometry.num_frames, seconds=round(seconds, 2),
                 **peaks, **row)  # fmt: skip
    return results[0]


@contextmanager
def _peak(bench: Bench) -> Iterator[dict[str, int]]:
    """Give what is held at the most, allocated and reserved, once the block has ended; nothing on a CPU."""
    peaks: dict[str, int] = {}
    if bench.device.type == "cuda":
        synchronize(bench.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        peaks["held_bytes_before"] = torch.cuda.memory_allocated(bench.device)
    yield peaks
    if bench.device.type == "cuda":
        peaks["peak_bytes"] = torch.cuda.max_memory_allocated(bench.device)
        peaks["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(bench.device)


def _against_diffusers(bench: Bench, ours: Vae, peer: Any, latents: Tensor) -> None:
    """Hold a few frames of a corner to diffusers' whole ones; TF32 is off, so that only the order of sums differs."""
    torch.backends.cudnn.allow_tf32 = False
    corner = latents[:, :, :3, :24, :24]
    got = torch.cat(list(ours.decode(corner)), dim=2).clamp(-1, 1)
    tiles = torch.empty_like(got)
    for tile in ours.decode_tiles(corner, Tiling(2, 2)):
        until = tile.first + tile.pixels.shape[2]
        tiles[:, :, tile.first : until, tile.window.rows.slice, tile.window.columns.slice] = tile.pixels.clamp(-1, 1)
    peer.disable_tiling()
    expected = peer.decode(ours.denormalize(corner)).sample.clamp(-1, 1)
    torch.backends.cudnn.allow_tf32 = True
    whole, tiled = (parity.relative_error(x.cpu(), expected.cpu()) for x in (got, tiles))
    bench.report("vae", who="decode against diffusers, a corner in float32", error=whole, error_in_tiles=tiled)
    check("decode against diffusers", max(whole, tiled), 1e-3)
