"""`wan-local tune`: try the kernels' launches on this card and remember the fastest; a minute or two, once."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from wan_local.cli.flags import add_place_flags, settings_from
from wan_local.cli.terminal import DONE

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "tune", help="try the kernels' launches on this card and remember the fastest",
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.set_defaults(run=_tune)
    add_place_flags(parser.add_argument_group("where"))


def _tune(options: argparse.Namespace) -> int:
    from wan_local.device import resolve_device
    from wan_local.doctor import launches_tried, remember_launches

    device = resolve_device(settings_from(vars(options)).device)
    for _, of_op in itertools.groupby(launches_tried(device), lambda entry: (entry.op, entry.shape_class)):
        tried = []
        for entry in of_op:
            tried.append(entry)
            at = entry.launch
            tile = f"{at.block_m}x{at.block_n}x{at.block_k}, {at.num_warps} warps, {at.num_stages} stages"
            time = "does not fit, or is wrong" if entry.seconds is None else f"{entry.seconds * 1e3:.2f} ms"
            print(f"{entry.op:15} {entry.shape_class:6} {tile:36} {time}")
        file = remember_launches(tried, device)  # now: the next op may fail or be stopped
    print(f"Remembered in {file}; delete that file to go back to the table.")
    return DONE
