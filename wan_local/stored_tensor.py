"""A tensor as it is stored, and how to read it: bytes of a file, scales, blocks, a third of a joint projection.

`stored_tensors` finds for each of our names where its numbers are; `TensorReader` reads them. Nothing is read before.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_local.dequantize import dequantize_blocks
from wan_local.errors import CorruptModel, NotAvailable, WrongModel
from wan_local.gguf_header import READABLE, TYPES
from wan_local.header import Container, TensorInfo
from wan_local.key_map import Part, canonical_names, ignorable, weight_name, without_prefix
from wan_local.pickle_header import unwrapped
from wan_local.weight_files import WeightFiles

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_GIVEN = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16}  # all else: see StoredTensor.dtype
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_SCALED = ("I8", "U8")  # mean nothing without their scale; U8: two of quanto's int4 in a byte
_SCALES = (".scale_weight", ".weight_scale", ".weight._scale")  # Comfy's older and newer name for the same, quanto's
# of the activations, or of the whole file
_MARKERS = (".scale_input", ".input_scale", ".output_scale", ".comfy_quant", "scaled_fp8")
_BLOCKS = ("blocks.", "encoder.block.")  # where a file that scales any linear scales all of them
_BLOCK_ITEMS = {kind.name: (kind.items, kind.nbytes) for kind in TYPES.values()}
_REMAP_BYTES = 512 * 2**20  # a mapped pickle counts into our memory as it is read: begin anew after this much


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the numbers of one of our tensors are.

    `shape`: ours. `third`: which third of the stored rows, for the joint q, k, v projection. `scale`: what they are
    multiplied by: one number, or one for each row. `shift`: of quanto's int4, whose groups each have a scale and one.
    """

    stored_name: str
    info: TensorInfo
    shape: tuple[int, ...]
    third: int | None = None
    scale: TensorInfo | None = None
    shift: TensorInfo | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is given in."""
        if self.scale is not None:
            return torch.float32
        if self.info.dtype in ("BF16", *_EIGHT_BITS):
            return torch.bfloat16
        return _GIVEN.get(self.info.dtype, torch.float32)

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
    shifts = {weight_name(name): info for name, info in plain.items() if name.endswith(".weight._shift")}
    plain = {_quanto_weight(name): info for name, info in plain.items() if not name.endswith(".weight._shift")}
    scales, ignored = _scales_of(plain)
    for name, info in plain.items():
        if name.endswith(".comfy_quant"):
            _check_comfy_format(name, info)
    names = [name for name in plain if name not in scales.values() and name not in ignored]
    ignored += [name for name in names if ignorable(part, name)]
    stored: dict[str, StoredTensor] = {}
    for name, ours in canonical_names(part, dialect, names).items():
        scale = plain[scales[name]] if name in scales else None
        _check_readable(name, plain[name], scale, scaled=bool(scales))
        if name in shifts:
            stored[ours] = _packed(name, plain[name], scale, shifts[name], expected.get(ours, ()))
            continue
        for entry_name, entry in _entries(part, name, ours, plain[name], scale):
            twin = stored.setdefault(entry_name, entry)
            if twin is not entry and not (part == "text_encoder" and entry_name == "shared.weight"):
                raise CorruptModel(f"{name!r} and {twin.stored_name!r} are the same tensor of the {part}")
    return stored, ignored


def _quanto_weight(name: str) -> str:
    """Return the weight whose numbers quanto calls `weight._data`, and its packed ones `weight._data._data`."""
    return weight_name(name) if name.endswith("._data") else name


def _packed(
    name: str, info: TensorInfo, scale: TensorInfo | None, shift: TensorInfo, shape: tuple[int, ...]
) -> StoredTensor:
    """Return quanto's int4: groups of inputs as rows, two rows in one of bytes; a scale and a shift for each group."""
    sound = len(info.shape) == 2 and 2 * math.prod(info.shape) == math.prod(shape) and scale is not None
    if not sound or {math.prod(entry.shape) for entry in (scale, shift) if entry} != {2 * info.shape[0]}:
        raise CorruptModel(
            f"{name!r} in {info.file.name!r} holds {info.dtype} {list(info.shape)} as int4 with "
            f"{list(scale.shape) if scale else 'no'} scales, which do not make a weight of {list(shape)}"
        )
    return StoredTensor(name, info, shape, None, scale, shift)


def _scales_of(plain: Mapping[str, TensorInfo]) -> tuple[dict[str, str], list[str]]:
    """Return the name of each weight's scale, and the names of Comfy's marks."""
    scales = {}
    for name in plain:
        for ending in _SCALES:
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
    if info.dtype not in (*_DTYPES, *READABLE):
        raise NotAvailable(
            f"{name!r} in {info.file.name!r} is stored as {info.dtype}, which wan_local does not read. Of GGUF it "
            f"reads {', '.join(READABLE)}: get one of these."
        )
    if info.dtype in _SCALED and scale is None:
        raise NotAvailable(f"{name!r} in {info.file.name!r} is stored as {info.dtype} without a scale: no known format")
    if info.dtype == "U8":
        return  # packed: its scales are checked with its groups
    if scaled and info.dtype in _EIGHT_BITS and scale is None and name.startswith(_BLOCKS):
        raise CorruptModel(f"{name!r} in {info.file.name!r} has no scale, where other weights in the file have one")
    if scale is not None:
        count = math.prod(scale.shape)
        if count not in (1, info.shape[0]) or scale.dtype not in ("F32", "F16", "BF16"):
            raise CorruptModel(
                f"the scale of {name!r} in {info.file.name!r} is {scale.dtype} {list(scale.shape)}; one number, or one "
                f"for each of {info.shape[0]} rows, is known"
            )


def _check_comfy_format(name: str, info: TensorInfo) -> None:
    if info.nbytes > 4096:
        raise CorruptModel(f"{name!r} in {info.file.name!r} has {info.nbytes} bytes, too many for what it should be")
    content = _bytes(info.file, info.offset, info.nbytes).numpy().tobytes()
    try:
        table: Any = json.loads(content)
    except ValueError as error:
        raise CorruptModel(f"{name!r} in {info.file.name!r} is not JSON: {error}") from error
    form = table.get("format") if isinstance(table, dict) else None
    if form not in ("float8_e4m3fn", "float8_e5m2"):
        raise NotAvailable(
            f"{info.file.name!r} is quantized as {form!r}, which wan_local does not read. Get it as bf16, fp8 or GGUF."
        )


class TensorReader:
    """Reads stored tensors of one set of files. A pickle stays mapped between reads, for half a gigabyte of them."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._mapped: dict[Path, Mapping[str, Tensor]] = {}
        self._mapped_bytes = 0

    def read(self, stored: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows `start` to `stop` of a tensor (all unless told), on the CPU, in `stored.dtype`.

        Raises CorruptModel where numbers can't be right: scales that are NaN, infinite or zero; a file cut short.
        """
        if self._container == "pickle":
            rows = self._from_pickle(stored)[start:stop]
            self._mapped_bytes += rows.nbytes
            numbers = rows.to(stored.dtype, copy=True)
        else:
            numbers = _read_rows(stored, start, stop) if stored.shift is None else _read_packed(stored)[start:stop]
        if stored.scale is not None and stored.shift is None:
            numbers = numbers * _read_scale(stored, start, stop, numbers.dim())
        return numbers.to(stored.dtype)

    def _from_pickle(self, stored: StoredTensor) -> Tensor:
        file = stored.info.file
        if file not in self._mapped or self._mapped_bytes > _REMAP_BYTES:
            self._mapped[file] = _load_pickle(file)
            self._mapped_bytes = 0
        tensor = self._mapped[file][stored.stored_name]
        rows = tensor if stored.third is None else tensor[stored.first_row : stored.first_row + stored.shape[0]]
        return rows.reshape(stored.shape)


def _load_pickle(file: Path) -> Mapping[str, Tensor]:
    """Map a torch file whose header was walked before; `weights_only` runs nothing that it holds."""
    tensors = unwrapped(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    if not isinstance(tensors, Mapping):
        raise WrongModel(f"{file.name!r} holds no dict of tensors")
    return without_prefix(tensors)


def _read_rows(stored: StoredTensor, start: int, stop: int | None) -> Tensor:
    info = stored.info
    if not stored.shape:
        return _numbers(info.dtype, _bytes(info.file, info.offset, info.nbytes)).view(())
    start, stop, _ = slice(start, stop).indices(stored.shape[0])
    width = math.prod(stored.shape[1:])
    first, count = (stored.first_row + start) * width, max(0, stop - start) * width
    items, nbytes = _BLOCK_ITEMS.get(info.dtype, (1, 0))
    if items == 1:
        item = _DTYPES[info.dtype].itemsize
        content = _bytes(info.file, info.offset + first * item, count * item)
        return _numbers(info.dtype, content).view(-1, *stored.shape[1:])
    from_block, to_block = first // items, -(-(first + count) // items)  # rows may begin inside a block
    content = _bytes(info.file, info.offset + from_block * nbytes, (to_block - from_block) * nbytes)
    try:
        numbers = dequantize_blocks(info.dtype, content)
    except CorruptModel as error:
        raise CorruptModel(f"{stored.stored_name!r} in {info.file.name!r}: {error}. Download it again.") from error
    begin = first - from_block * items
    return numbers[begin : begin + count].view(-1, *stored.shape[1:])


def _read_packed(stored: StoredTensor) -> Tensor:
    """Return quanto's int4 as numbers: scale * q - shift for each group (quanto's quantize_affine, float shift)."""
    info, scale, shift = stored.info, stored.scale, stored.shift
    assert scale is not None and shift is not None, stored
    packed = _bytes(info.file, info.offset, info.nbytes).view(info.shape)
    groups = torch.cat((packed & 15, packed >> 4)).float()
    shifts = _bytes(shift.file, shift.offset, shift.nbytes).view(_DTYPES[shift.dtype]).float().view(-1, 1)
    groups = groups.mul_(_scale_numbers(stored).view(-1, 1)).sub_(shifts)
    return groups.view(stored.shape)


def _numbers(dtype: str, content: Tensor) -> Tensor:
    if dtype in _EIGHT_BITS:
        return _table(dtype).index_select(0, content.int())
    return content.view(_DTYPES[dtype])


@functools.cache
def _table(dtype: str) -> Tensor:
    """Return what each byte of an 8-bit float is in bfloat16; looking up is four times as fast as torch's cast."""
    return torch.arange(256).to(torch.uint8).view(_DTYPES[dtype]).to(torch.bfloat16)


def _scale_numbers(stored: StoredTensor) -> Tensor:
    """Return all of a tensor's scales, float32 [count]."""
    scale = stored.scale
    assert scale is not None
    numbers = _bytes(scale.file, scale.offset, scale.nbytes).view(_DTYPES[scale.dtype]).float().view(-1)
    zero = numbers.numel() == 1 and not numbers.all()  # a row or a group may be all zero
    if zero or not torch.isfinite(numbers).all():
        raise CorruptModel(
            f"a scale of {stored.stored_name!r} in {scale.file.name!r} is NaN, infinite or zero. Download it again."
        )
    return numbers


def _read_scale(stored: StoredTensor, start: int, stop: int | None, dimensions: int) -> Tensor:
    numbers = _scale_numbers(stored)
    if numbers.numel() > 1:
        numbers = numbers[stored.first_row :][: stored.shape[0]][slice(start, stop)]
    return numbers.view(-1, *(1,) * (dimensions - 1))


def _bytes(file: Path, offset: int, count: int) -> Tensor:
    content = torch.empty(count, dtype=torch.uint8)
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        view, done = content.numpy().data, 0
        while done < count:
            got = stream.readinto(view[done:])
            if not got:
                raise CorruptModel(f"{file.name!r} ends at byte {offset + done}: it became shorter while it was read")
            done += got
    return content
