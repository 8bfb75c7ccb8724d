"""Streamed blocks under every order in which a card may do what was enqueued: some hundred of them, drawn by chance.

The card is a stand-in: streams are queues, and the next piece of work is drawn among those that may go on. The worker
is a real thread, so that what the host does in between varies, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from wan_local import flat_block, host_blocks, offload
from wan_local.flat_block import FlatBlock
from wan_local.offload import Residency, StreamedBlocks
from wan_local.planner import Source

CPU = torch.device("cpu")
_SCHEDULES = 200
_PASSES = 3
_STUCK_SECONDS = 20.0


class Card:
    """What is enqueued and not done yet. Work is a function that tells whether it is done; a wait may have to stay."""

    def __init__(self, seed: int) -> None:
        self.lock, self._random = threading.RLock(), Random(seed)
        self._queues: list[list[Callable[[], bool]]] = []

    def new_queue(self) -> list[Callable[[], bool]]:
        self._queues.append([])
        return self._queues[-1]

    def enqueue(self, queue: list[Callable[[], bool]], work: Callable[[], bool]) -> None:
        """Append work, after which the card may do a few pieces or none."""
        with self.lock:
            queue.append(work)
            for _ in range(self._random.choice([0, 0, 0, 1, 2, 5])):
                self._go_on()

    def until(self, reached: Callable[[], bool]) -> None:
        """Let the card work until a point is reached."""
        end = time.monotonic() + _STUCK_SECONDS
        while True:
            with self.lock:
                if reached():
                    return
                went_on = self._go_on()
            if not went_on:
                assert time.monotonic() < end, "the card waits for what never comes"
                time.sleep(0.0002)

    def _go_on(self) -> bool:
        queues = [queue for queue in self._queues if queue]
        self._random.shuffle(queues)
        for queue in queues:
            if queue[0]():
                del queue[0]
                return True
        return False


class Stream:
    def __init__(self, card: Card) -> None:
        self.card, self.queue = card, card.new_queue()

    def do(self, work: Callable[[], object]) -> None:
        def once() -> bool:
            work()
            return True

        self.card.enqueue(self.queue, once)

    def wait_event(self, event: Event) -> None:
        point = event.point
        if point is not None:  # an event that was never recorded keeps nobody waiting
            self.card.enqueue(self.queue, lambda: point.reached)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.card.until(lambda: not self.queue)


@dataclass
class Point:
    """A place in a stream's queue."""

    card: Card
    reached: bool = False


class Event:
    """Stands for its last recording, as CUDA's does."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.point: Point | None = None
        del blocking

    def record(self, stream: Stream) -> None:
        point = self.point = Point(stream.card)
        stream.do(lambda: setattr(point, "reached", True))

    def query(self) -> bool:
        return self.point is None or self.point.reached

    def synchronize(self) -> None:
        if (point := self.point) is not None:
            point.card.until(lambda: point.reached)


class Copies(offload._Copies):
    """The real order of copies, each made by the stand-in when its turn comes."""

    _stream: Stream  # type: ignore[assignment]

    def copy(self, target: Tensor, source: Tensor, buffer: int | None = None) -> None:
        self._stream.do(lambda: target.copy_(source))
        if buffer is not None:
            self._sent[buffer].record(self._stream)  # type: ignore[arg-type]


class Several(nn.Module):
    """A block of a few tensors of any size, each to be filled with a number of its own."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        for place in range(random.randrange(1, 5)):
            self.register_parameter(f"p{place}", nn.Parameter(torch.empty(random.randrange(1, 200))))


@dataclass
class Reads:
    """Fills tensors with what tells block and tensor; from `failing` on, some reads fail."""

    random: Random
    failing: bool = False

    def __call__(self, index: int, views: Mapping[str, Tensor]) -> None:
        if self.failing and self.random.random() < 0.1:
            raise OSError("the disk does not answer")
        for name, view in views.items():
            view.fill_(number_of(index, name))


def number_of(index: int, name: str) -> int:
    return 100 * index + int(name[1:])


def streamed_by(card: Card, reads: Reads, source: Source, patch: pytest.MonkeyPatch) -> tuple[StreamedBlocks, Stream]:
    """Return some blocks, a few resident, that stream on the stand-in, and the stream on which it computes."""
    random, computing = reads.random, Stream(card)
    for name, stand_in in {
        "Stream": lambda _: Stream(card),
        "Event": Event,
        "current_stream": lambda _=None: computing,
        "stream": lambda _: nullcontext(),
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(flat_block, "SPAN_BYTES", random.choice([1, 300, 600, 10**6]))
    patch.setattr(host_blocks, "_page_lock", lambda *_: False)
    with torch.device("meta"):
        modules = [Several(random) for _ in range(random.randrange(1, 9))]
    layouts = [FlatBlock(module, lambda _: torch.float32) for module in modules]
    resident = frozenset(index for index in range(len(modules)) if random.random() < 0.3)
    for index in resident:
        layouts[index].onto(modules[index], torch.empty(layouts[index].nbytes, dtype=torch.uint8))
        reads(index, dict(modules[index].named_parameters()))
    blocks = StreamedBlocks(modules, layouts, reads, Residency(resident, source), CPU)
    for future in blocks._pending.values():
        future.result()
    for flat in blocks._flat:
        flat.fill_(255)
    blocks._host = host_blocks.HostBlocks(blocks._streamed, layouts, reads, source, CPU)
    blocks._copies = Copies(CPU, len(blocks._flat))
    blocks._begin()
    return blocks, computing


def wrong_weights(seed: int, source: Source) -> list[tuple[int, str]]:
    """Make some passes in an order drawn by chance; return which block's tensors were not its own when it computed."""
    card, reads, wrong = Card(seed), Reads(Random(seed + 1)), list[tuple[int, str]]()
    with pytest.MonkeyPatch.context() as patch:
        blocks, computing = streamed_by(card, reads, source, patch)
        reads.failing = reads.random.random() < 0.3

        def compute(index: int, tensors: dict[str, Tensor]) -> None:
            wrong.extend((index, name) for name, x in tensors.items() if not bool((x == number_of(index, name)).all()))

        for _ in range(_PASSES):
            last = reads.random.randrange(len(blocks)) if reads.random.random() < 0.2 else None
            for index, module in enumerate(passing(blocks)):
                tensors = dict(module.named_parameters())
                computing.do(lambda index=index, tensors=tensors: compute(index, tensors))  # type: ignore[misc]
                if index == last:  # a pass that is left half way
                    break
        computing.synchronize()
        blocks.close()
    return wrong


def passing(blocks: StreamedBlocks) -> Iterator[nn.Module]:
    """Yield the blocks of one pass until the end, or until one cannot be read."""
    try:
        yield from blocks
    except OSError:
        return


@pytest.mark.parametrize("source", ["ram", "file"])
def test_every_block_computes_with_its_own_weights_in_whatever_order_the_card_works(source: Source) -> None:
    assert not [wrong for seed in range(_SCHEDULES) for wrong in wrong_weights(seed, source)]


@pytest.mark.parametrize(
    ("left_out", "source"), [("mark_freed", "ram"), ("wait_until_copied", "ram"), ("wait_until_sent", "file")]
)
def test_an_order_that_is_left_out_would_be_noticed(
    left_out: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above is worth."""
    monkeypatch.setattr(offload._Copies, left_out, lambda *_: None)
    assert any(wrong_weights(seed, source) for seed in range(_SCHEDULES))


def test_copies_are_sent_off_once_all_of_a_block_are_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' driver may otherwise gather them until something else is waited for."""
    calls: list[str] = []

    class Asked(Event):
        def record(self, stream: Stream) -> None:
            calls.append("record")

        def query(self) -> bool:
            calls.append("query")
            return False

    card = Card(0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(card))
    monkeypatch.setattr(torch.cuda, "Event", Asked)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace())
    monkeypatch.setattr(Stream, "wait_stream", lambda *_: None)
    with offload._Copies(CPU, 2).into(1):
        calls.append("copy")
    assert calls == ["copy", "record", "query"]


def test_the_worker_stays_on_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's card is the first one, where leaving a stream of another would make a context."""
    current, chosen = threading.local(), torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    with offload._worker_for(chosen) as worker:
        assert worker.submit(lambda: current.device).result() == chosen
    with offload._worker_for(CPU) as worker:
        assert worker.submit(lambda: hasattr(current, "device")).result() is False
