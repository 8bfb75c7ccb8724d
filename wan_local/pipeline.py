"""The story: a request and two images become an mp4. One generator; it yields `Step`s and last a `Result`.

Stop iterating (`close()` the generator) to cancel: every stage frees its network and no file is left.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_local import __version__
from wan_local.acceleration import make_policy
from wan_local.checkpoint import ModelFiles, find_model, model_config
from wan_local.conditioning import (
    embed_images,
    embed_prompt,
    encode_condition,
    initial_noise,
    load_tokenizer,
    picture_tensor,
    tokenize,
)
from wan_local.decode import Decoded, decode_frames
from wan_local.denoise import Denoised, Guided, denoise
from wan_local.device import compute_dtype, free_bytes, free_ram_bytes, resolve_device
from wan_local.errors import InvalidRequest
from wan_local.geometry import NATIVE_FRAMES, RESOLUTIONS, Geometry, Size, output_size
from wan_local.image import fit, load_image
from wan_local.planner import Machine, Plan, StagePlan, make_plan
from wan_local.preview import fit_latent_to_rgb, to_uint8
from wan_local.report import Report
from wan_local.request import Check, File, Request, Result, Step, as_json, unchecked
from wan_local.safety import FrameCheck, check_images, check_prompt, load_checker, require_checker, safety_stage
from wan_local.scheduler import Scheduler
from wan_local.settings import (
    ModelConfig,
    Settings,
    load_acceleration_config,
    load_profile,
    load_safety_config,
    load_settings,
)
from wan_local.stage import Network, network_sizes, stage
from wan_local.video import VideoReport, VideoWriter, check_output, largest_bytes

_RANDOM_SEEDS = 2**31  # JavaScript clients lose integers beyond 2^53
_MASK_CHANNELS = 4
_WIDE = Size(height=9, width=16)  # what `auto` means where there is no start image yet
_FEATURES_TO_COME = ("enable_prompt_expansion",)


def generate(request: Request, *, settings: Settings | None = None, output: Path | str | None = None) -> Result:
    """Make one video and return where it is. Blocks; iterate over `Pipeline.generate` to see the steps.

    Raises InvalidRequest, ModelNotFound, WrongModel, CorruptModel, NotAvailable, DoesNotFit before any weight is
    read, and NumericalError or OutputError later.
    """
    result: Result | None = None
    for event in Pipeline(settings).generate(request, output=output):
        if isinstance(event, Result):
            result = event
    assert result is not None, "the pipeline ended without a result"
    return result


@dataclass(frozen=True, slots=True)
class Job:
    """A request that can be made: its images at the video's size, the model it found, and the plan it fits into."""

    request: Request
    settings: Settings
    files: ModelFiles
    device: torch.device
    dtype: torch.dtype
    images: tuple[Tensor, Tensor]
    plan: Plan
    seed: int
    output: Path
    check: Check = unchecked
    remarks: tuple[str, ...] = ()

    @property
    def geometry(self) -> Geometry:
        return self.plan.geometry

    def open(self, network: Network, plan: StagePlan | None = None) -> AbstractContextManager[Any]:
        """Return the `stage` that hands out `network`."""
        return stage(network, self.files, self.device, self.dtype, plan=plan, check=self.check)


class Pipeline:
    """Makes videos with one set of settings; holds no weights between runs."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()

    def generate(
        self, request: Request, *, output: Path | str | None = None, check: Check = unchecked
    ) -> Generator[Step | Result]:
        """Yield a `Step` after each piece of work and last the `Result`.

        output: the mp4 to write; a new name in the settings' `output_dir` unless given. check: called between the
        blocks of every network; what it raises (`Cancelled`, say) ends the run there. Raises as `generate` does.
        """
        job = prepare(request, self.settings, output, check=check)
        files, geometry = job.files, job.geometry
        report = Report(job.device)
        for text in _remarks(job):
            report.note(text)
        yield report.step(1, 1, f"{files.config.title}: {job.plan.describe()}")

        yield from _check_images(job, report)
        with report.stage("text"), job.open("text_encoder", job.plan.stage("text")) as text_encoder:
            prompt_embeds, negative_embeds = _embed_prompts(text_encoder, job, report)
        yield report.step(1, 1, "prompts encoded")

        with report.stage("image"), job.open("image_encoder") as image_encoder:
            image_embeds = embed_images(image_encoder, job.images, files.config.image_encoder)
        yield report.step(1, 1, "images encoded")

        with report.stage("condition"), job.open("vae") as vae:
            condition = encode_condition(vae, job.images, geometry.generated_frames, check=check)
        yield report.step(1, 1, "first and last frame encoded")

        embeds = Embeds(prompt_embeds, negative_embeds, image_embeds)
        state = yield from sample(job, report, embeds, condition)

        with report.stage("decode"), job.open("vae") as vae, _writer(job, state.calls, report) as writer:
            for decoded in _checked(decode_frames(vae, state.latents, geometry, check=check), job, report):
                writer.write(decoded.frames)
                message = f"frame {decoded.done} of {geometry.generated_frames}"
                yield report.step(decoded.done, geometry.generated_frames, message)
            video = writer.finish()
        yield _result(job, video, {**report.as_dict(), "model_calls": state.calls})


@dataclass(frozen=True, slots=True)
class Embeds:
    """What prompts [1, 512, text_dim] and images [1, 514, image_dim] became; no negative for a guide_scale of 1."""

    prompt: Tensor
    negative: Tensor | None
    images: Tensor


def sample(job: Job, report: Report, embeds: Embeds, condition: Tensor) -> Generator[Step, None, Denoised]:
    """Denoise and return the last state. The context's keys and values go with this frame, before decoding begins."""
    request, looped = job.request, job.plan.stage("denoise")
    scheduler = _scheduler(job)
    with report.stage("context"), job.open("context_embedder", job.plan.stage("context")) as embedder:
        modulations = embedder.modulations(scheduler.timesteps)
        context = embedder(embeds.prompt, embeds.images)
        negative_context = None if embeds.negative is None else embedder(embeds.negative, embeds.images)
    yield report.step(1, 1, "context embedded")

    policy = make_policy(request.acceleration, request.num_inference_steps, load_acceleration_config(job.settings))
    to_rgb = fit_latent_to_rgb(condition[:, _MASK_CHANNELS:], job.images)
    noise = initial_noise(job.seed, _latent_shape(job)).to(job.device)
    with report.stage("denoise"), job.open("transformer", looped) as transformer:
        guided = Guided(
            transformer,
            condition,
            modulations,
            context,
            negative_context,
            request.guide_scale,
            together=looped.resident_blocks is not None,
            chunk_tokens=job.plan.chunk_tokens,
            residual_dtype=torch.float32 if job.settings.precision == "reference" else None,
        )
        for state in denoise(guided, scheduler, noise, policy):
            preview = to_rgb.picture(state.clean)
            yield report.step(state.done, state.total, f"step {state.done} of {state.total}", preview=preview)
    report.acceleration = policy.summary()
    return state


def prepare(request: Request, settings: Settings, output: Path | str | None = None, *, check: Check = unchecked) -> Job:
    """Check everything that can be checked before a weight is read: request, images, model, device, memory, output."""
    _refuse_features_to_come(request)
    check_prompt(request.prompt, load_safety_config(), enabled=request.enable_safety_checker)
    if request.enable_safety_checker:
        require_checker(settings)
    request, remarks = _profiled(request, settings)
    files = find_model(settings)
    device = resolve_device(settings.device)
    start = load_image(request.start_image_url, field="start_image_url")
    end = load_image(request.end_image_url, field="end_image_url")
    canvas, start_size = files.config.canvas(request.resolution), Size(start.height, start.width)
    size = output_size(canvas, request.aspect_ratio, start_size)
    geometry = Geometry(size, request.num_frames)
    dtype = compute_dtype(device)
    small = Geometry(output_size(files.config.canvas("480p"), request.aspect_ratio, start_size), NATIVE_FRAMES)
    plan = make_plan(
        geometry,
        files.config,
        network_sizes(files.config),
        Machine(str(device), free_bytes(device), free_ram_bytes(), dtype.itemsize),
        smaller=small if small.tokens < geometry.tokens else None,
    )
    plan = plan.preceded_by(*_switched_on(request))
    seed = secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed
    path = _output_path(settings, seed, output)
    check_output(path, largest_bytes(geometry))
    images = (picture_tensor(fit(start, size)), picture_tensor(fit(end, size)))
    return Job(request, settings, files, device, dtype, images, plan, seed, path, check, remarks)


def _scheduler(job: Job) -> Scheduler:
    if job.settings.profile is None:
        return Scheduler(job.request.num_inference_steps, job.request.shift)
    profile = load_profile(job.settings.profile)
    return Scheduler.distilled(profile.steps, profile.shift)


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


def plan_run(settings: Settings, request: Request, *, machine: Machine | None) -> tuple[ModelConfig, Plan]:
    """Return the model's configuration and the plan of a run on `machine` (None: this one). No weights are needed.

    Of the request its resolution, aspect ratio, number of frames and switches count; its images are not looked at.

    Raises DoesNotFit; ModelNotFound where the settings name a folder that is none.
    """
    config, device = model_config(settings), resolve_device(settings.device)
    here = Machine(str(device), free_bytes(device), free_ram_bytes(), compute_dtype(device).itemsize)
    sizes = {name: output_size(config.canvas(name), request.aspect_ratio, _WIDE) for name in RESOLUTIONS}
    geometry, small = Geometry(sizes[request.resolution], request.num_frames), Geometry(sizes["480p"], NATIVE_FRAMES)
    smaller = small if small.tokens < geometry.tokens else None
    plan = make_plan(geometry, config, network_sizes(config), machine or here, smaller=smaller)
    return config, plan.preceded_by(*_switched_on(request))


def _switched_on(request: Request) -> list[StagePlan]:
    """Return the stages that the request's switches add before all others."""
    return [safety_stage(load_safety_config())] if request.enable_safety_checker else []


def _refuse_features_to_come(request: Request) -> None:
    for name in _FEATURES_TO_COME:
        if getattr(request, name):
            message = f"{name} is not available in wan_local {__version__}; leave it false. Nothing was generated."
            raise InvalidRequest.field(name, "feature_not_supported", message, value=True)


def _check_images(job: Job, report: Report) -> Iterator[Step]:
    """Let the safety checker see both images as the model will see them. Raises InvalidRequest; off: does nothing."""
    if not job.request.enable_safety_checker:
        return
    with report.stage("safety"):
        checker = load_checker(job.settings)
        start, end = (to_uint8(image.unsqueeze(1))[0] for image in job.images)
        scores = check_images(checker, {"start_image_url": start, "end_image_url": end})
        report.facts["safety"] = {"checker": checker.name, **scores}
    yield report.step(1, 1, f"both images pass the safety checker ({checker.name}: {max(scores.values()):.4f} of 1)")


def _checked(parts: Iterator[Decoded], job: Job, report: Report) -> Iterator[Decoded]:
    """Let the safety checker see frames as they pass. Raises InvalidRequest before the video has its name."""
    if not job.request.enable_safety_checker:
        yield from parts
        return
    check = FrameCheck(load_checker(job.settings), job.geometry.num_frames, job.request)
    for part in parts:
        check.see(part.frames)
        yield part
    report.facts["safety"] |= {"frames": check.finish()}


def _output_path(settings: Settings, seed: int, output: Path | str | None) -> Path:
    if output is not None:
        return Path(output).expanduser().absolute()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    return settings.output_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}-{secrets.token_hex(2)}.mp4"


def _remarks(job: Job) -> list[str]:
    """What a caller may want to know before the run."""
    remarks = list(job.remarks)
    if job.request.num_frames > NATIVE_FRAMES:
        remarks.append(
            f"{job.request.num_frames} frames: the model was trained on {NATIVE_FRAMES}; colours may shift early on. "
            f"{job.geometry.generated_frames} are generated, the first and the last are always kept."
        )
    if torch.equal(*job.images):
        remarks.append("start and end image are the same picture: expect little motion unless the prompt describes it.")
    return remarks


def _embed_prompts(text_encoder: Any, job: Job, report: Report) -> tuple[Tensor, Tensor | None]:
    """Return prompt_embeds and negative_prompt_embeds; the latter is None where guidance does not need it."""
    length = job.files.config.transformer.text_tokens
    tokenizer = load_tokenizer(job.files.folder / "tokenizer")
    embeds = []
    for name in ("prompt", "negative_prompt"):
        tokens = tokenize(tokenizer, getattr(job.request, name), limit=length)
        if tokens.cut:
            report.note(
                f"{name} is {length + tokens.cut} tokens long; the last {tokens.cut} beyond {length} were left out."
            )
        embeds.append(embed_prompt(text_encoder, tokens, length=length))
    return embeds[0], None if job.request.guide_scale == 1 else embeds[1]


def _latent_shape(job: Job) -> tuple[int, int, int, int]:
    latent = job.geometry.latent_size
    return job.files.config.transformer.out_channels, job.geometry.latent_frames, latent.height, latent.width


def _writer(job: Job, calls: int, report: Report) -> VideoWriter:
    request = job.request
    made_from = {name: as_json(getattr(request, name)) for name in type(request).model_fields}
    config = job.files.config
    return VideoWriter(
        job.output,
        size=job.geometry.size,
        frames_per_second=request.frames_per_second,
        metadata={
            **made_from,
            "seed": job.seed,
            "model": config.name,
            "model_title": config.title,
            "model_calls": calls,
            **report.facts,
            "generator": f"wan_local {__version__}",
        },
        embed_metadata=job.settings.embed_metadata,
    )


def _result(job: Job, video: VideoReport, measured: dict[str, Any]) -> Result:
    config = job.files.config
    report = {
        "model": config.name,
        "model_title": config.title,
        "width": job.geometry.size.width,
        "height": job.geometry.size.height,
        "num_frames": video.num_frames,
        "generated_frames": job.geometry.generated_frames,
        "planned_peak_bytes": {stage.name: stage.peak_bytes for stage in job.plan.stages},
        **measured,
    }
    file = File(url=video.path.as_uri(), file_name=video.path.name, file_size=video.file_bytes, path=video.path)
    return Result(video=file, seed=job.seed, report=report)
