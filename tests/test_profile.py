"""The profile for distilled weights: exact sigmas, Euler's steps, and words about what it overrode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.stamps import stamp_request, stamp_settings
from wan_local.pipeline import generate
from wan_local.scheduler import Scheduler
from wan_local.settings import load_profile, load_settings

SIGMAS = (1.0, 0.9375, 0.8333, 0.625, 0.0)  # published with the four-step weights


def test_the_sigmas_are_the_published_ones_and_timesteps_are_not_cut() -> None:
    profile = load_profile("distill4")
    scheduler = Scheduler.distilled(profile.steps, profile.shift)
    assert scheduler.sigmas.tolist() == pytest.approx(SIGMAS, abs=5e-5)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)


def test_each_step_is_eulers() -> None:
    scheduler = Scheduler.distilled((1.0, 0.75, 0.5, 0.25), 5.0)
    x = torch.randn(1, 2, 3, 4, 4)
    by_hand = x.clone()
    for index in range(4):
        v = torch.randn_like(x)
        x = scheduler.step(v, index, x)
        by_hand += (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * v
    torch.testing.assert_close(x, by_hand)


def test_a_run_with_the_profile_says_what_it_overrode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stamp_settings(tmp_path, monkeypatch, profile="distill4")
    result = generate(stamp_request(num_inference_steps=30), settings=settings)
    assert result.report["model_calls"] == 4 and result.report["acceleration"] == {"policy": "none"}
    [note] = [note for note in result.report["notes"] if "distill4" in note]
    for words in ("num_inference_steps 30 -> 4", "guide_scale 5.0 -> 1.0", "acceleration regular -> none"):
        assert words in note, note
    assert "shift" not in note and "experimental" in note


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="profile is 'fast'; it can be distill4"):
        load_settings(profile="fast")
