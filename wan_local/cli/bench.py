"""`wan-local bench quality`: what leaving out steps saves and costs with your weights and your images."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from wan_local.cli.flags import add_place_flags, settings_from
from wan_local.cli.terminal import DONE, say
from wan_local.errors import NotAvailable

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.quality.protocol import Study


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser("bench", help="measure on this machine, with your weights")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    quality = kinds.add_parser(
        "quality",
        help="compare ways to leave out steps with the run that takes every one; writes a page and thresholds",
        argument_default=argparse.SUPPRESS,
    )
    quality.set_defaults(run=_quality)
    add_place_flags(quality.add_argument_group("where"))
    quality.add_argument(
        "--pairs", type=Path, required=True, metavar="DIR", help="NAME_first.png, NAME_last.png, prompt in NAME.txt"
    )
    quality.add_argument("--output", type=Path, required=True, metavar="DIR", help="where page and thresholds go")
    quality.add_argument("--resolution", default="480p", choices=("480p", "720p"))
    quality.add_argument("--num-inference-steps", type=int, default=30, metavar="N")
    quality.add_argument("--shift", type=float, default=5.0, metavar="N")
    quality.add_argument("--guide-scale", type=float, default=5.0, metavar="N")
    quality.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")


def _quality(options: argparse.Namespace) -> int:
    for module in ("cv2", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise NotAvailable(
                f"bench quality needs {module}, which is not installed: pip install 'wan_local[quality]'"
            )
    from wan_local.quality.making import Maker
    from wan_local.quality.own_model import read_pairs, variants
    from wan_local.quality.protocol import Study
    from wan_local.quality.subject import EXACT, Cell, Variant, units

    arguments = {"resolution": options.resolution, "guide_scale": options.guide_scale}
    folder = options.output / "runs"
    study = Study(Maker(settings_from(vars(options)), arguments, folder), folder)
    cell = Cell(options.num_inference_steps, options.shift)
    compared = [Variant(EXACT), *variants(study.folder, cell.num_inference_steps)]
    clips = read_pairs(options.pairs)
    total, done = len(clips) * len(compared) * len(options.seeds), len(study.rows())
    for row in study.run(units(clips, [cell], options.seeds), compared):
        done += 1
        say(f"{done}/{total} {row['clip']}, seed {row['seed']}, {row['variant']}: {row['calls']} calls, "
            f"{row['seconds']:.1f} s, {row['psnr_to_exact']:.1f} dB to the exact run")  # fmt: skip
    _write(study, options.output)
    return DONE


def _write(study: Study, output: Path) -> None:
    from wan_local.quality.own_model import recommended
    from wan_local.quality.page import write_page
    from wan_local.quality.verdict import summarize

    chosen = recommended(summarize(study.rows()))
    if chosen is None:
        words = "None of the ways to leave out steps was near enough to the exact run: use acceleration none."
    else:
        thresholds = output / "acceleration.toml"
        thresholds.write_text(chosen.as_toml(), encoding="utf-8")
        words = (
            f"By these figures `regular` should be: {chosen.label}. "
            f"`WAN_LOCAL_ACCELERATION_FILE={thresholds.absolute()}` makes it so."
        )
    title = "What leaving out steps costs with this model"
    write_page(study, output, title, words)
    print(output / "README.md")
    say(words)
