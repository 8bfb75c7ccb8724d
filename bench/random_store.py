"""A store of the whole model, made of noise in seconds: true names, shapes and formats, numbers that stay finite.

What `wan-local convert --format int8` would write, without a source and without hashes: the manifest says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from bench.random_model import write_tokenizer
from wan_local.key_map import Part
from wan_local.manifest import MANIFEST, Manifest, StoredFile
from wan_local.settings import ModelConfig
from wan_local.store_layout import INDEX, Piece, StoreFile, index_of, store_files
from wan_local.weight_format import WeightFormats

FORMATS = WeightFormats.converted("int8")
_NOISE_BYTES = 2**26 + 4099  # odd: two tensors never begin at the same place
_WEIGHT = 0.5  # times 1 / sqrt(inputs): standard deviation of a weight
_INT8_STD = 73.3
_TABLE_ROWS = 8192  # of the table of token embeddings; the rest is a hole in the file, which reads as zeros
_NO_HASH = "0" * 64


def write_random_store(folder: Path, config: ModelConfig) -> int:
    """Write the store and return its bytes; nothing is synced, so that it is read back from the page cache."""
    files = store_files(config, FORMATS, _dtype)
    numbers = _Numbers()
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(lambda file: _write(folder / file.path, file, numbers), files))
    (folder / INDEX).write_bytes(index_of(files))
    write_tokenizer(folder / "tokenizer", config)
    Manifest(
        model=config.name,
        formats={part: FORMATS.of_block(part, 9, 40) for part in ("transformer", "text_encoder", "image_encoder")},
        keep_edges=FORMATS.keep_edges,
        rotated=(),
        source={"noise": "of no model; the files' hashes were not computed"},
        loras=[],
        block_bytes={file.path: [run.nbytes for run in file.runs] for file in files},
        files={file.path: StoredFile(file.nbytes, _NO_HASH) for file in files},
        creator="bench.random_store",
    ).write(folder / MANIFEST)
    return sum(file.nbytes for file in files)


def _dtype(part: Part, _: str) -> torch.dtype:
    return torch.float32 if part == "vae" else torch.bfloat16


class _Numbers:
    """Noise to cut tensors from."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._int8 = torch.randint(-127, 128, (_NOISE_BYTES,), dtype=torch.int8, generator=generator)
        self._normal = torch.randn(_NOISE_BYTES // 16, generator=generator)

    def of(self, piece: Piece) -> Iterator[tuple[memoryview, int]]:
        """Yield contents and how many bytes of a hole follow them, for each stored tensor of a piece."""
        for name, dtype, shape in piece.entries:
            count = math.prod(shape)
            if name.endswith("weight_scale"):
                scale = _WEIGHT / (_INT8_STD * math.sqrt(piece.shape[1]))
                yield _bytes(torch.full((count,), scale, dtype=dtype)), 0
                continue
            written = count
            if name.endswith(("shared.weight", "embed_tokens.weight")):
                written = min(count, _TABLE_ROWS * shape[1])
            source = self._int8 if dtype == torch.int8 else self._plain(name, shape).to(dtype)
            for piece_of in _going_round(source, written):
                yield _bytes(piece_of), 0
            yield memoryview(b""), (count - written) * dtype.itemsize

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return noise of the size that suits the tensor: around one for what scales, else by its inputs."""
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            return self._normal * 0.05 + 1.0
        inputs = math.prod(shape[1:]) if len(shape) > 1 else 1
        return self._normal * (_WEIGHT / math.sqrt(max(inputs, 1)) if len(shape) > 1 else 0.02)


def _going_round(source: Tensor, count: int) -> Iterator[Tensor]:
    start = count * 7919 % source.numel()
    while count:
        piece = source[start : start + count]
        yield piece
        count, start = count - piece.numel(), 0


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())


def _write(path: Path, file: StoreFile, numbers: _Numbers) -> None:
    with path.open("wb", buffering=0) as stream:
        stream.write(file.header())
        for run in file.runs:
            for piece in run.pieces:
                for content, hole in numbers.of(piece):
                    left = content
                    while left:
                        left = left[stream.write(left) :]
                    if hole:
                        stream.seek(hole, os.SEEK_CUR)
        stream.truncate(file.nbytes)
