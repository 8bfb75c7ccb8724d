"""Random weights under a model's true names and shapes, in the layouts that people download; header-true, any size.

python -m bench.random_model FOLDER --layout diffusers|official|comfy-fp8 [--part transformer]...

Written in one pass from a block of noise, so a model of 33 GB takes as long as its disk does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from wan_local.anatomy import part_shapes
from wan_local.key_map import PARTS, Part, to_official
from wan_local.kinds import Kind
from wan_local.settings import ModelConfig, load_model_config
from wan_local.sources import Source, open_part
from wan_local.weight_files import read_weights

Layout = Literal["diffusers", "official", "comfy-fp8"]
Shape = tuple[int, ...]

TINY = Path(__file__).parents[1] / "wan_local" / "tiny_model"
_NOISE_NUMBERS = 2**24 + 4099  # odd: rows of two tensors never begin at the same place
_SHARD_BYTES = 5 * 10**9
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
_FILES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def write_random_model(
    folder: Path, config: ModelConfig, layout: Layout = "diffusers", parts: Iterable[Part] = PARTS
) -> None:
    """Write parts of a model, with a tokenizer."""
    for part in parts:
        write_random_part(folder, part, config, layout)
    write_tokenizer(folder / "tokenizer", config)


def write_tokenizer(folder: Path, config: ModelConfig) -> Path:
    """Write the tokenizer of the embedded model, and tokens that no text has up to the rows of the table."""
    shutil.copytree(TINY / "tokenizer", folder, dirs_exist_ok=True)
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = table["model"]["vocab"]
    vocabulary |= {f"<none {at}>": at for at in range(len(vocabulary), config.text_encoder.vocab_size)}
    file.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    return folder


def write_random_part(folder: Path, part: Part, config: ModelConfig, layout: Layout) -> None:
    """Write one part: sharded in diffusers' layout, as one file in the two others."""
    shapes = dict(part_shapes(part, config))
    if layout == "diffusers" or part != "transformer":
        target = folder / part
        target.mkdir(parents=True, exist_ok=True)
        _write_shards(
            target, _FILES.get(part, "model"), [(name, shapes[name], torch.bfloat16) for name in sorted(shapes)]
        )
        return
    folder.mkdir(parents=True, exist_ok=True)
    official = to_official(part, shapes)
    rows: list[tuple[str, Shape, torch.dtype]] = []
    for name, shape in shapes.items():
        scaled = layout == "comfy-fp8" and len(shape) == 2 and name.startswith("blocks.")
        rows.append((official[name], shape, torch.float8_e4m3fn if scaled else torch.bfloat16))
        if scaled:
            rows.append((official[name].removesuffix("weight") + "scale_weight", (), torch.float32))
    _write_file(folder / f"{part}-{layout}.safetensors", rows, _noise())


def random_source(folder: Path, config: ModelConfig) -> Source:
    """Open a model in diffusers' layout as a source, whatever its size: `open_source` takes known sizes only."""
    kinds = {part: Kind(part, f"random {part}", usable=True, dialect=_dialect(part), config=config) for part in PARTS}
    weights = {part: read_weights(folder / part) for part in PARTS}
    tensors = {part: open_part(part, weights[part], kinds[part], config) for part in PARTS}
    return Source(config, kinds, weights, tensors, folder / "tokenizer")


def _dialect(part: Part) -> str:
    return "diffusers" if part in ("transformer", "vae") else "transformers"


def _noise() -> Tensor:
    return torch.randn(_NOISE_NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02


def _write_shards(folder: Path, stem: str, rows: list[tuple[str, Shape, torch.dtype]]) -> None:
    shards: list[list[tuple[str, Shape, torch.dtype]]] = [[]]
    filled = 0
    for row in rows:
        nbytes = math.prod(row[1]) * row[2].itemsize
        if filled + nbytes > _SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += nbytes
    noise, weight_map = _noise(), {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        _write_file(folder / name, shard, noise)
        weight_map |= {row[0]: name for row in shard}
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_file(file: Path, rows: Iterable[tuple[str, Shape, torch.dtype]], noise: Tensor) -> None:
    rows, table, end = list(rows), dict[str, object](), 0
    for name, shape, dtype in rows:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        cast = {
            dtype: (noise if dtype == torch.bfloat16 else noise * 100).to(dtype) for dtype in {row[2] for row in rows}
        }
        for name, shape, dtype in rows:
            stream.writelines(_contents(name, math.prod(shape), cast[dtype]))


def _contents(name: str, count: int, noise: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of `count` numbers: ones for scales and the weights of norms, else noise that goes round."""
    if "norm" in name and name.endswith("weight"):
        noise = torch.ones(count, dtype=noise.dtype)
    if name.endswith("scale_weight"):
        noise = torch.full_like(noise[:1], 1e-2)
    start = sum(name.encode()) * 7919 % noise.numel()
    while count:
        piece = noise[start : start + count]
        yield memoryview(piece.view(torch.uint8).numpy())
        count, start = count - piece.numel(), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("diffusers", "official", "comfy-fp8"), default="diffusers")
    parser.add_argument("--part", action="append", choices=PARTS)
    options = parser.parse_args()
    write_random_model(options.folder, load_model_config("flf2v_14b"), options.layout, options.part or PARTS)


if __name__ == "__main__":
    main()
