"""What `acceleration="regular"` goes by; `wan_local.settings` reads it from `configs/` and a file of one's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

AccelerationPolicy = Literal["merge", "static", "reuse"]

_LIMITS: dict[str, tuple[float, float]] = {  # the least and the most that each threshold can be
    "tau": (0, math.inf),
    "threshold": (0, math.inf),
    "max_merged": (0, math.inf),
    "max_reused": (0, math.inf),
    "warm_fraction": (0, 1),
    "warm_min": (2, math.inf),  # a change is measured between two calls
    "tail": (1, math.inf),  # a step that goes past the last grid point would end nowhere
    "max_gap": (0, math.inf),
    "min_steps": (1, math.inf),
    "static_rho": (0, math.inf),
}


@dataclass(frozen=True, slots=True)
class MergingConfig:
    """Thresholds of step merging; `configs/acceleration.toml` says what each is. Raises ValueError beyond limits."""

    tau: float
    max_merged: int
    warm_fraction: float
    warm_min: int
    tail: int
    max_gap: float
    min_steps: int
    static_rho: float

    def __post_init__(self) -> None:
        _check_limits("merge", self)


@dataclass(frozen=True, slots=True)
class ReuseConfig:
    """Thresholds of velocity reuse; `configs/acceleration.toml` says what each is. Raises ValueError beyond limits."""

    threshold: float
    max_reused: int
    warm_fraction: float
    warm_min: int
    tail: int
    min_steps: int

    def __post_init__(self) -> None:
        _check_limits("reuse", self)


@dataclass(frozen=True, slots=True)
class AccelerationConfig:
    """What `acceleration="regular"` does, and the thresholds of every policy."""

    policy: AccelerationPolicy
    merge: MergingConfig
    reuse: ReuseConfig


def _check_limits(table: str, config: MergingConfig | ReuseConfig) -> None:
    for name in (field.name for field in fields(config)):
        value, (least, most) = getattr(config, name), _LIMITS[name]
        if not least <= value <= most or value == math.inf:
            limit = f"a number of {least:g} or more" if most == math.inf else f"a number from {least:g} to {most:g}"
            raise ValueError(f"{name} in [{table}] is {value!r}; it is {limit}")
