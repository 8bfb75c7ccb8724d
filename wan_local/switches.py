"""The endpoint's two switches: what `enable_safety_checker` and `enable_prompt_expansion` add to a run.

Takes the request and the settings; gives the stages to plan for and, within a run, generators of `Step`s. A switch that
is off adds nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wan_local.answers import Answers
from wan_local.decode import Decoded
from wan_local.device import compute_dtype
from wan_local.errors import NumericalError
from wan_local.expander import Expander, choose_model, expander_stage, find_expanders, known_sizes, sizes_of
from wan_local.expansion import Expansion, ask, expand
from wan_local.ladder import ran_out_of_memory
from wan_local.planner import Machine, StagePlan
from wan_local.preview import to_uint8
from wan_local.report import Report
from wan_local.request import Check, Request, Step, unchecked
from wan_local.safety import FrameCheck, check_images, check_prompt, load_checker, require_checker, safety_stage
from wan_local.settings import Settings, load_expansion_config, load_safety_config

_CPU_ITEM_BYTES = compute_dtype(torch.device("cpu")).itemsize


@dataclass(frozen=True, slots=True)
class Switches:
    """What is switched on, and the stages that it adds before all others. `expander`: None where none is to write."""

    request: Request
    settings: Settings
    stages: tuple[StagePlan, ...]
    expander: Expander | None = None


def prepare_switches(request: Request, settings: Settings, machine: Machine, *, answered: bool = False) -> Switches:
    """Check what the switches need before anything is read. machine: where the run will be.

    answered: the prompt was expanded before the run was stopped, so that no language model is needed again.
    Raises InvalidRequest for a flagged prompt, NotAvailable, ModelNotFound, WrongModel, CorruptModel, DoesNotFit.
    """
    check_prompt(request.prompt, load_safety_config(), enabled=request.enable_safety_checker)
    if request.enable_safety_checker:
        require_checker(settings)
    if answered or not request.enable_prompt_expansion:
        return Switches(request, settings, tuple(_safety_stages(request)))
    expander, plan = choose_model(sizes_of(find_expanders(settings)), _machines(machine))
    return Switches(request, settings, (*_safety_stages(request), plan), expander)


def planned_stages(request: Request, settings: Settings, machine: Machine) -> list[StagePlan]:
    """Return the stages that the switches add, with a known language model where none is installed."""
    stages = _safety_stages(request)
    if request.enable_prompt_expansion:
        named = settings.expansion_model is not None
        sizes = sizes_of(find_expanders(settings)) if named else known_sizes(load_expansion_config())
        stages.append(choose_model(sizes, _machines(machine))[1])
    return stages


def _safety_stages(request: Request) -> list[StagePlan]:
    return [safety_stage(load_safety_config())] if request.enable_safety_checker else []


def _machines(machine: Machine) -> list[Machine]:
    """Return where a language model may run: on the run's device, or in RAM beside a card."""
    if machine.device == "cpu":
        return [machine]
    return [machine, Machine("cpu", machine.free_ram_bytes, machine.free_ram_bytes, _CPU_ITEM_BYTES)]


def checked_images(switches: Switches, images: tuple[Tensor, Tensor], report: Report) -> Iterator[Step]:
    """Let the safety checker see both images as the model will see them, each [3, H, W]. Raises InvalidRequest."""
    if not switches.request.enable_safety_checker:
        return
    with report.stage("safety"):
        report.attempt(safety_stage(load_safety_config()), torch.device("cpu"))
        checker = load_checker(switches.settings)
        start, end = (to_uint8(image.unsqueeze(1))[0] for image in images)
        scores = check_images(checker, {"start_image_url": start, "end_image_url": end})
        report.facts["safety"] = {"checker": checker.name, **scores}
    yield report.step(1, 1, f"both images pass the safety checker ({checker.name}: {max(scores.values()):.4f} of 1)")


def checked_frames(
    switches: Switches, parts: Iterator[Decoded], num_frames: int, report: Report
) -> Generator[Decoded, None, None]:
    """Let the safety checker see frames as they pass. Raises InvalidRequest before the video has its name."""
    if not switches.request.enable_safety_checker:
        yield from parts
        return
    check = FrameCheck(load_checker(switches.settings), num_frames, switches.request)
    for part in parts:
        check.see(part.frames)
        yield part
    report.facts["safety"] |= {"frames": check.finish()}


def expanded_prompt(
    switches: Switches,
    images: tuple[Tensor, Tensor],
    answers: Answers | None,
    report: Report,
    *,
    seed: int,
    check: Check = unchecked,
) -> Generator[Step, None, str]:
    """Return the prompt to make the video from; the language model is gone by then.

    images: each [3, H, W] in [-1, 1]. answers: of this run, where it is gone on with. Raises InvalidRequest if what
    was written is flagged.
    """
    request, expander = switches.request, switches.expander
    if not request.enable_prompt_expansion:
        return request.prompt
    with report.stage("expansion"):
        kept = answers.expansion() if answers else None
        if kept is not None:
            expansion = Expansion(**kept)
        else:
            assert expander is not None, "the run was to have an expanded prompt, and has none"
            expansion = yield from _written(switches, expander, images, report, seed=seed, check=check)
        check_prompt(expansion.prompt, load_safety_config(), enabled=request.enable_safety_checker)
    if answers and kept is None:
        answers.keep_expansion(asdict(expansion))
    report.facts["expansion"] = expansion.as_dict()
    if expansion.reason is None:
        report.facts["expanded_prompt"] = expansion.prompt
        yield report.step(1, 1, f"prompt expanded by {expansion.model}: {expansion.prompt}")
    else:
        report.note(f"the prompt was not expanded: {expansion.reason}. The video is made from the prompt as it is.")
        yield report.step(1, 1, f"prompt kept: {expansion.reason}")
    return expansion.prompt


def _written(
    switches: Switches,
    expander: Expander,
    images: tuple[Tensor, Tensor],
    report: Report,
    *,
    seed: int,
    check: Check,
) -> Generator[Step, None, Expansion]:
    """Load the language model, let it write, and free it.

    Where memory runs out, or the model's numbers are none, the prompt stays as it is.
    """
    plan = next(stage for stage in switches.stages if stage.name == "expansion")
    device = report.device if plan.device is None else torch.device(plan.device)
    prompt, limit = switches.request.prompt, load_expansion_config().max_new_tokens
    pictures = [Image.fromarray(to_uint8(image.unsqueeze(1))[0]) for image in images]
    question = ask(expander, prompt, pictures)
    report.attempt(plan, device)
    try:
        with expander_stage(expander, device, compute_dtype(device), plan, check=check) as model:
            yield report.step(0, limit, f"{expander.name} reads the prompt{_where(plan, device)}")
            writing = expand(model, question, seed=seed, check=check)
            return (yield from _told(writing, report, limit))
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        words = str(error).partition("\n")[0] or type(error).__name__
        return Expansion(prompt, expander.name, "", 0, f"there was less free memory than planned ({words})")
    except NumericalError as error:
        return Expansion(prompt, expander.name, "", 0, f"{error}: its weights may be damaged")


def _told(writing: Generator[int, None, Expansion], report: Report, limit: int) -> Generator[Step, None, Expansion]:
    """Turn the number of tokens written into steps; return what is returned at the end."""
    while True:
        try:
            written = next(writing)
        except StopIteration as end:
            expansion: Any = end.value
            assert isinstance(expansion, Expansion)
            return expansion
        yield report.step(written, limit, f"{written} tokens written")


def _where(plan: StagePlan, place: torch.device) -> str:
    if plan.resident_blocks is None:
        return f" on {place}"
    return f" on {place}; {plan.resident_blocks} of its layers stay, the others stream from {plan.source}"
