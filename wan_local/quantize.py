"""Weight formats: what a quantized linear's plain tensors are, and the arithmetic on them.

Takes a weight [N, K] and a format, gives a `QuantizedWeight`, and back. The formats are optimum-quanto's: qint8 per
output channel, qfloat8_e4m3fn per output channel, qint4 in groups of 64 inputs with a float shift; the numbers are what
quanto computes. On disk and on the device linear `X` is made of

    format  X.weight                               X.weight_scale      X.weight_shift      weight
    int8    int8 [N, K]                            float32 [N]                             q * scale
    fp8     float8_e4m3fn [N, K]                   float32 [N]                             q * scale
    int4    uint8 [N, K/2], even input in the low  [N, K/64]           [N, K/64]           q * scale - shift, q in 0..15
            nibble, odd input in the high nibble

int4's scale and shift are bfloat16 where this package quantized (the error grows from 8.970 % to 8.971 % of a Gaussian
weight, and a 14B transformer is 1 GB smaller), and as they were where a checkpoint of quanto was read: any of bfloat16,
float16 and float32. Arithmetic on them is float32.

A *rotated* weight is W R, with R = (J/2 - I) x (J/2 - I) x (J/2 - I) on each group of 64 inputs (Kronecker product, J
the 4 x 4 matrix of ones): a regular Hadamard matrix, whose rows sum to 1, symmetric and its own inverse. The input is
turned by the same R, so that the product stays, and outliers are spread over their group before int8 rounds them.

Shape legend: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_local.key_map import Part
from wan_local.planner import W8A8_TOKENS
from wan_local.weight_format import Int8Arithmetic, WeightFormat

GROUP = 64  # inputs that share a scale in int4, and that are rotated together
INT8_MAX = 127
SMALLEST = 1e-12  # of a row's or a token's largest value: 0/0 must not happen
_EXACT_LENGTH = 1024  # products of two int8 whose float32 sum is exact in any order: 127^2 * 1024 < 2^24
_CHUNK_NUMBERS = 2**18  # worked on at a time: 1 MiB of float32 stays in a core's cache
_CHUNK_NUMBERS_ON_CARD = 2**24  # there it is launches that should be few
SCALE, SHIFT = "weight_scale", "weight_shift"
STORED_DTYPES: Mapping[torch.dtype, WeightFormat] = {
    torch.int8: "int8",
    torch.uint8: "int4",
    torch.float8_e4m3fn: "fp8",
}
_DATA_DTYPES = {format_: dtype for dtype, format_ in STORED_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] as its plain tensors; the module's docstring says which. `arithmetic` is used for int8 only."""

    data: Tensor
    scale: Tensor
    shift: Tensor | None = None
    rotated: bool = False
    arithmetic: Int8Arithmetic = "weight-only"

    @property
    def format(self) -> WeightFormat:
        return STORED_DTYPES[self.data.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        """Return [N, K] of the weight that this stands for."""
        rows, columns = self.data.shape
        return rows, columns * 2 if self.format == "int4" else columns


def stays_as_stored(name: str, dtype: torch.dtype) -> bool:
    """Tell whether a tensor is part of a quantized weight, which no compute dtype changes."""
    return dtype in STORED_DTYPES or name.endswith((SCALE, SHIFT))


def stored_shapes(format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:  # noqa: A002
    """Return the shape of each tensor that a weight [rows, columns] is made of, by the name of its leaf."""
    if format == "bf16":
        return {"weight": (rows, columns)}
    if format == "int4":
        groups = (rows, columns // GROUP)
        return {"weight": (rows, columns // 2), SCALE: groups, SHIFT: groups}
    return {"weight": (rows, columns), SCALE: (rows,)}


def default_arithmetic(device: torch.device) -> Int8Arithmetic:
    """Return what int8 weights are used by: with int8 inputs where the hardware multiplies bytes, else dequantized."""
    return "w8a8" if device.type == "cuda" or multiplies_bytes() else "weight-only"


def quantize_weight(weight_NK: Tensor, format: WeightFormat, *, rotated: bool = False) -> QuantizedWeight:  # noqa: A002
    """Return the weight in `format`, some rows at a time, so that temporaries stay small whatever its size.

    Raises ValueError for int4 or a rotation where K is no multiple of 64.
    """
    rows, columns = weight_NK.shape
    if columns % GROUP and (format == "int4" or rotated):
        raise ValueError(f"a weight of {rows} x {columns} does not fall into groups of {GROUP} inputs")
    data, scale, shift = _empty(weight_NK, format)
    write = {"int8": _write_int8, "fp8": _write_fp8, "int4": _write_int4}[format]
    step = max(1, _CHUNK_NUMBERS // columns)
    wide = torch.empty((min(step, rows), columns), device=weight_NK.device)
    shifts = itertools.repeat(None) if shift is None else shift.split(step)
    pieces = zip(weight_NK.split(step), data.split(step), scale.split(step), shifts, strict=False)
    for chunk, data_chunk, scale_chunk, shift_chunk in pieces:
        numbers = wide[: chunk.shape[0]].copy_(chunk)  # always the same memory, which stays in the cache
        write(rotate(numbers) if rotated else numbers, data_chunk, scale_chunk, shift_chunk)
    return QuantizedWeight(data, scale, shift, rotated)


def _empty(weight_NK: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: A002
    """Return room for the tensors that a weight becomes."""
    shapes = stored_shapes(format, *weight_NK.shape)
    few = torch.bfloat16 if format == "int4" else torch.float32
    data = torch.empty(shapes["weight"], dtype=_DATA_DTYPES[format], device=weight_NK.device)
    scale = torch.empty(shapes[SCALE], dtype=few, device=weight_NK.device)
    return data, scale, torch.empty_like(scale) if SHIFT in shapes else None


# Each of these may overwrite its numbers, float32 [rows, K], and writes what they become. A clamp of int8 would change
# nothing: a quotient is 127 at most, but for one rounding.


def _write_int8(numbers_NK: Tensor, data: Tensor, scale: Tensor, _: Tensor | None) -> None:
    _write_scale(numbers_NK, INT8_MAX, scale)
    data.copy_(numbers_NK.div_(scale.unsqueeze(1)).round_())


def _write_fp8(numbers_NK: Tensor, data: Tensor, scale: Tensor, _: Tensor | None) -> None:
    most = torch.finfo(torch.float8_e4m3fn).max
    _write_scale(numbers_NK, most, scale)
    data.copy_(numbers_NK.div_(scale.unsqueeze(1)).clamp_(-most, most))


def _write_scale(numbers_NK: Tensor, most: float, scale: Tensor) -> None:
    """Write the largest magnitude of each row by `most`; without a temporary of all magnitudes."""
    torch.maximum(numbers_NK.amax(dim=1), numbers_NK.amin(dim=1).neg_(), out=scale)
    scale.clamp_(min=SMALLEST).div_(most)


def _write_int4(numbers_NK: Tensor, data: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """Round scale and shift to bfloat16 first, so that the data make up for what that loses."""
    assert shift is not None
    groups = numbers_NK.unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=2), groups.amax(dim=2)  # aminmax is five times slower
    scale.copy_((high - low).clamp_(min=SMALLEST).div_(15))
    shift.copy_(-low)
    groups.add_(shift.float().unsqueeze(2)).div_(scale.float().unsqueeze(2)).round_().clamp_(0, 15)
    data.copy_(pack_int4(numbers_NK.to(torch.int8).view(torch.uint8)))  # a cast to uint8 is seven times slower


def pack_int4(q_NK: Tensor) -> Tensor:
    """Pack numbers of 0..15, uint8 [N, K], into uint8 [N, K/2]."""
    pairs = q_NK.contiguous().view(torch.int16)  # the even one in the lower byte: machines are little-endian
    return (pairs | pairs >> 4).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the numbers of 0..15 that `pack_int4` packed, uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in `dtype`, computed in float32; a rotated one stays rotated."""
    out_NK = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    at_once = _CHUNK_NUMBERS if out_NK.device.type == "cpu" else _CHUNK_NUMBERS_ON_CARD
    rows = max(1, at_once // out_NK.shape[1])
    shifts = itertools.repeat(None) if weight.shift is None else weight.shift.split(rows)
    pieces = zip(out_NK.split(rows), weight.data.split(rows), weight.scale.split(rows), shifts, strict=False)
    for out, data, scale, shift in pieces:
        if shift is None:
            out.copy_(data.to(torch.float32).mul_(scale.float().unsqueeze(1)))
        else:
            groups = unpack_int4(data).to(torch.float32).unflatten(1, (scale.shape[1], -1))
            out.copy_(groups.mul_(scale.float().unsqueeze(2)).sub_(shift.float().unsqueeze(2)).flatten(1))
    return out_NK


def quantize_tokens(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [M, K] and float32 scales [M]: symmetric per token, halves rounded to even."""
    wide = x_MK.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_(min=SMALLEST).div_(INT8_MAX)
    return (wide / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale.squeeze(1)


def linear_w8a8(x_MK: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias [M, N] in the dtype of x, with both rounded to int8 and summed in int32.

    Some tokens at a time: each counts for itself, so the result does not depend on how many.
    """
    out_MN = x_MK.new_empty((x_MK.shape[0], weight.data.shape[0]))
    for x, out in zip(x_MK.split(W8A8_TOKENS), out_MN.split(W8A8_TOKENS), strict=True):
        q_MK, scale_M = quantize_tokens(x)
        wide_MN = integer_product(q_MK, weight.data).float()
        wide_MN.mul_(scale_M.unsqueeze(1)).mul_(weight.scale)
        out.copy_(wide_MN if bias is None else wide_MN.add_(bias.float()))
    return out_MN


def integer_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return a b^T as int32 [M, N] of int8 matrices, exact.

    A CPU without dot products of bytes does not have a fast `_int_mm` (20 times slower than float32 on AVX2), so there
    it is float32 products of pieces short enough to be exact.
    """
    if a_MK.device.type == "cuda":
        rows = a_MK.shape[0]
        if rows <= 16:  # cuBLAS wants more
            a_MK = torch.nn.functional.pad(a_MK, (0, 0, 0, 17 - rows))
        return torch._int_mm(a_MK, b_NK.t())[:rows]
    if multiplies_bytes():
        return torch._int_mm(a_MK, b_NK.t())
    total = torch.zeros((a_MK.shape[0], b_NK.shape[0]), dtype=torch.int32)
    for a, b in zip(a_MK.split(_EXACT_LENGTH, dim=1), b_NK.split(_EXACT_LENGTH, dim=1), strict=True):
        total += (a.float() @ b.float().t()).to(torch.int32)
    return total


def multiplies_bytes() -> bool:
    """Tell whether this CPU has instructions that make `_int_mm` faster than float32 (AVX512-VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


def rotate(x: Tensor) -> Tensor:
    """Turn each group of 64 along the last axis by the regular Hadamard matrix, in the dtype of x.

    It is its own inverse. Source: ConvRot, https://arxiv.org/abs/2512.03673.
    """
    turned: Tensor = x.unflatten(-1, (-1, GROUP)) @ _rotation(x.device, x.dtype)
    return turned.flatten(-2)


@functools.cache
def _rotation(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what turns a group, kept: to bring it to a card the host waits until the card has done all before."""
    return hadamard(GROUP).to(device, dtype)


@functools.cache
def hadamard(order: int) -> Tensor:
    """Return the regular Hadamard matrix of a power of 4, symmetric and orthonormal, float32 [order, order]."""
    four = torch.ones(4, 4) / 2 - torch.eye(4)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, four)
    assert matrix.shape[0] == order, f"{order} is no power of 4"
    return matrix


_ATTENTION = r"blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)"
_BLOCK_LINEARS: Mapping[Part, re.Pattern[str]] = {
    "transformer": re.compile(rf"({_ATTENTION}|blocks\.\d+\.ffn\.net\.(0\.proj|2))\.weight"),
    "text_encoder": re.compile(
        r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w[io](_\d)?)\.weight"
    ),
    "image_encoder": re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"),
}


def is_block_linear(part: Part, name: str) -> bool:
    """Tell whether tensor `name` is the weight of a linear inside a block: these and no others are quantized."""
    return part in _BLOCK_LINEARS and _BLOCK_LINEARS[part].fullmatch(name) is not None


def block_number(name: str) -> int:
    """Return the number of the block that a tensor or linear of a block belongs to: the first number in its name."""
    return next(int(piece) for piece in name.split(".") if piece.isdigit())
