"""A backend is tried once, apart: a crash and a hang are answers, too, but only numbers are remembered for good."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wan_local import attention, probe
from wan_local.attention import BACKENDS, Backend
from wan_local.probe import (
    REMEMBERED,
    Answer,
    problem_of,
    remembered_problem,
    sources_hash,
    trial,
    try_apart,
    world_of,
)
from wan_local.settings import AttentionName

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
    assert try_apart("int8", CPU) == Answer("", lasts=True)


def test_a_crash_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "import os; os.abort()")
    answer = try_apart("sage", CPU)
    assert "ended with code -6" in answer.problem and not answer.lasts


def test_an_error_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "raise SystemExit('libcudart.so.12 is missing')")
    answer = try_apart("xformers", CPU)
    assert "libcudart.so.12 is missing" in answer.problem and not answer.lasts


def test_a_hang_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "import time; time.sleep(60)")
    answer = try_apart("sage", CPU, seconds=0.5)
    assert "no answer within" in answer.problem and not answer.lasts


@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "NaN"), (-1.0, "cosine")])
def test_wrong_numbers_are_a_problem(factor: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = BACKENDS["sdpa"]
    wrong = Backend("sdpa", lambda q, k, v: factor * sound.function(q, k, v), sound.lacking, sound.suits, "wrong")
    monkeypatch.setattr(probe, "BACKENDS", {"sdpa": wrong})
    assert words in trial("sdpa", CPU)


def some_of(k: Tensor, v: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return the first keys and values, or those that are zero after all of them."""
    return tuple(F.pad(x, (0, 0, 0, 0, 0, keys - x.shape[1])) for x in (k, v))  # type: ignore[return-value]


def in_four_bits(k: Tensor) -> Tensor:
    scale = k.abs().amax() / 7
    return (k / scale).round() * scale


WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "weights that are all the same": lambda q, k, v: (0 * q, k, v),
    "a softmax scale of a quarter": lambda q, k, v: (q / 4, k, v),
    "twice the softmax scale": lambda q, k, v: (q * 2, k, v),
    "no tail of keys": lambda q, k, v: (q, *some_of(k, v, 256)),
    "keys beyond the end": lambda q, k, v: (q, *some_of(k, v, 320)),
    "keys of another head": lambda q, k, v: (q, k.roll(1, dims=2), v),
    "values of another key": lambda q, k, v: (q, k, v.roll(1, dims=1)),
    "keys of four bits": lambda q, k, v: (q, in_four_bits(k), v),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_attention_that_is_wrong_in_one_thing_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = BACKENDS["sdpa"]
    backend = replace(sound, function=lambda q, k, v: sound.function(*WRONG[wrong](q, k, v)))
    monkeypatch.setattr(probe, "BACKENDS", {"sdpa": backend})
    assert "its cosine to exact attention is" in trial("sdpa", CPU)


@pytest.mark.parametrize("name", ["sdpa", "int8", "int8_pv"])
def test_sound_backends_are_far_from_the_limit(name: AttentionName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "wrong_kernels", lambda _: [])
    monkeypatch.setattr(probe, "_COSINE", 0.9995)
    assert trial(name, CPU) == ""


NAN = Answer("it gave NaN or infinity", lasts=True)


def tries(monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> list[str]:
    """Let each trial give the next of the answers; return the names that were tried, as they come."""
    tried: list[str] = []
    monkeypatch.setattr(probe, "try_apart", lambda name, _: (tried.append(name), answers[len(tried) - 1])[1])
    probe._tried_here.cache_clear()
    return tried


def test_an_answer_is_remembered_for_its_world_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = tries(monkeypatch, NAN, NAN)
    for world in ("card A", "card A", "card B"):
        assert remembered_problem("int8", CPU, world, tmp_path) == NAN.problem
        probe._tried_here.cache_clear()  # as another process
    assert tried == ["int8", "int8"]
    assert set(json.loads((tmp_path / REMEMBERED).read_text())) == {"card A|int8", "card B|int8"}


def test_that_a_probe_came_to_no_end_is_remembered_by_this_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card was full, the C compiler not there yet: what is wrong today need not be tomorrow."""
    full = Answer("its probe ended with code 1: CUDA out of memory", lasts=False)
    tried = tries(monkeypatch, full, Answer("", lasts=True))
    for _ in range(2):
        assert remembered_problem("int8", CPU, "card A", tmp_path) == full.problem
    assert tried == ["int8"] and not (tmp_path / REMEMBERED).exists()
    probe._tried_here.cache_clear()  # as another process
    assert remembered_problem("int8", CPU, "card A", tmp_path) == ""
    assert json.loads((tmp_path / REMEMBERED).read_text()) == {"card A|int8": ""}


def test_what_another_process_found_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / REMEMBERED

    def slowly(name: str, _: torch.device) -> Answer:
        file.parent.mkdir()
        file.write_text(json.dumps({"card B|sage": ""}))
        return NAN

    tries(monkeypatch)
    monkeypatch.setattr(probe, "try_apart", slowly)
    remembered_problem("int8", CPU, "card A", tmp_path)
    assert json.loads(file.read_text()) == {"card B|sage": "", "card A|int8": NAN.problem}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("damaged", ["", "[1, 2]", '{"card A|int8": ', "\x00"])
def test_a_damaged_file_is_asked_anew_and_replaced(
    damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / REMEMBERED
    file.parent.mkdir()
    file.write_text(damaged)
    tries(monkeypatch, NAN)
    assert remembered_problem("int8", CPU, "card A", tmp_path) == NAN.problem
    assert json.loads(file.read_text()) == {"card A|int8": NAN.problem}


def test_an_answer_that_cannot_be_kept_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / REMEMBERED.parent).write_text("a file where the folder should be")
    tries(monkeypatch, NAN)
    assert remembered_problem("int8", CPU, "card A", tmp_path) == NAN.problem


def test_another_version_of_the_backends_package_is_another_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(probe, "driver_version", lambda: "580")
    worlds = set()
    for version in ("2.1.1", "2.2.0"):
        monkeypatch.setattr(attention.importlib.metadata, "version", lambda _, version=version: version)
        worlds |= {world_of(name, CPU) for name in ("sage", "xformers", "int8")}
    assert len(worlds) == 5 and sum("sageattention 2.2.0" in world for world in worlds) == 1


def test_on_a_cpu_nothing_is_tried(tmp_path: Path) -> None:
    assert problem_of("int8", CPU, home=tmp_path) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["probe.py", "attention.py", "linear_int8.py"])
def test_the_hash_is_that_of_the_kernels_and_of_their_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes
    before = sources_hash.__wrapped__()
    assert before == sources_hash() and len(before) == 12
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + (b"#" if path.name == name else b""))
    assert sources_hash.__wrapped__() != before
