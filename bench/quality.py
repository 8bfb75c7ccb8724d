"""The quality table of the embedded model: what each approximation saves and costs, to the exact run and to the truth.

python -m bench.quality --work DIR [--cells all] [--device cuda:0] [--processes 16] [--seconds 180]
python -m bench.quality --work DIR --page docs/quality        writes tables, plots and contact sheets of what there is

Unseen clips with their true videos, 112x64 pixels and 81 frames, guide_scale 5. The centre cell (30 steps, shift 5)
comes first: every variant on --clips clips with --seeds seeds. With --cells all the other cells follow, on
--other-clips clips with one seed. Every row is kept in DIR as it comes: a stopped run goes on where it was, and the
page says what it is made of. On a card the exact run is float32 as well, without TF32.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.tiny_model.photos import held_out_photos
from bench.tiny_model.render import clip
from bench.tiny_model.train import DEFAULT_FOLDER as TINY_FOLDER
from bench.world import describe
from wan_kernels.attention_int8 import attention_int8_reference
from wan_kernels.quantize_rows import quantize_rows_reference
from wan_kernels.rms_rope import quantize_keys_reference
from wan_kernels.values import quantize_values_reference, scale_values_reference
from wan_local.attention import Function, KernelChoice
from wan_local.convert import Conversion, convert
from wan_local.preparation import Job
from wan_local.preview import to_uint8
from wan_local.quality.decision import section
from wan_local.quality.making import Maker
from wan_local.quality.metrics import Row
from wan_local.quality.page import write_page
from wan_local.quality.protocol import Study
from wan_local.quality.shelf import Shelf
from wan_local.quality.subject import EXACT, Cell, Clip, Unit, Variant
from wan_local.settings import AttentionName, load_settings
from wan_local.sources import open_source
from wan_local.weight_format import Int8Arithmetic, WeightFormat, WeightFormats

UNSEEN_SEED = 9 * 10**6
WIDTH, HEIGHT, FRAMES = 112, 64, 81
WORLD = "world.txt"
SHOWN = 3  # clips whose frames are on the contact sheets
CENTRE = Cell(30, 5.0)
CELLS = (CENTRE, *(Cell(n, shift) for n in (20, 30, 40) for shift in (3.0, 5.0, 10.0) if (n, shift) != (30, 5.0)))
TAUS = (0.03, 0.05, 0.1)
WORDS = """\
Made by `python -m bench.quality` on the embedded tiny model: unseen clips at 112x64, 81 frames, guide_scale 5, float32
but where a variant says otherwise. int8 attention is by the kernels' references: its rounding, not its speed. Another
seed is the yardstick: what is nearer to the exact run than that changes less than chance does. PSNR to the truth is a
floor and no ranking: fewer steps draw a mean, which blurs and scores more. Seconds are of denoising, where several runs
share the device; calls are what a large model's time goes by. How these figures carry over to the 14B model is not
known; `wan-local bench quality` measures it on your weights.
"""


@functools.cache
def unseen(seed: int) -> Clip:
    video, caption = clip(seed, held_out_photos(), WIDTH, HEIGHT, torch.linspace(0, 1, FRAMES))
    frames = to_uint8(video)
    return Clip(str(seed), Image.fromarray(frames[0]), Image.fromarray(frames[-1]), caption, np.asarray(frames))


def wanted(options: argparse.Namespace) -> Iterator[Unit]:
    """Yield the units of this process: the centre cell's, then few of each other cell."""
    index, count = map(int, options.share.split("/"))
    names = range(UNSEEN_SEED, UNSEEN_SEED + options.clips)
    places = [(CENTRE, seed, name) for seed in range(1, options.seeds + 1) for name in names]
    if options.cells == "all":
        places += [(cell, 1, name) for cell in CELLS[1:] for name in names[: options.other_clips]]
    for cell, seed, name in places[index::count]:
        yield Unit(cell, unseen(name), seed, shown=cell == CENTRE and seed == 1 and name < UNSEEN_SEED + SHOWN)


@dataclass(frozen=True, slots=True)
class ReferenceKernels(KernelChoice):
    """int8 attention by the kernels' references on every device: the same rounding, and nothing to compile."""

    @property
    def function(self) -> Function:
        return functools.partial(int8_attention, int8_values=self.attention == "int8_pv")


def int8_attention(q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, *, int8_values: bool) -> Tensor:
    q8, q_scale = quantize_rows_reference(q_BLHK.transpose(1, 2).contiguous(), rotate=False)
    k8, k_scale = quantize_keys_reference(k_BMHK.float(), k_BMHK.mean(dim=1, dtype=torch.float32))
    values = quantize_values_reference(v_BMHK) if int8_values else (*scale_values_reference(v_BMHK), None)
    return attention_int8_reference(q8, q_scale, k8, k_scale, *values).to(v_BMHK.dtype)


def with_int8_attention(job: Job, attention: AttentionName) -> Job:
    return replace(job, kernels=ReferenceKernels(attention, reason="the kernels' references"))


def in_float32(job: Job) -> Job:
    return replace(job, dtype=torch.float32)


def in_bfloat16(job: Job) -> Job:
    return replace(job, dtype=torch.bfloat16)


def with_int8_inputs(job: Job) -> Job:
    return with_arithmetic(job, "w8a8")


def with_arithmetic(job: Job, arithmetic: Int8Arithmetic) -> Job:
    """Return the job with its loop's int8 weights used by `arithmetic`; what runs once is weight-only in every run."""
    loop = replace(job.plan.stage("denoise"), int8_arithmetic=arithmetic)
    stages = tuple(loop if stage.name == loop.name else stage for stage in job.plan.stages)
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
        Variant("int8 weights", {}, int8, edit=functools.partial(with_arithmetic, arithmetic="weight-only")),
        Variant("int8 weights and inputs", {}, int8, edit=with_int8_inputs),
        Variant("int8 weights and inputs, rotated", {}, rotated, edit=with_int8_inputs),
        Variant("fp8 weights", {}, {"model": store(work, "fp8")}),
        Variant("int4 weights", {}, {"model": store(work, "int4")}),
        Variant("int8 attention, QK", edit=functools.partial(with_int8_attention, attention="int8")),
        Variant("int8 attention, QK and PV", edit=functools.partial(with_int8_attention, attention="int8_pv")),
        Variant("regular and int8 weights and inputs", regular, int8, edit=with_int8_inputs),
    ]


def thresholds(path: Path, text: str) -> Path:
    """Return a file of thresholds; one that is there is left alone, since other processes read it."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def variants(work: Path) -> list[Variant]:
    """Return everything that is compared, the exact run first."""
    merging = []
    for tau in TAUS:
        path = thresholds(work / f"tau_{tau:g}.toml", f"[merge]\ntau = {tau}\n")
        merging.append(Variant(f"regular, tau {tau:g}", {"acceleration": "regular"}, {"acceleration_file": path}))
    reuse = []
    for row in (1, 2):  # one in a row takes about as many calls as merging does
        text = f'[regular]\npolicy = "reuse"\n[reuse]\nmax_reused = {row}\n'
        path = thresholds(work / f"reuse_{row}.toml", text)
        reuse.append(Variant(f"reuse, {row} in a row", {"acceleration": "regular"}, {"acceleration_file": path}))
    static = Variant("static plan", {"acceleration": "regular"}, {"acceleration_policy": "static"})
    even = [Variant(f"{steps} even steps", {"num_inference_steps": steps}) for steps in (15, 19, 24)]
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


def fill(options: argparse.Namespace, study: Study) -> None:
    """Measure this process's share."""
    if options.processes > 1:
        cv2.setNumThreads(1)
    if options.share.startswith("0/"):
        world = ", ".join(f"{name} {value}" for name, value in describe(torch.device(options.device)).items() if value)
        path = options.work / WORLD  # a line for every world that rows were made in
        known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        lines = dict.fromkeys([*known, f"{world}, {options.at_once} runs at once"])
        path.write_text("\n".join(lines), encoding="utf-8")
    compared = [v for v in variants(options.work) if options.variants is None or v.label in options.variants]
    deadline = math.inf if options.until is None else options.until - time.time() + time.monotonic()
    for row in study.run(wanted(options), compared, deadline=deadline):
        words = (row["clip"], row["seed"], row["cell"], row["variant"], row["calls"], row["seconds"])
        print(*words, row["psnr_to_exact"], flush=True)


def fill_together(options: argparse.Namespace, arguments: list[str]) -> int:
    """Share the work among processes; return how many of them failed."""
    variants(options.work)  # makes the stores, once
    deadline = [] if options.until is None else ["--until", str(options.until)]
    command = [sys.executable, "-m", "bench.quality", *arguments, *deadline, "--share"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, f"{index}/{options.processes}"], env=environment)
        for index in range(options.processes)
    ]
    return sum(worker.wait() != 0 for worker in workers)


def in_order(options: argparse.Namespace) -> Callable[[Row], Any]:
    """Return the key that rows are sorted by: cell, variant's place, clip, seed."""
    cells = {cell.name: place for place, cell in enumerate(CELLS)}
    labels = {variant.label: place for place, variant in enumerate(variants(options.work))}
    return lambda row: (cells[row["cell"]], labels.get(row["variant"], len(labels)), row["clip"], row["seed"])


def extent(rows: Sequence[Row]) -> str:
    """Return in words of how many clips and seeds the rows of each cell are."""
    groups: dict[str, list[str]] = {}
    for cell in dict.fromkeys(row["cell"] for row in rows):
        clips, seeds = (len({row[kind] for row in rows if row["cell"] == cell}) for kind in ("clip", "seed"))
        words = f"{clips} clip{'s' * (clips > 1)} with {f'up to {seeds} seeds' if seeds > 1 else '1 seed'}"
        groups.setdefault(words, []).append(cell)
    parts = [
        f"{words} at {cells[0]}" if len(cells) == 1 else f"{words} in each of {len(cells)} other cells"
        for words, cells in groups.items()
    ]
    return f'There are {"; ".join(parts)}. "runs" says of how many of them a row is.'


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="scratch folder: rows and strips, resumable")
    made.add_argument("--clips", type=int, default=24)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--cells", choices=("centre", "all"), default="centre")
    made.add_argument("--other-clips", type=int, default=8, help="clips in each cell but the centre")
    made.add_argument("--variants", nargs="+", help="only these labels")
    made.add_argument("--device", default="cpu")
    made.add_argument("--processes", type=int, default=1)
    made.add_argument("--at-once", type=int, default=1, help="runs of a process that go as one batch: for a card")
    made.add_argument("--seconds", type=float, help="begin no run after so long; what was measured is kept")
    made.add_argument("--page", type=Path, help="write the page from all rows there are and stop")
    made.add_argument("--share", help=argparse.SUPPRESS)  # which of the units, INDEX/COUNT
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)  # the deadline, of time.time
    return made


def main() -> None:
    options = parser().parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.until is None and options.seconds is not None:
        options.until = time.time() + options.seconds
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    arguments = {"resolution": "480p", "aspect_ratio": "16:9", "guide_scale": 5}
    settings = load_settings(
        model="tiny", device=options.device, attention="sdpa", kernels="off", cache_dir=options.work / "encodings"
    )
    settings = replace(settings, acceleration_policy=None, acceleration_file=None)  # the environment's would be in all
    maker = Maker(settings, arguments, options.work, edit=in_float32, shelf=Shelf())
    study = Study(maker, options.work, at_once=options.at_once)
    if options.page:
        world = "; ".join((options.work / WORLD).read_text(encoding="utf-8").split("\n"))
        words = f"{WORDS}\n{extent(study.rows())}\n\nMeasured on: {world}."
        write_page(study, options.page, "What each approximation costs", words, verdict=section)
        return
    if options.share is None and options.processes > 1:
        failed = fill_together(options, sys.argv[1:])
    else:
        options.share, failed = options.share or "0/1", 0
        fill(options, study)
        if options.processes > 1:
            return
    study.sort(in_order(options))
    if failed:
        sys.exit(f"{failed} of {options.processes} processes failed; what they measured before is kept")


if __name__ == "__main__":
    main()
