"""`wan-local inspect`: what a file or folder of weights is, by its headers. Reads no weights, needs no card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from wan_local.cli.terminal import DONE, FAILED, say
from wan_local.errors import WrongModel

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.inspection import Inspection, PartReport


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser("inspect", help="say what a file or folder of weights is, by its headers alone")
    parser.set_defaults(run=_inspect)
    parser.add_argument("path", type=Path, metavar="PATH", help="a file, or a folder in any layout")
    parser.add_argument(
        "--verify", action="store_true", help="read a store's files in full and compare them with its manifest"
    )
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")


def _inspect(options: argparse.Namespace) -> int:
    from wan_local.inspection import inspect

    found = inspect(options.path.expanduser())
    if options.verify:
        _verify(options.path.expanduser())
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _describe(found)
    return DONE if found.usable else FAILED


def _verify(folder: Path) -> None:
    """Raise CorruptModel where a store's files are not what was written."""
    from wan_local.manifest import read_manifest, verify

    manifest = read_manifest(folder)
    if manifest is None:
        raise WrongModel(f"{str(folder)!r} is no store, so nothing can be verified; convert it first.")
    say(f"reading {sum(file.bytes for file in manifest.files.values()) / 1e9:.2f} GB")
    verify(folder, manifest)
    say(f"every file is what {manifest.creator} wrote")


def _describe(found: Inspection) -> None:
    print(f"{found.path}: {found.layout}, {_gigabytes(found.nbytes)}")
    for part in found.parts:
        _describe_part(part)
    for name, where in found.missing.items():
        print(f"  missing: {name}. {where}")


def _describe_part(part: PartReport) -> None:
    kind = part.kind
    words = [kind.name, *([kind.what] if kind.task and kind.part == "transformer" else [])]
    words += [f"{kind.layers} blocks"] if kind.layers else []
    words += [f"{kind.dialect} names"] if kind.dialect else []
    print(f"  {kind.part}: {', '.join(words)}")
    dtypes = ", ".join(f"{dtype} {_gigabytes(count)}" for dtype, count in part.dtypes.items())
    files = f"{part.files} files" if part.files > 1 else part.path.name
    numbers = f"{_count(part.parameters)} numbers, {dtypes}; quantization: {part.quantization}"
    print(f"    {files}: {numbers if dtypes else _gigabytes(part.nbytes)}")
    if part.once_bytes:
        print(
            f"    {_gigabytes(part.nbytes - part.once_bytes)} of it is needed in the denoising loop, "
            f"{_gigabytes(part.once_bytes)} once before it"
        )
    for note in kind.notes:
        print(f"    note: {note}")
    if part.problem:
        print(f"    not usable: {part.problem}")
    elif not kind.usable:
        print(f"    not usable here. {kind.advice}")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"
