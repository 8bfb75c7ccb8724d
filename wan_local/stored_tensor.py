"""Where the numbers of each tensor are, by headers: bytes of a file, scales, blocks, a third of a joint projection.

`stored_tensors` finds it out and checks that all of it can be read; `misfit` tells what a part lacks. No torch, and of
the data only Comfy's marks are read; `wan_local.tensor_reader` reads the tensors.

Comfy says how a layer is quantized in a tensor `X.comfy_quant` of JSON, or for all layers in the file's metadata:
`{"layers": {"X": {"format": "float8_e4m3fn"}, ...}}`. Both are checked alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from wan_local.errors import CorruptModel, NotAvailable
from wan_local.gguf_header import READABLE, TYPES
from wan_local.header import TensorInfo
from wan_local.key_map import Part, canonical_names, ignorable, weight_name, without_prefix
from wan_local.scales import SCALES
from wan_local.weight_files import COMFY_KEY, WeightFiles

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_SCALED = ("I8", "U8")  # mean nothing without their scale; U8: two numbers of 4 bits in a byte
_READABLE = {"F64", "F32", "F16", "BF16", *EIGHT_BITS, *_SCALED, *READABLE}
_GGUF = {kind.name for kind in TYPES.values() if kind.items > 1}
_FLOATS = ("F32", "F16", "BF16")  # of scales and shifts
WHOLE_SHIFTS = ("U8", "I8")  # quanto's, where it was told to keep zero exact
_INSTEAD = "Get it as bf16, fp16, fp8 or GGUF"
_SHIFTS = (".weight._shift", ".weight_shift")  # quanto's, our own
# of the activations, or of the whole file
_MARKERS = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant", "scaled_fp8")
_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # numbers times a scale, of a tensor or a row
_BLOCKS = ("blocks.", "encoder.block.")  # where a file that scales any linear scales all of them
_NO_LINEAR = ("relative_attention_bias", "pos_embedding")  # a table that T5's blocks have


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the numbers of one of our tensors are.

    `shape`: ours. `third`: which third of the stored rows, for the joint q, k, v projection. `scale`: what they are
    multiplied by: one number, or one for each row. `shift`: of int4, whose groups each have a scale and one. `pairs`:
    a byte of int4 holds two neighbours in a row, as in our stores; else numbers of two groups, as quanto packs them.
    """

    stored_name: str
    info: TensorInfo
    shape: tuple[int, ...]
    third: int | None = None
    scale: TensorInfo | None = None
    shift: TensorInfo | None = None
    pairs: bool = False

    @property
    def nbytes(self) -> int:
        """How many bytes of files it is made of."""
        share = math.prod(self.shape) / max(1, math.prod(self.info.shape)) if self.third is not None else 1
        rest = sum(piece.nbytes for piece in (self.scale, self.shift) if piece is not None and self.third in (None, 0))
        return round(self.info.nbytes * share) + rest

    @property
    def first_row(self) -> int:
        return (self.third or 0) * self.shape[0]


def stored_tensors(
    part: Part, weights: WeightFiles, dialect: str, expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return where each of our tensors of `part` is, and the names in the files that are rightly left out.

    expected: the shapes that our tensors should have; quanto's packed int4 does not tell its own. Raises WrongModel for
    a name that no table knows, CorruptModel for a scale that fits no weight or is no scale, NotAvailable for a type of
    numbers that wan_local does not read.
    """
    plain = without_prefix(weights.tensors)
    shifts = {weight_name(name): info for name, info in plain.items() if name.endswith(_SHIFTS)}
    ours_packed = {weight_name(name) for name in plain if name.endswith(".weight_shift")}
    plain = {_quanto_weight(name): info for name, info in plain.items() if not name.endswith(_SHIFTS)}
    scales, ignored = _scales_of(plain)
    _check_comfy_formats(weights, plain)
    names = [name for name in plain if name not in scales.values() and name not in ignored]
    ignored += [name for name in names if ignorable(part, name)]
    stored: dict[str, StoredTensor] = {}
    for name, ours in canonical_names(part, dialect, names).items():
        scale = plain[scales[name]] if name in scales else None
        _check_readable(name, plain[name], scale, scaled=bool(scales))
        if name in shifts:
            packed = _in_pairs if name in ours_packed else _in_groups
            stored[ours] = packed(name, plain[name], scale, shifts[name], expected.get(ours, ()))
            continue
        if plain[name].dtype == "U8":
            raise NotAvailable(
                f"{name!r} in {plain[name].file.name!r} is stored as U8 without a shift: no known format. {_INSTEAD}."
            )
        for entry_name, found in _entries(part, name, ours, plain[name], scale):
            entry = _with_axes_of_one(found, expected.get(entry_name, found.shape))
            twin = stored.setdefault(entry_name, entry)
            if twin is not entry and not (part == "text_encoder" and entry_name == "shared.weight"):
                raise CorruptModel(f"{name!r} and {twin.stored_name!r} are the same tensor of the {part}")
    return stored, ignored


def misfit(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Return in words what keeps the stored tensors from being those that are expected; empty if nothing does."""
    missing, unexpected = sorted(expected.keys() - stored), sorted(stored.keys() - expected.keys())
    if missing:
        return f"{len(missing)} of its {len(expected)} tensors are missing, among them {', '.join(missing[:3])}"
    if unexpected:
        return f"it has {len(unexpected)} tensors too many, among them {', '.join(unexpected[:3])}"
    for name, shape in expected.items():
        if stored[name].shape != tuple(shape):
            return f"{name!r} is {list(stored[name].shape)} and should be {list(shape)}"
    return ""


def _with_axes_of_one(stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """Return the tensor in our shape where only axes of one differ: some writers of GGUF leave out leading ones."""
    alike = [length for length in stored.shape if length != 1] == [length for length in shape if length != 1]
    return replace(stored, shape=tuple(shape)) if alike else stored


def _quanto_weight(name: str) -> str:
    """Return the weight whose numbers quanto calls `weight._data`, and its packed ones `weight._data._data`."""
    return weight_name(name) if name.endswith("._data") else name


def _in_groups(
    name: str, info: TensorInfo, scale: TensorInfo | None, shift: TensorInfo, shape: tuple[int, ...]
) -> StoredTensor:
    """Return quanto's int4: groups of inputs as rows, two rows in one of bytes; a scale and a shift for each group."""
    sound = len(info.shape) == 2 and 2 * math.prod(info.shape) == math.prod(shape) and scale is not None
    if not sound or {math.prod(entry.shape) for entry in (scale, shift) if entry} != {2 * info.shape[0]}:
        raise _no_int4(name, info, scale, shape)
    _check_dtypes(name, {scale: _FLOATS, shift: (*_FLOATS, *WHOLE_SHIFTS)})
    return StoredTensor(name, info, shape, None, scale, shift)


def _in_pairs(
    name: str, info: TensorInfo, scale: TensorInfo | None, shift: TensorInfo, shape: tuple[int, ...]
) -> StoredTensor:
    """Return our own int4: two neighbours of a row in a byte; a scale and a shift for each group of a row."""
    sound = len(info.shape) == 2 and (info.shape[0], 2 * info.shape[1]) == shape and scale is not None
    groups = {entry.shape for entry in (scale, shift) if entry}
    if not sound or len(groups) != 1 or not all(len(g) == 2 and g[0] == shape[0] and g[1] > 0 for g in groups):
        raise _no_int4(name, info, scale, shape)
    if shape[1] % shift.shape[1]:
        raise _no_int4(name, info, scale, shape)
    _check_dtypes(name, {scale: _FLOATS, shift: _FLOATS})
    return StoredTensor(name, info, shape, None, scale, shift, pairs=True)


def _no_int4(name: str, info: TensorInfo, scale: TensorInfo | None, shape: tuple[int, ...]) -> CorruptModel:
    return CorruptModel(
        f"{name!r} in {info.file.name!r} holds {info.dtype} {list(info.shape)} as int4 with "
        f"{list(scale.shape) if scale else 'no'} scales, which do not make a weight of {list(shape)}"
    )


def _check_dtypes(name: str, known: Mapping[TensorInfo | None, tuple[str, ...]]) -> None:
    for info, dtypes in known.items():
        if info is not None and info.dtype not in dtypes:
            raise NotAvailable(
                f"the scales or shifts of {name!r} in {info.file.name!r} are stored as {info.dtype}; "
                f"{', '.join(dtypes)} are read. {_INSTEAD}."
            )


def _scales_of(plain: Mapping[str, TensorInfo]) -> tuple[dict[str, str], list[str]]:
    """Return the name of each weight's scale, and the names of Comfy's marks."""
    scales = {}
    for name in plain:
        for ending in SCALES:
            if name.endswith(ending):
                weight = f"{name.removesuffix(ending)}.weight"
                if weight not in plain or weight in scales:
                    raise CorruptModel(f"{name!r} is the scale of {weight!r}, which is not there")
                scales[weight] = name
    return scales, [name for name in plain if name.endswith(_MARKERS)]


def _entries(
    part: Part, name: str, ours: str, info: TensorInfo, scale: TensorInfo | None
) -> list[tuple[str, StoredTensor]]:
    """Return the tensors that one stored tensor holds: itself, or three; its shape without axes of length 1."""
    if part == "image_encoder" and ".qkv_proj." in ours and info.shape and info.shape[0] % 3 == 0:
        shape = (info.shape[0] // 3, *info.shape[1:])
        return [
            (ours.replace("qkv_proj", f"{letter}_proj"), StoredTensor(name, info, shape, third, scale))
            for third, letter in enumerate("qkv")
        ]
    shape = info.shape
    if ours == "embeddings.class_embedding":
        shape = (math.prod(shape),)
    elif ours == "embeddings.position_embedding.weight":
        shape = shape[-2:]
    return [(ours, StoredTensor(name, info, shape, None, scale))]


def _check_readable(name: str, info: TensorInfo, scale: TensorInfo | None, *, scaled: bool) -> None:
    if info.dtype not in _READABLE:
        instead = f"Of GGUF it reads {', '.join(READABLE)}: get one of these" if info.dtype in _GGUF else _INSTEAD
        raise NotAvailable(
            f"{name!r} in {info.file.name!r} is stored as {info.dtype}, which wan_local does not read. {instead}."
        )
    if info.dtype in _SCALED and scale is None:
        raise NotAvailable(
            f"{name!r} in {info.file.name!r} is stored as {info.dtype} without a scale: no known format. {_INSTEAD}."
        )
    if info.dtype == "U8":
        return  # packed: its scales are checked with its groups
    linear = name.startswith(_BLOCKS) and len(info.shape) == 2 and not any(word in name for word in _NO_LINEAR)
    if scaled and info.dtype in EIGHT_BITS and scale is None and linear:
        raise CorruptModel(f"{name!r} in {info.file.name!r} has no scale, where other weights in the file have one")
    if scale is not None:
        count = math.prod(scale.shape)
        if count not in (1, info.shape[0]) or scale.dtype not in _FLOATS:
            raise CorruptModel(
                f"the scale of {name!r} in {info.file.name!r} is {scale.dtype} {list(scale.shape)}; one number, or one "
                f"for each of {info.shape[0]} rows, is known"
            )


def _check_comfy_formats(weights: WeightFiles, plain: Mapping[str, TensorInfo]) -> None:
    """Check every layer that Comfy's tools say is quantized, wherever they say it."""
    for name, info in plain.items():
        if name.endswith(".comfy_quant"):
            _check_comfy_format(info.file.name, name, _parsed(f"{name!r} in {info.file.name!r}", _mark(name, info)))
    for file, text in weights.comfy.items():
        place = f"the {COMFY_KEY} of {file!r}"
        table = _parsed(place, text) if isinstance(text, str) else text
        layers = table.get("layers") if isinstance(table, dict) else None
        if not isinstance(layers, dict):
            raise CorruptModel(f"{place} has no table of layers. Download it again.")
        for layer, form in layers.items():
            _check_comfy_format(file, layer, form)


def _mark(name: str, info: TensorInfo) -> bytes:
    if info.nbytes > 4096:
        raise CorruptModel(f"{name!r} in {info.file.name!r} has {info.nbytes} bytes, too many for what it should be")
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.nbytes)


def _parsed(place: str, content: bytes | str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{place} is not JSON: {error}. Download it again.") from error


def _check_comfy_format(file: str, layer: str, table: Any) -> None:
    form = table.get("format") if isinstance(table, dict) else None
    turned = isinstance(table, dict) and bool(table.get("convrot"))
    if turned or form not in _COMFY_FORMATS:
        rotation = " with convrot (its inputs are rotated)" if turned else ""
        raise NotAvailable(
            f"{layer!r} in {file!r} is quantized as {str(form)[:60]!r}{rotation}, which wan_local does not read. "
            "Get it as bf16, fp8 or GGUF."
        )
