"""Tensors of a block of a network from its file: one sequential read where they lie there as they shall in memory.

A store is laid out so. Elsewhere, and where dtypes differ, they come through a buffer of a few MiB.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wan_local.checkpoint import PartTensors
from wan_local.extent import DTYPES, read_extent
from wan_local.header import TensorInfo

_STAGED_BYTES = 2**23


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
        infos = {name: self._tensors.info(f"{self._path}.{index}.{name}") for name in views}
        extent = _one_extent(infos)
        target = _laid_out_alike(views, infos, *extent) if extent is not None else None
        if extent is not None and target is not None:
            read_extent(extent[0].file, extent[0].offset, target, extent[0].stamp)
            return
        for name, view in views.items():
            self._convert(infos[name], view.view(-1))

    def _convert(self, info: TensorInfo, numbers: Tensor) -> None:
        """Write a stored tensor into `numbers` [count], some of them at a time."""
        if not self._staging.nbytes:
            self._staging = torch.empty(_STAGED_BYTES, dtype=torch.uint8)
        dtype, offset = DTYPES[info.dtype], info.offset
        for some in numbers.split(_STAGED_BYTES // dtype.itemsize):
            staged = self._staging[: some.numel() * dtype.itemsize]
            read_extent(info.file, offset, staged, info.stamp)
            some.copy_(staged.view(dtype))
            offset += staged.nbytes


def _one_extent(infos: Mapping[str, TensorInfo]) -> tuple[TensorInfo, int] | None:
    """Return the first tensor and how many bytes all take, if they lie in one file without a gap."""
    if not infos:
        return None
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
