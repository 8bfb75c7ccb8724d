"""Writes the model folder in diffusers' layout, fp16, and loads it back."""

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)

from bench.tiny_model import vae as whole
from bench.tiny_model.encoders import Encoders, build_image_processor
from bench.tiny_model.transformer import build_transformer

FLOW_SHIFT = 5.0
PARTS = ("transformer", "vae", "text_encoder", "image_encoder", "tokenizer", "image_processor", "scheduler")


def build_scheduler(shift: float = FLOW_SHIFT) -> UniPCMultistepScheduler:
    """Return the sampler of Wan 2.1."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def export(
    folder: Path, scratch: Path, encoders: Encoders, vae: AutoencoderKLWan, transformer: WanTransformer3DModel
) -> None:
    """Write every part to `scratch`, check that it loads, then move the files into `folder` one rename each."""
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline = WanImageToVideoPipeline(
        tokenizer=encoders.tokenizer,
        text_encoder=encoders.text,
        image_encoder=encoders.image,
        image_processor=build_image_processor(),
        transformer=transformer,
        vae=vae,
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(scratch, safe_serialization=True)
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        _halve(scratch / part)
    _use_public_class_names(scratch)
    check(scratch)
    _move(scratch, folder)


def export_networks(folder: Path, scratch: Path, vae: AutoencoderKLWan, transformer: WanTransformer3DModel) -> None:
    """Put another VAE and another transformer into a finished model folder."""
    shutil.rmtree(scratch, ignore_errors=True)
    for part, network in (("vae", vae), ("transformer", transformer)):
        network.save_pretrained(scratch / part, safe_serialization=True)
        _halve(scratch / part)
    _move(scratch, folder)


def _move(scratch: Path, folder: Path) -> None:
    for source in sorted(path for path in scratch.rglob("*") if path.is_file()):
        target = folder / source.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(target.name + ".part")
        shutil.copyfile(source, staged)
        os.replace(staged, target)


def _halve(part: Path) -> None:
    """Rewrite a part's weights as fp16 and say so in its configuration where transformers keeps it."""
    from safetensors.torch import load_file, save_file

    (weights,) = part.glob("*.safetensors")
    # the 14B folder has this prefix on the vision tower's tensors; transformers 5 writes none, and reads both
    prefix = "vision_model." if part.name == "image_encoder" else ""
    state = {
        prefix + name.removeprefix(prefix): value.half().contiguous() for name, value in load_file(weights).items()
    }
    save_file(state, weights, metadata={"format": "pt"})
    config = json.loads((part / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "float16"
    config.pop("_name_or_path", None)
    (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _use_public_class_names(folder: Path) -> None:
    """Name tokenizer and image processor by classes that every supported transformers has."""
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    index.pop("_name_or_path", None)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("is_local", "local_files_only", "backend"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check(folder: Path) -> WanImageToVideoPipeline:
    """Load the folder with diffusers' own pipeline in fp32 and make sure that no part came back empty."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    table = pipeline.text_encoder.get_input_embeddings().weight
    if not table.abs().sum() > 0:
        raise RuntimeError("the text encoder's embedding table came back as zeros")
    return pipeline


def build_vae_with_statistics(mean: list[float], std: list[float]) -> AutoencoderKLWan:
    """Return a VAE whose configuration carries measured latent statistics."""
    config = dict(whole.CONFIG, latents_mean=mean, latents_std=std, scale_factor_spatial=8, scale_factor_temporal=4)
    return AutoencoderKLWan(**config)


def export_untrained(folder: Path, scratch: Path, encoders: Encoders, vae_state: dict[str, torch.Tensor]) -> None:
    """Write a complete folder with a random transformer, for integration while training runs."""
    vae = build_vae_with_statistics([0.0] * whole.Z_DIM, [1.0] * whole.Z_DIM)
    vae.load_state_dict(vae_state)
    torch.manual_seed(0)
    export(folder, scratch, encoders, vae, build_transformer())
