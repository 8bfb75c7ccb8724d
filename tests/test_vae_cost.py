from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.live_bytes import live_bytes
from wan_local.geometry import Geometry, Size
from wan_local.models import causal_layers
from wan_local.models.vae import Vae, _EncoderStream
from wan_local.planner import GIB
from wan_local.settings import load_model_config
from wan_local.tiling import WHOLE, Tiling, Window, crops, windows_through
from wan_local.vae_cost import VaeHalf, tilings, vae_bytes, vae_flops

CONFIG = load_model_config("flf2v_14b").vae
LARGE, SMALL = Geometry(Size(720, 1280), 81), Geometry(Size(480, 832), 81)
CASES = [(SMALL, WHOLE), (LARGE, WHOLE), (LARGE, Tiling(2, 4)), (LARGE, Tiling(3, 5)), (SMALL, Tiling(2, 3))]
IDS = [f"{geometry.size}, {tiling} tiles" for geometry, tiling in CASES]


def assert_predicted(predicted: int, counted: int) -> None:
    assert counted <= predicted <= 1.08 * counted, f"{predicted / GIB:.3f} GiB predicted, {counted / GIB:.3f} counted"


def largest_tile(geometry: Geometry, tiling: Tiling) -> Window:
    """Return a tile with as many inner edges as there are: those need a halo."""
    tiles = tiling.windows(geometry.latent_size)
    return tiles[tiling.columns * (tiling.rows // 2) + tiling.columns // 2]


def video(geometry: Geometry, chunks: int) -> list[Tensor]:
    frame = torch.empty(1, 3, 1, geometry.size.height, geometry.size.width, device="meta")
    return [frame, *[frame.clone().expand(-1, -1, 4, -1, -1)] * chunks]


def counted_decoding(geometry: Geometry, tiling: Tiling) -> int:
    """Return the most bytes that three chunks, or those of the largest tile, held in the decoder."""
    latent = geometry.latent_size
    with torch.device("meta"):
        vae = Vae(CONFIG, encodes=False)
        latents = torch.empty(1, 16, 4, latent.height, latent.width)
    with live_bytes() as decoding:
        if tiling == WHOLE:
            for chunk in vae.decode(latents):
                del chunk
        else:
            layers = (*vae.decoder.local.chunk, *vae.decoder.local.frame)
            windows = windows_through(layers, largest_tile(geometry, tiling).scaled(8), geometry.size)
            rows, columns = windows[0].rows.slice, windows[0].columns.slice
            memory, kept = causal_layers.Memory(), latents.new_empty(1, 384, 1, latent.height, latent.width)
            base = kept.nbytes
            for _ in range(3):
                tile = kept[..., rows, columns].clone()
                pixels = vae.decoder.pixels(tile, memory, crops(layers, windows))
                del pixels
    return decoding.peak if tiling == WHOLE else decoding.peak - base


def counted_encoding(geometry: Geometry, tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the most bytes that a clip held in the encoder, however many of its layers have become periodic."""
    with torch.device("meta"):
        vae = Vae(CONFIG, decodes=False)
    clip, peaks = video(geometry, 3), []
    for steady_layers in (0, 1, 2, 3):
        periodic = iter([True] * steady_layers)
        monkeypatch.setattr(causal_layers, "_unchanged", lambda *_, periodic=periodic: next(periodic, False))
        with live_bytes() as encoding:
            if tiling == WHOLE:
                vae.encode(clip)
            else:
                stream = _EncoderStream(vae.encoder, largest_tile(geometry, tiling), geometry.latent_size)
                for chunk in clip:
                    stream.features(chunk)
        peaks.append(encoding.peak)
    return max(peaks)


@pytest.mark.parametrize(("geometry", "tiling"), CASES, ids=IDS)
def test_decoding_peak_at_14b_size_is_predicted_within_8_percent_and_never_below(
    geometry: Geometry, tiling: Tiling
) -> None:
    predicted = vae_bytes("decoder", Geometry(geometry.size, 13), CONFIG, tiling)
    assert_predicted(predicted, counted_decoding(geometry, tiling))


@pytest.mark.parametrize(("geometry", "tiling"), CASES, ids=IDS)
def test_encoding_peak_at_14b_size_is_predicted_within_8_percent_and_never_below(
    geometry: Geometry, tiling: Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the clip that is really encoded, however many of the encoder's layers have become periodic."""
    predicted = vae_bytes("encoder", Geometry(geometry.size, 13), CONFIG, tiling)
    assert_predicted(predicted, counted_encoding(geometry, tiling, monkeypatch))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("geometry", [SMALL, LARGE], ids=["480p", "720p"])
def test_layers_that_see_whole_frames_never_hold_more_than_predicted(
    half: VaeHalf, geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles so small that these layers are the peak; the prediction allows for a backend that keeps scores."""
    latent = geometry.latent_size
    with torch.device("meta"):
        vae = Vae(CONFIG)
        latents = torch.empty(1, 16, 3, latent.height, latent.width)
        features = torch.empty(1, 384, 1, latent.height, latent.width)
    monkeypatch.setattr(causal_layers, "_unchanged", lambda memory, before: len(memory) < 8)  # all before the mid block
    memory, steady = causal_layers.Memory(), causal_layers.Steady()
    with live_bytes() as counted:
        if half == "decoder":
            for made in vae._whole_features(latents):
                del made
        else:
            for _ in range(3):
                causal_layers.run_layers(vae.encoder.whole_layers, features, memory, steady=steady)
    predicted = vae_bytes(half, Geometry(geometry.size, 9), CONFIG, Tiling(8, 8))
    assert counted.peak <= predicted <= 1.25 * counted.peak


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_720p_goes_through_the_vae_in_2_gib_with_its_weights_for_a_fifth_more_work(half: VaeHalf) -> None:
    with torch.device("meta"):
        vae = Vae(CONFIG, encodes=half == "encoder", decodes=half == "decoder")
    weights = sum(parameter.numel() for parameter in vae.parameters()) * 4
    best = next(
        tiling for tiling in tilings(LARGE, CONFIG, half) if vae_bytes(half, LARGE, CONFIG, tiling) + weights <= 2 * GIB
    )
    more = vae_flops(half, LARGE, CONFIG, best) / vae_flops(half, LARGE, CONFIG, WHOLE)
    assert 1 < best.count <= 8 and more <= 1.2, (best, more)


def test_no_tile_needs_more_than_the_one_in_the_middle() -> None:
    """Two tiles a side have one inner edge each, more have two."""
    sizes = [vae_bytes("decoder", LARGE, CONFIG, Tiling(1, columns)) for columns in (2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
