from __future__ import annotations

import time

import pytest
import torch

from wan_local.report import Report


def test_seconds_and_peak_are_kept_by_stage() -> None:
    report = Report(torch.device("cpu"))
    with report.stage("text"):
        time.sleep(0.02)
    with report.stage("denoise"):
        pass
    written = report.as_dict()
    assert written["seconds"]["text"] >= 0.02
    assert set(written["seconds"]) == {"text", "denoise", "total"}
    assert written["device"] == "cpu" and written["torch"] == torch.__version__


def test_a_step_belongs_to_the_stage_that_runs() -> None:
    report = Report(torch.device("cpu"))
    assert report.step(1, 1, "planned").stage == "plan"
    with report.stage("image"):
        assert report.step(1, 2, "half").stage == "image"


def test_eta_comes_from_the_pace_of_the_stage_and_counts_the_decoding_to_come() -> None:
    report = Report(torch.device("cpu"))
    report.seconds["condition"] = 4.0
    with report.stage("denoise"):
        assert report.step(0, 10, "not begun").eta_seconds is None
        time.sleep(0.05)
        eta = report.step(1, 10, "one of ten").eta_seconds
    assert eta == pytest.approx(9 * 0.05 + 10.0, abs=0.5)
    with report.stage("decode"):
        time.sleep(0.02)
        assert report.step(5, 5, "all").eta_seconds == 0


def test_the_pace_is_that_of_real_steps_and_not_of_those_that_were_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("wan_local.report.time.monotonic", lambda: clock[0])
    report = Report(torch.device("cpu"))
    with report.stage("denoise"):
        for index in range(1, 26):
            clock[0] += 0.05
            report.known(index)
            assert report.step(index, 30, "read").eta_seconds is None
        clock[0] += 300
        assert report.step(26, 30, "made").eta_seconds == pytest.approx(4 * 300)
    with report.stage("decode"):
        clock[0] += 10
        assert report.step(1, 3, "made").eta_seconds == pytest.approx(20)


def test_a_note_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    report = Report(torch.device("cpu"))
    report.note("expect little motion")
    assert report.as_dict()["notes"] == ["expect little motion"]
    assert "expect little motion" in caplog.text
