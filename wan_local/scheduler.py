"""The noise schedule as the official code has it, and the solver's steps, by diffusers' solvers.

diffusers' own grid is off by up to 0.004 (shift 5); here the official one is put in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Solver = Literal["unipc", "dpm++", "euler"]

NUM_TRAIN_TIMESTEPS = 1000
_U_MAX = float(np.float32(0.999))  # the official code keeps 1 - 1/1000 in float32 and the rest in float64


def sigma_grid(num_inference_steps: int, shift: float, *, solver: Solver = "unipc") -> NDArray[np.float64]:
    """Return `s u / (1 + (s - 1) u)` for u falling from 0.999 (dpm++: 1) to 0, without the last point; float64 [steps].

    Source: https://github.com/Wan-Video/Wan2.1 (wan/utils/fm_solvers_unipc.py, fm_solvers.py).
    """
    u = np.linspace(_U_MAX if solver == "unipc" else 1.0, 0.0, num_inference_steps + 1)[:-1]
    return shift * u / (1.0 + (shift - 1.0) * u)


class Scheduler:
    """One run's schedule and solver state; made anew for every run.

    `sigmas` float32 [steps + 1] ends with 0. `timesteps` int64 [steps] are `1000 * sigma`, cut and not rounded; those
    of distilled weights are float32 and not cut.
    """

    def __init__(self, num_inference_steps: int, shift: float, *, solver: Solver = "unipc") -> None:
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        self._solver = _make_solver(solver, shift)
        grid = sigma_grid(num_inference_steps, shift, solver=solver)
        self._solver.set_timesteps(num_inference_steps)
        # float32: bf16 sigmas lose the last steps
        self._set(
            torch.from_numpy(np.append(grid, 0.0).astype(np.float32)),
            torch.from_numpy(grid * NUM_TRAIN_TIMESTEPS).long(),
        )
        self._solver.set_begin_index(0)

    @classmethod
    def distilled(cls, steps: Sequence[float], shift: float) -> Scheduler:
        """Return Euler's method on exactly these points of the unshifted grid, as distilled weights are sampled.

        Source: https://github.com/ModelTC/LightX2V (its step-distillation scheduler).
        """
        made = cls(len(steps), shift, solver="euler")
        u = np.asarray(steps, np.float64)
        grid = torch.from_numpy(np.append(shift * u / (1.0 + (shift - 1.0) * u), 0.0)).float()
        made._set(grid, grid[:-1] * NUM_TRAIN_TIMESTEPS)
        made._solver.set_begin_index(0)
        return made

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigmas(self) -> Tensor:
        sigmas: Tensor = self._solver.sigmas
        return sigmas

    @property
    def timesteps(self) -> Tensor:
        timesteps: Tensor = self._solver.timesteps
        return timesteps

    def merge(self, index: int, count: int) -> None:
        """Delete the `count` grid points after `index`, so that the step from `index` goes straight past them."""
        assert index + count < len(self), f"cannot delete {count} points after {index} of {len(self)}"
        keep = [*range(index + 1), *range(index + 1 + count, len(self.sigmas))]
        self._set(self.sigmas[keep], self.timesteps[keep[:-1]])

    def step(self, noise_pred: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return the latents at the next sigma, on their device. Steps are taken in order; all float32 of one shape.

        Computed on the CPU, in 0.1 s at 720p: on a card the solver would load cuSOLVER for a system of two equations,
        which takes memory beside torch's that no plan counts. And the bits are the same wherever the model runs.
        """
        taken = self._solver.step_index or 0
        assert index == taken, f"step {index} was asked for, {taken} is next"
        timestep = self.timesteps[index]
        stepped: Tensor = self._solver.step(noise_pred.cpu(), timestep, latents.cpu(), return_dict=False)[0]
        return stepped.to(latents.device)

    def _set(self, sigmas: Tensor, timesteps: Tensor) -> None:
        self._solver.sigmas, self._solver.timesteps = sigmas, timesteps
        self._solver.num_inference_steps = len(timesteps)


def _make_solver(solver: Solver, shift: float) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    kind = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}[solver]
    return kind(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
