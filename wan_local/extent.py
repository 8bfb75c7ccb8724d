"""Tensors read straight from their place in a file: one sequential read, no mapping whose pages would count as ours.

Takes what a header says of tensors; gives tensors, or fills buffers that the caller owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from wan_local.errors import CorruptModel
from wan_local.header import FileStamp, TensorInfo
from wan_local.page_cache import BLOCK, aligned_bytes, read_past_cache

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_READ_BYTES = 2**26  # a call: the kernel reads ahead, and an interrupt is not kept waiting
_WORTH_BYTES = 2**18  # past the page cache; several smaller ones come of one reading ahead


def read_extent(file: Path, offset: int, into: Tensor, stamp: FileStamp | None = None) -> None:
    """Fill `into`, contiguous uint8 on the CPU, from `offset` of `file` on.

    stamp: what the file had when `offset` was read in its header. Raises CorruptModel where the file ends, or has
    another one now.
    """
    with _opened(file, stamp) as stream:
        _fill(stream, file, offset, into)


def read_once(info: TensorInfo, offset: int, count: int) -> Tensor:
    """Return `count` bytes from `offset` of a tensor's file on, past the page cache where that is possible.

    For what is read once: whoever reads it again waits for the disk again. Raises CorruptModel as `read_extent` does.
    """
    lead, done = offset % BLOCK, 0
    room = aligned_bytes(lead + count)
    content = room[lead : lead + count]
    with _opened(info.file, info.stamp) as stream:
        if count >= _WORTH_BYTES:
            done = min(count, max(0, read_past_cache(stream.fileno(), offset - lead, room) - lead))
        _fill(stream, info.file, offset + done, content[done:])
    item = DTYPES[info.dtype].itemsize if info.dtype in DTYPES else BLOCK  # a GGUF's blocks hold numbers of any size
    return content if offset % item == 0 else content.clone()  # torch wants numbers at multiples of their size


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a tensor that has a dtype of torch's own. Raises CorruptModel as `read_extent` does."""
    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    if tensor.numel():
        read_extent(info.file, info.offset, _as_bytes(tensor), info.stamp)
    return tensor


def read_rows(info: TensorInfo, indices: Sequence[int]) -> Tensor:
    """Return rows of a table in the order of `indices`, reading no others. Raises CorruptModel as `read_extent` does.

    Not by mapping the file: safetensors maps all of it as memory that could be written, which a limit of memory counts.
    """
    rows = torch.empty((len(indices), *info.shape[1:]), dtype=DTYPES[info.dtype])
    row_bytes = info.nbytes // info.shape[0]
    with _opened(info.file, info.stamp) as stream:
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < info.shape[0]:
                raise CorruptModel(
                    f"row {index} is needed of a table of {info.shape[0]} in {info.file.name!r}: the tokenizer is of "
                    "another model. Get it again."
                )
            _fill(stream, info.file, info.offset + index * row_bytes, _as_bytes(row))
    return rows


@contextmanager
def _opened(file: Path, stamp: FileStamp | None) -> Iterator[FileIO]:
    with file.open("rb", buffering=0) as stream:
        if stamp is not None and FileStamp.of(stream.fileno()) != stamp:
            raise CorruptModel(
                f"{file.name!r} was changed while it was in use: its size or date is another than when its header was "
                "read. Leave weights alone while something reads them, and begin again."
            )
        yield stream


def _fill(stream: FileIO, file: Path, offset: int, into: Tensor) -> None:
    buffer = memoryview(into.numpy())  # type: ignore[arg-type,unused-ignore] # numpy says so from Python 3.12 on
    stream.seek(offset)
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done : done + _READ_BYTES])
        if not count:
            raise CorruptModel(
                f"{file.name!r} ends at {offset + done} bytes, in the middle of a tensor that reaches to "
                f"{offset + len(buffer)}: it was cut short while it was in use"
            )
        done += count


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
