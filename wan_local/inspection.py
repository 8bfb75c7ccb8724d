"""What lies at a path, by headers alone: which model, in which layout and numbers, how many bytes, and what is missing.

The facts behind `wan-local inspect`. No torch; of the data only the scales of 8-bit floats are read, a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_local.anatomy import in_context, part_shapes
from wan_local.errors import CorruptModel, ModelNotFound, NotAvailable, WrongModel
from wan_local.gguf_header import TYPES
from wan_local.header import TensorInfo
from wan_local.key_map import PARTS, Part, canonical_names, ignorable, weight_name, without_prefix
from wan_local.kinds import GET_IMAGE, GET_TEXT, GET_TRANSFORMER, GET_VAE, Kind, identify
from wan_local.manifest import KIND, MANIFEST, is_store
from wan_local.scales import check_scales, is_scale
from wan_local.settings import ModelConfig, known_models, snapshot_hint
from wan_local.stored_tensor import misfit, stored_tensors
from wan_local.tokenizer_file import GET_TOKENIZER, check_tokenizer, tokenizer_folder
from wan_local.weight_files import UNREADABLE, WeightFiles, read_json, read_weights, weight_sets

WHERE: Mapping[str, str] = {
    "transformer": GET_TRANSFORMER,
    "vae": GET_VAE,
    "text_encoder": GET_TEXT,
    "image_encoder": GET_IMAGE,
    "tokenizer": GET_TOKENIZER,
}
_BLOCKS = {kind.name for kind in TYPES.values() if kind.items > 1}
_GGUF_MIXES = {  # general.file_type, where it says more than the type of most tensors
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PartReport:
    """One set of weights. `dtypes`: bytes by dtype as stored. `once_bytes`: of them, needed only before the loop.

    `problem`: what keeps it from being used although it is of the right kind, and what to do; empty if nothing does.
    """

    kind: Kind
    path: Path
    files: int
    nbytes: int
    parameters: int
    dtypes: Mapping[str, int]
    quantization: str
    once_bytes: int = 0
    problem: str = ""

    @property
    def usable(self) -> bool:
        return self.kind.usable and not self.problem


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that lies at a path. `missing`: what a whole model needs beside it, with where to get it.

    A tokenizer that is damaged or another model's is missing, too.
    """

    path: Path
    layout: str
    parts: tuple[PartReport, ...]
    missing: Mapping[str, str]

    @property
    def usable(self) -> bool:
        """Whether wan_local can do something with every set of weights here."""
        return all(part.usable for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as a table that JSON can hold."""
        return {
            "path": str(self.path),
            "layout": self.layout,
            "usable": self.usable,
            "bytes": self.nbytes,
            "parts": [_part_as_json(part) for part in self.parts],
            "missing": dict(self.missing),
        }


def inspect(path: Path) -> Inspection:
    """Return what lies at `path`, a file or a folder; its headers are read, and checked in full.

    Raises ModelNotFound for nothing, CorruptModel for what is damaged, NotAvailable for a format that is not known; a
    file like that beside other weights in a folder is a part that is not usable.
    """
    if path.is_dir():
        return _inspect_folder(path)
    report = _report(read_weights(path))
    return Inspection(path, _layout_of_file(report), (report,), _still_needed([report], path.parent))


def sets_below(folder: Path) -> list[Path]:
    """Return the sets of weights in a folder; each subfolder that diffusers' layout names counts as one."""
    if (folder / "transformer").is_dir():
        return [folder / part for part in PARTS if (folder / part).is_dir()]
    return weight_sets(folder)


def _inspect_folder(folder: Path) -> Inspection:
    reports, errors = [], []
    for path in sets_below(folder):
        try:
            reports.append(_report(read_weights(path)))
        except UNREADABLE as error:
            if path.is_dir():  # a part of one model
                raise
            errors.append(error)
            kind = Kind("other", "no weights that are known", usable=False)
            reports.append(PartReport(kind, path, 1, path.stat().st_size, 0, {}, "none", problem=str(error)))
    if errors and len(errors) == len(reports):
        raise errors[0]
    reports.sort(key=lambda report: [*PARTS, "lora", "other"].index(report.kind.part))
    if not reports:
        stores = [path.name for path in sorted(folder.iterdir()) if is_store(path)]
        if stores:
            raise ModelNotFound(f"{str(folder)!r} holds no weights beside the store {stores[0]!r}. Give that folder.")
        lost = next((path for path in sorted(folder.rglob("*")) if path.is_symlink() and not path.exists()), None)
        link = f"; {lost.name!r} in it is a link to {str(lost.readlink())!r}, which is not there" if lost else ""
        raise ModelNotFound(
            f"{str(folder)!r} holds no weights: no .safetensors, .gguf or .pth in it or two folders below{link}."
            f"{snapshot_hint(folder)}"
        )
    return Inspection(folder, _layout_of_folder(folder, reports), tuple(reports), _still_needed(reports, folder))


def _report(weights: WeightFiles) -> PartReport:
    kind = identify(weights.tensors, f"{weights.path.name} {weights.path.parent.name} {_own_name(weights.metadata)}")
    dtypes: dict[str, int] = {}
    for info in weights.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    check_scales(weights.tensors)
    plain = without_prefix(weights.tensors)
    problem, once_bytes = "", 0
    part = next((part for part in PARTS if part == kind.part), None)
    if part is not None and kind.usable:
        problem = _what_is_wrong(part, kind, weights)
        if part == "transformer" and not problem:
            ours = _our_names(part, kind, plain)
            once_bytes = sum(plain[name].nbytes for name, our in ours.items() if in_context(our))
    if kind.part == "lora" and kind.usable and weights.container != "safetensors":
        problem = f"It is a {weights.container} file; LoRAs are read as .safetensors only."
    return PartReport(
        kind, weights.path, len(weights.files), weights.nbytes, _parameters(part, plain),
        dict(sorted(dtypes.items(), key=lambda entry: -entry[1])), _quantization(weights, plain), once_bytes, problem,
    )  # fmt: skip


def _own_name(metadata: Mapping[str, Any]) -> str:
    names = (metadata.get("general.name"), metadata.get("modelspec.title"))
    return " ".join(name for name in names if isinstance(name, str))[:200]


def _our_names(part: Part, kind: Kind, plain: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Map each stored name to the tensor of ours that it is a piece of: its numbers, its scale, or its shift."""
    pieces = {name: weight_name(name) for name in plain if not ignorable(part, name)}
    ours = canonical_names(part, kind.dialect, sorted({weight for weight in pieces.values() if not _is_mark(weight)}))
    return {name: ours[weight] for name, weight in pieces.items() if weight in ours}


def _is_mark(name: str) -> bool:
    return name.endswith(("scaled_fp8", ".comfy_quant", ".scale_input", ".input_scale", ".output_scale"))


def _what_is_wrong(part: Part, kind: Kind, weights: WeightFiles) -> str:
    """Return why these weights could not be converted, which their header tells; empty if they can.

    Raises CorruptModel for what is damaged: a scale without its weight, a weight without its scale.
    """
    expected = part_shapes(part, _config_for(kind))
    try:
        stored, _ = stored_tensors(part, weights, kind.dialect, expected)
    except (NotAvailable, WrongModel) as error:
        return str(error)
    problem = misfit(stored, expected)
    return f"{problem}. Download it again, or get another conversion of it." if problem else ""


def _config_for(kind: Kind) -> ModelConfig:
    """Return the known model that a part is of: the transformer's own, else the one that its kind is called after."""
    if kind.config is not None:
        return kind.config
    real, tiny = known_models()
    return tiny if "tiny" in kind.name else real


def _parameters(part: Part | None, plain: Mapping[str, TensorInfo]) -> int:
    """Return how many numbers the weights hold; scales, shifts and what is not used left out."""
    counted = 0
    for name, info in plain.items():
        if is_scale(name) or name.endswith("_shift") or _is_mark(name) or (part is not None and ignorable(part, name)):
            continue
        packed = 2 if info.dtype == "U8" and (name.endswith("._data._data") or f"{name}_scale" in plain) else 1
        counted += math.prod(info.shape) * packed
    return counted


def _quantization(weights: WeightFiles, plain: Mapping[str, TensorInfo]) -> str:
    by_dtype: dict[str, int] = {}
    for info in plain.values():
        by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + info.nbytes
    main = max(by_dtype, key=lambda dtype: by_dtype[dtype], default="")
    if weights.container == "gguf":
        mix = weights.metadata.get("general.file_type")
        return f"GGUF {_GGUF_MIXES.get(mix, main) if isinstance(mix, int) else main}" if main in _BLOCKS else "none"
    if any(name.endswith("._data") for name in plain):
        kinds = {"I8": "int8", "U8": "int4", "F8_E4M3": "fp8"}
        stored = {info.dtype for name, info in plain.items() if name.endswith("._data")}
        return f"quanto {', '.join(sorted(kinds.get(dtype, dtype) for dtype in stored))}"
    scaled = {plain[weight_name(name)].dtype for name in plain if is_scale(name) and weight_name(name) in plain}
    names = {"I8": "int8", "U8": "int4", "F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2"}
    if scaled:
        return f"{', '.join(sorted(names.get(dtype, dtype) for dtype in scaled))}, scaled"
    return f"{names[main]}, unscaled" if main in names else "none"


def _layout_of_file(report: PartReport) -> str:
    if report.quantization.startswith("GGUF") or report.path.suffix.lower() == ".gguf":
        return "GGUF"
    if report.quantization.startswith("quanto"):
        return "quanto"
    return f"one part, {report.kind.dialect} names" if report.kind.dialect else "unknown"


def _layout_of_folder(folder: Path, reports: list[PartReport]) -> str:
    if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("kind") == KIND:
        return KIND
    if any(report.quantization.startswith("quanto") for report in reports):
        return "quanto"
    if (folder / "transformer").is_dir():
        return "diffusers"
    suffixes = {report.path.suffix for report in reports if report.kind.part != "other"}
    if ".pth" in suffixes and any(report.kind.part == "transformer" for report in reports):
        return "official"
    return "files side by side" if len(reports) > 1 else _layout_of_file(reports[0])


def _still_needed(reports: list[PartReport], folder: Path) -> dict[str, str]:
    """Return what is missing for a run, where there is a part of a model and not just a LoRA or a stranger."""
    have = {report.kind.part for report in reports if report.usable}
    if not have & set(PARTS):
        return {}
    needed: dict[str, str] = {part: WHERE[part] for part in PARTS if part not in have}
    problem = _tokenizer_problem(reports, folder)
    return {**needed, "tokenizer": problem} if problem else needed


def _tokenizer_problem(reports: list[PartReport], folder: Path) -> str:
    """Return why there is no tokenizer for these parts, and what to do; empty if there is."""
    found = tokenizer_folder(folder)
    if found is None:
        return GET_TOKENIZER
    kinds = {report.kind.part: report.kind for report in reports if report.usable}
    kind = next(kinds[part] for part in ("text_encoder", *PARTS) if part in kinds)
    try:
        check_tokenizer(found, rows=_config_for(kind).text_encoder.vocab_size)
    except (ModelNotFound, CorruptModel, WrongModel) as error:
        return str(error)
    return ""


def _part_as_json(part: PartReport) -> dict[str, Any]:
    return {
        "part": part.kind.part,
        "name": part.kind.name,
        "task": part.kind.task,
        "usable": part.usable,
        "problem": part.problem or ("" if part.kind.usable else part.kind.advice),
        "path": str(part.path),
        "files": part.files,
        "names": part.kind.dialect,
        "layers": part.kind.layers,
        "bytes": part.nbytes,
        "loop_bytes": part.nbytes - part.once_bytes if part.kind.part == "transformer" else None,
        "parameters": part.parameters,
        "dtypes": dict(part.dtypes),
        "quantization": part.quantization,
        "notes": list(part.kind.notes),
    }
