"""The story: a request and two images become an mp4. One generator; it yields `Step`s and last a `Result`.

Stop iterating (`close()` the generator) to cancel: every stage frees its network and no part of a video is left. Once a
step is done the run itself is kept, and `resume` goes on with it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_local import __version__, runs
from wan_local.acceleration import EveryStep, make_policy
from wan_local.answers import Answers, Latents, Remembering
from wan_local.attention import PLAIN_KERNELS
from wan_local.checkpoint import ModelFiles, find_model
from wan_local.conditioning import initial_noise
from wan_local.decode import decode_frames
from wan_local.denoise import Guided, denoise
from wan_local.denoiser import Denoiser
from wan_local.device import capped, card_name, resolve_device, spill_bytes
from wan_local.encoders import encode_frames, encode_images, encode_prompts
from wan_local.errors import DeviceFailed, NotResumable, OutOfMemory, WanLocalError
from wan_local.ladder import Rung, has_failed
from wan_local.likeness import compared_frames
from wan_local.lock import holding_card
from wan_local.models.transformer import Transformer
from wan_local.order import changes_since, check_model, read_order
from wan_local.parking import placed
from wan_local.planner import GIB
from wan_local.preparation import Job, planned, prepare, remarks_on
from wan_local.preview import fit_latent_to_rgb
from wan_local.report import Report
from wan_local.request import Check, File, Request, Result, Step, unchecked
from wan_local.scheduler import Scheduler
from wan_local.settings import Settings, load_profile, load_settings
from wan_local.switches import checked_frames, checked_images, expanded_prompt
from wan_local.unfinished import as_begun, begun, sent_to, taken
from wan_local.video import VideoReport, VideoWriter
from wan_local.workspace import Workspace

_MASK_CHANNELS = 4
_RAM = torch.device("cpu")


def generate(request: Request, *, settings: Settings | None = None, output: Path | str | None = None) -> Result:
    """Make one video and return where it is. Blocks; iterate over `Pipeline.generate` to see the steps.

    Raises InvalidRequest, ModelNotFound, WrongModel, CorruptModel, NotAvailable, DoesNotFit before any weight is
    read, and NumericalError, OutOfMemory or OutputError later; a note on an error (`__notes__`) says how to go on with
    the run where it is kept.
    """
    return _last(Pipeline(settings).generate(request, output=output))


def resume(run_id: str, *, settings: Settings | None = None, output: Path | str | None = None) -> Result:
    """Finish a run that was stopped, failed or killed, and return where its video is; `wan-local runs` lists them.

    settings: unless given those the run was begun with, and over them what variables of the environment say of how it
    is made. Raises NotResumable, and as `generate` does.
    """
    here = settings or load_settings()
    return _last(Pipeline(settings or runs.settings_of(run_id, here)).resume(run_id, output=output))


def _last(events: Iterator[Step | Result]) -> Result:
    result: Result | None = None
    for event in events:
        if isinstance(event, Result):
            result = event
    assert result is not None, "the pipeline ended without a result"
    return result


class Pipeline:
    """Makes videos with one set of settings; holds no weights between runs."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()

    def generate(
        self,
        request: Request,
        *,
        output: Path | str | None = None,
        run_id: str | None = None,
        check: Check = unchecked,
    ) -> Generator[Step | Result]:
        """Yield a `Step` after each piece of work and last the `Result`.

        output: the mp4 to write; a new name in the settings' `output_dir` unless given. run_id: under which the run is
        kept until it is done; an unfinished run of that id is gone on with, where it can be. check: called between the
        blocks of every network; what it raises (`Cancelled`, say) ends the run there. Raises as `generate` does.
        """
        anew: list[str] = []
        if run_id is not None and runs.find(self.settings, run_id) is not None:
            events = self.resume(run_id, output=output, check=check)
            try:
                first = next(events)
            except NotResumable as error:
                anew.append(f"begun anew: {error}")
                runs.remove(self.settings, run_id)
            else:
                with closing(events):
                    yield first
                    yield from events
                return
        with self._card():
            job = prepare(request, self.settings, output)
            report = Report(job.device)
            for text in anew:
                report.note(text)
            with begun(job.order, job.settings, job.files, job.plan, run_id or runs.new_id(), report.note) as answers:
                result = yield from _make(job, report, answers, check)
        yield result

    def resume(
        self, run_id: str, *, output: Path | str | None = None, check: Check = unchecked
    ) -> Generator[Step | Result]:
        """Go on with an unfinished run from its last step, to the same video bit for bit.

        output: elsewhere than it was to go. Raises NotResumable, and as `generate` does.
        """
        where = None if output is None else Path(output).expanduser().absolute()
        with self._card(), taken(self.settings, run_id) as folder:
            files, device = find_model(self.settings), resolve_device(self.settings.device)
            check_model(folder.about, files)
            report = Report(device)
            answers = Answers(folder.folder, report.note)
            order = read_order(folder.folder, folder.about, output=where)
            job = planned(order, self.settings, files, device, answered=answers.expansion() is not None)
            job = replace(job, plan=as_begun(job.plan, folder.about, report.note))
            sent_to(folder, order.output, report.note)  # after it was checked: a mistyped one is not kept
            for text in changes_since(folder.about, self.settings, device):
                report.note(text)
            result = yield from _make(job, report, answers, check)
        yield result

    @contextmanager
    def _card(self) -> Iterator[None]:
        """Hold the settings' card, and no more of its memory than they say. Raises Busy, DeviceFailed."""
        device, gibibytes = resolve_device(self.settings.device), self.settings.vram_gibibytes
        card = card_name(device)
        hold = nullcontext() if card is None else holding_card(card, shared=self.settings.share_device)
        try:
            with hold:
                limits = (None if gibibytes is None else int(gibibytes * GIB), spill_bytes(device))
                with capped(device, min((limit for limit in limits if limit is not None), default=None)):
                    yield
        except (RuntimeError, OutOfMemory) as error:  # a library may take a failed card for one without memory
            known = isinstance(error, WanLocalError) and not isinstance(error, OutOfMemory)
            if known or not has_failed(device):
                raise
            fault = str(error).partition("\n")[0]
            failed = DeviceFailed(
                f"{device} ({card}) answers this process no more: {fault}. Restart the process, or the server; "
                "`wan-local runs` lists what is kept."
            )
            for note in getattr(error, "__notes__", ()):  # how to go on with the run, where it is kept
                failed.add_note(note)
            raise failed from error


def _make(job: Job, report: Report, answers: Answers | None, check: Check) -> Generator[Step, None, Result]:
    """Make the video of a job; what the answers tell already is not done again."""
    geometry, space = job.geometry, job.workspace(report, check, private=answers.folder if answers else None)
    for text in remarks_on(job):
        report.note(text)
    _report_loras(job.files, report)
    yield report.step(1, 1, f"{job.files.config.title}: {job.plan.describe()}")
    yield from checked_images(job.switches, job.images, report)
    prompt = yield from expanded_prompt(job.switches, job.images, answers, report, seed=job.seed, check=check)
    latents = answers.final() if answers else None
    if latents is None:
        with report.stage("text"):
            prompts = encode_prompts(_prompts(job.request, prompt), space)
        yield report.step(1, 1, "prompts encoded")

        with report.stage("image"):
            image_embeds = encode_images(job.images, space)
        yield report.step(1, 1, "images encoded")

        with report.stage("condition"):
            condition = encode_frames(job.images, geometry.generated_frames, space)
        yield report.step(1, 1, "first and last frame encoded")

        embeds = Embeds(prompts["prompt"], prompts.get("negative_prompt"), image_embeds)
        latents = yield from sample(job, space, embeds, condition, answers)
        if answers:
            answers.finish(latents)

    with report.stage("decode"):
        video = yield from _decode(job, space, latents, owner=answers.folder.name if answers else None)
    report.acceleration = latents.acceleration
    saved = {"state": answers.cost()} if answers else {}
    compared = {"memory": report.beside(job.plan)}
    return _result(job, video, {**report.as_dict(), **compared, "model_calls": latents.calls, **saved})


def _decode(job: Job, space: Workspace, final: Latents, *, owner: str | None) -> Generator[Step, None, VideoReport]:
    """Write the video, from its first frame on at every attempt; return what was written. owner: the run's id."""
    total, report = job.geometry.generated_frames, space.report
    for attempt in space.attempts("decode"):
        with (
            attempt as rung,
            space.open("vae_decoder", rung) as vae,
            _writer(job, final.calls, report, owner) as writer,
        ):
            latents, tiling = final.latents.to(rung.device), rung.plan.tiling
            frames = decode_frames(vae, latents, job.geometry, tiling=tiling, check=space.check)
            compared = compared_frames(frames, job.images, job.files, report)
            for decoded in checked_frames(job.switches, compared, job.geometry.num_frames, report):
                writer.write(decoded.frames)
                yield report.step(decoded.done, total, f"frame {decoded.done} of {total}")
            video = writer.finish()
    return video


def _report_loras(files: ModelFiles, report: Report) -> None:
    if files.loras:
        report.facts["loras"] = [asdict(lora.report) for lora in files.loras]
    for lora in files.loras:
        if lora.report.unmatched or lora.report.missing_images:
            report.note(lora.report.describe())


@dataclass(frozen=True, slots=True)
class Embeds:
    """What prompts [1, 512, text_dim] and images [1, 514, image_dim] became; no negative for a guide_scale of 1."""

    prompt: Tensor
    negative: Tensor | None
    images: Tensor


def sample(
    job: Job, space: Workspace, embeds: Embeds, condition: Tensor, answers: Answers | None = None
) -> Generator[Step, None, Latents]:
    """Denoise and return the final latents. The context's keys and values go with this frame, before decoding."""
    request, report = job.request, space.report
    scheduler = _scheduler(job)
    with report.stage("context"):
        for attempt in space.attempts("context"):
            with attempt as rung, space.open("context_embedder", rung) as embedder:
                modulations = embedder.modulations(scheduler.timesteps)
                prompts = [embeds.prompt] if embeds.negative is None else [embeds.prompt, embeds.negative]
                keep_on = _RAM if rung.plan.parked else None
                contexts = embedder.contexts(prompts, embeds.images, keep_on=keep_on)
    yield report.step(1, 1, "context embedded")

    @contextmanager
    def guided(transformer: Transformer, rung: Rung) -> Iterator[Guided]:
        with placed(contexts, rung.plan.parked, job.device) as (context, *negative_context):
            yield Guided(
                transformer,
                condition,
                modulations,
                context,
                negative_context[0] if negative_context else None,
                request.guide_scale,
                together=rung.plan.together,
                chunk_tokens=rung.chunk_tokens,
                residual_dtype=torch.float32 if job.settings.precision == "reference" else None,
                choice=job.kernels if rung.device == job.device else PLAIN_KERNELS,
            )

    policy = make_policy(request.acceleration, request.num_inference_steps, job.order.acceleration)
    to_rgb = fit_latent_to_rgb(condition[:, _MASK_CHANNELS:], job.images)
    noise = initial_noise(job.order.seed, _latent_shape(job)).to(job.device)
    report.kernels = job.kernels.reason
    looped = job.plan.stage("denoise")
    modelled = None if looped.source == "file" else looped.seconds  # how fast the disk is, is not known
    expected = None if modelled is None else modelled / request.num_inference_steps
    with report.stage("denoise"), Denoiser(space, guided, expected_seconds=expected) as denoiser:
        yield report.step(0, len(scheduler), "the transformer is read, and the first step made")
        kept = Remembering(denoiser, answers, both=not isinstance(policy, EveryStep)) if answers else None
        for state in denoise(kept or denoiser, scheduler, noise, policy):
            if kept and kept.replays:
                report.known(state.done)
            preview = to_rgb.picture(state.clean)
            denoiser.pause()
            yield report.step(state.done, state.total, f"step {state.done} of {state.total}", preview=preview)
    return Latents(state.latents, state.calls, policy.summary())


def _scheduler(job: Job) -> Scheduler:
    if job.order.profile is None:
        return Scheduler(job.request.num_inference_steps, job.request.shift)
    profile = load_profile(job.order.profile)
    return Scheduler.distilled(profile.steps, profile.shift)


def _prompts(request: Request, prompt: str) -> dict[str, str]:
    """Return the prompts that guidance needs. prompt: the request's, or what it was expanded to."""
    return (
        {"prompt": prompt}
        if request.guide_scale == 1
        else {"prompt": prompt, "negative_prompt": request.negative_prompt}
    )


def _latent_shape(job: Job) -> tuple[int, int, int, int]:
    latent = job.geometry.latent_size
    return job.files.config.transformer.out_channels, job.geometry.latent_frames, latent.height, latent.width


def _writer(job: Job, calls: int, report: Report, owner: str | None) -> VideoWriter:
    config = job.files.config
    return VideoWriter(
        job.order.output,
        size=job.geometry.size,
        frames_per_second=job.request.frames_per_second,
        metadata={
            **job.order.words,
            "seed": job.order.seed,
            "model": config.name,
            "model_title": config.title,
            "model_calls": calls,
            **report.facts,
            "generator": f"wan_local {__version__}",
        },
        embed_metadata=job.settings.embed_metadata,
        owner=owner,
    )


def _weights(job: Job) -> dict[str, Any]:
    """Return the formats of a store, and what its int8 weights were used by; other weights are as they are."""
    manifest = job.files.manifest
    if manifest is None:
        return {"formats": "as in the files"}
    arithmetic = {stage.name: stage.int8_arithmetic for stage in job.plan.stages if stage.int8_arithmetic}
    words = {"keep_edges": manifest.keep_edges, "rotated": list(manifest.rotated), "loras": list(manifest.loras)}
    return {"formats": dict(manifest.formats), "int8_arithmetic": arithmetic, **words}


def _result(job: Job, video: VideoReport, measured: dict[str, Any]) -> Result:
    config = job.files.config
    report = {
        "model": config.name,
        "model_title": config.title,
        "width": job.geometry.size.width,
        "height": job.geometry.size.height,
        "num_frames": video.num_frames,
        "generated_frames": job.geometry.generated_frames,
        "weights": _weights(job),
        "planned_peak_bytes": {stage.name: stage.peak_bytes for stage in job.plan.stages},
        **measured,
    }
    file = File(url=video.path.as_uri(), file_name=video.path.name, file_size=video.file_bytes, path=video.path)
    return Result(video=file, seed=job.order.seed, report=report)
