"""Convert at full size: how fast beside a plain copy, in how much memory, how long a store loads, and a run from it.

python -m bench.store --scratch FOLDER CASE...

Cases, each with random weights under the true names and shapes of FLF2V-14B; what was written is deleted at the end:
    bf16-to-int8        29 GB in shards, as in the diffusers repository, 35 of 40 blocks   (44 GB of disk)
    bf16-to-int4        33 GB in shards, all blocks                                        (44 GB)
    comfy-fp8-to-int8   16 GB in one file, as Comfy repacks it, all blocks                 (33 GB)
    run                 the whole model (UMT5-XXL, CLIP ViT-H and the VAE too) as an int8 store: loaded block by block
                        and read plainly; then two steps on a 32 x 32 canvas on the CPU with 5 GiB to use   (25 GB)
    generate            the latter again, from the store that `--keep` left

`--blocks 8` makes a model of as many blocks, which takes a minute and 11 GB. Speeds are of bytes read and written
together. The copy is `cp` of one or two of the source's files, then `sync`, before and after the conversion, which
syncs too: a disk that is lent may be fast for some seconds and slow then. Before each the source is put out of the page
cache. Converting needs more arithmetic than copying: on a machine that others use too compare the CPU seconds as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bench.random_model import TINY, Layout, random_source, write_random_part, write_tokenizer
from bench.world import append_row, describe
from wan_local.anatomy import part_shapes
from wan_local.block_reader import BlockReader
from wan_local.checkpoint import ModelFiles, PartTensors, open_model
from wan_local.convert import Conversion, Progress, convert
from wan_local.extent import read_extent
from wan_local.flat_block import FlatBlock
from wan_local.geometry import Canvas, Size
from wan_local.key_map import PARTS, Part
from wan_local.kinds import Kind, identify
from wan_local.models.transformer import Transformer, in_context
from wan_local.quantized_layers import hold_quantized
from wan_local.settings import ModelConfig, known_models, load_settings
from wan_local.sources import Source, open_part
from wan_local.weight_files import read_weights
from wan_local.weight_format import WeightFormat, WeightFormats

CPU = torch.device("cpu")
REAL, SMALL = known_models()


# layout, format, and how many of the 40 blocks, so that source and target need no more than 45 GB of disk together
_CASES: dict[str, tuple[Layout, WeightFormat, int]] = {
    "bf16-to-int8": ("diffusers", "int8", 35),
    "bf16-to-int4": ("diffusers", "int4", 40),
    "comfy-fp8-to-int8": ("comfy-fp8", "int8", 40),
}


def mixed(num_layers: int) -> ModelConfig:
    """Return the transformer as it is beside small parts: what a conversion costs is the transformer's bytes."""
    transformer = replace(REAL.transformer, num_layers=num_layers)
    return replace(SMALL, transformer=transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=(*_CASES, "run", "generate"))
    parser.add_argument("--scratch", type=Path, required=True, help="where there is room")
    parser.add_argument("--blocks", type=int, help="of the transformer that is converted, instead of the case's own")
    parser.add_argument("--keep", action="store_true", help="leave the store of `run` there for `generate`")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    for case in options.cases:
        if case in _CASES:
            layout, format_, blocks = _CASES[case]
            _conversion(options.scratch, case, layout, format_, options.blocks or blocks)
        elif case == "run":
            _store_and_run(options.scratch, keep=options.keep)
        else:
            _generate(options.scratch / "store")


def _conversion(scratch: Path, case: str, layout: Layout, format_: WeightFormat, blocks: int) -> None:
    """Write a source, copy some of it, convert all of it; each in a process of its own, so that peaks are its own."""
    source, target = scratch / "source", scratch / "target"
    with _removed(source, target, target.with_name("target.part")):
        for part in PARTS:
            write_random_part(source, part, mixed(blocks), layout)
        shutil.copytree(TINY / "tokenizer", source / "tokenizer")
        os.sync()
        files = sorted(source.rglob("*.safetensors"), key=lambda file: -file.stat().st_size)
        before = _copy(files, scratch / "copy")
        _forget(files)
        measured = _in_child("_convert_measured", str(source), str(target), format_, str(blocks))
        shutil.rmtree(target)  # room for the copy
        after = _copy(files, scratch / "copy")
        seconds = before["seconds"] + after["seconds"]
        ratio = measured["bytes_per_second"] * seconds / (before["bytes"] + after["bytes"])
        append_row(
            "store",
            {
                "case": case,
                "blocks": blocks,
                "copy_before": before,
                "convert": measured,
                "copy_after": after,
                "of_copy": round(ratio, 3),
                "world": describe(CPU),
            },
        )


def _copy(files: Sequence[Path], target: Path) -> dict[str, float]:
    """Copy one or two files, of 17 GB at most, with cp and sync; return bytes read and written a second."""
    chosen, total = [], 0
    for file in files:
        if total + file.stat().st_size <= 17 * 10**9 and len(chosen) < 2:
            chosen.append(file)
            total += file.stat().st_size
    _forget(chosen)
    with _removed(target):
        target.mkdir()
        started = time.monotonic()
        cpu = _cpu_seconds(resource.RUSAGE_CHILDREN)
        subprocess.run(["cp", *map(str, chosen), str(target)], check=True)
        plain = time.monotonic() - started
        subprocess.run(["sync"], check=True)
        seconds = time.monotonic() - started
    cpu = _cpu_seconds(resource.RUSAGE_CHILDREN) - cpu
    return {
        "cpu_seconds": round(cpu, 1),
        "bytes": 2 * total, "seconds": round(seconds, 1), "bytes_per_second": round(2 * total / seconds),
        "without_sync_bytes_per_second": round(2 * total / plain),
    }  # fmt: skip


def _convert_measured(source: str, target: str, format_: str, blocks: str) -> dict[str, float]:
    opened = _mixed_source(Path(source), mixed(int(blocks)))
    last: list[Progress] = []
    started = time.monotonic()
    convert(
        Conversion(opened, WeightFormats(cast(Any, format_))),
        Path(target),
        lambda progress: last.__setitem__(slice(None), [progress]),
    )
    seconds = time.monotonic() - started
    return {
        "bytes": last[0].done_bytes, "seconds": round(seconds, 1),
        "bytes_per_second": round(last[0].done_bytes / seconds), "peak_rss": _peak(),
        "cpu_seconds": round(_cpu_seconds(resource.RUSAGE_SELF), 1), "load_average": os.getloadavg()[0],
    }  # fmt: skip


def _mixed_source(folder: Path, config: ModelConfig) -> Source:
    if (folder / "transformer").is_dir():
        return random_source(folder, config)
    weights = {part: read_weights(folder / part) for part in PARTS if part != "transformer"}
    weights["transformer"] = read_weights(next(folder.glob("*.safetensors")))
    dialects = {"transformer": "official", "vae": "diffusers"}
    kinds = {
        part: Kind(part, f"random {part}", usable=True, dialect=dialects.get(part, "transformers"), config=config)
        for part in PARTS
    }
    kinds["transformer"] = identify(weights["transformer"].tensors)
    tensors = {part: open_part(part, weights[part], kinds[part], config) for part in PARTS}
    return Source(config, kinds, weights, tensors, folder / "tokenizer")


def _store_and_run(scratch: Path, *, keep: bool) -> None:
    """Make an int8 store of the whole model from noise that is on no disk; time loading, and run from it."""
    target = scratch / "store"
    with _removed(scratch / "tokenizer"), contextlib.nullcontext() if keep else _removed(target):
        made = _in_child("_make_whole", str(target))
        loaded = _in_child("_load_measured", str(target))
        append_row("store", {"case": "load", "made": made, "load": loaded, "world": describe(CPU)})
        _generate(target)


def _generate(store: Path) -> None:
    ran = _in_child("_generate_measured", str(store))
    nbytes = sum(file.stat().st_size for file in store.rglob("*.safetensors"))
    row = {"case": "generate, 2 steps, 32x32x81, int8 store on CPU, 5 GiB", "store_bytes": nbytes, "run": ran}
    append_row("store", {**row, "world": describe(CPU)})


def _noise() -> Tensor:
    return (torch.randn(2**25 + 77) * 0.02).bfloat16()


@dataclass(frozen=True)
class _Noise(Mapping[str, Tensor]):
    """Tensors of a part out of nothing: views of one block of noise."""

    shapes: Mapping[str, tuple[int, ...]]
    noise: Tensor = field(default_factory=_noise)

    def row_range(self, name: str, start: int, stop: int) -> Tensor:
        shape = (stop - start, *self.shapes[name][1:])
        numbers = int(torch.Size(shape).numel())
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        begin = (start * 7919) % max(1, self.noise.numel() - numbers)
        return self.noise[begin : begin + numbers].view(shape)

    def __getitem__(self, name: str) -> Tensor:
        return self.row_range(name, 0, self.shapes[name][0])

    def dtype_of(self, _: str) -> torch.dtype:
        return torch.bfloat16

    def nbytes(self, _: str) -> int:
        return 0  # of no file

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class _NoiseSource:
    """As `Source`, of noise."""

    config: ModelConfig
    tensors: Mapping[Part, _Noise]
    tokenizer_folder: Path
    kind: Kind
    files: Mapping[Path, int] = field(default_factory=dict)

    def part(self, part: Part) -> _Noise:
        return self.tensors[part]


def _make_whole(target: str) -> dict[str, float]:
    tensors = {part: _Noise(part_shapes(part, REAL)) for part in PARTS}
    tokenizer = write_tokenizer(Path(target).with_name("tokenizer"), REAL)
    source = _NoiseSource(REAL, tensors, tokenizer, Kind("transformer", "noise", usable=True, config=REAL))
    started = time.monotonic()
    manifest = convert(Conversion(cast(Any, source), WeightFormats("int8", "int8")), Path(target))
    nbytes = sum(file.bytes for file in manifest.files.values())
    return {"store_bytes": nbytes, "seconds": round(time.monotonic() - started, 1), "peak_rss": _peak()}


def _load_measured(store: str) -> dict[str, Any]:
    """Read the loop's file plainly, and block by block as a run does; three times each, in turn, from the disk."""
    files = open_model(Path(store))
    loop = Path(store) / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    plain, blocks = [], []
    for _ in range(3):
        plain.append(_timed(loop, lambda: _read_plainly(loop)))
        blocks.append(_timed(loop, lambda: _read_blocks(files)))
    return {
        "bytes": loop.stat().st_size, "plain_seconds": sorted(plain), "blocks_seconds": sorted(blocks),
        "ratio": round(sorted(blocks)[1] / sorted(plain)[1], 3), "peak_rss": _peak(),
    }  # fmt: skip


def _timed(file: Path, work: Any) -> float:
    _forget([file])
    started = time.monotonic()
    work()
    return round(time.monotonic() - started, 2)


def _read_plainly(file: Path) -> None:
    buffer, size = torch.empty(2**28, dtype=torch.uint8), file.stat().st_size
    for offset in range(0, size, buffer.nbytes):
        read_extent(file, offset, buffer[: min(buffer.nbytes, size - offset)])


def _read_blocks(files: ModelFiles) -> None:
    """Bring every block into one buffer, laid out as on a card that computes in bfloat16."""
    tensors = PartTensors(files, "transformer", lambda name: not in_context(name))
    with torch.device("meta"):
        network = Transformer(files.config.transformer)
    hold_quantized(network, files, "transformer", tensors, "w8a8")
    reader, flat = BlockReader(tensors, "blocks"), torch.empty(0, dtype=torch.uint8)
    for index, block in enumerate(network.blocks):  # type: ignore[arg-type]
        layout = FlatBlock(
            block, lambda name: tensors.dtype_of(f"blocks.0.{name}"), lambda name, i=index: reader.order(i, name)
        )
        if flat.nbytes < layout.nbytes:
            flat = torch.empty(layout.nbytes, dtype=torch.uint8)
        reader.fill(index, layout.views(flat))


def _generate_measured(store: str) -> dict[str, Any]:
    """Run the pipeline on a canvas of 32 x 32 pixels, as if 5 GiB were free."""
    from PIL import Image

    from wan_local import preparation
    from wan_local.pipeline import Pipeline
    from wan_local.request import Request, Result

    files = open_model(Path(store))
    canvas = Canvas(32 * 32, dict.fromkeys(("16:9", "1:1", "9:16"), Size(height=32, width=32)))
    small = replace(files, config=replace(files.config, canvases={"480p": canvas, "720p": canvas}))
    cast(Any, preparation).find_model = lambda _: small
    request = Request.from_arguments(
        {
            "prompt": "a small blue bird", "start_image_url": Image.new("RGB", (64, 64), "red"),
            "end_image_url": Image.new("RGB", (64, 64), "blue"), "resolution": "480p", "aspect_ratio": "1:1",
            "num_inference_steps": 2, "acceleration": "none", "seed": 1,
        }
    )  # fmt: skip
    base, started = _now(), time.monotonic()
    output = Path(store).with_name("generated.mp4")
    settings = load_settings(model=store, device="cpu", ram_gibibytes=5)
    for event in Pipeline(settings).generate(request, output=output):
        if isinstance(event, Result):
            report = event.report
        else:
            print(event.stage, event.index, event.message, file=sys.stderr, flush=True)
    for file in output.parent.glob("generated.mp4*"):
        file.unlink()
    return {
        "seconds": round(time.monotonic() - started, 1), "rss_before": base,
        "peak_rss": max(_peak(), *report["peak_bytes"].values()),  # each stage begins the kernel's count anew
        "planned": report["planned_peak_bytes"], "peak_by_stage": report["peak_bytes"],
        "stage_seconds": report["seconds"],
    }  # fmt: skip


def _in_child(name: str, *arguments: str) -> dict[str, Any]:
    """Run a function of this module in a process of its own and return what it returns."""
    code = f"import json, sys; from bench import store; print(json.dumps(store.{name}(*sys.argv[1:])))"
    ended = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    import json

    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def _removed(*folders: Path) -> Iterator[None]:
    """Delete folders before and after."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _forget(files: Sequence[Path]) -> None:
    """Put files out of the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now() -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith("VmRSS:")).split()[1]) * 1024


if __name__ == "__main__":
    main()
