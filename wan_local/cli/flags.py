"""Flags that several commands share: the fields of a request, made from the schema itself, and where it runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan_local.settings import Settings

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

HELP = {
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
_FLAGS = {"start_image_url": "--start-image", "end_image_url": "--end-image"}


def add_place_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help='folder with the weights, or "tiny" for the small model inside this package')
    group.add_argument("--device", help="auto, cpu, or a torch device such as cuda:0")


def add_kernel_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--attention",
        metavar="BACKEND",
        help="auto, sdpa, int8, int8_pv, sage or xformers; `wan-local doctor` says which",
    )
    group.add_argument("--kernels", metavar="auto|on|off|fp16", help="fused kernels; auto: where a card suits them")


def add_memory_flags(group: argparse._ArgumentGroup) -> None:
    """Add the most that a run may take; for planning as if on another machine `plan` has its own."""
    for name, of in (("vram", "the card's memory"), ("ram", "RAM")):
        group.add_argument(
            f"--{name}", dest=f"{name}_gibibytes", type=number_of_gibibytes, metavar="GIB",
            help=f"take at most this much of {of}, as 6GiB (default: what is free)",
        )  # fmt: skip


def add_lora_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora", dest="loras", action="append", metavar="FILE[:STRENGTH]",
        help="add a LoRA to the transformer as it is loaded; can be given several times",
    )  # fmt: skip


def gibibytes(text: str) -> int:
    """Read 12, 12GiB, 12G or 12GB as the bytes of that many GiB: what a card or a machine is called by; more than 0."""
    number = number_of_gibibytes(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of memory: more than 0 GiB is needed, as 12GiB")
    return int(number * 2**30)


def number_of_gibibytes(text: str) -> float:
    """Read 12, 12GiB, 12G or 12GB as 12."""
    return float(text.lower().removesuffix("b").removesuffix("i").removesuffix("g"))


def add_request_flags(group: argparse._ArgumentGroup, only: Sequence[str] | None = None) -> None:
    from wan_local.request import Request

    schema = Request.model_json_schema()["properties"]
    for name, field in Request.model_fields.items():
        if only is not None and name not in only:
            continue
        described = f"{HELP[name]} ({_limits(schema[name], required=field.is_required())})".replace("%", "%%")
        if schema[name].get("type") == "boolean":
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, dest=name, help=described)
        else:  # the schema reads the text, so that all mistakes come in one answer, in the endpoint's words
            group.add_argument(flag(name), dest=name, metavar=_metavar(schema[name]), help=described)


def flag(name: str) -> str:
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


def given(entry: dict[str, Any]) -> str:
    return "" if entry["type"] == "missing" else f" (given: {str(entry.get('input'))[:80]!r})"


def settings_from(given: dict[str, Any]) -> Settings:
    from wan_local.settings import load_settings

    names = ["model", "device", "profile", "loras", "attention", "kernels", "save_state", "output_dir"]
    names += ["vram_gibibytes", "ram_gibibytes"]
    return load_settings(**{name: given.get(name) for name in names})
