"""Every kernel as it is launched at the 14B model's sizes, compiled for the cards people own: no card is needed.

What counts: it fits the shared memory of a consumer card, its hot loop touches no stack, the tensor cores do the
products, and no place in memory is computed in 32 bits. How fast it is, only a card can say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

import triton
import triton.language as tl

from tests.kernels.ahead_of_time import Compiled, Recorder, compile_launch, recorded
from wan_kernels.hardware import ARCHITECTURES, CANDIDATES, SHARED_MEMORY_LIMIT, TileLaunch, table_launch

# by name: an op stands before its module of the same name in the package
attention_int8, decode_int4, gate_norm_modulate, gelu_quantize, linear_int8, quantize_rows, rms_rope, values = (
    import_module(f"wan_kernels.{name}")
    for name in (
        "attention_int8", "decode_int4", "gate_norm_modulate", "gelu_quantize",
        "linear_int8", "quantize_rows", "rms_rope", "values",
    )
)  # fmt: skip

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile")

TOKENS, DIM, FFN_DIM, HEADS = 75_600, 5120, 13_824, 40  # 720p, 81 frames
TOKENS_480P = 32_760  # not a multiple of 16 as 75,600 is, so other code is compiled
TAIL = 120  # rows of a last chunk, which are launched as "small"
F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(dtype: torch.dtype, tokens: int = TOKENS) -> None:
    heads = (1, HEADS, tokens, 128)
    q, scale = meta(*heads, dtype=I8), meta(1, HEADS, tokens, dtype=F32)
    k_scale, statistics = meta(1, HEADS, -(-tokens // 64), dtype=F32), meta(1, HEADS, 128, dtype=F32)
    padded = -(-tokens // 64) * 64
    v = meta(1, HEADS, 128, padded, dtype=I8) if dtype == I8 else meta(1, tokens, HEADS, 128, dtype=dtype)
    mean = statistics if dtype == I8 else None
    attention_int8.attention_int8_triton(q, scale, q, k_scale, v, statistics, mean, BF16)


def linear(outputs: int, inputs: int, *, residual: bool, rows: int = TOKENS) -> None:
    a, a_scale = meta(1, rows, inputs, dtype=I8), meta(1, rows, dtype=F32)
    w, w_scale, bias = meta(outputs, inputs, dtype=I8), meta(outputs, dtype=F32), meta(outputs, dtype=BF16)
    if residual:
        x, gate = meta(1, rows, outputs, dtype=BF16), meta(1, outputs, dtype=F32)
        linear_int8.linear_int8_residual_triton(a, a_scale, w, w_scale, bias, x, gate)
    else:
        linear_int8.linear_int8_triton(a, a_scale, w, w_scale, bias, False, BF16)


def norm(*, quantize: bool, update: bool = True, affine: bool = False) -> None:
    x, vector = meta(1, TOKENS, DIM, dtype=BF16), meta(1, DIM, dtype=F32)
    operands = (x, x if update else None, vector if update else None, vector, vector, affine, 1e-6)
    if quantize:
        gate_norm_modulate.gate_norm_modulate_quantize_triton(*operands, True)
    else:
        gate_norm_modulate.gate_norm_modulate_triton(*operands, BF16)


def turn(kind: str, tokens: int = TOKENS) -> None:
    x, weight, table = meta(1, tokens, DIM, dtype=BF16), meta(DIM, dtype=F32), meta(tokens, 64, dtype=F32)
    if kind == "keys":
        rms_rope.rms_rope_quantize_keys_triton(x, weight, table, table, meta(1, HEADS, 128, dtype=F32), 1e-6)
    elif kind == "queries":
        rms_rope.rms_rope_quantize_triton(x, weight, table, table, HEADS, 1e-6)
    else:
        turned = None if kind == "still" else table
        rms_rope.rms_rope_triton(x, weight, turned, turned, HEADS, 1e-6, BF16)


def rows(*, rotate: bool) -> None:
    quantize_rows.quantize_rows_triton(meta(1, TOKENS, DIM, dtype=BF16), rotate)


def decode(dtype: torch.dtype) -> None:
    packed, group = meta(DIM, FFN_DIM // 2, dtype=torch.uint8), meta(DIM, FFN_DIM // 64, dtype=BF16)
    decode_int4.decode_int4_triton(packed, group, group, meta(DIM, FFN_DIM, dtype=dtype))


def int8_values(tokens: int = TOKENS) -> None:
    values.quantize_values_triton(meta(1, tokens, HEADS, 128, dtype=BF16))


# Products of int8, and of fp16 with sums in fp16; sm_90 has wider ones, of four warps together
MMA = dict.fromkeys(ARCHITECTURES, ("IMMA", r"HMMA\.16816\.F16\b")) | {90: ("IGMMA", r"HGMMA\.\S*\.F16\b")}

Case = tuple[Any, str, Callable[[], None]]
MATRIX: dict[str, Case] = {
    "attention, fp16 values": (attention_int8, "_attention_kernel", lambda: attention(torch.float16)),
    "attention, int8 values": (attention_int8, "_attention_kernel", lambda: attention(I8)),
    "linear": (linear_int8, "_linear_kernel", lambda: linear(FFN_DIM, DIM, residual=False)),
    "linear onto the residual": (linear_int8, "_linear_kernel", lambda: linear(DIM, FFN_DIM, residual=True)),
}
AT_480P: dict[str, Case] = {
    "attention, fp16 values": (attention_int8, "_attention_kernel", lambda: attention(torch.float16, TOKENS_480P)),
    "attention, int8 values": (attention_int8, "_attention_kernel", lambda: attention(I8, TOKENS_480P)),
    "linear onto the residual": (
        linear_int8,
        "_linear_kernel",
        lambda: linear(DIM, FFN_DIM, residual=True, rows=TOKENS_480P),
    ),
}
ROWS: dict[str, Case] = {
    "gate, norm, modulate": (gate_norm_modulate, "_gate_norm_modulate_kernel", lambda: norm(quantize=False)),
    "gate, norm, modulate, quantize": (
        gate_norm_modulate,
        "_gate_norm_modulate_kernel",
        lambda: norm(quantize=True),
    ),
    "norm, modulate, quantize": (
        gate_norm_modulate,
        "_gate_norm_modulate_kernel",
        lambda: norm(quantize=True, update=False),
    ),
    "norm with weights, quantize": (
        gate_norm_modulate,
        "_gate_norm_modulate_kernel",
        lambda: norm(quantize=True, update=False, affine=True),
    ),
    "rms": (rms_rope, "_rms_rope_kernel", lambda: turn("still")),
    "rms, rope": (rms_rope, "_rms_rope_kernel", lambda: turn("floats")),
    "rms, rope, queries": (rms_rope, "_rms_rope_kernel", lambda: turn("queries")),
    "rms, rope, keys": (rms_rope, "_keys_kernel", lambda: turn("keys")),
    "rms, rope, keys at 480p": (rms_rope, "_keys_kernel", lambda: turn("keys", TOKENS_480P)),
    "row norms": (rms_rope, "_inverse_rms_kernel", lambda: turn("keys")),
    "gelu, quantize": (
        gelu_quantize,
        "_gelu_quantize_kernel",
        lambda: gelu_quantize.gelu_quantize_triton(meta(1, TOKENS, FFN_DIM, dtype=BF16), True),
    ),
    "quantize rows": (quantize_rows, "_quantize_rows_kernel", lambda: rows(rotate=False)),
    "quantize rows, rotated": (quantize_rows, "_quantize_rows_kernel", lambda: rows(rotate=True)),
    "decode int4": (decode_int4, "_decode_int4_kernel", lambda: decode(I8)),
    "decode int4 to bfloat16": (decode_int4, "_decode_int4_kernel", lambda: decode(BF16)),
    "scale values": (
        values,
        "_scale_values_kernel",
        lambda: values.scale_values_triton(meta(1, TOKENS, HEADS, 128, dtype=BF16)),
    ),
    "value statistics": (values, "_value_statistics_kernel", int8_values),
    "quantize values": (values, "_quantize_values_kernel", int8_values),
    "quantize values at 480p": (values, "_quantize_values_kernel", lambda: int8_values(TOKENS_480P)),
}

# Kernels that one launcher launches: the others are recorded beside the one that is compiled
SEVERAL = {
    rms_rope: ("_inverse_rms_kernel", "_keys_kernel"),
    values: ("_value_statistics_kernel", "_quantize_values_kernel"),
}

# Rows of 5,120 that are on a multiprocessor at once, at the least
AT_ONCE = {
    "gate, norm, modulate": 6,
    "gate, norm, modulate, quantize": 6,
    "norm, modulate, quantize": 6,
    "norm with weights, quantize": 6,
    "rms": 6,
    "rms, rope": 6,
    "rms, rope, queries": 6,
    "row norms": 12,
    "quantize rows": 9,
    "quantize rows, rotated": 9,
}


def compiled(case: Case, arch: int) -> Compiled:
    module, kernel, launch = case
    others = SEVERAL.get(module, ())
    with recorded(module, kernel) as recorder:
        hidden = [recorded(module, other) for other in others if other != kernel]
        for other in hidden:
            other.__enter__()
        launch()
        for other in hidden:
            other.__exit__(None, None, None)
    return compile_launch(recorder, arch)


def check_fits(code: Compiled) -> None:
    assert code.shared <= SHARED_MEMORY_LIMIT
    assert not code.narrow_products, "in 32 bits two videos of 720p times 13,824 channels are at 97 % of the end"


def check_hot_loop(code: Compiled, arch: int, case: str) -> None:
    check_fits(code)
    loop = code.hot_loop
    integer, half = (code.count(pattern, loop) for pattern in MMA[arch])
    floats = code.count("(HMMA|HGMMA)", loop)
    assert integer, "the tensor cores do not multiply int8 in the hot loop"
    if "fp16" in case:
        assert floats, "the tensor cores do not multiply fp16 in the hot loop"
        assert half == floats, "sums of fp16 are float32, at half the rate on a GeForce card"
    else:
        assert not floats, "the tensor cores multiply floats in the hot loop"
    assert code.count("(LDL|STL)", loop) == 0, "the hot loop spills"
    if "linear" in case and arch != 90:
        assert code.count("PRMT", loop) == 0, "bytes are repacked in the hot loop"
        instructions = sum(line.endswith(";") for line in loop.splitlines())
        assert instructions <= 2.0 * integer, f"{instructions} instructions for {integer} products"


@triton.jit
def _rows_are_set(x_ptr, D, WIDTH: tl.constexpr, NARROW: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * 2 + tl.arange(0, 2)
    if not NARROW:
        row = row.to(tl.int64)
    tl.store(x_ptr + row * (D if WIDTH is None else WIDTH), 0.0)


@pytest.mark.parametrize("width", [None, DIM])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_place_in_memory_of_32_bits_is_seen(narrow: bool, width: int | None) -> None:
    """By a width that is given to the kernel, and by one that is a constant of it."""
    recorder = Recorder(_rows_are_set)
    recorder[(TOKENS,)](meta(TOKENS, DIM, dtype=F32), DIM, WIDTH=width, NARROW=narrow)
    assert len(compile_launch(recorder, 86).narrow_products) == (1 if narrow else 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", list(MATRIX))
def test_products_run_on_tensor_cores_without_spilling(case: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = MATRIX[case][0]
    monkeypatch.setattr(module, "tile_launch", lambda op, shape_class, _: table_launch(op, shape_class, arch))
    check_hot_loop(compiled(MATRIX[case], arch), arch, case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [min(ARCHITECTURES), max(ARCHITECTURES)])
@pytest.mark.parametrize("case", list(AT_480P))
def test_products_of_480p_run_on_tensor_cores_without_spilling(
    case: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = AT_480P[case][0]
    monkeypatch.setattr(module, "tile_launch", lambda op, shape_class, _: table_launch(op, shape_class, arch))
    check_hot_loop(compiled(AT_480P[case], arch), arch, case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", list(ROWS))
def test_rows_are_read_in_wide_loads_and_stay_in_registers(case: str, arch: int) -> None:
    code = compiled(ROWS[case], arch)
    check_fits(code)
    assert code.count("(LDL|STL)") == 0, "it spills"
    if "int4" not in case:  # a byte holds two weights there, and scales are shared
        assert code.count(r"LDG\.E\.\S*128") >= 1, "no wide load"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("residual", [False, True], ids=["linear", "onto the residual"])
def test_the_few_rows_of_a_last_chunk_run_on_tensor_cores_without_spilling(
    residual: bool, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def small(op: str, shape_class: str, _: object) -> TileLaunch:
        asked.append(shape_class)
        return table_launch(op, shape_class, arch)

    monkeypatch.setattr(linear_int8, "tile_launch", small)
    outputs, inputs = (DIM, FFN_DIM) if residual else (FFN_DIM, DIM)
    rows = (linear_int8, "_linear_kernel", lambda: linear(outputs, inputs, residual=residual, rows=TAIL))
    code = compiled(rows, arch)
    assert asked == ["small"]
    check_fits(code)
    assert code.count("(IMMA|IGMMA)", code.hot_loop), "the tensor cores do not multiply int8 in the hot loop"
    assert code.count("(LDL|STL)") == 0, "it spills"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", list(AT_ONCE))
def test_rows_in_two_pieces_leave_room_for_others(case: str, arch: int) -> None:
    code = compiled(ROWS[case], arch)
    assert code.programs_at_once >= AT_ONCE[case], f"{code.registers} registers"
    assert code.count("(LDL|STL)") == 0, "it spills"
    assert code.shared <= 1024, "a row goes through shared memory"
    if "rope" in case:
        before_the_wait = code.sass[: code.sass.index("BAR")]
        assert len(re.findall(r"\bLDG", before_the_wait)) == 7, (
            "five vectors of the row, cos and sin are not asked for at once"
        )


@pytest.mark.slow
@pytest.mark.parametrize("op", list(CANDIDATES))
def test_every_launch_that_tuning_may_choose_fits_a_consumer_card(
    op: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shape_class = op
    if name == "attention_int8":
        module, case = attention_int8, MATRIX[f"attention, {shape_class} values"]
    else:
        module, case = linear_int8, MATRIX["linear onto the residual"]
    if shape_class == "small":
        case = (*case[:2], lambda: linear(DIM, FFN_DIM, residual=True, rows=TAIL))
    for candidate in CANDIDATES[op][1:]:  # the first is compiled above

        def chosen(*_: object, candidate: TileLaunch = candidate) -> TileLaunch:
            return candidate

        monkeypatch.setattr(module, "tile_launch", chosen)
        code = compiled(case, 86)
        assert code.shared <= SHARED_MEMORY_LIMIT
        assert code.count("(LDL|STL)", code.hot_loop) == 0, f"{candidate} spills in its hot loop"
