"""What a store says about itself: `manifest.json` beside its parts. No torch.

A store is a model's folder in diffusers' layout, made by `wan-local convert`: its blocks lie in the order in which they
run, its block linears are in one of the formats of `wan_local.quantize`. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from wan_local.errors import CorruptModel, NotAvailable
from wan_local.weight_format import WeightFormat

MANIFEST = "manifest.json"
JOURNAL = "conversion.jsonl"
"""In a store that is being made; see `wan_local.store_journal`."""
KIND = "wan_local store"
FORMAT_VERSION = 1
_MAX_BYTES = 16 * 2**20
_HASHED_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of the store: its bytes and the SHA-256 of all of them, in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A store's own account of itself.

    model: the configuration's name. formats: of each part's block linears; keep_edges: but for the transformer's first
    two and last three blocks. rotated: how the names of rotated linears end. source: what it was made of. loras: file,
    strength and counts of each that was merged. block_bytes: of each run of blocks that is read in one go.
    """

    model: str
    formats: Mapping[str, WeightFormat]
    keep_edges: bool
    rotated: tuple[str, ...]
    source: Mapping[str, Any]
    loras: Sequence[Mapping[str, Any]]
    block_bytes: Mapping[str, Sequence[int]]
    files: Mapping[str, StoredFile]
    creator: str
    kind: str = KIND
    version: int = FORMAT_VERSION

    def write(self, file: Path) -> None:
        """Write it to `file`; the caller makes it durable."""
        file.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_store(folder: Path) -> bool:
    """Tell whether a folder is a store, or one that is being made; it may be damaged."""
    if (folder / JOURNAL).is_file():
        return True
    file = folder / MANIFEST
    return file.is_file() and file.stat().st_size <= _MAX_BYTES and f'"{KIND}"'.encode() in file.read_bytes()


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the store in `folder`; None where the folder is not one.

    Raises CorruptModel for one that is damaged, NotAvailable for one of a version that is not known.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    if file.stat().st_size > _MAX_BYTES:
        raise CorruptModel(f"{MANIFEST} has {file.stat().st_size} bytes; no store's has more than {_MAX_BYTES}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise CorruptModel(f"{str(file)!r} is not JSON: {error}. Convert again, or get it again.") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CorruptModel(f"{str(file)!r} is not the manifest of a wan_local store")
    if content.get("version") != FORMAT_VERSION:
        raise NotAvailable(
            f"the store {str(folder)!r} has format version {content.get('version')}, and this wan_local reads "
            f"{FORMAT_VERSION}. Convert the source again, or use the version that made it ({content.get('creator')})."
        )
    return _checked(file, content)


def _checked(file: Path, content: dict[str, Any]) -> Manifest:
    names = {entry.name for entry in fields(Manifest)}
    if set(content) != names:
        raise CorruptModel(f"{str(file)!r} lacks or has too many entries: {sorted(set(content) ^ names)}")
    formats, files, rotated = content["formats"], content["files"], content["rotated"]
    if not isinstance(formats, dict) or not set(formats.values()) <= set(get_args(WeightFormat)):
        raise CorruptModel(f"{str(file)!r} names formats that do not exist: {formats}")
    if not isinstance(rotated, list) or not all(isinstance(name, str) and name for name in rotated):
        raise CorruptModel(f"{str(file)!r} has a list of rotated linears that is none: {str(rotated)[:80]}")
    try:
        stored = {name: StoredFile(int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptModel(f"{str(file)!r} has a list of files that is damaged: {error!r}") from error
    return Manifest(**{**content, "files": stored, "rotated": tuple(rotated)})


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the size of every file of a store with the manifest, reading none. Raises CorruptModel as `verify`."""
    _refuse(folder, [text for name, stored in manifest.files.items() if (text := _misfit(folder / name, stored))])


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every file of a store and compare it with the manifest. Raises CorruptModel that lists what is wrong."""
    _refuse(folder, [text for name, stored in manifest.files.items() if (text := _difference(folder / name, stored))])


def _refuse(folder: Path, wrong: Sequence[str]) -> None:
    if wrong:
        raise CorruptModel(
            f"the store {str(folder)!r} is damaged: {'; '.join(wrong)}. Delete it and convert its source again."
        )


def _misfit(file: Path, stored: StoredFile) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != stored.bytes:
        return f"{file.name} has {file.stat().st_size} bytes and should have {stored.bytes}"
    return None


def _difference(file: Path, stored: StoredFile) -> str | None:
    if text := _misfit(file, stored):
        return text
    if sha256(file) != stored.sha256:
        return f"{file.name} has other content than was written (SHA-256 differs)"
    return None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(_HASHED_AT_ONCE)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
