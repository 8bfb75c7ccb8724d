from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.stamps import stamp_request, stamp_settings
from wan_local import pipeline, report
from wan_local.geometry import Geometry, Size
from wan_local.planner import Plan, StagePlan
from wan_local.report import Report
from wan_local.tiling import Tiling


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


def plan_of(*stages: StagePlan) -> Plan:
    return Plan(Geometry(Size(height=480, width=832), 81), "cuda:0", 4096, stages, 2**33)


class Meter:
    """Bytes that a card and a process hold, and the most since the peak was reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = {"cuda": 10, "cpu": 1000}
        self.peaks = dict(self.held)
        for name in ("reset_peak", "peak_bytes", "held_bytes"):
            monkeypatch.setattr(report, name, getattr(self, name))

    def reset_peak(self, device: torch.device) -> None:
        self.peaks[device.type] = self.held[device.type]

    def peak_bytes(self, device: torch.device) -> int:
        return self.peaks[device.type]

    def held_bytes(self, device: torch.device) -> int:
        return self.held[device.type]

    def take(self, device: str, nbytes: int) -> None:
        """Hold that much more for a moment."""
        self.peaks[device] = max(self.peaks[device], self.held[device] + nbytes)


def test_a_stages_bytes_are_those_of_the_attempt_that_succeeded(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, card = Meter(monkeypatch), torch.device("cuda:0")
    first = StagePlan("denoise", 600, 100)
    lower = StagePlan("denoise", 300, 50, resident_blocks=3, source="ram")
    made = Report(card)
    with made.stage("denoise"):
        made.attempt(first, card, chunk_tokens=4096)
        meter.take("cuda", 700)
        made.attempt(lower, card, chunk_tokens=2048, again=True)
        meter.take("cuda", 330)
        made.attempt(lower, card, chunk_tokens=2048)  # the next call: the peak of the one before counts as well
        meter.take("cuda", 300)
    how = {"resident_blocks": 3, "source": "ram", "chunk_tokens": 2048}
    assert made.beside(plan_of(first)) == {"denoise": {"planned_bytes": 350, "measured_bytes": 340, **how}}
    assert made.as_dict()["peak_bytes"] == {"denoise": 340}


def test_a_stage_that_was_done_on_the_cpu_beside_a_card_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, card = Meter(monkeypatch), torch.device("cuda:0")
    first, there = StagePlan("decode", 100, 100), StagePlan("decode", 200, 50, tiling=Tiling(2, 3))
    made = Report(card)
    with made.stage("decode"):
        made.attempt(first, card)
        meter.take("cuda", 150)
        made.attempt(there, torch.device("cpu"), again=True)
        meter.take("cpu", 240)
    how = {"tiles": "2 x 3", "device": "cpu"}
    assert made.beside(plan_of(first)) == {"decode": {"planned_bytes": 250, "measured_bytes": 240, **how}}
    with made.stage("text"):
        meter.take("cuda", 5)
    assert made.peak_bytes["text"] == 15, "the next stage is measured on the card again"


def test_after_a_run_every_stage_has_planned_and_measured_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stamp_settings(tmp_path, monkeypatch, state_dir=tmp_path / "state", cache_gigabytes=0)
    memory = pipeline.generate(stamp_request(), settings=settings, output=tmp_path / "x.mp4").report["memory"]
    assert list(memory) == ["text", "image", "condition", "context", "denoise", "decode"]
    assert all(figures["planned_bytes"] > 0 for figures in memory.values())
    assert all(figures["measured_bytes"] >= 0 for figures in memory.values())
    assert memory["denoise"]["chunk_tokens"] > 0 and memory["denoise"]["measured_bytes"] > 0
