"""The kernel stages of `bench/gpu.py`: an op that fails hides no other, and what was not reached is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_kernels, gpu_speeds
from bench.gpu_stage import Bench, CheckFailed
from wan_kernels import checks

CPU = torch.device("cpu")
BENCH = Bench(CPU, "small", 1)


def cases(*_: object, **__: object) -> Iterator[checks.Case]:
    """Yield a case that is right, one that does not run, one that is wrong, and another that is right."""
    one = torch.ones(3)

    def broken() -> checks.Outputs:
        raise RuntimeError("no such instruction")

    for name, run in (("first", lambda: (one,)), ("broken", broken), ("wrong", lambda: (one * 2,)), ("last", lambda: (one,))):  # fmt: skip  # noqa: E501
        yield checks.Case(name, run, lambda: (one,), 1)


def test_an_op_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cases", cases)
    *rows, done = gpu_kernels.check_rows(CPU, "small", "rows", 0)
    assert [row["op"] for row in rows] == ["first", "broken", "wrong", "last"] and done == {"done": True}
    assert "no such instruction" in rows[1]["failed"] and rows[2]["error"] > 1 and rows[3]["error"] == 0
    assert [row.get("op") for row in gpu_kernels.check_rows(CPU, "small", "rows", 3)] == ["last", None]


def test_a_process_that_dies_is_begun_again_behind_its_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        file, skip = Path(command[6]), int(command[8])
        begun.append(skip)
        rows = [{"op": f"op {skip}", "error": 0.5}] if skip != 1 else []
        with file.open("a") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in [*rows, *([{"done": True}] if skip == 2 else [])]))
        return subprocess.CompletedProcess(command, 0 if skip == 2 else -11, "", "segmentation fault")

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpu_kernels.subprocess, "run", run)
    monkeypatch.setattr(checks, "GROUPS", {"rows": None})
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(Bench, "report", lambda self, stage, **row: reported.append(row))
    with pytest.raises(CheckFailed, match="ops that are wrong or failed"):
        gpu_kernels.kernels(BENCH)
    assert begun == [0, 1, 2]
    assert reported[0]["errors"] == {"op 0": 0.5, "op 2": 0.5}
    assert "segmentation fault" in reported[0]["failed"]["rows, the 2th"]


def test_a_process_that_never_answers_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpu_kernels.subprocess, "run", hang)
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(Bench, "report", lambda self, stage, **row: reported.append(row))
    with pytest.raises(CheckFailed, match="no answer within"):
        gpu_kernels.kernel_speed(BENCH)
    assert "no answer within" in reported[-1]["failed"]


def test_what_the_budget_does_not_reach_is_named_and_what_is_wrong_is_not_timed() -> None:
    rows = list(gpu_speeds.speed_rows(CPU, "small", "own", 0.0))
    assert rows[0]["op"] == "copy" and all("skipped" in row for row in rows[1:]) and len(rows) > 15
    ops = [row["op"] for row in rows]
    assert ops.index("attention_int8, fp16 values") < ops.index("linear_int8") < ops.index("gelu_quantize")
    timing = gpu_speeds.Timing({"op": "x"}, lambda: lambda: 1.0, lambda seconds: {"rate": seconds}, lambda got: 2.0)
    assert "not timed: 2" in gpu_speeds._timed(timing, CPU)["failed"]


def test_compiled_kernels_have_a_folder_where_users_have_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "getuid", raising=False)
    assert gpu_kernels._folder("own").is_dir()
