"""`wan-local resume`: finish a run that was stopped, failed or killed."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_local.cli.flags import add_kernel_flags, add_lora_flag, add_memory_flags, add_place_flags, settings_from
from wan_local.cli.generate import add_output_flags, follow
from wan_local.runs import settings_of

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "resume", help="finish a run that was stopped, failed or killed, from its last step",
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.set_defaults(run=_resume)
    parser.add_argument("run_id", metavar="RUN", help="its id, as `wan-local runs` lists it")
    local = parser.add_argument_group("where and how (as the run was begun unless told, here or by the environment)")
    add_place_flags(local)
    add_kernel_flags(local)
    add_lora_flag(local)
    add_memory_flags(local)
    add_output_flags(local, default="where it was to go")


def _resume(options: argparse.Namespace) -> int:
    from wan_local.pipeline import Pipeline

    given = vars(options)
    here, run_id = settings_from(given), given["run_id"]
    told = ("model", "device", "attention", "kernels", "loras", "vram_gibibytes", "ram_gibibytes")
    changes = {name: getattr(here, name) for name in told if name in given}
    settings = replace(settings_of(run_id, here), **changes)
    return follow(Pipeline(settings).resume(run_id, output=given.get("output")), run_id, settings, given)
