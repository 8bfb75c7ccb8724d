"""What every stage of `bench/gpu.py` is given: device, size and time, rows, checks, random weights."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.world import RESULTS, append_row, describe
from wan_local.geometry import Size
from wan_local.models.transformer import stays_float32
from wan_local.quantize import stays_as_stored
from wan_local.settings import ModelConfig, load_model_config

SIZES = {"full": (Size(480, 832), Size(720, 1280)), "small": (Size(64, 112),)}
INT8_STD = 73.3  # of whole numbers drawn evenly from -127 to 127


@dataclass(frozen=True)
class Bench:
    """What every stage is given. `deadline`: of `time.monotonic`, after which nothing more is timed.

    `guide_scale`, `kernels`: of `whole_run`, as the settings name them.
    """

    device: torch.device
    size: str
    runs: int
    results: Path = RESULTS
    deadline: float = math.inf
    guide_scale: float = 5.0
    kernels: str = "off"

    @property
    def config(self) -> ModelConfig:
        return load_model_config("flf2v_14b" if self.size == "full" else "flf2v_tiny")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self, stage: str, who: str, seconds: float) -> bool:
        """Tell whether a row that takes about so long can still be timed; if not, a row says that it was left out."""
        if self.seconds_left() >= seconds:
            return True
        self.report(stage, who=who, skipped=f"{self.seconds_left():.0f} s left, about {seconds:.0f} s needed")
        return False

    def report(self, stage: str, **row: Any) -> None:
        file = "gpu" if self.device.type == "cuda" else "gpu_script_on_cpu"
        append_row(file, {"stage": stage, "world": _world(self.device), **row}, self.results)


@functools.cache
def _world(device: torch.device) -> dict[str, Any]:
    """Asking the driver for its version takes a second: once is enough."""
    return describe(device)


class CheckFailed(Exception):
    """A result is wrong, so its time is worth nothing."""


def check(what: str, value: float, limit: float) -> None:
    print(f"  {what}: {value:.3g} (limit {limit:.3g})", flush=True)
    if not value <= limit:
        raise CheckFailed(f"{what}: {value:.4g} is over {limit:.4g}")


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Run `work` once and return its seconds, waiting for the card before and after."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def in_turn(works: dict[str, Callable[[], Any]], bench: Bench) -> dict[str, dict[str, Any]]:
    """Time works one after the other, `bench.runs` times in turn, so that a card's changing clock meets all alike.

    `grown_bytes` are the most that a work held on a card on top of what was there before it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    grown: dict[str, int | None] = dict.fromkeys(works)
    for _ in range(bench.runs):
        for name, work in works.items():
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(bench.device)
                before = torch.cuda.memory_allocated(bench.device)
            seconds[name].append(seconds_of(work, bench.device))
            if bench.device.type == "cuda":
                grown[name] = torch.cuda.max_memory_allocated(bench.device) - before
    return {
        name: {
            "n": len(taken),
            "median_seconds": round(statistics.median(taken), 4),
            "spread_seconds": [round(min(taken), 4), round(max(taken), 4)],
            "grown_bytes": grown[name],
        }
        for name, taken in seconds.items()
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_state(module: nn.Module, bench: Bench, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return random weights of a sane size for every parameter of a module on meta, made on the device."""
    state = {}
    for name, parameter in module.state_dict().items():
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
        if stays_as_stored(name, parameter.dtype):
            state[name] = _quantized(name, parameter, module, bench.device)
            continue
        wanted = dtype or (torch.float32 if stays_float32(name) else bench.dtype)
        noise = torch.randn(parameter.shape, device=bench.device, dtype=wanted)
        is_scale = name.endswith(("gamma",)) or ("norm" in name and name.endswith("weight"))
        state[name] = noise.mul_(0.05).add_(1.0) if is_scale else noise.mul_(0.5 / fan_in**0.5)
    return state


def _quantized(name: str, parameter: Tensor, module: nn.Module, device: torch.device) -> Tensor:
    """Return int8 numbers, or the scales that make a weight of them as large as a plain one."""
    if parameter.dtype == torch.int8:
        return torch.randint(-127, 128, parameter.shape, dtype=torch.int8, device=device)
    columns = module.get_parameter(name.removesuffix("_scale")).shape[1]
    return torch.full(parameter.shape, 0.5 / (INT8_STD * columns**0.5), dtype=parameter.dtype, device=device)
