"""`wan-local resume`, `runs` and `cache`, and what a stopped `generate` says, on the embedded model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stamps import END, START, stamp_request, stamp_settings
from wan_local import cli, runs
from wan_local.cli import generate as generate_command
from wan_local.cli.terminal import DONE, FAILED, INTERRUPTED
from wan_local.pipeline import Pipeline
from wan_local.request import Step
from wan_local.settings import Settings, load_settings

FLAGS = ("generate", "--model", "tiny", "--device", "cpu", "--start-image", str(START), "--end-image", str(END))
FLAGS += (
    "--prompt",
    "a small blue bird takes off",
    "--resolution",
    "480p",
    "--num-inference-steps",
    "2",
    "--seed",
    "42",
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings as the command line finds them in the environment."""
    monkeypatch.setenv("WAN_LOCAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("WAN_LOCAL_CACHE_DIR", str(tmp_path / "cache"))
    return stamp_settings(tmp_path, monkeypatch)


def interrupted_at(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come with the first sign of progress of a stage, as it reaches the command line."""
    save = generate_command._last

    def last(events: object, given: object, show: object) -> object:
        def shown(step: Step) -> None:
            if step.stage == stage and step.index:
                raise KeyboardInterrupt

        return save(events, given, shown)  # type: ignore[arg-type]

    monkeypatch.setattr(generate_command, "_last", last)


def test_a_stopped_run_says_how_to_go_on_and_resume_finishes_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bird.mp4"
    assert cli.main([*FLAGS, "--output", str(tmp_path / "whole.mp4")]) == DONE
    with monkeypatch.context() as patch:
        interrupted_at("decode", patch)
        assert cli.main([*FLAGS, "--output", str(output)]) == INTERRUPTED
    words = capsys.readouterr().err
    [run] = runs.list_runs(settings)
    assert f"Go on with: wan-local resume {run.id}" in words and "denoised, to be decoded" in words
    assert "No part of a video was left behind" in words and not output.exists()
    assert cli.main(["runs"]) == DONE
    line = capsys.readouterr().out
    assert run.id in line and "0 min" in line and "MB" in line and "'a small blue bird takes off'" in line
    assert cli.main(["resume", run.id, "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["video"]["path"] == str(output)
    assert output.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert runs.list_runs(settings) == []


def test_a_run_stopped_before_its_first_step_promises_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_at("text", monkeypatch)
    assert cli.main(list(FLAGS)) == INTERRUPTED
    assert "resume" not in capsys.readouterr().err and runs.list_runs(settings) == []


def test_no_save_state_keeps_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_at("denoise", monkeypatch)
    assert cli.main([*FLAGS, "--no-save-state"]) == INTERRUPTED
    assert "resume" not in capsys.readouterr().err and not settings.state_dir.exists()


def test_runs_are_removed_by_name_or_all(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):
        running = Pipeline(settings).generate(stamp_request(), output=tmp_path / "x.mp4", run_id=name)
        next(event for event in running if isinstance(event, Step) and event.stage == "denoise" and event.index)
        running.close()
    assert cli.main(["runs", "--json"]) == DONE
    listed = json.loads(capsys.readouterr().out)
    assert {run["id"] for run in listed} == {"one", "two", "three"}
    assert all(run["model_calls"] == 1 and run["state"] == "waiting" and run["bytes"] > 0 for run in listed)
    assert cli.main(["runs", "--remove", "two"]) == DONE
    assert "removed two" in capsys.readouterr().err
    assert cli.main(["runs", "--remove", "two"]) == FAILED
    assert "no unfinished run 'two'" in capsys.readouterr().err
    assert cli.main(["runs", "--remove", "all"]) == DONE
    capsys.readouterr()
    assert cli.main(["runs"]) == DONE
    assert "There are no unfinished runs" in capsys.readouterr().err


def test_resume_of_nothing_is_an_error_in_words(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume", "nothing"]) == FAILED
    assert "NotResumable: there is no unfinished run 'nothing'" in capsys.readouterr().err


def test_the_cache_is_shown_and_cleared(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache"]) == DONE
    assert "nothing" in capsys.readouterr().out
    assert cli.main([*FLAGS, "--output", str(tmp_path / "x.mp4")]) == DONE
    capsys.readouterr()
    assert cli.main(["cache", "show", "--json"]) == DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["entries"] == {"text": 2, "image": 1, "condition": 1} and shown["bytes"] > 0
    assert cli.main(["cache", "clear"]) == DONE
    assert "cleared" in capsys.readouterr().out
    assert not list(settings.cache_dir.iterdir())


def test_the_settings_of_the_run_are_those_it_was_begun_with(settings: Settings, tmp_path: Path) -> None:
    begun = replace(settings, embed_metadata=False, keep_runs=3)
    running = Pipeline(begun).generate(stamp_request(), output=tmp_path / "x.mp4", run_id="quiet")
    next(event for event in running if isinstance(event, Step) and event.stage == "denoise" and event.index)
    running.close()
    assert runs.settings_of("quiet", settings) == begun


def test_the_environment_and_flags_say_anew_how_a_run_is_made_and_not_what_it_is(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the ways out that errors name."""
    running = Pipeline(settings).generate(stamp_request(), output=tmp_path / "x.mp4", run_id="stuck")
    next(event for event in running if isinstance(event, Step) and event.stage == "denoise" and event.index)
    running.close()
    for name, value in {"SHARE_DEVICE": "yes", "PRECISION": "reference", "MODEL": "/elsewhere"}.items():
        monkeypatch.setenv(f"WAN_LOCAL_{name}", value)
    now = runs.settings_of("stuck", load_settings())
    assert now == replace(settings, share_device=True, precision="reference")
    seen: list[Settings] = []
    monkeypatch.setattr("wan_local.pipeline.Pipeline.__init__", lambda self, settings: seen.append(settings))
    monkeypatch.setattr("wan_local.pipeline.Pipeline.resume", lambda *_, **__: iter(()))
    monkeypatch.setattr("wan_local.cli.resume.follow", lambda *_: DONE)
    assert cli.main(["resume", "stuck", "--attention", "sdpa", "--kernels", "off"]) == DONE
    assert seen == [replace(now, attention="sdpa", kernels="off")]
