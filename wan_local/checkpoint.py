"""Where a model's weights are, what they are by their headers, and their tensors, read one at a time.

Takes a model's folder in diffusers' layout (`transformer/ vae/ text_encoder/ image_encoder/ tokenizer/`); gives
`ModelFiles`, and for each part a mapping of tensor names to lazily read tensors. Nothing here reads data to identify.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from wan_local.errors import CorruptModel, ModelNotFound, WrongModel
from wan_local.key_map import Part, canonical
from wan_local.settings import TINY, ModelConfig, Settings, TransformerConfig, hub_cache_dir, known_models

_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1}
_NO_WEIGHTS = ("embeddings.position_ids",)  # a table of 0, 1, 2, ... that older versions of transformers stored
_PARTS: tuple[Part, ...] = ("transformer", "vae", "text_encoder", "image_encoder")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header of its file tells of it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model found on disk: its folder, the configuration it answers to, and every part's tensors by header."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[Part, Mapping[str, TensorInfo]]

    @property
    def embedded(self) -> bool:
        return self.config.embedded is not None


class PartTensors(Mapping[str, torch.Tensor]):
    """The tensors of one part whose names satisfy `where`, under our names; each is read when it is asked for."""

    def __init__(self, files: ModelFiles, part: Part, where: Callable[[str], bool] = lambda _: True) -> None:
        named = ((canonical(part, name), name, info) for name, info in files.tensors[part].items())
        self._infos = {
            ours: (name, info) for ours, name, info in named if where(ours) and not name.endswith(_NO_WEIGHTS)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        stored_name, info = self._infos[name]
        with safe_open(info.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored_name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from its header."""
        return self._infos[name][1].shape

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a table without reading the others."""
        stored_name, info = self._infos[name]
        with safe_open(info.file, framework="pt") as file:
            table = file.get_slice(stored_name)
            return torch.cat([table[index : index + 1] for index in indices])

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def find_model(settings: Settings) -> ModelFiles:
    """Find the model that the settings name, and identify it by its headers.

    Raises ModelNotFound with what to download, how large it is and the command; WrongModel, CorruptModel.
    The embedded model is used only when it is asked for as "tiny".
    """
    real, tiny = known_models()
    if settings.model == TINY:
        assert tiny.embedded is not None
        return open_model(Path(str(resources.files("wan_local"))) / tiny.embedded)
    if settings.model is not None:
        folder = Path(settings.model).expanduser()
        if not folder.is_dir():
            raise ModelNotFound(f"there is no model folder {str(folder)!r}. {_how_to_get(real, settings)}")
        return open_model(folder)
    for folder in _usual_places(real, settings):
        if (folder / "transformer").is_dir():
            return open_model(folder)
    raise ModelNotFound(f"no weights of {real.title} were found. {_how_to_get(real, settings)}")


def model_config(settings: Settings) -> ModelConfig:
    """Return the configuration of the model that the settings name, which need not be there unless it is a folder."""
    real, tiny = known_models()
    if settings.model is None:
        return real
    return tiny if settings.model == TINY else find_model(settings).config


def open_model(folder: Path) -> ModelFiles:
    """Read the headers of every part below `folder` and match them with the models that this version knows."""
    missing = [part for part in (*_PARTS, "tokenizer") if not (folder / part).is_dir()]
    if missing:
        raise ModelNotFound(
            f"{str(folder)!r} is not a model folder in diffusers' layout: it has no {', '.join(missing)}. "
            "Give the folder that holds transformer/, vae/, text_encoder/, image_encoder/ and tokenizer/."
        )
    tensors = {part: read_part(folder / part) for part in _PARTS}
    return ModelFiles(folder, identify(tensors["transformer"], folder), tensors)


def identify(transformer: Mapping[str, TensorInfo], folder: Path) -> ModelConfig:
    """Return the configuration that a transformer's header answers to; WrongModel names what it is otherwise."""
    numbers = _architecture(transformer, folder)
    for config in known_models():
        if _numbers_of(config.transformer) == numbers:
            return config
    raise WrongModel(
        f"{str(folder)!r} holds an FLF2V transformer of no known size: {numbers}. Known are "
        f"{', '.join(config.name for config in known_models())}."
    )


def _architecture(transformer: Mapping[str, TensorInfo], folder: Path) -> dict[str, int]:
    patch = transformer.get("patch_embedding.weight")
    if patch is None:
        first = ", ".join(sorted(transformer)[:3])
        raise WrongModel(f"{str(folder)!r} holds no Wan transformer: its tensors are called {first}, ...")
    layers = {name.split(".")[1] for name in transformer if name.startswith("blocks.")}
    position = transformer.get("condition_embedder.image_embedder.pos_embed")
    what = f"in {str(folder)!r}: {len(layers)} blocks of width {patch.shape[0]}, {patch.shape[1]} input channels"
    if patch.shape[1] == 16:
        raise WrongModel(f"this is a Wan text-to-video transformer ({what}); FLF2V has 36 input channels")
    if position is None:
        raise WrongModel(f"this is a Wan image-to-video transformer ({what}): it has no image position embedding")
    return {
        "num_layers": len(layers),
        "dim": patch.shape[0],
        "in_channels": patch.shape[1],
        "ffn_dim": transformer["blocks.0.ffn.net.0.proj.weight"].shape[0],
        "image_tokens": position.shape[1],
        "image_dim": position.shape[2],
    }


def _numbers_of(config: TransformerConfig) -> dict[str, int]:
    names = ("num_layers", "dim", "in_channels", "ffn_dim", "image_tokens", "image_dim")
    return {name: getattr(config, name) for name in names}


def read_part(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of the safetensors files in `folder` by header, checked against the index if there is one."""
    files = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        weight_map: dict[str, str] = _read_json(indices[0])["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise CorruptModel(f"{str(folder)!r} lacks {', '.join(absent)}, which its index names. Download it again.")
    if not files:
        raise ModelNotFound(f"{str(folder)!r} holds no .safetensors file")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        header = read_header(file)
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise CorruptModel(f"{twice[0]!r} is in two files: {tensors[twice[0]].file.name!r} and {file.name!r}")
        tensors |= header
    if indices and set(weight_map) != set(tensors):
        wrong = sorted(set(weight_map) ^ set(tensors))
        raise CorruptModel(
            f"the index in {str(folder)!r} and its files differ in {len(wrong)} tensors, e.g. {wrong[0]!r}"
        )
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file from its header alone, every length and offset checked.

    Raises CorruptModel with expected and actual bytes. Format: https://github.com/huggingface/safetensors#format
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        _refuse_impostors(file, start)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CorruptModel(
                f"{file.name!r} is cut short or forged: {size} bytes, header of {length}. Download it again."
            )
        stream.seek(8)
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise CorruptModel(f"the header of {file.name!r} is not JSON: {error}") from error
    header.pop("__metadata__", None)
    return {name: _tensor_info(file, name, entry) for name, entry in _checked(file, header, size - 8 - length)}


def _checked(file: Path, header: dict[str, Any], data_bytes: int) -> list[tuple[str, Any]]:
    """Return the header's entries in file order after checking that they cover the data exactly."""
    if not all(isinstance(entry, dict) and len(entry.get("data_offsets", ())) == 2 for entry in header.values()):
        raise CorruptModel(f"the header of {file.name!r} has an entry without offsets")
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    position = 0
    for name, entry in entries:
        begin, end = entry["data_offsets"]
        if begin != position or end < begin:
            raise CorruptModel(f"{name!r} in {file.name!r} lies at {begin}..{end}, where {position} should begin")
        position = end
    if position != data_bytes:
        raise CorruptModel(
            f"{file.name!r} should hold {position} bytes of tensors and holds {data_bytes}: it is cut short or was "
            "changed. Download it again."
        )
    return entries


def _tensor_info(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    begin, end = entry["data_offsets"]
    expected = _ITEM_BYTES.get(dtype, 0)
    for length in shape:
        expected *= length
    if expected != end - begin:
        raise CorruptModel(f"{name!r} in {file.name!r} is {dtype} {list(shape)} and has {end - begin} bytes")
    return TensorInfo(dtype, shape, file, end - begin)


def _refuse_impostors(file: Path, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise CorruptModel(
            f"{file.name!r} is a git-lfs pointer, not the weights. Run `git lfs pull`, or use `hf download`."
        )
    if start.lstrip()[:1] == b"<":
        raise CorruptModel(
            f"{file.name!r} is an HTML or XML page, not the weights. The download was refused; log in first."
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptModel(f"{file.name!r} is not JSON: {error}") from error
    return content


def _usual_places(config: ModelConfig, settings: Settings) -> Iterator[Path]:
    assert config.repository is not None
    yield settings.models_dir / config.repository.split("/")[1]
    snapshots = hub_cache_dir() / f"models--{config.repository.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir():
        yield from sorted(snapshots.iterdir())


def _how_to_get(config: ModelConfig, settings: Settings) -> str:
    assert config.repository is not None
    folder = settings.models_dir / config.repository.split("/")[1]
    return (
        f"Download {config.repository} (about {config.download_gigabytes} GB) with `hf download {config.repository} "
        f"--local-dir {folder}`, or give the folder you have it in as model (or WAN_LOCAL_MODEL). "
        'To try the package without weights, ask for model="tiny".'
    )
