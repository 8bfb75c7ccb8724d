"""The sampling loop: noise in, latents out, one `Denoised` a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wan_local.acceleration import Called, Policy
from wan_local.attention import PLAIN_KERNELS, KernelChoice
from wan_local.errors import NumericalError
from wan_local.models.transformer import ContextKV, Modulation, Transformer
from wan_local.scheduler import Scheduler


class Predictor(Protocol):
    """What the sampling loop asks: the guided velocity and the one of the prompt alone, [1, 16, T, H, W] float32."""

    def predict(self, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Guided:
    """The transformer with everything that stays the same during a run.

    condition: [1, 20, T, H, W]. modulations: by timestep. context: of the prompt. negative_context: of the negative
    prompt, or None for a `guide_scale` of 1, which needs no second pass. together: both passes go block by block, as
    streamed weights want it, instead of one after the other, which holds less. The rest is as in `Transformer.forward`.
    """

    transformer: Transformer
    condition: Tensor
    modulations: Mapping[float, Modulation]
    context: Iterable[ContextKV]
    negative_context: Iterable[ContextKV] | None
    guide_scale: float
    together: bool = False
    chunk_tokens: int | None = None
    residual_dtype: torch.dtype | None = None
    choice: KernelChoice = PLAIN_KERNELS

    def predict(self, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """Return the guided velocity v_u + w (v_c - v_u) and v_c itself, both [1, 16, T, H, W] float32."""
        inputs = torch.cat((latents, self.condition), dim=1)
        if self.negative_context is None:
            [conditional] = self._velocities(inputs, timestep, self.context)
            return conditional, conditional
        if self.together:
            conditional, unconditional = self._velocities(inputs, timestep, self.context, self.negative_context)
        else:
            [conditional] = self._velocities(inputs, timestep, self.context)
            [unconditional] = self._velocities(inputs, timestep, self.negative_context)
        return unconditional + self.guide_scale * (conditional - unconditional), conditional

    def _velocities(self, inputs: Tensor, timestep: float, *contexts: Iterable[ContextKV]) -> list[Tensor]:
        velocities: list[Tensor] = self.transformer(
            inputs,
            self.modulations[timestep],
            contexts,
            chunk_tokens=self.chunk_tokens,
            residual_dtype=self.residual_dtype,
            choice=self.choice,
        )
        return velocities


@dataclass(frozen=True, slots=True)
class Denoised:
    """State after a step: `done` of `total` grid points (merged ones count as done), after `calls` model calls.

    latents: [1, 16, T, H, W] float32. clean: what the latents would be without noise, as predicted in this step.
    """

    done: int
    total: int
    calls: int
    latents: Tensor
    clean: Tensor


def denoise(guided: Predictor, scheduler: Scheduler, latents: Tensor, policy: Policy) -> Iterator[Denoised]:
    """Yield the state after every step from noise `latents` on; the last one's latents are the result.

    Raises NumericalError where a prediction is not finite.
    """
    total, done, index, calls = len(scheduler), 0, 0, 0
    while index < len(scheduler):
        merged, noise_pred = 0, policy.reuse(latents, scheduler.sigmas, index)
        if noise_pred is None:
            noise_pred, conditional = guided.predict(latents, float(scheduler.timesteps[index]))
            _check_finite(noise_pred, done + 1, total)
            calls += 1
            merged = policy.points_to_merge(Called(latents, noise_pred, conditional), scheduler.sigmas, index)
            scheduler.merge(index, merged)
        clean = latents - float(scheduler.sigmas[index]) * noise_pred
        latents = scheduler.step(noise_pred, index, latents)
        index, done = index + 1, done + 1 + merged
        yield Denoised(done, total, calls, latents, clean)


def _check_finite(noise_pred: Tensor, step: int, total: int) -> None:
    if not torch.isfinite(noise_pred).all():
        raise NumericalError(
            f"step {step} of {total} gave NaN or infinity, so there is no picture to make of it. The weights may be "
            "damaged, or the device computes wrongly: try precision='reference' (plain PyTorch and a float32 hidden "
            "state; linears stay bfloat16 on a card), or device='cpu', which is float32 throughout."
        )
