"""RAM that is page-locked for a card's copies: a refusal is said, and what was locked is unlocked, on that card."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wan_local import host_blocks, offload
from wan_local.flat_block import FlatBlock
from wan_local.host_blocks import HostBlocks
from wan_local.offload import Residency, StreamedBlocks

CARD = torch.device("cuda:1")
EVERY_CARD = 1  # cudaHostRegisterPortable


class Runtime:
    """Stands for CUDA's runtime, which reports what it refuses again at the next launch. `asked`: calls and cards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> None:
        self.asked: list[tuple[str, torch.device | None]] = []
        self._refuses, self._pending, self._current = refuses, list[str](), list[torch.device]()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", self._on)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: self.launch())

    def cudaHostRegister(self, _address: int, _nbytes: int, flags: int) -> int:
        assert flags == EVERY_CARD
        return self._answer("lock")

    def cudaHostUnregister(self, _address: int) -> SimpleNamespace:
        return SimpleNamespace(value=self._answer("unlock"))

    def launch(self) -> None:
        if self._pending:
            raise RuntimeError(f"CUDA error: {self._pending.pop()}")

    def _answer(self, call: str) -> int:
        self.asked.append((call, self._current[-1] if self._current else None))
        if call != self._refuses:
            return 0
        self._pending.append(call)
        return 2

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        self._current.append(device)
        yield
        self._current.pop()


def layouts(count: int) -> list[FlatBlock]:
    return [FlatBlock(nn.Linear(4, 4, device="meta"), lambda _: torch.float32) for _ in range(count)]


def fill(*_: Any) -> None:
    """Leave the memory as it is."""


@pytest.mark.parametrize(
    ("refuses", "words"),
    [("lock", "could not be page-locked (CUDA error 2)"), ("unlock", "could not be unlocked (CUDA error 2)")],
)
def test_what_is_refused_is_said_once_and_its_error_does_not_meet_the_next_kernel(
    refuses: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA reports a refusal again at the next launch: that must be one that nobody needs."""
    runtime = Runtime(monkeypatch, refuses)
    blocks = HostBlocks([0, 1], layouts(2), fill, "ram", CARD)
    assert blocks.page_locked == (refuses != "lock")
    blocks.close()
    assert caplog.text.count(words) == caplog.text.count("WARNING") == 1
    runtime.launch()


def test_memory_is_locked_for_every_card_and_unlocked_once_in_its_own_cards_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without that the current card, the first one, would get a context of some hundreds of MB for it."""
    runtime = Runtime(monkeypatch)
    blocks = HostBlocks([0, 1], layouts(2), fill, "file", CARD)
    for _ in range(2):
        blocks.close()
    assert runtime.asked == [("lock", CARD), ("unlock", CARD)]


def test_a_slab_that_cannot_be_filled_is_not_left_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    monkeypatch.setattr(host_blocks, "_page_lock", lambda slab, _: bool(locked.append(slab.nbytes)) or True)

    def interrupted(index: int, views: object) -> None:
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        HostBlocks([0, 1, 2], layouts(3), interrupted, "ram", CARD)
    assert locked == []


def test_blocks_that_cannot_begin_to_stream_leave_no_memory_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no thread left, say."""
    runtime, modules, made = Runtime(monkeypatch), [nn.Linear(4, 4, device="meta") for _ in range(3)], layouts(3)
    empty = torch.empty

    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kinds: empty(*size, **kinds))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    monkeypatch.setattr(offload, "_Copies", lambda *_: SimpleNamespace(finish=lambda: None))
    monkeypatch.setattr(ThreadPoolExecutor, "submit", no_thread)
    with pytest.raises(RuntimeError, match="new thread"):
        StreamedBlocks(modules, made, fill, Residency(frozenset(), "ram"), CARD)
    assert runtime.asked == [("lock", CARD), ("unlock", CARD)]
