"""Exact tiles of the VAE: the window that each layer must see, what that holds, what it costs. Integers, no torch.

A tile is a window of the latent grid. Every layer between it and the pixels is local, so the tile needs a halo that can
be counted back layer by layer; what a layer computes beyond the next one's window is wrong (it lacks neighbours) and is
cut off. At the frame's own edges nothing is cut: there the zero padding is right. Only the layers near the latents see
whole frames, for their attention does: conv_in, the mid block and the residual blocks beside it.

A tile runs through all frames before the next one begins, because what causal layers remember of all tiles together is
as much as what they remember of the whole frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from wan_local.geometry import Size
from wan_local.settings import VaeConfig

ATTENTION_SCORES = 2**25  # of the mid block at a time: rows of queries times all keys


@dataclass(frozen=True, slots=True)
class Span:
    """Rows or columns from `start` up to `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def scaled(self, factor: int) -> Span:
        return Span(self.start * factor, self.stop * factor)


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a frame."""

    rows: Span
    columns: Span

    @property
    def area(self) -> int:
        return len(self.rows) * len(self.columns)

    def scaled(self, factor: int) -> Window:
        return Window(self.rows.scaled(factor), self.columns.scaled(factor))


@dataclass(frozen=True, slots=True)
class Tiling:
    """How many tiles a frame is cut into; 1 x 1 is the whole frame at once."""

    rows: int = 1
    columns: int = 1

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def windows(self, latent: Size) -> list[Window]:
        """Return the tiles as windows of the latent grid, row by row; they differ by a cell at most."""
        return [
            Window(rows, columns)
            for rows in _split(latent.height, self.rows)
            for columns in _split(latent.width, self.columns)
        ]


WHOLE = Tiling()


def _split(length: int, parts: int) -> list[Span]:
    assert 1 <= parts <= length, f"{length} cells do not make {parts} tiles"
    return [Span(a, b) for a, b in pairwise(length * index // parts for index in range(parts + 1))]


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer does to windows and frames: `conv` and `res`(idual block) keep them, `up` and `down` scale by two.

    temporal: it also doubles the frames, or merges two into one.
    """

    kind: Literal["conv", "res", "up", "down"]
    dim_in: int
    dim_out: int
    temporal: bool = False

    def before(self, after: Span, length: int) -> Span:
        """Return the span of inputs that outputs `after` depend on; `length` of inputs there are."""
        if self.kind == "up":  # nearest neighbours, then a convolution
            start, stop = (after.start - 1) // 2, (after.stop + 2) // 2
        elif self.kind == "down":  # stride 2, padded at the end alone
            start, stop = 2 * after.start, 2 * after.stop + 1
        else:
            halo = 2 if self.kind == "res" else 1
            start, stop = after.start - halo, after.stop + halo
        return Span(max(start, 0), min(stop, length))

    def after(self, before: Span) -> Span:
        """Return the span of outputs that come of inputs `before`, right and wrong ones."""
        if self.kind == "up":
            return before.scaled(2)
        if self.kind == "down":
            return Span(before.start // 2, before.stop // 2)
        return before


@dataclass(frozen=True, slots=True)
class LocalLayers:
    """The layers that tiles go through: some see a chunk of frames, those of high resolution one frame at a time."""

    chunk: tuple[Layer, ...]
    frame: tuple[Layer, ...]


def decoder_layers(config: VaeConfig) -> LocalLayers:
    """Return the decoder's local layers in order: chunk by chunk up to the last doubling of frames, then by frame."""
    dims = [config.base_dim * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
    temporal = tuple(reversed(config.temporal_downsample))
    chunk: list[Layer] = [Layer("up", dims[1], dims[1] // 2, temporal[0])]
    frame: list[Layer] = []
    last = max(level for level, doubles in enumerate(temporal) if doubles)
    for level, (dim_in, dim_out) in enumerate(pairwise(dims[1:]), start=1):
        layers = chunk if level <= last else frame
        widths = [dim_in // 2] + [dim_out] * (config.num_res_blocks + 1)
        layers += [Layer("res", *pair) for pair in pairwise(widths)]
        if level < len(config.dim_mult) - 1:
            layers.append(Layer("up", dim_out, dim_out // 2, temporal[level]))
    frame.append(Layer("conv", dims[-1], 3))
    return LocalLayers(tuple(chunk), tuple(frame))


def encoder_layers(config: VaeConfig) -> LocalLayers:
    """Return the encoder's local layers in order: frame by frame up to the first merging of frames, then by chunk."""
    dims = [config.base_dim * factor for factor in (1, *config.dim_mult)]
    frame: list[Layer] = [Layer("conv", 3, dims[0])]
    chunk: list[Layer] = []
    first = min(level for level, merges in enumerate(config.temporal_downsample) if merges)
    for level, (dim_in, dim_out) in enumerate(list(pairwise(dims))[:-1]):
        widths = [dim_in] + [dim_out] * config.num_res_blocks
        blocks = [Layer("res", *pair) for pair in pairwise(widths)]
        (frame if level <= first else chunk).extend(blocks)
        down = Layer("down", dim_out, dim_out, config.temporal_downsample[level])
        (frame if level < first else chunk).append(down)
    return LocalLayers(tuple(chunk), tuple(frame))


def windows_through(layers: Sequence[Layer], output: Window, output_size: Size) -> list[Window]:
    """Return the window that each layer must see for `output` to come out right, and last `output` itself."""
    windows, size = [output], output_size
    for layer in reversed(layers):
        scale = {"up": 0.5, "down": 2.0}.get(layer.kind, 1.0)
        size = Size(int(size.height * scale), int(size.width * scale))
        after = windows[0]
        windows.insert(0, Window(layer.before(after.rows, size.height), layer.before(after.columns, size.width)))
    return windows


def crops(layers: Sequence[Layer], windows: Sequence[Window]) -> list[Window]:
    """Return the part of each layer's output that the next one takes, counted from that output's corner."""
    return [
        Window(_inside(layer.after(before.rows), after.rows), _inside(layer.after(before.columns), after.columns))
        for layer, before, after in zip(layers, windows[:-1], windows[1:], strict=True)
    ]


def _inside(produced: Span, kept: Span) -> Span:
    assert produced.start <= kept.start and kept.stop <= produced.stop, (produced, kept)
    return Span(kept.start - produced.start, kept.stop - produced.start)
