"""Names of the same tensor in different checkpoints: official Wan, diffusers, transformers, ggml. Both ways.

Comfy files have the official names of transformer and VAE and transformers' names of the encoders; GGUF files have the
official names of the transformer and llama.cpp's of the text encoder. What a file wraps around all names is a prefix.

A table is a list of (official, ours) patterns in which `{}` stands for a block number (any run of digits) and the
pattern matches the whole name. A name that no row matches is an error: nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from wan_local.errors import WrongModel

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["transformer", "vae", "text_encoder", "image_encoder"]
PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "image_encoder")
Rows = Sequence[tuple[str, str]]
Info = TypeVar("Info")

_WB = ("weight", "bias")


def _leaves(rows: Rows, leaves: Iterable[str] = _WB) -> list[tuple[str, str]]:
    """Give each row the leaf names of a linear, a convolution or a norm."""
    return [(f"{official}.{leaf}", f"{ours}.{leaf}") for official, ours in rows for leaf in leaves]


def _attention(official: str, ours: str) -> list[tuple[str, str]]:
    linears = [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")]
    return _leaves([(f"{official}.{a}", f"{ours}.{b}") for a, b in linears]) + _leaves(
        [(f"{official}.norm_q", f"{ours}.norm_q"), (f"{official}.norm_k", f"{ours}.norm_k")], ["weight"]
    )


TRANSFORMER: Rows = [
    *_leaves(
        [
            ("patch_embedding", "patch_embedding"),
            ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
            ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
            ("time_projection.1", "condition_embedder.time_proj"),
            ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
            ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
            ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
            ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
            ("head.head", "proj_out"),
            ("blocks.{}.norm3", "blocks.{}.norm2"),
            ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
            ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
            ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
            ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
        ]
    ),
    *_attention("blocks.{}.self_attn", "blocks.{}.attn1"),
    *_attention("blocks.{}.cross_attn", "blocks.{}.attn2"),
    ("blocks.{}.cross_attn.norm_k_img.weight", "blocks.{}.attn2.norm_added_k.weight"),
    ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    ("head.modulation", "scale_shift_table"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
]


def _vae_residual(official: str, ours: str) -> list[tuple[str, str]]:
    return [
        (f"{official}.residual.0.gamma", f"{ours}.norm1.gamma"),
        (f"{official}.residual.3.gamma", f"{ours}.norm2.gamma"),
        *_leaves(
            [
                (f"{official}.residual.2", f"{ours}.conv1"),
                (f"{official}.residual.6", f"{ours}.conv2"),
                (f"{official}.shortcut", f"{ours}.conv_shortcut"),
            ]
        ),
    ]


def _vae_half(name: str) -> list[tuple[str, str]]:
    return [
        *_leaves([(f"{name}.conv1", f"{name}.conv_in"), (f"{name}.head.2", f"{name}.conv_out")]),
        (f"{name}.head.0.gamma", f"{name}.norm_out.gamma"),
        *_vae_residual(f"{name}.middle.0", f"{name}.mid_block.resnets.0"),
        *_vae_residual(f"{name}.middle.2", f"{name}.mid_block.resnets.1"),
        (f"{name}.middle.1.norm.gamma", f"{name}.mid_block.attentions.0.norm.gamma"),
        *_leaves(
            [
                (f"{name}.middle.1.to_qkv", f"{name}.mid_block.attentions.0.to_qkv"),
                (f"{name}.middle.1.proj", f"{name}.mid_block.attentions.0.proj"),
            ]
        ),
    ]


def _vae_upsamples(levels: int, resnets: int) -> list[tuple[str, str]]:
    """The official decoder counts residual blocks and upsamplers in one flat list, ours by level."""
    rows = []
    for level in range(levels):
        first = level * (resnets + 1)
        for index in range(resnets):
            rows += _vae_residual(f"decoder.upsamples.{first + index}", f"decoder.up_blocks.{level}.resnets.{index}")
        ours = f"decoder.up_blocks.{level}.upsamplers.0"
        flat = f"decoder.upsamples.{first + resnets}"
        rows += _leaves([(f"{flat}.resample.1", f"{ours}.resample.1"), (f"{flat}.time_conv", f"{ours}.time_conv")])
    return rows


def _vae(resnets: int) -> Rows:
    """Return the table of a VAE whose decoder has `resnets` residual blocks a level: Wan2.1's has 3."""
    return [
        *_leaves([("conv1", "quant_conv"), ("conv2", "post_quant_conv")]),
        *_vae_half("encoder"),
        *_vae_half("decoder"),
        *_vae_residual("encoder.downsamples.{}", "encoder.down_blocks.{}"),
        *_leaves(
            [
                ("encoder.downsamples.{}.resample.1", "encoder.down_blocks.{}.resample.1"),
                ("encoder.downsamples.{}.time_conv", "encoder.down_blocks.{}.time_conv"),
            ]
        ),
        *_vae_upsamples(levels=4, resnets=resnets),
    ]


VAE: Rows = _vae(resnets=3)

_UMT5_ATTENTION = "encoder.block.{}.layer.0.SelfAttention"
TEXT_ENCODER: Rows = [
    ("token_embedding.weight", "shared.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
    ("blocks.{}.norm1.weight", "encoder.block.{}.layer.0.layer_norm.weight"),
    ("blocks.{}.norm2.weight", "encoder.block.{}.layer.1.layer_norm.weight"),
    *[(f"blocks.{{}}.attn.{x}.weight", f"{_UMT5_ATTENTION}.{x}.weight") for x in "qkvo"],
    ("blocks.{}.pos_embedding.embedding.weight", f"{_UMT5_ATTENTION}.relative_attention_bias.weight"),
    ("blocks.{}.ffn.gate.0.weight", "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.{}.ffn.fc1.weight", "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight"),
    ("blocks.{}.ffn.fc2.weight", "encoder.block.{}.layer.1.DenseReluDense.wo.weight"),
]

TEXT_ENCODER_LLAMA: Rows = [
    ("token_embd.weight", "shared.weight"),
    ("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
    ("enc.blk.{}.attn_norm.weight", "encoder.block.{}.layer.0.layer_norm.weight"),
    ("enc.blk.{}.ffn_norm.weight", "encoder.block.{}.layer.1.layer_norm.weight"),
    *[(f"enc.blk.{{}}.attn_{x}.weight", f"{_UMT5_ATTENTION}.{x}.weight") for x in "qkvo"],
    ("enc.blk.{}.attn_rel_b.weight", f"{_UMT5_ATTENTION}.relative_attention_bias.weight"),
    ("enc.blk.{}.ffn_gate.weight", "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight"),
    ("enc.blk.{}.ffn_up.weight", "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight"),
    ("enc.blk.{}.ffn_down.weight", "encoder.block.{}.layer.1.DenseReluDense.wo.weight"),
]

IMAGE_ENCODER: Rows = [
    ("visual.cls_embedding", "embeddings.class_embedding"),
    ("visual.pos_embedding", "embeddings.position_embedding.weight"),
    ("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"),
    *_leaves(
        [
            ("visual.pre_norm", "pre_layrnorm"),
            ("visual.post_norm", "post_layernorm"),
            ("visual.transformer.{}.norm1", "encoder.layers.{}.layer_norm1"),
            ("visual.transformer.{}.norm2", "encoder.layers.{}.layer_norm2"),
            ("visual.transformer.{}.attn.to_qkv", "encoder.layers.{}.self_attn.qkv_proj"),
            ("visual.transformer.{}.attn.proj", "encoder.layers.{}.self_attn.out_proj"),
            ("visual.transformer.{}.mlp.0", "encoder.layers.{}.mlp.fc1"),
            ("visual.transformer.{}.mlp.2", "encoder.layers.{}.mlp.fc2"),
        ]
    ),
]

TABLES: dict[Part, Rows] = {
    "transformer": TRANSFORMER,
    "vae": VAE,
    "text_encoder": TEXT_ENCODER,
    "image_encoder": IMAGE_ENCODER,
}
_DECODER = ("decoder.", "lm_head.", "dec.")
# what such files hold beside the part that FLF2V needs: the text half of CLIP, the decoder of T5, Comfy's tokenizer
IGNORED: dict[Part, Sequence[str]] = {
    "transformer": (),
    "vae": (),
    "text_encoder": (*_DECODER, "spiece_model"),
    "image_encoder": (
        *("textual.", "log_scale", "visual.head"),
        *("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    ),
}
_NO_WEIGHTS = ("embeddings.position_ids",)  # a table of 0, 1, 2, ... that older versions of transformers stored
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "first_stage_model.", "vae.")
_DIALECTS: dict[Part, dict[str, str]] = {
    "transformer": {"blocks.0.self_attn.q.weight": "official", "blocks.0.attn1.to_q.weight": "diffusers"},
    "vae": {"decoder.middle.0.residual.0.gamma": "official", "decoder.mid_block.resnets.0.norm1.gamma": "diffusers"},
    "text_encoder": {
        "blocks.0.attn.q.weight": "official",
        "encoder.block.0.layer.0.SelfAttention.q.weight": "transformers",
        "enc.blk.0.attn_q.weight": "llama.cpp",
    },
    "image_encoder": {
        "visual.transformer.0.attn.to_qkv.weight": "official",
        "transformer.0.attn.to_qkv.weight": "official",
        "encoder.layers.0.self_attn.q_proj.weight": "transformers",
    },
}


def to_ours(part: Part, names: Iterable[str]) -> dict[str, str]:
    """Map official names to ours. Raises WrongModel that lists the names no row knows."""
    wanted = [name for name in names if not name.startswith(tuple(IGNORED[part]))]
    return _translate(part, wanted, _rows(part, wanted, r"decoder\.upsamples\.(\d+)\.resample\.1\.weight", add=0))


def to_official(part: Part, names: Iterable[str]) -> dict[str, str]:
    """Map our names to official ones; the inverse of `to_ours`."""
    wanted = list(names)
    rows = _rows(part, wanted, r"decoder\.up_blocks\.3\.resnets\.(\d+)\.conv1\.weight", add=1)
    return _translate(part, wanted, [(ours, official) for official, ours in rows])


def _rows(part: Part, names: Iterable[str], last_resnet: str, *, add: int) -> Rows:
    """Return the table of `part`; the VAE's depends on how many residual blocks a level has, which a name tells."""
    if part != "vae":
        return TABLES[part]
    found = [int(match.group(1)) for name in names if (match := re.fullmatch(last_resnet, name))]
    return _vae((max(found) if add else min(found)) + add) if found else VAE


def _translate(part: Part, names: Sequence[str], rows: Rows) -> dict[str, str]:
    exact = {source: target for source, target in rows if "{}" not in source}
    patterns = [(_pattern(source), target) for source, target in rows if "{}" in source]
    found: dict[str, str] = {}
    for name in names:
        if name in exact:
            found[name] = exact[name]
            continue
        for pattern, target in patterns:
            match = pattern.fullmatch(name)
            if match:
                found[name] = target.replace("{}", match.group(1))
                break
    unknown = [name for name in names if name not in found]
    if unknown:
        raise WrongModel(
            f"{len(unknown)} tensors do not belong to the {part} of Wan2.1 FLF2V, among them {', '.join(unknown[:5])}"
        )
    return found


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{\}", r"(\d+)"))


def llama_to_ours(names: Iterable[str]) -> dict[str, str]:
    """Map llama.cpp's names of a T5 encoder to ours. Raises WrongModel that lists the names no row knows."""
    return _translate("text_encoder", [name for name in names if not name.startswith(_DECODER)], TEXT_ENCODER_LLAMA)


def without_prefix(tensors: Mapping[str, Info]) -> dict[str, Info]:
    """Return the tensors without what stands before all names alike, such as Comfy's `model.diffusion_model.`."""
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_prefix({name.removeprefix(prefix): info for name, info in tensors.items()})
    return dict(tensors)


def weight_name(name: str) -> str:
    """Return the name of the weight that a stored tensor is a piece of: its numbers, its scale, or its shift.

    Pieces are called so by Comfy (`scale_weight`, `weight_scale`), quanto (`weight._data`, `weight._scale`) and here.
    """
    return re.sub(r"\.(scale_weight|weight_scale|weight_shift|weight(\._data|\._scale|\._shift)+)$", ".weight", name)


def dialect_of(part: Part, names: Iterable[str]) -> str:
    """Return whose names these are: official, diffusers, transformers or llama.cpp; empty if no one's."""
    known = _DIALECTS[part]
    plain = {name.removeprefix("vision_model.") for name in names}
    return next((dialect for name, dialect in known.items() if name in plain), "")


def canonical_names(part: Part, dialect: str, names: Iterable[str]) -> dict[str, str]:
    """Map the names of one dialect to ours. What no part of FLF2V has a use for is left out, and nothing else.

    A joint q, k, v projection keeps its name (`qkv_proj`): it falls into three later. Raises WrongModel.
    """
    wanted = [name for name in names if not ignorable(part, name)]
    if dialect == "official":
        bare = part == "image_encoder" and not any(name.startswith("visual.") for name in wanted)
        mapped = to_ours(part, [f"visual.{name}" for name in wanted] if bare else wanted)
        return {name.removeprefix("visual."): ours for name, ours in mapped.items()} if bare else mapped
    if dialect == "llama.cpp":
        return llama_to_ours(wanted)
    return {name: canonical(part, name) for name in wanted}


def ignorable(part: Part, name: str) -> bool:
    """Tell whether FLF2V has no use for a tensor that is rightly in such a file."""
    return name.startswith(tuple(IGNORED[part])) or name.endswith(_NO_WEIGHTS)


def convert_official(part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an official checkpoint under our names, and in our shapes.

    The image encoder's joint q, k, v projection falls into three equal parts, and its embeddings lose axes of length 1.
    """
    converted: dict[str, Tensor] = {}
    for official, ours in to_ours(part, tensors).items():
        tensor = tensors[official]
        if ".qkv_proj." in ours:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                converted[ours.replace("qkv_proj", f"{letter}_proj")] = third
        elif ours == "embeddings.class_embedding":
            converted[ours] = tensor.reshape(-1)
        elif ours == "embeddings.position_embedding.weight":
            converted[ours] = tensor.reshape(tensor.shape[-2:])
        else:
            converted[ours] = tensor
    return converted


def canonical(part: Part, name: str) -> str:
    """Return the one name we use for a tensor of the transformers library, whose versions differ in two places."""
    if part == "image_encoder":
        return name.removeprefix("vision_model.")
    if part == "text_encoder" and name == "encoder.embed_tokens.weight":
        return "shared.weight"
    return name
