"""The causal video VAE of Wan2.1, run as a stream: one latent frame in, four pixel frames out, and back.

Every causal layer keeps the last frames it saw in a `Memory`, so a clip of any length needs the memory of one chunk.
The result is that of the whole clip at once. Module names are those of diffusers' `AutoencoderKLWan`. Source of the
architecture: https://github.com/Wan-Video/Wan2.1 (wan/modules/vae.py, Apache-2.0).

Shape legend: B batch, C channels, T frames of a chunk, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_local.geometry import TEMPORAL_STRIDE
from wan_local.layers import Conv3d, conv3d
from wan_local.settings import VaeConfig

Memory = dict[nn.Module, Tensor]  # what each causal layer remembers of one stream


class CausalConv3d(nn.Module):
    """3-D convolution that sees this frame and earlier ones only; zeros stand before the first."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int, *, padding: int = 0) -> None:
        super().__init__()
        self.past = kernel - 1
        self.padding = (0, padding, padding)
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in, kernel, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(dim_out))

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        if self.past:
            x_BCTHW = _with_past(self, x_BCTHW, memory, self.past)
        return conv3d(x_BCTHW, self.weight, self.bias, stride=(1, 1, 1), padding=self.padding)


def _with_past(layer: nn.Module, x_BCTHW: Tensor, memory: Memory, past: int) -> Tensor:
    """Put the last `past` frames that `layer` saw before `x_BCTHW` (zeros at the start), and remember the new ones."""
    earlier = memory.get(layer)
    if earlier is None:
        b, c, _, h, w = x_BCTHW.shape
        earlier = x_BCTHW.new_zeros((b, c, past, h, w))
    x_BCTHW = torch.cat((earlier, x_BCTHW), dim=2)
    memory[layer] = x_BCTHW[:, :, -past:].clone()  # a clone, so that the chunk itself can go
    return x_BCTHW


class ChannelNorm(nn.Module):
    """Scale each position's channel vector to length sqrt(C), then by `gamma`."""

    def __init__(self, dim: int, *, spatial_dims: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.empty(dim, *[1] * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        # in place: at full resolution each copy is as large as four frames of features
        out: Tensor = F.normalize(x, dim=1).mul_(self.scale).mul_(self.gamma)
        return out


def _activate(norm: ChannelNorm, x_BCTHW: Tensor) -> Tensor:
    """Return SiLU of the normed features, in one buffer."""
    return F.silu(norm(x_BCTHW), inplace=True)


class ResidualBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(dim_in, spatial_dims=3), ChannelNorm(dim_out, spatial_dims=3)
        self.conv1 = CausalConv3d(dim_in, dim_out, 3, padding=1)
        self.conv2 = CausalConv3d(dim_out, dim_out, 3, padding=1)
        self.conv_shortcut = CausalConv3d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        shortcut = x_BCTHW if self.conv_shortcut is None else self.conv_shortcut(x_BCTHW, memory)
        x_BCTHW = self.conv1(_activate(self.norm1, x_BCTHW), memory)
        out: Tensor = self.conv2(_activate(self.norm2, x_BCTHW), memory)
        return out.add_(shortcut)


class FrameAttention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        b, _, t, h, w = x_BCTHW.shape
        x = x_BCTHW.transpose(1, 2).flatten(0, 1)
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = qkv.chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, (h, w))
        out: Tensor = self.proj(x).unflatten(0, (b, t)).transpose(1, 2) + x_BCTHW
        return out


class MidBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([FrameAttention(dim)])

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        x_BCTHW = self.attentions[0](self.resnets[0](x_BCTHW, memory))
        out: Tensor = self.resnets[1](x_BCTHW, memory)
        return out


class Downsample(nn.Module):
    """Halve rows and columns and, if `temporal`, frames; the very first frame stays one frame."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        x_BCTHW = _each_frame(self.resample, x_BCTHW)
        if self.time_conv is None:
            return x_BCTHW
        earlier = memory.get(self)
        memory[self] = x_BCTHW[:, :, -1:].clone()
        if earlier is None:
            return x_BCTHW
        out: Tensor = self.time_conv(torch.cat((earlier, x_BCTHW), dim=2))
        return out


class Upsample(nn.Module):
    """Double rows and columns, halve the channels and, if `temporal`, double the frames; the very first stays one."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = Conv3d(dim, 2 * dim, (3, 1, 1), stride=(1, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._double_frames(x_BCTHW, self.time_conv, memory)
        return _each_frame(self.resample, x_BCTHW)

    def _double_frames(self, x_BCTHW: Tensor, time_conv: Conv3d, memory: Memory) -> Tensor:
        if self not in memory:  # the first frame is neither doubled nor seen by the frames after it
            b, c, _, h, w = x_BCTHW.shape
            memory[self] = x_BCTHW.new_zeros((b, c, 2, h, w))
            return x_BCTHW
        y: Tensor = time_conv(_with_past(self, x_BCTHW, memory, 2)).unflatten(1, (2, -1))
        # [B, 2, C, T, H, W] -> [B, C, (T 2), H, W]
        return y.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def _each_frame(layer: nn.Module, x_BCTHW: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame."""
    b, _, t, _, _ = x_BCTHW.shape
    y: Tensor = layer(x_BCTHW.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, t))
    return y.transpose(1, 2)


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
        self.fine_blocks = next(
            index for index, layer in enumerate(layers) if isinstance(layer, Downsample) and layer.time_conv is not None
        )
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = ChannelNorm(dims[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, 3, padding=1)

    def fine(self, frame_BC1HW: Tensor, memory: Memory, steady: Steady | None) -> Tensor:
        """Return one frame's features before frames are merged: the layers of high resolution, one frame at a time."""
        return _run((self.conv_in, *self.down_blocks[: self.fine_blocks]), frame_BC1HW, memory, steady)

    def coarse(self, x_BCTHW: Tensor, memory: Memory, steady: Steady | None) -> Tensor:
        """Return the moments of a chunk's fine features."""
        return _run((*self.down_blocks[self.fine_blocks :], self.mid_block, self._head), x_BCTHW, memory, steady)

    def _head(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        out: Tensor = self.conv_out(_activate(self.norm_out, x_BCTHW), memory)
        return out


@dataclass
class Steady:
    """How deep a run of layers has become periodic while its input repeats.

    A layer whose input repeats and whose memory the input left as it was gives the same output next time, bit for bit.
    `output` is that of the last such layer, `depth` how many there are.
    """

    depth: int = 0
    output: Tensor | None = None


def _run(
    layers: Sequence[Callable[[Tensor, Memory], Tensor]], x_BCTHW: Tensor, memory: Memory, steady: Steady | None
) -> Tensor:
    """Apply `layers`, from the one on that `steady` says, and tell it how far the run repeats."""
    first = 0
    if steady and steady.output is not None:
        first, x_BCTHW = steady.depth, steady.output
    for depth in range(first, len(layers)):
        before = dict(memory) if steady and steady.depth == depth else None
        x_BCTHW = layers[depth](x_BCTHW, memory)
        if steady and before is not None and _unchanged(memory, before):
            steady.depth, steady.output = depth + 1, x_BCTHW
    return x_BCTHW


def _unchanged(memory: Memory, before: Memory) -> bool:
    """Tell whether a layer left every frame it remembers as it was."""
    return memory.keys() == before.keys() and all(
        frames is before[layer] or torch.equal(frames, before[layer]) for layer, frames in memory.items()
    )


def _is_still(chunk: Tensor) -> bool:
    """Tell whether all frames of a chunk are one and the same."""
    return chunk.shape[2] > 1 and chunk.stride(2) == 0


class UpBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, *, num_resnets: int, upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(dim_in if index == 0 else dim_out, dim_out) for index in range(num_resnets)]
        )
        self.upsamplers = nn.ModuleList([upsample] if upsample else [])

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x_BCTHW = layer(x_BCTHW, memory)
        return x_BCTHW


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
        self.whole_blocks = max(level for level, doubles in enumerate(temporal) if doubles) + 1
        self.norm_out = ChannelNorm(dims[-1], spatial_dims=3)
        self.conv_out = CausalConv3d(dims[-1], 3, 3, padding=1)

    def forward(self, x_BCTHW: Tensor, memory: Memory) -> Tensor:
        """Return the pixels of a chunk; the layers of high resolution see one frame at a time, to hold as little."""
        x_BCTHW = self.mid_block(self.conv_in(x_BCTHW, memory), memory)
        for block in self.up_blocks[: self.whole_blocks]:
            x_BCTHW = block(x_BCTHW, memory)
        return torch.cat([self._frame(frame, memory) for frame in x_BCTHW.split(1, dim=2)], dim=2)

    def _frame(self, x_BC1HW: Tensor, memory: Memory) -> Tensor:
        for block in self.up_blocks[self.whole_blocks :]:
            x_BC1HW = block(x_BC1HW, memory)
        out: Tensor = self.conv_out(_activate(self.norm_out, x_BC1HW), memory)
        return out


class Vae(nn.Module):
    """Encoder and decoder with the normalisation of latents that the transformer was trained with."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)

    def encode(self, chunks: Iterable[Tensor]) -> Tensor:
        """Return normalised latents [B, z_dim, T, H/8, W/8] of a video that comes as chunks of frames.

        chunks: [B, 3, t, H, W] in [-1, 1], the first with one frame and every other with four. Where one tensor that
        holds a single frame expanded to four comes again and again, as the blank middle of FLF2V's condition does, what
        repeats is not computed again; the result is the same bit for bit. The posterior's mean is taken, no sample.
        """
        memory: Memory = {}
        means: list[Tensor] = []
        previous: Tensor | None = None
        held: Tensor | None = None
        frames_steady: Steady | None = None
        chunks_steady: Steady | None = None
        for index, chunk in enumerate(chunks):
            assert chunk.shape[2] == (TEMPORAL_STRIDE if index else 1), f"chunk {index} has {chunk.shape[2]} frames"
            if chunk is not previous:
                previous, frames_steady = chunk, Steady() if _is_still(chunk) else None
            fine = [self.encoder.fine(frame, memory, frames_steady) for frame in chunk.split(1, dim=2)]
            repeats = held is not None and all(features is held for features in fine)
            chunks_steady = (chunks_steady or Steady()) if repeats else None
            held = fine[-1] if frames_steady else None
            moments = self.encoder.coarse(torch.cat(fine, dim=2), memory, chunks_steady)
            means.append(self.quant_conv(moments, memory)[:, : self.config.z_dim])
        return self.normalize(torch.cat(means, dim=2))

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the video of normalised latents [B, z_dim, T, h, w] as chunks [B, 3, 1 or 4, 8h, 8w], not clamped."""
        memory: Memory = {}
        for latent in self.denormalize(latents).split(1, dim=2):
            yield self.decoder(self.post_quant_conv(latent, memory), memory)

    def normalize(self, latents: Tensor) -> Tensor:
        mean, inverse_std = self._statistics(latents)
        return (latents - mean) * inverse_std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, inverse_std = self._statistics(latents)
        return latents / inverse_std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = like.new_tensor(self.config.latents_mean).view(1, -1, 1, 1, 1)
        return mean, 1.0 / like.new_tensor(self.config.latents_std).view(1, -1, 1, 1, 1)
