"""Count the bytes alive while a network runs at its real size on `meta`: the real allocations and no arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak` is the most bytes that storages made inside the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._watch(leaf, counted=False)  # what was there before the block: weights and inputs
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._watch(leaf, counted=True)
        return result

    def _watch(self, leaf: Any, *, counted: bool) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if counted else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    with torch.no_grad(), LiveBytes() as counter:
        yield counter
