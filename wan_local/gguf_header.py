"""The header of a GGUF file: metadata, and name, type, shape and place of each tensor. No torch; no tensor is read.

Read in one pass with every count checked against the bytes that are there, so that neither a forged count nor an array
of a million tokens costs more than the header's own length. Little-endian versions 2 and 3. The gguf package's reader
makes an array of each token: for the 256,384 of UMT5 it takes a hundred times as long (tests/test_gguf.py writes one).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from wan_local.errors import CorruptModel, NotAvailable
from wan_local.header import FileStamp, Header, TensorInfo

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_TENSORS, _MAX_KEYS, _MAX_DIMENSIONS = 100_000, 100_000, 8
_MAX_STRING = 64 * 2**20
_SHORTEST_TENSOR, _SHORTEST_KEY = 8 + 4 + 4 + 8, 8 + 4 + 1  # bytes of their descriptions
_MAX_TEXTS, _WINDOW_BYTES = 1_000_000, 2**20
_KEPT_ARRAY = 64  # longer arrays, such as vocabularies, are checked and skipped
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


class BlockType(NamedTuple):
    """A ggml type: `items` numbers lie in `nbytes` bytes."""

    name: str
    items: int
    nbytes: int


TYPES = {
    number: BlockType(*fields)
    for number, fields in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    }.items()
}  # fmt: skip
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


class _Damaged(Exception):
    """What is wrong, without the file's name."""


class _Description(NamedTuple):
    """A tensor as it is described in the header, before its place is checked."""

    shape: tuple[int, ...]
    type: BlockType
    begin: int


def read_gguf_header(file: Path) -> Header:
    """Return the header of a GGUF file; CorruptModel if it is damaged, NotAvailable for an unknown version or type."""
    try:
        with file.open("rb") as stream:
            stamp = FileStamp.of(stream.fileno())
            cursor = _Cursor(stream, stamp.nbytes)
            tensor_count, key_count = _counts(cursor, file)
            metadata = {}
            for _ in range(key_count):
                name = cursor.string()
                if name in metadata:
                    raise _Damaged(f"it has the key {name!r} twice")
                metadata[name] = _value(cursor, cursor.number("I"))
            described = _described(cursor, tensor_count)
            alignment = metadata.get("general.alignment", 32)
            if type(alignment) is not int or not 0 < alignment <= 2**20:
                raise _Damaged(f"its alignment is {alignment!r}")
            start = -(-cursor.position // alignment) * alignment
        tensors = _placed(file, described, start, stamp)
        if not tensors:
            raise _Damaged("it holds no tensors at all")
        return Header("gguf", _with_original_shapes(tensors, metadata), metadata)
    except _Damaged as error:
        raise CorruptModel(f"{file.name!r} is cut short or damaged: {error}. Download it again.") from error


class _Cursor:
    """Reads numbers and strings one after the other, and never beyond the file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.position = stream, size, 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _Damaged(f"{count} bytes are announced at {self.position} and {self.left} are left")
        content = self.stream.read(count)
        self.position += count
        if len(content) != count:
            raise _Damaged(f"it ends at byte {self.position}")
        return content

    def peek(self, count: int) -> bytes:
        """Return up to `count` next bytes and stay where we are."""
        content = self.stream.read(count)
        self.stream.seek(self.position)
        return content

    def skip(self, count: int) -> None:
        if count > self.left:
            raise _Damaged(f"{count} bytes are announced at {self.position} and {self.left} are left")
        self.stream.seek(count, 1)
        self.position += count

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > _MAX_STRING:
            raise _Damaged(f"a text of {length} bytes is announced at {self.position}")
        return self.take(length).decode("utf-8", errors="replace")


def _counts(cursor: _Cursor, file: Path) -> tuple[int, int]:
    magic = cursor.take(4)
    if magic != MAGIC:
        raise _Damaged(f"it begins with {magic!r} where {MAGIC!r} should stand")
    version = cursor.number("I")
    if version not in _VERSIONS:
        named = (
            f"big-endian GGUF of version {version >> 24}"
            if version and not version % 2**24
            else f"GGUF of version {version}"
        )
        raise NotAvailable(f"{file.name!r} is {named}; wan_local reads little-endian versions 2 and 3.")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    if tensor_count > min(_MAX_TENSORS, cursor.left // _SHORTEST_TENSOR):
        raise _Damaged(f"{tensor_count} tensors are announced")
    if key_count > min(_MAX_KEYS, cursor.left // _SHORTEST_KEY):
        raise _Damaged(f"{key_count} keys are announced")
    return tensor_count, key_count


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise _Damaged(f"a value of type {kind} at {cursor.position}")
    item, count = cursor.number("I"), cursor.number("Q")
    if item in _SCALARS:
        length = struct.calcsize(f"<{_SCALARS[item]}")
        if count <= _KEPT_ARRAY:
            return [cursor.number(_SCALARS[item]) for _ in range(count)]
        cursor.skip(count * length)
    elif item == _STRING:
        _skip_texts(cursor, count)
    else:
        raise _Damaged(f"an array of type {item} at {cursor.position}")
    return None


def _skip_texts(cursor: _Cursor, count: int) -> None:
    """Step over texts, which lie each behind its length, without making them."""
    if count > min(_MAX_TEXTS, cursor.left // 8):
        raise _Damaged(f"{count} texts are announced at {cursor.position}")
    window, place = b"", 0
    for _ in range(count):
        if place + 8 > len(window):
            cursor.skip(place)
            window, place = cursor.peek(_WINDOW_BYTES), 0
            if len(window) < 8:
                raise _Damaged(f"it ends at byte {cursor.size}, among {count} texts")
        length = int.from_bytes(window[place : place + 8], "little")
        if length > cursor.left:
            raise _Damaged(f"a text of {length} bytes is announced at {cursor.position + place}")
        place += 8 + length
    cursor.skip(place)


def _described(cursor: _Cursor, count: int) -> dict[str, _Description]:
    described: dict[str, _Description] = {}
    for _ in range(count):
        name = cursor.string()
        if name in described:
            raise _Damaged(f"it has the tensor {name!r} twice")
        dimensions = cursor.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise _Damaged(f"{name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]  # ggml counts from the innermost
        number, begin = cursor.number("I"), cursor.number("Q")
        if number not in TYPES:
            raise NotAvailable(
                f"{name!r} in {Path(cursor.stream.name).name!r} is of ggml type {number}, not known here."
            )
        described[name] = _Description(shape, TYPES[number], begin)
    return described


def _placed(file: Path, described: Mapping[str, _Description], start: int, stamp: FileStamp) -> dict[str, TensorInfo]:
    """Check that each tensor lies inside the file and on no other."""
    tensors = {}
    end, before = start, "the header"
    for name, (shape, kind, begin) in sorted(described.items(), key=lambda item: item[1].begin):
        items = 1
        for length in shape:
            items *= length
        if shape and shape[-1] % kind.items:
            raise _Damaged(f"{name!r} has rows of {shape[-1]}, which {kind.name} cannot hold (blocks of {kind.items})")
        nbytes = items // kind.items * kind.nbytes
        if start + begin < end:
            raise _Damaged(f"{name!r} at {begin} overlaps {before!r}")
        if start + begin + nbytes > stamp.nbytes:
            has = f"the file has {stamp.nbytes}"
            raise _Damaged(f"{name!r} needs bytes {start + begin}..{start + begin + nbytes} and {has}")
        end, before = start + begin + nbytes, name
        tensors[name] = TensorInfo(kind.name, shape, file, nbytes, start + begin, stamp)
    return tensors


def _with_original_shapes(tensors: dict[str, TensorInfo], metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Give tensors back the shape that ggml had no room for: its tensors have four axes at most."""
    for key, shape in metadata.items():
        name = key.removeprefix(_ORIGINAL_SHAPE)
        if name == key or name not in tensors:
            continue
        info, items = tensors[name], 1
        valid = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS and all(type(n) is int for n in shape)
        for length in shape if valid else ():
            items *= length
        stored = 1
        for length in info.shape:
            stored *= length
        if not valid or items != stored:
            raise _Damaged(f"{name!r} has {list(info.shape)} and is said to have been {str(shape)[:100]}")
        tensors[name] = replace(info, shape=tuple(shape))
    return tensors
