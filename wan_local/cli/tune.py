"""`wan-local tune`: try the kernels' launches on this card and remember the fastest; a minute or two, once."""

from __future__ import annotations

import argparse
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
    tried = []
    for entry in launches_tried(device):
        tried.append(entry)
        launch = entry.launch
        tile = (
            f"{launch.block_m}x{launch.block_n}x{launch.block_k}, {launch.num_warps} warps, {launch.num_stages} stages"
        )
        time = "does not fit, or is wrong" if entry.seconds is None else f"{entry.seconds * 1e3:.2f} ms"
        print(f"{entry.op:15} {entry.shape_class:6} {tile:36} {time}")
    print(f"Remembered in {remember_launches(tried, device)}; delete that file to go back to the table.")
    return DONE
