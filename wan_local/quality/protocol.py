"""Measures every variant of a run against the exact one; every row is kept as it comes."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wan_local.likeness import psnr
from wan_local.quality import metrics
from wan_local.quality.making import Encoded, Made, Maker
from wan_local.quality.metrics import Frames
from wan_local.quality.subject import EXACT, Clip, Unit, Variant

_STRIP_FRAMES, _STRIP_WIDTH = 9, 176


@dataclass(frozen=True, slots=True)
class _Exact:
    """A unit's exact run, with what the clip was encoded to and the figures of its frames alone."""

    encoded: Encoded
    made: Made
    figures: Mapping[str, float]


class Study:
    """Rows and strips in a folder, of runs that a maker makes, `at_once` units together."""

    def __init__(self, maker: Maker, folder: Path, *, at_once: int = 1) -> None:
        self.folder = folder
        self._maker, self._at_once = maker, at_once
        self._rows_file = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[metrics.Row]:
        """Return what was measured so far; a line that was cut off by a stop is left out."""
        if not self._rows_file.exists():
            return []
        rows = []
        for line in self._rows_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def sort(self, key: Callable[[metrics.Row], Any]) -> None:
        """Put the rows in an order that does not depend on who measured what when."""
        lines = [json.dumps(row) + "\n" for row in sorted(self.rows(), key=key)]
        part = self._rows_file.with_suffix(".part")
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(self._rows_file)

    def run(
        self, wanted: Iterable[Unit], variants: Sequence[Variant], *, deadline: float = math.inf
    ) -> Iterator[metrics.Row]:
        """Measure everything that is not measured yet, unit by unit; yield and keep each row.

        deadline: of `time.monotonic`, after which no run is begun.
        """
        done = {key_of(row) for row in self.rows()}
        self._end_cut_line()
        left = (unit for unit in wanted if any((variant.label, *unit.key) not in done for variant in variants))
        while units := list(itertools.islice(left, self._at_once)):
            if time.monotonic() >= deadline:
                return
            references = {unit.key: reference for unit, reference in zip(units, self._exact(units), strict=True)}
            for variant in variants:
                if time.monotonic() >= deadline:
                    return
                missing = [unit for unit in units if (variant.label, *unit.key) not in done]
                yield from self._measure(missing, variant, [references[unit.key] for unit in missing])

    def _exact(self, units: Sequence[Unit]) -> list[_Exact]:
        by_clip = {unit.clip.name: unit.clip for unit in units}
        encoded = {name: self._maker.encode(clip) for name, clip in by_clip.items()}
        of = [encoded[unit.clip.name] for unit in units]
        made = self._maker.make(units, of, Variant(EXACT))
        return [_Exact(one, each, metrics.describe(each.frames, one.ends)) for one, each in zip(of, made, strict=True)]

    def _measure(self, units: Sequence[Unit], variant: Variant, references: Sequence[_Exact]) -> Iterator[metrics.Row]:
        if not units:
            return
        made = [reference.made for reference in references]
        if variant.label != EXACT:
            made = self._maker.make(units, [reference.encoded for reference in references], variant)
        for unit, one, reference in zip(units, made, references, strict=True):
            words = {"variant": variant.label, "cell": unit.cell.name, "clip": unit.clip.name, "seed": unit.seed}
            row = {**words, **measured(one, reference, unit.clip)}
            if unit.shown:
                save_strip(one.frames, self.strip(unit.clip.name, variant.label))
            with self._rows_file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            yield row

    def _end_cut_line(self) -> None:
        if self._rows_file.exists() and not self._rows_file.read_bytes().endswith(b"\n"):
            with self._rows_file.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def strip(self, clip: str, variant: str) -> Path:
        """Return where a run's strip of frames is kept."""
        return self.folder / "strips" / f"{_file_name(clip)}--{_file_name(variant)}.jpg"


def save_strip(frames: Frames, path: Path) -> None:
    """Write a few frames of a video side by side."""
    chosen = frames[np.linspace(0, len(frames) - 1, _STRIP_FRAMES).round().astype(int)]
    picture = Image.fromarray(np.concatenate(list(chosen), axis=1))
    picture.thumbnail((_STRIP_FRAMES * _STRIP_WIDTH, _STRIP_FRAMES * _STRIP_WIDTH))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=90)


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in label)


def key_of(row: metrics.Row) -> tuple[str, str, str, int]:
    return row["variant"], row["cell"], row["clip"], row["seed"]


def measured(made: Made, reference: _Exact, clip: Clip) -> dict[str, float]:
    """Return a row's figures: alone, beside the exact run's, and to the truth where there is one."""
    exact, exact_figures, encoded = reference.made, reference.figures, reference.encoded
    figures = exact_figures if made is exact else metrics.describe(made.frames, encoded.ends)
    row = {
        "calls": made.calls,
        "seconds": round(made.seconds, 3),
        **metrics.compare(made.frames, exact.frames),
        **figures,
        "first_below_vae": encoded.ceiling[0] - figures["first_psnr"],
        "last_below_vae": encoded.ceiling[1] - figures["last_psnr"],
        "last_psnr_change": figures["last_psnr"] - exact_figures["last_psnr"],
        "motion_ratio": metrics.ratio(figures["motion"], exact_figures["motion"]),
        "sharpness_ratio": metrics.ratio(figures["sharpness"], exact_figures["sharpness"]),
        "warp_error_ratio": metrics.ratio(figures["warp_error"], exact_figures["warp_error"]),
    }
    if clip.truth is not None:
        row |= {
            "psnr_to_truth": psnr(made.frames, clip.truth),
            "ssim_to_truth": metrics.ssim(made.frames, clip.truth),
        }
    return {name: round(value, 6) for name, value in row.items()}
