"""The quality table of the embedded model: what each approximation saves and costs, to the exact run and to the truth.

python -m bench.quality --work DIR [--clips 24] [--seeds 3] [--cells all] [--variants NAME ...] [--page docs/quality]

Unseen clips with their true videos, 112x64 pixels and 81 frames, guide_scale 5. Every row is kept in DIR as it comes: a
stopped run goes on where it was, and several processes may share the work by `--share 0/2` and `--share 1/2`.
`--page` writes the tables, plots and contact sheets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.tiny_model.photos import held_out_photos
from bench.tiny_model.render import clip
from bench.tiny_model.train import DEFAULT_FOLDER as TINY_FOLDER
from bench.world import describe
from wan_local.convert import Conversion, convert
from wan_local.preparation import Job
from wan_local.preview import to_uint8
from wan_local.quality.page import write_page
from wan_local.quality.protocol import EXACT, Cell, Clip, Study, Variant
from wan_local.settings import load_settings
from wan_local.sources import open_source
from wan_local.weight_format import WeightFormat, WeightFormats

UNSEEN_SEED = 9 * 10**6
WIDTH, HEIGHT, FRAMES = 112, 64, 81
CENTRE = Cell(30, 5.0)
CELLS = (CENTRE, *(Cell(n, shift) for n in (20, 30, 40) for shift in (3.0, 5.0, 10.0) if (n, shift) != (30, 5.0)))
TAUS = (0.03, 0.05, 0.1)
WORDS = """\
Made by `python -m bench.quality` on the embedded tiny model: unseen clips at 112x64, 81 frames, guide_scale 5, fp32 on
a CPU. Another seed is the yardstick: what is nearer to the exact run than that changes less than chance does. PSNR to
the truth is a floor and no ranking: fewer steps draw a mean, which blurs and scores more. How these figures carry over
to the 14B model is not known; `wan-local bench quality` measures it on your weights.
"""


def clips(count: int) -> Iterator[Clip]:
    for seed in range(UNSEEN_SEED, UNSEEN_SEED + count):
        video, caption = clip(seed, held_out_photos(), WIDTH, HEIGHT, torch.linspace(0, 1, FRAMES))
        frames = to_uint8(video)
        yield Clip(str(seed), Image.fromarray(frames[0]), Image.fromarray(frames[-1]), caption, np.asarray(frames))


def in_bfloat16(job: Job) -> Job:
    return replace(job, dtype=torch.bfloat16)


def with_int8_inputs(job: Job) -> Job:
    stages = tuple(replace(stage, int8_arithmetic="w8a8") for stage in job.plan.stages)
    return replace(job, plan=replace(job.plan, stages=stages))


def store(work: Path, format_: WeightFormat, *, rotate: bool = False) -> str:
    """Return the folder of the tiny model with its transformer's linears in a format; it is made once."""
    target = work / f"store_{format_}{'_rotated' if rotate else ''}"
    convert(Conversion(open_source(TINY_FOLDER), WeightFormats(format_), rotate=rotate), target)
    return str(target)


def formats(work: Path) -> list[Variant]:
    """Return the weight formats; int8 also with int8 inputs, which is what cards compute fast."""
    int8, rotated = {"model": store(work, "int8")}, {"model": store(work, "int8", rotate=True)}
    regular = {"acceleration": "regular"}
    return [
        Variant("bf16", edit=in_bfloat16),
        Variant("int8 weights", {}, int8),
        Variant("int8 weights and inputs", {}, int8, edit=with_int8_inputs),
        Variant("int8 weights and inputs, rotated", {}, rotated, edit=with_int8_inputs),
        Variant("fp8 weights", {}, {"model": store(work, "fp8")}),
        Variant("int4 weights", {}, {"model": store(work, "int4")}),
        Variant("regular and int8 weights and inputs", regular, int8, edit=with_int8_inputs),
    ]


def variants(work: Path) -> list[Variant]:
    """Return everything that is compared, the exact run first."""
    merging = []
    for tau in TAUS:
        path = work / f"tau_{tau:g}.toml"
        path.write_text(f"[merge]\ntau = {tau}\n", encoding="utf-8")
        merging.append(Variant(f"regular, tau {tau:g}", {"acceleration": "regular"}, {"acceleration_file": path}))
    reuse = []
    for row in (1, 2):  # one in a row takes about as many calls as merging does
        path = work / f"reuse_{row}.toml"
        path.write_text(f'[regular]\npolicy = "reuse"\n[reuse]\nmax_reused = {row}\n', encoding="utf-8")
        reuse.append(Variant(f"reuse, {row} in a row", {"acceleration": "regular"}, {"acceleration_file": path}))
    static = Variant("static plan", {"acceleration": "regular"}, {"acceleration_policy": "static"})
    even = [Variant(f"{steps} even steps", {"num_inference_steps": steps}) for steps in (15, 19)]
    return [
        Variant(EXACT),
        *merging,
        static,
        *reuse,
        *even,
        *formats(work),
        Variant("guide_scale 1", {"guide_scale": 1}),
        Variant("another seed", seed_offset=1000),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder: rows and strips, resumable")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", choices=("centre", "all"), default="centre")
    parser.add_argument("--variants", nargs="+", help="only these labels")
    parser.add_argument("--share", default="0/1", help="which share of the clips, as INDEX/COUNT")
    parser.add_argument("--page", type=Path, help="write the page from all rows there are and stop")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    arguments = {"resolution": "480p", "aspect_ratio": "16:9", "guide_scale": 5}
    study = Study(load_settings(model="tiny", device="cpu"), arguments, options.work)
    if options.page:
        world = ", ".join(f"{name} {value}" for name, value in describe(torch.device("cpu")).items() if value)
        write_page(study, options.page, "What each approximation costs", f"{WORDS}\nWorld: {world}.")
        return
    wanted = [v for v in variants(options.work) if options.variants is None or v.label in options.variants]
    index, count = map(int, options.share.split("/"))
    chosen = list(clips(options.clips))[index::count]
    cells = CELLS if options.cells == "all" else (CENTRE,)
    for row in study.run(chosen, wanted, cells, range(1, options.seeds + 1)):
        print(row["clip"], row["seed"], row["cell"], row["variant"], row["calls"], row["seconds"], row["psnr_to_exact"])


if __name__ == "__main__":
    main()
