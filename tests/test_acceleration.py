from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wan_local.acceleration import EveryStep, Policy, StepMerging, make_policy, mergeable, velocity_change
from wan_local.scheduler import Scheduler, sigma_grid
from wan_local.settings import load_merging_config

CONFIG = load_merging_config()


def velocity(x: Tensor, timestep: int) -> Tensor:
    return 0.9 * torch.tanh(x) + 0.3 * math.cos(math.pi * timestep / 1000) - 0.2 * x


def sample(policy: Policy, steps: int = 30, shift: float = 5.0) -> tuple[Tensor, int]:
    """Integrate a smooth analytic velocity from fixed noise; return the end point and the number of calls."""
    scheduler = Scheduler(steps, shift)
    x = torch.randn(1, 4, 5, 3, 3, generator=torch.Generator().manual_seed(2))
    index = 0
    while index < len(scheduler):
        v = velocity(x, int(scheduler.timesteps[index]))
        scheduler.merge(index, policy.points_to_merge(v, scheduler.sigmas, index))
        x = scheduler.step(v, index, x)
        index += 1
    return x, index


@pytest.mark.parametrize(
    ("steps", "shift", "rho", "calls"),
    [(30, 5, 0.3, 19), (30, 5, 0.8, 19), (30, 5, 1.2, 21), (40, 5, 0.5, 23), (20, 5, 0.3, 13), (50, 16, 1.2, 29)],
)
def test_constant_rate_gives_the_published_call_counts(steps: int, shift: float, rho: float, calls: int) -> None:
    sigmas = sigma_grid(steps, shift).tolist()
    warm = max(CONFIG.warm_min, math.ceil(CONFIG.warm_fraction * steps))
    index = 0
    while index < len(sigmas):
        if index + 1 >= warm:
            count = mergeable(rho, sigmas, index, CONFIG)
            del sigmas[index + 1 : index + 1 + count]
        index += 1
    assert len(sigmas) == calls


def test_tau_of_zero_merges_nothing_and_is_bit_equal_to_every_step() -> None:
    exact, calls = sample(EveryStep())
    merged, merged_calls = sample(StepMerging(replace(CONFIG, tau=0.0), 30))
    assert calls == merged_calls == 30
    assert torch.equal(exact, merged)


def test_merging_saves_a_third_of_the_calls_at_a_small_error() -> None:
    exact, _ = sample(EveryStep())
    merged, calls = sample(StepMerging(replace(CONFIG, tau=0.3), 30))
    assert calls <= 20
    assert float((merged - exact).abs().max() / exact.abs().max()) < 5e-3


def test_a_larger_tau_never_needs_more_calls() -> None:
    calls = [sample(StepMerging(replace(CONFIG, tau=tau), 30))[1] for tau in (0.0, 0.02, 0.05, 0.1, 0.3)]
    assert calls == sorted(calls, reverse=True)


@settings(max_examples=500, deadline=None)
@given(st.integers(12, 60), st.floats(1, 16), st.lists(st.floats(0, 5), min_size=60, max_size=60))
def test_warm_up_tail_row_and_gap_limits_hold(steps: int, shift: float, rhos: list[float]) -> None:
    grid = sigma_grid(steps, shift).tolist()
    sigmas, index = list(grid), 0
    warm = max(CONFIG.warm_min, math.ceil(CONFIG.warm_fraction * steps))
    while index < len(sigmas):
        count = mergeable(rhos[index], sigmas, index, CONFIG) if index + 1 >= warm else 0
        assert count <= CONFIG.max_merged
        if count:
            assert sigmas[index] - sigmas[index + 1 + count] <= CONFIG.max_gap
            assert rhos[index] * (sigmas[index] - sigmas[index + count]) < CONFIG.tau
        del sigmas[index + 1 : index + 1 + count]
        index += 1
    assert sigmas[:warm] == grid[:warm]
    assert sigmas[-CONFIG.tail :] == grid[-CONFIG.tail :]


@pytest.mark.parametrize("frame", [0, -1])
def test_a_first_or_last_frame_that_still_moves_vetoes(frame: int) -> None:
    before = torch.ones(1, 2, 21, 4, 4)
    now = before.clone()
    calm = velocity_change(now * 1.001, before, 0.02)
    now[:, :, frame] += 0.5
    assert velocity_change(now, before, 0.02) == pytest.approx(0.5 / 0.02)
    assert calm == pytest.approx(0.001 / 0.02, rel=1e-2)


def test_nan_stops_merging_for_the_rest_of_the_run() -> None:
    policy = StepMerging(replace(CONFIG, tau=1e9), 30)
    sigmas = Scheduler(30, 5.0).sigmas
    counts = []
    for index in range(20):
        prediction = torch.ones(1, 1, 3, 2, 2) * (math.nan if index == 12 else 1.0)
        counts.append(policy.points_to_merge(prediction, sigmas, index))
    assert any(counts[:12])
    assert not any(counts[12:])


def test_none_and_short_schedules_run_every_step() -> None:
    assert isinstance(make_policy("none", 30), EveryStep)
    assert isinstance(make_policy("regular", 11), EveryStep)
    assert isinstance(make_policy("regular", 12), StepMerging)
