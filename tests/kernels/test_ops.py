"""Every op on a CPU: its reference against float64, what torch demands of an op, and whole-graph compilation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan_kernels
from tests.kernels.samples import activations, quantized_keys, relative_rms
from tests.live_bytes import live_bytes
from wan_kernels import checks, language
from wan_kernels.attention_int8 import attention_int8_reference, attention_int8_triton
from wan_kernels.decode_int4 import decode_int4_triton
from wan_kernels.gate_norm_modulate import gate_norm_modulate_quantize_triton, gate_norm_modulate_triton
from wan_kernels.linear_int8 import linear_int8_residual_triton, linear_int8_triton, matmul_int8
from wan_kernels.quantize_rows import quantize_rows_reference, rotate_reference
from wan_kernels.rms_rope import rms_rope_quantize_keys_triton, rms_rope_quantize_triton, rms_rope_triton
from wan_kernels.values import quantize_values_reference, scale_values_reference

DIM, HEADS, TOKENS = 128, 2, 70
Op = Callable[..., Any]


def attention_inputs(int8_values: bool) -> tuple[Any, ...]:
    q = quantize_rows_reference(activations(1, HEADS, TOKENS, 64), rotate=False)
    k = quantized_keys(activations(1, HEADS, 100, 64, seed=1))
    v = activations(1, 100, HEADS, 64, seed=2)
    values = quantize_values_reference(v) if int8_values else (*scale_values_reference(v), None)
    return (*q, *k, *values, torch.float32)


def linear_inputs() -> tuple[Tensor, ...]:
    a = quantize_rows_reference(activations(1, TOKENS, DIM), rotate=False)
    w = quantize_rows_reference(torch.randn(96, DIM), rotate=False)
    return (*a, *w, torch.randn(96))


def cases() -> dict[str, tuple[Op, tuple[Any, ...]]]:
    x, y = activations(1, TOKENS, DIM), activations(1, TOKENS, DIM, seed=1)
    gate, scale, shift = (vector.clone() for vector in torch.randn(3, 1, DIM).unbind(0))
    weight, cos, sin = torch.randn(DIM), torch.randn(TOKENS, 32), torch.randn(TOKENS, 32)
    packed = torch.randint(0, 256, (9, 64), dtype=torch.uint8)
    norm = (x, y, gate, scale, shift, False, 1e-6)
    int4 = (packed, torch.rand(9, 2), torch.rand(9, 2))
    ops = wan_kernels
    return {
        "attention_int8 fp16": (ops.attention_int8, attention_inputs(False)),
        "attention_int8 int8": (ops.attention_int8, attention_inputs(True)),
        "scale_values_": (ops.scale_values_, (activations(1, 100, HEADS, 64).bfloat16(),)),
        "quantize_values": (ops.quantize_values, (activations(1, 100, HEADS, 64),)),
        "linear_int8": (ops.linear_int8, (*linear_inputs(), True, torch.float32)),
        "linear_int8_residual_": (ops.linear_int8_residual_, (*linear_inputs(), torch.randn(1, TOKENS, 96), None)),
        "gate_norm_modulate_": (ops.gate_norm_modulate_, (*norm, torch.float32)),
        "gate_norm_modulate_quantize_": (ops.gate_norm_modulate_quantize_, (*norm, True)),
        "rms_rope": (ops.rms_rope, (x, weight, cos, sin, HEADS, 1e-6, torch.float32)),
        "rms_rope_quantize": (ops.rms_rope_quantize, (x, weight, cos, sin, HEADS, 1e-6)),
        "rms_rope_quantize_keys": (ops.rms_rope_quantize_keys, (x, weight, cos, sin, torch.randn(1, HEADS, 64), 1e-6)),
        "gelu_quantize": (ops.gelu_quantize, (x, True)),
        "quantize_rows": (ops.quantize_rows, (x, True)),
        "decode_int4_": (ops.decode_int4_, (*int4, torch.empty(9, 128, dtype=torch.int8))),
    }


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def flat(result: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Return what an op gave and what it may have written."""
    given = result if isinstance(result, tuple) else (result,)
    return [x for x in (*given, *args) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", list(cases()))
def test_op_keeps_what_torch_demands_of_an_op(name: str) -> None:
    op, args = cases()[name]
    torch.library.opcheck(op, copied(args), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("name", list(cases()))
def test_op_compiles_into_one_graph(name: str) -> None:
    torch._dynamo.reset()  # every op passes through the same line of torch, which is compiled anew a few times only
    op, args = cases()[name]
    eager_args, graph_args = copied(args), copied(args)
    eager = op(*eager_args)
    graph = torch.compile(op, fullgraph=True, backend="aot_eager")(*graph_args)
    for a, b in zip(flat(eager, eager_args), flat(graph, graph_args), strict=True):
        assert torch.equal(a, b)


def test_every_public_op_has_a_case() -> None:
    ops = {name for name in wan_kernels.__all__ if isinstance(getattr(wan_kernels, name), torch.library.CustomOpDef)}
    assert ops == {name.split()[0] for name in cases()}


# where each launcher takes what must be float32 (or of the integers that its kernel multiplies), by the cases above
TYPED: dict[str, tuple[Op, tuple[int, ...]]] = {
    "attention_int8 fp16": (attention_int8_triton, (0, 1, 2, 3, 4, 5)),
    "attention_int8 int8": (attention_int8_triton, (0, 1, 2, 3, 5, 6)),  # of v of another type the shape is told
    "linear_int8": (linear_int8_triton, (0, 1, 2, 3)),
    "linear_int8_residual_": (linear_int8_residual_triton, (0, 1, 2, 3, 6)),
    "gate_norm_modulate_": (gate_norm_modulate_triton, (2, 3, 4)),
    "gate_norm_modulate_quantize_": (gate_norm_modulate_quantize_triton, (2, 3, 4)),
    "rms_rope": (rms_rope_triton, (1, 2, 3)),
    "rms_rope_quantize": (rms_rope_quantize_triton, (1, 2, 3)),
    "rms_rope_quantize_keys": (rms_rope_quantize_keys_triton, (1, 2, 3, 4)),
    "decode_int4_": (decode_int4_triton, (0,)),
}


@pytest.mark.skipif(not language.HAS_TRITON, reason="Triton has no build for this system")
@pytest.mark.parametrize(("name", "place"), [(name, place) for name, (_, places) in TYPED.items() for place in places])
def test_a_launcher_refuses_what_is_not_of_its_kernels_type(name: str, place: int) -> None:
    args = list(cases()[name][1])
    if args[place] is None:
        args[place] = torch.randn(1, 96)  # the gate of the residual
    args[place] = args[place].bfloat16()
    with pytest.raises(AssertionError, match="bfloat16"):
        TYPED[name][0](*args)


@pytest.mark.parametrize("inputs", [64, 1024, 1025, 5120])
def test_integer_products_are_exact_at_their_largest(inputs: int) -> None:
    a = torch.full((3, inputs), 127, dtype=torch.int8)
    a[1] = -127
    a[2] = torch.randint(-127, 128, (inputs,), dtype=torch.int8)
    w = torch.stack([a[0], a[2]])
    assert torch.equal(matmul_int8(a, w).long(), a.long() @ w.long().t())


@pytest.mark.parametrize("int8_values", [False, True])
def test_attention_is_close_to_exact_attention(int8_values: bool) -> None:
    q, k = torch.randn(2, 1, HEADS, 600, 64).unbind(0)
    v = torch.randn(1, 600, HEADS, 64)
    values = quantize_values_reference(v) if int8_values else (*scale_values_reference(v), None)
    got = attention_int8_reference(*quantize_rows_reference(q, rotate=False), *quantized_keys(k), *values)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
    assert relative_rms(got, exact) < 0.02
    assert torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), dim=0) > 0.999


def test_a_constant_taken_off_all_keys_changes_nothing_and_saves_their_precision() -> None:
    q, noise = torch.randn(2, 1, HEADS, 300, 64, dtype=torch.float64).unbind(0)
    bias = 30 * torch.randn(1, HEADS, 1, 64, dtype=torch.float64)
    v = torch.randn(1, 300, HEADS, 64)
    exact = torch.softmax(q @ (noise + bias).mT / 8, dim=-1) @ v.double().transpose(1, 2)
    exact = exact.transpose(1, 2).flatten(2)
    values = (*scale_values_reference(v), None)
    errors = []
    for keys in (noise + bias, noise):
        q8 = quantize_rows_reference(q.contiguous(), rotate=False)
        errors.append(relative_rms(attention_int8_reference(*q8, *quantized_keys(keys.float()), *values), exact))
    assert errors[1] < 0.02 < errors[0]


def test_rotated_rows_and_rotated_weights_give_the_same_product() -> None:
    x, w = activations(9, 192), torch.randn(5, 192)
    assert torch.allclose(rotate_reference(x) @ rotate_reference(w).t(), x @ w.t(), atol=1e-3)


def test_importing_needs_no_triton_and_a_kernel_without_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch, wan_kernels as w\n"
        "assert not w.HAS_TRITON\n"
        "q, scale = w.quantize_rows(torch.ones(2, 64), False)\n"
        "assert (q == 127).all()\n"
        "from wan_kernels.quantize_rows import quantize_rows_triton\n"
        "try: quantize_rows_triton(torch.ones(2, 64), False)\n"
        "except w.KernelUnavailable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "pip install" in done.stdout


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_triton_that_cannot_be_imported_counts_as_none_and_its_message_is_kept(tmp_path: Path, error: str) -> None:
    """As on Windows without the C++ runtime, and on Linux where a library of another driver is in the way."""
    broken = tmp_path / "triton"
    broken.mkdir()
    (broken / "__init__.py").write_text(f"raise {error}('DLL load failed while importing libtriton')")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, wan_kernels as w\n"
        "assert not w.HAS_TRITON and w.TRITON_VERSION is None\n"
        "from wan_kernels.quantize_rows import quantize_rows_triton\n"
        "try: quantize_rows_triton(torch.ones(2, 64), False)\n"
        "except w.KernelUnavailable as error: print(error)\n"
        "from wan_local.attention import BACKENDS, Card\n"
        "print(BACKENDS['int8'].lacking(Card('cuda', (8, 9), 'a card'), 128))\n"
    )
    if error == "ImportError":  # the only one that torch, which looks for Triton when an op is called, takes itself
        program += "assert (w.quantize_rows(torch.ones(2, 64), False)[0] == 127).all()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.count(f"{error}: DLL load failed") == 2 and "pip install" not in done.stdout


def test_what_the_probe_holds_of_the_largest_weights_fits_beside_a_desktop_on_a_small_card() -> None:
    """All of a decoded weight in float64 would take 1.7 GB, and a probe without memory says that kernels are broken."""
    with live_bytes() as held:
        decoding = next(checks.cases(torch.device("cpu"), checks.PROBED, group="linear"))
        assert decoding.name == "decode_int4_" and checks.judge(decoding).right
    assert held.peak < 260e6, f"{held.peak / 1e6:.0f} MB"


def test_ceilings_and_powers() -> None:
    assert [language.ceil_div(n, 64) for n in (1, 64, 65)] == [1, 1, 2]
    assert [language.power_of_two(n) for n in (1, 2, 3, 64, 5120)] == [1, 2, 4, 64, 8192]
