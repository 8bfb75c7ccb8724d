"""Write one file of a store: its runs in order, each synced and noted before the next one counts; resumed if begun.

Tensors are read, changed by LoRAs, quantized and handed over some rows at a time. Several threads do that while the one
that writes writes, in order; how many pieces are under way is bounded, and so is the memory.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor

from wan_local.errors import CorruptModel
from wan_local.key_map import Part
from wan_local.page_cache import Appender
from wan_local.quantize import SMALLEST, is_block_linear, quantize_weight
from wan_local.store_journal import Journal, Written, good_part
from wan_local.store_layout import Piece, Run, StoreFile

_NUMBERS_AT_ONCE = 2**20  # 4 MiB of float32: larger pieces leave the cache and cost page faults
_MAX_WORKERS = 4
_WORDS = "shared.weight"  # what some tools save as zeros


class Tensors(Protocol):
    """A part of a source, as `wan_local.sources.SourceTensors` is."""

    def __getitem__(self, name: str) -> Tensor: ...
    def row_range(self, name: str, start: int, stop: int) -> Tensor: ...
    def nbytes(self, name: str) -> int: ...


class Meter(Protocol):
    """Is told what is done: runs that were there already, and bytes read and written."""

    def skip(self, file: StoreFile, runs: int) -> None: ...
    def add(self, file: StoreFile, read_bytes: int, written_bytes: int) -> None: ...


class Adapter(Protocol):
    """A LoRA that is merged: what it changes, the changed weight in float32, and the account of it."""

    @property
    def file(self) -> Path: ...
    @property
    def targets(self) -> frozenset[str]: ...
    @property
    def report(self) -> Any: ...
    def apply(self, name: str, weight: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a piece, ready: their data, what is stored behind the data of all rows, and the bytes read.

    `zero`: nothing but zeros.
    """

    data: Tensor
    tails: tuple[Tensor, ...]
    read_bytes: int
    last: bool
    zero: bool


class Producer:
    """Gives a run's bytes in order, made by a few threads; used in a `with` block."""

    def __init__(self, part_of: Callable[[Part], Tensors], loras: Sequence[Adapter]) -> None:
        self._part_of, self._loras = part_of, loras
        workers = min(_MAX_WORKERS, 1 + (os.cpu_count() or 1))  # one of them waits for the disk
        self._ahead = 2 * workers
        self._pool = ThreadPoolExecutor(workers, "wan_local-convert", initializer=lambda: torch.set_num_threads(1))
        self._threads = torch.get_num_threads()
        self._whole = threading.Lock()  # tensors that a LoRA changes are whole in memory: one at a time

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads)

    def run(self, part: Part, run: Run) -> Iterator[tuple[Tensor, int]]:
        """Yield tensors whose bytes are written one after the other, and how many bytes were read for each."""
        jobs, waiting = self._jobs(part, run), deque[Future[_Rows]]()
        pieces, zero = iter(run.pieces), True
        tails: list[tuple[Tensor, ...]] = []
        for job in itertools.islice(jobs, self._ahead):
            waiting.append(self._pool.submit(job))
        while waiting:
            rows = waiting.popleft().result()
            for job in itertools.islice(jobs, 1):
                waiting.append(self._pool.submit(job))
            yield rows.data, rows.read_bytes
            tails.append(rows.tails)
            zero = zero and rows.zero
            if rows.last:
                _check_not_zero(part, next(pieces), zero=zero)
                zero = True
                for parts in zip(*tails, strict=True):
                    yield torch.cat(parts), 0
                tails = []

    def _jobs(self, part: Part, run: Run) -> Iterator[Callable[[], _Rows]]:
        """Yield what makes the rows of each piece, in the order in which they are written."""
        for piece in run.pieces:
            loras = [lora for lora in self._loras if part == "transformer" and piece.name in lora.targets]
            if loras or len(piece.shape) < 2:
                yield functools.partial(self._make_whole, part, piece, loras)
                continue
            step = max(1, _NUMBERS_AT_ONCE // math.prod(piece.shape[1:]))
            for start in range(0, piece.shape[0], step):
                yield functools.partial(self._make_rows, part, piece, start, min(start + step, piece.shape[0]))

    def _make_whole(self, part: Part, piece: Piece, loras: Sequence[Adapter]) -> _Rows:
        with self._whole:
            tensors = self._part_of(part)
            weight = tensors[piece.name]
            for lora in loras:
                weight = lora.apply(piece.name, weight)
            return _converted(part, piece, weight, tensors.nbytes(piece.name), last=True)

    def _make_rows(self, part: Part, piece: Piece, start: int, stop: int) -> _Rows:
        tensors, height = self._part_of(part), piece.shape[0]
        rows, nbytes = tensors.row_range(piece.name, start, stop), tensors.nbytes(piece.name)
        return _converted(part, piece, rows, nbytes * stop // height - nbytes * start // height, last=stop == height)


def _check_not_zero(part: Part, piece: Piece, *, zero: bool) -> None:
    """Raise CorruptModel for a block's linear or a table of words of nothing but zeros, which no training leaves."""
    if zero and (is_block_linear(part, piece.name) or piece.name == _WORDS):
        raise CorruptModel(
            f"{piece.name!r} of the {part} is nothing but zeros: its file has its length, but not all of its content. "
            "Download it again."
        )


def write_file(folder: Path, file: StoreFile, journal: Journal, producer: Producer, meter: Meter) -> Written:
    """Write what is missing of `file` below `folder`, and return the note about the whole of it.

    Raises OSError where the disk is full or fails.
    """
    path, header, noted = folder / file.path, file.header(), journal.of(file.path)
    if noted and noted[-1].runs == len(file.runs) and path.is_file() and path.stat().st_size == noted[-1].end:
        meter.skip(file, len(file.runs))
        return noted[-1]
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as stream:
        good, digest = good_part(stream, noted)
        stream.seek(good.end if good else 0)
        stream.truncate()
        output = Appender(stream, stream.tell())
        if good is None:
            _write(output, header, digest)
        with ThreadPoolExecutor(1, "wan_local-sync") as notary:  # what is synced while the next run is made
            notes, first = [], good.runs if good else 0
            meter.skip(file, first)
            for done, run in enumerate(file.runs[first:], start=first + 1):
                for tensor, read_bytes in producer.run(file.part, run):
                    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                    _write(output, content, digest)
                    meter.add(file, read_bytes, len(content))
                output.hand_over()
                if done == len(file.runs):
                    stream.truncate(output.end)
                written = Written(file.path, done, output.end, digest.hexdigest())
                notes.append(notary.submit(_note, stream, journal, written))
                if len(notes) > 1:
                    notes[-2].result()
            return notes[-1].result() if notes else journal.of(file.path)[-1]


def _note(stream: BinaryIO, journal: Journal, written: Written) -> Written:
    os.fsync(stream.fileno())
    journal.record(written)
    return written


def _write(output: Appender, content: bytes | memoryview, digest: Any) -> None:
    digest.update(content)
    output.append(content)


def _converted(part: Part, piece: Piece, rows: Tensor, read_bytes: int, *, last: bool) -> _Rows:
    """Return rows of a piece in the format they are stored in. Raises CorruptModel for numbers that are not finite."""
    tails: list[Tensor]
    if piece.format is None:
        data, tails = rows.to(piece.dtype), []
        finite, zero = _all_finite(data), not bool(data.reshape(-1)[:64].any()) and not bool(data.any())
    else:
        quantized = quantize_weight(rows, piece.format, rotated=piece.rotated)
        data = quantized.data
        tails = [tail for tail in (quantized.scale, quantized.shift) if tail is not None]
        finite = all(bool(torch.isfinite(tail).all()) for tail in tails)  # where a NaN or an infinity would be too
        zero = all(float(tail.float().abs().amax()) <= SMALLEST for tail in tails)
    if not finite:
        raise CorruptModel(
            f"{piece.name!r} of the {part} holds NaN or infinity, which no picture comes of. Download it again."
        )
    return _Rows(data, tuple(tails), read_bytes, last, zero)


def _all_finite(data: Tensor) -> bool:
    """Tell whether no number is NaN or infinite; by a sum, which is a pass without temporaries."""
    total = data.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(data).all())  # a sum may overflow by itself
