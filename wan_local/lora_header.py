"""What a LoRA file changes, by its header: which of our tensors each stored name belongs to, and whether it fits there.

Dialects: original (`blocks.0.self_attn.q.lora_down.weight`, with full differences `diff`, `diff_b`, `diff_m`),
diffusers and PEFT (`blocks.0.attn1.to_q.lora_A.weight`, also with an adapter's name), kohya, musubi, VideoX-Fun and
LyCORIS (`lora_unet_blocks_0_self_attn_q.alpha`). No torch; `wan_local.lora` applies the changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wan_local.anatomy import transformer_shapes
from wan_local.errors import CorruptModel, NotAvailable, WrongModel
from wan_local.header import TensorInfo
from wan_local.key_map import to_official
from wan_local.settings import ModelConfig

PEFT = "base_model.model."
_PREFIXES: tuple[str, ...] = (PEFT, "model.diffusion_model.", "diffusion_model.", "pipe.", "dit.")
_PREFIXES += ("model.", "transformer.", "unet.", "lora_unet__", "lora_unet_", "lycoris_")
_TEXT_ENCODER = ("text_encoder.", "text_encoders.", "lora_te", "te1.", "cond_stage_model.")
_ENDINGS = {  # of a stored name: which piece of a change it is
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora_up.weight": "up", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_B.bias": "up_bias", ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m",
}  # fmt: skip
_REFUSED = {".dora_scale": "DoRA", ".lokr_": "LoKr", ".hada_": "LoHa", ".oft_": "OFT", ".lora_magnitude": "DoRA"}
_REFUSED |= {".lora_mid.": "LoRA with a middle matrix"}
_ADAPTER = re.compile(r"(\.lora_[AB])\.([^.]+)(\.weight)")  # PEFT may put the adapter's name into the tensor's
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_INTEGERS = ("I64", "I32", "I16")  # alphas that are ranks

_READS_HIDDEN = re.compile(r"blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|attn2\.to_(q|out\.0)|ffn\.net\.0\.proj)\.weight")
_DIFFUSERS = re.compile(r"(.*\.)?(blocks\.\d+\.(attn[12]|ffn\.net|scale_shift_table)|condition_embedder|proj_out)\.")

Pieces = Mapping[str, tuple[str, TensorInfo]]
"""The pieces of one change, by which they are: stored name and place."""


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """What the header of a LoRA file says. `changes`: of our tensors, each with its pieces.

    `unmatched`: stored names that belong to no tensor of the model. `ignored`: names of text encoder entries.
    """

    changes: tuple[tuple[str, Pieces], ...]
    unmatched: tuple[str, ...]
    ignored: tuple[str, ...]


def refused_adapter(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the kind of adapter that is none of LoRA's, and a name that tells; None where there is no such name."""
    return next(((kind, name) for name in names for mark, kind in _REFUSED.items() if mark in name), None)


def is_lora(names: Iterable[str]) -> bool:
    """Tell whether among these names are halves of low-rank pairs or full differences, of whatever network."""
    return any(piece_of(name) not in ("", "alpha") for name in names)


def piece_of(name: str) -> str:
    """Return which piece of a change a stored name is; empty if none."""
    name = _ADAPTER.sub(r"\1\3", name)
    return next((piece for ending, piece in _ENDINGS.items() if name.endswith(ending)), "")


def targets_of(names: Iterable[str], config: ModelConfig) -> dict[str, str | None]:
    """Return which tensor of ours each stored name changes; None for one of no tensor. Text encoders are left out."""
    shapes = transformer_shapes(config.transformer)
    modules = _aliases(shapes)
    return {name: _target(name, modules, shapes) for name in names if not name.startswith(_TEXT_ENCODER)}


def width_of(tensors: Mapping[str, TensorInfo], targets: Mapping[str, str]) -> int:
    """Return the width of the model that a LoRA is for, from what its linears read; 0 where none tells.

    targets: which tensor of ours each stored name changes.
    """
    for name, target in targets.items():
        shape = tensors[name].shape
        if _READS_HIDDEN.fullmatch(target) and piece_of(name) in ("down", "diff") and len(shape) == 2:
            return shape[1]
    return 0


def lora_dialect(names: Iterable[str]) -> str:
    """Return who writes such names, all of them of tensors of Wan."""
    every = list(names)
    if any(name.startswith(("lora_unet_", "lycoris_")) for name in every):
        return "kohya/musubi"
    return "diffusers/PEFT" if any(_DIFFUSERS.match(name) for name in every) else "original"


def match_header(file: str, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> LoraHeader:
    """Match the tensors of a LoRA file with the transformer of `config`; see `targets_of`.

    Raises CorruptModel (one piece twice, half a pair), WrongModel (a shape that does not fit), NotAvailable (numbers of
    a type that is not read).
    """
    shapes = transformer_shapes(config.transformer)
    targets = targets_of(tensors, config)
    grouped: dict[tuple[str, str], dict[str, tuple[str, TensorInfo]]] = {}
    for name, target in targets.items():
        if target is None:
            continue
        piece = piece_of(name)
        kind = "pair" if piece in ("down", "up", "alpha") else piece
        twin, _ = grouped.setdefault((target, kind), {}).setdefault(piece, (name, tensors[name]))
        if twin != name:
            raise CorruptModel(f"{twin!r} and {name!r} in {file!r} are the same piece of the change of {target!r}")
    changes = tuple((target, pieces) for (target, _), pieces in grouped.items())
    for target, pieces in changes:
        _check_dtypes(file, pieces)
        _check_shapes(file, target, pieces, shapes[target])
    unmatched = tuple(name for name, target in targets.items() if target is None)
    return LoraHeader(changes, unmatched, tuple(name for name in tensors if name not in targets))


def widens(target: str, made: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether a change knows only the first input channels of the patch embedding: the 16 noisy latents of T2V."""
    first = target == "patch_embedding.weight" and len(made) == len(shape) and made[0] == shape[0]
    return first and made[1] < shape[1] and made[2:] == shape[2:]


def _aliases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return our tensor's name for what a dialect calls it: a module (for its weight) or a tensor without a leaf.

    Official and our names, with dots or, as kohya writes them, with underscores.
    """
    aliases = {}
    for ours, theirs in to_official("transformer", shapes).items():
        if ours.endswith(".bias"):
            continue
        for name in (ours, theirs):
            module = name.removesuffix(".weight")
            aliases[module] = aliases[module.replace(".", "_")] = ours
    return aliases


def _target(name: str, modules: Mapping[str, str], shapes: Mapping[str, object]) -> str | None:
    """Return which of our tensors a stored name changes."""
    name = _ADAPTER.sub(r"\1\3", name)
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    if ending is None:
        return None
    module, piece = name.removesuffix(ending), _ENDINGS[ending]
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    if piece == "diff_m":
        module = module.removesuffix(".modulation") + ".modulation"
    target = modules.get(module.removesuffix(".weight"))
    if target is not None and piece in ("diff_b", "up_bias"):
        target = target.removesuffix("weight") + "bias"
    return target if target in shapes else None


def _check_dtypes(file: str, pieces: Pieces) -> None:
    for piece, (name, info) in pieces.items():
        if info.dtype not in (*_FLOATS, *(_INTEGERS if piece == "alpha" else ())):
            raise NotAvailable(
                f"{name!r} in {file!r} is stored as {info.dtype}; LoRAs are read as {', '.join(_FLOATS)}"
            )


def _check_shapes(file: str, target: str, pieces: Pieces, shape: tuple[int, ...]) -> None:
    made, name = _made_shape(file, pieces), next(iter(pieces.values()))[0]
    flat = (shape[0], math.prod(shape[1:]))  # as some tools store a convolution
    if _long(made) not in (_long(shape), _long(flat)) and not widens(target, made, shape):
        turned = sorted(_long(made)) == sorted(_long(shape))
        raise WrongModel(
            f"{name!r} in {file!r} changes a tensor of {list(made)}, and {target!r} is {list(shape)}: "
            + ("its axes are in another order" if turned else "it was made for a model of another size")
        )


def _made_shape(file: str, pieces: Pieces) -> tuple[int, ...]:
    """Return the shape of a change; empty for a pair whose halves do not fit. Raises CorruptModel for half a pair."""
    sizes: dict[str, tuple[int, ...]] = {piece: info.shape for piece, (_, info) in pieces.items()}
    name = next(iter(pieces.values()))[0]
    if "alpha" in sizes and math.prod(sizes["alpha"]) != 1:
        raise CorruptModel(f"the alpha of {name!r} in {file!r} has shape {list(sizes['alpha'])}; it is one number")
    if not sizes.keys() & {"down", "up", "alpha"}:
        (made,) = sizes.values()
        return made
    if "down" not in sizes or "up" not in sizes:
        raise CorruptModel(f"{name!r} in {file!r} is one half of a pair: its other half is missing")
    down, up = sizes["down"], sizes["up"]
    fits = len(down) > 1 and len(up) > 1 and down[0] == math.prod(up[1:]) > 0
    return (up[0], *down[1:]) if fits else ()


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of length 1, which tools add and drop; the order of numbers is the same."""
    return tuple(length for length in shape if length != 1)
