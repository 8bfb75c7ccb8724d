"""What a store will hold: which files, in each of them which runs of tensors, each in which format and in which place.

Takes a model's configuration, the source's dtypes and the formats; gives `StoreFile`s, complete to the byte before
anything is read. A run is what is read in one go: a block, or what is outside blocks. The transformer is two files, in
the order in which they run: what the denoising loop needs, and what is needed once before it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from wan_local.anatomy import in_context, part_shapes
from wan_local.errors import NotAvailable
from wan_local.extent import DTYPES
from wan_local.key_map import PARTS, Part
from wan_local.models.transformer import stays_float32
from wan_local.quantize import GROUP, STORED_DTYPES, block_number, is_block_linear, stored_shapes
from wan_local.settings import ModelConfig
from wan_local.weight_files import ROTATED_KEY
from wan_local.weight_format import WeightFormat, WeightFormats

ROTATED = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")  # what no norm comes before: there outliers are
_LOOP = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
_CONTEXT = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
_BLOCK = re.compile(r"(blocks|encoder\.block|encoder\.layers)\.(\d+)\.")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DATA_DTYPES = {format_: dtype for dtype, format_ in STORED_DTYPES.items()}
_HEADER_BYTES = 4096  # headers are filled up to a multiple of it, so that data begin where pages of the disk do

Entry = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the source and what becomes of it: plain in `dtype`, or quantized where `format` says so."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: WeightFormat | None = None
    rotated: bool = False

    @property
    def entries(self) -> list[Entry]:
        """Return the stored tensors, in the order in which they lie."""
        if self.format is None:
            return [(self.name, self.dtype, self.shape)]
        stem, few = self.name.removesuffix("weight"), torch.bfloat16 if self.format == "int4" else torch.float32
        return [
            (stem + leaf, self.dtype if leaf == "weight" else few, shape)
            for leaf, shape in stored_shapes(self.format, *self.shape).items()
        ]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.entries)


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors that lie together and are read together."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class StoreFile:
    """One safetensors file of a store."""

    path: str
    part: Part
    runs: tuple[Run, ...]

    @property
    def names(self) -> list[str]:
        return [name for run in self.runs for piece in run.pieces for name, _, _ in piece.entries]

    def header(self) -> bytes:
        """Return the file's first bytes, up to the data. Format: https://github.com/huggingface/safetensors#format"""
        turned = any(piece.rotated for run in self.runs for piece in run.pieces)
        metadata = {"format": "pt", **({ROTATED_KEY: " ".join(ROTATED)} if turned else {})}
        table: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for run in self.runs:
            for piece in run.pieces:
                for name, dtype, shape in piece.entries:
                    begin, end = end, end + math.prod(shape) * dtype.itemsize
                    table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _HEADER_BYTES)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header()) + sum(run.nbytes for run in self.runs)


def store_files(
    config: ModelConfig,
    formats: WeightFormats,
    dtype_of: Callable[[Part, str], torch.dtype],
    *,
    rotate: bool = False,
) -> list[StoreFile]:
    """Return every weight file of a store, in the order in which they are written.

    dtype_of: of a tensor in the source. Raises NotAvailable for weights that do not fall into int4's groups.
    """
    files = []
    for part in PARTS:
        shapes = part_shapes(part, config)
        depth = 1 + max((block_number(name) for name in shapes if is_block_linear(part, name)), default=0)
        format_of = functools.partial(formats.of_block, part, num_blocks=depth)
        pieces = [
            _quantized(part, name, tuple(shapes[name]), format_of, rotate=rotate)
            or _plain(part, name, tuple(shapes[name]), dtype_of(part, name))
            for name in _ordered(shapes)
        ]
        for path, wanted in _files_of(part).items():
            chosen = [piece for piece in pieces if wanted(piece.name)]
            files.append(StoreFile(path, part, _runs(chosen)))
    return files


def index_of(files: Iterable[StoreFile]) -> bytes:
    """Return the index that says which of the transformer's files holds which tensor."""
    parts = [file for file in files if file.part == "transformer"]
    weight_map = {name: file.path.removeprefix("transformer/") for file in parts for name in file.names}
    total = sum(run.nbytes for file in parts for run in file.runs)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def _files_of(part: Part) -> Mapping[str, Callable[[str], bool]]:
    if part == "transformer":
        return {_LOOP: lambda name: not in_context(name), _CONTEXT: in_context}
    name = "diffusion_pytorch_model" if part == "vae" else "model"
    return {f"{part}/{name}.safetensors": lambda _: True}


def _ordered(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what is outside blocks and then block after block."""
    return sorted(shapes, key=lambda name: block_number(name) if _BLOCK.match(name) else -1)


def _runs(pieces: Iterable[Piece]) -> tuple[Run, ...]:
    runs: dict[str, list[Piece]] = {}
    for piece in pieces:
        match = _BLOCK.match(piece.name)
        runs.setdefault(match.group(0).rstrip(".") if match else "outside blocks", []).append(piece)
    return tuple(Run(name, tuple(members)) for name, members in runs.items())


def _quantized(
    part: Part, name: str, shape: tuple[int, ...], format_of: Callable[[int], WeightFormat], *, rotate: bool
) -> Piece | None:
    """Return the piece of a block linear that is quantized; None for all else."""
    format_ = format_of(block_number(name)) if is_block_linear(part, name) else "bf16"
    if format_ == "bf16":
        return None
    turned = rotate and format_ == "int8" and name.removesuffix(".weight").endswith(ROTATED)
    if shape[1] % GROUP and (format_ == "int4" or turned):
        raise NotAvailable(f"{name!r} has {shape[1]} inputs, which do not fall into groups of {GROUP}; use int8")
    return Piece(name, shape, _DATA_DTYPES[format_], format_, turned)


def _plain(part: Part, name: str, shape: tuple[int, ...], stored: torch.dtype) -> Piece:
    """Return the piece of a tensor that stays: bfloat16, or float32 where the networks need it and the source has it.

    In a block float32 whatever the source has, so that the bytes of a block are as the card's are.
    """
    wide = part == "vae" or (part == "transformer" and stays_float32(name))
    if wide and (stored != torch.bfloat16 or (part == "transformer" and _BLOCK.match(name))):
        return Piece(name, shape, torch.float32)
    return Piece(name, shape, torch.bfloat16)
