"""The causal video VAE of Wan2.1, run as a stream: one latent frame in, four pixel frames out, and back.

Every causal layer keeps the last frames it saw in a `Memory`, so a clip of any length needs the memory of one chunk.
The result is that of the whole clip at once. Where a frame is too large, its tiles go through the local layers one
after the other (`tiling.py`); the layers that see whole frames run before the decoder's tiles and after the encoder's.

Module names are those of diffusers' `AutoencoderKLWan`. Source of the architecture:
https://github.com/Wan-Video/Wan2.1 (wan/modules/vae.py, Apache-2.0).

Shape legend: B batch, C channels, T frames of a chunk, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from wan_local.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, Size
from wan_local.models.causal_layers import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    Memory,
    MidBlock,
    ResidualBlock,
    Run,
    Steady,
    Upsample,
    activate,
    cut,
    run_layers,
)
from wan_local.request import Check, unchecked
from wan_local.settings import VaeConfig
from wan_local.tiling import WHOLE, Tiling, Window, crops, decoder_layers, encoder_layers, windows_through


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        dims = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, dims[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, (dim_in, dim_out) in enumerate(pairwise(dims)):
            widths = [dim_in] + [dim_out] * config.num_res_blocks
            layers += [ResidualBlock(*pair) for pair in pairwise(widths)]
            if level < len(config.dim_mult) - 1:
                layers.append(Downsample(dim_out, temporal=config.temporal_downsample[level]))
        self.down_blocks = nn.ModuleList(layers)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = ChannelNorm(dims[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, 3, padding=1)
        # of high resolution: by frame until frames are merged, then by chunk; tiles can go through both
        self.local = encoder_layers(config)
        merging = len(self.local.frame) - 1
        local = merging + len(self.local.chunk)
        self.frame_layers: tuple[Run, ...] = (self.conv_in, *layers[:merging])
        self.chunk_layers: tuple[Run, ...] = tuple(layers[merging:local])
        self.whole_layers: tuple[Run, ...] = (*layers[local:], self.mid_block, self._head)

    def _head(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        out: Tensor = self.conv_out(activate(self.norm_out, x_BCTHW), memory)
        return out


def _is_still(chunk: Tensor) -> bool:
    """Tell whether all frames of a chunk are one and the same."""
    return chunk.shape[2] > 1 and chunk.stride(2) == 0


class _EncoderStream:
    """A clip's way, or that of one tile of it, through the encoder's local layers."""

    def __init__(self, encoder: Encoder, window: Window | None = None, latent: Size | None = None) -> None:
        """Take the tile's window of the latent grid; None: whole frames."""
        self._encoder, self._memory = encoder, Memory()
        self._window: Window | None = None
        self._frame_crops: list[Window] | None = None
        self._chunk_crops: list[Window] | None = None
        if window is not None and latent is not None:
            layers = (*encoder.local.frame, *encoder.local.chunk)
            windows = windows_through(layers, window, latent)
            every, by_frame = crops(layers, windows), len(encoder.local.frame)
            self._window, self._frame_crops, self._chunk_crops = windows[0], every[:by_frame], every[by_frame:]
        self._chunks = 0
        self._previous: Tensor | None = None
        self._held: Tensor | None = None
        self._frames_steady: Steady | None = None
        self._chunks_steady: Steady | None = None

    def features(self, chunk: Tensor) -> Tensor:
        """Return the features [B, C, 1, h, w] of the next chunk of frames; the same tensor again where it repeats."""
        wanted = TEMPORAL_STRIDE if self._chunks else 1
        assert chunk.shape[2] == wanted, f"chunk {self._chunks} has {chunk.shape[2]} frames"
        self._chunks += 1
        if chunk is not self._previous:
            self._previous, self._frames_steady = chunk, Steady() if _is_still(chunk) else None
        if self._window is not None:
            chunk = cut(chunk, self._window)
        by_frame = self._encoder.frame_layers
        fine = [
            run_layers(by_frame, frame, self._memory, crops=self._frame_crops, steady=self._frames_steady)
            for frame in chunk.split(1, dim=2)
        ]
        repeats = self._held is not None and all(features is self._held for features in fine)
        self._chunks_steady = (self._chunks_steady or Steady()) if repeats else None
        self._held = fine[-1] if self._frames_steady else None
        by_chunk, x = self._encoder.chunk_layers, torch.cat(fine, dim=2)
        return run_layers(by_chunk, x, self._memory, crops=self._chunk_crops, steady=self._chunks_steady)


class UpBlock(nn.Module):
    """A place for the names of a level's layers; the decoder runs them."""

    def __init__(self, dim_in: int, dim_out: int, *, num_resnets: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(dim_in if index == 0 else dim_out, dim_out) for index in range(num_resnets)]
        )
        self.upsamplers = nn.ModuleList([upsample] if upsample else [])


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        levels = len(config.dim_mult)
        dims = [config.base_dim * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal = tuple(reversed(config.temporal_downsample))
        self.conv_in = CausalConv3d(config.z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        blocks = []
        for level, (dim_in, dim_out) in enumerate(pairwise(dims)):
            upsample = Upsample(dim_out, temporal=temporal[level]) if level < levels - 1 else None
            dim_in = dim_in // 2 if level else dim_in  # the upsampling before has halved them
            blocks.append(UpBlock(dim_in, dim_out, num_resnets=config.num_res_blocks + 1, upsample=upsample))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = ChannelNorm(dims[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(dims[-1], 3, 3, padding=1)
        # of high resolution: by chunk until frames are doubled, then by frame; tiles can go through both
        self.local = decoder_layers(config)
        layers = [layer for block in blocks for layer in (*block.resnets, *block.upsamplers)]
        local = len(blocks[0].resnets)
        doubled = local + len(self.local.chunk)
        self.whole_layers: tuple[Run, ...] = (self.conv_in, self.mid_block, *layers[:local])
        self.chunk_layers: tuple[Run, ...] = tuple(layers[local:doubled])
        self.frame_layers: tuple[Run, ...] = (*layers[doubled:], self._head)

    def pixels(self, x_BCTHW: Tensor, memory: Memory, crops: Sequence[Window] | None) -> Tensor:
        """Return the pixels of a tile's features; the layers of high resolution see one frame at a time."""
        by_chunk = len(self.chunk_layers)
        x_BCTHW = run_layers(self.chunk_layers, x_BCTHW, memory, crops=crops and crops[:by_chunk])
        frames = x_BCTHW.split(1, dim=2)
        return torch.cat(
            [run_layers(self.frame_layers, x, memory, crops=crops and crops[by_chunk:]) for x in frames], dim=2
        )

    def _head(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        out: Tensor = self.conv_out(activate(self.norm_out, x_BCTHW), memory)
        return out


@dataclass(frozen=True, slots=True)
class TilePixels:
    """Some frames of one tile: `pixels` [B, 3, t, h, w] belong into `window`, from frame `first` on."""

    window: Window
    first: int
    pixels: Tensor


class Vae(nn.Module):
    """Encoder and decoder with the normalisation of latents that the transformer was trained with."""

    def __init__(self, config: VaeConfig, *, encodes: bool = True, decodes: bool = True) -> None:
        """Build both halves, or the one that is needed."""
        super().__init__()
        self.config = config
        if encodes:
            self.encoder = Encoder(config)
            self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        if decodes:
            self.decoder = Decoder(config)
            self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(
        self,
        chunks: Iterable[Tensor],
        tiling: Tiling = WHOLE,
        *,
        keep_on: str = "cpu",
        check: Check = unchecked,
    ) -> Tensor:
        """Return normalised latents [B, z_dim, T, H/8, W/8] of a video that comes as chunks of frames.

        chunks: [B, 3, t, H, W] in [-1, 1], the first with one frame and every other with four. Where one tensor that
        holds a single frame expanded to four comes again and again, as the blank middle of FLF2V's condition does, what
        repeats is not computed again; the result is the same bit for bit. The posterior's mean is taken, no sample.
        tiling: of each frame; tiles change the result by rounding alone. keep_on: the device that holds all frames'
        features between the tiles and the layers that see whole frames; nothing is kept for one tile. check: called
        before each chunk of each tile.
        """
        memory: Memory = {}
        means: list[Tensor] = []
        previous: Tensor | None = None
        steady: Steady | None = None
        for features in self._local_features(chunks, tiling, keep_on, check):
            steady = (steady or Steady()) if features is previous else None
            previous = features
            x = run_layers(self.encoder.whole_layers, features.to(self.device), memory, steady=steady)
            moments = self.quant_conv(x, memory)
            means.append(moments[:, : self.config.z_dim])
        return self.normalize(torch.cat(means, dim=2))

    def _local_features(self, chunks: Iterable[Tensor], tiling: Tiling, keep_on: str, check: Check) -> Iterator[Tensor]:
        """Yield each chunk's features before the layers that see whole frames; one tensor again where it repeats."""
        if tiling.count > 1:
            yield from self._joined_tiles(list(chunks), tiling, keep_on, check)
            return
        stream = _EncoderStream(self.encoder)
        for chunk in chunks:
            check()
            yield stream.features(chunk)

    def _joined_tiles(self, chunks: list[Tensor], tiling: Tiling, keep_on: str, check: Check) -> list[Tensor]:
        """Return every chunk's features, made tile by tile and kept on `keep_on`."""
        latent = Size(chunks[0].shape[-2] // SPATIAL_STRIDE, chunks[0].shape[-1] // SPATIAL_STRIDE)
        whole: list[Tensor] = []
        repeats = [True] * len(chunks)
        for window in tiling.windows(latent):
            stream, previous = _EncoderStream(self.encoder, window, latent), None
            for index, chunk in enumerate(chunks):
                check()
                tile = stream.features(chunk)
                if len(whole) == index:
                    whole.append(tile.new_empty((*tile.shape[:3], latent.height, latent.width), device=keep_on))
                cut(whole[index], window).copy_(tile)
                repeats[index] &= tile is previous
                previous = tile
        for index, repeated in enumerate(repeats):
            if repeated:
                whole[index] = whole[index - 1]
        return whole

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the video of normalised latents [B, z_dim, T, h, w] as chunks [B, 3, 1 or 4, 8h, 8w], not clamped."""
        memory: Memory = {}
        for features in self._whole_features(latents):
            yield self.decoder.pixels(features, memory, None)

    def decode_tiles(self, latents: Tensor, tiling: Tiling, *, keep_on: str = "cpu") -> Iterator[TilePixels]:
        """Yield the video that `decode` yields tile by tile, each through all frames; equal but for rounding.

        keep_on: the device that holds the features that the tiles are made of, of all frames.
        """
        latent = Size(latents.shape[-2], latents.shape[-1])
        size = Size(latent.height * SPATIAL_STRIDE, latent.width * SPATIAL_STRIDE)
        kept = [features.to(keep_on) for features in self._whole_features(latents)]
        layers = (*self.decoder.local.chunk, *self.decoder.local.frame)
        for window in tiling.windows(latent):
            pixels = window.scaled(SPATIAL_STRIDE)
            windows = windows_through(layers, pixels, size)
            trims, memory, done = crops(layers, windows), Memory(), 0
            for features in kept:
                tile = self.decoder.pixels(cut(features, windows[0]).to(latents.device), memory, trims)
                yield TilePixels(pixels, done, tile)
                done += tile.shape[2]

    def _whole_features(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield each latent frame's features after the layers that see whole frames."""
        memory: Memory = {}
        for latent in self.denormalize(latents).split(1, dim=2):
            yield run_layers(self.decoder.whole_layers, self.post_quant_conv(latent, memory), memory)

    def normalize(self, latents: Tensor) -> Tensor:
        mean, inverse_std = self._statistics(latents)
        return (latents - mean) * inverse_std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, inverse_std = self._statistics(latents)
        return latents / inverse_std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = like.new_tensor(self.config.latents_mean).view(1, -1, 1, 1, 1)
        return mean, 1.0 / like.new_tensor(self.config.latents_std).view(1, -1, 1, 1, 1)
