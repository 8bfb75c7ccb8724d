"""What every stage of one run works with: the model's files, the rungs it may go down, the cache, and when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from wan_local.cache import EncodingCache
from wan_local.checkpoint import ModelFiles
from wan_local.ladder import Attempt, Ladder, Rung
from wan_local.report import Report
from wan_local.request import Check
from wan_local.request import Stage as StageName
from wan_local.stage import Network, stage


@dataclass(frozen=True, slots=True)
class Workspace:
    """One run's surroundings; made when the run begins."""

    files: ModelFiles
    device: torch.device
    dtype: torch.dtype
    ladder: Ladder
    cache: EncodingCache
    report: Report
    check: Check

    def attempts(self, name: StageName) -> Iterator[Attempt]:
        """Yield attempts at a stage, each on a lower rung, until one has the memory it needs, which is reported."""
        for index, attempt in enumerate(self.ladder.attempts(name)):
            rung = attempt.rung
            self.report.attempt(rung.plan, rung.device, chunk_tokens=rung.chunk_tokens, again=index > 0)
            yield attempt

    def open(self, network: Network, rung: Rung) -> AbstractContextManager[Any]:
        """Return the `stage` that hands out `network` as the rung says."""
        return stage(network, self.files, rung.device, rung.dtype, plan=rung.plan, check=self.check)
