"""Checkpoints that people have, as headers: true names, dtypes and shapes of each kind, and data that is a hole.

The files are sparse: 65 GB of them take a few hundred kilobytes of disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wan_local.anatomy import image_encoder_shapes, text_encoder_shapes, transformer_shapes, vae_shapes
from wan_local.header import ITEM_BYTES
from wan_local.key_map import Part, to_official
from wan_local.settings import known_models

REAL, TINY = known_models()
Shapes = dict[str, tuple[int, ...]]
Header = dict[str, tuple[str, tuple[int, ...]]]
_IMAGE_NAMES = ("image_embedder", "add_k_proj", "add_v_proj", "norm_added_k")


def write(file: Path, header: Header, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file whose data is a hole."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in header.items():
        begin, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(table).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + end)
    return file


def write_shards(folder: Path, stem: str, header: Header, count: int) -> Path:
    names = list(header)
    weight_map = {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        some = names[number::count]
        write(folder / file, {name: header[name] for name in some})
        weight_map |= dict.fromkeys(some, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def of(dtype: str, shapes: Shapes, prefix: str = "") -> Header:
    return {f"{prefix}{name}": (dtype, shape) for name, shape in shapes.items()}


def transformer(
    *, size: str = "14B", channels: int = 36, images: bool = True, table: bool = False, out: int = 16
) -> Shapes:
    """Return a Wan transformer under our names. `table`: with the position table that makes it FLF2V."""
    dim, layers, ffn = {"14B": (5120, 40, 13824), "1.3B": (1536, 30, 8960), "5B": (3072, 30, 14336)}[size]
    config = replace(
        REAL.transformer, num_layers=layers, num_attention_heads=dim // 128, ffn_dim=ffn, in_channels=channels,
        out_channels=out,
    )  # fmt: skip
    shapes = transformer_shapes(config)
    if not images:
        shapes = {name: shape for name, shape in shapes.items() if not any(part in name for part in _IMAGE_NAMES)}
    if not table:
        shapes.pop("condition_embedder.image_embedder.pos_embed", None)
    return shapes


def official(part: Part, shapes: Shapes) -> Shapes:
    """Return shapes under the official names."""
    if part == "image_encoder":
        shapes = {
            n.replace("q_proj", "qkv_proj"): s for n, s in shapes.items() if not (".k_proj." in n or ".v_proj." in n)
        }
        shapes = {n: (3 * s[0], *s[1:]) if ".qkv_proj." in n else s for n, s in shapes.items()}
    return {name: shapes[ours] for ours, name in to_official(part, shapes).items()}


def fp8(shapes: Shapes, *, scaled: bool = False, prefix: str = "") -> Header:
    """Return a Comfy file: block linears in 8 bits, with scales if `scaled`, all else in 16 or 32."""
    header: Header = {f"{prefix}scaled_fp8": ("F8_E4M3", (2,))} if scaled else {}
    for name, shape in shapes.items():
        small = len(shape) == 2 and name.endswith(".weight")
        header[prefix + name] = ("F8_E4M3" if small else "BF16", shape)
        if small and scaled:
            header[f"{prefix}{name.removesuffix('weight')}scale_weight"] = ("F32", ())
    return header


def vace(size: str) -> Shapes:
    shapes = official("transformer", transformer(size=size, channels=16, images=False))
    dim = shapes["patch_embedding.weight"][0]
    for index in range(8 if size == "14B" else 15):
        block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
        shapes |= {name.replace("blocks.0.", f"vace_blocks.{index}."): shape for name, shape in block.items()}
        shapes[f"vace_blocks.{index}.after_proj.weight"] = (dim, dim)
    return shapes | {"vace_patch_embedding.weight": (dim, 96, 1, 2, 2)}


def vae_2_2() -> Shapes:
    return {
        "encoder.conv1.weight": (160, 12, 3, 3, 3),
        "encoder.downsamples.0.downsamples.0.residual.0.gamma": (160, 1, 1, 1),
        "decoder.conv1.weight": (1024, 48, 3, 3, 3),
        "decoder.middle.0.residual.0.gamma": (1024, 1, 1, 1),
        "conv1.weight": (96, 96, 1, 1, 1),
        "conv2.weight": (48, 48, 1, 1, 1),
    }


def lora(style: str, *, images: bool = True, attention_only: bool = False, rank: int = 64) -> Header:
    """Return a LoRA for 14B: "original" (with full differences), "diffusers" or "kohya"."""
    shapes = transformer() if style == "diffusers" else official("transformer", transformer())
    header: Header = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or not name.startswith("blocks.") or module == name:
            continue
        if (not images and ("img" in name or "add_" in name)) or (attention_only and "ffn" in name):
            continue
        down, up = (rank, shape[1]), (shape[0], rank)
        if style == "diffusers":
            header |= {
                f"transformer.{module}.lora_A.weight": ("BF16", down),
                f"transformer.{module}.lora_B.weight": ("BF16", up),
            }
        elif style == "kohya":
            flat = f"lora_unet_{module.replace('.', '_')}"
            header |= {
                f"{flat}.lora_down.weight": ("BF16", down),
                f"{flat}.lora_up.weight": ("BF16", up),
                f"{flat}.alpha": ("BF16", ()),
            }
        else:
            full = f"diffusion_model.{module}"
            header |= {
                f"{full}.lora_down.weight": ("BF16", down),
                f"{full}.lora_up.weight": ("BF16", up),
                f"{full}.diff_b": ("BF16", (shape[0],)),
            }
    return header


def pairs(prefix: str, linears: Mapping[str, tuple[int, int]], style: str = "lora_A lora_B") -> Header:
    """Return low-rank pairs for linears of whatever network, by name and shape."""
    down, up = style.split()
    header: Header = {}
    for name, (rows, columns) in linears.items():
        header[f"{prefix}{name}.{down}.weight"] = ("BF16", (16, columns))
        header[f"{prefix}{name}.{up}.weight"] = ("BF16", (rows, 16))
    return header


def text_encoder() -> Shapes:
    return text_encoder_shapes(REAL.text_encoder)


def image_encoder() -> Shapes:
    return image_encoder_shapes(REAL.image_encoder)


def vae() -> Shapes:
    return vae_shapes(REAL.vae)
