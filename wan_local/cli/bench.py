"""`wan-local bench quality`: what each approximation saves and costs with your weights and your images."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wan_local.cli.flags import add_place_flags, settings_from
from wan_local.cli.terminal import DONE, say
from wan_local.errors import NotAvailable

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.quality.protocol import Study
    from wan_local.settings import Settings


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser("bench", help="measure on this machine, with your weights")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    quality = kinds.add_parser(
        "quality",
        help="compare approximations with the run that takes every step; writes a page and thresholds",
        argument_default=argparse.SUPPRESS,
    )
    quality.set_defaults(run=_quality)
    add_place_flags(quality.add_argument_group("where"))
    quality.add_argument(
        "--pairs", type=Path, required=True, metavar="DIR", help="NAME_first.png, NAME_last.png, prompt in NAME.txt"
    )
    quality.add_argument("--output", type=Path, required=True, metavar="DIR", help="where page and thresholds go")
    quality.add_argument("--resolution", default="480p", choices=("480p", "720p"))
    steps = "the first is what the thresholds are chosen by; so with --shift"
    quality.add_argument("--num-inference-steps", type=int, nargs="+", default=[30], metavar="N", help=steps)
    quality.add_argument("--shift", type=float, nargs="+", default=[5.0], metavar="N")
    quality.add_argument("--guide-scale", type=float, default=5.0, metavar="N")
    quality.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    quality.add_argument(
        "--compare-model", type=Path, nargs="+", default=[], metavar="PATH", help="the same weights in other formats"
    )


def _quality(options: argparse.Namespace) -> int:
    for module in ("cv2", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise NotAvailable(
                f"bench quality needs {module}, which is not installed: pip install 'wan_local[quality]'"
            )
    from wan_local.checkpoint import find_model
    from wan_local.quality.making import Maker
    from wan_local.quality.own_model import computations, exactly, read_pairs, variants
    from wan_local.quality.premises import keep, premises_of
    from wan_local.quality.protocol import Study
    from wan_local.quality.subject import EXACT, Cell, Variant, units

    arguments = {"resolution": options.resolution, "guide_scale": options.guide_scale}
    folder = options.output / "runs"
    settings = settings_from(vars(options))
    maker = Maker(exactly(settings), arguments, folder)
    study, clips = Study(maker, folder), read_pairs(options.pairs)
    cells = [Cell(steps, shift) for steps in options.num_inference_steps for shift in options.shift]
    [probe, *_] = units(clips, cells, options.seeds)
    others = {path: find_model(replace(settings, model=str(path))) for path in options.compare_model}
    premises = premises_of(maker.job(probe, Variant(EXACT)), clips, others)
    keep(premises, folder, measured=bool(study.rows()))
    alike = [Variant(EXACT), *computations(settings, lambda variant: maker.job(probe, variant), say)]
    compared = {
        cell: [*alike, *variants(study.folder, cell.num_inference_steps, options.guide_scale, options.compare_model)]
        for cell in cells
    }
    total = len(clips) * len(options.seeds) * sum(map(len, compared.values()))
    done = len(study.rows())
    for unit in units(clips, cells, options.seeds):
        for row in study.run([unit], compared[unit.cell]):
            done += 1
            say(f"{done}/{total} {row['cell']}, {row['clip']}, seed {row['seed']}, {row['variant']}: {row['calls']} "
                f"calls, {row['seconds']:.1f} s, {row['psnr_to_exact']:.1f} dB to the exact run")  # fmt: skip
    _write(study, options.output, cells[0].name, settings, premises.describe())
    return DONE


def _write(study: Study, output: Path, cell: str, settings: Settings, facts: str) -> None:
    """Write the page of all cells, and the thresholds that the figures of `cell` speak for."""
    from wan_local.quality.decision import OWN, candidates, conclusion, section
    from wan_local.quality.own_model import environment, recommended
    from wan_local.quality.page import write_page
    from wan_local.quality.summary import summarize

    summaries = [summary for summary in summarize(study.rows()) if summary.cell == cell]
    chosen, thresholds = recommended(summaries), output / "acceleration.toml"
    if chosen is None:
        thresholds.unlink(missing_ok=True)  # of an earlier run
        words = f"{conclusion(candidates(summaries, bar=OWN))} Nothing but acceleration none is recommended."
    else:
        thresholds.write_text(chosen.as_toml(), encoding="utf-8")
        words = (
            f"By these figures `regular` should be: {chosen.label}. "
            f"`{environment(chosen, thresholds, settings)}` makes it so."
        )
    title = "What each approximation costs with this model"
    write_page(study, output, title, f"{words}\n\nMeasured with {facts}.", verdict=functools.partial(section, bar=OWN))
    print(output / "README.md")
    say(words)
