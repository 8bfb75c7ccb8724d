"""The tiny model, written as other people's tools write theirs: official, Comfy (bf16, fp8, scaled fp8), GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.gguf_encoders import encode
from wan_local.key_map import TEXT_ENCODER_LLAMA, Part, canonical, to_official

TINY = Path(str(resources.files("wan_local"))) / "tiny_model"
_FILES: dict[Part, str] = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "image_encoder": "image_encoder/model.safetensors",
}
State = dict[str, Tensor]


def tiny(part: Part) -> State:
    """Return one part of the tiny model under our names."""
    return {canonical(part, name): tensor for name, tensor in load_file(TINY / _FILES[part]).items()}


def official(part: Part) -> State:
    """Return one part of the tiny model under the official names, q, k and v of the image encoder joined."""
    state = tiny(part)
    if part == "image_encoder":
        for name in [name for name in state if ".q_proj." in name]:
            joined = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            state[name.replace("q_proj", "qkv_proj")] = torch.cat(joined)
        state["embeddings.class_embedding"] = state["embeddings.class_embedding"].view(1, 1, -1)
        state["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"].unsqueeze(0)
    return {name: state[ours] for ours, name in to_official(part, state).items()}


def tokenizer(folder: Path) -> Path:
    return Path(shutil.copytree(TINY / "tokenizer", folder))


def write_official(folder: Path) -> Path:
    """Write the layout of Wan-AI/Wan2.1-FLF2V-14B-720P: shards with an index, and three pickles."""
    folder.mkdir(parents=True)
    state = official("transformer")
    names = sorted(state)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name].contiguous() for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "flf2v"}))
    text = {name: tensor.bfloat16() for name, tensor in official("text_encoder").items()}
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    clip = official("image_encoder") | {"log_scale": torch.zeros(()), "visual.head": torch.zeros(64, 8)}
    clip |= {"textual.model.embeddings.word_embeddings.weight": torch.zeros(7, 4)}
    torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    torch.save(official("vae"), folder / "Wan2.1_VAE.pth")
    tokenizer(folder / "google" / "umt5-xxl")
    return folder


def write_comfy(folder: Path, form: str = "bf16") -> Path:
    """Write Comfy's repack into `diffusion_models/ text_encoders/ clip_vision/ vae/`: bf16, fp16, fp8 or fp8_scaled."""
    places = ("diffusion_models", "text_encoders", "clip_vision", "vae")
    for place in places:
        (folder / place).mkdir(parents=True)
    transformer = {f"model.diffusion_model.{name}": tensor for name, tensor in official("transformer").items()}
    _save(
        _comfy(transformer, form, "model.diffusion_model."),
        folder / places[0] / f"wan2.1-flf2v-tiny_{form}.safetensors",
    )
    text = tiny("text_encoder") | {"spiece_model": torch.zeros(100, dtype=torch.uint8)}
    _save(_comfy(text, form, ""), folder / places[1] / f"umt5_{form}.safetensors")
    clip = {f"vision_model.{name}": tensor for name, tensor in tiny("image_encoder").items()}
    _save(clip | {"visual_projection.weight": torch.zeros(8, 64)}, folder / places[2] / "clip_vision_h.safetensors")
    _save(official("vae"), folder / places[3] / "wan_2.1_vae.safetensors")
    tokenizer(folder / "tokenizer")
    return folder


def _comfy(state: State, form: str, prefix: str) -> State:
    plain = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if form in plain:
        return {
            name: tensor if tensor.dtype == torch.uint8 else tensor.to(plain[form]) for name, tensor in state.items()
        }
    out: State = {f"{prefix}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if form == "fp8_scaled" else {}
    for name, tensor in state.items():
        if tensor.dim() != 2 or not name.endswith(".weight") or "shared" in name:
            out[name] = tensor
        elif form == "fp8":
            out[name] = tensor.to(torch.float8_e4m3fn)
        else:
            scale = tensor.float().abs().max() / 448
            out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            if form == "fp8_scaled":
                out[name.removesuffix("weight") + "scale_weight"] = scale
                out[name.removesuffix("weight") + "scale_input"] = torch.ones(())
            else:  # the newer names
                out[name.removesuffix("weight") + "weight_scale"] = scale
                mark = json.dumps({"format": "float8_e4m3fn"}).encode()
                out[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    return out


def _save(state: State, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def write_gguf(
    file: Path, state: Mapping[str, Tensor], block: str, *, where: Callable[[str, Tensor], bool] | None = None
) -> Path:
    """Write tensors as city96 does: block linears as `block`, the rest as F32, five axes folded into two."""
    writer = gguf.GGUFWriter(file, "wan")
    for name, tensor in state.items():
        numbers = tensor.float().numpy()
        if where(name, tensor) if where else (tensor.dim() == 2 and "blocks." in name):
            kind = gguf.GGMLQuantizationType[block]
            writer.add_tensor(name, encode(block, numbers), raw_dtype=kind)
            continue
        if numbers.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(length) for length in numbers.shape])
            numbers = numbers.reshape(numbers.shape[0], -1)
        writer.add_tensor(name, np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama(state: State) -> State:
    """Return a text encoder of ours under llama.cpp's names."""
    names = {}
    for theirs, ours in TEXT_ENCODER_LLAMA:
        for index in range(64):
            if ours.replace("{}", str(index)) in state:
                names[ours.replace("{}", str(index))] = theirs.replace("{}", str(index))
    assert set(names) == set(state)
    return {names[name]: tensor for name, tensor in state.items()}
