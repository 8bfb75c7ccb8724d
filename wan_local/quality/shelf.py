"""Networks that stay loaded between the runs of a study: small ones, which load longer than they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wan_local.checkpoint import ModelFiles
from wan_local.ladder import Rung
from wan_local.planner import StagePlan
from wan_local.stage import Network, load_network
from wan_local.weight_format import Int8Arithmetic
from wan_local.workspace import Workspace

_Key = tuple[Network, str, torch.device, torch.dtype, Int8Arithmetic | None]


class Shelf:
    """Loads a network once for each model, device, dtype and arithmetic. Nothing is freed before the shelf is."""

    def __init__(self) -> None:
        self._networks: dict[_Key, nn.Module] = {}

    def network(
        self, network: Network, files: ModelFiles, device: torch.device, dtype: torch.dtype, plan: StagePlan | None
    ) -> nn.Module:
        """Return a network, loaded now or before. Blocks that a plan streams do not belong on a shelf."""
        assert plan is None or plan.resident_blocks is None, "a network that is streamed does not fit on a shelf"
        arithmetic = None if plan is None else plan.int8_arithmetic
        key = (network, str(files.folder), device, dtype, arithmetic)
        if key not in self._networks:
            self._networks[key] = load_network(network, files, device, dtype, plan=plan)
        return self._networks[key]

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
        yield self.shelf.network(network, self.files, rung.device, rung.dtype, rung.plan)
