"""Every op at one size on one device: is it right, and what does a run of it move and multiply.

Takes a device and a size, gives `Case`s. The truth is each op's reference in float64 on the same device. `wan-local
doctor`, the probe before first use and `bench/gpu.py` all read this one list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wan_kernels.attention_int8 import KEY_BLOCK, attention_int8, attention_int8_reference
from wan_kernels.decode_int4 import INT4_GROUP, decode_int4_, decode_int4_reference
from wan_kernels.gate_norm_modulate import (
    gate_norm_modulate_,
    gate_norm_modulate_quantize_,
    gate_norm_modulate_reference,
)
from wan_kernels.gelu_quantize import gelu_quantize, gelu_quantize_reference
from wan_kernels.language import ceil_div
from wan_kernels.linear_int8 import (
    linear_int8,
    linear_int8_reference,
    linear_int8_residual_,
    linear_int8_residual_reference,
)
from wan_kernels.quantize_rows import quantize_rows, quantize_rows_reference
from wan_kernels.rms_rope import (
    quantize_keys_reference,
    rms_rope,
    rms_rope_quantize,
    rms_rope_quantize_keys,
    rms_rope_reference,
)
from wan_kernels.values import (
    quantize_values,
    quantize_values_reference,
    scale_values_,
    scale_values_reference,
)

_EPS = 1e-6
_HEAVY = 20.0  # times the ordinary size of a channel: every 300th is like this, as in video transformers
_F64 = torch.float64
_FLOAT_LIMIT = 6e-3  # relative rms: one rounding to bfloat16 is 2e-3
_STEP_LIMIT = 3e-3  # share of int8 numbers that may be one step off
_CENTRED = 1024  # keys whose mean is taken off all
_DECODED = 1024  # rows of a decoded weight that are compared, at least, where there are as many
_TAIL = 120  # rows that a video's last chunk may have: too few for the tiles of the others

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens, heads, channels of a head and the feed-forward's width."""

    tokens: int
    heads: int
    head_dim: int
    ffn_dim: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


SMALL = Size(tokens=257, heads=4, head_dim=32, ffn_dim=320)
REAL = Size(tokens=4097, heads=40, head_dim=128, ffn_dim=13_824)  # the 14B model's, tokens a ragged number
PROBED = replace(REAL, tokens=257)  # its widths, which decide what is compiled, and few tokens
TIMED = replace(REAL, tokens=32_760)  # 480p, 81 frames: beyond every card's cache, and longer than a launch takes


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one set of inputs. `run` gives what is compared with `truth`, every time the same.

    moved_bytes: read and written at the least. products: multiply-adds on tensor cores, 0 for what memory bounds.
    in_place: for ops that write what they read, the op alone; it is what is timed, since `run` works on a copy.
    """

    name: str
    run: Callable[[], Outputs]
    truth: Callable[[], Outputs]
    moved_bytes: int
    products: int = 0
    in_place: Callable[[], object] | None = None

    @property
    def timed(self) -> Callable[[], object]:
        return self.in_place or self.run


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a case is from the truth: the worst of its outputs, in units of what is allowed. 1 is the limit."""

    name: str
    error: float

    @property
    def right(self) -> bool:
        return self.error <= 1.0  # NaN is wrong


def judge(case: Case) -> Verdict:
    """Run a case once and compare it with the truth."""
    worst = max(
        (_distance(got, expected) for got, expected in zip(case.run(), case.truth(), strict=True)),
        key=lambda error: (error != error, error),
    )
    return Verdict(case.name, worst)


def _distance(got: Tensor, expected: Tensor) -> float:
    if got.dtype == torch.int8:
        steps = (got.int() - expected.int()).abs()
        share = float((steps > 0).double().mean())
        return share / _STEP_LIMIT if int(steps.max()) <= 1 else float("inf")
    difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(difference) / _FLOAT_LIMIT


def cases(
    device: torch.device, size: Size, dtype: torch.dtype = torch.bfloat16, *, group: str | None = None
) -> Iterator[Case]:
    """Yield every op's cases, or those of one of `GROUPS`; inputs live while their case does."""
    for name, cases_of in GROUPS.items():
        if group in (None, name):
            yield from cases_of(_Inputs(device, size, dtype))


class _Inputs:
    """Random tensors of a size, the same every time."""

    def __init__(self, device: torch.device, size: Size, dtype: torch.dtype) -> None:
        self.device, self.size, self.dtype = device, size, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def activations(self, width: int) -> Tensor:
        x = self.normal(1, self.size.tokens, width)
        x[..., ::300] *= _HEAVY
        x[:, self.size.tokens // 2] = 0
        return x.to(self.dtype)

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=self._generator, device=self.device, dtype=torch.int8)


def _row_cases(make: _Inputs) -> Iterator[Case]:
    size, width = make.size, make.dtype.itemsize
    x, y, numbers = make.activations(size.dim), make.activations(size.dim), size.tokens * size.dim
    gate, scale, shift = (make.normal(1, size.dim) for _ in range(3))
    rest = (y, gate, scale, shift, False, _EPS)

    def normed() -> Outputs:
        held = x.clone()
        return held, gate_norm_modulate_(held, *rest, make.dtype)

    def quantized() -> Outputs:
        held = x.clone()
        return (held, *gate_norm_modulate_quantize_(held, *rest, True))

    def truth() -> Outputs:
        new, n = gate_norm_modulate_reference(x, *rest, _F64)
        return new, n

    def quantized_truth() -> Outputs:
        new, n = truth()
        return (new, *quantize_rows_reference(n, True, _F64))

    worn = x.clone()  # by timing, which adds to it again and again
    yield Case(
        "gate_norm_modulate_",
        normed,
        truth,
        4 * numbers * width,
        in_place=lambda: gate_norm_modulate_(worn, *rest, make.dtype),
    )
    yield Case(
        "gate_norm_modulate_quantize_",
        quantized,
        quantized_truth,
        numbers * (3 * width + 1),
        in_place=lambda: gate_norm_modulate_quantize_(worn, *rest, True),
    )
    yield Case(
        "quantize_rows",
        lambda: quantize_rows(x, False),
        lambda: quantize_rows_reference(x, False, _F64),
        numbers * (width + 1),
    )
    yield Case(
        "quantize_rows rotated",
        lambda: quantize_rows(x, True),
        lambda: quantize_rows_reference(x, True, _F64),
        numbers * (width + 1),
    )
    h = make.activations(size.ffn_dim)
    yield Case(
        "gelu_quantize",
        lambda: gelu_quantize(h, True),
        lambda: gelu_quantize_reference(h, True, _F64),
        h.numel() * (width + 1),
    )


def _rotary_cases(make: _Inputs) -> Iterator[Case]:
    size, width, heads = make.size, make.dtype.itemsize, make.size.heads
    x, weight = make.activations(size.dim), make.normal(size.dim)
    angle = make.normal(size.tokens, size.head_dim // 2)
    cos, sin = angle.cos(), angle.sin()
    tables = 2 * cos.nbytes

    def exact() -> Tensor:
        return rms_rope_reference(x, weight, cos, sin, heads, _EPS, _F64)

    first = (x[:, :_CENTRED], weight, cos[:_CENTRED], sin[:_CENTRED])  # any vector near the mean key will do
    centre = rms_rope_reference(*first, heads, _EPS).mean(dim=1)
    yield Case(
        "rms_rope",
        lambda: (rms_rope(x, weight, cos, sin, heads, _EPS, make.dtype),),
        lambda: (exact(),),
        2 * x.numel() * width + tables,
    )
    yield Case(
        "rms_rope_quantize",
        lambda: rms_rope_quantize(x, weight, cos, sin, heads, _EPS),
        lambda: quantize_rows_reference(exact().transpose(1, 2).contiguous(), False, _F64),
        x.numel() * (width + 1) + tables,
    )
    yield Case(
        "rms_rope_quantize_keys",
        lambda: rms_rope_quantize_keys(x, weight, cos, sin, centre, _EPS),
        lambda: quantize_keys_reference(exact(), centre),
        x.numel() * (2 * width + 1) + tables,  # read twice: a row's norm comes first
    )


def _linear_cases(make: _Inputs) -> Iterator[Case]:
    yield _decode_case(make)  # first: of what the others are given, the last ones' inputs stay until the end
    size = make.size
    for outputs, inputs in ((size.dim, size.dim), (size.ffn_dim, size.dim)):
        a, a_scale = make.integers(1, size.tokens, inputs), make.normal(1, size.tokens).abs() / 1e3
        w, w_scale, bias = make.integers(outputs, inputs), make.normal(outputs).abs() / 1e3, make.normal(outputs)
        yield _linear_case((a, a_scale, w, w_scale, bias), make.dtype)
    yield _linear_case((a[:, :_TAIL], a_scale[:, :_TAIL], w, w_scale, bias), make.dtype, ", tail")
    a, w = make.integers(1, size.tokens, size.ffn_dim), make.integers(size.dim, size.ffn_dim)
    w_scale, bias = make.normal(size.dim).abs() / 1e3, make.normal(size.dim)
    x, gate = make.activations(size.dim), make.normal(1, size.dim)
    yield _residual_case((a, a_scale, w, w_scale, bias), x, gate)
    yield _residual_case((a[:, :_TAIL], a_scale[:, :_TAIL], w, w_scale, bias), x[:, :_TAIL], gate, ", tail")


def _decode_case(make: _Inputs) -> Case:
    """Return a weight's decoding, of which some rows are compared: all of them in float64 take 1.7 GB."""
    rows, columns = make.size.ffn_dim, make.size.dim
    packed = make.integers(rows, columns // 2).view(torch.uint8)
    scale, shift = make.normal(rows, columns // INT4_GROUP).abs(), make.normal(rows, columns // INT4_GROUP)
    out = torch.empty((rows, columns), device=make.device, dtype=torch.int8)
    some = slice(None, None, max(1, rows // _DECODED))

    def decoded() -> Outputs:
        row_scale = decode_int4_(packed, scale, shift, out)
        return out[some], row_scale[some]

    def truth() -> Outputs:
        weight = decode_int4_reference(packed[some], scale[some], shift[some], _F64)
        return quantize_rows_reference(weight, False, _F64)

    return Case("decode_int4_", decoded, truth, packed.nbytes + 2 * scale.nbytes + out.nbytes)


def _linear_case(operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype, words: str = "") -> Case:
    a, a_scale, w, w_scale, bias = operands
    (outputs, inputs), tokens = w.shape, a.shape[1]
    return Case(
        f"linear_int8 {outputs}x{inputs}{words}",
        lambda: (linear_int8(*operands, False, dtype),),
        lambda: (linear_int8_reference(a, a_scale, w, w_scale, bias, dtype=_F64),),
        a.nbytes + w.nbytes + tokens * outputs * dtype.itemsize,
        tokens * outputs * inputs,
    )


def _residual_case(
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], x: Tensor, gate: Tensor, words: str = ""
) -> Case:
    a, _, w, *_ = operands
    worn = x.clone()

    def onto() -> Outputs:
        held = x.clone()
        linear_int8_residual_(*operands, held, gate)
        return (held,)

    return Case(
        f"linear_int8_residual_ {w.shape[0]}x{w.shape[1]}{words}",
        onto,
        lambda: (linear_int8_residual_reference(*operands, x, gate, dtype=_F64),),
        a.nbytes + w.nbytes + 2 * x.nbytes,
        a.shape[1] * w.numel(),
        in_place=lambda: linear_int8_residual_(*operands, worn, gate),
    )


def _attention_cases(make: _Inputs) -> Iterator[Case]:
    size, width = make.size, make.dtype.itemsize
    heads = (1, size.heads, size.tokens, size.head_dim)
    q, q_scale = quantize_rows_reference(make.normal(*heads), False)
    k, k_scale = make.integers(*heads), make.normal(1, size.heads, ceil_div(size.tokens, KEY_BLOCK)).abs() / 50
    v = make.normal(1, size.tokens, size.heads, size.head_dim, dtype=make.dtype) + 1

    def scaled() -> Outputs:
        held = v.bfloat16()
        held = held.clone() if held is v else held
        scale = scale_values_(held)
        return held.view(torch.float16), scale

    worn = v.bfloat16().clone()
    yield Case(
        "scale_values_",
        scaled,
        lambda: scale_values_reference(v.bfloat16()),
        6 * v.numel(),  # read twice: a channel's largest comes first
        in_place=lambda: scale_values_(worn),
    )
    yield Case(
        "quantize_values",
        lambda: quantize_values(v),
        lambda: quantize_values_reference(v, _F64),
        v.numel() * (2 * width + 1),  # read twice: a channel's mean and largest come first
    )
    queries_and_keys = (q, q_scale, k, k_scale)
    yield _attention_case(queries_and_keys, (*scale_values_reference(v), None), make.dtype)
    yield _attention_case(queries_and_keys, quantize_values_reference(v), make.dtype)


def _attention_case(
    queries_and_keys: tuple[Tensor, Tensor, Tensor, Tensor],
    values: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype,
) -> Case:
    q, q_scale, k, k_scale = queries_and_keys
    v, v_scale, v_mean = values
    return Case(
        f"attention_int8, {'int8' if v.dtype == torch.int8 else 'fp16'} values",
        lambda: (attention_int8(*queries_and_keys, *values, dtype),),
        lambda: (attention_int8_reference(q, q_scale, k, k_scale, v, v_scale, v_mean, _F64),),
        q.nbytes + k.nbytes + v.nbytes + q.numel() * dtype.itemsize,
        2 * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3],
    )


# Each with inputs of its own, so that they can be checked side by side.
GROUPS: Mapping[str, Callable[[_Inputs], Iterator[Case]]] = {
    "rows": _row_cases,
    "rotary": _rotary_cases,
    "linear": _linear_cases,
    "attention": _attention_cases,
}
