"""What a set of weights is, told by the names and shapes of its tensors alone. No torch; no tensor is read.

Gives a `Kind`: the model's name, which part of it this is, whether wan_local can use it, and else what to get.
Where two models have the same header, it says so, and lets the file's name decide only how the thing is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from wan_local.errors import CorruptModel, NotAvailable, WrongModel
from wan_local.header import TensorInfo
from wan_local.key_map import dialect_of, weight_name, without_prefix
from wan_local.lora_header import is_lora, lora_dialect, match_header, piece_of, refused_adapter, targets_of, width_of
from wan_local.settings import ModelConfig, TransformerConfig, known_models

PartName = Literal["transformer", "vae", "text_encoder", "image_encoder", "lora", "other"]
Shapes = Mapping[str, tuple[int, ...]]

GET_TRANSFORMER = (
    "Get Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers, or its transformer as a Comfy or GGUF file (wan2.1-flf2v-14B-720P)."
)
GET_VAE = "Get the VAE of Wan2.1 (Wan2.1_VAE.pth, wan_2.1_vae.safetensors, or vae/ of the diffusers repository)."
GET_TEXT = (
    "Get UMT5-XXL (text_encoder/ of the diffusers repository, models_t5_umt5-xxl-enc-bf16.pth, or Comfy's "
    "umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors)."
)
GET_IMAGE = (
    "Get CLIP ViT-H/14 (image_encoder/ of the diffusers repository, "
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, or Comfy's clip_vision_h.safetensors)."
)
_WIDTH_5B = 3072
_SIZES = {1536: "1.3B", 2048: "1.7B", _WIDTH_5B: "5B", 5120: "14B"}
_POSITION_TABLES = ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed")
_TASKS = {"t2v": "text-to-video", "i2v": "image-to-video", "flf2v": "first and last frame to video"}
_TASKS |= {"ti2v": "text or image to video", "vace": "editing and control", "control": "control by a video"}
_TASKS |= {"s2v": "speech to video", "animate": "animation of a character"}
_UMT5_VOCABULARY = 256_384


@dataclass(frozen=True, slots=True)
class Kind:
    """What a set of weights was recognised as.

    `task`: t2v, i2v, flf2v, ...; None for what is no denoiser. `dialect`: whose tensor names these are.
    `config`: the known model that the numbers are those of, for an FLF2V transformer. `advice`: what to get instead.
    """

    part: PartName
    name: str
    usable: bool
    dialect: str = ""
    task: str | None = None
    layers: int | None = None
    advice: str = ""
    notes: tuple[str, ...] = ()
    config: ModelConfig | None = field(default=None, repr=False)

    @property
    def what(self) -> str:
        """What it makes of what, in words."""
        return _TASKS.get(self.task or "", self.task or self.part)


def identify(tensors: Mapping[str, TensorInfo], hint: str = "") -> Kind:
    """Return what the tensors of one file or set are. `hint`: names of file and folder, to tell twins apart."""
    plain = without_prefix(tensors)
    lora = _lora(plain)
    if lora is not None:
        return lora
    shapes = {name: info.shape for name, info in plain.items()}
    shapes |= {weight_name(name): shape for name, shape in shapes.items() if name.endswith("._data")}
    recognisers = (_quantized_by_others, _transformer, _vae, _text_encoder, _image_encoder, _neighbour)
    for recognise in recognisers:
        kind = recognise(shapes, hint.lower())
        if kind is not None:
            return kind
    first = ", ".join(sorted(tensors)[:3])
    return Kind("other", f"an unknown network (its tensors are called {first}, ...)", False, advice=GET_TRANSFORMER)


def numbers_of(config: TransformerConfig) -> dict[str, int]:
    """Return the numbers that tell one FLF2V transformer from another, from its configuration."""
    names = ("num_layers", "dim", "in_channels", "ffn_dim", "image_tokens", "image_dim")
    return {name: getattr(config, name) for name in names}


def _transformer(shapes: Shapes, hint: str) -> Kind | None:
    patch = shapes.get("patch_embedding.weight")
    block = "blocks.0.self_attn.q.weight" in shapes or "blocks.0.attn1.to_q.weight" in shapes
    if patch is None and any(name.startswith("vace_blocks.") for name in shapes):
        return _vace_module(shapes, hint)
    if patch is None or not block or len(patch) != 5:
        return None
    net = _Denoiser.of(shapes, hint)
    dialect = dialect_of("transformer", shapes)
    for recognise in (_with_extra_modules, _flf2v, _with_channels):
        kind = recognise(net)
        if kind is not None:
            return Kind(
                "transformer", kind.name, kind.usable, dialect, kind.task, net.layers,
                kind.advice or ("" if kind.usable else GET_TRANSFORMER), kind.notes, kind.config,
            )  # fmt: skip
    return None


def _vace_module(shapes: Shapes, hint: str) -> Kind:
    query = shapes.get("vace_blocks.0.self_attn.q.weight", (0,))
    name, *twin = _vace_names(query[0], hint)
    notes = ("a module for Comfy: the transformer that it is added to is not in it", *twin)
    layers = _count(shapes, "vace_blocks")
    return Kind(
        "transformer", f"the VACE blocks of {name}", False, task="vace", layers=layers, notes=notes,
        advice=GET_TRANSFORMER,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Denoiser:
    """The numbers of a Wan transformer that tell its kind."""

    shapes: Shapes
    hint: str
    layers: int
    dim: int
    channels: int
    has_image: bool
    position: tuple[int, ...] | None

    @classmethod
    def of(cls, shapes: Shapes, hint: str) -> _Denoiser:
        dim, channels = shapes["patch_embedding.weight"][:2]
        images = ("img_emb.proj.0.weight", "condition_embedder.image_embedder.norm1.weight")
        position = next((shapes[name] for name in _POSITION_TABLES if name in shapes), None)
        has_image = any(name in shapes for name in images)
        return cls(shapes, hint, _depth(shapes), dim, channels, has_image, position)

    @property
    def size(self) -> str:
        return _SIZES.get(self.dim, f"of width {self.dim}")

    def has(self, *beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in self.shapes)


def _wan(name: str, task: str, *notes: str, advice: str = "") -> Kind:
    return Kind("transformer", name, False, task=task, notes=notes, advice=advice)


def _with_extra_modules(net: _Denoiser) -> Kind | None:
    """Recognise the relatives that add modules of their own."""
    if net.has("vace_blocks.", "vace_patch_embedding."):
        name, *twin = _vace_names(net.dim, net.hint)
        return _wan(name, "vace", f"{_count(net.shapes, 'vace_blocks')} VACE blocks", *twin)
    if net.has("face_adapter.", "motion_encoder.", "pose_patch_embedding."):
        return _wan(f"Wan2.2 Animate {net.size}", "animate")
    if net.has("casual_audio_encoder.", "audio_injector."):
        return _wan(f"Wan2.2 S2V {net.size}", "s2v")
    if net.has("audio_proj.", "audio_cond_projs.") or any(".audio_cross_attn." in name for name in net.shapes):
        return _wan(f"a speech-driven relative of Wan2.1 ({net.size})", "s2v")
    if net.has("control_adapter."):
        return _wan(f"Wan Fun-Control-Camera {net.size}", "control")
    if net.has("fps_embedding."):
        return _wan(f"SkyReels-V2 {net.size}", "i2v" if net.has_image else "t2v")
    if net.dim == _WIDTH_5B and net.channels == 100:
        return _wan("Wan2.2 Fun-InP 5B", "i2v")
    if net.has("ref_conv.") or net.channels in ((148,) if net.dim == _WIDTH_5B else (48, 52)):
        newer = net.dim == _WIDTH_5B or (net.dim == 5120 and not net.has_image)
        size = "A14B" if newer and net.dim == 5120 else net.size
        return _wan(f"{'Wan2.2' if newer else 'Wan2.1'} Fun-Control {size}", "control")
    return None


def _vace_names(dim: int, hint: str) -> tuple[str, ...]:
    """Return what a network with VACE blocks is called, and what is to be noted of its twin."""
    if dim != 5120:
        return (f"Wan2.1 VACE {_SIZES.get(dim, f'of width {dim}')}",)
    if _is_2_2(hint):
        return f"Wan2.2 VACE-Fun A14B{_noise(hint)}", "by its name: Wan2.1 VACE 14B has the same header"
    return "Wan2.1 VACE 14B", "Wan2.2 VACE-Fun A14B (high and low noise) has the same header"


def _flf2v(net: _Denoiser) -> Kind | None:
    if net.position is None or net.channels != 36:
        return None
    ffn = next((net.shapes[name][0] for name in _FFN if name in net.shapes), 0)
    numbers = {
        "num_layers": net.layers,
        "dim": net.dim,
        "in_channels": net.channels,
        "ffn_dim": ffn,
        "image_tokens": net.position[-2] if len(net.position) > 1 else 0,
        "image_dim": net.position[-1] if net.position else 0,
    }
    known = known_models()
    for config in known:
        if numbers_of(config.transformer) == numbers:
            return Kind("transformer", config.title, True, task="flf2v", config=config)
    advice = f"Known are {', '.join(config.name for config in known)}. {GET_TRANSFORMER}"
    return Kind("transformer", f"an FLF2V transformer of no known size: {numbers}", False, task="flf2v", advice=advice)


_FFN = ("blocks.0.ffn.0.bias", "blocks.0.ffn.net.0.proj.bias")  # never packed, as weights may be


def _with_channels(net: _Denoiser) -> Kind:
    """Recognise what differs in the number of input channels, and name twins by the file's name."""
    if net.channels == 36 and net.has_image:
        return _image_to_video(net)
    if net.channels == 36 and net.dim == 5120:
        if "inp" in re.split(r"[^a-z0-9]+", net.hint):
            return _wan(f"Wan2.2 Fun-InP A14B{_noise(net.hint)}", "i2v")
        note = "the halves for high and low noise have the same header; so has Wan2.2 Fun-InP A14B"
        return _wan(f"Wan2.2 I2V A14B{_noise(net.hint)}", "i2v", note)
    if net.channels == 48 and net.dim == _WIDTH_5B:
        return _wan("Wan2.2 TI2V 5B", "ti2v")
    if net.channels == 16 and net.dim == 5120:
        if _is_2_2(net.hint):
            return _wan(f"Wan2.2 T2V A14B{_noise(net.hint)}", "t2v", "by its name: Wan2.1 T2V 14B has the same header")
        return _wan("Wan2.1 T2V 14B", "t2v", "Wan2.2 T2V A14B (high and low noise) has the same header")
    if net.channels == 16:
        return _wan(f"Wan2.1 T2V {net.size}", "t2v")
    return _wan(f"a Wan transformer of no known kind ({net.channels} input channels, {net.size})", "unknown")


def _image_to_video(net: _Denoiser) -> Kind:
    if "flf2v" in net.hint:
        return _wan(
            f"Wan2.1 FLF2V {net.size} that has lost its image position table", "flf2v",
            "some converters drop img_emb.emb_pos, among them diffusers' from_single_file",
            advice="Without that table the two images can't be told apart: get another conversion. " + GET_TRANSFORMER,
        )  # fmt: skip
    if net.dim not in _SIZES:
        return _wan(f"an image-to-video relative of Wan2.1 {net.size}", "i2v")
    if net.dim != 5120 or "inp" in re.split(r"[^a-z0-9]+", net.hint):
        return _wan(f"Wan2.1 Fun-InP {net.size}", "i2v", *(["by its name"] if net.dim == 5120 else []))
    for resolution in ("480p", "720p"):
        if resolution in net.hint:
            return _wan(
                f"Wan2.1 I2V 14B {resolution.upper()}", "i2v", "480P or 720P by its name: the headers are equal"
            )
    note = "which of I2V-14B-480P, I2V-14B-720P and Fun-InP-14B can't be told from the header: they are equal"
    return _wan("Wan2.1 I2V 14B (480P or 720P)", "i2v", note)


def _is_2_2(hint: str) -> bool:
    return bool(_noise(hint)) or _version(hint) == "2" or (not _version(hint) and "a14b" in hint)


def _version(hint: str) -> str:
    """Return "1" or "2" for the 2.1 or 2.2 that is named first, the file before its folder; empty if none is."""
    found = re.search(r"(?<![\d.])2[._]([12])(?!\d)|wan[-_ ]?2([12])(?!\d)", hint)
    return (found[1] or found[2]) if found else ""


def _noise(hint: str) -> str:
    """Return which half of a Wan2.2 the name tells of; a bare `high` or `low` counts only beside 2.2 or A14B."""
    if _version(hint) == "1":
        return ""
    bare = _version(hint) == "2" or "a14b" in hint
    noise = r"([^a-z0-9]*noise|(?![a-z0-9]))" if bare else r"[^a-z0-9]*noise"
    found = re.search(rf"(?<![a-z0-9])(high|low){noise}", hint)
    return f" ({found[1]} noise)" if found else ""


def _vae(shapes: Shapes, hint: str) -> Kind | None:
    stem = shapes.get("encoder.conv1.weight") or shapes.get("encoder.conv_in.weight")
    out = shapes.get("conv2.weight") or shapes.get("post_quant_conv.weight")
    if "decoder.1.weight" in shapes and any(name.startswith("encoder.0.") for name in shapes):
        return Kind("vae", "a tiny autoencoder (TAE), for previews", False, advice=GET_VAE)
    if stem is None or not any(name.startswith("decoder.") for name in shapes):
        return None
    if len(stem) != 5:
        return Kind("vae", "a VAE for images (Stable Diffusion, FLUX, ...)", False, advice=GET_VAE)
    latent = out[0] if out else 0
    if latent == 48 and stem[1] == 12:
        return Kind("vae", "Wan2.2 VAE (48 channels, of TI2V 5B)", False, advice=GET_VAE)
    dialect = dialect_of("vae", shapes)
    if latent == 16 and stem[1] == 3 and dialect:
        widths = {config.vae.base_dim: config for config in known_models()}
        if stem[0] in widths:
            twin = "the VAE of Qwen-Image has the same header and other weights: see that this is Wan's"
            if stem[0] == 96:
                return Kind("vae", "Wan2.1 VAE", True, dialect, notes=(twin,))
            return Kind("vae", f"VAE of {_short(widths[stem[0]])}", True, dialect)
        return Kind("vae", f"a VAE like Wan2.1's of width {stem[0]} (96 is needed)", False, dialect, advice=GET_VAE)
    return Kind("vae", f"a video VAE of another model ({latent} latent channels)", False, advice=GET_VAE)


def _text_encoder(shapes: Shapes, hint: str) -> Kind | None:
    tables = ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight", "token_embd.weight")
    table = next((shapes[name] for name in tables if name in shapes), None)
    dialect = dialect_of("text_encoder", shapes)
    if table is None or not dialect or len(table) != 2:
        return None
    count = max(_count(shapes, prefix) for prefix in ("encoder.block", "blocks", "enc.blk"))
    known = {(c.text_encoder.vocab_size, c.text_encoder.d_model, c.text_encoder.num_layers): c for c in known_models()}
    if (*table, count) in known:
        name = "UMT5-XXL" if table == (_UMT5_VOCABULARY, 4096) else f"text encoder of {_short(known[*table, count])}"
        decoder = ("decoder.", "lm_head.", "dec.")
        notes = ("its decoder is not used",) if any(entry.startswith(decoder) for entry in shapes) else ()
        return Kind("text_encoder", name, True, dialect, layers=count, notes=notes)
    if table[0] == 32_128:
        name = "T5 v1.1 XXL, the text encoder of FLUX and SD3" if table[1] == 4096 else "a T5 of another model"
        return Kind("text_encoder", name, False, dialect, layers=count, advice=GET_TEXT)
    if table[0] == _UMT5_VOCABULARY:
        return Kind("text_encoder", f"UMT5 of width {table[1]}, not XXL", False, dialect, layers=count, advice=GET_TEXT)
    return Kind("text_encoder", f"a T5 with {table[0]} tokens", False, dialect, layers=count, advice=GET_TEXT)


def _image_encoder(shapes: Shapes, hint: str) -> Kind | None:
    if "visual.transformer.resblocks.0.attn.in_proj_weight" in shapes:
        return Kind("image_encoder", "a CLIP in open_clip's layout", False, layers=None, advice=GET_IMAGE)
    dialect = dialect_of("image_encoder", shapes)
    names = ("visual.patch_embedding.weight", "embeddings.patch_embedding.weight")
    patch = next((shape for name, shape in shapes.items() if name.removeprefix("vision_model.") in names), None)
    if not dialect or patch is None:
        return None
    count = max(_count({n.removeprefix("vision_model."): s for n, s in shapes.items()}, "encoder.layers"),
                _count(shapes, "visual.transformer"))  # fmt: skip
    for config in known_models():
        image = config.image_encoder
        if (patch, count) == ((image.hidden_size, 3, image.patch_size, image.patch_size), image.num_hidden_layers):
            name = "CLIP ViT-H/14" if image.hidden_size == 1280 else f"image encoder of {_short(config)}"
            return Kind("image_encoder", name, True, dialect, layers=count)
    named = {1024: "CLIP ViT-L", 768: "CLIP ViT-B", 1664: "CLIP ViT-bigG", 1152: "SigLIP"}
    name = named.get(patch[0], "a vision transformer of another model")
    advice = f"Its width is {patch[0]}; 1280 is needed. {GET_IMAGE}"
    return Kind("image_encoder", name, False, dialect, layers=count, advice=advice)


def _lora(tensors: Mapping[str, TensorInfo]) -> Kind | None:
    refused = refused_adapter(tensors)
    if refused is not None:
        return Kind("lora", f"an adapter of the kind {refused[0]}", False, advice="wan_local applies LoRA only.")
    if not is_lora(tensors):
        return None
    models, problems = known_models(), {}
    targets = targets_of(tensors, models[0])
    ours = {name: target for name, target in targets.items() if target is not None}
    width = width_of(tensors, ours)
    for model in models:
        problem = _lora_misfit(tensors, model)
        if not problem:
            return _wan_lora(tensors, ours, width)
        problems[model.transformer.dim] = problem
    if not ours or not (len(ours) == len(targets) or any(target.startswith("blocks.") for target in ours.values())):
        return Kind("lora", "a LoRA for another network", False, advice="Its modules have no names of Wan2.1.")
    advice = f"It does not fit: {problems.get(width, problems[models[0].transformer.dim])}."
    return replace(_wan_lora(tensors, ours, width), usable=False, advice=advice)


def _lora_misfit(tensors: Mapping[str, TensorInfo], model: ModelConfig) -> str:
    """Return why a LoRA can't be applied to a model; empty if it can."""
    file = next(iter(tensors.values())).file.name
    try:
        found = match_header(file, tensors, model)
    except (CorruptModel, NotAvailable, WrongModel) as error:
        return str(error)
    return "" if found.changes else f"nothing in {file!r} changes it"


def _wan_lora(tensors: Mapping[str, TensorInfo], ours: Mapping[str, str], width: int) -> Kind:
    """Describe a LoRA for Wan. `ours`: which tensor of ours each stored name changes."""
    pieces = {name: piece_of(name) for name in ours}
    downs = [name for name, piece in pieces.items() if piece == "down"]
    diffs = [name for name, piece in pieces.items() if piece.startswith("diff")]
    ranks = sorted({tensors[name].shape[0] for name in downs if tensors[name].shape})
    notes = [
        f"{len(downs)} low-rank pairs of rank {', '.join(map(str, ranks[:4]))}" if downs else "full differences only"
    ]
    if diffs:
        notes.append(f"{len(diffs)} full differences (diff, diff_b, diff_m)")
    if downs and not any("ffn" in name for name in downs):
        notes.append("attention only")
    blocks = [int(found[1]) for target in ours.values() if (found := re.match(r"blocks\.(\d+)\.", target))]
    images = any("add_k_proj" in target for target in ours.values())
    task = "ti2v" if width == _WIDTH_5B else "i2v" if images else "t2v"
    size = _SIZES.get(width, f"of width {width}" if width else "")
    name = f"a LoRA for Wan {task.upper()} {size}".strip()
    return Kind(
        "lora", name, True, lora_dialect(ours), task, max(blocks) + 1 if blocks else None, notes=tuple(notes)
    )  # fmt: skip


_QUANTIZERS = {
    "weight.absmax": "bitsandbytes", "weight.quant_state": "bitsandbytes", ".qweight": "GPTQ, AWQ or nunchaku",
    ".wscales": "nunchaku (SVDQuant)", ".weight_packed": "compressed-tensors", ".svd_up": "SDNQ",
}  # fmt: skip


def _quantized_by_others(shapes: Shapes, hint: str) -> Kind | None:
    for ending, name in _QUANTIZERS.items():
        if any(ending in tensor for tensor in shapes):
            advice = f"Get them as bf16, fp8 or GGUF. {GET_TRANSFORMER}"
            return Kind("other", f"weights quantized by {name}, which wan_local does not read", False, advice=advice)
    return None


_NEIGHBOURS = (
    (r"(text_encoders|conditioner|cond_stage_model|first_stage_model)\.", "an all-in-one checkpoint",
     "Give its parts as separate files. " + GET_TRANSFORMER),
    (r"(model\.diffusion_model\.)?double_blocks\.", "FLUX or HunyuanVideo", GET_TRANSFORMER),
    (r"(model\.diffusion_model\.)?(input_blocks|down_blocks)\.", "a Stable Diffusion UNet", GET_TRANSFORMER),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3", GET_TRANSFORMER),
    (r"(model\.)?layers\.0\.self_attn\.q_proj\.", "a language model", GET_TEXT),
    (r"(model\.)?transformer_blocks\.", "another diffusion transformer (LTX, CogVideoX, Qwen-Image, ...)",
     GET_TRANSFORMER),
    (r"text_model\.", "the text half of a CLIP", GET_TEXT),
)  # fmt: skip


def _neighbour(shapes: Shapes, hint: str) -> Kind | None:
    for pattern, name, advice in _NEIGHBOURS:
        if any(re.match(pattern, tensor) for tensor in shapes):
            return Kind("other", name, False, advice=advice)
    return None


def _short(config: ModelConfig) -> str:
    return config.title.split(" (", 1)[0]


def _depth(shapes: Shapes) -> int:
    """Return the number of the last block and one more: a file that lost a block in between is still of its kind."""
    return max(int(match.group(1)) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))) + 1


def _count(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered children `prefix` has."""
    start = f"{prefix}."
    return len({name[len(start) :].split(".", 1)[0] for name in shapes if name.startswith(start)})
