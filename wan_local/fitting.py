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
    """Say what is needed and what there is, on the device and in RAM, where it is too little."""
    peak, in_ram, usable, usable_ram = plan.peak, plan.peak_in_ram, usable_bytes(machine), usable_ram_bytes(machine)
    lacks = []
    if peak.peak_bytes > usable:
        lacks.append(
            f"{peak.peak_bytes / GIB:.1f} GiB on {machine.device} at its peak ({peak.name}: "
            f"{peak.weight_bytes / GIB:.1f} GiB of weights); {machine.free_bytes / GIB:.1f} GiB is free, of which "
            f"{usable / GIB:.1f} GiB may be used"
        )
    if in_ram.ram_bytes > usable_ram:
        lacks.append(
            f"{in_ram.ram_bytes / GIB:.1f} GiB of RAM beside {machine.device} ({in_ram.name}); "
            f"{machine.free_ram_bytes / GIB:.1f} GiB is free, of which {usable_ram / GIB:.1f} GiB may be used"
        )
    what = f"{plan.geometry.size} x {plan.geometry.num_frames} frames"
    return f"{what} needs {', and '.join(lacks)}."


def _advice(plan: Plan, config: ModelConfig, machine: Machine, ways_out: Iterable[WayOut]) -> str:
    """Name the nearest that fits, and what would have to be free for what was asked."""
    missing = plan.peak.peak_bytes / (1 - HEADROOM) - machine.free_bytes
    missing_ram = free_ram_for(plan.peak_in_ram.ram_bytes) - machine.free_ram_bytes
    closing = f"close what else holds {max(missing, missing_ram) / GIB + 0.05:.1f} GiB"
    if missing > 0 and missing_ram > 0:
        here, in_ram = (f"{lacking / GIB + 0.05:.1f} GiB" for lacking in (missing, missing_ram))
        closing = f"close what else holds {here} on {machine.device} and {in_ram} of RAM"
    for way in ways_out:
        other = plan_within(way.geometry, config, way.sizes, machine)
        if _fits(other, machine):
            return f"{way.words} would fit ({other.peak.peak_bytes / GIB:.1f} GiB); or {closing}."
    return f"Use a machine with more memory, or a smaller model; or {closing}."
