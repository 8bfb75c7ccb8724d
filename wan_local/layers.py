"""The pieces the networks are made of: linears, norms, rotary embedding. Plain PyTorch, the truth for kernels.

Shape legend: B batch, L tokens, H heads, K channels of a head, D channels of a token (H * K).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_local.quantize import SCALE, SHIFT, QuantizedWeight, dequantize, linear_w8a8, rotate
from wan_local.weight_format import Int8Arithmetic

DOWN, UP, DELTA = "lora_down", "lora_up", "lora_delta"
_ROTARY_THETA = 10_000.0


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias [..., N] in the dtype of x [..., K]; a quantized weight is used as its arithmetic says.

    Where it is dequantized, that lasts for this call: one linear's weight at a time is whole.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if weight.rotated:
        x = rotate(x)
    if weight.format == "int8" and weight.arithmetic == "w8a8":
        return linear_w8a8(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)
    return F.linear(x, dequantize(weight, x.dtype), bias)


def _in_half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias in the dtype of x, multiplied in float16: what does not fit there comes out infinite."""
    out = F.linear(x.half(), weight.half()).to(x.dtype)
    return out if bias is None else out.add_(bias)


class Linear(nn.Module):
    """A linear layer by `linear`, of plain weights or, after `hold`, of quantized ones.

    `rotated`: the weight wants its input rotated. `arithmetic`: what int8 weights are used by.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: nn.Parameter | None
    weight_shift: nn.Parameter | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None
    lora_delta: nn.Parameter | None

    def __init__(self, dim_in: int, dim_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        self.bias = nn.Parameter(torch.empty(dim_out)) if bias else None
        self.register_parameter(SCALE, None)
        self.register_parameter(SHIFT, None)
        for name in (DOWN, UP, DELTA):
            self.register_parameter(name, None)
        self.shape = (dim_out, dim_in)
        self.rotated = False
        self.arithmetic: Int8Arithmetic = "weight-only"
        self.half_sums = False  # plain weights meet float16 rows, and sums are float16 where the device can

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of what a linear with a bias takes and gives; a quantized weight has another."""
        return (self.weight if self.bias is None else self.bias).dtype

    def hold(self, tensors: Mapping[str, Tensor], *, rotated: bool, arithmetic: Int8Arithmetic) -> None:
        """Take quantized weights from now on: `weight`, `weight_scale` and for int4 `weight_shift`, maybe on meta."""
        for name in ("weight", SCALE, SHIFT):
            tensor = tensors.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.rotated, self.arithmetic = rotated, arithmetic

    @property
    def branched(self) -> bool:
        """Tell whether there is a side branch."""
        return self.lora_down is not None or self.lora_delta is not None

    def branch(self, rank: int | None) -> dict[str, tuple[int, ...]]:
        """Take a side branch, on meta: of low rank, or (None) a whole matrix. Return its tensors' shapes."""
        rows, columns = self.shape
        shapes: dict[str, tuple[int, ...]] = {DELTA: (rows, columns)}
        if rank is not None:
            shapes = {DOWN: (rank, columns), UP: (rows, rank)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
        return shapes

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_scale is None and self.half_sums:
            out = _in_half(x, self.weight, self.bias)
        elif self.weight_scale is None:
            out = linear(x, self.weight, self.bias)
        else:
            weight = QuantizedWeight(self.weight, self.weight_scale, self.weight_shift, self.rotated, self.arithmetic)
            out = linear(x, weight, self.bias)
        if self.lora_down is not None and self.lora_up is not None:
            out.view(-1, self.shape[0]).addmm_(F.linear(x, self.lora_down).flatten(0, -2), self.lora_up.t())
        if self.lora_delta is not None:
            out.view(-1, self.shape[0]).addmm_(x.flatten(0, -2), self.lora_delta.t())
        return out


def adopt_linears(module: nn.Module) -> None:
    """Put a `Linear` of the same shape in the place of every `nn.Linear` below `module`, before there are weights."""
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear):
            module.set_submodule(name, Linear(part.in_features, part.out_features, bias=part.bias is not None))


class LayerNorm(nn.Module):
    """Layer norm with float32 statistics over the last axis; returns float32, whatever comes in."""

    def __init__(self, dim: int, *, eps: float, affine: bool) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if affine else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.layer_norm(x_BLD.float(), (self.dim,), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over all heads together, in float32: `x / sqrt(mean(x^2) + eps) * weight`."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.rms_norm(x_BLD.float(), (self.dim,), self.weight, self.eps)


def conv3d(
    x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return the 3-D convolution.

    On a CPU always by oneDNN: torch's own choice for narrow inputs (channels x frames x rows up to 20,480) is an im2col
    loop that is eight times slower. On a card as `conv3d_by_frames`; on meta, too, where bytes are counted as there.
    """
    if x_BCTHW.device.type == "cpu" and x_BCTHW.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        out: Tensor = torch.mkldnn_convolution(x_BCTHW, weight, bias, padding, stride, (1, 1, 1), 1)
        return out
    if x_BCTHW.device.type in ("cuda", "meta"):
        return conv3d_by_frames(x_BCTHW, weight, bias, stride=stride, padding=padding)
    return F.conv3d(x_BCTHW, weight, bias, stride, padding)


def conv3d_by_frames(
    x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return the 3-D convolution, not padded in time, as the sum of a 2-D one for each frame of the kernel.

    Done in one, an H200 (torch 2.11) took 1.3 GiB on top of a tile whose features are 0.06 GiB: about what an unfolded
    input is. What this takes is a frame of the input and one of the output.
    """
    assert padding[0] == 0 and x_BCTHW.shape[2] >= weight.shape[2], (padding, x_BCTHW.shape, weight.shape)
    starts = range(0, x_BCTHW.shape[2] - weight.shape[2] + 1, stride[0])
    if len(starts) == 1:
        return _one_frame(x_BCTHW, weight, bias, stride[1:], padding[1:]).unsqueeze(2)
    whole: Tensor | None = None
    for index, start in enumerate(starts):
        y_BCHW = _one_frame(x_BCTHW[:, :, start:], weight, bias, stride[1:], padding[1:])
        if whole is None:
            whole = y_BCHW.new_empty((*y_BCHW.shape[:2], len(starts), *y_BCHW.shape[2:]))
        whole[:, :, index] = y_BCHW
        del y_BCHW
    assert whole is not None
    return whole


def _one_frame(
    x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return the first frame of the convolution, [B, C, H, W]."""
    y_BCHW = F.conv2d(x_BCTHW[:, :, 0].contiguous(), weight[:, :, 0], bias, stride, padding)
    for tap in range(1, weight.shape[2]):
        y_BCHW.add_(F.conv2d(x_BCTHW[:, :, tap].contiguous(), weight[:, :, tap], None, stride, padding))
    return y_BCHW


class Conv3d(nn.Module):
    """A 3-D convolution by `conv3d`, without padding."""

    def __init__(self, dim_in: int, dim_out: int, kernel: tuple[int, int, int], *, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in, *kernel))
        self.bias = nn.Parameter(torch.empty(dim_out))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return conv3d(x_BCTHW, self.weight, self.bias, stride=self.stride, padding=(0, 0, 0))


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cos and sin of the rotary angles, each [L, K/2] in float32."""

    cos: Tensor
    sin: Tensor

    def tokens(self, span: slice) -> Rotary:
        return Rotary(self.cos[span], self.sin[span])


def rotary_embedding(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Rotary:
    """Return the rotary table of tokens in (time, height, width) order.

    Of the K/2 complex pairs of a head, c - 2*(c//3) turn with time and c//3 each with height and width. Angles are
    made in float64 on the CPU, as the official table is.
    """
    assert head_dim % 2 == 0, f"head_dim {head_dim} is odd"
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, (length, count) in enumerate(zip(grid, split, strict=True)):
        inverse = _ROTARY_THETA ** -(torch.arange(count, dtype=torch.float64) / max(count, 1))
        angle = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
        shape = [1, 1, 1, count]
        shape[axis] = length
        angles.append(angle.view(shape).expand(*grid, count))
    angles_LK = torch.cat(angles, dim=-1).reshape(-1, pairs)
    return Rotary(angles_LK.cos().float().to(device), angles_LK.sin().float().to(device))


class RotaryTable(nn.Module):
    """Keeps the rotary table that was asked for last: making one takes a CPU over 0.1 s at 720p, while a card waits."""

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self._head_dim = head_dim
        self._grid: tuple[int, int, int] | None = None
        for name in ("cos", "sin"):  # buffers, so that they go with the module's weights
            self.register_buffer(name, None, persistent=False)

    def forward(self, grid: tuple[int, int, int], device: torch.device) -> Rotary:
        kept = self.cos is not None and (self._grid, self.cos.device, self.cos.dtype) == (grid, device, torch.float32)
        if not kept:
            self.cos = self.sin = None
            made = rotary_embedding(grid, self._head_dim, device)
            self._grid, self.cos, self.sin = grid, made.cos, made.sin
        assert self.cos is not None and self.sin is not None
        return Rotary(self.cos, self.sin)


def apply_rotary(x_BLHK: Tensor, rotary: Rotary) -> Tensor:
    """Turn each neighbouring pair of channels by its angle, in float32; the result is float32."""
    cos_L1K, sin_L1K = rotary.cos.unsqueeze(-2), rotary.sin.unsqueeze(-2)
    even, odd = x_BLHK.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos_L1K - odd * sin_L1K, even * sin_L1K + odd * cos_L1K), dim=-1).flatten(-2)


def split_heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    x_BLHK: Tensor = x_BLD.unflatten(-1, (num_heads, -1))
    return x_BLHK


@contextmanager
def dequantizing(module: nn.Module) -> Iterator[None]:
    """Let every `Linear` below `module` use its quantized weights as floats until the block ends."""
    linears = [part for part in module.modules() if isinstance(part, Linear)]
    before = [part.arithmetic for part in linears]
    for part in linears:
        part.arithmetic = "weight-only"
    try:
        yield
    finally:
        for part, arithmetic in zip(linears, before, strict=True):
            part.arithmetic = arithmetic


@contextmanager
def half_sums(module: nn.Module) -> Iterator[None]:
    """Let every `Linear` below `module` multiply in float16 with float16 sums until the block ends.

    torch's flag for the sums is put back; off a card it has no meaning and the sums are wider.
    """
    linears, matmul = [part for part in module.modules() if isinstance(part, Linear)], torch.backends.cuda.matmul
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    for part in linears:
        part.half_sums = True
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = before
        for part in linears:
            part.half_sums = False
