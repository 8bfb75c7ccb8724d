"""Where a model's weights are, what they are by their headers, and their tensors, read one at a time.

Takes a model's folder in diffusers' layout (`transformer/ vae/ text_encoder/ image_encoder/ tokenizer/`); gives
`ModelFiles`, and for each part a mapping of tensor names to lazily read tensors. Nothing here reads data to identify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch

from wan_local import kinds
from wan_local.errors import CorruptModel, ModelNotFound, WrongModel
from wan_local.extent import DTYPES, read_rows, read_tensor
from wan_local.header import TensorInfo
from wan_local.key_map import PARTS, Part, canonical, ignorable
from wan_local.lora import Lora, open_loras
from wan_local.manifest import MANIFEST, Manifest, check_sizes, read_manifest
from wan_local.settings import TINY, ModelConfig, Settings, known_models, snapshot_hint, usual_places
from wan_local.tokenizer_file import check_tokenizer
from wan_local.weight_files import ROTATED_KEY, UNREADABLE, read_part, read_weights, weight_sets


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model found on disk: its folder, the configuration it answers to, and every part's tensors by header."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[Part, Mapping[str, TensorInfo]]
    manifest: Manifest | None = None  # of a store
    loras: tuple[Lora, ...] = ()  # that are added to the transformer as it is loaded

    @property
    def rotated(self) -> tuple[str, ...]:
        """Return how the names of linears end whose quantized weights are rotated."""
        return () if self.manifest is None else self.manifest.rotated

    @property
    def embedded(self) -> bool:
        return self.config.embedded is not None


class PartTensors(Mapping[str, torch.Tensor]):
    """The tensors of one part whose names satisfy `where`, under our names; each is read when it is asked for."""

    def __init__(self, files: ModelFiles, part: Part, where: Callable[[str], bool] = lambda _: True) -> None:
        stored = ((name, info) for name, info in files.tensors[part].items() if not ignorable(part, name))
        named = ((canonical(part, name), info) for name, info in stored)
        self._infos = {ours: info for ours, info in named if where(ours)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._infos[name])

    def __contains__(self, name: object) -> bool:
        return name in self._infos  # Mapping's own would read the tensor

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of a tensor."""
        return self._infos[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        return DTYPES[self._infos[name].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from its header."""
        return self._infos[name].shape

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Return some rows of a table without reading the others."""
        return read_rows(self._infos[name], indices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def find_model(settings: Settings) -> ModelFiles:
    """Find the model that the settings name, identify it by its headers, and open the LoRAs that go with it.

    Raises ModelNotFound with what to download, how large it is and the command; WrongModel, CorruptModel.
    The embedded model is used only when it is asked for as "tiny".
    """
    files = _find_weights(settings)
    return replace(files, loras=open_loras(settings.loras, files.config))


def _find_weights(settings: Settings) -> ModelFiles:
    real, tiny = known_models()
    if settings.model == TINY:
        assert tiny.embedded is not None
        return open_model(Path(str(resources.files("wan_local"))) / tiny.embedded)
    if settings.model is not None:
        folder = Path(settings.model).expanduser()
        if folder.is_file():
            _refuse_foreign(folder)
        if not folder.is_dir():
            raise ModelNotFound(f"there is no model folder {str(folder)!r}. {_how_to_get(real, settings)}")
        return open_model(folder)
    assert real.repository is not None
    for folder in usual_places(settings, real.repository.split("/")[1], real.repository):
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
    """Read the headers of every part below `folder` and match them with the models that this version knows.

    Of the tokenizer the vocabulary is read: another model's would be taken without an error.
    """
    missing = [part for part in (*PARTS, "tokenizer") if not (folder / part).is_dir()]
    if missing:
        if "transformer" in missing:
            _refuse_foreign(folder)
        raise ModelNotFound(
            f"{str(folder)!r} is not a model folder in diffusers' layout: it has no {', '.join(missing)}. "
            "Give the folder that holds transformer/, vae/, text_encoder/, image_encoder/ and tokenizer/."
            f"{snapshot_hint(folder)}"
        )
    weights, manifest = {part: read_part(folder / part) for part in PARTS}, read_manifest(folder)
    if manifest is not None:
        check_sizes(folder, manifest)
    elif weights["transformer"].metadata.get(ROTATED_KEY):
        raise CorruptModel(
            f"{str(folder)!r} holds rotated weights without {MANIFEST}, which says which they are. Copy that file from "
            "the store that they are from."
        )
    tensors = {part: files.tensors for part, files in weights.items()}
    config = identify(tensors["transformer"], folder)
    check_tokenizer(folder / "tokenizer", rows=config.text_encoder.vocab_size)
    return ModelFiles(folder, config, tensors, manifest)


def identify(transformer: Mapping[str, TensorInfo], folder: Path) -> ModelConfig:
    """Return the configuration that a transformer's header answers to; WrongModel names what it is otherwise."""
    kind = kinds.identify(transformer, folder.name)
    if kind.part != "transformer":
        raise WrongModel(f"{str(folder)!r} holds no Wan transformer: it holds {kind.name}. {kinds.GET_TRANSFORMER}")
    if kind.config is None:
        notes = f" ({'; '.join(kind.notes)})" if kind.notes else ""
        why = "" if kind.task == "flf2v" else " It has no image position embedding, so it is not FLF2V."
        raise WrongModel(
            f"{str(folder)!r} holds {kind.name} ({kind.what}), {kind.layers} blocks{notes}.{why} {kind.advice}"
        )
    return kind.config


def _refuse_foreign(folder: Path) -> None:
    """Raise WrongModel for weights that are sound but in a layout that has to be converted first."""
    candidates = [folder] if folder.is_file() else weight_sets(folder)
    for candidate in candidates:
        try:
            kind = kinds.identify(read_weights(candidate).tensors, candidate.name)
        except UNREADABLE:
            if folder.is_file():
                raise
            continue
        if kind.part == "transformer" and kind.usable:
            raise WrongModel(
                f"{str(folder)!r} holds {kind.name} in a layout that has to be converted once: run `wan-local convert "
                f"{folder} {folder.with_suffix('').name}-store --format int8` and give the folder that it writes."
            )
        if kind.part == "transformer" or folder.is_file():
            advice = kind.advice or (f"Add it to a model: --lora {folder}:1.0." if kind.part == "lora" else "")
            raise WrongModel(f"{str(folder)!r} holds {kind.name}, which is no model that runs here. {advice}")


def _how_to_get(config: ModelConfig, settings: Settings) -> str:
    assert config.repository is not None
    folder = settings.models_dir / config.repository.split("/")[1]
    return (
        f"Run `wan-local download` (it fetches {config.repository}, about {config.download_gigabytes} GB, to {folder}; "
        "`--format` has smaller ones), or give the folder you have weights in as model (or WAN_LOCAL_MODEL). "
        'To try the package without weights, ask for model="tiny" (`--model tiny`).'
    )
