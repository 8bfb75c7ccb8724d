"""The layers of the video VAE, causal in time: each remembers the last frames it saw, so a clip can come in chunks.

Module names are those of diffusers' `AutoencoderKLWan`. Source of the architecture:
https://github.com/Wan-Video/Wan2.1 (wan/modules/vae.py, Apache-2.0).

Shape legend: B batch, C channels, T frames of a chunk, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_local.layers import Conv3d, conv3d
from wan_local.tiling import ATTENTION_SCORES, Window

Memory = dict[nn.Module, Tensor]  # what each causal layer remembers of one stream
Run = Callable[[Tensor, Memory], Tensor]


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
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, past, 0))  # which keeps the layout, as joining zeros would not
    else:
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


def activate(norm: ChannelNorm, x_BCTHW: Tensor) -> Tensor:
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
        x_BCTHW = self.conv1(activate(self.norm1, x_BCTHW), memory)
        out: Tensor = self.conv2(activate(self.norm2, x_BCTHW), memory)
        return out.add_(shortcut)


class FrameAttention(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW + _each_frame(self._attend, x_BCTHW)  # laid out as the first one is

    def _attend(self, x_NCHW: Tensor) -> Tensor:
        _, _, h, w = x_NCHW.shape
        qkv = self.to_qkv(self.norm(x_NCHW)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = qkv.chunk(3, dim=-1)
        # queries in turn: a backend that keeps the scores would keep 0.8 GB of them at 720p
        queries = q.split(max(1, ATTENTION_SCORES // (h * w)), dim=2)
        x = torch.cat([F.scaled_dot_product_attention(some, k, v) for some in queries], dim=2)
        out: Tensor = self.proj(x.squeeze(1).transpose(1, 2).unflatten(2, (h, w)))
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
            memory[self] = F.pad(torch.zeros_like(x_BCTHW), (0, 0, 0, 0, 1, 0))
            return x_BCTHW
        y: Tensor = time_conv(_with_past(self, x_BCTHW, memory, 2))
        channels_last = y.is_contiguous(memory_format=torch.channels_last_3d)
        y = y.unflatten(1, (2, -1))
        if channels_last:  # [B, 2, C, T, H, W] -> [B, (T 2), H, W, C], which is the same layout of [B, C, (T 2), H, W]
            return y.permute(0, 3, 1, 4, 5, 2).flatten(1, 2).permute(0, 4, 1, 2, 3)
        return y.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def _each_frame(layer: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame."""
    b, _, t, _, _ = x_BCTHW.shape
    if t == 1:  # without merging axes: the strides that this gives to axes of one hide the layout from some layers
        return layer(x_BCTHW.squeeze(2)).unsqueeze(2)
    y_NCHW = layer(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y_NCHW.unflatten(0, (b, t)).transpose(1, 2)  # type: ignore[no-any-return]


@dataclass
class Steady:
    """How deep a run of layers has become periodic while its input repeats.

    A layer whose input repeats and whose memory the input left as it was gives the same output next time, bit for bit.
    `output` is that of the last such layer, `depth` how many there are.
    """

    depth: int = 0
    output: Tensor | None = None


def run_layers(
    layers: Sequence[Run],
    x_BCTHW: Tensor,
    memory: Memory,
    *,
    crops: Sequence[Window] | None = None,
    steady: Steady | None = None,
) -> Tensor:
    """Apply `layers`, cutting off what a tile's next layer does not need.

    From the layer on that `steady` says, which is told how far the run repeats.
    """
    first = 0
    if steady and steady.output is not None:
        first, x_BCTHW = steady.depth, steady.output
    for depth in range(first, len(layers)):
        before = dict(memory) if steady and steady.depth == depth else None
        x_BCTHW = layers[depth](x_BCTHW, memory)
        if crops is not None:
            x_BCTHW = cut(x_BCTHW, crops[depth])
        if steady and before is not None and _unchanged(memory, before):
            steady.depth, steady.output = depth + 1, x_BCTHW
    return x_BCTHW


def cut(x: Tensor, window: Window) -> Tensor:
    return x[..., window.rows.slice, window.columns.slice]


def _unchanged(memory: Memory, before: Memory) -> bool:
    """Tell whether a layer left every frame it remembers as it was."""
    return memory.keys() == before.keys() and all(
        frames is before[layer] or torch.equal(frames, before[layer]) for layer, frames in memory.items()
    )
