from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import parity
from tests.live_bytes import live_bytes
from wan_local import layers
from wan_local.checkpoint import find_model
from wan_local.conditioning import encode_condition
from wan_local.decode import decode_frames
from wan_local.geometry import Geometry, Size
from wan_local.models import causal_layers
from wan_local.models.vae import Vae
from wan_local.settings import VaeConfig, load_settings
from wan_local.stage import stage
from wan_local.tiling import WHOLE, Tiling
from wan_local.vae_cost import kept_bytes


def condition_chunks(start: Tensor, end: Tensor, chunks: int, *, blank: Callable[[Tensor], Tensor]) -> list[Tensor]:
    middle = torch.zeros_like(start).expand(-1, -1, 4, -1, -1)
    return [start, *[blank(middle) for _ in range(chunks - 1)], torch.cat((middle[:, :, 1:], end), dim=2)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 20, 25])
def test_encoding_a_clip_that_repeats_is_bit_equal_to_encoding_all_of_it(chunks: int) -> None:
    generator = torch.Generator().manual_seed(chunks)
    start, end = (torch.rand(1, 3, 1, 32, 48, generator=generator) * 2 - 1 for _ in range(2))
    vae = parity.official_vae()
    repeated = vae.encode(condition_chunks(start, end, chunks, blank=lambda middle: middle))
    computed = vae.encode(condition_chunks(start, end, chunks, blank=lambda middle: middle.clone()))
    assert torch.equal(repeated, computed)


def test_most_of_the_encoding_of_81_frames_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first convolution sees the start image, three blank frames and the last chunk's four: 8 frames of 81."""
    vae, calls = parity.official_vae(), []
    forward = type(vae.encoder.conv_in).forward

    def counted(self: Any, *args: Any) -> Tensor:
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(type(vae.encoder.conv_in), "forward", counted)
    images = (torch.rand(3, 32, 48), torch.rand(3, 32, 48))
    encode_condition(vae, images, 81)
    assert calls.count(vae.encoder.conv_in) <= 8
    merging = len(vae.encoder.local.frame) - 1  # the first layer that sees chunks; conv_in stands before the blocks
    first_coarse = vae.encoder.down_blocks[merging + 1].conv1
    assert calls.count(first_coarse) <= 12  # of 21 chunks


def test_memory_of_a_stream_does_not_grow_with_its_length() -> None:
    vae = parity.official_vae()
    peaks = []
    for frames in (3, 9):
        latents = torch.randn(1, 16, frames, 4, 6)
        with live_bytes() as decoding:
            for chunk in vae.decode(latents):
                del chunk
        peaks.append(decoding.peak - latents.nbytes)  # denormalised, they are held once more
    assert peaks[0] == peaks[1]


def test_memory_of_tiles_does_not_grow_with_the_length_of_the_clip() -> None:
    """What is kept between the whole frames and the tiles is in RAM, and known."""
    config = parity.vae_config()
    with torch.device("meta"):
        vae = Vae(config)
    peaks = []
    for frames in (3, 5):
        latents = torch.empty(1, 16, frames, 16, 24, device="meta")
        geometry = Geometry(Size(128, 192), 4 * (frames - 1) + 1)
        with live_bytes() as decoding:
            for tile in vae.decode_tiles(latents, Tiling(1, 2), keep_on="meta"):
                del tile
        kept = kept_bytes("decoder", geometry, config, Tiling(1, 2)) - geometry.generated_frames * 128 * 192 * 3
        peaks.append(decoding.peak - kept)
    assert peaks[0] == peaks[1]


def wide_vae(seed: int) -> Vae:
    """Return a VAE of the real one's depth with random weights."""
    torch.manual_seed(seed)
    vae = Vae(VaeConfig(8, 16, (1, 2, 4, 4), 2, (False, True, True), (0.1,) * 16, (1.7,) * 16))
    for name, parameter in vae.named_parameters():
        fan_in = max(parameter[0].numel(), 1)
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("gamma") else 0.0, 0.8 / fan_in**0.5)
    return vae.eval().requires_grad_(False)


TILINGS = [(1, 2), (2, 1), (2, 3), (5, 4)]


@pytest.mark.parametrize(("rows", "columns"), TILINGS)
@pytest.mark.parametrize("frames", [1, 3])
def test_tiled_decoding_equals_the_whole_frames_within_rounding(rows: int, columns: int, frames: int) -> None:
    """Odd sizes, tiles down to one row of latent cells, NaN where no tile has written."""
    for vae in (parity.official_vae(), wide_vae(frames)):
        latents = torch.randn(1, 16, frames, 5, 7, generator=torch.Generator().manual_seed(frames))
        whole = torch.cat(list(vae.decode(latents)), dim=2)
        tiled = torch.full_like(whole, torch.nan)
        for tile in vae.decode_tiles(latents, Tiling(rows, columns)):
            last = tile.first + tile.pixels.shape[2]
            tiled[:, :, tile.first : last, tile.window.rows.slice, tile.window.columns.slice] = tile.pixels
        assert parity.relative_error(tiled, whole) <= 1e-5


@pytest.mark.parametrize(("rows", "columns"), TILINGS)
@pytest.mark.parametrize("chunks", [0, 10])
def test_tiled_encoding_equals_the_whole_frames_within_rounding(rows: int, columns: int, chunks: int) -> None:
    """Of a clip that repeats in the middle and of one that does not."""
    generator = torch.Generator().manual_seed(chunks)
    start, end = (torch.rand(1, 3, 1, 40, 56, generator=generator) * 2 - 1 for _ in range(2))
    repeating = condition_chunks(start, end, chunks, blank=lambda middle: middle) if chunks else [start]
    moving = [start, *(torch.rand(1, 3, 4, 40, 56, generator=generator) for _ in range(min(chunks, 1)))]
    vae = parity.official_vae() if chunks else wide_vae(3)
    for clip in (repeating, moving):
        assert parity.relative_error(vae.encode(clip, Tiling(rows, columns)), vae.encode(clip)) <= 1e-5


def test_encoding_in_tiles_skips_what_repeats_too(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, frames = parity.official_vae(), []
    forward = type(vae.encoder.conv_in).forward

    def counted(self: Any, *args: Any) -> Tensor:
        if self is vae.encoder.conv_in:
            frames.append(args[0].shape[2])
        return forward(self, *args)

    monkeypatch.setattr(type(vae.encoder.conv_in), "forward", counted)
    encode_condition(vae, (torch.rand(3, 32, 48), torch.rand(3, 32, 48)), 81, tiling=Tiling(2, 2))
    assert sum(frames) <= 4 * 8


@pytest.mark.parametrize("num_frames", [17, 15])
def test_frames_of_a_tiled_decode_are_those_of_a_whole_one(num_frames: int) -> None:
    vae, geometry = parity.official_vae(), Geometry(Size(64, 96), num_frames)
    latents = torch.randn(1, 16, geometry.latent_frames, 8, 12)
    videos = []
    for tiling in (WHOLE, Tiling(2, 3)):
        decoded = list(decode_frames(vae, latents, geometry, tiling=tiling))
        assert decoded[-1].done == geometry.generated_frames
        videos.append(np.concatenate([part.frames for part in decoded]).astype(int))
    assert videos[0].shape == videos[1].shape == (num_frames, 64, 96, 3)
    assert np.abs(videos[0] - videos[1]).max() <= 1


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "frames"),
    [
        ((3, 3, 3), (1, 1, 1), (0, 1, 1), 3),
        ((3, 3, 3), (1, 1, 1), (0, 1, 1), 6),
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), 4),
        ((3, 1, 1), (2, 1, 1), (0, 0, 0), 5),
        ((1, 2, 2), (1, 2, 2), (0, 0, 0), 2),
    ],
)
def test_a_convolution_by_frames_is_the_whole_one(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], frames: int
) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 5, frames, 9, 8, generator=generator)
    weight, bias = torch.randn(7, 5, *kernel, generator=generator), torch.randn(7, generator=generator)
    for of_outputs in (bias, None):
        got = layers.conv3d_by_frames(x, weight, of_outputs, stride=stride, padding=padding)
        expected = torch.nn.functional.conv3d(x, weight, of_outputs, stride, padding)
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_the_vae_is_official_too_as_a_card_convolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame by frame, as `conv3d` does on a card."""
    for module in (layers, causal_layers):
        monkeypatch.setattr(module, "conv3d", layers.conv3d_by_frames)
    data, vae = parity.tensors("vae_cases"), parity.official_vae()
    decoded = torch.cat(list(vae.decode(data["dec0.latent"].unsqueeze(0))), dim=2)[0]
    assert parity.relative_error(decoded, data["dec0.raw"]) <= parity.golden()["tolerances"]["vae"]


@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_features_stay_channels_last_on_a_cpu(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else oneDNN copies every convolution's input first: 1.6 times the seconds, and memory that no plan knows of."""
    files, otherwise = find_model(load_settings(model="tiny")), []
    wide = files.config.vae.z_dim + 1  # latents are small

    def spy(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if x.shape[1] >= wide and not x.is_contiguous(memory_format=torch.channels_last_3d):
            otherwise.append(tuple(x.shape))
        return through(x, *args, **kwargs)  # type: ignore[arg-type]

    through = layers.conv3d
    for module in (layers, causal_layers):
        monkeypatch.setattr(module, "conv3d", spy)
    with stage(f"vae_{half}", files, torch.device("cpu"), torch.float32) as vae:  # type: ignore[arg-type]
        if half == "decoder":
            list(vae.decode(torch.randn(1, files.config.vae.z_dim, 3, 6, 8)))
        else:
            encode_condition(vae, (torch.rand(3, 48, 64), torch.rand(3, 48, 64)), 9)
    assert otherwise == []
