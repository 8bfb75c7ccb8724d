"""LoRA files in every dialect, as changes of our tensors: read lazily, applied in float32, counted strictly.

Dialects: original (`blocks.0.self_attn.q.lora_down.weight`, with full differences `diff`, `diff_b`, `diff_m`),
diffusers and PEFT (`blocks.0.attn1.to_q.lora_A.weight`, also with an adapter's name), kohya, musubi, VideoX-Fun and
LyCORIS (`lora_unet_blocks_0_self_attn_q.alpha`).
The change of a low-rank pair is `strength * alpha / rank * up @ down`; without an alpha that factor is `strength`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_local.anatomy import transformer_shapes
from wan_local.errors import CorruptModel, NotAvailable, WrongModel
from wan_local.header import Header, TensorInfo
from wan_local.key_map import to_official
from wan_local.settings import LoraSetting, ModelConfig
from wan_local.stored_tensor import StoredTensor
from wan_local.tensor_reader import TensorReader
from wan_local.weight_files import read_file_header

_PEFT = "base_model.model."
_PREFIXES: tuple[str, ...] = (_PEFT, "model.diffusion_model.", "diffusion_model.", "pipe.", "dit.")
_PREFIXES += ("model.", "transformer.", "unet.", "lora_unet__", "lora_unet_", "lycoris_")
_TEXT_ENCODER = ("text_encoder.", "text_encoders.", "lora_te", "te1.", "cond_stage_model.")
_ENDINGS = {  # of a stored name: which piece of a change it is
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora_up.weight": "up", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_B.bias": "up_bias", ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m",
}  # fmt: skip
_REFUSED = {".dora_scale": "DoRA", ".lokr_": "LoKr", ".hada_": "LoHa", ".oft_": "OFT", ".lora_magnitude": "DoRA"}
_REFUSED |= {".lora_mid.": "LoRA with a middle matrix"}
_ADAPTER = re.compile(r"(\.lora_[AB])\.([^.]+)(\.weight)")  # PEFT may put the adapter's name into the tensor's
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_INTEGERS = ("I64", "I32", "I16")  # alphas that are ranks
_IMAGE_MODULES = ("add_k_proj", "add_v_proj", "image_embedder")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One low-rank change of a linear, float32: `weight += up @ down`. up: [N, r], with the strength; down: [r, K]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class _Change:
    """The pieces of one change, by header. `factor`: what it is multiplied by beside alpha / rank."""

    pieces: Mapping[str, tuple[str, TensorInfo]]
    factor: float


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What of a LoRA file takes effect. Counts are of changes: a low-rank pair with its alpha is one.

    `zero`: changes that change nothing. `unmatched`: stored names that belong to no tensor of this model. `ignored`:
    names of text encoder entries. `missing_images`: linears of the image half that the LoRA, made for text-to-video,
    does not have. `widened`: changes of the patch embedding that know fewer input channels than it has.
    """

    file: str
    strength: float
    applied: int
    zero: int
    unmatched: tuple[str, ...]
    ignored: tuple[str, ...]
    missing_images: int
    widened: int

    def describe(self) -> str:
        """Return it in one line."""
        words = [f"{self.applied} changes applied"]
        words += [f"{self.zero} zero"] if self.zero else []
        words += [f"{len(self.unmatched)} names unmatched (e.g. {self.unmatched[0]})"] if self.unmatched else []
        words += [f"{len(self.ignored)} text encoder entries ignored"] if self.ignored else []
        words += [f"{self.missing_images} image linears not in it (text-to-video)"] if self.missing_images else []
        words += [f"{self.widened} made for fewer input channels"] if self.widened else []
        return f"LoRA {self.file} at {self.strength:g}: {', '.join(words)}"


class Lora:
    """An opened LoRA: what it changes, by our names. Tensors are read when they are applied."""

    def __init__(
        self, file: Path, strength: float, changes: Mapping[str, Sequence[_Change]], report: LoraReport
    ) -> None:
        self.file, self.strength, self.report = file, strength, report
        self._changes = changes

    @property
    def targets(self) -> frozenset[str]:
        """The tensors that are changed."""
        return frozenset(self._changes)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """Return `weight` with this LoRA's changes of tensor `name`, in float32; as it is where there are none."""
        if name not in self._changes:
            return weight
        return weight.float() + self.delta(name, tuple(weight.shape)).to(weight.device)

    def delta(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return all that is added to tensor `name` of `shape`, in float32; strength and alpha are in it."""
        total = torch.zeros(shape)
        for change in self._changes[name]:
            total += _delta(change, shape)
        return total

    def rank(self, name: str) -> int | None:
        """Return the rank of all changes of a linear together, from the header; None where one is a full difference."""
        changes = self._changes.get(name, ())
        if any("down" not in change.pieces for change in changes):
            return None
        return sum(change.pieces["down"][1].shape[0] for change in changes)

    def low_rank(self, name: str) -> list[LowRank] | None:
        """Return the changes of a linear as low-rank pairs; None where one of them is a full difference."""
        pairs = []
        for change in self._changes.get(name, ()):
            if "down" not in change.pieces:
                return None
            down, up = _read(change, "down"), _read(change, "up")
            pairs.append(LowRank(down.flatten(1), up.flatten(1) * _factor(change)))
        return pairs


def open_lora(file: Path, strength: float, config: ModelConfig) -> Lora:
    """Read the header of a LoRA file and match it with the transformer of `config`.

    Raises CorruptModel (damaged, half a pair, NaN), WrongModel (of another network or size: nothing matches, or a shape
    does not), NotAvailable (LoKr, LoHa, DoRA, OFT).
    """
    if not math.isfinite(strength):
        raise ValueError(f"the strength of {file.name!r} is {strength}; it must be a number such as 1.0")
    header = read_file_header(file)
    if header.container != "safetensors":
        raise NotAvailable(f"{file.name!r} is a {header.container} file; LoRAs are read as .safetensors only.")
    _refuse_other_adapters(file, header)
    shapes = transformer_shapes(config.transformer)
    modules = _aliases(shapes)
    grouped: dict[tuple[str, str], dict[str, tuple[str, TensorInfo]]] = {}
    unmatched, ignored = [], []
    for name, info in header.tensors.items():
        if name.startswith(_TEXT_ENCODER):
            ignored.append(name)
            continue
        target, piece = _target(name, modules, shapes)
        if target is None:
            unmatched.append(name)
            continue
        kind = "pair" if piece in ("down", "up", "alpha") else piece
        twin, _ = grouped.setdefault((target, kind), {}).setdefault(piece, (name, info))
        if twin != name:
            raise CorruptModel(f"{twin!r} and {name!r} in {file.name!r} are the same piece of the change of {target!r}")
    _check_dtypes(file, grouped)
    scale = _told_scale(file, header)
    changes: dict[str, list[_Change]] = {}
    for (target, kind), pieces in grouped.items():
        factor = strength * (1.0 if kind.startswith("diff") or "alpha" in pieces else scale)
        change = _Change(pieces, factor)
        _check_shapes(file, target, change, shapes[target])
        changes.setdefault(target, []).append(change)
    report = _counted(file, strength, changes, unmatched, ignored, shapes)
    if report.applied == 0:
        raise WrongModel(
            f"nothing in {file.name!r} changes {config.title}: {len(unmatched)} names are unknown, among them "
            f"{', '.join(unmatched[:3]) or 'none'}; {report.zero} changes are zero. It was made for another model."
        )
    return Lora(file, strength, changes, report)


def open_loras(texts: Sequence[str], config: ModelConfig) -> tuple[Lora, ...]:
    """Open LoRAs given as FILE:STRENGTH; see `open_lora`. Raises ModelNotFound too, for a file that is not there."""
    entries = [LoraSetting.parse(text) for text in texts]
    return tuple(open_lora(entry.file, entry.strength, config) for entry in entries)


def apply_all(loras: Sequence[Lora], name: str, weight: Tensor) -> Tensor:
    """Return `weight` with the changes of every LoRA, in float32; as it is where none changes it."""
    for lora in loras:
        weight = lora.apply(name, weight)
    return weight


def _aliases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return our tensor's name for what a dialect calls it: a module (for its weight) or a tensor without a leaf.

    Official and our names, with dots or, as kohya writes them, with underscores.
    """
    aliases = {}
    for ours, theirs in to_official("transformer", shapes).items():
        if ours.endswith(".bias"):
            continue
        for name in (ours, theirs):
            module = name.removesuffix(".weight")
            aliases[module] = aliases[module.replace(".", "_")] = ours
    return aliases


def _target(name: str, modules: Mapping[str, str], shapes: Mapping[str, object]) -> tuple[str | None, str]:
    """Return which of our tensors a stored name changes, and which piece of the change it is."""
    name = _ADAPTER.sub(r"\1\3", name)
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    if ending is None:
        return None, ""
    module, piece = name.removesuffix(ending), _ENDINGS[ending]
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    if piece == "diff_m":
        module = module.removesuffix(".modulation") + ".modulation"
    target = modules.get(module.removesuffix(".weight"))
    if target is not None and piece in ("diff_b", "up_bias"):
        target = target.removesuffix("weight") + "bias"
    return (target if target in shapes else None), piece


def _refuse_other_adapters(file: Path, header: Header) -> None:
    for name in header.tensors:
        kind = next((kind for ending, kind in _REFUSED.items() if ending in name), None)
        if kind is not None:
            raise NotAvailable(
                f"{file.name!r} is an adapter of the kind {kind} ({name!r}); wan_local applies LoRA only"
            )


def _check_dtypes(file: Path, grouped: Mapping[Any, Mapping[str, tuple[str, TensorInfo]]]) -> None:
    for pieces in grouped.values():
        for piece, (name, info) in pieces.items():
            if info.dtype not in (*_FLOATS, *(_INTEGERS if piece == "alpha" else ())):
                raise NotAvailable(
                    f"{name!r} in {file.name!r} is stored as {info.dtype}; LoRAs are read as {', '.join(_FLOATS)}"
                )


def _told_scale(file: Path, header: Header) -> float:
    """Return alpha / rank from what diffusers leaves in the header, or PEFT beside the file; 1 where nothing is."""
    text, place = header.metadata.get("lora_adapter_metadata"), f"the lora_adapter_metadata of {file.name!r}"
    config = file.with_name("adapter_config.json")
    if not isinstance(text, str) and config.is_file() and any(name.startswith(_PEFT) for name in header.tensors):
        text, place = config.read_text(encoding="utf-8", errors="replace"), f"{config.name!r} beside {file.name!r}"
    if not isinstance(text, str):
        return 1.0
    try:
        table: Any = json.loads(text)
        values = {key.rsplit(".", 1)[-1]: value for key, value in table.items()}
        alpha, rank = float(values["lora_alpha"]), float(values["r"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptModel(f"{place} is no table with r and lora_alpha") from error
    if values.get("alpha_pattern") or values.get("rank_pattern"):
        raise NotAvailable(f"{place} has ranks or alphas by module, which are not read here.")
    if not rank > 0 or not math.isfinite(alpha):
        raise CorruptModel(f"{place} tells rank {rank} and alpha {alpha}")
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _check_shapes(file: Path, target: str, change: _Change, shape: tuple[int, ...]) -> None:
    sizes = {piece: info.shape for piece, (_, info) in change.pieces.items()}
    name = next(iter(change.pieces.values()))[0]
    if "alpha" in sizes and math.prod(sizes["alpha"]) != 1:
        raise CorruptModel(f"the alpha of {name!r} in {file.name!r} has shape {list(sizes['alpha'])}; it is one number")
    if "down" in sizes or "up" in sizes or "alpha" in sizes:
        if "down" not in sizes or "up" not in sizes:
            raise CorruptModel(f"{name!r} in {file.name!r} is one half of a pair: its other half is missing")
        down, up = sizes["down"], sizes["up"]
        fits = len(down) > 1 and len(up) > 1 and down[0] == math.prod(up[1:]) > 0
        made = (up[0], *down[1:]) if fits else ()
    else:
        made = next(iter(sizes.values()))
    if _long(made) != _long(shape) and not _widens(target, made, shape):
        turned = sorted(_long(made)) == sorted(_long(shape))
        raise WrongModel(
            f"{name!r} in {file.name!r} changes a tensor of {list(made)}, and {target!r} is {list(shape)}: "
            + ("its axes are in another order" if turned else "it was made for a model of another size")
        )


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of length 1, which tools add and drop; the order of numbers is the same."""
    return tuple(length for length in shape if length != 1)


def _widens(target: str, made: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether a change knows only the first input channels of the patch embedding: the 16 noisy latents of T2V."""
    first = target == "patch_embedding.weight" and len(made) == len(shape) and made[0] == shape[0]
    return first and made[1] < shape[1] and made[2:] == shape[2:]


def _counted(
    file: Path,
    strength: float,
    changes: Mapping[str, Sequence[_Change]],
    unmatched: list[str],
    ignored: list[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> LoraReport:
    every = [(target, change) for target, some in changes.items() for change in some]
    zero = sum(_is_zero(change) for _, change in every)
    images = [name for name in shapes if any(module in name for module in _IMAGE_MODULES) and len(shapes[name]) == 2]
    has_images = any(any(module in target for module in _IMAGE_MODULES) for target in changes)
    low_rank = any("down" in change.pieces for _, change in every)
    widened = sum(
        _widens(target, (shapes[target][0], *info.shape[1:]), shapes[target])
        for target, change in every
        for piece, (_, info) in change.pieces.items()
        if piece in ("diff", "down")
    )
    missing = 0 if has_images or not low_rank else len([name for name in images if "image_embedder" not in name])
    return LoraReport(
        file.name, strength, len(every) - zero, zero, tuple(unmatched), tuple(ignored), missing, widened
    )  # fmt: skip


def _is_zero(change: _Change) -> bool:
    """Tell whether a change changes nothing. Reads what decides it: the up half, as trainers begin it at zero."""
    piece = "up" if "up" in change.pieces else next(iter(change.pieces))
    return change.factor == 0 or not bool(_read(change, piece).any())


def _read(change: _Change, piece: str) -> Tensor:
    name, info = change.pieces[piece]
    numbers = TensorReader("safetensors").read(StoredTensor(name, info, info.shape)).float()
    if not torch.isfinite(numbers).all():
        raise CorruptModel(f"{name!r} in {info.file.name!r} holds NaN or infinity. Download it again.")
    return numbers


def _factor(change: _Change) -> float:
    if "alpha" not in change.pieces:
        return change.factor
    rank = change.pieces["down"][1].shape[0]
    return change.factor * float(_read(change, "alpha")) / rank


def _delta(change: _Change, shape: tuple[int, ...]) -> Tensor:
    if "down" in change.pieces:
        down, up = _read(change, "down"), _read(change, "up")
        numbers = (up.flatten(1) @ down.flatten(1) * _factor(change)).view(up.shape[0], *down.shape[1:])
    else:
        (piece,) = change.pieces
        numbers = _read(change, piece) * change.factor
    if numbers.numel() == math.prod(shape):
        return numbers.view(shape)
    wide = torch.zeros(shape)  # see _widens
    wide[:, : numbers.shape[1]] = numbers
    return wide
