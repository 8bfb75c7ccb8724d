"""Sums rows up, and says which policy `acceleration="regular"` should be by them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wan_local.quality.metrics import Row

LEAST_PSNR = 22.0
"""dB to the exact run, below which nothing is recommended: what published caches keep on the 14B model."""
MOST_LAST_FRAME_LOSS = 0.5
MOST_WARP_ERROR = 1.10

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


def acceptable(summary: Summary) -> bool:
    """Tell whether a variant keeps to what the exact run draws, its last frame and its steadiness."""
    means = summary.means
    return (
        means["psnr_to_exact"] >= LEAST_PSNR
        and means["last_psnr_change"] >= -MOST_LAST_FRAME_LOSS
        and means["warp_error_ratio"] <= MOST_WARP_ERROR
    )


def best(summaries: Sequence[Summary], candidates: Sequence[str]) -> Summary | None:
    """Return the acceptable candidate with the fewest calls; of equal ones the nearest to the exact run; or None."""
    fitting = [summary for summary in summaries if summary.variant in candidates and acceptable(summary)]
    return min(fitting, key=lambda s: (round(s.means["calls"], 1), -s.means["psnr_to_exact"]), default=None)
