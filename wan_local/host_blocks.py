"""Where the blocks that a card streams wait: in one slab of RAM, or in their file behind a small ring of buffers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from wan_local.flat_block import Fill, FlatBlock, Span
from wan_local.planner import SLOTS, Source

_FOR_EVERY_CARD = 1  # cudaHostRegisterPortable
_log = logging.getLogger(__name__)


class HostBlocks:
    """The streamed blocks in host memory: one slab with all, or a ring for spans of them, filled from the file."""

    def __init__(
        self, streamed: Sequence[int], layouts: Sequence[FlatBlock], fill: Fill, source: Source, device: torch.device
    ) -> None:
        self._layouts, self._fill, self._device = layouts, fill, device
        self.reuses_buffers = source == "file"
        sizes = [layouts[index].nbytes for index in streamed]
        if self.reuses_buffers:
            spans = (span for index in streamed for span in layouts[index].spans())
            sizes = [max((span.end - span.begin for span in spans), default=0)] * SLOTS
        self._turn = 0
        self._slab = torch.empty(sum(sizes), dtype=torch.uint8)
        self._buffers = self._slab.split(sizes) if sizes else ()
        if not self.reuses_buffers:
            for position, index in enumerate(streamed):
                fill(index, layouts[index].views(self._buffers[position]))
        # last: a slab that is let go while it is page-locked, since filling it failed, would stay locked for good
        self.page_locked = _page_lock(self._slab, device)

    def block(self, position: int) -> Tensor:
        """Return the flat bytes of the `position`-th streamed block, from the slab."""
        whole: Tensor = self._buffers[position]
        return whole

    def next_buffer(self) -> int:
        """Return which of the ring's buffers is the next one's turn."""
        self._turn = (self._turn + 1) % SLOTS
        return self._turn

    def read(self, index: int, span: Span, buffer: int) -> Tensor:
        """Fill a buffer of the ring with a span of block `index`, and return its bytes."""
        content: Tensor = self._buffers[buffer][: span.end - span.begin]
        self._fill(index, self._layouts[index].views(content, span))
        return content

    def close(self) -> None:
        """Unlock the memory and let it go; idempotent."""
        if self.page_locked:
            _unlock(self._slab, self._device)
            self.page_locked = False
        self._slab, self._buffers = torch.empty(0, dtype=torch.uint8), ()


def _page_lock(slab: Tensor, device: torch.device) -> bool:
    """Page-lock the slab in place, so that copies from it are asynchronous; tell whether the system let us.

    torch's own pinning would round the slab up to a power of two. Copies from pageable memory are slower and as right.
    """
    if not slab.nbytes:
        return False
    with torch.cuda.device(device):
        code = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, _FOR_EVERY_CARD)
        refused = _refusal(code, device)
    if refused:
        gigabytes = slab.nbytes / 1e9
        _log.warning("%.1f GB of RAM could not be page-locked (CUDA error %d): slower copies", gigabytes, refused)
    return not refused


def _unlock(slab: Tensor, device: torch.device) -> None:
    """Undo `_page_lock`; memory that goes while it is locked stays so in the driver's books, and it is said."""
    with torch.cuda.device(device):  # another card's context may be current: unlocking would make one on that card
        refused = _refusal(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr()), device)
    if refused:
        _log.warning("%.1f GB of page-locked RAM could not be unlocked (CUDA error %d)", slab.nbytes / 1e9, refused)


def _refusal(code: Any, device: torch.device) -> int:
    """Return the number of CUDA's error, 0 for none. CUDA tells of it once more, at the next launch: at this one."""
    refused: int = int(getattr(code, "value", code))
    if refused:
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
    return refused
