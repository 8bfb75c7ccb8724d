"""A few tensors and what is known of them in one checked file: whole and as they were written, or not there.

The file is safetensors with a JSON header of ours and a digest over header and tensors among its metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

from wan_local import durable

_HEADER, _DIGEST = "wan_local", "blake2b"
_LENGTH_BYTES = 8  # of a safetensors header's length


@dataclass(frozen=True, slots=True)
class Record:
    """Tensors on the CPU, by name, and the header they were written with."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]


def write_record(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """Write a record in one piece and return its bytes. Raises OSError."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    content = serialize(plain, metadata={_HEADER: text, _DIGEST: _digest(text, plain)})
    durable.write(path, [content])
    return len(content)


def read_record(path: Path) -> Record | None:
    """Return a record, or None where there is none or it is not what was written."""
    try:
        content = path.read_bytes()
        metadata = _metadata(content)
        tensors = parse(content)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    text = metadata.get(_HEADER, "")
    if metadata.get(_DIGEST) != _digest(text, tensors):
        return None
    return Record(tensors, json.loads(text))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the tensors' dtypes, shapes and bytes, in their order."""
    state = hashlib.blake2b(digest_size=20)
    for tensor in tensors:
        plain = tensor.detach().to("cpu").contiguous()
        state.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
        state.update(plain.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    of_text = hashlib.blake2b(f"{text}{names}".encode(), digest_size=20).hexdigest()
    return of_text + fingerprint(tensors[name] for name in names)


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata
