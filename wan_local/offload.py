"""Blocks whose weights are not on the device: handed out in order, each brought in while the one before it computes.

A block is one flat buffer and one copy; from a file it comes in spans, so that RAM holds two of these and not two
blocks. A ring of slots on the device holds the next few; `StreamedBlocks` stands where a network has its list of
blocks, so a forward pass is written once. Copies run on a stream of their own and are ordered by events alone; the host
waits only to stay one block ahead of the card. The same code streams from a file into RAM where the device is the CPU.

    slot n % slots:   copy block n  ->  event `copied`  ->  compute  ->  event `freed`  ->  copy block n + slots
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan_local.flat_block import Fill, FlatBlock
from wan_local.host_blocks import HostBlocks
from wan_local.planner import SLOTS, Source
from wan_local.request import Check, unchecked


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
        self._host = HostBlocks(self._streamed, layouts, fill, residency.source, device) if on_card else None
        self._worker = _worker_for(device)
        self._pending: dict[int, Future[None]] = {}
        self._next = 0
        with ExitStack() as undone:
            undone.callback(self.close)  # RAM that was page-locked would stay so
            self._begin()
            undone.pop_all()

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Iterator[nn.Module]:
        if self._streamed and (self._next % len(self._streamed) or self._next not in self._pending):
            self._begin()  # a pass was left half way, or its first block could not be read
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
        """Ask for the first blocks, after whatever was asked for before has ended, well or not."""
        wait(self._pending.values())
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


def _worker_for(device: torch.device) -> ThreadPoolExecutor:
    """Return the thread that brings blocks. On a card that is not the first it would make a context there, too.

    A new thread's card is the first one, and leaving another card's stream goes back to it.
    """
    name = "wan_local-offload"
    if device.type != "cuda":
        return ThreadPoolExecutor(1, name)
    return ThreadPoolExecutor(1, name, initializer=torch.cuda.set_device, initargs=(device,))


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
        self._copied[slot].query()  # Windows' driver gathers what is enqueued; asking sends the copies off

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
