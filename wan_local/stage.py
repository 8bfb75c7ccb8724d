"""A stage owns a network's memory: build it on `meta`, load it strictly, place it, hand it out, free it.

The only room where modules are loaded and freed; freed also after an error, a cancel or a closed generator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wan_local.checkpoint import ModelFiles, PartTensors
from wan_local.errors import WrongModel
from wan_local.key_map import Part, canonical
from wan_local.models.image_encoder import build_image_encoder
from wan_local.models.text_encoder import build_text_encoder
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context, stays_float32
from wan_local.models.vae import Vae
from wan_local.settings import ModelConfig

Network = Literal["text_encoder", "image_encoder", "vae", "context_embedder", "transformer"]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a network is built, and which tensors of which part it takes."""

    build: Callable[[ModelConfig], nn.Module]
    part: Part
    where: Callable[[str], bool] = lambda _: True


_RECIPES: Mapping[Network, _Recipe] = {
    "text_encoder": _Recipe(lambda config: build_text_encoder(config.text_encoder), "text_encoder"),
    "image_encoder": _Recipe(lambda config: build_image_encoder(config.image_encoder), "image_encoder"),
    "vae": _Recipe(lambda config: Vae(config.vae), "vae"),
    "context_embedder": _Recipe(lambda config: ContextEmbedder(config.transformer), "transformer", in_context),
    "transformer": _Recipe(
        lambda config: Transformer(config.transformer), "transformer", lambda name: not in_context(name)
    ),
}


@contextmanager
def stage(network: Network, files: ModelFiles, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    """Hand out `network` on `device`, computing in `dtype` (the VAE: float32), and free it at the end."""
    module = load_network(network, files, device, dtype)
    try:
        yield module
    finally:
        module.to("meta")  # frees the weights even where a traceback or a frame still holds the module
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def count_parameters(files: ModelFiles) -> dict[str, int]:
    """Return how many numbers each network holds, from the headers."""
    return {network: files.parameters(recipe.part, recipe.where) for network, recipe in _RECIPES.items()}


def load_network(network: Network, files: ModelFiles, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build `network` on `meta` and give it its weights, read one tensor at a time straight to `device`."""
    recipe = _RECIPES[network]
    with torch.device("meta"):
        module = recipe.build(files.config)

    def place(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(device, _dtype_of(recipe.part, name, dtype))

    load_strictly(module, recipe.part, PartTensors(files, recipe.part, recipe.where), place)
    module.to(device).eval().requires_grad_(False)
    if network == "vae" and device.type == "cpu":
        _channels_last(module)
    return module


def load_strictly(
    module: nn.Module, part: Part, tensors: Mapping[str, Tensor], place: Callable[[str, Tensor], Tensor]
) -> None:
    """Assign every tensor to its parameter.

    Raises WrongModel that lists what is missing, unexpected or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    wanted = {canonical(part, name) for name in expected}
    missing, unexpected = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or unexpected:
        raise WrongModel(
            f"the {part} does not fit its configuration: {len(missing)} tensors missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]}"
        )
    loaded: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, shape in expected.items():
        source = canonical(part, name)
        if source not in loaded:
            loaded[source] = place(source, tensors[source])
        if tuple(loaded[source].shape) != shape:
            raise WrongModel(f"{source!r} of the {part} is {list(loaded[source].shape)}; {list(shape)} is needed")
        state[name] = loaded[source]
    module.load_state_dict(state, strict=True, assign=True)


def _dtype_of(part: Part, name: str, dtype: torch.dtype) -> torch.dtype:
    if part == "vae" or (part == "transformer" and stays_float32(name)):
        return torch.float32
    return dtype


def _channels_last(module: nn.Module) -> None:
    """Lay convolution weights out channels-last: the CPU's convolutions are up to twice as fast so."""
    formats = {5: torch.channels_last_3d, 4: torch.channels_last}
    for parameter in module.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
