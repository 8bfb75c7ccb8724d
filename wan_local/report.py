"""What a run took: seconds and peak bytes by stage, notes for the caller, and the `Step`s with their ETA.

A stage's bytes are those of the attempt that succeeded, beside what was planned for that attempt; its seconds are those
of all its attempts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from wan_local.device import held_bytes, peak_bytes, reset_peak
from wan_local.planner import Plan, StagePlan
from wan_local.request import Stage, Step

_DECODE_TO_ENCODE = 2.5  # decoding takes about this many times as long as encoding the condition did
_log = logging.getLogger(__name__)


class Report:
    """One run's clock and record; made when the run begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._started = self._stage_started = self._pace_started = time.monotonic()
        self._known = 0
        self._stage: Stage = "plan"
        self._measured = device  # where this stage's bytes are measured
        self._before: int | None = None  # what was held there when that began
        self._tried: dict[str, tuple[StagePlan, dict[str, Any]]] = {}  # by stage, the last attempt at it
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.stage_bytes: dict[str, int] = {}
        self.notes: list[str] = []
        self.acceleration: dict[str, Any] = {}
        self.kernels = ""
        self.likeness: dict[str, float] = {}  # of the video's ends to the images
        self.facts: dict[str, Any] = {}  # what belongs into the video's metadata too

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Measure a stage from here to the end of the block."""
        self._stage, self._stage_started = name, time.monotonic()
        self.known(0)
        self._measure_on(self.device)
        yield
        self.seconds[name] = round(time.monotonic() - self._stage_started, 3)
        peak = peak_bytes(self._measured)
        if peak is not None and self._before is not None:
            self.peak_bytes[name] = peak
            # a process holds libraries and earlier stages' pages too; a card's allocator holds what was planned alone
            # (Linux counts those by the thread and late: a stage that takes next to nothing may seem to give some back)
            self.stage_bytes[name] = max(peak - self._before, 0) if self._measured.type == "cpu" else peak

    def attempt(
        self, plan: StagePlan, device: torch.device, *, chunk_tokens: int | None = None, again: bool = False
    ) -> None:
        """Take the running stage's bytes as those of an attempt on `device` that is planned so.

        chunk_tokens: at a time in the loop. again: the attempt before ran out of memory, so that its peak counts no
        more.
        """
        if device != self._measured:
            self._measure_on(device)
        elif again:
            reset_peak(device)
        how: dict[str, Any] = {}
        if plan.resident_blocks is not None:
            how |= {"resident_blocks": plan.resident_blocks, "source": plan.source}
        if plan.tiling.count > 1:
            how["tiles"] = str(plan.tiling)
        if plan.name == "denoise":
            how["chunk_tokens"] = chunk_tokens
        if device != self.device:
            how["device"] = str(device)
        self._tried[plan.name] = plan, how

    def beside(self, plan: Plan) -> dict[str, dict[str, Any]]:
        """Return each measured stage's bytes beside the planned ones, and how it was done: see `attempt`.

        plan: what counts for stages that nothing was tried in, for their answers were known.
        """
        planned = {stage.name: self._tried.get(stage.name, (stage, {})) for stage in plan.stages}
        return {
            name: {"planned_bytes": planned[name][0].peak_bytes, "measured_bytes": measured, **planned[name][1]}
            for name, measured in self.stage_bytes.items()
            if name in planned
        }

    def _measure_on(self, device: torch.device) -> None:
        reset_peak(device)
        self._measured, self._before = device, held_bytes(device)

    def note(self, text: str) -> None:
        """Keep something that the caller should know and log it."""
        _log.warning(text)
        self.notes.append(text)

    def known(self, index: int) -> None:
        """Take the pace of this stage from here on: its first `index` were known and cost no time of their own."""
        self._known, self._pace_started = index, time.monotonic()

    def step(self, index: int, total: int, message: str, *, preview: Any = None) -> Step:
        """Return the sign of progress for `index` of `total` within the stage that is running."""
        return Step(
            stage=self._stage,
            index=index,
            total=total,
            message=message,
            elapsed_seconds=time.monotonic() - self._started,
            eta_seconds=self._eta(index, total),
            preview=preview,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "torch": torch.__version__,
            "seconds": {**self.seconds, "total": round(time.monotonic() - self._started, 3)},
            "peak_bytes": dict(self.peak_bytes),
            "acceleration": dict(self.acceleration),
            "kernels": self.kernels,
            **self.likeness,
            "notes": list(self.notes),
            **self.facts,
        }

    def _eta(self, index: int, total: int) -> float | None:
        """Seconds to the end of the run, from the pace of this stage; None before there is one."""
        if self._stage not in ("denoise", "decode") or index <= self._known:
            return None
        spent = time.monotonic() - self._pace_started
        rest = spent / (index - self._known) * (total - index)
        if self._stage == "denoise":
            rest += _DECODE_TO_ENCODE * self.seconds.get("condition", 0.0)
        return rest
