"""A stage owns a network's memory: build it on `meta`, load it strictly, place it, hand it out, free it.

The only room where modules are loaded and freed; freed also after an error, a cancel or a closed generator.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from wan_local.block_reader import BlockReader
from wan_local.checkpoint import ModelFiles, PartTensors
from wan_local.device import trim_ram
from wan_local.errors import CorruptModel, WrongModel
from wan_local.flat_block import FlatBlock
from wan_local.key_map import Part, canonical
from wan_local.lora_branch import AdaptedTensors, adapt
from wan_local.models.image_encoder import build_image_encoder
from wan_local.models.text_encoder import EmbeddingRows, build_text_encoder
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context, stays_float32
from wan_local.models.vae import Vae
from wan_local.offload import CheckedBlocks, Residency, StreamedBlocks, abreast
from wan_local.planner import NetworkSize, StagePlan, spread
from wan_local.quantize import SCALE, SHIFT, STORED_DTYPES, default_arithmetic, stays_as_stored
from wan_local.quantized_layers import hold_in_format, hold_quantized
from wan_local.request import Check, unchecked
from wan_local.scales import check_scales
from wan_local.settings import ModelConfig
from wan_local.weight_format import PLAIN, WeightFormats

Network = Literal[
    "text_encoder", "image_encoder", "vae", "vae_encoder", "vae_decoder", "context_embedder", "transformer"
]
_ENCODING = ("encoder.", "quant_conv.")


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a network is built, and which tensors of which part it takes."""

    build: Callable[[ModelConfig], nn.Module]
    part: Part
    where: Callable[[str], bool] = lambda _: True
    layers: str | None = None  # the path of its list of blocks
    streams: bool = False  # whether these blocks can be streamed
    table: str | None = None  # the embedding table of which a prompt needs a few rows


_RECIPES: Mapping[Network, _Recipe] = {
    "text_encoder": _Recipe(
        lambda config: build_text_encoder(config.text_encoder),
        "text_encoder",
        layers="encoder.block",
        streams=True,
        table="shared.weight",
    ),
    "image_encoder": _Recipe(
        lambda config: build_image_encoder(config.image_encoder), "image_encoder", layers="encoder.layers"
    ),
    "vae": _Recipe(lambda config: Vae(config.vae), "vae"),
    "vae_encoder": _Recipe(
        lambda config: Vae(config.vae, decodes=False), "vae", lambda name: name.startswith(_ENCODING)
    ),
    "vae_decoder": _Recipe(
        lambda config: Vae(config.vae, encodes=False), "vae", lambda name: not name.startswith(_ENCODING)
    ),
    "context_embedder": _Recipe(
        lambda config: ContextEmbedder(config.transformer), "transformer", in_context, layers="blocks", streams=True
    ),
    "transformer": _Recipe(
        lambda config: Transformer(config.transformer),
        "transformer",
        lambda name: not in_context(name),
        layers="blocks",
        streams=True,
    ),
}


@contextmanager
def stage(
    network: Network,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    plan: StagePlan | None = None,
    check: Check = unchecked,
) -> Iterator[Any]:
    """Hand out `network` on `device`, computing in `dtype` (the VAE: float32), and free it at the end.

    plan: which of its blocks stay on the device and where the others wait; all stay unless given.
    check: called before each tensor that is read and before each block that runs.
    """
    trim_ram()  # what the stage before has left: keys and values are a gigabyte in pieces of some megabytes
    module = _on_meta(network, files.config)
    with freed_after(module, device):
        _load(module, network, files, _Place(_RECIPES[network].part, device, dtype, check), plan)
        yield module


@contextmanager
def freed_after(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Free all that `module` holds at the end of the block, also of one that was loaded in part only."""
    try:
        yield
    finally:
        for part in module.modules():
            if isinstance(part, StreamedBlocks):
                part.close()
        module.to("meta")  # frees the weights even where a traceback or a frame still holds the module
        collect(device)


def collect(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device, and what the C library keeps of it to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_ram()


def network_sizes(config: ModelConfig, weights: ModelFiles | WeightFormats = PLAIN) -> dict[str, NetworkSize]:
    """Return how large each network of a model is, with the weights in those files or in those formats.

    Formats need no weights: the architecture tells.
    """
    return {network: _size_of(recipe, config, weights) for network, recipe in _RECIPES.items()}


def _size_of(recipe: _Recipe, config: ModelConfig, weights: ModelFiles | WeightFormats) -> NetworkSize:
    with torch.device("meta"):
        module = recipe.build(config)
    if isinstance(weights, WeightFormats):
        hold_in_format(module, recipe.part, weights)
    else:
        tensors = PartTensors(weights, recipe.part, recipe.where)
        hold_quantized(module, weights, recipe.part, tensors, "weight-only")
        adapt(module, recipe.part, tensors, weights.loras)
    total, packed = _count(module)
    wide = sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if recipe.part == "transformer" and stays_float32(name) and not stays_as_stored(name, parameter.dtype)
    )
    unpacked = max(
        (p.numel() * (1 + (p.dtype == torch.uint8)) for p in module.parameters() if p.dtype in STORED_DTYPES), default=0
    )
    stored = {parameter.dtype for parameter in module.parameters()} & set(STORED_DTYPES)
    integers = (
        bool(stored) and torch.float8_e4m3fn not in stored and not (isinstance(weights, ModelFiles) and weights.loras)
    )
    size = NetworkSize(
        total, wide=wide, packed=packed, unpacked=unpacked, nibbles=torch.uint8 in stored, integers=integers
    )
    if recipe.layers is None or not recipe.streams:
        return size
    listed = cast(nn.ModuleList, module.get_submodule(recipe.layers))
    blocks = tuple(_count(block) for block in listed)
    table = module.get_parameter(recipe.table).numel() if recipe.table else 0
    return replace(
        size, block=blocks[0][0], num_blocks=len(blocks), table=table, blocks=blocks, largest=_largest(listed)
    )


def _largest(blocks: nn.ModuleList) -> tuple[int, int]:
    """Return the numbers and the packed bytes of the largest tensors in any block."""
    numbers = packed = 0
    for name, parameter in blocks.named_parameters():
        if stays_as_stored(name, parameter.dtype):
            packed = max(packed, parameter.nbytes)
        else:
            numbers = max(numbers, parameter.numel())
    return numbers, packed


def _count(module: nn.Module) -> tuple[int, int]:
    """Return how many numbers take the compute dtype, and how many bytes the quantized ones are."""
    numbers = packed = 0
    for name, parameter in module.named_parameters():
        if stays_as_stored(name, parameter.dtype):
            packed += parameter.nbytes
        else:
            numbers += parameter.numel()
    return numbers, packed


def load_network(
    network: Network,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    plan: StagePlan | None = None,
    check: Check = unchecked,
) -> nn.Module:
    """Build `network` on `meta` and give it its weights, read one tensor at a time straight to where they belong."""
    module = _on_meta(network, files.config)
    _load(module, network, files, _Place(_RECIPES[network].part, device, dtype, check), plan)
    return module


def _on_meta(network: Network, config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return _RECIPES[network].build(config)


def _load(module: nn.Module, network: Network, files: ModelFiles, place: _Place, plan: StagePlan | None) -> None:
    recipe, device = _RECIPES[network], place.device
    tensors = PartTensors(files, recipe.part, recipe.where)
    place = replace(place, stored=tensors)
    check_scales({name: tensors.info(name) for name in tensors})
    hold_quantized(module, files, recipe.part, tensors, (plan and plan.int8_arithmetic) or default_arithmetic(device))
    adapted = adapt(module, recipe.part, tensors, files.loras)
    if plan is None or plan.resident_blocks is None:
        load_strictly(module, recipe.part, adapted, place)
        if recipe.layers is not None:
            blocks = cast(nn.ModuleList, module.get_submodule(recipe.layers))
            module.set_submodule(recipe.layers, CheckedBlocks(blocks, abreast(place.check, device)))
    else:
        _load_streamed(module, recipe, tensors, adapted, place, plan)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, buffer.to(device), persistent=False)
    module.eval().requires_grad_(False)
    if recipe.part == "vae" and device.type == "cpu":
        _channels_last(module)


def _load_streamed(
    module: nn.Module, recipe: _Recipe, tensors: PartTensors, adapted: AdaptedTensors, place: _Place, plan: StagePlan
) -> None:
    """Load what stays on the device; other blocks, and rows of the embedding table, come when they are needed."""
    assert recipe.layers is not None and recipe.streams, recipe
    assert plan.resident_blocks is not None and plan.source is not None, plan
    path, table = recipe.layers, recipe.table
    blocks = list(cast(nn.ModuleList, module.get_submodule(path)))
    resident = spread(len(blocks), plan.resident_blocks)
    absent = tuple(f"{path}.{index}." for index in range(len(blocks)) if index not in resident)
    load_strictly(module, recipe.part, adapted, place, leave=lambda name: name == table or name.startswith(absent))

    for name, value in module.state_dict().items():  # what is left on meta: it is checked now and read later
        source = canonical(recipe.part, name)
        if value.is_meta and adapted.shape(source) != tuple(value.shape):
            raise WrongModel(
                f"{source!r} of the {recipe.part} is {list(adapted.shape(source))}; {list(value.shape)} is needed"
            )

    reader, residency = BlockReader(tensors, path), Residency(resident, plan.source)

    def order(index: int, name: str) -> tuple[str, int]:
        last = chr(0x10FFFF), 0  # branches lie behind what is read from the files in one go
        return last if adapted.is_branch(f"{path}.{index}.{name}") else reader.order(index, name)

    layouts = [FlatBlock(block, place.dtype_of, functools.partial(order, index)) for index, block in enumerate(blocks)]

    def fill(index: int, views: Mapping[str, Tensor]) -> None:
        place.check()
        names = {name: f"{path}.{index}.{name}" for name in views}
        reader.fill(index, {name: view for name, view in views.items() if not adapted.is_branch(names[name])})
        for name, source in names.items():
            if adapted.special(source):
                views[name].copy_(adapted[source])

    module.set_submodule(path, StreamedBlocks(blocks, layouts, fill, residency, place.device, check=place.check))
    if table is not None:
        rows = EmbeddingRows(lambda indices: place(table, tensors.rows(table, indices)))
        cast(Any, module).set_input_embeddings(rows)


@dataclass(frozen=True, slots=True)
class _Place:
    """Brings a tensor of the checkpoint to the device and dtype it is wanted in."""

    part: Part
    device: torch.device
    dtype: torch.dtype
    check: Check
    stored: Container[str] = ()  # the names of the part's tensors

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        self.check()
        scaled = f"{name}_scale" in self.stored  # else 8 bits are a float of its own, which nothing computes with
        if tensor.dtype in (torch.int8, torch.uint8) and not scaled:
            raise CorruptModel(f"{name!r} of the {self.part} is stored as {tensor.dtype} and has no scale")
        as_it_is = scaled or name.endswith((SCALE, SHIFT))
        return tensor.to(self.device, tensor.dtype if as_it_is else self.dtype_of(name))

    def dtype_of(self, name: str) -> torch.dtype:
        if self.part == "vae" or (self.part == "transformer" and stays_float32(name)):
            return torch.float32
        return self.dtype


def load_strictly(
    module: nn.Module,
    part: Part,
    tensors: Mapping[str, Tensor],
    place: Callable[[str, Tensor], Tensor],
    *,
    leave: Callable[[str], bool] = lambda _: False,
) -> None:
    """Assign every tensor to its parameter, but for those that `leave` names: they are only checked to be there.

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
        if leave(source):
            continue
        if source not in loaded:
            loaded[source] = place(source, tensors[source])
        if tuple(loaded[source].shape) != shape:
            raise WrongModel(f"{source!r} of the {part} is {list(loaded[source].shape)}; {list(shape)} is needed")
        state[name] = loaded[source]
    module.load_state_dict(state, strict=False, assign=True)  # strict: the names were compared above


def _channels_last(module: nn.Module) -> None:
    """Lay convolution weights out channels-last: the CPU's convolutions are up to twice as fast so."""
    formats = {5: torch.channels_last_3d, 4: torch.channels_last}
    for parameter in module.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
