"""LoRA files in every dialect, as changes of our tensors: read lazily, applied in float32, counted strictly.

`wan_local.lora_header` knows the dialects, and which of our tensors a stored name changes.
The change of a low-rank pair is `strength * alpha / rank * up @ down`; without an alpha that factor is `strength`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_local.anatomy import transformer_shapes
from wan_local.errors import CorruptModel, NotAvailable, WrongModel
from wan_local.header import Header
from wan_local.lora_header import PEFT, LoraHeader, Pieces, match_header, refused_adapter, widens
from wan_local.settings import LoraSetting, ModelConfig
from wan_local.stored_tensor import StoredTensor
from wan_local.tensor_reader import read_stored
from wan_local.weight_files import read_file_header

_IMAGE_MODULES = ("add_k_proj", "add_v_proj", "image_embedder")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One low-rank change of a linear, float32: `weight += up @ down`. up: [N, r], with the strength; down: [r, K]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class _Change:
    """The pieces of one change, by header. `factor`: what it is multiplied by beside alpha / rank."""

    pieces: Pieces
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
    does not; or the alpha is another adapter's), NotAvailable (LoKr, LoHa, DoRA, OFT).
    """
    if not math.isfinite(strength):
        raise ValueError(f"the strength of {file.name!r} is {strength}; it must be a number such as 1.0")
    header = read_file_header(file)
    if header.container != "safetensors":
        raise NotAvailable(f"{file.name!r} is a {header.container} file; LoRAs are read as .safetensors only.")
    _refuse_other_adapters(file, header)
    found = match_header(file.name, header.tensors, config)
    scale = _told_scale(file, header, _ranks_without_alpha(found))
    changes: dict[str, list[_Change]] = {}
    for target, pieces in found.changes:
        whole = "alpha" in pieces or any(piece.startswith("diff") for piece in pieces)
        factor = strength * (1.0 if whole else scale)
        changes.setdefault(target, []).append(_Change(pieces, factor))
    shapes = transformer_shapes(config.transformer)
    report = _counted(file, strength, changes, found, shapes)
    if report.applied == 0:
        raise WrongModel(
            f"nothing in {file.name!r} changes {config.title}: {len(found.unmatched)} names are unknown, among them "
            f"{', '.join(found.unmatched[:3]) or 'none'}; {report.zero} changes are zero. It was made for another "
            "model."
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


def _refuse_other_adapters(file: Path, header: Header) -> None:
    refused = refused_adapter(header.tensors)
    if refused is not None:
        kind, name = refused
        raise NotAvailable(f"{file.name!r} is an adapter of the kind {kind} ({name!r}); wan_local applies LoRA only")


def _ranks_without_alpha(found: LoraHeader) -> list[int]:
    pairs = [pieces for _, pieces in found.changes if "down" in pieces and "alpha" not in pieces]
    return sorted({pieces["down"][1].shape[0] for pieces in pairs})


def _told_scale(file: Path, header: Header, ranks: Sequence[int]) -> float:
    """Return alpha / rank from what diffusers leaves in the header, or PEFT beside the file; 1 where nothing is.

    ranks: of the pairs that it is for.
    """
    if not ranks:
        return 1.0
    text, place = header.metadata.get("lora_adapter_metadata"), f"the lora_adapter_metadata of {file.name!r}"
    config = file.with_name("adapter_config.json")
    if not isinstance(text, str) and config.is_file() and any(name.startswith(PEFT) for name in header.tensors):
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
    if list(ranks) != [rank]:
        raise WrongModel(
            f"{place} tells rank {rank:g}, and the pairs in {file.name!r} have rank {', '.join(map(str, ranks))}: it "
            "is of another adapter. Put the right one there, or take it away; then the pairs count as they are."
        )
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _counted(
    file: Path,
    strength: float,
    changes: Mapping[str, Sequence[_Change]],
    found: LoraHeader,
    shapes: Mapping[str, tuple[int, ...]],
) -> LoraReport:
    every = [(target, change) for target, some in changes.items() for change in some]
    zero = sum(_is_zero(change) for _, change in every)
    images = [name for name in shapes if any(module in name for module in _IMAGE_MODULES) and len(shapes[name]) == 2]
    has_images = any(any(module in target for module in _IMAGE_MODULES) for target in changes)
    low_rank = any("down" in change.pieces for _, change in every)
    widened = sum(
        widens(target, (shapes[target][0], *info.shape[1:]), shapes[target])
        for target, change in every
        for piece, (_, info) in change.pieces.items()
        if piece in ("diff", "down")
    )
    missing = 0 if has_images or not low_rank else len([name for name in images if "image_embedder" not in name])
    return LoraReport(
        file.name, strength, len(every) - zero, zero, found.unmatched, found.ignored, missing, widened
    )  # fmt: skip


def _is_zero(change: _Change) -> bool:
    """Tell whether a change changes nothing. Reads what decides it: alpha, and the up half, which begins at zero."""
    piece = "up" if "up" in change.pieces else next(iter(change.pieces))
    return _factor(change) == 0 or not bool(_read(change, piece).any())


def _read(change: _Change, piece: str) -> Tensor:
    name, info = change.pieces[piece]
    numbers = read_stored(StoredTensor(name, info, info.shape)).float()
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
    wide = torch.zeros(shape)  # see widens
    wide[:, : numbers.shape[1]] = numbers
    return wide
