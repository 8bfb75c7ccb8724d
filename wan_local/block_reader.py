"""Tensors of a block of a network from its file: one sequential read where the file holds them together.

A store is laid out so, and most other checkpoints nearly so. Where also dtypes and places agree with the buffer that is
to be filled, the bytes go straight into it; else through a buffer of their size that is used again for the next.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wan_local.checkpoint import PartTensors
from wan_local.extent import DTYPES, read_extent
from wan_local.header import TensorInfo


class BlockReader:
    """Fills views with the tensors of block `index` of the list of blocks at `path`; one thread at a time."""

    def __init__(self, tensors: PartTensors, path: str) -> None:
        self._tensors, self._path = tensors, path
        self._staging = torch.empty(0, dtype=torch.uint8)

    def order(self, index: int, name: str) -> tuple[str, int]:
        """Return where tensor `name` of a block lies, as a key to sort by."""
        info = self._tensors.info(f"{self._path}.{index}.{name}")
        return info.file.name, info.offset

    def fill(self, index: int, views: Mapping[str, Tensor]) -> None:
        """Write those tensors of the block that `views` has into them, converting dtypes."""
        if not views:
            return
        infos = {name: self._tensors.info(f"{self._path}.{index}.{name}") for name in views}
        extent = _one_extent(infos)
        if extent is None:
            for name, view in views.items():
                view.copy_(self._tensors[f"{self._path}.{index}.{name}"])
            return
        first, nbytes = extent
        target = _laid_out_alike(views, infos, first, nbytes)
        if target is not None:
            read_extent(first.file, first.offset, target, first.stamp)
            return
        if self._staging.nbytes < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8)
        read_extent(first.file, first.offset, self._staging[:nbytes], first.stamp)
        for name, view in views.items():
            begin, info = infos[name].offset - first.offset, infos[name]
            stored = self._staging[begin : begin + info.nbytes].clone() if begin % 8 else self._staging[begin:]
            view.copy_(stored[: info.nbytes].view(DTYPES[info.dtype]).view(info.shape))


def _one_extent(infos: Mapping[str, TensorInfo]) -> tuple[TensorInfo, int] | None:
    """Return the first tensor and how many bytes all take, if they lie in one file without a gap."""
    ordered = sorted(infos.values(), key=lambda info: info.offset)
    first, last = ordered[0], ordered[-1]
    nbytes = last.offset + last.nbytes - first.offset
    together = all(info.file == first.file for info in ordered) and nbytes == sum(info.nbytes for info in ordered)
    return (first, nbytes) if together else None


def _laid_out_alike(
    views: Mapping[str, Tensor], infos: Mapping[str, TensorInfo], first: TensorInfo, nbytes: int
) -> Tensor | None:
    """Return the memory behind all views as uint8 [nbytes] if it looks as the file does, byte for byte."""
    start = min(view.data_ptr() for view in views.values())
    for name, view in views.items():
        info = infos[name]
        if view.dtype != DTYPES[info.dtype] or view.data_ptr() - start != info.offset - first.offset:
            return None
    view = min(views.values(), key=lambda view: view.data_ptr())
    storage = view.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8)
    memory.set_(storage, start - storage.data_ptr(), (nbytes,), (1,))
    return memory
