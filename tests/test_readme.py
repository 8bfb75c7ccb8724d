"""What the README tells people to type: it parses, the flags and targets exist, and its Python runs on a stand-in."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import wan_local
from wan_local import cli, configure, pipeline
from wan_local.request import File, Request, Result, Step
from wan_local.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/safety.md", "docs/prompt_expansion.md")


def blocks(language: str) -> list[str]:
    """Return every fenced block of a language, of all pages."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[list[str]]:
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def test_there_is_something_to_test() -> None:
    assert len(blocks("python")) >= 3 and len(blocks("bash")) >= 4


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_blocks_parse(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block.encode(), capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


REQUIRED = {"prompt": "", "start_image_url": "", "end_image_url": ""}  # what `plan` has no flags for


def test_every_flag_exists() -> None:
    ours = [words for words in commands() if words[0] == "wan-local"]
    assert ours
    for words in ours:
        options = vars(cli.parser().parse_args(words[1:]))
        if words[1] not in ("generate", "plan"):
            continue  # what others take under these names may be several
        given = {name: value for name, value in options.items() if name in Request.model_fields}
        Request.from_arguments(given if words[1] == "generate" else {**REQUIRED, **given})


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {word for words in commands() if words[0] == "make" for word in words[1:] if "=" not in word}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_environment_variable_is_a_setting() -> None:
    named = re.findall(r"WAN_LOCAL_([A-Z0-9_]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {name.lower() for name in named} == {*Settings.__slots__, "api_key"}  # which is a secret, and no setting


def test_every_request_field_is_described_with_its_default() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, field in Request.model_fields.items():
        row = next(row for row in rows if f"`{name}`" in row)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"| {field.default:g} |" in row, row
        elif name in ("resolution", "acceleration", "aspect_ratio"):
            assert f"| {field.default} |" in row, row


def test_links_to_files_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


class _StandIn:
    """A pipeline that writes three bytes instead of a video."""

    def __init__(self, settings: Settings) -> None:
        self.folder = settings.output_dir

    def generate(self, request: Request, *, output: Path | None = None, **_: object) -> Iterator[Step | Result]:
        yield Step("denoise", 1, 1, "step 1 of 1", 0.1, 0.0)
        path = output or self.folder / "video.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mp4")
        file = File(url=path.as_uri(), file_name=path.name, file_size=3, path=path)
        yield Result(video=file, seed=1, report={"model_title": "stand-in"})


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_local, "Pipeline", _StandIn)  # first: looking the old one up keeps it there for later
    monkeypatch.setattr(pipeline, "Pipeline", _StandIn)
    monkeypatch.setenv("WAN_LOCAL_OUTPUT_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("first.png", "last.png"):
        shutil.copy(ROOT / "tests" / "images" / f"{name.removesuffix('.png')}_frame.png", tmp_path / name)
    configure()  # a fresh engine, so that it finds the stand-in
    try:
        exec(compile(block, "README.md", "exec"), {})
    finally:
        configure()
