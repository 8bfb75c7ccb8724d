"""Tensors read straight from their place in a file: one sequential read, no mapping whose pages would count as ours.

Takes what a header says of tensors; gives tensors, or fills buffers that the caller owns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wan_local.errors import CorruptModel

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


def read_extent(file: Path, offset: int, into: Tensor) -> None:
    """Fill `into`, contiguous uint8 on the CPU, from `offset` of `file` on. Raises CorruptModel where the file ends."""
    buffer = memoryview(into.numpy())  # type: ignore[arg-type,unused-ignore] # numpy says so from Python 3.12 on
    with file.open("rb", buffering=0) as stream:
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


def read_tensor(file: Path, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the tensor of this dtype and shape that begins at `offset`."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    if tensor.numel():
        read_extent(file, offset, tensor.reshape(-1).view(torch.uint8))
    return tensor
