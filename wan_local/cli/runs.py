"""`wan-local runs`: list the unfinished runs, or remove some."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from wan_local.cli.terminal import DONE, say
from wan_local.runs import Run, list_runs, remove, runs_folder
from wan_local.settings import load_settings

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands

_PROMPT_CHARACTERS = 40


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser("runs", help="list the unfinished runs that can be resumed, or remove some")
    parser.set_defaults(run=_runs)
    parser.add_argument("--remove", nargs="+", default=[], metavar="RUN", help="remove these runs, or `all`")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def _runs(options: argparse.Namespace) -> int:
    settings = load_settings()
    names = options.remove
    if names == ["all"]:
        names = [run.id for run in list_runs(settings) if run.state != "running"]
    for run_id in names:
        say(f"removed {run_id}, {_megabytes(remove(settings, run_id))}")
    if options.remove:
        return DONE
    found = list_runs(settings)
    if options.json:
        print(json.dumps([_as_dict(run) for run in found], indent=2))
        return DONE
    if not found:
        say(f"There are no unfinished runs in {runs_folder(settings)}.")
    for run in found:
        state = "running" if run.state == "running" else run.describe()
        prompt = str(run.about.get("request", {}).get("prompt", ""))[:_PROMPT_CHARACTERS]
        print(f"{run.id}  {_age(run):>9}  {_megabytes(run):>9}  {state}  {prompt!r}")
    return DONE


def _as_dict(run: Run) -> dict[str, object]:
    return {
        "id": run.id,
        "state": run.state,
        "model_calls": run.calls,
        "denoised": run.denoised,
        "bytes": run.file_bytes,
        "changed": run.changed,
        "output": run.about.get("output"),
        "prompt": run.about.get("request", {}).get("prompt"),
    }


def _age(run: Run) -> str:
    minutes = max(0, int(time.time() - run.changed)) // 60
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days"


def _megabytes(run: Run) -> str:
    return f"{run.file_bytes / 1e6:.1f} MB"
