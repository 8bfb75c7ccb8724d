"""The command line: flags in, a video and words on the terminal out. The only file that prints.

Every field of a request is a flag, made from the schema itself. The result goes to stdout, all else to stderr.
Exit codes: 0 done, 1 the run failed, 2 the request or a setting is wrong, 130 stopped by Ctrl-C, 143 terminated.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from wan_local import __version__
from wan_local.errors import Cancelled, InvalidRequest, OutputError, WanLocalError

if TYPE_CHECKING:
    from wan_local.request import Request, Result, Step
    from wan_local.settings import Settings

DONE, FAILED, WRONG_REQUEST, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_HELP = {
    "prompt": "what happens between the two images",
    "negative_prompt": "what the video should not look like",
    "start_image_url": "first frame: a file, an http(s) address or a data URI",
    "end_image_url": "last frame, likewise",
    "num_frames": "how many frames the video has",
    "frames_per_second": "how fast they are played; the model's own pace is 16",
    "seed": "same seed, same video; drawn and told if not given",
    "resolution": "480p or 720p",
    "num_inference_steps": "more steps, more detail, more time",
    "guide_scale": "how closely the prompt is followed",
    "shift": "more of the steps go to layout and motion, fewer to detail",
    "enable_safety_checker": "refuse unsafe prompts and pictures",
    "enable_prompt_expansion": "let a language model write more into the prompt",
    "acceleration": "regular leaves out steps that hardly change anything; none takes every one",
    "aspect_ratio": "auto takes that of the start image",
}
_PLANNED = ("resolution", "aspect_ratio", "num_frames")  # the fields that memory depends on
_FLAGS = {"start_image_url": "--start-image", "end_image_url": "--end-image"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        with _stopped_by_sigterm():
            return {"generate": _generate, "plan": _plan}[options.command](options)
    except (KeyboardInterrupt, Cancelled):
        _say("Stopped. Nothing was left behind.")
        return INTERRUPTED
    except InvalidRequest as error:
        _say("The request is not valid:")
        for entry in error.detail:
            _say(f"  {_flag(str(entry['loc'][-1]))}: {entry['msg']}{_given(entry)}")
        return WRONG_REQUEST
    except WanLocalError as error:
        _say(f"{type(error).__name__}: {error}")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wan-local", description="Wan-2.1 first-last-frame-to-video on your own machine."
    )
    parser.add_argument("--version", action="version", version=f"wan-local {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate", help="make a video from two images and a prompt", argument_default=argparse.SUPPRESS
    )
    _add_request_flags(generate.add_argument_group("the video (as the endpoint names it)"))
    local = generate.add_argument_group("where and how")
    _add_place_flags(local)
    local.add_argument("--output", type=Path, metavar="FILE.mp4", help="where the video goes")
    local.add_argument("--preview", type=Path, metavar="DIR", help="write a small picture there after each step")
    local.add_argument("--json", action="store_true", help="print the result as one JSON object")
    plan = commands.add_parser(
        "plan", help="say whether a video will fit, and what needs how much memory; needs no weights and no card",
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    _add_request_flags(plan.add_argument_group("the video"), only=_PLANNED)
    machine = plan.add_argument_group("the machine (this one unless told)")
    _add_place_flags(machine)
    machine.add_argument("--vram", type=_gibibytes, metavar="GIB", help="free memory of a card to plan for")
    machine.add_argument("--ram", type=_gibibytes, metavar="GIB", help="free RAM to plan for")
    machine.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    return parser


def _add_place_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help='folder with the weights, or "tiny" for the small model inside this package')
    group.add_argument("--device", help="auto, cpu, or a torch device such as cuda:0")


def _gibibytes(text: str) -> int:
    """Read 12, 12GiB, 12G or 12GB as that many GiB: what a card or a machine is called by."""
    number = text.lower().removesuffix("b").removesuffix("i").removesuffix("g")
    return int(float(number) * 2**30)


def _add_request_flags(group: argparse._ArgumentGroup, only: Sequence[str] | None = None) -> None:
    from wan_local.request import Request

    schema = Request.model_json_schema()["properties"]
    for name, field in Request.model_fields.items():
        if only is not None and name not in only:
            continue
        described = f"{_HELP[name]} ({_limits(schema[name], required=field.is_required())})".replace("%", "%%")
        if schema[name].get("type") == "boolean":
            group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, dest=name, help=described)
        else:  # the schema reads the text, so that all mistakes come in one answer, in the endpoint's words
            group.add_argument(_flag(name), dest=name, metavar=_metavar(schema[name]), help=described)


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _metavar(schema: dict[str, Any]) -> str:
    kinds = {entry.get("type") for entry in schema.get("anyOf", [schema])}
    return "N" if kinds & {"integer", "number"} else "|".join(schema.get("enum", ["TEXT"]))


def _limits(schema: dict[str, Any], *, required: bool) -> str:
    if required:
        return "required"
    parts = [f"{schema['minimum']} to {schema['maximum']}"] if "minimum" in schema else []
    default = schema.get("default")
    if isinstance(default, str) and len(default) > 20:
        default = f"{default[:20]}..."
    return ", ".join([*parts, "default: none" if default is None else f"default: {default}"])


def _given(entry: dict[str, Any]) -> str:
    return "" if entry["type"] == "missing" else f" (given: {str(entry.get('input'))[:80]!r})"


def _generate(options: argparse.Namespace) -> int:
    from wan_local.request import Request

    given = vars(options)
    request = Request.from_arguments({name: given[name] for name in Request.model_fields if name in given})
    try:
        settings = _settings(given)
    except ValueError as error:
        _say(f"A setting is wrong: {error}")
        return WRONG_REQUEST
    with redirect_stdout(sys.stderr), _progress() as show:  # what a library prints must not end up in the JSON
        result = _run(request, settings, given, show)
    print(json.dumps(_as_dict(result), indent=2) if "json" in given else _summary(result))
    return DONE


def _plan(options: argparse.Namespace) -> int:
    from wan_local.pipeline import plan_run
    from wan_local.planner import Machine
    from wan_local.request import Request

    given = vars(options)
    asked = {name: given[name] for name in _PLANNED if name in given}
    request = Request.from_arguments({"prompt": "", "start_image_url": "", "end_image_url": "", **asked})
    machine = None
    if "vram" in given:
        machine = Machine("a card", given["vram"], given.get("ram", given["vram"]), compute_bytes=2)
    elif "ram" in given:
        machine = Machine("cpu", given["ram"], given["ram"], compute_bytes=4)
    config, plan = plan_run(
        _settings(given), request.aspect_ratio, request.resolution, request.num_frames, machine=machine
    )
    if "json" in given:
        stages = [{**asdict(stage), "peak_bytes": stage.peak_bytes} for stage in plan.stages]
        print(json.dumps({"model": config.name, "device": plan.device, "stages": stages}, indent=2))
        return DONE
    print(f"{config.title}: {plan.describe()}")
    for stage in plan.stages:
        how = (
            "" if stage.source is None else f", {stage.resident_blocks} blocks stay, others stream from {stage.source}"
        )
        print(
            f"  {stage.name:10} {stage.peak_bytes / 2**30:6.2f} GiB ({stage.weight_bytes / 2**30:.2f} of weights{how})"
        )
    if config.download_gigabytes is not None:
        print(f"Weights: {config.repository}, about {config.download_gigabytes} GB to download.")
    return DONE


def _settings(given: dict[str, Any]) -> Settings:
    from wan_local.settings import load_settings

    return load_settings(model=given.get("model"), device=given.get("device"))


def _run(request: Request, settings: Settings, given: dict[str, Any], show: Callable[[Step], None]) -> Result:
    """Iterate over the pipeline to its end; leaving this for any reason closes it, which removes what it had begun."""
    from wan_local.pipeline import Pipeline
    from wan_local.request import Result

    with closing(Pipeline(settings).generate(request, output=given.get("output"))) as steps:
        for event in steps:
            if isinstance(event, Result):
                return event
            show(event)
            if "preview" in given and event.preview is not None:
                _save_preview(given["preview"] / f"{event.stage}_{event.index:02d}.png", event.preview)
    raise AssertionError("the pipeline ended without a result")


def _save_preview(path: Path, picture_HW3: Any) -> None:
    from PIL import Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture_HW3).save(path)
    except OSError as error:
        raise OutputError(f"The preview {path} could not be written: {error.strerror or error}.") from error


@contextmanager
def _progress() -> Iterator[Callable[[Step], None]]:
    """Give a function that shows a step: a bar for each stage on a terminal, a line for each step elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: _say(f"{step.stage} {step.index}/{step.total}, {_clock(step)}: {step.message}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    stage = TextColumn("{task.description}", markup=False, table_column=Column(min_width=9, no_wrap=True))
    bar = BarColumn(bar_width=24, table_column=Column(min_width=24))
    words = TextColumn(
        "{task.fields[words]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
    )
    with Progress(stage, bar, words, console=Console(stderr=True), expand=True) as bars:
        tasks: dict[str, Any] = {}

        def show(step: Step) -> None:
            if step.stage == "plan":  # said in full: it names the model, the size and the memory
                bars.console.print(step.message, markup=False, highlight=False)
                return
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, words="")
            text = f"{step.index}/{step.total}, {_clock(step)}: {step.message}"
            bars.update(tasks[step.stage], completed=step.index, total=step.total, words=text)

        yield show


def _clock(step: Step) -> str:
    ended = step.eta_seconds is None or step.index == step.total
    return f"{_minutes(step.elapsed_seconds)} gone" + (
        "" if ended else f", about {_minutes(step.eta_seconds or 0)} left"
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _as_dict(result: Result) -> dict[str, Any]:
    from wan_local.request import as_json

    video = result.video.model_dump() | {"path": result.video.path}
    return {"video": as_json(video), "seed": result.seed, "report": as_json(result.report)}


def _summary(result: Result) -> str:
    report = result.report
    made_by = report.get("model_title", report.get("model", "a model that the report does not name"))
    return f"{result.video.path}\n  made by {made_by}\n  seed {result.seed}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let `kill` and `timeout` end the run as Ctrl-C does, so that no half-written file stays behind."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
