"""Attention backends, in one table: what each needs, what it is for, and the function itself.

Takes queries, keys and values as floats [B, L, H, K]; gives [B, L, H*K]. Which backend runs is decided in `choose`,
once before a run, from the card, what is installed and what a probe found; one that was asked for by name and cannot
run is an error. There is no fallback inside a run, but for what no fused kernel of torch takes: that is computed
exactly, some queries at a time, and bfloat16 before Ampere as float16.

Shape legend: B batch, L queries, M keys, H heads, K channels of a head.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import wan_kernels as kernels
from wan_kernels import checks
from wan_local.errors import NotAvailable
from wan_local.network_cost import HEADS_AT_A_TIME, KEYS_AT_A_TIME
from wan_local.settings import AttentionName, KernelsChoice

_LOGIT_BYTES = 256 * 2**20  # float32 logits that the exact fallback holds at a time
_HALF_HEADS = 4  # cast to float16 at a time: 0.2 GB with what they give, at 720p
_AMPERE = (8, 0)
_SAGE_NEEDED = (2, 1, 1)  # before it, keys beyond the end are not masked
_SAGE_HEAD_DIMS = (64, 128)
OURS: tuple[AttentionName, ...] = ("int8", "int8_pv")

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Card:
    """What a backend's condition is about: the device's kind and a card's compute capability, name and driver."""

    kind: str
    capability: tuple[int, int] = (0, 0)
    name: str = "CPU"


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention. `lacking` says what it lacks on a card for heads of K channels, or nothing.

    `suits` tells whether it is the one to take on that card where nothing was asked for. `package`: the distribution
    that brings it, if it is none of torch's or ours.
    """

    name: AttentionName
    function: Function
    lacking: Callable[[Card, int], str]
    suits: Callable[[Card], bool]
    purpose: str
    package: str | None = None


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What the transformer's blocks compute with: an attention backend, fused kernels or plain PyTorch, and why.

    `half_sums`: without fused kernels, multiply linears in float16 with float16 sums, which is fast on GeForce.
    `dequantize`: use quantized weights as floats whatever they say, as a step is redone that gave no finite numbers.
    """

    attention: AttentionName = "sdpa"
    fused: bool = False
    half_sums: bool = False
    dequantize: bool = False
    reason: str = "plain PyTorch"

    @property
    def function(self) -> Function:
        return BACKENDS[self.attention].function

    @property
    def approximates(self) -> bool:
        """Tell whether anything but plain PyTorch computes, so that computing again can help."""
        return self.fused or self.half_sums or self.attention != "sdpa"

    def values(self, v_BMHK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values as `attend_int8` takes them; those of 16 bits lose their memory to it."""
        return kernels.quantize_values(v_BMHK) if self.attention == "int8_pv" else _half_values(v_BMHK)


PLAIN_KERNELS = KernelChoice()
EXACT_KERNELS = KernelChoice(dequantize=True, reason="a step is redone")


def choose(
    attention: AttentionName,
    fused: KernelsChoice,
    card: Card,
    head_dim: int,
    *,
    broken: Callable[[AttentionName], str],
) -> KernelChoice:
    """Return what to compute with on `card`. broken: what a probe of a backend found wrong there, or nothing.

    Raises NotAvailable for a backend or kernels that were asked for by name and cannot run.
    """
    failing = "" if fused in ("off", "fp16") else _fused_failing(card, broken)
    if fused == "on" and failing:
        raise NotAvailable(f"kernels='on' was asked for, but {failing}; use kernels='auto' or 'off'")
    wanted = fused == "on" or (fused == "auto" and card.kind == "cuda" and not failing)
    if attention == "auto":
        suiting = (b for b in BACKENDS.values() if b.suits(card) and not b.lacking(card, head_dim))
        able = (b for b in suiting if wanted or b.name not in OURS)  # ours of floats quantizes all keys for each chunk
        chosen = next((backend for backend in able if not broken(backend.name)), BACKENDS["sdpa"])
        reason = chosen.purpose
    else:
        chosen, reason = BACKENDS[attention], "asked for"
        problem = chosen.lacking(card, head_dim) or broken(attention)
        if problem:
            raise NotAvailable(f"attention={attention!r} was asked for, but {problem}; use attention='auto' or 'sdpa'")
    half = fused == "fp16" or (fused == "auto" and not wanted and _geforce(card))
    how = "fused kernels" if wanted else "linears with float16 sums" if half else "plain linears"
    return KernelChoice(chosen.name, wanted, half, reason=f"{card.name}: {chosen.name} attention ({reason}), {how}")


def triton_version() -> str:
    """Return the version of Triton, or none."""
    return kernels.TRITON_VERSION or "none"


def package_version(name: AttentionName) -> str:
    """Return the package that brings a backend with its version, or nothing where torch or this package does."""
    package = BACKENDS[name].package
    if package is None:
        return ""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # a folder on the path, or not installed
        return f"{package} of no version"


def card_of(device: torch.device) -> Card:
    """Return what is known of a device."""
    if device.type != "cuda":
        return Card(device.type)
    return Card("cuda", torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def sdpa(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, *, bias_M: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K) + bias) v by torch's fused kernels, in the dtype of `v`.

    bias_M: added to the logits of each key, float32.
    """
    dtype = v_BMHK.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q_BLHK, k_BMHK, v_BMHK))
    if q.device.type == "cuda":
        return _on_card(q, k, v, bias_M)
    mask = None if bias_M is None else bias_M.to(dtype).view(1, 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _on_card(q: Tensor, k: Tensor, v: Tensor, bias_M: Tensor | None) -> Tensor:
    """Return attention [B, L, H*K] of tensors of one dtype, [B, H, L or M, K], by a fused kernel where one takes them.

    Before Ampere none takes bfloat16; float16 tells more numbers apart, and is taken where it reaches as far.
    """
    mask = None if bias_M is None else bias_M.to(v.dtype).view(1, 1, 1, -1)
    fast = _fused_kernel(q, k, v, mask)
    if fast is not None:
        with torch.nn.attention.sdpa_kernel(fast):  # this one: torch would take the first of an order of its own
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    narrow = v.dtype == torch.bfloat16 and torch.cuda.get_device_capability(v.device) < _AMPERE
    if narrow and all(_fits_half(x) for x in (q, k, v)):
        by_heads = zip(*(x.split(_HALF_HEADS, dim=1) for x in (q, k, v)), strict=True)
        outs = (_on_card(q.half(), k.half(), v.half(), bias_M) for q, k, v in by_heads)
        return torch.cat([out.to(v.dtype) for out in outs], dim=-1)
    return attention_in_pieces(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias_M)


def _fits_half(x: Tensor) -> bool:
    """Tell whether float16 reaches as far as these numbers, of which none is NaN."""
    least, most = torch.aminmax(x)
    return bool((torch.maximum(most, -least) <= torch.finfo(torch.float16).max).item())


def _fused_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
    """Return torch's fastest kernel that takes this without holding all logits, or None; never the math one.

    cuDNN's on Hopper only: on other cards it is no faster than flash.
    """
    from torch.nn.attention import SDPBackend

    parameters = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, False)
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    with torch.cuda.device(q.device):  # torch answers for the current card, whichever the tensors are on
        if hopper and torch.backends.cuda.can_use_cudnn_attention(parameters):
            return SDPBackend.CUDNN_ATTENTION
        if torch.backends.cuda.can_use_flash_attention(parameters):
            return SDPBackend.FLASH_ATTENTION
        if torch.backends.cuda.can_use_efficient_attention(parameters):
            return SDPBackend.EFFICIENT_ATTENTION
    return None


def attention_in_pieces(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Return exact attention with float32 logits of at most 256 MiB at a time, for what no fused kernel takes."""
    batch, _, heads, head_dim = q_BLHK.shape
    k_BHMK, v_BHMK = k_BMHK.transpose(1, 2), v_BMHK.transpose(1, 2)
    rows = max(1, _LOGIT_BYTES // (4 * batch * heads * k_BMHK.shape[1]))
    pieces = []
    for q in q_BLHK.transpose(1, 2).split(rows, dim=2):
        logits = (q.to(v_BMHK.dtype) @ k_BHMK.to(v_BMHK.dtype).mT).float() / math.sqrt(head_dim)
        if bias_M is not None:
            logits += bias_M
        pieces.append(torch.softmax(logits, dim=-1).to(v_BMHK.dtype) @ v_BHMK)
    return torch.cat(pieces, dim=2).transpose(1, 2).flatten(2)


def attend_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    values: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """Return attention [B, L, H*K] in `dtype` of int8 queries and keys and prepared values; see `wan_kernels`."""
    out_BLD: Tensor = kernels.attention_int8(q, q_scale, k, k_scale, *values, dtype)
    return out_BLD


def _int8(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    return _of_floats(q_BLHK, k_BMHK, v_BMHK, lambda v: _half_values(v.clone(memory_format=torch.contiguous_format)))


def _int8_values(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    return _of_floats(q_BLHK, k_BMHK, v_BMHK, lambda v: kernels.quantize_values(v.contiguous()))


def _of_floats(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, prepared: Callable[[Tensor], Any]) -> Tensor:
    """Return int8 attention of floats: for those who do not have int8 queries and keys from the fused kernels.

    Some heads at a time: of all of them at once int8 keys, values and what they are made of take 8 GB at 720p.
    """
    outs = []
    for q, k, v in zip(*(x.split(HEADS_AT_A_TIME, dim=2) for x in (q_BLHK, k_BMHK, v_BMHK)), strict=True):
        q8, q_scale = kernels.quantize_rows(q.transpose(1, 2).contiguous(), False)
        outs.append(attend_int8(q8, q_scale, *_quantized_keys(k), prepared(v), v.dtype))
    return torch.cat(outs, dim=-1)


def _quantized_keys(k_BMHK: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys less their mean as int8 [B, H, M, K], and their scales [B, H, ceil(M/64)]."""
    centre = k_BMHK.mean(dim=1, dtype=torch.float32)
    pieces = [kernels.quantize_keys_reference(k.float(), centre) for k in k_BMHK.split(KEYS_AT_A_TIME, dim=1)]
    return torch.cat([k for k, _ in pieces], dim=2), torch.cat([scale for _, scale in pieces], dim=2)


def _half_values(v_BMHK: Tensor) -> tuple[Tensor, Tensor, None]:
    """Return fp16 values, their scales, and no mean; 16-bit values are turned in their own memory."""
    if v_BMHK.element_size() == 2:
        scale = kernels.scale_values_(v_BMHK)
        return v_BMHK.view(torch.float16), scale, None
    v16, scale = kernels.scale_values_reference(v_BMHK)
    return v16, scale, None


def _xformers(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    dtype = v_BMHK.dtype
    out_BLHK: Tensor = memory_efficient_attention(q_BLHK.to(dtype), k_BMHK.to(dtype), v_BMHK)
    return out_BLHK.flatten(2)


def _sage(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    from sageattention import sageattn

    dtype = v_BMHK.dtype
    out_BLHK: Tensor = sageattn(q_BLHK.to(dtype), k_BMHK.to(dtype), v_BMHK, tensor_layout="NHD", is_causal=False)
    return out_BLHK.flatten(2)


def _nothing(_: Card, head_dim: int) -> str:
    return ""


def _ours_lacking(card: Card, head_dim: int) -> str:
    if head_dim not in kernels.HEAD_DIMS:
        return f"heads of {head_dim} channels are none of {kernels.HEAD_DIMS}"
    return _fused_lacking(card)


def _fused_lacking(card: Card) -> str:
    """Return what our kernels lack; on a CPU their references run."""
    if card.kind == "cpu":
        return ""
    if not kernels.HAS_TRITON:
        return kernels.TRITON_LACKING
    return "" if card.capability >= _AMPERE else f"{card.name} is older than Ampere"


def _fused_failing(card: Card, broken: Callable[[AttentionName], str]) -> str:
    """Return what our kernels lack, or what the probe that runs every one of them found; a CPU is not probed."""
    return _fused_lacking(card) or (broken("int8") if card.kind == "cuda" else "")


def _xformers_lacking(card: Card, head_dim: int) -> str:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (`pip install 'wan_local[xformers]'`)"
    return "" if card.kind == "cuda" else "xformers has no operator for a CPU"


def _sage_lacking(card: Card, head_dim: int) -> str:
    if importlib.util.find_spec("sageattention") is None:
        return "SageAttention is not installed (from its source; the 1.x wheels on PyPI are too old)"
    try:
        version = importlib.metadata.version("sageattention")
    except importlib.metadata.PackageNotFoundError:  # a folder on the path, as of a clone
        return "SageAttention tells no version (it is a folder on the path; install it)"
    if numbers_of(version) < _SAGE_NEEDED:
        return f"SageAttention {version} reads keys beyond the end; {'.'.join(map(str, _SAGE_NEEDED))} does not"
    if head_dim not in _SAGE_HEAD_DIMS:
        return f"heads of {head_dim} channels are none of {_SAGE_HEAD_DIMS}"
    return "" if card.kind == "cuda" else "SageAttention needs a card"


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version: (2, 1, 0) of "2.1.0.post1" and of "2.1.0+cu126torch2.6.0"."""
    leading = (re.match(r"\d*", part) for part in version.partition("+")[0].split(".")[:3])
    return tuple(int(match[0] or 0) for match in leading if match)


def _geforce(card: Card) -> bool:
    """Tell whether int8 products run at four times bf16's rate, as on sm_86, sm_89 and sm_120."""
    return card.capability in ((8, 6), (8, 9), (12, 0), (12, 1))


# In the order in which `auto` takes them.
BACKENDS: Mapping[AttentionName, Backend] = {
    backend.name: backend
    for backend in (
        Backend("int8", _int8, _ours_lacking, _geforce, "int8 logits, at four times bf16's rate on GeForce cards"),
        Backend("sage", _sage, _sage_lacking, _geforce, "int8 logits, by an installed SageAttention", "sageattention"),
        Backend("sdpa", sdpa, _nothing, lambda card: True, "exact, always there; flash, on Hopper cuDNN"),
        Backend(
            "xformers",
            _xformers,
            _xformers_lacking,
            lambda card: False,
            "exact; slower than torch's own by 0.6x",
            "xformers",
        ),
        Backend("int8_pv", _int8_values, _ours_lacking, lambda card: False, "int8 values too: faster and less exact"),
    )
}


def wrong_kernels(device: torch.device) -> list[str]:
    """Return the names of the kernels whose numbers are wrong on `device`: on a card at the 14B model's widths."""
    of_card = device.type == "cuda"
    size, dtype = (checks.PROBED, torch.bfloat16) if of_card else (checks.SMALL, torch.float32)
    verdicts = (checks.judge(case) for case in checks.cases(device, size, dtype))
    return [f"{verdict.name} ({verdict.error:.2g} of what is allowed)" for verdict in verdicts if not verdict.right]


def names() -> Collection[AttentionName]:
    """Return the backends' names, in the order in which `auto` takes them."""
    return BACKENDS.keys()
