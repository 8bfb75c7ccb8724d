"""What the header of a weight file says: name, dtype, shape and place of each tensor. No torch; no tensor is read.

Reads safetensors itself; `wan_local.gguf_header` and `wan_local.pickle_header` read the two other containers into the
same `Header`. Everything in a header is distrusted: lengths are checked before anything of that length is allocated.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from wan_local.errors import CorruptModel

Container = Literal["safetensors", "gguf", "pickle"]

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_MAX_DIMENSIONS = 16
_OTHER_FILES = (  # what lies in the place of what is wanted, by its first bytes
    (rb"version https://git-lfs", "a git-lfs pointer, not {wanted}. Run `git lfs pull`, or use `hf download`"),
    (rb"# xet version", "a git-xet pointer, not {wanted}. Use `hf download`"),
    (rb"\s*<", "an HTML or XML page, not {wanted}. The download was refused; log in first"),
    (rb"\s*[{\[]", "a JSON text, not {wanted}. Give the .safetensors or .gguf file, or the folder"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\x00|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "compressed, or an archive. Unpack it first"),
    (rb"\x80[\x00-\x05]", "a pickle of an old format (torch before 1.6), which wan_local does not open"),
    (rb"\x89PNG|\xff\xd8\xff|RIFF|%PDF|\x00\x00\x00.ftyp", "an image, a video or a document, not {wanted}"),
    (rb"\x00{64}", "full of zeros: a download that has reserved its place and not arrived. Download it again"),
)
_TEXT = re.compile(rb"[\t\r\n\x20-\x7e]{9,64}")


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file's size and date when its header was read: with others, its header says nothing of it any more.

    Its inode is no part of this: some network file systems give a file another one while it is in use.
    """

    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Self:
        """Return the stamp of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header of its file tells of it: `nbytes` bytes at `offset` of `file`, while that has `stamp`.

    `strides`: how many items lie from a neighbour to the next on each axis, where that is not row by row; see `span`.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    nbytes: int
    offset: int
    stamp: FileStamp | None = None
    strides: tuple[int, ...] | None = None  # of pickles alone

    @property
    def span(self) -> int:
        """How many items lie from its first to its last in the file; none where it is empty."""
        if self.strides is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of one file, and the text that its writer left in the header."""

    container: Container
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file from its header alone; see `read_safetensors`."""
    return dict(read_safetensors(file).tensors)


def read_safetensors(file: Path) -> Header:
    """Return the header of a safetensors file, every length and offset checked.

    Raises CorruptModel with expected and actual bytes. Format: https://github.com/huggingface/safetensors#format
    """
    with file.open("rb") as stream:
        stamp = FileStamp.of(stream.fileno())
        size, start = stamp.nbytes, stream.read(64)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8) or start[8:9] not in (b"{", b" "):
            raise CorruptModel(_why_no_header(file, start, size))
        stream.seek(8)
        entries = _parsed(file, stream.read(length))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CorruptModel(f"the header of {file.name!r} has metadata that is no table. Download it again.")
    tensors = {name: _tensor_info(file, name, entry, 8 + length, stamp) for name, entry in entries.items()}
    if not tensors:
        raise CorruptModel(f"{file.name!r} holds no tensors at all. Download it again.")
    _check_cover(file, tensors, 8 + length, size)
    return Header("safetensors", tensors, metadata)


def foreign_file(start: bytes, wanted: str) -> str | None:
    """Return what a file is that begins with `start` and is not what is wanted, and what to do; None if unknown."""
    return next((what.format(wanted=wanted) for pattern, what in _OTHER_FILES if re.match(pattern, start)), None)


def _why_no_header(file: Path, start: bytes, size: int) -> str:
    if size == 0:
        return f"{file.name!r} is empty: 0 bytes. Download it again."
    what = foreign_file(start, "the weights")
    if what is not None:
        return f"{file.name!r} is {what}."
    if _TEXT.fullmatch(start):
        first = start.split(b"\n")[0].decode("ascii").strip()
        return f"{file.name!r} is a text, not the weights; it begins with {first[:60]!r}. Download it again."
    length = int.from_bytes(start[:8], "little")
    return (
        f"{file.name!r} is cut short or forged, or no safetensors file: {size} bytes, a header of {length} announced. "
        "Download it again."
    )


def _parsed(file: Path, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content, object_pairs_hook=lambda pairs: _without_twins(file, pairs))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptModel):
            raise
        raise CorruptModel(f"the header of {file.name!r} is not JSON: {error}. Download it again.") from error
    if not isinstance(header, dict):
        raise CorruptModel(f"the header of {file.name!r} is no table of tensors. Download it again.")
    return header


def _without_twins(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise CorruptModel(f"the header of {file.name!r} names {twin!r} twice. Download it again.")
    return table


def _tensor_info(file: Path, name: str, entry: Any, data_start: int, stamp: FileStamp) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptModel(f"{name!r} in the header of {file.name!r} lacks dtype, shape or data_offsets") from error
    numbers = (*shape, begin, end)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers) or len(shape) > _MAX_DIMENSIONS:
        raise CorruptModel(f"{name!r} in {file.name!r} has a shape or offsets that are no sizes: {str(numbers)[:200]}")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CorruptModel(f"{name!r} in {file.name!r} has a dtype that does not exist: {str(dtype)[:40]!r}")
    expected = ITEM_BYTES[dtype]
    for length in shape:
        expected *= length
    if expected != end - begin:
        raise CorruptModel(f"{name!r} in {file.name!r} is {dtype} {list(shape)} and has {end - begin} bytes")
    return TensorInfo(dtype, shape, file, end - begin, data_start + begin, stamp)


def _check_cover(file: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Check that the tensors cover the data exactly, without gap or overlap."""
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            begin, expected = info.offset - data_start, position - data_start
            raise CorruptModel(
                f"{name!r} in {file.name!r} lies at {begin}..{begin + info.nbytes}, where {expected} should begin. "
                "Download it again."
            )
        position += info.nbytes
    if position != size:
        raise CorruptModel(
            f"{file.name!r} should hold {position - data_start} bytes of tensors and holds {size - data_start}: it is "
            "cut short or was changed. Download it again."
        )
