"""What each weight format costs on the embedded model: PSNR of the video to the one from the weights as they are.

python -m bench.formats --work DIR [--clips 4] [--seeds 2] [--steps 20]

Unseen clips, 112x64 pixels, 81 frames, guide_scale 5, shift 5, every step taken, float32 on a CPU; compared as decoded
frames. Only the transformer's format changes. Another seed is the yardstick. A stopped run goes on where it was; the
summary is appended to bench/results/formats.jsonl and printed as a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.quality import UNSEEN_SEED, unseen
from bench.random_model import TINY
from bench.world import append_row, describe
from wan_local.convert import Conversion, convert
from wan_local.quality.making import Maker
from wan_local.quality.metrics import Row
from wan_local.quality.protocol import Study
from wan_local.quality.subject import EXACT, Cell, Variant, units
from wan_local.settings import load_settings
from wan_local.sources import open_source
from wan_local.weight_format import WeightFormat, WeightFormats

# label, format, arithmetic, keep_edges, rotate
ROWS: list[tuple[str, WeightFormat, str, bool, bool]] = [
    ("bf16", "bf16", "weight-only", False, False),
    ("int8, weight-only", "int8", "weight-only", False, False),
    ("int8, W8A8", "int8", "w8a8", False, False),
    ("int8, W8A8, rotated", "int8", "w8a8", False, True),
    ("int8, W8A8, rotated, edges kept", "int8", "w8a8", True, True),
    ("fp8", "fp8", "weight-only", False, False),
    ("int4", "int4", "weight-only", False, False),
    ("int4, edges kept", "int4", "weight-only", True, False),
]


def make_stores(work: Path) -> list[Variant]:
    """Convert the embedded model into every format; return what is compared."""
    source, variants = open_source(TINY), []
    for label, format_, arithmetic, keep_edges, rotate in ROWS:
        target = work / f"{format_}{'-edges' if keep_edges else ''}{'-rotated' if rotate else ''}"
        convert(Conversion(source, WeightFormats(format_, keep_edges=keep_edges), rotate), target)
        variants.append(Variant(label, settings={"model": str(target), "int8_arithmetic": arithmetic}))
    return [Variant(EXACT), *variants, Variant("another seed", seed_offset=1000)]


def summary(rows: list[Row], label: str) -> dict[str, Any]:
    """Return the mean, the worst and the spread of a variant's PSNR in dB, and what became of the last frame."""
    chosen = [row for row in rows if row["variant"] == label]
    values = [min(float(row["psnr_to_exact"]), 99.0) for row in chosen]
    return {
        "who": label,
        "videos": len(chosen),
        "psnr_to_exact": round(statistics.mean(values), 2),
        "worst": round(min(values), 2),
        "spread": round(statistics.pstdev(values), 2),
        "last_frame_psnr_change": round(statistics.mean(float(row["last_psnr_change"]) for row in chosen), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder: stores and rows, resumable")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    variants = make_stores(options.work)
    arguments = {"resolution": "480p", "aspect_ratio": "16:9", "guide_scale": 5}
    study = Study(Maker(load_settings(model="tiny", device="cpu"), arguments, options.work), options.work)
    rows = []
    chosen = [unseen(UNSEEN_SEED + number) for number in range(options.clips)]
    for row in study.run(units(chosen, [Cell(options.steps, 5.0)], range(1, options.seeds + 1)), variants):
        print(row["clip"], row["seed"], row["variant"], f"{row['psnr_to_exact']:.2f} dB", flush=True)
    rows = [row for row in study.rows() if row["cell"] == Cell(options.steps, 5.0).name]
    print("| transformer's format | PSNR, mean | worst | last frame |\n|---|---|---|---|")
    for variant in variants[1:]:
        figures = summary(rows, variant.label)
        assert math.isfinite(figures["psnr_to_exact"]), figures
        append_row("formats", {**figures, "steps": options.steps, "world": describe(torch.device("cpu"))})
        print(
            f"| {figures['who']} | {figures['psnr_to_exact']} dB | {figures['worst']} dB | "
            f"{figures['last_frame_psnr_change']:+} dB |"
        )


if __name__ == "__main__":
    main()
