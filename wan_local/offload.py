"""Blocks whose weights are not on the device: handed out in order, each brought in while the one before it computes.

A block is one flat buffer and one copy; from a file it comes in spans, so that RAM holds two of these and not two
blocks. A ring of slots on the device holds the next few; `StreamedBlocks` stands where a network has its list of
blocks, so a forward pass is written once. Copies run on a stream of their own and are ordered by events alone; the host
waits only to stay one block ahead of the card. The same code streams from a file into RAM where the device is the CPU.

    slot n % slots:   copy block n  ->  event `copied`  ->  compute  ->  event `freed`  ->  copy block n + slots
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan_local.planner import SLOTS, SPAN_BYTES, Source
from wan_local.quantize import stays_as_stored
from wan_local.request import Check, unchecked

Fill = Callable[[int, Mapping[str, Tensor]], None]  # write some of block i's tensors into views, converting dtypes

_ALIGNMENT = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbours among a block's tensors: their names, and where they begin and end in its buffer."""

    names: tuple[str, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Residency:
    """Which blocks stay on the device, and where the others wait: all in RAM, or in their file."""

    resident: frozenset[int]
    source: Source


def abreast(check: Check, device: torch.device) -> Check:
    """Return what to call before each block: `check`, on a card as soon as all blocks but the last one are done.

    CUDA takes about a thousand launches ahead, which are four blocks: all of them would run after a cancel.
    """
    return _Abreast(check, device) if device.type == "cuda" else check


class _Abreast:
    """Its two events are recorded in turns, each at the end of a block."""

    def __init__(self, check: Check, device: torch.device) -> None:
        self._check, self._device = check, device
        self._before_last, self._last = (torch.cuda.Event(blocking=True) for _ in range(2))

    def __call__(self) -> None:
        self._before_last, self._last = self._last, self._before_last
        self._last.record(torch.cuda.current_stream(self._device))
        self._before_last.synchronize()  # the last block keeps the card busy meanwhile
        self._check()


class CheckedBlocks(nn.ModuleList):
    """A network's list of blocks that is asked, before each one runs, whether to go on."""

    def __init__(self, blocks: Iterable[nn.Module], check: Check) -> None:
        super().__init__(blocks)
        self._check = check

    def __iter__(self) -> Iterator[nn.Module]:
        for block in super().__iter__():
            self._check()
            yield block


class FlatBlock:
    """The layout of one block's tensors in a flat buffer of bytes.

    dtype_of: what a plain parameter is on the device; quantized ones stay as they are. order: a key to sort names by,
    so that the buffer looks as the file does; the module's own order unless given.
    """

    def __init__(
        self,
        block: nn.Module,
        dtype_of: Callable[[str], torch.dtype],
        order: Callable[[str], tuple[str, int]] | None = None,
    ) -> None:
        self._fields: list[tuple[str, torch.dtype, torch.Size, int]] = []
        offset = 0
        parameters = dict(block.named_parameters())
        for name in parameters if order is None else sorted(parameters, key=order):
            parameter = parameters[name]
            dtype = parameter.dtype if stays_as_stored(name, parameter.dtype) else dtype_of(name)
            self._fields.append((name, dtype, parameter.shape, offset))
            nbytes = parameter.numel() * dtype.itemsize
            offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = offset

    def views(self, flat: Tensor, span: Span | None = None) -> dict[str, Tensor]:
        """Return each tensor of the block as a view of `flat`, uint8 [nbytes]; those of a span, where that is given.

        `flat` then begins where the span does.
        """
        begin = 0 if span is None else span.begin
        return {
            name: flat[offset - begin :][: shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, dtype, shape, offset in self._fields
            if span is None or name in span.names
        }

    def spans(self) -> list[Span]:
        """Cut the block between tensors into spans of at most `SPAN_BYTES`; a larger tensor is one of its own."""
        spans: list[Span] = []
        begins = [offset for *_, offset in self._fields]
        for (name, *_), begin, end in zip(self._fields, begins, [*begins, self.nbytes][1:], strict=True):
            if spans and end - spans[-1].begin <= SPAN_BYTES:
                spans[-1] = Span((*spans[-1].names, name), spans[-1].begin, end)
            else:
                spans.append(Span((name,), begin, end))
        return spans

    def onto(self, block: nn.Module, flat: Tensor) -> nn.Module:
        """Let `block`'s parameters be views of `flat`."""
        block.load_state_dict(self.views(flat), strict=True, assign=True)
        return block.eval().requires_grad_(False)


class StreamedBlocks(nn.Module):
    """Stands for a network's list of blocks: iterating gives each block in turn with its weights on the device.

    A block is valid until the next one is asked for. Iterate from start to end, as often as wanted; a pass that was
    left half way is begun anew. `check` is called before each block. `close` frees everything.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        layouts: Sequence[FlatBlock],
        fill: Fill,
        residency: Residency,
        device: torch.device,
        *,
        check: Check = unchecked,
    ) -> None:
        """Take blocks on `meta`, of which those in `residency.resident` have their weights already.

        layouts: of each block; they may differ.
        """
        super().__init__()
        self._device, self._fill, self._layouts, self._check = device, fill, layouts, abreast(check, device)
        self._blocks = list(blocks)
        self._resident = {index: blocks[index].eval().requires_grad_(False) for index in sorted(residency.resident)}
        self._num_blocks = len(blocks)
        self._streamed = [index for index in range(len(blocks)) if index not in residency.resident]
        slots = min(SLOTS, len(self._streamed))
        nbytes = max((layouts[index].nbytes for index in self._streamed), default=0)
        self._flat = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._slots = [self._put(index, slot) for slot, index in enumerate(self._streamed[:slots])]
        on_card = device.type == "cuda"
        self._copies = _Copies(device, slots) if on_card else None
        self._host = _HostBlocks(self._streamed, layouts, fill, residency.source, device) if on_card else None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan_local-offload")
        self._pending: dict[int, Future[None]] = {}
        self._next = 0
        self._begin()

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Iterator[nn.Module]:
        if self._streamed and self._next % len(self._streamed):
            self._begin()
        for index in range(self._num_blocks):
            self._check()
            if index in self._resident:
                yield self._resident[index]
            else:
                yield from self._streamed_block(index)

    def modules_held(self) -> list[nn.Module]:
        """Return every module that holds weights now."""
        return [*self._resident.values(), *self._slots]

    def close(self) -> None:
        """Stop copying and free every buffer; idempotent."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        if self._copies is not None:
            self._copies.finish()
        for module in self.modules_held():
            module.to("meta")
        if self._host is not None:
            self._host.close()
        self._flat, self._host = [], None

    def _streamed_block(self, index: int) -> Iterator[nn.Module]:
        number = self._next
        slot = number % len(self._flat)
        self._pending.pop(number).result()  # the copy is under way (on a CPU: done)
        if self._copies is not None:
            self._copies.wait_until_copied(slot)
        self._next = number + 1
        try:
            if self._slots[slot] is not self._blocks[index]:
                self._slots[slot].to("meta")
                self._slots[slot] = self._put(index, slot)
            yield self._slots[slot]
        finally:
            if self._flat:  # a pass that was left may end after `close`
                if self._copies is not None:
                    self._copies.mark_freed(slot)
                self._submit(number + len(self._flat))

    def _put(self, index: int, slot: int) -> nn.Module:
        """Let block `index` be what lies in a slot."""
        return self._layouts[index].onto(self._blocks[index], self._flat[slot])

    def _begin(self) -> None:
        """Ask for the first blocks, after whatever was asked for before has ended."""
        for future in self._pending.values():
            future.result()
        self._pending.clear()
        self._next = 0
        for number in range(len(self._flat)):
            self._submit(number)

    def _submit(self, number: int) -> None:
        self._pending[number] = self._worker.submit(self._bring, number)

    def _bring(self, number: int) -> None:
        """Bring the `number`-th block of the endless sequence into its slot; runs on the worker."""
        slot, position = number % len(self._flat), number % len(self._streamed)
        index = self._streamed[position]
        layout, flat = self._layouts[index], self._flat[slot]
        if self._host is None or self._copies is None:
            for span in layout.spans():
                self._fill(index, layout.views(flat[span.begin :], span))
            return
        with self._copies.into(slot):
            if not self._host.reuses_buffers:
                self._copies.copy(flat[: layout.nbytes], self._host.block(position))
                return
            for span in layout.spans():
                buffer = self._host.next_buffer()
                self._copies.wait_until_sent(buffer)
                content = self._host.read(index, span, buffer)
                self._copies.copy(flat[span.begin : span.end], content, buffer)


class _HostBlocks:
    """The streamed blocks in host memory: one slab with all, or a ring for spans of them, filled from the file."""

    def __init__(
        self, streamed: Sequence[int], layouts: Sequence[FlatBlock], fill: Fill, source: Source, device: torch.device
    ) -> None:
        self._layouts, self._fill = layouts, fill
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
        self._registered = _register(self._slab, device)

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
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._slab.data_ptr())
        self._slab, self._buffers = torch.empty(0, dtype=torch.uint8), ()


def _register(slab: Tensor, device: torch.device) -> bool:
    """Page-lock the slab in place, so that copies from it are asynchronous; tell whether the system let us.

    torch's own pinning would round the slab up to a power of two. Copies from pageable memory are slower and as right.
    """
    if not slab.nbytes:
        return False
    with torch.cuda.device(device):
        code = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)
        refused = int(getattr(code, "value", code))
        if refused:
            with suppress(RuntimeError):  # CUDA tells of it once more, at the next launch: at this one
                torch.zeros(1, device=device)
    if refused:
        gigabytes = slab.nbytes / 1e9
        _log.warning("%.1f GB of RAM could not be page-locked (CUDA error %d): slower copies", gigabytes, refused)
    return not refused


class _Copies:
    """The copy stream of a card with the events that order copying and computing, and those of the host's buffers."""

    def __init__(self, device: torch.device, slots: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # the slots' memory may have been someone's whose kernels are still queued
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._copied, self._freed = ([torch.cuda.Event() for _ in range(slots)] for _ in range(2))
        self._sent = [torch.cuda.Event(blocking=True) for _ in range(SLOTS)]  # the worker waits: it would spin

    @contextmanager
    def into(self, slot: int) -> Iterator[None]:
        """Let the copies within begin when the slot is free, and be what is waited for before it is used."""
        self._stream.wait_event(self._freed[slot])
        yield
        self._copied[slot].record(self._stream)

    def copy(self, target: Tensor, source: Tensor, buffer: int | None = None) -> None:
        """Enqueue a copy, from a buffer of the host's ring if that is given."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            if buffer is not None:
                self._sent[buffer].record(self._stream)

    def wait_until_copied(self, slot: int) -> None:
        """Let what is computed from here on begin after the slot's copy."""
        torch.cuda.current_stream(self._device).wait_event(self._copied[slot])

    def mark_freed(self, slot: int) -> None:
        """Let the slot's next copy begin after what has been enqueued so far."""
        self._freed[slot].record(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        """Wait for every copy, so that the buffers can go."""
        self._stream.synchronize()

    def wait_until_sent(self, buffer: int) -> None:
        """Wait until the last copy from a host buffer has ended, so that it can be filled anew; on the worker only."""
        self._sent[buffer].synchronize()
