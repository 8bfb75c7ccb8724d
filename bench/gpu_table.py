"""What a card measured of the kernels, as tables: from the rows of `bench.gpu` into kernels/README.md.

python -m bench.gpu_table [--write] [FILE ...]      unless named, the files are bench/results/gpu*.jsonl

Of each thing measured on a card the last row counts. What failed or was left out is said, not hidden.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.world import RESULTS

README = Path(__file__).parents[1] / "kernels" / "README.md"
BEGIN, END = "<!-- measured on cards: python -m bench.gpu_table --write -->", "<!-- end of measured on cards -->"
NOTHING = (
    "**No card has run any of this yet.** What is known comes from a CPU: every kernel computes its formula in\n"
    "Triton's interpreter, and compiles for sm_86, sm_89, sm_90 and sm_120 without spilling in its hot loop."
)
STAGES = ("kernels", "kernel_speed", "int8_step")
PATHS = {"own": "own", "consumer": "consumer cards'"}

Row = dict[str, Any]


def read_rows(files: Iterable[Path]) -> list[Row]:
    """Return the rows about kernels, a later file's and a later line's last."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    return [row for row in rows if row.get("stage") in STAGES]


def text(rows: Sequence[Row]) -> str:
    """Return Markdown for each card that has rows; without rows, that there are none."""
    devices = dict.fromkeys(row["world"]["device"] for row in rows)
    parts = [_of_card([row for row in rows if row["world"]["device"] == device]) for device in devices]
    return "\n\n".join(parts) or NOTHING


def _of_card(rows: Sequence[Row]) -> str:
    world = rows[-1]["world"]
    head = (
        f"**{world['device']}** ({world.get('capability')}, driver {world.get('driver')}, torch {world['torch']}, "
        f"triton {world.get('triton')}, commit {world['commit']}; rows in `bench/results/`). Of Hopper's two ways to "
        'multiply, "own" is wgmma, and "consumer" is the mma.sync that the other cards have (`DISABLE_MMA_V3=1`).'
    )
    by_stage = {stage: [row for row in rows if row["stage"] == stage] for stage in STAGES}
    speeds = _last(by_stage["kernel_speed"], "path", "op", "shape", "tokens")
    parts = [head, _checked(by_stage["kernels"]), _attention(speeds), _linears(speeds), _fusions(speeds),
             _steps(by_stage["int8_step"]), _launches(speeds), _missing(speeds)]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _last(rows: Iterable[Row], *keys: str) -> list[Row]:
    """Return the last row of each combination of keys, in the order in which they were first met."""
    return list({json.dumps([row.get(key) for key in keys] + [row.get("launch")]): row for row in rows}.values())


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body]) if body else ""


def _checked(rows: Sequence[Row]) -> str:
    """Return how many ops are right on each path, and the worst of them."""
    lines = []
    for row in _last(rows, "path"):
        errors, failed = row["errors"], row["failed"]
        right = [op for op, error in errors.items() if error <= 1]
        worst = max(errors, key=lambda op: errors[op], default=None)
        wrong = [f"{op} ({error:.3g})" for op, error in errors.items() if not error <= 1] + list(failed)
        lines.append([
            PATHS[row["path"]], f"{len(right)} of {len(errors) + len(failed)}",
            "" if worst is None else f"`{worst}`: {errors[worst]:.2g}", ", ".join(wrong) or "none",
        ])  # fmt: skip
    return _table(
        ["matrix path", "checks right, against float64", "worst, of what is allowed", "wrong or failed"], lines
    )


def _attention(rows: Sequence[Row]) -> str:
    """Return TFLOPS (TOPS) of attention by length: ours on both paths beside torch's."""
    of_shape = _by_shape(rows, ("attention_int8", "torch sdpa"))
    columns = [
        ("int8 QK, fp16 PV", "own", "attention_int8, fp16 values"),
        ("int8 QK and PV", "own", "attention_int8, int8 values"),
        ("int8 QK, fp16 PV, consumer", "consumer", "attention_int8, fp16 values"),
        ("int8 QK and PV, consumer", "consumer", "attention_int8, int8 values"),
        ("torch, flash", "own", "torch sdpa, flash"),
        ("torch, cuDNN", "own", "torch sdpa, cudnn"),
    ]
    lines = [[f"{shape[0]:,}", *(_tera(found, path, op) for _, path, op in columns)] for shape, found in of_shape]
    return _table(["attention, TFLOPS by tokens", *(name for name, _, _ in columns)], lines)


def _linears(rows: Sequence[Row]) -> str:
    """Return TOPS of linears by shape, and ours as a share of torch's int8 product."""
    lines = []
    for shape, found in _by_shape(rows, ("linear_int8", "torch._int_mm", "torch bfloat16", "torch float32")):
        ours, theirs = (found.get(("own", op), {}).get("tera_a_second") for op in ("linear_int8", "torch._int_mm"))
        share = f"{ours / theirs:.0%}" if ours and theirs else ""
        bf16 = _tera(found, "own", "torch bfloat16") or _tera(found, "own", "torch float32")
        lines.append([
            " x ".join(f"{number:,}" for number in shape), _tera(found, "own", "linear_int8"),
            _tera(found, "consumer", "linear_int8"), _tera(found, "own", "torch._int_mm"), bf16, share,
        ])  # fmt: skip
    head = ["linear, TOPS: rows x outputs x inputs", "ours", "ours, consumer", "`_int_mm`", "bf16", "ours of `_int_mm`"]
    return _table(head, lines)


def _fusions(rows: Sequence[Row]) -> str:
    lines = [
        [f"`{row['op']}`", f"{row['tokens']:,}", f"{row['gigabytes_a_second']:,.0f}", f"{row['share_of_copy']:.0%}"]
        for row in rows
        if "share_of_copy" in row and row["path"] == "own"
    ]
    return _table(["fusion", "tokens", "GB/s", "of a copy"], lines)


def _steps(rows: Sequence[Row]) -> str:
    """Return seconds and peaks of one forward of all blocks, by size."""
    rows = _last((row for row in rows if "median_seconds" in row), "who", "size")
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    cells = {(row["who"], row["size"]): f"{row['median_seconds']:.2f} s, {_gib(row)}" for row in rows}
    lines = [
        [who, *(cells.get((who, size), "") for size in sizes)] for who in dict.fromkeys(row["who"] for row in rows)
    ]
    return _table(["one forward, 81 frames: seconds, peak", *sizes], lines)


def _gib(row: Row) -> str:
    return "no peak" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB"


def _launches(rows: Sequence[Row]) -> str:
    lines = [
        [PATHS[row["path"]], row["op"].removeprefix("tune "), "x".join(map(str, row["launch"])),
         "does not fit, or is wrong" if row["milliseconds"] is None else f"{row['milliseconds']:.2f} ms"]
        for row in rows
        if "launch" in row
    ]  # fmt: skip
    return _table(["matrix path", "kernel", "rows x columns x depth x warps x stages", "time"], lines)


def _missing(rows: Sequence[Row]) -> str:
    """Return what was left out or failed."""
    told = []
    for row in rows:
        if "skipped" in row or "failed" in row:
            shape = f" {row['shape']}" if "shape" in row else ""
            why = row.get("skipped") or row["failed"].strip().splitlines()[-1]
            told.append(f"- `{row['op']}`{shape}, {row['path']} path: {why}")
    return "\n".join(["Not measured:", *told]) if told else ""


def _by_shape(rows: Sequence[Row], ops: tuple[str, ...]) -> list[tuple[list[int], dict[tuple[str, str], Row]]]:
    """Return for each shape the rows of ops that begin so, by path and op."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        if "shape" in row and row["op"].startswith(ops):
            found.setdefault(json.dumps(row["shape"]), {})[row["path"], row["op"]] = row
    return [(json.loads(shape), of_shape) for shape, of_shape in found.items()]


def _tera(found: dict[tuple[str, str], Row], path: str, op: str) -> str:
    number = found.get((path, op), {}).get("tera_a_second")
    return "" if number is None else f"{number:.0f}"


def write(rows: Sequence[Row], readme: Path = README) -> None:
    """Put the tables between their marks."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{readme} has no marks {BEGIN} ... {END}"
    readme.write_text(f"{before}{BEGIN}\n{text(rows)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="into kernels/README.md, between its marks")
    options = parser.parse_args()
    rows = read_rows(
        options.files or [file for file in sorted(RESULTS.glob("gpu*.jsonl")) if "on_cpu" not in file.name]
    )
    if options.write:
        write(rows)
    else:
        print(text(rows))


if __name__ == "__main__":
    main()
