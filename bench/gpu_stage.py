"""What every stage of `bench/gpu.py` is given: the device and the size, rows, checks, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.world import append_row, describe
from wan_local.geometry import Size
from wan_local.models.transformer import stays_float32
from wan_local.settings import ModelConfig, load_model_config

SIZES = {"full": (Size(480, 832), Size(720, 1280)), "small": (Size(64, 112),)}


@dataclass(frozen=True)
class Bench:
    """What every stage is given."""

    device: torch.device
    size: str
    runs: int

    @property
    def config(self) -> ModelConfig:
        return load_model_config("flf2v_14b" if self.size == "full" else "flf2v_tiny")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def report(self, stage: str, **row: Any) -> None:
        file = "gpu" if self.device.type == "cuda" else "gpu_script_on_cpu"
        append_row(file, {"stage": stage, "world": describe(self.device), **row})


class CheckFailed(Exception):
    """A result is wrong, so its time is worth nothing."""


def check(what: str, value: float, limit: float) -> None:
    print(f"  {what}: {value:.3g} (limit {limit:.3g})", flush=True)
    if not value <= limit:
        raise CheckFailed(f"{what}: {value:.4g} is over {limit:.4g}")


def random_state(module: nn.Module, bench: Bench, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return random weights of a sane size for every parameter of a module on meta, made on the device."""
    state = {}
    for name, parameter in module.state_dict().items():
        wanted = dtype or (torch.float32 if stays_float32(name) else bench.dtype)
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
        noise = torch.randn(parameter.shape, device=bench.device, dtype=wanted)
        is_scale = name.endswith(("gamma",)) or ("norm" in name and name.endswith("weight"))
        state[name] = noise.mul_(0.05).add_(1.0) if is_scale else noise.mul_(0.5 / fan_in**0.5)
    return state
