"""A backend is tried once, apart: a wrong answer, a crash and a hang are all answers, and answers are remembered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wan_local import probe
from wan_local.attention import BACKENDS, Backend
from wan_local.probe import REMEMBERED, problem_of, remembered_problem, sources_hash, trial, try_apart

CPU = torch.device("cpu")


def answering(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let the probe's process run `program` instead; `answer` is the file it is to write."""
    real = subprocess.run

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        code = f"answer = {command[-1]!r}\n{program}"
        return real([sys.executable, "-c", code], **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(probe.subprocess, "run", run)


@pytest.mark.slow
def test_a_sound_backend_passes_its_trial_in_a_process_of_its_own() -> None:
    assert try_apart("int8", CPU) == ""


def test_a_crash_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "import os; os.abort()")
    assert "ended with code -6" in try_apart("sage", CPU)


def test_an_error_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "raise SystemExit('libcudart.so.12 is missing')")
    assert "libcudart.so.12 is missing" in try_apart("xformers", CPU)


def test_a_hang_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "import time; time.sleep(60)")
    assert "no answer within" in try_apart("sage", CPU, seconds=0.5)


@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "NaN"), (-1.0, "cosine")])
def test_wrong_numbers_are_a_problem(factor: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = BACKENDS["sdpa"]
    wrong = Backend("sdpa", lambda q, k, v: factor * sound.function(q, k, v), sound.lacking, sound.suits, "wrong")
    monkeypatch.setattr(probe, "BACKENDS", {"sdpa": wrong})
    assert words in trial("sdpa", CPU)


def test_an_answer_is_remembered_for_its_world_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(probe, "try_apart", lambda name, _: (tried.append(name), "it gave NaN or infinity")[1])
    for world in ("card A", "card A", "card B"):
        assert remembered_problem("int8", CPU, world, tmp_path) == "it gave NaN or infinity"
    assert tried == ["int8", "int8"]
    assert set(json.loads((tmp_path / REMEMBERED).read_text())) == {"card A|int8", "card B|int8"}


def test_on_a_cpu_nothing_is_tried(tmp_path: Path) -> None:
    assert problem_of("int8", CPU, home=tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_the_hash_is_that_of_the_kernels_sources() -> None:
    assert len(sources_hash()) == 12
