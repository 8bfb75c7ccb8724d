"""`wan-local generate`: two images and a prompt to an mp4, with its progress on the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_local.cli.flags import (
    add_kernel_flags,
    add_lora_flag,
    add_memory_flags,
    add_place_flags,
    add_request_flags,
    settings_from,
)
from wan_local.cli.terminal import DONE, progress, say
from wan_local.errors import OutputError
from wan_local.runs import find, new_id

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.request import Result, Step
    from wan_local.settings import Settings


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "generate",
        help="make a video from two images and a prompt",
        description="Make a video that begins with one image and ends with another. The weights are those that "
        "`wan-local download` fetched, unless --model names others.",
        epilog="Without weights, try it so: wan-local generate --model tiny --resolution 480p "
        '--start-image first.png --end-image last.png --prompt "a bird takes off" --output bird.mp4',
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=_generate)
    add_request_flags(parser.add_argument_group("the video (as the endpoint names it)"))
    local = parser.add_argument_group("where and how")
    add_place_flags(local)
    add_kernel_flags(local)
    add_memory_flags(local)
    add_lora_flag(local)
    local.add_argument(
        "--profile", metavar="distill4", help="sample as distilled weights want it: four steps, no guidance"
    )
    add_output_flags(local, default="a new name in the folder outputs, or in WAN_LOCAL_OUTPUT_DIR")
    local.add_argument(
        "--save-state",
        action=argparse.BooleanOptionalAction,
        help="keep what is done after each step, so that `wan-local resume` can go on with it (default: yes)",
    )


def add_output_flags(group: argparse._ArgumentGroup, *, default: str) -> None:
    group.add_argument("--output", type=Path, metavar="FILE.mp4", help=f"where the video goes (default: {default})")
    group.add_argument("--preview", type=Path, metavar="DIR", help="write a small picture there after each step")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _generate(options: argparse.Namespace) -> int:
    from wan_local.request import Request

    given = vars(options)
    request = Request.from_arguments({name: given[name] for name in Request.model_fields if name in given})
    settings = settings_from(given)
    from wan_local.pipeline import Pipeline

    run_id = new_id()
    return follow(
        Pipeline(settings).generate(request, output=given.get("output"), run_id=run_id), run_id, settings, given
    )


def follow(events: Generator[Step | Result], run_id: str, settings: Settings, given: Mapping[str, Any]) -> int:
    """Show a run to its end, print its result, and return the exit code."""
    with redirect_stdout(sys.stderr), progress() as show, _what_is_kept(run_id, settings):
        result = _last(events, given, show)  # what a library prints must not end up in the JSON
    print(json.dumps(_as_dict(result), indent=2) if "json" in given else _summary(result))
    return DONE


@contextmanager
def _what_is_kept(run_id: str, settings: Settings) -> Iterator[None]:
    """Say, where the run does not end well, how to go on with it if there is something to go on with."""
    done = False
    try:
        yield
        done = True
    finally:
        run = None if done else find(settings, run_id)
        if run is not None:
            say(f"This run is kept ({run.describe()}). Go on with: wan-local resume {run_id}")


def _last(events: Generator[Step | Result], given: Mapping[str, Any], show: Callable[[Step], None]) -> Result:
    """Iterate over the pipeline to its end; leaving this for any reason closes it, which removes what it had begun."""
    from wan_local.request import Result

    folder: Path | None = given.get("preview")
    with closing(events) as steps:
        for event in steps:
            if isinstance(event, Result):
                return event
            show(event)
            if folder is not None and event.preview is not None:
                try:
                    _save_preview(folder / f"{event.stage}_{event.index:02d}.png", event.preview)
                except OutputError as error:
                    say(f"{error} The run goes on without previews.")
                    folder = None
    raise AssertionError("the pipeline ended without a result")


def _save_preview(path: Path, picture_HW3: Any) -> None:
    from PIL import Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture_HW3).save(path)
    except OSError as error:
        raise OutputError(f"The preview {path} could not be written: {error.strerror or error}.") from error


def _as_dict(result: Result) -> dict[str, Any]:
    from wan_local.request import as_json

    video = result.video.model_dump() | {"path": result.video.path}
    return {"video": as_json(video), "seed": result.seed, "report": as_json(result.report)}


def _summary(result: Result) -> str:
    report = result.report
    made_by = report.get("model_title", report.get("model", "a model that the report does not name"))
    return f"{result.video.path}\n  made by {made_by}\n  seed {result.seed}"
