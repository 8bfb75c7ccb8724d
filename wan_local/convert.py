"""Make a store of a model: a stream of tensors from whatever files there are into the layout that runs load from.

Takes an open `Source`, the target folder and formats; gives the store's manifest. What is held in memory is a few
pieces of tensors, however large the model. The store grows in `TARGET.part` and gets its name when it is complete;
whatever ends the process before that, the same call goes on where the last whole block was safe on disk. The source is
only read.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_local import __version__
from wan_local.diffusers_config import config_files
from wan_local.durable import flush_folder, reason
from wan_local.errors import OutputError, WanLocalError
from wan_local.lock import folder_lock_path, holding
from wan_local.manifest import JOURNAL, MANIFEST, Manifest, StoredFile, read_manifest, sha256
from wan_local.sources import Source
from wan_local.store_file import Adapter, Producer, write_file
from wan_local.store_journal import Journal
from wan_local.store_layout import INDEX, ROTATED, StoreFile, index_of, store_files
from wan_local.weight_format import WeightFormats

_HEAD_BYTES = 2**20  # of each source file are hashed: its header, and with it all names, dtypes and places
_TOKENIZER = "tokenizer/"
_SPARE = 1.05  # of the disk: what is asked for beyond the bytes that will be written


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: bytes read and written so far by this call and in all, and its seconds until now."""

    file: str
    done_bytes: int
    total_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.done_bytes / max(self.seconds, 1e-3)

    @property
    def eta_seconds(self) -> float | None:
        """Return the seconds that are left at this pace; None before there is one."""
        return (self.total_bytes - self.done_bytes) / self.bytes_per_second if self.done_bytes else None


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be made of a source: formats, rotation, and the LoRAs that are merged first."""

    source: Source
    formats: WeightFormats
    rotate: bool = False
    loras: Sequence[Adapter] = ()

    def files(self) -> list[StoreFile]:
        """Return the files of the store, to the byte."""
        parts = self.source.tensors
        return store_files(
            self.source.config, self.formats, lambda part, name: parts[part].dtype_of(name), rotate=self.rotate
        )

    def account(self) -> dict[str, Any]:
        """Return what decides the bytes of the store's weights, for its manifest; no path of this machine is in it.

        The tokenizer is not in it: a store's manifest has the hashes of its files.
        """
        return {
            "model": self.source.config.name,
            "formats": {name: getattr(self.formats, name) for name in ("transformer", "text_encoder", "image_encoder")},
            "keep_edges": self.formats.keep_edges,
            "rotated": list(ROTATED) if self.rotate and self.formats.transformer == "int8" else [],
            "source": {
                "kind": self.source.kind.name,
                "files": {name: _identity(file) for file, name in _names(self.source).items()},
            },
            "loras": [{**dataclasses.asdict(lora.report), "sha256": sha256(lora.file)} for lora in self.loras],
        }


def convert(conversion: Conversion, target: Path, show: Callable[[Progress], None] = lambda _: None) -> Manifest:
    """Write the store of `conversion` to `target` and return its manifest; one that is complete is left as it is.

    show: called after each piece. Raises OutputError where `target` is something else, where there is too little disk,
    or where writing fails; Busy where another process is at it; CorruptModel where the source's numbers can't be right.
    """
    target = resolved(target)
    account = conversion.account()
    fingerprint = _digest({**account, "creator": __version__})
    lock, what = folder_lock_path("convert", target), f"the conversion to {str(target)!r}"
    with holding(lock, what=what, way_out="Wait until it has ended."), _explained(target):
        finished = _finished(target, fingerprint, conversion.source)
        if finished is not None:
            return finished
        files = conversion.files()
        return _write(conversion, target, files, {**account, "fingerprint": fingerprint}, show)


def resolved(target: Path) -> Path:
    """Return the folder itself that `target` names: beside a link to it, a store would grow on another disk."""
    return Path(os.path.realpath(target.expanduser()))


def is_complete(target: Path) -> bool:
    """Tell whether a store lies at `target`: its manifest is written last."""
    with _explained(target):
        return read_manifest(target) is not None if target.is_dir() else False


def _finished(target: Path, fingerprint: str, source: Source) -> Manifest | None:
    """Return the manifest of the store that is asked for, if it is there already."""
    if not os.path.lexists(target):
        return None
    if target.is_dir() and not any(target.iterdir()):
        if os.path.ismount(target):
            raise OutputError(
                f"a disk or a container's volume is mounted at {str(target)!r}, and no finished store can replace it. "
                f"Choose a folder within it, such as {str(target / 'store')!r}."
            )
        return None
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None:
        raise OutputError(f"{str(target)!r} is there already and is no store of wan_local. Choose another target.")
    if manifest.source.get("fingerprint") != fingerprint:
        raise OutputError(
            f"{str(target)!r} is a store of {manifest.model} as {dict(manifest.formats)}, made of other files or in "
            "another way. Choose another target, or delete it."
        )
    tokenizer = {name: hashlib.sha256(content).hexdigest() for name, content in _tokenizer(source).items()}
    if {name: file.sha256 for name, file in manifest.files.items() if name.startswith(_TOKENIZER)} != tokenizer:
        raise OutputError(
            f"{str(target)!r} is a store of these weights with another tokenizer than that in "
            f"{str(source.tokenizer_folder)!r}. Choose another target, or delete it."
        )
    (target / JOURNAL).unlink(missing_ok=True)
    return manifest


def _write(
    conversion: Conversion,
    target: Path,
    files: Sequence[StoreFile],
    account: Mapping[str, Any],
    show: Callable[[Progress], None],
) -> Manifest:
    folder = target.with_name(f"{target.name}.part")
    _check_disk(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, account["fingerprint"])
    small = {**config_files(conversion.source.config), INDEX: index_of(files), **_tokenizer(conversion.source)}
    shutil.rmtree(folder / _TOKENIZER, ignore_errors=True)  # of an earlier call, to which another may have been given
    for name, content in small.items():
        _write_small(folder / name, content)
    meter = _Meter(conversion.source, files, show)
    stored = {}
    with Producer(conversion.source.part, conversion.loras) as producer:
        for file in files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            written = write_file(folder, file, journal, producer, meter)
            stored[file.path] = StoredFile(written.end, written.sha256)
    stored |= {name: StoredFile(len(content), hashlib.sha256(content).hexdigest()) for name, content in small.items()}
    manifest = _manifest(account, files, stored)
    manifest.write(folder / MANIFEST)
    _flush_to_disk(folder / MANIFEST)
    for place in {folder, *((folder / name).parent for name in stored)}:
        flush_folder(place)
    if target.is_dir():  # empty: it was looked at before
        target.rmdir()
    folder.rename(target)
    flush_folder(target.parent)
    (target / JOURNAL).unlink()
    return manifest


def _manifest(account: Mapping[str, Any], files: Sequence[StoreFile], stored: Mapping[str, StoredFile]) -> Manifest:
    source = {**account["source"], "fingerprint": account["fingerprint"]}
    return Manifest(
        model=account["model"],
        formats=account["formats"],
        keep_edges=account["keep_edges"],
        rotated=tuple(account["rotated"]),
        source=source,
        loras=account["loras"],
        block_bytes={file.path: [run.nbytes for run in file.runs] for file in files},
        files=stored,
        creator=f"wan_local {__version__}",
    )


class _Meter:
    """Counts bytes read and written, and shows them; what an earlier call did is neither done nor to be done."""

    def __init__(self, source: Source, files: Sequence[StoreFile], show: Callable[[Progress], None]) -> None:
        self._show, self._started, self._done, self._source = show, time.monotonic(), 0, source
        self._total = sum(self._bytes_of(file, len(file.runs)) for file in files)

    def skip(self, file: StoreFile, runs: int) -> None:
        """Leave out the first runs of a file: they are there."""
        self._total -= self._bytes_of(file, runs)

    def add(self, file: StoreFile, read_bytes: int, written_bytes: int) -> None:
        """Count, and show how far it is."""
        self._done += read_bytes + written_bytes
        self._show(Progress(file.path, self._done, self._total, time.monotonic() - self._started))

    def _bytes_of(self, file: StoreFile, runs: int) -> int:
        tensors = self._source.part(file.part)
        pieces = [piece for run in file.runs[:runs] for piece in run.pieces]
        return sum(tensors.nbytes(piece.name) + piece.nbytes for piece in pieces)


def _check_disk(folder: Path, files: Sequence[StoreFile]) -> None:
    """Raise OutputError where the disk has less than is still to be written."""
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    needed = int((sum(file.nbytes for file in files) - there) * _SPARE)
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"the store needs {needed / 1e9:.1f} GB at {str(place)!r}, where {free / 1e9:.1f} GB is free. Make room, "
            "choose a target on another disk, or a smaller format (int8, int4)."
        )


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Say of an error of the operating system what it means for the conversion."""
    try:
        yield
    except WanLocalError:
        raise
    except OSError as error:
        elsewhere = " Choose a target on another disk." if error.errno == errno.EFBIG else ""
        kept = f" What is written stays in {target.name + '.part'!r}; the same command goes on from there."
        way_out = elsewhere + kept if os.path.isdir(f"{target}.part") else " Choose another target."
        raise OutputError(f"the store {str(target)!r} could not be finished: {reason(error)}.{way_out}") from error


def _tokenizer(source: Source) -> dict[str, bytes]:
    files = (file for file in sorted(source.tokenizer_folder.iterdir()) if file.is_file())
    wanted = (".json", ".model", ".txt")
    return {
        f"{_TOKENIZER}{file.name}": file.read_bytes()
        for file in files
        if file.suffix in wanted
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file.name != "config.json"
    }


def _write_small(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_to_disk(file: Path) -> None:
    """Make a file's content durable; it is opened for writing, since Windows syncs no other."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(source: Source) -> dict[Path, str]:
    """Return what each source file is called: its folder and itself, and its part where two would be called alike."""
    short = {file: f"{file.parent.name}/{file.name}" for file in sorted(source.files)}
    counts = Counter(short.values())
    if len(counts) == len(short):
        return short
    parts = {file: part for part in source.parts for file in source.weights[part].files}
    return {file: name if counts[name] == 1 else f"{parts[file]}: {name}" for file, name in short.items()}


def _identity(file: Path) -> dict[str, Any]:
    """Return what a source file is told apart by: size, time of change, and the SHA-256 of its first mebibyte."""
    with file.open("rb") as stream:
        head = hashlib.sha256(stream.read(_HEAD_BYTES)).hexdigest()
    status = file.stat()
    return {"bytes": status.st_size, "changed": int(status.st_mtime), "sha256_of_first_mebibyte": head}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
