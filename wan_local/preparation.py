"""A request to a job: everything that can be checked, drawn and planned before a weight is read.

Takes a request and settings, or what an unfinished run left; gives the images at the video's size, the model that was
found, and the plan it fits into. What is wrong is an error here and not after minutes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wan_local.attention import KernelChoice
from wan_local.cache import EncodingCache
from wan_local.checkpoint import ModelFiles, find_model, model_config
from wan_local.conditioning import picture_tensor
from wan_local.device import card_model, compute_dtype, free_bytes, free_ram_bytes, own_ram_bytes, resolve_device
from wan_local.durable import make_output_dir
from wan_local.fitting import WayOut, make_plan
from wan_local.geometry import NATIVE_FRAMES, RESOLUTIONS, Geometry, Size, output_size
from wan_local.image import fit, load_image
from wan_local.ladder import Ladder
from wan_local.network_cost import BRANCHES, LoopKernels
from wan_local.order import Order, words_of
from wan_local.planner import GIB, Machine, NetworkSize, Plan, StagePlan, plan_on_cpu, shrink
from wan_local.probe import assumed_kernels, choose_kernels
from wan_local.quantize import default_arithmetic
from wan_local.report import Report
from wan_local.request import Check, Request, unchecked
from wan_local.settings import ModelConfig, Settings, load_acceleration_config, load_card_rates, load_profile
from wan_local.stage import network_sizes
from wan_local.switches import Switches, planned_stages, prepare_switches
from wan_local.timing import timed
from wan_local.video import check_output, largest_bytes
from wan_local.weight_format import PLAIN, Int8Arithmetic, WeightFormats
from wan_local.workspace import Workspace

_RANDOM_SEEDS = 2**31  # JavaScript clients lose integers beyond 2^53
_WIDE = Size(height=9, width=16)  # what `auto` means where there is no start image yet


@dataclass(frozen=True, slots=True)
class Job:
    """An order that can be made: its images at the video's size, the model it found, and the plan it fits into."""

    order: Order
    settings: Settings
    files: ModelFiles
    device: torch.device
    dtype: torch.dtype
    images: tuple[Tensor, Tensor]
    machine: Machine
    plan: Plan
    switches: Switches
    kernels: KernelChoice

    @property
    def request(self) -> Request:
        return self.order.request

    @property
    def geometry(self) -> Geometry:
        return self.order.geometry

    @property
    def seed(self) -> int:
        return self.order.seed

    def workspace(self, report: Report, check: Check = unchecked, *, private: Path | None = None) -> Workspace:
        """Return what the stages work with. private: the run's own folder, where its encodings are kept."""
        config, settings = self.files.config, self.settings

        def lesser(plan: Plan, stage: str) -> Plan | None:
            return shrink(plan, stage, config, network_sizes(config, self.files), self.machine)

        def on_cpu(stage: str) -> StagePlan | None:
            beside = _machine(torch.device("cpu"), settings)
            return plan_on_cpu(self.geometry, stage, config, network_sizes(config, self.files), beside)

        ladder = Ladder(self.plan, self.device, self.dtype, shrink=lesser, on_cpu=on_cpu, note=report.note)
        cache = EncodingCache(settings.cache_dir, int(settings.cache_gigabytes * 1e9), private=private)
        return Workspace(self.files, self.device, self.dtype, ladder, cache, report, check)


def prepare(request: Request, settings: Settings, output: Path | str | None = None) -> Job:
    """Check everything that can be checked before a weight is read: request, images, model, device, memory, output."""
    request, remarks = _profiled(request, settings)
    files = find_model(settings)
    device = resolve_device(settings.device)
    switches = prepare_switches(request, settings, _machine(device, settings))
    start = load_image(request.start_image_url, field="start_image_url")
    end = load_image(request.end_image_url, field="end_image_url")
    start_size = Size(start.height, start.width)
    size = output_size(files.config.canvas(request.resolution), request.aspect_ratio, start_size)
    small = Geometry(output_size(files.config.canvas("480p"), request.aspect_ratio, start_size), NATIVE_FRAMES)
    seed = secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed
    order = Order(
        request,
        seed,
        Geometry(size, request.num_frames),
        (fit(start, size), fit(end, size)),
        load_acceleration_config(settings),
        _output_path(settings, seed, output),
        words_of(request),
        remarks,
        settings.profile,
    )
    return planned(order, settings, files, device, smaller=small, switches=switches)


def planned(
    order: Order,
    settings: Settings,
    files: ModelFiles,
    device: torch.device,
    *,
    smaller: Geometry | None = None,
    switches: Switches | None = None,
    answered: bool = False,
) -> Job:
    """Return the job of an order. answered: its prompt was expanded before.

    Raises DoesNotFit, naming `smaller` where that would, OutputError, and what `prepare_switches` raises.
    """
    geometry, config, machine = order.geometry, files.config, _machine(device, settings)
    if switches is None:
        switches = prepare_switches(order.request, settings, machine, answered=answered)
    chosen = choose_kernels(settings, device, config)
    machine = replace(machine, kernels=_loop_kernels(chosen, settings))
    sizes = network_sizes(config, files)
    plan = make_plan(geometry, config, sizes, machine, ways_out=_ways_out(geometry, smaller, config, sizes))
    plan = _timed(plan, config, sizes, card_model(device), order.request).preceded_by(*switches.stages)
    check_output(order.output, largest_bytes(geometry))
    images = (picture_tensor(order.pictures[0]), picture_tensor(order.pictures[1]))
    return Job(order, settings, files, device, compute_dtype(device), images, machine, plan, switches, chosen)


def plan_run(
    settings: Settings,
    request: Request,
    *,
    machine: Machine | None,
    formats: WeightFormats | None = None,
    card: str | None = None,
) -> tuple[ModelConfig, Plan, KernelChoice]:
    """Return the model's configuration, the plan of a run on `machine` (None: this one) and what it computes with.

    No weights are needed. What `machine` computes with is told by the settings; of a card it is assumed.
    formats: what the weights would be converted into; None is as they are where the settings name a folder, else bf16.
    card: the name of a card, for the seconds; None is the name of this one.
    Of the request its resolution, aspect ratio, number of frames, steps, guidance and switches count; its images are
    not looked at.

    Raises DoesNotFit; NotAvailable; ModelNotFound where the settings name a folder that is none.
    """
    config, device = model_config(settings), resolve_device(settings.device)
    if card is None and machine is None:
        card = card_model(device)
    if machine is not None and machine.device != "cpu":
        device, chosen = torch.device("cuda"), assumed_kernels(settings)
    else:
        device = device if machine is None else torch.device("cpu")
        chosen = choose_kernels(settings, device, config)
    machine = machine or _machine(device, settings)
    machine = replace(machine, int8_arithmetic=_arithmetic(device, settings), kernels=_loop_kernels(chosen, settings))
    weights: ModelFiles | WeightFormats = formats or PLAIN
    if formats is None and settings.model is not None:
        weights = find_model(settings)
    sizes = {name: output_size(config.canvas(name), request.aspect_ratio, _WIDE) for name in RESOLUTIONS}
    geometry, small = Geometry(sizes[request.resolution], request.num_frames), Geometry(sizes["480p"], NATIVE_FRAMES)
    weight_sizes = network_sizes(config, weights)
    ways_out = _ways_out(geometry, small, config, weight_sizes)
    plan = _timed(
        make_plan(geometry, config, weight_sizes, machine, ways_out=ways_out), config, weight_sizes, card, request
    )
    return config, plan.preceded_by(*planned_stages(request, settings, machine)), chosen


def _timed(
    plan: Plan, config: ModelConfig, sizes: Mapping[str, NetworkSize], card: str | None, request: Request
) -> Plan:
    branches = 1 if request.guide_scale == 1 else BRANCHES
    return timed(plan, config, sizes, load_card_rates(card), steps=request.num_inference_steps, branches=branches)


def _ways_out(
    geometry: Geometry, smaller: Geometry | None, config: ModelConfig, sizes: Mapping[str, NetworkSize]
) -> Iterator[WayOut]:
    """Yield what takes less memory, the least of a change first: a smaller video, then weights in int8."""
    videos = [("", geometry)]
    if smaller is not None and smaller.tokens < geometry.tokens:
        videos.append((f"{smaller.size} x {smaller.num_frames} frames", smaller))
        yield WayOut(videos[-1][0], smaller, sizes)
    if sizes["transformer"].packed or config.embedded is not None:
        return
    int8 = network_sizes(config, WeightFormats.converted("int8"))
    for words, video in videos:
        also = f"{words} " if words else "the same "
        yield WayOut(f"{also}with int8 weights (`wan-local convert SRC DST --format int8`)", video, int8)


def _machine(device: torch.device, settings: Settings) -> Machine:
    """Return this machine as the planner sees it: what is free, and of that no more than the settings allow."""
    in_ram = settings.ram_gibibytes, own_ram_bytes()
    free = _at_most(free_bytes(device), *(in_ram if device.type == "cpu" else (settings.vram_gibibytes, 0)))
    ram = _at_most(free_ram_bytes(), *in_ram)
    return Machine(str(device), free, ram, compute_dtype(device).itemsize, _arithmetic(device, settings))


def _arithmetic(device: torch.device, settings: Settings) -> Int8Arithmetic:
    """Return what the loop uses int8 weights by on a device of that kind."""
    if settings.int8_arithmetic != "auto":
        return settings.int8_arithmetic
    return default_arithmetic(device) if settings.precision == "auto" else "weight-only"


def _loop_kernels(chosen: KernelChoice, settings: Settings) -> LoopKernels:
    return LoopKernels(chosen.fused, attention=chosen.attention, wide_residual=settings.precision == "reference")


def _at_most(free: int, gibibytes: float | None, held: int) -> int:
    """Return what is free, and of that no more than the gibibytes less what is held of them already."""
    return free if gibibytes is None else max(min(free, int(gibibytes * GIB) - held), 0)


def remarks_on(job: Job) -> list[str]:
    """What a caller may want to know before the run."""
    remarks = list(job.order.remarks)
    if job.request.num_frames > NATIVE_FRAMES:
        remarks.append(
            f"{job.request.num_frames} frames: the model was trained on {NATIVE_FRAMES}; colours may shift early on. "
            f"{job.geometry.generated_frames} are generated, the first and the last are always kept."
        )
    if torch.equal(*job.images):
        remarks.append("start and end image are the same picture: expect little motion unless the prompt describes it.")
    return remarks


def _profiled(request: Request, settings: Settings) -> tuple[Request, tuple[str, ...]]:
    """Return the request with the profile's values over its own, and what was changed in words."""
    if settings.profile is None:
        return request, ()
    profile = load_profile(settings.profile)
    values = {
        "num_inference_steps": len(profile.steps),
        "shift": profile.shift,
        "guide_scale": profile.guide_scale,
        "acceleration": "none",
    }
    given = {name: getattr(request, name) for name in values}
    changed = [f"{name} {given[name]} -> {value}" for name, value in values.items() if given[name] != value]
    words = f"profile {settings.profile} (experimental; {profile.title}): {', '.join(changed) or 'nothing changed'}."
    return request.model_copy(update=values), (words,)


def _output_path(settings: Settings, seed: int, output: Path | str | None) -> Path:
    if output is not None:
        return Path(output).expanduser().absolute()
    make_output_dir(settings.output_dir)
    return settings.output_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}-{secrets.token_hex(2)}.mp4"
