from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wan_local.acceleration import (
    Called,
    EveryStep,
    Policy,
    StepMerging,
    VelocityReuse,
    make_policy,
    mergeable,
    velocity_change,
)
from wan_local.scheduler import Scheduler, sigma_grid
from wan_local.settings import load_acceleration_config

ALL = load_acceleration_config()
CONFIG = ALL.merge


def velocity(x: Tensor, timestep: int) -> Tensor:
    return 0.9 * torch.tanh(x) + 0.3 * math.cos(math.pi * timestep / 1000) - 0.2 * x


def sample(policy: Policy, steps: int = 30, shift: float = 5.0) -> tuple[Tensor, int]:
    """Integrate a smooth analytic velocity from fixed noise; return the end point and the number of calls."""
    scheduler = Scheduler(steps, shift)
    x = torch.randn(1, 4, 5, 3, 3, generator=torch.Generator().manual_seed(2))
    index = calls = 0
    while index < len(scheduler):
        v = policy.reuse(x, scheduler.sigmas, index)
        if v is None:
            v, calls = velocity(x, int(scheduler.timesteps[index])), calls + 1
            scheduler.merge(index, policy.points_to_merge(Called(x, v, v), scheduler.sigmas, index))
        x = scheduler.step(v, index, x)
        index += 1
    return x, calls


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


def test_the_error_grows_with_tau() -> None:
    exact, _ = sample(EveryStep())
    errors, calls = [], []
    for tau in (0.0, 0.03, 0.05, 0.1, 0.3):
        merged, count = sample(StepMerging(replace(CONFIG, tau=tau), 30))
        errors.append(float((merged - exact).square().mean().sqrt()))
        calls.append(count)
    assert errors[0] == 0 and errors == sorted(errors)
    assert len(set(calls)) >= 3, "the thresholds must differ in what they merge"


@settings(max_examples=500, deadline=None)
@given(st.integers(12, 60), st.floats(1, 16), st.lists(st.floats(0, 2), min_size=60, max_size=60))
def test_the_policy_keeps_its_limits_whatever_it_measures(steps: int, shift: float, rates: list[float]) -> None:
    policy, sigmas = StepMerging(CONFIG, steps), Scheduler(steps, shift).sigmas
    grid, index, v = sigmas.tolist(), 0, torch.ones(1, 1, 2, 1, 1)
    while index < len(sigmas) - 1:
        if index:
            v = v * (1 + rates[index] * float(sigmas[index - 1] - sigmas[index]))
        count = policy.points_to_merge(Called(v, v, v), sigmas, index)
        assert count <= CONFIG.max_merged
        if count:
            assert float(sigmas[index] - sigmas[index + 1 + count]) <= CONFIG.max_gap + 1e-6
            assert rates[index] * float(sigmas[index] - sigmas[index + count]) < CONFIG.tau * 1.01
        sigmas = torch.cat((sigmas[: index + 1], sigmas[index + 1 + count :]))
        index += 1
    warm = max(CONFIG.warm_min, math.ceil(CONFIG.warm_fraction * steps))
    assert sigmas[:warm].tolist() == grid[:warm] and sigmas[-CONFIG.tail - 1 :].tolist() == grid[-CONFIG.tail - 1 :]
    assert [grid.index(sigma) for sigma in sigmas.tolist()] == sorted(set(range(steps + 1)) - set(policy.merged))


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


@pytest.mark.parametrize(("moving", "merges"), [(None, True), (2, True), (0, False), (-1, False)])
def test_an_end_frame_that_still_moves_keeps_every_step_and_one_in_between_does_not(
    moving: int | None, merges: bool
) -> None:
    policy, sigmas = StepMerging(CONFIG, 30), Scheduler(30, 5.0).sigmas
    for index in range(12):
        v = torch.ones(1, 2, 21, 4, 4) * (1 + 0.001 * index)
        if moving is not None:
            v[:, :, moving] *= 1 + 0.1 * index  # a twentieth of the frames: the mean of all hardly sees it
        count = policy.points_to_merge(Called(v, v, v), sigmas, index)
    assert (count > 0) == merges


def test_nan_stops_merging_for_the_rest_of_the_run() -> None:
    policy = StepMerging(replace(CONFIG, tau=1e9), 30)
    sigmas = Scheduler(30, 5.0).sigmas
    counts = []
    for index in range(20):
        prediction = torch.ones(1, 1, 3, 2, 2) * (math.nan if index == 12 else 1.0)
        counts.append(policy.points_to_merge(Called(prediction, prediction, prediction), sigmas, index))
    assert any(counts[:12])
    assert not any(counts[12:])


def test_none_and_short_schedules_run_every_step() -> None:
    assert isinstance(make_policy("none", 30, ALL), EveryStep)
    assert isinstance(make_policy("regular", 11, ALL), EveryStep)
    assert isinstance(make_policy("regular", 12, ALL), StepMerging)
    assert isinstance(make_policy("regular", 30, replace(ALL, policy="reuse")), VelocityReuse)


def test_a_static_plan_does_not_depend_on_what_is_measured() -> None:
    plans = []
    for scale in (1.0, 3.0):
        policy = make_policy("regular", 30, replace(ALL, policy="static"))
        scheduler = Scheduler(30, 5.0)
        x, index = torch.randn(1, 4, 5, 3, 3) * scale, 0
        while index < len(scheduler):
            v = scale * torch.randn(1, 4, 5, 3, 3)
            scheduler.merge(index, policy.points_to_merge(Called(x, v, v), scheduler.sigmas, index))
            x, index = scheduler.step(v, index, x), index + 1
        plans.append(policy.summary()["merged"])
    assert plans[0] == plans[1] and len(plans[0]) >= 8


def test_merged_points_are_reported_by_their_place_in_the_full_grid() -> None:
    policy = StepMerging(replace(CONFIG, tau=1e9), 30)
    _, calls = sample(policy)
    merged = policy.summary()["merged"]
    assert len(merged) == 30 - calls and merged == sorted(set(merged))
    assert min(merged) >= 8 and max(merged) < 30 - CONFIG.tail


def test_reuse_leaves_out_calls_and_merging_does_it_better() -> None:
    exact, _ = sample(EveryStep())
    reused, calls = sample(VelocityReuse(replace(ALL.reuse, threshold=0.1), 30))
    merged, merged_calls = sample(StepMerging(replace(CONFIG, tau=0.3), 30))
    assert merged_calls <= calls <= 22
    assert (reused - exact).abs().max() < 0.1 * exact.abs().max()
    assert (merged - exact).abs().max() < (reused - exact).abs().max()


def test_reuse_keeps_its_warm_up_its_tail_and_its_row() -> None:
    policy = VelocityReuse(replace(ALL.reuse, threshold=1e9), 30)
    _, calls = sample(policy)
    reused = policy.summary()["reused"]
    assert len(reused) == 30 - calls
    assert min(reused) >= 8 and max(reused) < 30 - ALL.reuse.tail
    rows = [index for index in reused if index + 1 in reused and index + 2 in reused]
    assert not rows


def test_reuse_with_nothing_allowed_is_plain_sampling() -> None:
    exact, _ = sample(EveryStep())
    reused, calls = sample(VelocityReuse(replace(ALL.reuse, threshold=0.0), 30))
    assert calls == 30 and torch.equal(exact, reused)


def test_nan_is_never_reused() -> None:
    policy = VelocityReuse(replace(ALL.reuse, threshold=1e9), 30)
    sigmas, x = Scheduler(30, 5.0).sigmas, torch.ones(1, 1, 3, 2, 2)
    for index in range(12):
        bad = x * (math.nan if index == 11 else 1.0 + index)
        policy.points_to_merge(Called(x * index, bad, bad), sigmas, index)
    assert policy.reuse(x, sigmas, 12) is None
