"""Sums rows up: one line for each variant in each cell."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wan_local.quality.metrics import Row

_NOT_FIGURES = ("variant", "cell", "clip", "seed")


@dataclass(frozen=True, slots=True)
class Summary:
    """One variant in one cell: means over clips and seeds, and the worst clip's PSNR to the exact run."""

    variant: str
    cell: str
    runs: int
    means: Mapping[str, float]
    worst_psnr_to_exact: float


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Return the summaries in the order in which variants and cells came first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["variant"]), []).append(row)
    return [_summary(cell, variant, members) for (cell, variant), members in groups.items()]


def _summary(cell: str, variant: str, rows: Sequence[Row]) -> Summary:
    names = [name for name in rows[0] if name not in _NOT_FIGURES and all(name in row for row in rows)]
    means = {name: statistics.fmean(row[name] for row in rows) for name in names}
    clips: dict[str, list[float]] = {}
    for row in rows:
        clips.setdefault(row["clip"], []).append(row["psnr_to_exact"])
    worst = min(statistics.fmean(values) for values in clips.values())
    return Summary(variant, cell, len(rows), means, worst)
