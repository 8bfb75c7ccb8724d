"""The weight files at a path, as one set of tensors by header, whatever container they come in. No torch.

A path is a file, one shard of several, or a folder that holds the file or the shards of one part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_local.errors import CorruptModel, ModelNotFound, NotAvailable, WrongModel
from wan_local.gguf_header import MAGIC, read_gguf_header
from wan_local.header import Container, Header, TensorInfo, read_safetensors
from wan_local.manifest import is_store
from wan_local.pickle_header import read_pickle_header

SUFFIXES = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
UNREADABLE = (ModelNotFound, CorruptModel, NotAvailable, WrongModel)
"""What a file may be refused with that just lies in a folder: that is no reason to refuse the folder."""
ROTATED_KEY = "wan_local.rotated"
"""In the metadata of a store's file: how the names of its rotated linears end, with spaces between."""
COMFY_KEY = "_quantization_metadata"
"""In the metadata of Comfy's files: JSON that says how each layer is quantized."""
_SHARD = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_MAX_INDEX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """One network's weights as they lie on disk. `comfy`: what stands under COMFY_KEY, by the file's name."""

    path: Path
    files: tuple[Path, ...]
    container: Container
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]
    comfy: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def read_file_header(file: Path) -> Header:
    """Return a file's header; its first bytes say which container it is, its name is not asked."""
    if not file.is_file():  # a pipe would be waited for without end
        raise ModelNotFound(f"there is no file {str(file)!r}")
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise ModelNotFound(f"{str(file)!r} can't be read: {error.strerror}") from error
    if start == MAGIC:
        return read_gguf_header(file)
    if start == b"PK\x03\x04":
        return read_pickle_header(file)
    if file.suffix.lower() == ".gguf":
        return _no_gguf(file, start)
    return read_safetensors(file)


def _no_gguf(file: Path, start: bytes) -> Header:
    """Say what a file is that is called GGUF and does not begin so; a safetensors file is read all the same."""
    try:
        return read_safetensors(file)
    except CorruptModel as error:
        if "no safetensors file" not in str(error):
            raise
        raise CorruptModel(
            f"{file.name!r} is cut short or damaged: it begins with {start!r} where {MAGIC!r} should stand. "
            "Download it again."
        ) from error


def read_weights(path: Path) -> WeightFiles:
    """Return the weights at `path`: a file, a shard (with its sisters), or a folder of one part.

    Raises ModelNotFound, CorruptModel (damaged, a shard missing, an index that disagrees), NotAvailable.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.is_symlink() and not path.exists():
        raise ModelNotFound(
            f"{str(path)!r} is a link to {str(path.readlink())!r}, which is not there. Download it again."
        )
    if not path.exists():
        raise ModelNotFound(f"there is no file or folder {str(path)!r}")
    return _read_set(path, _sisters(path))


def read_part(folder: Path) -> WeightFiles:
    """Return the safetensors files in `folder`, by header, checked against the index if there is one.

    Raises NotAvailable for files of another kind under that name.
    """
    weights = _read_folder(folder, (".safetensors",))
    if weights.container != "safetensors":
        raise NotAvailable(
            f"{weights.files[0].name!r} in {str(folder)!r} is a {weights.container} file under the name of a "
            "safetensors file. Give it its own name, and run `wan-local convert` on the model."
        )
    return weights


def weight_sets(folder: Path) -> list[Path]:
    """Return one path for each set of weights in `folder` or up to two folders below: a file or a first shard.

    What is in a store below is left out: it was made of weights that are here, or is looked at by its own path.
    """
    found = [file for pattern in ("*", "*/*", "*/*/*") for file in sorted(folder.glob(pattern)) if file.is_file()]
    files = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    places = {place for file in files for place in file.parents if folder in place.parents}
    stores = {place for place in places if is_store(place)}
    firsts = []
    for file in files:
        if not stores.isdisjoint(file.parents):
            continue
        shard = _SHARD.fullmatch(file.name)
        if file.suffix.lower() in SUFFIXES and (shard is None or int(shard["number"]) == 1 or _is_first(file, shard)):
            firsts.append(file)
    return firsts


def _is_first(file: Path, shard: re.Match[str]) -> bool:
    """Tell whether no shard of a lower number is there."""
    numbers = (int(other["number"]) for path in file.parent.iterdir() if (other := _same_set(path, shard)))
    return min(numbers) == int(shard["number"])


def _same_set(path: Path, shard: re.Match[str]) -> re.Match[str] | None:
    other = _SHARD.fullmatch(path.name)
    same = other and (other["stem"], other["count"], other["suffix"]) == (
        shard["stem"],
        shard["count"],
        shard["suffix"],
    )
    return other if same else None


def _sisters(file: Path) -> list[Path]:
    """Return the shards that `file` is one of, in order; the file alone if it is none."""
    shard = _SHARD.fullmatch(file.name)
    if shard is None:
        return [file]
    count = int(shard["count"])
    if not 0 < count <= 1000:
        raise CorruptModel(f"{file.name!r} says that it is one of {count} files")
    names = [f"{shard['stem']}{number:05d}-of-{shard['count']}{shard['suffix']}" for number in range(1, count + 1)]
    return [file.parent / name for name in names]


def _read_folder(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> WeightFiles:
    indices = _visible(folder, "*.safetensors.index.json")
    if indices:
        return _read_set(folder, [folder / name for name in sorted(set(_weight_map(indices[0]).values()))], indices[0])
    files: list[Path] = []
    for suffix in suffixes:  # the safest container first
        files = files or _visible(folder, f"*{suffix}")
    if not files:
        raise ModelNotFound(f"{str(folder)!r} holds no {suffixes[0]} file")
    return _read_set(folder, _sisters(files[0]) if _SHARD.fullmatch(files[0].name) else files)


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files of such a name but for hidden ones: macOS leaves a `._NAME` beside what it copies."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _read_set(path: Path, files: Sequence[Path], index: Path | None = None) -> WeightFiles:
    absent = [file for file in files if not file.exists()]
    if absent:
        names = ", ".join(file.name for file in absent[:5]) + (", ..." if absent[5:] else "")
        link = " (a link to what is not there)" if absent[0].is_symlink() else ""
        raise CorruptModel(
            f"{str(files[0].parent)!r} lacks {names}{link} ({len(absent)} of {len(files)} files of one model). "
            "Download it again."
        )
    if index is None and len(files) > 1:
        beside = [entry for entry in _visible(files[0].parent, "*.index.json") if _names(entry, files)]
        index = beside[0] if beside else None
    tensors: dict[str, TensorInfo] = {}
    headers = [read_file_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        twice = sorted(header.tensors.keys() & tensors.keys())
        if twice:
            raise CorruptModel(f"{twice[0]!r} is in two files: {tensors[twice[0]].file.name!r} and {file.name!r}")
        tensors |= header.tensors
    if index is not None:
        _check_index(index, tensors)
    containers = {header.container for header in headers}
    if len(containers) > 1:
        raise CorruptModel(f"{str(path)!r} is several files of different kinds: {', '.join(sorted(containers))}")
    metadata = {key: value for header in reversed(headers) for key, value in header.metadata.items()}
    comfy = {
        file.name: header.metadata[COMFY_KEY]
        for file, header in zip(files, headers, strict=True)
        if COMFY_KEY in header.metadata
    }
    return WeightFiles(path, tuple(files), headers[0].container, tensors, metadata, comfy)


def _check_index(index: Path, tensors: Mapping[str, TensorInfo]) -> None:
    weight_map = _weight_map(index)
    if set(weight_map) != set(tensors):
        wrong = sorted(set(weight_map) ^ set(tensors))
        raise CorruptModel(
            f"the index in {str(index.parent)!r} and its files differ in {len(wrong)} tensors, e.g. {wrong[0]!r}"
        )
    misplaced = [name for name, file in weight_map.items() if tensors[name].file.name != file]
    if misplaced:
        raise CorruptModel(f"{index.name!r} says that {misplaced[0]!r} is in another file than it is")


def _names(index: Path, files: Sequence[Path]) -> bool:
    return {file.name for file in files} <= set(_weight_map(index).values())


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{index.name!r} has no weight_map: it is no index of weights")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CorruptModel(f"{index.name!r} names {str(file)[:80]!r}, which is no file beside it")
    return weight_map


def read_json(file: Path) -> dict[str, Any]:
    """Return the table in a JSON file of moderate size; CorruptModel for anything else."""
    if file.stat().st_size > _MAX_INDEX_BYTES:
        raise CorruptModel(f"{file.name!r} has {file.stat().st_size} bytes, too many for what it should be")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{file.name!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptModel(f"{file.name!r} is a JSON {type(content).__name__}, not a table")
    return content
