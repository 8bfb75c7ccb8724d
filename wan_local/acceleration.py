"""Fewer model calls: a policy says, after each call, how many of the next grid points the solver may step over.

`acceleration="regular"` is adaptive step merging. The velocity's relative change per unit of sigma, rho, is measured
on-line between the last two calls; a following grid point is deleted while the change predicted for it is below tau:

    rho * (sigma[i] - sigma[i+1]) < tau    and    sigma[i] - sigma[i+2] <= max_gap

The first steps and the last always run. rho is the largest of three: all latent frames, the first, the last, so that
the ends can veto. Deleting points instead of reusing a velocity keeps the multi-step solver's history true. It needs
no calibration and no memory beyond one velocity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from wan_local.settings import MergingConfig, load_merging_config

Acceleration = Literal["none", "regular"]


class Policy(Protocol):
    """What the denoising loop asks after each model call."""

    def points_to_merge(self, noise_pred: Tensor, sigmas: Tensor, index: int) -> int:
        """Return how many grid points after `index` to delete before the step is taken.

        noise_pred: the prediction with the prompt, before guidance, [1, C, T, H, W] float32. sigmas: [n + 1], 0 last.
        """


def make_policy(acceleration: Acceleration, num_inference_steps: int) -> Policy:
    """Return the policy of a run; short schedules are left alone."""
    config = load_merging_config()
    if acceleration == "none" or num_inference_steps < config.min_steps:
        return EveryStep()
    return StepMerging(config, num_inference_steps)


class EveryStep:
    """`acceleration="none"`: every grid point is a model call."""

    def points_to_merge(self, noise_pred: Tensor, sigmas: Tensor, index: int) -> int:
        del noise_pred, sigmas, index
        return 0


@dataclass
class StepMerging:
    """Adaptive step merging. `rho` lists what was measured, one number a call from the second on."""

    config: MergingConfig
    num_inference_steps: int
    rho: list[float] = field(default_factory=list)
    _last: tuple[Tensor, float] | None = None
    _calls: int = 0

    def points_to_merge(self, noise_pred: Tensor, sigmas: Tensor, index: int) -> int:
        sigma = float(sigmas[index])
        if self._last is not None:
            self.rho.append(velocity_change(noise_pred, self._last[0], self._last[1] - sigma))
        self._last = (noise_pred, sigma)
        self._calls += 1
        warm = max(self.config.warm_min, math.ceil(self.config.warm_fraction * self.num_inference_steps))
        if self._calls < warm or not all(math.isfinite(rho) for rho in self.rho):
            return 0
        return mergeable(self.rho[-1], sigmas[:-1].tolist(), index, self.config)


def mergeable(rho: float, sigmas: list[float], index: int, config: MergingConfig) -> int:
    """Return how many points after `index` the rule of this module lets go; `sigmas` without the final 0."""
    count = 0
    while count < config.max_merged and index + count + 1 < len(sigmas) - config.tail:
        reached, beyond = sigmas[index + count + 1], sigmas[index + count + 2]
        if rho * (sigmas[index] - reached) >= config.tau or sigmas[index] - beyond > config.max_gap:
            break
        count += 1
    return count


def velocity_change(noise_pred: Tensor, before: Tensor, sigma_step: float) -> float:
    """Return mean|v - v'| / (mean|v'| * sigma_step): the largest of all frames, the first, the last; in float32."""
    assert noise_pred.shape == before.shape and sigma_step > 0, (noise_pred.shape, before.shape, sigma_step)
    now, then = noise_pred.float(), before.float()
    difference, size = (now - then).abs(), then.abs()
    regions = (slice(None), slice(0, 1), slice(-1, None))
    ratios = [float(difference[:, :, region].mean() / size[:, :, region].mean()) for region in regions]
    return max(ratios, key=lambda ratio: math.inf if math.isnan(ratio) else ratio) / sigma_step
