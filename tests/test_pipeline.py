"""The whole story on the embedded model: two real images in, an mp4 out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.stamps import END, START, stamp_request, stamp_settings
from wan_local import encoders, preparation
from wan_local.denoise import Guided
from wan_local.errors import DoesNotFit, InvalidRequest, ModelNotFound, NotAvailable, NumericalError, OutputError
from wan_local.geometry import Size
from wan_local.image import fit, load_image
from wan_local.likeness import LOWEST_PSNR
from wan_local.pipeline import Pipeline, generate
from wan_local.planner import Plan
from wan_local.request import Result, Step
from wan_local.settings import Settings, load_settings
from wan_local.video import read_video


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    return stamp_settings(tmp_path, monkeypatch, cache_gigabytes=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Give one run of `stamp_request()` as it is, for what is compared with it."""
    with pytest.MonkeyPatch.context() as patch:
        settings = stamp_settings(tmp_path_factory.mktemp("plain"), patch, cache_gigabytes=0)
        return generate(stamp_request(), settings=settings)


def frames_of(result: Result) -> np.ndarray:
    assert result.video.path is not None
    return read_video(result.video.path)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_two_images_become_a_video_that_begins_and_ends_with_them(tmp_path: Path) -> None:
    settings, output = load_settings(model="tiny", device="cpu"), tmp_path / "bird.mp4"
    result = generate(stamp_request(num_inference_steps=20), settings=settings, output=output)
    frames = read_video(output)
    assert frames.shape == (81, 80, 80, 3)
    for path, frame in ((START, frames[0]), (END, frames[-1])):
        wanted = np.asarray(fit(Image.open(path).convert("RGB"), Size(80, 80)))
        # the wrong picture of the two is below 12 dB
        assert psnr(frame, wanted) > 20
    assert result.seed == 42
    assert result.model_dump() == {
        "video": {
            "url": output.as_uri(),
            "content_type": "video/mp4",
            "file_name": "bird.mp4",
            "file_size": output.stat().st_size,
        },
        "seed": 42,
    }
    assert result.report["model"] == "wan_local-flf2v-tiny"
    assert set(result.report["seconds"]) == {
        "text", "image", "condition", "context", "denoise", "decode", "total",
    }  # fmt: skip
    assert left_over(tmp_path) == ["bird.mp4", "bird.mp4.json"]
    sidecar = json.loads((tmp_path / "bird.mp4.json").read_text(encoding="utf-8"))
    assert sidecar["model"] == "wan_local-flf2v-tiny" and sidecar["seed"] == 42
    assert sidecar["prompt"] == "a small blue bird takes off" and sidecar["start_image_url"] == "first_frame.png"


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"num_frames": 82, "aspect_ratio": "16:9"}, (82, 32, 48, 3)),
        ({"num_frames": 97, "aspect_ratio": "9:16"}, (97, 48, 32, 3)),
        ({"num_frames": 100, "resolution": "720p", "aspect_ratio": "1:1"}, (100, 48, 48, 3)),
        ({"guide_scale": 1, "frames_per_second": 24}, (81, 32, 32, 3)),
    ],
)
def test_frame_counts_and_aspect_ratios_come_out_as_asked(
    settings: Settings, changes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    result = generate(stamp_request(**changes), settings=settings)
    assert result.video.path is not None and result.video.path.parent == settings.output_dir
    assert frames_of(result).shape == shape


def test_auto_follows_the_start_image_whatever_the_end_image_is(settings: Settings) -> None:
    wide = Image.effect_noise((320, 140), 60).convert("RGB")
    tall = Image.effect_noise((100, 300), 60).convert("RGB")
    result = generate(stamp_request(start_image_url=wide, end_image_url=tall), settings=settings)
    assert (result.report["width"], result.report["height"]) == (48, 16)


def test_a_seed_gives_the_same_frames_again_and_another_gives_others(settings: Settings, plain: Result) -> None:
    again, other = (generate(stamp_request(seed=seed), settings=settings) for seed in (plain.seed, plain.seed + 1))
    assert np.array_equal(frames_of(again), frames_of(plain))
    assert not np.array_equal(frames_of(other), frames_of(plain))


def test_a_random_seed_is_below_2_to_31_and_returned(settings: Settings) -> None:
    seeds = {preparation.prepare(stamp_request(seed=None), settings).seed for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**31 for seed in seeds)


def test_steps_tell_every_stage_in_order_with_previews_and_an_eta(settings: Settings) -> None:
    events = list(Pipeline(settings).generate(stamp_request(num_inference_steps=3)))
    steps, result = [event for event in events if isinstance(event, Step)], events[-1]
    assert isinstance(result, Result) and len(steps) == len(events) - 1
    order = list(dict.fromkeys(step.stage for step in steps))
    assert order == ["plan", "text", "image", "condition", "context", "denoise", "decode"]
    denoising = [step for step in steps if step.stage == "denoise"]
    assert [(step.index, step.total) for step in denoising] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    begun, *made = denoising  # the first is there before the transformer is
    assert begun.preview is None and begun.eta_seconds is None
    assert all(step.preview.shape == (32, 32, 3) and step.eta_seconds is not None for step in made)
    assert steps[-1].index == steps[-1].total == 81
    assert [step.elapsed_seconds for step in steps] == sorted(step.elapsed_seconds for step in steps)


@pytest.mark.parametrize("stage", ["text", "condition", "denoise", "decode"])
def test_closing_the_generator_in_any_stage_leaves_nothing(settings: Settings, tmp_path: Path, stage: str) -> None:
    running = Pipeline(settings).generate(stamp_request(), output=tmp_path / "cancelled.mp4")
    for event in running:
        if isinstance(event, Step) and event.stage == stage:
            running.close()
            break
    assert left_over(tmp_path) == []


def test_a_run_that_streams_all_its_weights_gives_the_same_video(
    settings: Settings, plain: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan, streamed_stages = preparation.make_plan, []

    def plan_that_streams(*args: Any, **kwargs: Any) -> Plan:
        plan = make_plan(*args, **kwargs)
        stages = [
            replace(stage, resident_blocks=0, source="file") if stage.name in ("text", "context", "denoise") else stage
            for stage in plan.stages
        ]
        streamed_stages.extend(stage for stage in stages if stage.source)
        return replace(plan, stages=tuple(stages))

    monkeypatch.setattr(preparation, "make_plan", plan_that_streams)
    streamed = generate(stamp_request(), settings=settings)
    assert len(streamed_stages) == 3
    assert np.array_equal(frames_of(streamed), frames_of(plain))


def test_nan_in_the_latents_writes_no_video(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "encode_condition", _encode_and_spoil)
    with pytest.raises(NumericalError, match="step 1 of 2"):
        generate(stamp_request(), settings=settings, output=tmp_path / "nan.mp4")
    assert left_over(tmp_path) == []


def _encode_and_spoil(*args: Any, **kwargs: Any) -> Any:
    from wan_local.conditioning import encode_condition

    condition = encode_condition(*args, **kwargs)
    condition[0, 5, 0, 0, 0] = float("nan")
    return condition


def spoiled(settings: Settings, folder: Path, part: str, spoil: Callable[[dict[str, Any]], None]) -> Settings:
    """Return settings for a copy of the embedded model whose `part` was spoiled, its files' sizes as they were."""
    model = Path(shutil.copytree(str(resources.files("wan_local") / "tiny_model"), folder / "spoiled"))
    file = next((model / part).glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    spoil(tensors)
    save_file(tensors, file, {"format": "pt"})
    return replace(settings, model=str(model))


def test_a_report_tells_how_much_the_ends_look_like_the_images(plain: Result, tmp_path: Path) -> None:
    frames = frames_of(plain)
    for name, frame, image in (("first", frames[0], START), ("last", frames[-1], END)):
        picture = np.asarray(fit(load_image(image, field="image"), Size(*frame.shape[:2])))
        assert plain.report[f"{name}_frame_psnr"] == pytest.approx(psnr(frame, picture), abs=1.0)  # x264 comes between
        assert plain.report[f"{name}_frame_psnr"] > LOWEST_PSNR
    assert not any("does not look like" in note for note in plain.report["notes"])


def test_damaged_weights_are_told_by_what_they_make(settings: Settings, tmp_path: Path) -> None:
    def zero_the_end(tensors: dict[str, Any]) -> None:
        for name in sorted(tensors)[len(tensors) // 2 :]:
            tensors[name].zero_()

    result = generate(stamp_request(), settings=spoiled(settings, tmp_path, "transformer", zero_the_end))
    told = [note for note in result.report["notes"] if "does not look like the image" in note]
    assert len(told) == 1 and "`wan-local inspect --verify`" in told[0]
    assert min(result.report["first_frame_psnr"], result.report["last_frame_psnr"]) < LOWEST_PSNR


def test_a_video_of_one_flat_colour_is_no_success(settings: Settings, tmp_path: Path) -> None:
    def zero_the_last_layer(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("decoder.conv_out"):
                tensor.zero_()

    with pytest.raises(NumericalError, match="one flat colour"):
        generate(
            stamp_request(),
            settings=spoiled(settings, tmp_path, "vae", zero_the_last_layer),
            output=tmp_path / "flat.mp4",
        )
    assert not [*tmp_path.glob("*flat*")]


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("wan_local.stage._load", fail)
    return


@pytest.mark.usefixtures("no_weights_are_read")
class TestBeforeAnyWeightIsRead:
    @pytest.mark.parametrize("field", ["start_image_url", "end_image_url"])
    def test_a_missing_image_is_refused_with_its_field(self, settings: Settings, field: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            generate(stamp_request(**{field: "/no/such/picture.png"}), settings=settings)
        assert caught.value.detail[0]["loc"] == ["body", field]

    def test_the_real_model_without_weights_is_an_error_and_never_the_tiny_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("WAN_LOCAL_MODEL", raising=False)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        real = load_settings(models_dir=tmp_path / "models", output_dir=tmp_path / "outputs")
        with pytest.raises(ModelNotFound, match="80 GB"):
            generate(stamp_request(), settings=real)
        assert left_over(tmp_path) == []

    def test_too_little_memory_is_refused(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preparation, "free_bytes", lambda _: 2**20)
        with pytest.raises(DoesNotFit, match="32x32 x 81 frames"):
            generate(stamp_request(), settings=settings)

    def test_an_output_that_cannot_be_written_is_refused(self, settings: Settings, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="does not exist"):
            generate(stamp_request(), settings=settings, output=tmp_path / "no" / "folder" / "x.mp4")

    @pytest.mark.parametrize("device", ["cuda:97", "mps", "quantum"])
    def test_a_device_that_is_not_there_is_refused(self, tmp_path: Path, device: str) -> None:
        with pytest.raises(NotAvailable, match=device):
            generate(stamp_request(), settings=load_settings(model="tiny", device=device, output_dir=tmp_path))


def test_remarks_tell_of_long_videos_long_prompts_and_equal_images(settings: Settings) -> None:
    request = stamp_request(num_frames=85, end_image_url=START, prompt="red square moving " * 300)
    result = generate(request, settings=settings)
    notes = " ".join(result.report["notes"])
    assert "85 frames" in notes and "same picture" in notes and "beyond 512 were left out" in notes


def test_kernels_that_were_asked_for_run_and_are_named_in_the_report(settings: Settings, plain: Result) -> None:
    fast = generate(stamp_request(), settings=replace(settings, attention="int8", kernels="on"))
    assert "sdpa" in plain.report["kernels"] and "int8" in fast.report["kernels"]
    assert psnr(frames_of(fast), frames_of(plain)) > 30


def test_a_backend_that_is_not_installed_ends_the_run_before_a_weight_is_read(settings: Settings) -> None:
    with pytest.raises(NotAvailable, match="SageAttention"):
        generate(stamp_request(), settings=replace(settings, attention="sage"))


def test_a_step_that_is_not_finite_is_noted_and_the_video_is_made(
    settings: Settings, plain: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = Guided.predict

    def predict(self: Any, latents: Any, timestep: float) -> Any:
        noise_pred, conditional = predicted(self, latents, timestep)
        return (noise_pred * np.nan, conditional) if self.choice.fused else (noise_pred, conditional)

    monkeypatch.setattr(Guided, "predict", predict)
    fast = replace(settings, kernels="on")
    result = generate(stamp_request(), settings=fast)
    assert any("computed again, exactly" in note for note in result.report["notes"])
    assert np.array_equal(frames_of(result), frames_of(plain))


def test_what_the_process_holds_already_counts_towards_the_most_it_may_take(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "free_ram_bytes", lambda: 8 * 2**30)
    monkeypatch.setattr(preparation, "free_bytes", lambda _: 8 * 2**30)
    monkeypatch.setattr(preparation, "own_ram_bytes", lambda: 2**30)
    machine = preparation.prepare(stamp_request(), replace(settings, ram_gibibytes=6)).machine
    assert machine.free_bytes == machine.free_ram_bytes == 5 * 2**30
    assert preparation.prepare(stamp_request(), settings).machine.free_ram_bytes == 8 * 2**30


@pytest.mark.parametrize("changes", [{}, {"precision": "reference"}, {"kernels": "on", "int8_arithmetic": "w8a8"}])
def test_a_plan_asked_for_is_the_one_that_a_run_is_made_by(
    settings: Settings, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "free_bytes", lambda _: 2**30)
    chosen, request = replace(settings, **changes), stamp_request(aspect_ratio="16:9")
    job = preparation.prepare(request, chosen)
    _, plan, kernels = preparation.plan_run(chosen, request, machine=None)
    assert (plan.stages, kernels) == (job.plan.stages, job.kernels)


def test_a_budget_below_what_is_free_is_what_a_run_is_planned_within(settings: Settings, tmp_path: Path) -> None:
    budget = replace(settings, ram_gibibytes=0.01)
    with pytest.raises(DoesNotFit, match=r"0\.0 GiB is free"):
        generate(stamp_request(), settings=budget, output=tmp_path / "bird.mp4")
    assert left_over(tmp_path / "outputs") == [] and not (tmp_path / "bird.mp4").exists()
