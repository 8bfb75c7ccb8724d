"""What a kernel is launched with: a static table by card and shape class, and what `wan-local tune` found on this card.

No autotuning at run time: it allocates at the peak of memory, does not run on a CPU, and takes minutes at first use.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_kernels.language import TRITON_VERSION, ceil_div, power_of_two

SHARED_MEMORY_LIMIT = 101_376  # bytes a block of threads may have on sm_86, sm_89 and sm_120; sm_90 has 232,448
ARCHITECTURES = (86, 89, 90, 120)
SMALLEST_PIECE = 64  # of a row: the group that is rotated together
WARP_COLUMNS = 40 * 32  # of a row, at most: float32 in registers, so that several rows fit a multiprocessor
TUNED = Path(".wan_local") / "kernels.json"  # below the home folder
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """One program a row: the power of two that holds it, and its warps."""

    block: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class SplitLaunch:
    """One program a row held as two pieces: powers of two that hold it together, 0 where one does, and its warps."""

    front: int
    back: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class TileLaunch:
    """One program a tile: rows, columns, and the depth of one `tl.dot`; 0 where the kernel fixes it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (op, shape class) -> candidates, the first of which is used on every card that has no line of its own. Their order is
# that of an H200 made to multiply as consumer cards do (`bench.gpu`); that they fit those is checked ahead of time.
CANDIDATES: Mapping[tuple[str, str], tuple[TileLaunch, ...]] = {
    ("attention_int8", "fp16"): (
        TileLaunch(128, 0, 0, 8, 2),
        TileLaunch(128, 0, 0, 8, 3),
        TileLaunch(128, 0, 0, 8, 4),
        TileLaunch(64, 0, 0, 4, 3),
    ),
    ("attention_int8", "int8"): (
        TileLaunch(128, 0, 0, 8, 2),
        TileLaunch(128, 0, 0, 8, 3),
        TileLaunch(128, 0, 0, 8, 4),
    ),
    ("linear_int8", "large"): (
        TileLaunch(128, 256, 64, 8, 3),
        TileLaunch(128, 128, 64, 8, 3),
        TileLaunch(128, 128, 64, 8, 4),
        TileLaunch(128, 256, 64, 8, 2),
    ),
    ("linear_int8", "small"): (
        TileLaunch(64, 64, 64, 4, 3),
        TileLaunch(32, 64, 64, 4, 3),
    ),
}

# Where another launch than the first suits a card: the wider tensor-core instructions of sm_90 read both operands from
# shared memory, and 128 x 256 tiles spill there. An H200 was the fastest with these.
BY_ARCHITECTURE: Mapping[tuple[int, str, str], TileLaunch] = {
    (90, "attention_int8", "fp16"): TileLaunch(64, 0, 0, 4, 3),
    (90, "attention_int8", "int8"): TileLaunch(128, 0, 0, 8, 3),
    (90, "linear_int8", "large"): TileLaunch(128, 128, 64, 8, 3),
}


def row_launch(width: int) -> RowLaunch:
    """Return how rows of `width` columns are launched: as many warps as keep some 32 columns a thread."""
    block = max(power_of_two(width), 64)
    return RowLaunch(block, min(max(block // 1024, 1), 16))


def split_launch(width: int) -> SplitLaunch:
    """Return how rows of `width` columns are launched in two pieces: warps for at most 40 columns a thread.

    The front is the largest power of two within the width. A back that would be as large spares no lane: then one piece
    holds all. A third would spare 13,824 columns an eighth of their lanes; rows so wide go through `gelu_quantize`.
    """
    front = max(power_of_two(width + 1) // 2, SMALLEST_PIECE)
    back = max(power_of_two(width - front), SMALLEST_PIECE) if width > front else 0
    if back == front:
        front, back = 2 * front, 0
    num_warps = power_of_two(ceil_div(front + back, WARP_COLUMNS))
    return SplitLaunch(front, back, min(num_warps, 16))


def tile_launch(op: str, shape_class: str, device: torch.device) -> TileLaunch:
    """Return what `op` is launched with on `device`: what was tuned there, else what the table says."""
    if device.type != "cuda":
        return table_launch(op, shape_class, 0)
    tuned = _tuned(_home() / TUNED).launches.get(tuned_key(op, shape_class, device))
    if tuned in CANDIDATES[op, shape_class]:  # as long as it is one: what is no longer tried is no longer checked
        return tuned
    major, minor = torch.cuda.get_device_capability(device)
    return table_launch(op, shape_class, 10 * major + minor)


def table_launch(op: str, shape_class: str, architecture: int) -> TileLaunch:
    """Return what the table says for `architecture` (86 for sm_86)."""
    return BY_ARCHITECTURE.get((architecture, op, shape_class), CANDIDATES[op, shape_class][0])


def tuned_key(op: str, shape_class: str, device: torch.device) -> str:
    """Return the name a tuned launch is kept by: card, its multiprocessors, Triton, op, its source and shape class."""
    card = torch.cuda.get_device_properties(device)
    world = f"{card.name}|{card.multi_processor_count}|triton {TRITON_VERSION}"
    return f"{world}|{op} {_source_hash(op)}|{shape_class}"


@functools.lru_cache(maxsize=8)
def _source_hash(op: str) -> str:
    """Return a hash of the file that holds an op: another kernel may want another launch, or spill with this one."""
    return hashlib.sha256(Path(__file__).with_name(f"{op}.py").read_bytes()).hexdigest()[:12]


def _home() -> Path:
    """Return the home folder, or one among the temporary ones for a user who has neither a name nor HOME."""
    try:
        return Path.home()
    except RuntimeError:
        user = "user" if sys.platform == "win32" else str(os.getuid())
        return Path(tempfile.gettempdir()) / f"wan_local-{user}"


def tuned_problem(home: Path | None = None) -> str:
    """Return why nothing that was tuned is used, or nothing where the file is sound or not there."""
    return _tuned((home or _home()) / TUNED).problem


def save_tuned(found: Mapping[str, TileLaunch], home: Path | None = None) -> Path:
    """Add `found` to what the file holds by now and return the file; it appears complete or not at all."""
    path = (home or _home()) / TUNED
    _tuned.cache_clear()
    rows = {key: _as_list(launch) for key, launch in {**_tuned(path).launches, **found}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    part.replace(path)
    _tuned.cache_clear()
    return path


@dataclass(frozen=True, slots=True)
class _Tuned:
    """What the file holds; `problem`: why it is not used."""

    launches: Mapping[str, TileLaunch]
    problem: str = ""


@functools.lru_cache(maxsize=4)
def _tuned(path: Path) -> _Tuned:
    """Read the file once; a damaged one is no reason to stop, since the table has a launch for everything."""
    try:
        return _Tuned(_parsed(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return _Tuned({})
    except (OSError, ValueError) as error:
        problem = f"{path} cannot be read ({error}); the table's launches are used. Tune again, or delete it"
        _log.warning("%s", problem)
        return _Tuned({}, problem)


def _parsed(text: str) -> dict[str, TileLaunch]:
    """Return the launches of a file's text; raises ValueError where it is not what `save_tuned` writes."""
    rows = json.loads(text)
    if not isinstance(rows, dict):
        raise ValueError("it holds no table")
    for key, numbers in rows.items():
        if not (isinstance(numbers, list) and len(numbers) == 5 and all(type(number) is int for number in numbers)):
            raise ValueError(f"the launch of {key} is {numbers!r}, not five integers")
    return {key: TileLaunch(*numbers) for key, numbers in rows.items()}


def _as_list(launch: TileLaunch) -> list[int]:
    return [launch.block_m, launch.block_n, launch.block_k, launch.num_warps, launch.num_stages]
