"""What a run took: seconds and peak bytes by stage, notes for the caller, and the `Step`s with their ETA."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from wan_local.device import held_bytes, peak_bytes, reset_peak
from wan_local.planner import Plan
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
        reset_peak(self.device)
        before = held_bytes(self.device)
        yield
        self.seconds[name] = round(time.monotonic() - self._stage_started, 3)
        peak = peak_bytes(self.device)
        if peak is not None and before is not None:
            self.peak_bytes[name] = peak
            # a process holds libraries and earlier stages' pages too; a card's allocator holds what was planned alone
            self.stage_bytes[name] = peak - before if self.device.type == "cpu" else peak

    def beside(self, plan: Plan) -> dict[str, dict[str, int]]:
        """Return each measured stage's bytes beside the planned ones."""
        planned = {stage.name: stage.peak_bytes for stage in plan.stages}
        return {
            name: {"planned_bytes": planned[name], "measured_bytes": measured}
            for name, measured in self.stage_bytes.items()
            if name in planned
        }

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
