"""Which weights these are, told in milliseconds: by headers, sizes and samples of the data. Gigabytes are not read.

What was computed with a model, an encoding or half a run, is used again only with the same one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from wan_local.checkpoint import ModelFiles
from wan_local.key_map import Part

_SAMPLES, _SAMPLE_BYTES = 32, 4096  # of each file, spread evenly from its first to its last byte


def part_identity(files: ModelFiles, part: Part) -> str:
    """Return a digest of one part's weights that stays the same when its files are copied or moved.

    Every tensor's name, dtype and shape counts, every file's size, and 32 samples of 4 KiB of each; of the transformer
    also its LoRAs and their strengths.
    """
    state = hashlib.blake2b(digest_size=20)
    tensors = files.tensors[part]
    for name in sorted(tensors):
        info = tensors[name]
        state.update(f"{name} {info.dtype} {info.shape};".encode())
    for file in sorted({info.file for info in tensors.values()}):
        _sample(state, file)
    for lora in files.loras if part == "transformer" else ():
        state.update(f"lora {lora.strength!r};".encode())
        _sample(state, lora.file)
    return state.hexdigest()


def part_times(files: ModelFiles, part: Part) -> str:
    """Return when the part's files were last written: a change inside one that no sample saw shows here."""
    written = sorted({info.file for info in files.tensors[part].values()})
    return " ".join(f"{file.name}:{file.stat().st_mtime_ns}" for file in written)


def folder_identity(folder: Path) -> str:
    """Return a digest of a folder of small files, such as a tokenizer's: all of every file."""
    state = hashlib.blake2b(digest_size=20)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        state.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            state.update(hashlib.file_digest(stream, "blake2b").digest())
    return state.hexdigest()


def _sample(state: hashlib.blake2b, file: Path) -> None:
    size = file.stat().st_size
    state.update(f"{size};".encode())
    with file.open("rb") as stream:
        for index in range(_SAMPLES):
            stream.seek(max(size - _SAMPLE_BYTES, 0) * index // (_SAMPLES - 1))
            state.update(stream.read(_SAMPLE_BYTES))
