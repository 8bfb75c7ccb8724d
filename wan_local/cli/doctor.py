"""`wan-local doctor`: what this machine can compute with, whether it computes right, and on a card how fast."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wan_local.cli.flags import add_place_flags, settings_from
from wan_local.cli.terminal import DONE, FAILED, say

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.doctor import KernelReport


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "doctor", help="list attention backends with reasons, check every kernel, and on a card time it",
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.set_defaults(run=_doctor)
    add_place_flags(parser.add_argument_group("where"))


def _doctor(options: argparse.Namespace) -> int:
    from wan_local import expander, safety
    from wan_local.device import resolve_device
    from wan_local.doctor import (
        backend_reports,
        kernel_reports,
        launches_problem,
        line_to_paste,
        triton_problem,
        world,
    )

    settings = settings_from(vars(options))
    device = resolve_device(settings.device)
    print(", ".join(f"{name} {value}" for name, value in world(device).items() if value is not None))
    print("\nattention backends, heads of 128 channels (* is what `auto` takes)")
    for backend in backend_reports(device, settings):
        mark = "*" if backend.chosen else " "
        print(f" {mark} {backend.name:9} {'runs' if backend.runs else 'no':5} {backend.reason}")
    print(f"\nsafety checker: {safety.describe(settings)}")
    print(f"prompt expansion: {expander.describe(settings)}")
    on_card = device.type == "cuda"
    print("\nkernels" if on_card else "\nkernels: their references; on a CPU nothing is timed")
    if problem := launches_problem():
        print(f"   tuned launches: {problem}")
    if problem := triton_problem(device):
        print(f"   Triton: {problem}")
    reports = []
    for report in kernel_reports(device):
        reports.append(report)
        print(_row(report))
    wrong = [report.name for report in reports if not report.error <= 1 and not report.of_torch]
    if on_card:
        print("\nTo tell us what your card does, paste this line into an issue:")
        print(line_to_paste(device, reports))
    if wrong:
        say(f"These fail or are wrong here: {', '.join(wrong)}. Use attention='sdpa' and kernels='off', and tell us.")
    return FAILED if wrong else DONE


def _row(report: KernelReport) -> str:
    if report.problem:
        return f"   {report.name:38} FAILED {report.problem}"
    verdict = "right" if report.error <= 1 else "WRONG"
    speed = ""
    if report.milliseconds is not None:
        speed = f"  {report.milliseconds:8.3f} ms  {report.rate:>10}"
    if report.share is not None and report.share == report.share:  # NaN: its ceiling could not be measured
        speed += f"  {report.share:5.0%} of the ceiling"
    if report.of_torch:
        return f"   {report.name:38} the ceiling{speed}"
    return f"   {report.name:38} {verdict} ({report.error:.2g} of what is allowed){speed}"
