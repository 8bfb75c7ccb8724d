"""`wan-local download`: the weights, from the Hugging Face hub. The only command that needs a network."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wan_local.cli.terminal import DONE, WRONG_REQUEST, say

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.hub import DownloadConfig, DownloadPlan


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    from wan_local.hub import load_downloads
    from wan_local.settings import load_expansion_config

    known, expanders = load_downloads(), load_expansion_config().models
    parser = commands.add_parser("download", help="fetch the weights of the 14B model; the only command with a network")
    parser.set_defaults(run=_download)
    sizes = ", ".join(f"{name} ({config.gigabytes} GB)" for name, config in known.items())
    parser.add_argument("--format", choices=list(known), default="diffusers", help=f"which files: {sizes}")
    writers = ", ".join(f"{model.folder_name} ({model.download_gigabytes} GB)" for model in expanders)
    parser.add_argument(
        "--expansion", nargs="?", const=expanders[0].folder_name, choices=[model.folder_name for model in expanders],
        metavar="MODEL", help=f"instead, a language model for prompt expansion: {writers}; the first unless named",
    )  # fmt: skip
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="into this folder; unless told, where a run looks for it"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before it begins")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and fetch nothing")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def _download(options: argparse.Namespace) -> int:
    from wan_local.hub import FaceHub, load_downloads, plan_download, run_download
    from wan_local.settings import load_settings

    config = _expansion_model(options.expansion) if options.expansion else load_downloads()[options.format]
    hub, folder = FaceHub(), options.expansion or _folder(options.format)
    target = options.to.expanduser().absolute() if options.to else load_settings().models_dir / folder
    plan = plan_download(config, target, hub)
    _describe(plan, as_json=options.json)
    if options.dry_run:
        return DONE
    if not options.yes and not _agreed():
        return WRONG_REQUEST
    run_download(plan, hub, say)
    say(f"All {len(plan.files)} files are there, verified by their hashes.")
    say(_use_for_expansion(target) if options.expansion else _next_step(config, target))
    print(target)
    return DONE


def _expansion_model(name: str) -> DownloadConfig:
    """Return what to fetch of a language model: its weights, its configuration and its tokenizer."""
    from wan_local.hub import DownloadConfig, DownloadSource
    from wan_local.settings import load_expansion_config

    model = next(model for model in load_expansion_config().models if model.folder_name == name)
    source = DownloadSource(model.repository, ("*.safetensors", "*.json"))
    return DownloadConfig(f"{name} ({model.licence}), for prompt expansion", model.download_gigabytes, True, (source,))


def _use_for_expansion(target: Path) -> str:
    from wan_local.settings import load_settings

    if target.parent == load_settings().models_dir:
        return "It is used where --enable-prompt-expansion is given."
    return f"Name it with WAN_LOCAL_EXPANSION_MODEL={target} where --enable-prompt-expansion is given."


def _folder(format_: str) -> str:
    from wan_local.settings import known_models

    repository = known_models()[0].repository
    assert repository is not None
    name = repository.split("/")[1]
    return name if format_ == "diffusers" else f"{name.removesuffix('-diffusers')}-{format_}"


def _describe(plan: DownloadPlan, *, as_json: bool) -> None:
    if as_json:
        files = [{"repository": file.repository, "path": file.path, "bytes": file.nbytes} for file in plan.files]
        numbers = {"bytes": plan.nbytes, "bytes_to_come": plan.left_bytes, "bytes_free": plan.free_bytes}
        print(json.dumps({"title": plan.title, "target": str(plan.target), **numbers, "files": files}, indent=2))
        return
    say(plan.title)
    for file in plan.files:
        there = " (is there)" if file in plan.present else ""
        say(f"  {file.nbytes / 1e9:8.3f} GB  {file.repository}: {file.path}{there}")
    say(f"{plan.left_bytes / 1e9:.1f} of {plan.nbytes / 1e9:.1f} GB to come, into {plan.target}")
    say(f"{plan.free_bytes / 1e9:.1f} GB are free there.")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        say("Nothing was fetched: add --yes to begin without being asked.")
        return False
    say("Begin? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _next_step(config: DownloadConfig, target: Path) -> str:
    if config.runs:
        return f"Make a video with `wan-local generate --model {target} ...`."
    return f"Convert it once with `wan-local convert {target} {target}-int8 --format int8`."
