"""A card that is far slower than it should be is told of once, and one whose driver spills is held to what is free."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from wan_local.denoiser import Pace
from wan_local.device import spill_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def calls(pace: Pace, clock: list[float], *seconds: float) -> None:
    for length in seconds:
        pace.call()
        clock[0] += length
    pace.call()


def test_a_call_that_takes_over_four_times_what_it_should_is_told_once(clock: list[float]) -> None:
    notes: list[str] = []
    pace = Pace(2.0, notes.append)
    calls(pace, clock, 2.0, 7.9)
    assert notes == []
    calls(pace, clock, 8.1, 9.0)
    assert len(notes) == 1 and "took 8.1 s where about 2.0 s were expected" in notes[0] and "--vram" in notes[0]


def test_loading_is_no_slow_call_and_unknown_cards_are_not_judged(clock: list[float]) -> None:
    notes: list[str] = []
    pace = Pace(2.0, notes.append)
    pace.call()
    pace.rest()
    clock[0] += 100.0
    calls(pace, clock, 2.0)
    calls(Pace(None, notes.append), clock, 100.0)
    assert notes == []


def test_who_is_shown_a_step_may_take_time_and_a_lower_rung_is_slower(clock: list[float]) -> None:
    notes: list[str] = []
    pace = Pace(2.0, notes.append)
    for _ in range(2):
        pace.call()
        clock[0] += 3.0
        pace.pause()
        clock[0] += 100.0
    pace.stop()
    calls(pace, clock, 100.0)
    assert notes == []
    slow = Pace(2.0, notes.append)
    slow.call()
    clock[0] += 9.0
    slow.pause()
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("system", "free_gib", "limit_gib"), [("win32", 4, 3.75), ("win32", 20, 19), ("win32", 0.1, 0), ("linux", 4, None)]
)
def test_only_windows_spills_and_libraries_have_room_beside_torch(
    system: str, free_gib: float, limit_gib: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free_gib * 2**30), 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    assert spill_bytes(torch.device("cuda:0")) == (None if limit_gib is None else limit_gib * 2**30)
    assert spill_bytes(torch.device("cpu")) is None
