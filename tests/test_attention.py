"""One table of attention backends: the card decides, once; one asked for by name runs, or there is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from wan_local import attention
from wan_local.attention import BACKENDS, Card, KernelChoice, attention_in_pieces, card_of, choose, sdpa
from wan_local.errors import NotAvailable
from wan_local.settings import load_settings

CPU = Card("cpu")
GEFORCE = Card("cuda", (8, 9), "NVIDIA GeForce RTX 4090")
HOPPER = Card("cuda", (9, 0), "NVIDIA H200")


def sound(_: str) -> str:
    return ""


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.kernels, "HAS_TRITON", True)


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, 70, 2, 32, generator=generator)
    k, v = (torch.randn(batch, 150, 2, 32, generator=generator) for _ in range(2))
    return q, k + 2, v + 1


def test_a_cpu_computes_exactly_unless_it_is_told_otherwise() -> None:
    assert choose("auto", "auto", CPU, 128, broken=sound) == KernelChoice(
        reason=choose("auto", "auto", CPU, 128, broken=sound).reason
    )
    assert choose("auto", "on", CPU, 32, broken=sound).fused
    assert choose("int8", "off", CPU, 32, broken=sound).attention == "int8"


@pytest.mark.usefixtures("with_triton")
def test_the_card_decides_which_backend_suits() -> None:
    chosen = choose("auto", "auto", GEFORCE, 128, broken=sound)
    assert (chosen.attention, chosen.fused, chosen.half_sums) == ("int8", True, False)
    assert choose("auto", "auto", HOPPER, 128, broken=sound).attention == "sdpa"
    assert choose("auto", "auto", GEFORCE, 80, broken=sound).attention == "sdpa"


@pytest.mark.usefixtures("with_triton")
def test_a_backend_that_failed_its_probe_is_passed_over_but_not_in_silence_when_named() -> None:
    chosen = choose("auto", "auto", GEFORCE, 128, broken=lambda name: "it gave NaN" if name == "int8" else "")
    assert (chosen.attention, chosen.fused) == ("sdpa", False)
    with pytest.raises(NotAvailable, match=r"it gave NaN.*'auto'"):
        choose("int8", "auto", GEFORCE, 128, broken=lambda _: "it gave NaN")


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("fused", ["off", "fp16"])
def test_int8_attention_is_not_taken_without_the_kernels_that_make_its_operands(fused: str) -> None:
    """From floats it would quantize every key anew for each chunk of queries; by name it does."""
    assert choose("auto", fused, GEFORCE, 128, broken=sound).attention == "sdpa"
    assert choose("int8", fused, GEFORCE, 128, broken=sound).attention == "int8"


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("fused", ["off", "fp16"])
def test_kernels_that_are_not_wanted_are_not_probed(fused: str) -> None:
    asked: list[str] = []
    choose("sdpa", fused, GEFORCE, 128, broken=lambda name: asked.append(name) or "")
    assert "int8" not in asked


@pytest.mark.usefixtures("with_triton")
def test_fused_kernels_asked_for_by_name_and_wrong_are_an_error() -> None:
    def wrong(name: str) -> str:
        return "these kernels compute wrongly: linear_int8" if name == "int8" else ""

    for card in (GEFORCE, HOPPER):
        with pytest.raises(NotAvailable, match=r"kernels='on'.*linear_int8.*'auto' or 'off'"):
            choose("sdpa", "on", card, 128, broken=wrong)
    assert choose("auto", "on", CPU, 128, broken=wrong).fused


@pytest.mark.parametrize(("name", "words"), [("xformers", "xformers"), ("sage", "SageAttention")])
def test_a_backend_asked_for_by_name_and_absent_is_an_error(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NotAvailable, match=f"{words} is not installed"):
        choose(name, "auto", GEFORCE, 128, broken=sound)


OLD = ("1.0.6", "2.1.0", "2.1", "2.1.0.post1", "2.1.0+cu126torch2.6.0", "2.1.0rc12")
NEW = ("2.1.1", "2.2.0", "2.1.1+cu126torch2.6.0", "2.2.0+cu128torch2.8.0.post3", "3.0.0b1", "2.10.0")


@pytest.mark.parametrize(
    ("version", "runs"), [*((version, False) for version in OLD), *((version, True) for version in NEW)]
)
def test_an_old_sageattention_is_refused(version: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(attention.importlib.metadata, "version", lambda _: version)
    lacking = BACKENDS["sage"].lacking(GEFORCE, 128)
    assert (lacking == "") == runs, lacking


@pytest.mark.usefixtures("with_triton")
def test_a_sageattention_that_tells_no_version_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone's folder on the path can be imported, and no installed package stands behind it."""
    (tmp_path / "sageattention").mkdir()
    (tmp_path / "sageattention" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "tells no version" in BACKENDS["sage"].lacking(GEFORCE, 128)
    broken = {"int8": "its probe ended with code -6"}
    assert choose("auto", "auto", GEFORCE, 128, broken=lambda name: broken.get(name, "")).attention == "sdpa"


def test_kernels_without_triton_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.kernels, "HAS_TRITON", False)
    monkeypatch.setattr(attention.kernels, "TRITON_LACKING", "Triton is not installed (`pip install ...`)")
    chosen = choose("auto", "auto", GEFORCE, 128, broken=sound)
    assert (chosen.attention, chosen.fused, chosen.half_sums) == ("sdpa", False, True)
    assert not choose("auto", "off", GEFORCE, 128, broken=sound).half_sums
    assert not choose("auto", "auto", HOPPER, 128, broken=sound).half_sums
    with pytest.raises(NotAvailable, match="pip install"):
        choose("int8", "auto", GEFORCE, 128, broken=sound)
    with pytest.raises(NotAvailable, match="pip install"):
        choose("auto", "on", GEFORCE, 128, broken=sound)


@pytest.mark.usefixtures("with_triton")
def test_our_kernels_need_ampere() -> None:
    turing = Card("cuda", (7, 5), "NVIDIA GeForce RTX 2080")
    assert choose("auto", "auto", turing, 128, broken=sound) == KernelChoice(
        reason="NVIDIA GeForce RTX 2080: sdpa attention (exact, always there; flash, on Hopper cuDNN), plain linears"
    )
    with pytest.raises(NotAvailable, match="older than Ampere"):
        choose("int8", "auto", turing, 128, broken=sound)


@pytest.mark.parametrize(("name", "limit"), [("sdpa", 1e-6), ("int8", 0.02), ("int8_pv", 0.02)])
def test_backends_agree_with_exact_attention(name: str, limit: float) -> None:
    q, k, v = inputs()
    exact = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
    got = BACKENDS[name].function(q, k, v)
    assert got.dtype == v.dtype and got.shape == (2, 70, 64)
    assert float((got - exact).norm() / exact.norm()) < limit


def test_a_backend_leaves_the_values_it_was_given_alone() -> None:
    q, k, v = (x.bfloat16() for x in inputs())
    before = v.clone()
    for backend in ("int8", "int8_pv"):
        BACKENDS[backend].function(q, k, v)
    assert torch.equal(v, before)


@pytest.mark.parametrize("name", ["int8", "int8_pv"])
def test_int8_attention_of_some_heads_and_keys_at_a_time_gives_what_the_whole_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs()
    whole = BACKENDS[name].function(q, k, v)
    monkeypatch.setattr(attention, "HEADS_AT_A_TIME", 1)
    monkeypatch.setattr(attention, "KEYS_AT_A_TIME", 64)
    assert torch.equal(BACKENDS[name].function(q, k, v), whole)


@pytest.mark.parametrize("biased", [False, True])
def test_pieces_give_what_the_whole_gives(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    bias = torch.randn(150) if biased else None
    whole = sdpa(q, k, v, bias_M=bias)
    monkeypatch.setattr(attention, "_LOGIT_BYTES", 4 * 2 * 2 * 150 * 7)  # seven queries at a time
    assert torch.allclose(attention_in_pieces(q, k, v, bias), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "can_use", "taken"),
    [
        ((9, 0), {"cudnn", "flash", "efficient"}, "CUDNN_ATTENTION"),
        ((8, 9), {"cudnn", "flash", "efficient"}, "FLASH_ATTENTION"),
        ((9, 0), {"efficient"}, "EFFICIENT_ATTENTION"),
        ((8, 9), {"cudnn"}, None),
    ],
)
def test_torchs_kernels_are_asked_for_on_the_card_of_the_tensors(
    capability: tuple[int, int], can_use: set[str], taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether one can be used is a matter of the current card, which may be another one than theirs."""
    current: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def answer(kernel: str) -> Callable[[object], bool]:
        return lambda _: current == [card] and kernel in can_use

    card = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *_: None)
    for kernel in ("cudnn", "flash", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{kernel}_attention", answer(kernel))
    tensor: Any = SimpleNamespace(device=card)
    got = attention._fused_kernel(tensor, tensor, tensor, None)
    assert (got and got.name) == taken


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("largest", "limit"), [(1.0, 0.005), (1e5, 0.02)])
def test_before_ampere_bfloat16_goes_to_a_fused_kernel_as_float16_unless_it_reaches_further(
    largest: float, limit: float, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernels take no bfloat16 on such a card: all logits went through memory, piece by piece."""
    taken: list[torch.dtype] = []
    q, k, v = (x.bfloat16() for x in inputs())
    v[0, 0, 0, 0] *= largest
    bias = torch.randn(150, generator=torch.Generator().manual_seed(2)) if biased else None  # bfloat16 like the rest

    def kernel(_q: object, _k: object, v: torch.Tensor, _mask: object) -> SDPBackend | None:
        taken.append(v.dtype)
        return SDPBackend.MATH if v.dtype == torch.float16 else None

    monkeypatch.setattr(attention, "_fused_kernel", kernel)
    monkeypatch.setattr(attention, "_HALF_HEADS", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    got = attention._on_card(*(x.transpose(1, 2) for x in (q, k, v)), bias)
    exact = sdpa(*(x.double() for x in (q, k, v)), bias_M=bias)
    assert got.dtype == torch.bfloat16 and got.shape == exact.shape
    assert float((got - exact).norm() / exact.norm()) < limit
    assert taken == [torch.bfloat16, *([torch.float16] * 2 if largest == 1 else [])]


def test_settings_name_known_backends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(attention="int8").attention == "int8"
    monkeypatch.setenv("WAN_LOCAL_KERNELS", "on")
    assert load_settings().kernels == "on"
    with pytest.raises(ValueError, match="attention is 'flash4'"):
        load_settings(attention="flash4")


def test_the_card_of_a_cpu_is_a_cpu() -> None:
    assert card_of(torch.device("cpu")) == CPU
