"""The page of a study: tables in Markdown and CSV, plots, contact sheets. Plots need matplotlib (extra `quality`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from wan_local.quality.metrics import Row
from wan_local.quality.protocol import Study
from wan_local.quality.subject import EXACT
from wan_local.quality.summary import Summary, summarize

_COLUMNS = (  # figure, its head, digits
    ("calls", "calls", 1),
    ("seconds", "seconds", 2),
    ("psnr_to_exact", "PSNR to exact", 1),
    ("ssim_to_exact", "SSIM to exact", 4),
    ("psnr_to_truth", "PSNR to truth", 2),
    ("ssim_to_truth", "SSIM to truth", 3),
    ("first_below_vae", "first below VAE", 2),
    ("last_below_vae", "last below VAE", 2),
    ("last_psnr_change", "last frame", 2),
    ("motion_ratio", "motion", 3),
    ("sharpness_ratio", "sharpness", 3),
    ("end_pop", "end pop", 2),
    ("flicker", "flicker", 3),
    ("warp_error_ratio", "warp error", 3),
)
_PLOT_POINTS, _LABEL_POINTS, _LABEL_CALLS = 350, 10, 3.0  # height of a plot's axes, of a label, and a label's width
_LEGEND = """\
PSNR in dB over all frames; "worst clip" is the lowest mean over a clip's seeds. "exact" is the same request with every
step and the base model's weights, same seed, attention and linears by plain PyTorch. "first/last below VAE": how far
the first and last frame are below what the VAE alone keeps of the given image, dB. "last frame": the last frame's PSNR
to the given image against the exact run's, dB. Motion (mean optical flow), sharpness (variance of the Laplacian) and
warp error are ratios to the exact run; end pop is the change into the last frame over the median change; flicker is the
mean second difference of the mean luma (0..255).
"""


def write_page(
    study: Study,
    folder: Path,
    title: str,
    words: str,
    *,
    verdict: Callable[[Sequence[Summary]], str] = lambda _: "",
) -> None:
    """Write README.md, rows.csv, summary.csv and the pictures of a study into `folder`.

    verdict: Markdown about a cell's figures, put below its table.
    """
    rows = study.rows()
    summaries = summarize(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text(as_csv(rows), encoding="utf-8")
    (folder / "summary.csv").write_text(as_csv([_flat(summary) for summary in summaries]), encoding="utf-8")
    plots = plot(summaries, folder)
    sheets = contact_sheets(study, rows, folder)
    parts = [f"# {title}\n", words.strip() + "\n", _LEGEND]
    for cell in dict.fromkeys(summary.cell for summary in summaries):
        members = [summary for summary in summaries if summary.cell == cell]
        parts += [f"## {cell}\n", table(members), verdict(members)]
        parts += [f"![{path.stem}]({path.name})\n" for path in plots if path.name == plot_name(cell)]
    if sheets:
        parts.append("## Frames\n\nThe same clip, seed and steps; nine frames from first to last.\n")
        parts += [f"![{path.stem}]({path.name})\n" for path in sheets]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def table(summaries: Sequence[Summary]) -> str:
    """Return a Markdown table, one line a variant; figures that no variant has are left out."""
    columns = [column for column in _COLUMNS if all(column[0] in summary.means for summary in summaries)]
    heads = ["variant", "runs", *(head for _, head, _ in columns)]
    heads.insert(heads.index("PSNR to exact") + 1, "worst clip")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for summary in summaries:
        cells = [summary.variant, str(summary.runs)]
        for name, _, digits in columns:
            cells.append(f"{summary.means[name]:.{digits}f}")
            if name == "psnr_to_exact":
                cells.append(f"{summary.worst_psnr_to_exact:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _flat(summary: Summary) -> Row:
    head = {"variant": summary.variant, "cell": summary.cell, "runs": summary.runs}
    return {**head, "worst_clip_psnr_to_exact": round(summary.worst_psnr_to_exact, 3)} | {
        name: round(value, 5) for name, value in summary.means.items()
    }


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; a column that a row does not have stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot(summaries: Sequence[Summary], folder: Path) -> list[Path]:
    """Draw PSNR to the exact run over model calls, one picture a cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for cell in dict.fromkeys(summary.cell for summary in summaries):
        members = [summary for summary in summaries if summary.cell == cell and summary.variant != EXACT]
        if not members:
            continue
        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        lifts, most = _lifts(members), max(summary.means["calls"] for summary in members)
        for number, summary in enumerate(members):
            calls, mean = summary.means["calls"], summary.means["psnr_to_exact"]
            colour, left = f"C{number % 10}", calls == most
            axes.plot([calls, calls], [summary.worst_psnr_to_exact, mean], color=colour, linewidth=1)
            axes.plot([calls], [mean], "o", color=colour)
            place: dict[str, Any] = {
                "xytext": (-7 if left else 7, lifts[summary.variant]),
                "ha": "right" if left else "left",
            }
            axes.annotate(
                summary.variant,
                (calls, mean),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
                **place,
            )
        axes.set_xlabel("model calls")
        axes.set_ylabel("PSNR to the exact run, dB (line: down to the worst clip)")
        axes.set_title(cell)
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
        path = folder / plot_name(cell)
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths


def _lifts(members: Sequence[Summary]) -> dict[str, float]:
    """Return how many points each label goes up, so that labels of about as many calls do not lie on each other."""
    values = [value for m in members for value in (m.worst_psnr_to_exact, m.means["psnr_to_exact"])]
    points_per_db = _PLOT_POINTS / max(max(values) - min(values), 1e-3)
    lifts: dict[str, float] = {}
    placed: list[tuple[float, float]] = []  # calls and height of the labels so far, from the lowest up
    for member in sorted(members, key=lambda m: m.means["psnr_to_exact"]):
        calls, height = member.means["calls"], member.means["psnr_to_exact"] * points_per_db
        beside = [top for other, top in placed if abs(other - calls) < _LABEL_CALLS]
        label = max([height, *(top + _LABEL_POINTS for top in beside)])
        placed.append((calls, label))
        lifts[member.variant] = label - height
    return lifts


def plot_name(cell: str) -> str:
    return f"psnr_{cell.replace(' ', '_').replace(',', '')}.png"


def contact_sheets(study: Study, rows: Sequence[Row], folder: Path, *, clips: int = 3) -> list[Path]:
    """Put the strips of the first clips one below the other, each with its variant's name."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    paths = []
    for clip in list(dict.fromkeys(row["clip"] for row in rows))[:clips]:
        strips = [(name, study.strip(clip, name)) for name in variants if study.strip(clip, name).exists()]
        if not strips:
            continue
        pictures = [(name, Image.open(path).convert("RGB")) for name, path in strips]
        line = 14
        width = max(picture.width for _, picture in pictures)
        sheet = Image.new("RGB", (width, sum(picture.height + line for _, picture in pictures)), "white")
        draw, top = ImageDraw.Draw(sheet), 0
        for name, picture in pictures:
            draw.text((3, top + 1), name, fill="black")
            sheet.paste(picture, (0, top + line))
            top += picture.height + line
        path = folder / f"frames_{clip.replace(' ', '_')}.jpg"
        sheet.save(path, quality=85)
        paths.append(path)
    return paths
