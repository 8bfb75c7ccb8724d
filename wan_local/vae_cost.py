"""What the VAE holds at its peak and what it computes, from shapes alone: the planner's view of `models/vae.py`.

Mirrors the order in which the layers make and drop their buffers; `tests/test_vae_cost.py` holds every figure to the
bytes that are counted while the real layers run on `meta` at full size. All float32. Integers, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from wan_local.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, Geometry, Size
from wan_local.settings import VaeConfig
from wan_local.tiling import (
    ATTENTION_SCORES,
    Layer,
    Span,
    Tiling,
    Window,
    decoder_layers,
    encoder_layers,
    windows_through,
)

_PAST = 2  # frames that a causal convolution remembers
_FLOAT32_BYTES = 4
_KERNEL = 27  # weights of a causal convolution for one pair of channels
_FLAT_KERNEL = 9  # and of one inside a frame
_RGB = 3
_FAR = 16  # latent cells beyond which a frame's edge no longer matters to a tile: the widest halo is 7
_MOST_TILES = 8  # along a side
_MARGIN = 1.02  # small buffers that are not counted one by one


@dataclass(frozen=True, slots=True)
class _Held:
    """Numbers that some layers remember from chunk to chunk, and those they hold at their peak on top of that."""

    remembered: int
    working: int

    @property
    def both(self) -> int:
        return self.remembered + self.working


VaeHalf = Literal["encoder", "decoder"]


@cache
def vae_bytes(half: VaeHalf, geometry: Geometry, config: VaeConfig, tiling: Tiling) -> int:
    """Return the most bytes that one half holds on its device beside its weights and what it is given."""
    latent, dim = geometry.latent_size, config.base_dim * config.dim_mult[-1]
    convolutions = 4 + 2 * config.num_res_blocks  # of the mid block and of the level beside it
    if half == "decoder":
        whole = _whole_layers(latent, [config.z_dim, *[dim] * (convolutions + 2)])
    else:
        whole = _whole_layers(latent, [dim] * (convolutions + 1), compared=True)
    tile_of = _decode_tile if half == "decoder" else _encode_tile
    tiles = [tile_of(geometry.size, config, window) for window in _distinct(tiling.windows(latent), latent)]
    return int(_MARGIN * _FLOAT32_BYTES * _peak(whole, tiles, tiling, beside_whole=_latents(geometry, config)))


@cache
def vae_flops(half: VaeHalf, geometry: Geometry, config: VaeConfig, tiling: Tiling) -> float:
    """Return the floating-point operations of the local layers' convolutions over all tiles, halos included.

    The encoder's are those of a whole clip; of FLF2V's, most repeats and is not computed.
    """
    local = decoder_layers(config) if half == "decoder" else encoder_layers(config)
    layers = (*local.chunk, *local.frame) if half == "decoder" else (*local.frame, *local.chunk)
    scale, size = (SPATIAL_STRIDE, geometry.size) if half == "decoder" else (1, geometry.latent_size)
    total = 0.0
    for tile in tiling.windows(geometry.latent_size):
        frames = geometry.latent_frames if half == "decoder" else geometry.generated_frames
        for place in _places(layers, windows_through(layers, tile.scaled(scale), size)):
            total += _flops(place) * frames
            if place.layer.temporal:  # all but the first frame
                frames = 2 * frames - 1 if half == "decoder" else (frames + 1) // 2
    return total


def _flops(place: _Place) -> float:
    """Floating-point operations of a layer for one of its input frames."""
    layer = place.layer
    if layer.kind == "res":
        weights = _KERNEL * layer.dim_out * (layer.dim_in + layer.dim_out)
    elif layer.kind == "conv":
        weights = _KERNEL * layer.dim_in * layer.dim_out
    else:
        weights = _FLAT_KERNEL * layer.dim_in * layer.dim_out
    return 2.0 * weights * place.produced


@cache
def tilings(geometry: Geometry, config: VaeConfig, half: VaeHalf) -> tuple[Tiling, ...]:
    """Return the tilings to choose from, those that compute least first: the whole frame, then larger tiles."""
    latent = geometry.latent_size
    every = [
        Tiling(rows, columns)
        for rows in range(1, min(_MOST_TILES, latent.height) + 1)
        for columns in range(1, min(_MOST_TILES, latent.width) + 1)
    ]
    return tuple(sorted(every, key=lambda tiling: vae_flops(half, geometry, config, tiling)))


def kept_bytes(half: VaeHalf, geometry: Geometry, config: VaeConfig, tiling: Tiling) -> int:
    """Return the bytes of RAM that are kept: with tiles every latent frame's features, and the decoded video as uint8
    with tiles or where some of its frames are left out."""
    latent, size, dim = geometry.latent_size, geometry.size, config.base_dim * config.dim_mult[-1]
    features = geometry.latent_frames * dim * latent.height * latent.width * _FLOAT32_BYTES if tiling.count > 1 else 0
    waits = half == "decoder" and (tiling.count > 1 or geometry.generated_frames > geometry.num_frames)
    return features + (geometry.generated_frames * size.height * size.width * _RGB if waits else 0)


def _distinct(windows: Sequence[Window], latent: Size) -> list[Window]:
    """Return one of the windows that need the same: as large, and as near to the frame's edges."""

    def near(span: Span, length: int) -> tuple[int, int, int]:
        return len(span), min(span.start, _FAR), min(length - span.stop, _FAR)

    found = {(near(w.rows, latent.height), near(w.columns, latent.width)): w for w in windows}
    return list(found.values())


def _latents(geometry: Geometry, config: VaeConfig) -> int:
    latent = geometry.latent_size
    return config.z_dim * geometry.latent_frames * latent.height * latent.width


def _peak(whole: _Held, tiles: Sequence[_Held], tiling: Tiling, *, beside_whole: int) -> int:
    if tiling.count == 1:  # local layers and the others take turns, chunk by chunk
        [tile] = tiles
        return whole.remembered + tile.remembered + beside_whole + max(whole.working, tile.working)
    return max(whole.both + beside_whole, *(tile.both for tile in tiles))


def _whole_layers(latent: Size, widths: Sequence[int], *, compared: bool = False) -> _Held:
    """Return what the layers around the frame's attention hold; widths: of the causal convolutions' inputs.

    compared: what the mid block remembered is kept until it is known whether it has changed.
    """
    cells, dim = latent.height * latent.width, max(widths)
    scores = 2 * min(ATTENTION_SCORES, cells**2)  # before and after softmax, for backends that keep them
    old = (2 * _PAST + 1) * dim * cells if compared else 0
    return _Held(_PAST * sum(widths) * cells, 6 * dim * cells + scores + old)


@dataclass(frozen=True, slots=True)
class _Place:
    """A layer in its tile: areas of its input, of the storage its input is a view of, and of all that it puts out."""

    layer: Layer
    area: int
    stored: int
    produced: int


def _places(layers: Sequence[Layer], windows: Sequence[Window]) -> list[_Place]:
    places, stored = [], windows[0].area
    for layer, window in zip(layers, windows[:-1], strict=True):
        produced = len(layer.after(window.rows)) * len(layer.after(window.columns))
        places.append(_Place(layer, window.area, stored, produced))
        stored = produced
    return places


def _remembered(places: Sequence[_Place]) -> int:
    """Numbers that the causal layers keep from one chunk to the next."""
    total = 0
    for place in places:
        layer = place.layer
        if layer.kind == "res":
            total += _PAST * (layer.dim_in + layer.dim_out) * place.area
        elif layer.kind == "conv" or (layer.kind == "up" and layer.temporal):
            total += _PAST * layer.dim_in * place.area
        elif layer.temporal:
            total += layer.dim_out * place.produced
    return total


def _working(place: _Place, frames: int, *, compared: bool = False) -> int:
    """Numbers that a layer holds at its peak beyond what it remembers, its input among them.

    compared: what it remembered is kept until it is known whether it has changed.
    """
    layer, area = place.layer, place.area
    dim_in, dim_out = layer.dim_in, layer.dim_out
    given = frames * dim_in * place.stored
    if layer.kind == "up":
        frames, doubled = (2 * frames, 2 * frames * dim_in * area) if layer.temporal else (frames, 0)
        return given + doubled + frames * (dim_in + dim_out) * place.produced
    if layer.kind == "down":
        padded = frames * dim_in * (area + 2 * int(area**0.5) + 2)
        return given + padded + frames * dim_out * place.produced
    if layer.kind == "conv":
        return given + (frames * dim_in + (frames + 2 * _PAST) * dim_in) * area
    shortcut = frames * dim_out * area if dim_in != dim_out else 0
    old_in, old_out = (_PAST * dim_in, _PAST * dim_out) if compared else (0, 0)
    # a frame's sum, of a chunk as well as in its place in it, and one tap's input frame and output
    sums = frames + 1 if frames > 1 else 1
    first = (2 * frames + _PAST) * dim_in + max(_PAST * dim_in, old_in + (sums + 1) * dim_out + dim_in)
    second = (3 * frames + _PAST) * dim_out + old_in + max(_PAST * dim_out, old_out + (sums + 2) * dim_out)
    return given + shortcut + max(first, second) * area


def _decode_tile(size: Size, config: VaeConfig, tile: Window) -> _Held:
    """Return what a tile (a window of the latent grid) holds in the decoder's local layers."""
    local = decoder_layers(config)
    layers = (*local.chunk, *local.frame)
    places = _places(layers, windows_through(layers, tile.scaled(SPATIAL_STRIDE), size))
    by_chunk, by_frame = places[: len(local.chunk)], places[len(local.chunk) :]
    features = places[0].layer.dim_in * places[0].area
    frames, peaks = 1, []
    for place in by_chunk:
        peaks.append(features + _working(place, frames))
        frames *= 2 if place.layer.temporal else 1
    first = by_frame[0].layer.dim_in * by_frame[0].stored
    pixels = frames * _RGB * by_frame[-1].produced
    peaks.append(
        features + (frames - 1) * first + pixels + _working(by_frame[0], 1)
    )  # its input is a view of the chunk
    peaks += [features + frames * first + pixels + _working(place, 1) for place in by_frame[1:]]
    return _Held(_remembered(places), max(peaks))


def _encode_tile(size: Size, config: VaeConfig, tile: Window) -> _Held:
    """Return what a tile holds in the encoder's local layers, however many of them have begun to repeat."""
    local = encoder_layers(config)
    layers = (*local.frame, *local.chunk)
    places = _places(layers, windows_through(layers, tile, _latent(size)))
    by_frame, by_chunk = places[: len(local.frame)], places[len(local.frame) :]
    fine = by_frame[-1].layer.dim_out * by_frame[-1].produced
    done = TEMPORAL_STRIDE * fine  # of this chunk, and the last frame of the chunk before
    peaks = []
    for depth in range(len(by_frame)):
        repeated = by_frame[depth - 1].layer.dim_out * by_frame[depth - 1].produced if depth else 0
        peaks.append(done + _working(by_frame[depth], 1, compared=True))
        peaks += [done + repeated + _working(place, 1) for place in by_frame[depth + 1 :]]
    frames = TEMPORAL_STRIDE
    for place in by_chunk:
        peaks.append(2 * TEMPORAL_STRIDE * fine + _working(place, frames))
        frames //= 2 if place.layer.temporal else 1
    return _Held(_remembered(places), max(peaks))


def _latent(size: Size) -> Size:
    return Size(size.height // SPATIAL_STRIDE, size.width // SPATIAL_STRIDE)
