"""A model to convert, in whatever files a person has it: every part's tensors under our names, read one at a time.

Takes a folder (diffusers' layout, the official one, or files of any kind side by side) or one file for each part; gives
a `Source` whose parts are complete, of one model, and unread. Only the converter uses it: a run loads what it wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan_local.anatomy import part_shapes
from wan_local.errors import ModelNotFound, NotAvailable, WanLocalError, WrongModel
from wan_local.inspection import WHERE, sets_below
from wan_local.key_map import PARTS, Part
from wan_local.kinds import GET_TRANSFORMER, Kind, identify
from wan_local.settings import ModelConfig
from wan_local.stored_tensor import StoredTensor, misfit, stored_tensors
from wan_local.tensor_reader import given_dtype, read_stored
from wan_local.tokenizer_file import TOKENIZER, check_tokenizer, tokenizer_folder
from wan_local.weight_files import ROTATED_KEY, UNREADABLE, WeightFiles, read_weights


class SourceTensors(Mapping[str, Tensor]):
    """The tensors of one part under our names: in float32, float16 or bfloat16, read and dequantized when asked for.

    What is stored as one of these comes as it is; unscaled 8-bit floats come in bfloat16, which holds them exactly;
    all that is scaled or in blocks comes in float32. `ignored`: names in the files that FLF2V has no use for.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], ignored: Sequence[str]) -> None:
        self._stored = stored
        self.ignored = tuple(ignored)

    def __getitem__(self, name: str) -> Tensor:
        return read_stored(self._stored[name], once=True)

    def stored(self, name: str) -> StoredTensor:
        """Return where a tensor is in its file, and as what."""
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        return self._stored[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor will be given in, from the header."""
        return given_dtype(self._stored[name])

    def nbytes(self, name: str) -> int:
        """Return how many bytes of files a tensor is made of."""
        return self._stored[name].nbytes

    def row_range(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a tensor, and read no others: for tables of gigabytes."""
        return read_stored(self._stored[name], start, stop, once=True)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return some rows of a table without reading the others."""
        return torch.cat([self.row_range(name, index, index + 1) for index in indices])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True, slots=True)
class Source:
    """A complete model to convert.

    `kind`: what its transformer was recognised as; `kinds`: the same for every part. `files`: every file that is read,
    with its size in bytes. `tokenizer_folder`: where UMT5's tokenizer is.
    """

    config: ModelConfig
    kinds: Mapping[Part, Kind]
    weights: Mapping[Part, WeightFiles]
    tensors: Mapping[Part, SourceTensors]
    tokenizer_folder: Path

    @property
    def kind(self) -> Kind:
        return self.kinds["transformer"]

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(self.tensors)

    @property
    def files(self) -> dict[Path, int]:
        found = (file for part in self.parts for file in self.weights[part].files)
        return {file: file.stat().st_size for file in found}

    def part(self, part: Part) -> SourceTensors:
        """Return the tensors of one part, under our names."""
        return self.tensors[part]


def open_source(
    path: Path | str,
    *,
    text_encoder: Path | str | None = None,
    image_encoder: Path | str | None = None,
    vae: Path | str | None = None,
    tokenizer: Path | str | None = None,
) -> Source:
    """Find and identify every part of a model below `path`, or where the keywords say; read headers only.

    path: the transformer's file or folder, or a folder that holds all parts.
    Raises ModelNotFound with what is missing and where to get it, WrongModel, CorruptModel, NotAvailable.
    """
    path = Path(path).expanduser()
    named: dict[Part, Path | str | None] = {"text_encoder": text_encoder, "image_encoder": image_encoder, "vae": vae}
    given = {part: Path(place).expanduser() for part, place in named.items() if place is not None}
    weights, kinds, errors = _find_parts(path, given)
    folder = _tokenizer_folder(Path(tokenizer).expanduser() if tokenizer is not None else None, path, given)
    missing: dict[str, str] = {part: WHERE[part] for part in PARTS if part not in weights}
    if missing or folder is None:
        advice = missing if folder else {**missing, "tokenizer": WHERE["tokenizer"]}
        message = f"{str(path)!r} is not all that a model needs: {', '.join(advice)} missing. " + " ".join(
            f"{part}: {where}" for part, where in advice.items()
        )
        if missing and errors:  # one of them may be what is missing
            raise type(errors[0])(" ".join(map(str, (*errors[:3], message)))) from errors[0]
        raise ModelNotFound(message)
    config = kinds["transformer"].config
    assert config is not None, kinds["transformer"]
    tensors = {part: open_part(part, weights[part], kinds[part], config) for part in PARTS}
    check_tokenizer(folder, rows=config.text_encoder.vocab_size)
    return Source(config, kinds, weights, tensors, folder)


def open_part(part: Part, weights: WeightFiles, kind: Kind, config: ModelConfig) -> SourceTensors:
    """Return the tensors of one part after checking that each one is there, in its shape, and nothing else.

    Raises WrongModel that says what is missing, unexpected or of another shape; NotAvailable for a store's weights that
    were turned: they would be read as if they were not.
    """
    if weights.metadata.get(ROTATED_KEY):
        raise NotAvailable(
            f"{str(weights.path)!r} is of a store that was made with --rotate, which is not undone. Convert what it "
            "was made of."
        )
    expected = part_shapes(part, config)
    stored, ignored = stored_tensors(part, weights, kind.dialect, expected)
    problem = misfit(stored, expected)
    if problem:
        raise WrongModel(f"{weights.path.name!r} does not fit the {part} of {config.title}: {problem}")
    return SourceTensors({name: stored[name] for name in expected}, ignored)


def _find_parts(
    path: Path, given: Mapping[Part, Path]
) -> tuple[dict[Part, WeightFiles], dict[Part, Kind], list[WanLocalError]]:
    """Return the weights and the kind of every part that is there, and why other files in a folder could not be read.

    A part that was named must be what it is called.
    """
    weights: dict[Part, WeightFiles] = {}
    kinds: dict[Part, Kind] = {}
    for part, place in given.items():
        weights[part], kinds[part] = _named_part(part, place)
    if not path.exists():
        raise ModelNotFound(f"there is no file or folder {str(path)!r}. {GET_TRANSFORMER}")
    candidates = [path] if path.is_file() else sets_below(path)
    refused: list[str] = []
    errors: list[WanLocalError] = []
    found: dict[Part, list[tuple[WeightFiles, Kind]]] = {part: [] for part in PARTS}
    for candidate in candidates:
        try:
            files = read_weights(candidate)
            kind = identify(files.tensors, f"{candidate.name} {candidate.parent.name}")
        except UNREADABLE as error:
            if path.is_file():
                raise
            errors.append(error)
            continue
        wanted = next((part for part in PARTS if part == kind.part and part not in given), None)
        if kind.usable and wanted is not None:
            found[wanted].append((files, kind))
        elif not kind.usable:
            refused.append(f"{candidate.name!r} is {kind.name}. {kind.advice}")
    for part, several in found.items():
        if len(several) > 1:
            several = _preferred(several)
        if len(several) > 1:
            names = ", ".join(repr(str(files.path)) for files, _ in several)
            raise WrongModel(f"there are {len(several)} candidates for the {part}: {names}. Name the one to use.")
        if several:
            weights[part], kinds[part] = several[0]
    if "transformer" not in weights and refused:
        raise WrongModel(" ".join([*refused, *map(str, errors)][:3]))
    return weights, kinds, errors


def _preferred(several: list[tuple[WeightFiles, Kind]]) -> list[tuple[WeightFiles, Kind]]:
    """Prefer safetensors to a pickle of the same part: the official repositories have both."""
    safe = [entry for entry in several if entry[0].container != "pickle"]
    return safe or several


def _named_part(part: Part, place: Path) -> tuple[WeightFiles, Kind]:
    """Return a part that was given by name: a file, its folder, or a model's folder that has it."""
    if (place / part).is_dir():
        place = place / part
    files = read_weights(place)
    kind = identify(files.tensors, f"{place.name} {place.parent.name}")
    if kind.part != part:
        raise WrongModel(f"{place.name!r} was given as {part} and is {kind.name}. {WHERE[part]}")
    if not kind.usable:
        raise WrongModel(f"{place.name!r} is {kind.name}. {kind.advice}")
    return files, kind


def _tokenizer_folder(given: Path | None, path: Path, parts: Mapping[Part, Path]) -> Path | None:
    """Return the folder with UMT5's tokenizer: the one given, or one beside or below what was given."""
    near = [path, *parts.values()] if given is None else [given]
    for place in near:
        found = tokenizer_folder(place if place.is_dir() else place.parent)
        if found is not None:
            return found
    if given is not None:
        raise ModelNotFound(f"{str(given)!r} holds no {TOKENIZER}. {WHERE['tokenizer']}")
    return None
