"""Networks that stay loaded between the runs of a study, which go together: for small ones, whose work is launches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from wan_local.checkpoint import ModelFiles
from wan_local.ladder import Rung
from wan_local.models.transformer import Transformer
from wan_local.planner import StagePlan
from wan_local.quality.together import Together
from wan_local.stage import Network, load_network
from wan_local.weight_format import Int8Arithmetic
from wan_local.workspace import Workspace

_T = TypeVar("_T")
_Key = tuple[Network, str, torch.device, torch.dtype, Int8Arithmetic | None]


class Shelf:
    """Loads a network once for each model, device, dtype and arithmetic. Nothing is freed before the shelf is."""

    def __init__(self) -> None:
        self._networks: dict[_Key, nn.Module] = {}
        self._lock = threading.Lock()
        self._together: Together | None = None

    def together(self, works: Sequence[Callable[[], _T]]) -> list[_T]:
        """Return what each piece of work gives; their calls of a transformer from this shelf are batches."""
        if len(works) == 1:
            return [works[0]()]
        self._together = Together()
        try:
            return self._together.run(works)
        finally:
            self._together = None

    def network(
        self, network: Network, files: ModelFiles, device: torch.device, dtype: torch.dtype, plan: StagePlan | None
    ) -> nn.Module:
        """Return a network, loaded now or before. Blocks that a plan streams do not belong on a shelf."""
        assert plan is None or plan.resident_blocks is None, "a network that is streamed does not fit on a shelf"
        arithmetic = None if plan is None else plan.int8_arithmetic
        key = (network, str(files.folder), device, dtype, arithmetic)
        with self._lock:
            if key not in self._networks:
                self._networks[key] = load_network(network, files, device, dtype, plan=plan)
        return self._networks[key]

    def handed_out(self, network: Network, files: ModelFiles, rung: Rung) -> Any:
        """Return a network for one run of those that go together."""
        module = self.network(network, files, rung.device, rung.dtype, rung.plan)
        if self._together is not None and isinstance(module, Transformer):
            return self._together.batching(module)
        return module

    def furnish(self, space: Workspace) -> Workspace:
        """Return a workspace that takes its networks from this shelf."""
        return _Furnished(
            space.files, space.device, space.dtype, space.ladder, space.cache, space.report, space.check, self
        )


@dataclass(frozen=True, slots=True)
class _Furnished(Workspace):
    shelf: Shelf

    def open(self, network: Network, rung: Rung) -> contextlib.AbstractContextManager[Any]:
        return self._taken(network, rung)

    @contextlib.contextmanager
    def _taken(self, network: Network, rung: Rung) -> Iterator[Any]:
        yield self.shelf.handed_out(network, self.files, rung)
