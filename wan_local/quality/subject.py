"""What a study compares: clips, variants of a run, cells to compare them in, and units, which have one exact run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from wan_local.preparation import Job
from wan_local.quality.metrics import Frames

EXACT = "none"


@dataclass(frozen=True, slots=True)
class Clip:
    """Two images and a prompt; truth: the video they are the ends of, at the size and length that is made, or None."""

    name: str
    start: Image.Image
    end: Image.Image
    prompt: str
    truth: Frames | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """A change to measure. request and settings are laid over the base's; `seed_offset` is added to the seed.

    edit: changes the planned run, where neither says it.
    """

    label: str
    request: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    edit: Callable[[Job], Job] = lambda job: job


@dataclass(frozen=True, slots=True)
class Cell:
    """Where the variants are compared. A variant's own number of steps goes before the cell's."""

    num_inference_steps: int = 30
    shift: float = 5.0

    @property
    def name(self) -> str:
        return f"{self.num_inference_steps} steps, shift {self.shift:g}"


@dataclass(frozen=True, slots=True)
class Unit:
    """What one exact run is for: all variants are compared with it. shown: they leave strips for the contact sheets."""

    cell: Cell
    clip: Clip
    seed: int
    shown: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        return self.cell.name, self.clip.name, self.seed


def units(clips: Iterable[Clip], cells: Sequence[Cell], seeds: Sequence[int], *, shown: int = 3) -> Iterator[Unit]:
    """Return every unit, the first cell's first; the first clips of the first cell and seed are shown."""
    kept = list(clips)
    for cell in cells:
        for number, clip in enumerate(kept):
            for seed in seeds:
                yield Unit(cell, clip, seed, cell == cells[0] and seed == seeds[0] and number < shown)
