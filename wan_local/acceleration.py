"""Fewer model calls: a policy is asked before and after each call what may be left out.

Step merging ("merge"). The velocity's relative change per unit of sigma, rho, is measured on-line between the last two
calls; a following grid point is deleted while the change predicted for it is below tau:

    rho * (sigma[i] - sigma[i+1]) < tau    and    sigma[i] - sigma[i+2] <= max_gap

The first steps and the last always run. rho is the largest of three: all latent frames, the first, the last, so that
the ends can veto. Deleting points keeps the multi-step solver's history true. It needs no calibration and no memory
beyond one velocity. "static" takes a constant for rho, so that the plan is the same on every machine.

Velocity reuse ("reuse"), for comparison. The last velocity serves again while the change accumulated since its call,
k * mean|x - x'| / mean|v|, stays below a threshold; k = mean|dv| / mean|dx| is measured between the last two calls.
It holds two velocities and two latents. Source: EasyCache, https://arxiv.org/abs/2507.02860.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from wan_local.acceleration_config import AccelerationConfig, MergingConfig, ReuseConfig

Acceleration = Literal["none", "regular"]


class Policy(Protocol):
    """What the denoising loop asks. Tensors are [1, C, T, H, W] float32; sigmas [n + 1] end with 0."""

    def reuse(self, latents: Tensor, sigmas: Tensor, index: int) -> Tensor | None:
        """Return a guided velocity to use at `index` instead of calling the model, or None for a call."""

    def points_to_merge(self, called: Called, sigmas: Tensor, index: int) -> int:
        """Return how many grid points after `index` to delete before the step is taken; asked after each call."""

    def summary(self) -> dict[str, Any]:
        """Return what was decided and why, for the result's report."""


@dataclass(frozen=True, slots=True)
class Called:
    """A model call: the latents it saw, the guided velocity, and the one of the prompt alone."""

    latents: Tensor
    noise_pred: Tensor
    conditional: Tensor


def make_policy(acceleration: Acceleration, num_inference_steps: int, config: AccelerationConfig) -> Policy:
    """Return the policy of a run; short schedules are left alone."""
    name = config.policy
    least = config.reuse.min_steps if name == "reuse" else config.merge.min_steps
    if acceleration == "none" or num_inference_steps < least:
        return EveryStep()
    if name == "reuse":
        return VelocityReuse(config.reuse, num_inference_steps)
    return StepMerging(config.merge, num_inference_steps, static=name == "static")


class EveryStep:
    """`acceleration="none"`: every grid point is a model call."""

    def reuse(self, latents: Tensor, sigmas: Tensor, index: int) -> None:
        del latents, sigmas, index

    def points_to_merge(self, called: Called, sigmas: Tensor, index: int) -> int:
        del called, sigmas, index
        return 0

    def summary(self) -> dict[str, Any]:
        return {"policy": "none"}


@dataclass
class StepMerging:
    """Adaptive step merging. `rho` lists what was measured, one number a call from the second on.

    `merged` lists the deleted points by their place in the full grid.
    """

    config: MergingConfig
    num_inference_steps: int
    static: bool = False
    rho: list[float] = field(default_factory=list)
    merged: list[int] = field(default_factory=list)
    _last: tuple[Tensor, float] | None = None
    _calls: int = 0

    def reuse(self, latents: Tensor, sigmas: Tensor, index: int) -> None:
        del latents, sigmas, index

    def points_to_merge(self, called: Called, sigmas: Tensor, index: int) -> int:
        sigma, velocity = float(sigmas[index]), called.conditional
        if self._last is not None:
            self.rho.append(velocity_change(velocity, self._last[0], self._last[1] - sigma))
        self._last = (velocity, sigma)
        self._calls += 1
        warm = warm_up(self.config, self.num_inference_steps)
        if self._calls < warm or not all(math.isfinite(rho) for rho in self.rho):
            return 0
        rho = self.config.static_rho if self.static else self.rho[-1]
        count = mergeable(rho, sigmas[:-1].tolist(), index, self.config)
        place = index + len(self.merged)
        self.merged += range(place + 1, place + 1 + count)
        return count

    def summary(self) -> dict[str, Any]:
        name = "static" if self.static else "merge"
        return {"policy": name, "rho": [round(rho, 4) for rho in self.rho], "merged": list(self.merged)}


@dataclass
class VelocityReuse:
    """EasyCache's rule on the latents of a whole step; the guided velocity is what serves again."""

    config: ReuseConfig
    num_inference_steps: int
    reused: list[int] = field(default_factory=list)
    _called: Called | None = None
    _rate: float | None = None
    _calls: int = 0
    _change: float = 0.0
    _in_a_row: int = 0
    _seen: Tensor | None = None

    def reuse(self, latents: Tensor, sigmas: Tensor, index: int) -> Tensor | None:
        called, rate, seen = self._called, self._rate, self._seen
        self._seen = latents
        if called is None or seen is None or rate is None or not math.isfinite(rate):
            return None
        moved = float((latents - seen).abs().mean() / called.conditional.abs().mean())
        self._change += rate * moved
        early = self._calls < warm_up(self.config, self.num_inference_steps)
        late = index >= len(sigmas) - 1 - self.config.tail
        if early or late or self._in_a_row == self.config.max_reused or not self._change < self.config.threshold:
            return None
        self._in_a_row += 1
        self.reused.append(index)
        return called.noise_pred

    def points_to_merge(self, called: Called, sigmas: Tensor, index: int) -> int:
        del sigmas, index
        if self._called is not None:
            changed = (called.conditional - self._called.conditional).abs().mean()
            self._rate = float(changed / (called.latents - self._called.latents).abs().mean())
        self._called = called
        self._calls, self._change, self._in_a_row = self._calls + 1, 0.0, 0
        return 0

    def summary(self) -> dict[str, Any]:
        return {"policy": "reuse", "reused": list(self.reused)}


def warm_up(config: MergingConfig | ReuseConfig, num_inference_steps: int) -> int:
    """Return how many calls are made before anything may be left out."""
    return max(config.warm_min, math.ceil(config.warm_fraction * num_inference_steps))


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
