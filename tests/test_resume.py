"""A run that was stopped, failed or killed goes on from its last step and ends with the same file, byte for byte."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image

import wan_local
from tests.stamps import END, START, stamp_request, stamp_settings
from wan_local import durable, order, pipeline, runs
from wan_local.answers import Answers, Latents
from wan_local.denoise import Guided
from wan_local.errors import Busy, DeviceFailed, NotResumable, OutputError
from wan_local.failure import describe
from wan_local.pipeline import Pipeline
from wan_local.request import Request, Result, Step
from wan_local.settings import Settings

STEPS = 13  # from 12 on `regular` merges
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stamps:
    """Settings, a request, and the video it makes when nothing gets in its way."""

    settings: Settings
    request: Request
    video: bytes
    sidecar: bytes


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stamps]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stamps")
        settings = stamp_settings(folder, patch, state_dir=folder / "state", cache_dir=folder / "cache")
        request = stamp_request(num_inference_steps=STEPS)
        path = folder / "whole.mp4"
        pipeline.generate(request, settings=settings, output=path)
        assert runs.list_runs(settings) == []
        yield Stamps(settings, request, path.read_bytes(), Path(f"{path}.json").read_bytes())


@pytest.fixture
def settings(stamps: Stamps, tmp_path: Path) -> Settings:
    """Settings with a state folder of this test alone."""
    return replace(stamps.settings, state_dir=tmp_path / "state", output_dir=tmp_path)


def run_until(settings: Settings, request: Request, run_id: str, output: Path, stage: str, index: int = 1) -> None:
    """Begin a run and close it after the sign of progress `index` of `stage`."""
    running = Pipeline(settings).generate(request, output=output, run_id=run_id)
    for event in running:
        if isinstance(event, Step) and event.stage == stage and event.index >= index:
            running.close()
            return
    pytest.fail(f"{stage} {index} never came")


def finish(settings: Settings, run_id: str) -> Result:
    result = list(Pipeline(settings).resume(run_id))[-1]
    assert isinstance(result, Result)
    assert runs.find(settings, run_id) is None, "a finished run leaves no state"
    return result


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows with every call of the transformer."""
    calls: list[float] = []
    predict = Guided.predict

    def counted(self: Guided, latents: Any, timestep: float) -> Any:
        calls.append(timestep)
        return predict(self, latents, timestep)

    monkeypatch.setattr(Guided, "predict", counted)
    return calls


KILL = """
import gc, os, signal, sys
from pathlib import Path
import pytest, torch
from transformers import AutoTokenizer, CLIPVisionModel, UMT5EncoderModel  # once for all that are forked
from tests.stamps import stamp_request, stamp_settings
from wan_local.failure import describe
from wan_local.pipeline import Pipeline
from wan_local.request import Step
torch.set_num_threads(1)
folder = Path(sys.argv[1])
settings = stamp_settings(folder, pytest.MonkeyPatch(), state_dir=folder / "state", cache_dir=folder / "cache")
gc.freeze()
for place in sys.argv[2:]:
    stage, index = place.split("-")
    child = os.fork()
    if not child:
        output, request = folder / f"{place}.mp4", stamp_request(num_inference_steps=13)
        for event in Pipeline(settings).generate(request, output=output, run_id=place):
            if isinstance(event, Step) and event.stage == stage and event.index >= int(index):
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), place
"""
PLACES = (
    "plan-1",
    "text-1",
    "image-1",
    "condition-1",
    "context-1",
    "denoise-1",
    "denoise-7",
    "denoise-13",
    "decode-70",
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL to send there")
def test_a_run_killed_after_any_stage_or_step_ends_with_the_same_file(stamps: Stamps, tmp_path: Path) -> None:
    script = [sys.executable, "-c", KILL, str(tmp_path), *PLACES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1200, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    settings = replace(stamps.settings, state_dir=tmp_path / "state", cache_dir=tmp_path / "cache")
    left = {run.id: run for run in runs.list_runs(settings)}
    assert set(left) == set(PLACES) and all(run.state == "waiting" for run in left.values())
    assert not list(tmp_path.glob("*.mp4"))
    assert list(tmp_path.glob("*.part")), "the one killed while it wrote its video left a part of it"
    assert left["denoise-7"].calls > 1 and left["context-1"].calls == 0 and left["decode-70"].denoised
    for place in PLACES:
        result = finish(settings, place)
        assert result.video.path == tmp_path / f"{place}.mp4"
        assert result.video.path.read_bytes() == stamps.video, place
        sidecar = Path(f"{result.video.path}.json").read_bytes()
        assert sidecar == stamps.sidecar.replace(b"whole.mp4", f"{place}.mp4".encode())
        assert result.report["notes"] == []
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "changes",
    [
        {"acceleration": "none"},
        {"acceleration": "none", "guide_scale": 1},
        {"acceleration_policy": "static"},
        {"acceleration_policy": "reuse", "num_inference_steps": 20},
    ],
    ids=["none", "unguided", "static", "reuse"],
)
def test_every_policy_resumes_to_the_same_video_and_calls_only_what_is_missing(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"num_inference_steps": STEPS, **changes}
    settings = replace(settings, acceleration_policy=asked.pop("acceleration_policy", None))
    request, calls = stamp_request(**asked), count_calls(monkeypatch)
    whole = pipeline.generate(request, settings=settings, output=tmp_path / "whole.mp4")
    needed = len(calls)
    calls.clear()
    run_until(settings, request, "half", tmp_path / "half.mp4", "denoise", 9)
    before = len(calls)
    result = finish(settings, "half")
    assert 0 < before < needed and len(calls) == needed
    assert (tmp_path / "half.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert result.report["acceleration"] == whole.report["acceleration"]
    assert result.report["model_calls"] == whole.report["model_calls"]


@pytest.mark.parametrize(("stage", "kept"), [("context", False), ("denoise", True), ("decode", True)])
def test_a_stopped_run_is_kept_if_a_step_is_done(
    settings: Settings, stamps: Stamps, tmp_path: Path, stage: str, kept: bool
) -> None:
    run_until(settings, stamps.request, "stopped", tmp_path / "x.mp4", stage)
    run = runs.find(settings, "stopped")
    assert (run is not None) is kept
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",  # as where memory ran out
    ],
)
def test_a_run_on_a_card_that_answers_no_more_is_kept_and_says_what_to_do(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    fault = RuntimeError(f"{words}\nSearch for ...")
    monkeypatch.setattr(pipeline, "decode_frames", lambda *_, **__: (_ for _ in ()).throw(fault))
    monkeypatch.setattr(pipeline, "has_failed", lambda _: True)
    with pytest.raises(
        DeviceFailed, match=r"(illegal memory access|NOT_INITIALIZED).*\. Restart the process"
    ) as raised:
        list(Pipeline(settings).generate(stamps.request, output=tmp_path / "x.mp4", run_id="faulted"))
    run = runs.find(settings, "faulted")
    assert run is not None and run.denoised
    assert raised.value.__notes__ == ["What was done is kept. Go on with: wan-local resume faulted"]


def test_a_failed_decode_keeps_the_latents_and_nothing_else_is_done_again(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline, "decode_frames", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("the card fell off"))
        )
        with pytest.raises(RuntimeError, match="fell off"):
            list(Pipeline(settings).generate(stamps.request, output=tmp_path / "x.mp4", run_id="undecoded"))
    run = runs.find(settings, "undecoded")
    assert run is not None and run.denoised and run.calls == 0
    opened = []
    stage = pipeline.Workspace.open
    monkeypatch.setattr(
        pipeline.Workspace, "open", lambda self, name, rung: (opened.append(name), stage(self, name, rung))[1]
    )
    result = finish(settings, "undecoded")
    assert opened == ["vae_decoder"]
    assert result.video.path is not None and result.video.path.read_bytes() == stamps.video
    assert set(result.report["seconds"]) == {"decode", "total"}


def test_a_damaged_call_is_made_again(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(settings, stamps.request, "damaged", tmp_path / "x.mp4", "denoise", 8)
    run = runs.find(settings, "damaged")
    assert run is not None and run.calls >= 5
    third = run.folder / "call-0003.safetensors"
    content = bytearray(third.read_bytes())
    content[-5] ^= 1
    third.write_bytes(content)
    calls = count_calls(monkeypatch)
    finish(settings, "damaged")
    assert (tmp_path / "x.mp4").read_bytes() == stamps.video
    whole = json.loads(stamps.sidecar)["model_calls"]
    assert len(calls) == whole - 2


def test_the_images_need_not_be_there_any_more(settings: Settings, stamps: Stamps, tmp_path: Path) -> None:
    pictures = {"start_image_url": Image.open(START).convert("RGB"), "end_image_url": Image.open(END).convert("RGB")}
    request = stamp_request(num_inference_steps=STEPS, **pictures)
    run_until(settings, request, "pictures", tmp_path / "x.mp4", "denoise", 2)
    finish(replace(settings, cache_gigabytes=0.0), "pictures")
    # its metadata tells of pictures and not of files, so the video's frames are compared
    assert_same_frames(tmp_path / "x.mp4", stamps.video, tmp_path)
    assert json.loads((tmp_path / "x.mp4.json").read_text())["start_image_url"].startswith("<image")


def assert_same_frames(path: Path, video: bytes, folder: Path) -> None:
    from wan_local.video import read_video

    (folder / "expected.mp4").write_bytes(video)
    assert (read_video(path) == read_video(folder / "expected.mp4")).all()


def test_a_run_keeps_the_encodings_it_was_begun_with(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever became of the cache since: encoded in other tiles, say, their last bits would differ."""
    for cache_gigabytes in (0.0, 1.0):
        chosen = replace(settings, cache_gigabytes=cache_gigabytes, cache_dir=tmp_path / "cache")
        run_until(chosen, stamps.request, "own", tmp_path / "x.mp4", "denoise", 3)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        opened: list[str] = []
        opening = pipeline.Workspace.open

        def recorded(self: Any, network: Any, rung: Any, names: list[str] = opened, opening: Any = opening) -> Any:
            names.append(network)
            return opening(self, network, rung)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.Workspace, "open", recorded)
            finish(chosen, "own")
        assert opened[:2] == ["context_embedder", "transformer"] and len(opened) == 3
        assert (tmp_path / "x.mp4").read_bytes() == stamps.video


def test_an_id_that_is_known_is_gone_on_with(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a queue does after a restart: the same request under the same id."""
    run_until(settings, stamps.request, "job-7", tmp_path / "x.mp4", "denoise", 6)
    calls = count_calls(monkeypatch)
    result = list(Pipeline(settings).generate(stamps.request, run_id="job-7"))[-1]
    assert isinstance(result, Result) and result.video.path == tmp_path / "x.mp4"
    assert len(calls) < json.loads(stamps.sidecar)["model_calls"]
    assert (tmp_path / "x.mp4").read_bytes() == stamps.video


def test_the_time_left_is_told_from_steps_that_are_made_and_not_from_those_that_are_read(
    settings: Settings, stamps: Stamps, tmp_path: Path
) -> None:
    run_until(settings, stamps.request, "paced", tmp_path / "x.mp4", "denoise", 6)
    run = runs.find(settings, "paced")
    assert run is not None
    events = [event for event in Pipeline(settings).resume("paced") if isinstance(event, Step)]
    begun, *steps = [event for event in events if event.stage == "denoise"]
    assert begun.index == 0 and begun.eta_seconds is None
    assert [step.eta_seconds is None for step in steps] == [number < run.calls for number in range(len(steps))]


def test_a_known_id_that_cannot_be_gone_on_with_is_begun_anew(
    settings: Settings, stamps: Stamps, tmp_path: Path
) -> None:
    run_until(settings, stamps.request, "job-8", tmp_path / "x.mp4", "denoise", 6)
    (runs.runs_folder(settings) / "job-8" / "end.png").write_bytes(b"not a picture")
    result = list(Pipeline(settings).generate(stamps.request, output=tmp_path / "y.mp4", run_id="job-8"))[-1]
    assert isinstance(result, Result) and result.report["notes"][0].startswith("begun anew: the run in")
    assert (tmp_path / "y.mp4").read_bytes() == stamps.video and runs.list_runs(settings) == []


def test_resume_is_a_public_function_and_takes_another_output(
    settings: Settings, stamps: Stamps, tmp_path: Path
) -> None:
    run_until(settings, stamps.request, "public", tmp_path / "x.mp4", "denoise", 2)
    result = wan_local.resume("public", settings=settings, output=tmp_path / "y.mp4")
    assert result.video.path == tmp_path / "y.mp4" and not (tmp_path / "x.mp4").exists()
    assert (tmp_path / "y.mp4").read_bytes() == stamps.video


def test_another_output_is_written_down_only_once_it_is_known_to_be_possible(
    settings: Settings, stamps: Stamps, tmp_path: Path
) -> None:
    run_until(settings, stamps.request, "mistyped", tmp_path / "x.mp4", "denoise", 2)
    with pytest.raises(OutputError, match="nowhere"):
        wan_local.resume("mistyped", settings=settings, output=tmp_path / "nowhere" / "y.mp4")
    assert runs.list_runs(settings)[0].about["output"] == str(tmp_path / "x.mp4")
    running = Pipeline(settings).resume("mistyped", output=tmp_path / "y.mp4")
    next(running)
    running.close()
    assert finish(settings, "mistyped").video.path == tmp_path / "y.mp4"


def test_a_run_whose_disk_is_full_can_be_gone_on_with_to_another(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(settings, stamps.request, "full", tmp_path / "x.mp4", "denoise", 10)
    write = durable.write

    def full(path: Path, chunks: Any) -> None:
        if path.is_relative_to(settings.state_dir):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, chunks)

    monkeypatch.setattr(durable, "write", full)
    result = wan_local.resume("full", settings=settings, output=tmp_path / "y.mp4")
    assert (tmp_path / "y.mp4").read_bytes() == stamps.video
    assert any("new output could not be saved (No space left" in note for note in result.report["notes"])


def test_thresholds_are_those_the_run_was_begun_with(settings: Settings, tmp_path: Path) -> None:
    thresholds = tmp_path / "mine.toml"
    thresholds.write_text("[merge]\ntau = 0.5\n")
    begun, request = replace(settings, acceleration_file=thresholds), stamp_request(num_inference_steps=STEPS)
    whole = pipeline.generate(request, settings=begun, output=tmp_path / "whole.mp4")
    run_until(begun, request, "mine", tmp_path / "x.mp4", "denoise", 5)
    thresholds.unlink()
    result = finish(settings, "mine")
    assert result.report["acceleration"] == whole.report["acceleration"]
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_is_sampled_as_it_was_begun_whatever_the_settings_say_now(
    settings: Settings, tmp_path: Path, recorded: bool
) -> None:
    distilled, request = replace(settings, profile="distill4"), stamp_request()
    whole = pipeline.generate(request, settings=distilled, output=tmp_path / "whole.mp4")
    run_until(distilled, request, "four", tmp_path / "x.mp4", "denoise", 2)
    if not recorded:  # as runs were before their order had a profile
        file = runs.runs_folder(settings) / "four" / "run.json"
        about = json.loads(file.read_text())
        del about["profile"]
        file.write_text(json.dumps(about))
    result = finish(settings, "four")
    assert result.report["model_calls"] == whole.report["model_calls"]
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


# What cannot be gone on with


def test_what_is_no_run_is_refused_and_the_runs_are_named(settings: Settings, stamps: Stamps, tmp_path: Path) -> None:
    run_until(settings, stamps.request, "there", tmp_path / "x.mp4", "denoise")
    with pytest.raises(NotResumable, match=r"no unfinished run 'other'.*there are: there"):
        list(Pipeline(settings).resume("other"))
    for name in ("../there", "", ".hidden", "a/b", "x" * 101):
        with pytest.raises(NotResumable, match="is no id"):
            list(Pipeline(settings).resume(name))


def test_a_run_that_is_being_made_is_refused(settings: Settings, stamps: Stamps, tmp_path: Path) -> None:
    running = Pipeline(settings).generate(stamps.request, output=tmp_path / "x.mp4", run_id="busy")
    next(running)
    run = runs.find(settings, "busy")
    assert run is not None and run.state == "running"
    with pytest.raises(Busy, match="being made at this moment"):
        list(Pipeline(settings).resume("busy"))
    with pytest.raises(Busy, match="being made at this moment"):
        runs.remove(settings, "busy")
    running.close()


def test_another_model_is_refused_before_a_weight_is_read(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(settings, stamps.request, "other-model", tmp_path / "x.mp4", "denoise")
    monkeypatch.setattr(order, "part_identity", lambda _, part: f"another {part}")
    monkeypatch.setattr("wan_local.stage._load", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(NotResumable, match="begun with another transformer"):
        list(Pipeline(settings).resume("other-model"))
    assert runs.find(settings, "other-model") is not None


@pytest.mark.parametrize("damage", ["format", "picture", "about"])
def test_a_run_of_another_version_or_damaged_is_refused_and_can_be_removed(
    settings: Settings, stamps: Stamps, tmp_path: Path, damage: str
) -> None:
    run_until(settings, stamps.request, "old", tmp_path / "x.mp4", "denoise")
    folder = runs.runs_folder(settings) / "old"
    about = json.loads((folder / "run.json").read_text())
    if damage == "format":
        about["format"] += 1
    elif damage == "about":
        del about["request"]
    else:
        (folder / "end.png").write_bytes(b"not a picture")
    (folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(NotResumable, match="another version"):
        list(Pipeline(settings).resume("old"))
    assert runs.remove(settings, "old").id == "old" and runs.list_runs(settings) == []


def test_what_changed_since_is_told(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(settings, stamps.request, "elsewhere", tmp_path / "x.mp4", "denoise")
    monkeypatch.setattr(order, "__version__", "99.0")
    result = finish(replace(settings, kernels="off"), "elsewhere")
    made, computed = result.report["notes"][:2]
    assert "wan_local 0.1.0 is now 99.0:" in made and "kernels auto is now off:" in computed


def test_settings_that_change_what_is_computed_are_told(settings: Settings, stamps: Stamps, tmp_path: Path) -> None:
    run_until(settings, stamps.request, "chosen", tmp_path / "x.mp4", "denoise")
    result = finish(replace(settings, precision="reference", attention="sdpa"), "chosen")
    assert "since the run was begun precision auto is now reference, attention auto is now sdpa" in "".join(
        result.report["notes"]
    )


def test_every_error_of_a_kept_run_says_how_to_go_on(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.VideoWriter, "finish", full)
        with pytest.raises(OutputError) as caught:
            list(Pipeline(settings).generate(stamps.request, output=tmp_path / "x.mp4", run_id="full"))
    way_out = "What was done is kept. Go on with: wan-local resume full"
    assert caught.value.__notes__ == [way_out]
    assert describe(caught.value).body["detail"][0]["msg"] == f"the disk is full {way_out}"
    with pytest.raises(wan_local.ModelNotFound) as missing:
        list(Pipeline(replace(settings, model=str(tmp_path / "gone"))).resume("full"))
    assert missing.value.__notes__ == [way_out]


# What state may cost


def test_state_can_be_switched_off(settings: Settings, stamps: Stamps, tmp_path: Path) -> None:
    run_until(replace(settings, save_state=False), stamps.request, "off", tmp_path / "x.mp4", "denoise", 5)
    assert not settings.state_dir.exists()


@pytest.mark.parametrize("when", ["at the start", "at the third call"])
def test_a_full_disk_is_told_once_and_the_run_goes_on(
    settings: Settings, stamps: Stamps, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = durable.write, []

    def full(path: Path, chunks: Any) -> None:
        written.append(path.name)
        if when == "at the start" or "call-0003" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, chunks)

    monkeypatch.setattr(durable, "write", full)
    quiet = replace(settings, cache_gigabytes=0.0)
    events = list(Pipeline(quiet).generate(stamps.request, output=tmp_path / "x.mp4", run_id="full"))
    result = events[-1]
    assert isinstance(result, Result) and (tmp_path / "x.mp4").read_bytes() == stamps.video
    assert len([note for note in result.report["notes"] if "No space left" in note]) == 1
    assert not any("call-0004" in name for name in written)
    assert runs.list_runs(settings) == []


def keep_calls(answers: Answers, numbers: range) -> None:
    for number in numbers:
        latents = torch.full((1, 2), float(number))
        answers.keep(number, latents, float(number), (latents + 1, latents + 1))


@pytest.mark.parametrize(("failures", "kept"), [(1, 5), (2, 5), (100, 2)])
def test_a_call_that_could_not_be_saved_is_tried_again_while_the_row_can_be_unbroken(
    tmp_path: Path, failures: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed, notes = durable.write, [], list[str]()

    def full(path: Path, chunks: Any) -> None:
        if path.name.startswith("call") and path.name >= "call-0003" and len(failed) < failures:
            failed.append(path.name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, chunks)

    monkeypatch.setattr(durable, "write", full)
    answers = Answers(tmp_path, notes.append)
    keep_calls(answers, range(1, 6))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"call-{n:04d}.safetensors" for n in range(1, kept + 1)
    ]
    known = answers.answer(kept, torch.full((1, 2), float(kept)), float(kept))
    assert known is not None and known[0].tolist() == [[kept + 1.0] * 2]
    assert "call-0003 of this run's state could not be saved (No space left" in notes[0]
    assert set(failed) == {"call-0003.safetensors"}
    assert len(notes) == (1 if kept == 5 else 2)
    answers.finish(Latents(torch.ones(1, 2), 5, {}))
    assert answers.final() is not None and [path.name for path in tmp_path.iterdir()] == ["latents.safetensors"]


def test_final_latents_need_no_more_room_than_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, notes = shutil.disk_usage(tmp_path), list[str]()
    monkeypatch.setattr("wan_local.answers.shutil.disk_usage", lambda _: usage._replace(free=1000))
    answers = Answers(tmp_path, notes.append)
    keep_calls(answers, range(1, 6))
    answers.finish(Latents(torch.ones(1, 2), 5, {}))
    assert answers.final() is not None
    answers.finish(Latents(torch.ones(1000), 5, {}))
    assert notes[-1].startswith("the final latents could not be saved (0 MB is free")


def test_a_prompt_that_was_expanded_is_saved_before_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run gone on with from calls alone would have its prompt expanded again, perhaps to another."""
    write = durable.write

    def refused(path: Path, chunks: Any) -> None:
        if path.name == runs.EXPANSION:
            raise PermissionError(errno.EACCES, "Permission denied")
        write(path, chunks)

    monkeypatch.setattr(durable, "write", refused)
    answers = Answers(tmp_path, lambda _: None)
    answers.keep_expansion({"prompt": "more"})
    keep_calls(answers, range(1, 5))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(durable, "write", write)
    answers.finish(Latents(torch.ones(1, 2), 4, {}))
    assert answers.expansion() == {"prompt": "more"} and answers.final() is not None


def test_state_leaves_room_on_the_disk(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("wan_local.answers.shutil.disk_usage", lambda _: usage._replace(free=400_000_000))
    run_until(settings, stamps.request, "little", tmp_path / "x.mp4", "denoise", 5)
    assert runs.find(settings, "little") is None  # no call was written, so there is nothing to keep


def test_only_so_many_unfinished_runs_are_kept(settings: Settings, stamps: Stamps, tmp_path: Path) -> None:
    few = replace(settings, keep_runs=2)
    for index, name in enumerate(("oldest", "middle", "newest")):
        run_until(few, stamps.request, name, tmp_path / "x.mp4", "denoise")
        for file in (runs.runs_folder(few) / name).iterdir():
            os.utime(file, (1e9 + index, 1e9 + index))
    assert [run.id for run in runs.list_runs(few)] == ["newest", "middle", "oldest"]
    assert [run.id for run in runs.prune(few)] == ["oldest"]
    running = Pipeline(few).generate(stamps.request, output=tmp_path / "x.mp4", run_id="busy")
    next(running)
    assert [run.id for run in runs.prune(replace(few, keep_runs_gigabytes=0.0))] == ["newest", "middle"]
    assert [run.id for run in runs.list_runs(few)] == ["busy"]
    running.close()


def test_a_refused_request_leaves_no_state(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(wan_local.InvalidRequest):
        next(Pipeline(settings).generate(stamp_request(start_image_url="no/such.png"), output=tmp_path / "x.mp4"))
    assert runs.list_runs(settings) == []


def test_a_run_refused_half_way_is_not_kept(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the safety checker sees the frames: going on with it would end no better."""
    refusal = wan_local.InvalidRequest.field("prompt", "content_policy_violation", "no", value="x")
    monkeypatch.setattr(pipeline, "decode_frames", lambda *_, **__: (_ for _ in ()).throw(refusal))
    with pytest.raises(wan_local.InvalidRequest):
        list(Pipeline(settings).generate(stamps.request, output=tmp_path / "x.mp4", run_id="refused"))
    assert runs.find(settings, "refused") is None


def test_who_takes_a_run_over_or_drops_it_sweeps_its_partial_video(
    settings: Settings, stamps: Stamps, tmp_path: Path
) -> None:
    """Known by the run and not by the process: in containers process numbers repeat."""
    run_until(settings, stamps.request, "swept", tmp_path / "x.mp4", "denoise", 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    left, others = tmp_path / durable.partial_name("swept", ".mp4"), tmp_path / durable.partial_name("a-swept", ".mp4")
    left_elsewhere = elsewhere / durable.partial_name("swept", ".json")
    for path in (left, others, left_elsewhere):
        path.touch()
    taken = runs.take(settings, "swept")
    taken.send_to(elsewhere / "y.mp4")
    taken.release(remove=False)
    assert not left.exists() and others.exists() and left_elsewhere.exists()
    assert runs.list_runs(settings)[0].about["output"] == str(elsewhere / "y.mp4")
    runs.remove(settings, "swept")
    assert not left_elsewhere.exists() and others.exists()


def test_the_images_of_an_unfinished_run_are_at_hand(settings: Settings, stamps: Stamps, tmp_path: Path) -> None:
    run_until(settings, stamps.request, "kept", tmp_path / "x.mp4", "denoise", 1)
    pictures = runs.kept_pictures(settings, "kept")
    assert sorted(pictures) == ["end_image_url", "start_image_url"]
    sizes = {Image.open(io.BytesIO(content)).size for content in pictures.values()}
    with av.open(io.BytesIO(stamps.video)) as video:
        assert sizes == {(video.streams.video[0].width, video.streams.video[0].height)}
    assert runs.kept_pictures(settings, "another") == {}


def test_a_partial_video_is_named_after_its_run(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners, named = [], durable.partial_name
    monkeypatch.setattr(durable, "partial_name", lambda owner, suffix: owners.append(owner) or named(owner, suffix))
    list(Pipeline(settings).generate(stamps.request, output=tmp_path / "x.mp4", run_id="named"))
    assert owners[-2:] == ["named", "named"]  # before them the preflight's


def test_a_run_that_cannot_be_begun_is_not_left_locked(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as short:
        short.setattr("wan_local.durable.write", full)
        with pytest.raises(OSError, match="No space left"):
            runs.begin(settings, "short", {})
    assert not (runs.runs_folder(settings) / "short").exists()
    runs.begin(settings, "short", {}).release(remove=True)
