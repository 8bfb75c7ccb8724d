"""`wan-local plan`: whether a video fits, and what needs how much memory. Needs no weights and no card."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from wan_local.cli.flags import add_kernel_flags, add_place_flags, add_request_flags, gibibytes, settings_from
from wan_local.cli.terminal import DONE
from wan_local.weight_format import WeightFormat, WeightFormats

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands
    from wan_local.planner import Machine, Plan, StagePlan

# the fields that memory depends on
_PLANNED: tuple[str, ...] = (
    "resolution",
    "aspect_ratio",
    "num_frames",
    "enable_safety_checker",
    "enable_prompt_expansion",
)
_PLANNED += ("num_inference_steps", "guide_scale")


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser(
        "plan", help="say whether a video will fit, and what needs how much memory; needs no weights and no card",
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.set_defaults(run=_plan)
    add_request_flags(parser.add_argument_group("the video"), only=_PLANNED)
    weights = parser.add_argument_group("the weights (as they are in the model's folder, bf16 where there is none)")
    weights.add_argument("--format", choices=get_args(WeightFormat), help="as if converted into this format")
    weights.add_argument("--text-encoder-format", choices=get_args(WeightFormat), help="as in convert")
    weights.add_argument("--keep-edges", action="store_true", help="as in convert")
    machine = parser.add_argument_group("the machine (this one unless told)")
    add_place_flags(machine)
    add_kernel_flags(machine)
    machine.add_argument("--vram", type=gibibytes, metavar="GIB", help="free memory of a card to plan for")
    machine.add_argument("--card", metavar="NAME", help='name of the card, as "RTX 4060", for how long it takes')
    machine.add_argument("--ram", type=gibibytes, metavar="GIB", help="free RAM to plan for")
    machine.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def _plan(options: argparse.Namespace) -> int:
    from wan_local import expander, safety
    from wan_local.preparation import plan_run
    from wan_local.request import Request

    given = vars(options)
    asked = {name: given[name] for name in _PLANNED if name in given}
    request = Request.from_arguments({"prompt": "", "start_image_url": "", "end_image_url": "", **asked})
    settings = settings_from(given)
    _check_card(given.get("card"))
    config, plan, kernels = plan_run(
        settings, request, machine=_machine(given), formats=_formats(given), card=given.get("card")
    )
    if "json" in given:
        about = {"model": config.name, "device": plan.device, "kernels": kernels.reason}
        print(json.dumps({**about, **_as_json(plan)}, indent=2))
        return DONE
    print(f"{config.title}: {plan.describe()}")
    for stage in plan.stages:
        print(_row(stage, plan))
    print(f"Kernels: {kernels.reason}.")
    print(_pace(plan, request.num_inference_steps))
    if request.enable_safety_checker:
        print(f"Safety checker: {safety.describe(settings)}")
    if request.enable_prompt_expansion:
        print(f"Prompt expansion: {expander.describe(settings)}")
    if config.download_gigabytes is not None:
        print(f"Weights: {config.repository}, about {config.download_gigabytes} GB to download.")
    return DONE


def _machine(given: dict[str, Any]) -> Machine | None:
    """Return what is free on the machine that is asked about, with this one's RAM unless told; None for this one."""
    from wan_local.device import free_ram_bytes
    from wan_local.planner import Machine

    if "vram" in given:
        ram = given["ram"] if "ram" in given else free_ram_bytes()
        return Machine("a card", given["vram"], ram, compute_bytes=2)
    return Machine("cpu", given["ram"], given["ram"], compute_bytes=4) if "ram" in given else None


def _pace(plan: Plan, steps: int) -> str:
    """Say how long a run takes, or that it is not known."""
    if plan.stage("denoise").seconds is None:
        return "Seconds: unknown, since the card is; name one of configs/cards.toml with --card."
    total = sum(stage.seconds or 0.0 for stage in plan.stages)
    return f"About {total / 60:.0f} minutes for {steps} steps, modelled from the card's data sheet and not measured."


def _formats(given: dict[str, Any]) -> WeightFormats | None:
    """Return the formats that are asked for; None for those that the weights have."""
    if "format" not in given:
        return None
    return WeightFormats.converted(
        given["format"], text_encoder=given.get("text_encoder_format"), keep_edges="keep_edges" in given
    )


def _check_card(card: str | None) -> None:
    from wan_local.errors import WrongSetting
    from wan_local.settings import known_cards, load_card_rates

    if card is not None and load_card_rates(card) is None:
        raise WrongSetting(f"no card named {card!r} is known; known are: {', '.join(known_cards())}")


def _as_json(plan: Plan) -> dict[str, Any]:
    geometry, peak = plan.geometry, plan.peak
    return {
        "geometry": {
            "width": geometry.size.width,
            "height": geometry.size.height,
            "num_frames": geometry.num_frames,
            "generated_frames": geometry.generated_frames,
            "tokens": geometry.tokens,
        },
        "chunk_tokens": plan.chunk_tokens,
        "free_bytes": plan.free_bytes,
        "usable_bytes": plan.usable_bytes,
        "peak": {"stage": peak.name, "bytes": peak.peak_bytes},
        "stages": [{**asdict(stage), "peak_bytes": stage.peak_bytes} for stage in plan.stages],
    }


def _row(stage: StagePlan, plan: Plan) -> str:
    how = "" if stage.source is None else f", {stage.resident_blocks} blocks stay, others stream from {stage.source}"
    how += "" if stage.tiling.count == 1 else f", frames in {stage.tiling} tiles"
    how += _why(stage, plan)
    how += f", {plan.chunk_tokens} tokens at a time" if stage.name == "denoise" else ""
    how += ", text and image keys wait in RAM" if stage.parked else ""
    how += f"; {stage.ram_bytes / 2**30:.1f} GiB of RAM" if stage.ram_bytes else ""
    where = "" if stage.device is None else f" on {stage.device}"
    took = "" if stage.seconds is None else f", about {stage.seconds:.0f} s"
    gibibytes = f"{stage.peak_bytes / 2**30:6.2f} GiB{where}"
    return f"  {stage.name:10} {gibibytes} ({stage.weight_bytes / 2**30:.2f} of weights{how}){took}"


def _why(stage: StagePlan, plan: Plan) -> str:
    """Say why a stage streams or is tiled."""
    if stage.whole_bytes is None:
        return ""
    usable = f" and {plan.usable_bytes / 2**30:.1f} are usable" if stage.device in (None, plan.device) else ""
    return f", whole it would take {stage.whole_bytes / 2**30:.1f} GiB{usable}"
