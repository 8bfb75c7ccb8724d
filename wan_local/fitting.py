"""A plan that fits, or a refusal before a weight is read: what is lacking, and the nearest that fits. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wan_local.errors import DoesNotFit
from wan_local.geometry import Geometry
from wan_local.planner import (
    GIB,
    HEADROOM,
    Machine,
    NetworkSize,
    Plan,
    free_ram_for,
    plan_within,
    usable_bytes,
    usable_ram_bytes,
)
from wan_local.settings import ModelConfig


@dataclass(frozen=True, slots=True)
class WayOut:
    """Something else that could be asked for where a request does not fit, in words, and what it would need."""

    words: str
    geometry: Geometry
    sizes: Mapping[str, NetworkSize]


def make_plan(
    geometry: Geometry,
    config: ModelConfig,
    sizes: Mapping[str, NetworkSize],
    machine: Machine,
    *,
    ways_out: Iterable[WayOut] = (),
) -> Plan:
    """Return the plan: every network whole on the device while its stage lasts, or streamed where that is too much.

    sizes: of each network. ways_out: what to suggest where this does not fit, the nearest first; not looked at before.
    Raises DoesNotFit.
    """
    plan = plan_within(geometry, config, sizes, machine)
    if _fits(plan, machine):
        return plan
    raise DoesNotFit(f"{_lack(plan, machine)} {_advice(plan, config, machine, ways_out)}")


def _fits(plan: Plan, machine: Machine) -> bool:
    return plan.peak.peak_bytes <= usable_bytes(machine) and plan.peak_in_ram.ram_bytes <= usable_ram_bytes(machine)


def _lack(plan: Plan, machine: Machine) -> str:
    """Say what is needed and what there is."""
    what, peak, in_ram = f"{plan.geometry.size} x {plan.geometry.num_frames} frames", plan.peak, plan.peak_in_ram
    if peak.peak_bytes > usable_bytes(machine):
        return (
            f"{what} needs {peak.peak_bytes / GIB:.1f} GiB on {machine.device} at its peak ({peak.name}: "
            f"{peak.weight_bytes / GIB:.1f} GiB of weights); {machine.free_bytes / GIB:.1f} GiB is free, of which "
            f"{usable_bytes(machine) / GIB:.1f} GiB may be used."
        )
    usable = usable_ram_bytes(machine)
    return (
        f"{what} needs {in_ram.ram_bytes / GIB:.1f} GiB of RAM beside {machine.device} ({in_ram.name}); "
        f"{machine.free_ram_bytes / GIB:.1f} GiB is free, of which {usable / GIB:.1f} GiB may be used."
    )


def _advice(plan: Plan, config: ModelConfig, machine: Machine, ways_out: Iterable[WayOut]) -> str:
    """Name the nearest that fits, and what would have to be free for what was asked."""
    missing = max(
        plan.peak.peak_bytes / (1 - HEADROOM) - machine.free_bytes,
        free_ram_for(plan.peak_in_ram.ram_bytes) - machine.free_ram_bytes,
    )
    closing = f"close what else holds {missing / GIB + 0.05:.1f} GiB"
    for way in ways_out:
        other = plan_within(way.geometry, config, way.sizes, machine)
        if _fits(other, machine):
            return f"{way.words} would fit ({other.peak.peak_bytes / GIB:.1f} GiB); or {closing}."
    return f"Use a machine with more memory, or a smaller model; or {closing}."
