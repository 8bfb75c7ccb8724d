"""`wan-local export`: write a store's transformer in optimum-quanto's own format, for use with diffusers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from wan_local.cli.terminal import DONE

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser("export", help="write a store's transformer in optimum-quanto's format, for diffusers")
    parser.set_defaults(run=_export)
    parser.add_argument("store", type=Path, metavar="STORE", help="a store in int8 or fp8, not rotated")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder to write, which is not there yet")


def _export(options: argparse.Namespace) -> int:
    from wan_local.checkpoint import open_model
    from wan_local.quanto import export_quanto

    target = options.target.expanduser().absolute()
    export_quanto(open_model(options.store.expanduser()), target)
    print(f"{target}: build WanTransformer3DModel from its config on the CPU, then optimum.quanto.requantize it with")
    print("diffusion_pytorch_model.safetensors and quanto_qmap.json")
    return DONE
