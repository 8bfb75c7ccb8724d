"""`wan-local convert`: turn weights in whatever files there are into a store that runs load from directly."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from wan_local.cli.terminal import DONE, INTERRUPTED, say
from wan_local.settings import LoraSetting
from wan_local.weight_format import WeightFormat, WeightFormats

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.convert import Progress

_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to overwrite a line on
_FORMATS = get_args(WeightFormat)


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "convert", help="turn weights into a store that loads directly; resumes, and never touches the source"
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("source", type=Path, metavar="SRC", help="a model's folder, or its transformer's file")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder of the store, which is not there yet")
    parser.add_argument("--format", choices=_FORMATS, required=True, help="of the transformer's block linears")
    encoders = parser.add_argument_group("the encoders")
    encoders.add_argument("--text-encoder-format", choices=_FORMATS, help="as --format, but int8 for int4")
    encoders.add_argument("--image-encoder-format", choices=_FORMATS, help="bf16 unless told")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--lora", action="append", default=[], type=LoraSetting.parse, metavar="FILE[:STRENGTH]",
        help="merge a LoRA into the transformer; can be given several times",
    )  # fmt: skip
    how.add_argument("--keep-edges", action="store_true", help="keep the first two and last three blocks in bf16")
    how.add_argument("--rotate", action="store_true", help="spread outliers over 64 inputs each, for int8 arithmetic")
    parts = parser.add_argument_group("parts that are not in or beside SRC")
    parts.add_argument("--text-encoder", type=Path, metavar="FILE")
    parts.add_argument("--image-encoder", type=Path, metavar="FILE")
    parts.add_argument("--vae", type=Path, metavar="FILE")
    parts.add_argument("--tokenizer", type=Path, metavar="DIR")


def _convert(options: argparse.Namespace) -> int:
    from wan_local.convert import Conversion, convert, is_complete, resolved
    from wan_local.lora import open_lora
    from wan_local.sources import open_source

    source = open_source(
        options.source,
        text_encoder=options.text_encoder,
        image_encoder=options.image_encoder,
        vae=options.vae,
        tokenizer=options.tokenizer,
    )
    say(f"{source.kind.name}, {sum(source.files.values()) / 1e9:.2f} GB in {len(source.files)} files")
    loras = [open_lora(lora.file.expanduser(), lora.strength, source.config) for lora in options.lora]
    for lora in loras:
        say(lora.report.describe())
    formats = WeightFormats.converted(
        options.format,
        text_encoder=options.text_encoder_format,
        image_encoder=options.image_encoder_format,
        keep_edges=options.keep_edges,
    )
    target = resolved(options.target)
    was_complete = is_complete(target)
    try:
        manifest = convert(Conversion(source, formats, options.rotate, loras), target, _Shown().show)
    except KeyboardInterrupt:
        say(f"\nStopped. What is written stays in {target.name}.part; the same command goes on from there.")
        return INTERRUPTED
    nbytes = sum(file.bytes for file in manifest.files.values())
    if was_complete:
        say("This store was there already, complete and made of the same files in the same way; nothing was done.")
    print(f"{target}: {manifest.model}, {nbytes / 1e9:.2f} GB, transformer {manifest.formats['transformer']}")
    return DONE


class _Shown:
    """Shows progress: one line that is overwritten on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal, self._last = sys.stderr.isatty(), time.monotonic()

    def show(self, progress: Progress) -> None:
        """Show how far it is, at a bearable rate."""
        ended, now = progress.done_bytes == progress.total_bytes, time.monotonic()
        if not ended and now - self._last < (0.2 if self._terminal else _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        left = "" if progress.eta_seconds is None else f", about {progress.eta_seconds:.0f} s left"
        line = (
            f"{progress.done_bytes / 1e9:.2f} of {progress.total_bytes / 1e9:.2f} GB read and written, "
            f"{progress.bytes_per_second / 1e9:.2f} GB/s{left}: {progress.file}"
        )
        print(f"\r{line[:118]:118}" if self._terminal else line, end="" if self._terminal and not ended else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
