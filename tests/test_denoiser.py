"""A call that is slow, not finite or without memory, and a card whose driver spills, which is held to what is free."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from wan_local.attention import KernelChoice
from wan_local.denoise import Guided
from wan_local.denoiser import Denoiser, Pace
from wan_local.device import spill_bytes
from wan_local.ladder import Attempt


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


@dataclass
class Failing:
    """Stands for a transformer: not finite at some timesteps where it is fast, and first without memory where exact."""

    not_finite: set[float]
    without_memory: list[str] = field(default_factory=list)
    calls: list[tuple[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __call__(
        self, inputs: Tensor, timestep: float, contexts: tuple[Any, ...], *, choice: KernelChoice, **_: Any
    ) -> list[Tensor]:
        self.calls.append(("exact" if choice.dequantize else "fast", timestep))
        if choice.dequantize and self.without_memory:
            raise torch.OutOfMemoryError(self.without_memory.pop())
        bad = not choice.dequantize and timestep in self.not_finite
        return [torch.full((1, 16, 1, 2, 2), float("nan") if bad else 1.0) for _ in contexts]

    @contextmanager
    def guided(self, transformer: Any, rung: Any) -> Iterator[Guided]:
        condition, modulations = torch.zeros(1, 20, 1, 2, 2), cast(Any, {float(t): float(t) for t in range(40)})
        yield Guided(transformer, condition, modulations, [], [], 5.0, together=True, choice=KernelChoice("int8", True))

    def attempts(self, name: str) -> Iterator[Attempt]:
        while True:
            attempt = Attempt(cast(Any, None))
            yield attempt
            if attempt.fault is None:
                return

    def run(self, timesteps: range) -> Failing:
        space = SimpleNamespace(
            report=SimpleNamespace(note=self.notes.append), attempts=self.attempts, open=lambda *_: nullcontext(self)
        )
        with Denoiser(cast(Any, space), self.guided) as denoiser:
            for timestep in timesteps:
                assert torch.isfinite(denoiser.predict(torch.zeros(1, 16, 1, 2, 2), float(timestep))[0]).all()
        return self


def test_after_two_calls_in_a_row_that_were_not_finite_all_are_exact() -> None:
    failing = Failing(not_finite={float(t) for t in range(30)} - {1.0}).run(range(30))
    tried = [timestep for kind, timestep in failing.calls if kind == "fast"]
    assert tried == [0.0, 1.0, 2.0, 3.0] and len(failing.calls) == 4 + 29
    assert len(failing.notes) == 3 and "timestep 3 " in failing.notes[-1] and "from it on" in failing.notes[-1]


def test_what_was_not_finite_is_not_tried_again_on_the_rung_that_the_exact_call_fits_on() -> None:
    failing = Failing({5.0}, ["out of memory", "out of memory"]).run(range(5, 7))
    assert failing.calls == [("fast", 5.0), *[("exact", 5.0)] * 3, ("fast", 6.0)]
    assert len(failing.notes) == 1


@pytest.mark.parametrize(
    ("system", "kernel", "free_gib", "limit_gib"),
    [
        ("win32", "10", 4, 3.75),
        ("win32", "10", 20, 19),
        ("win32", "10", 0.1, 0),
        ("linux", "6.8.0-45-generic", 4, None),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", 4, 3.75),
        ("linux", "4.4.0-19041-Microsoft", 4, 3.75),
    ],
)
def test_only_windows_spills_and_wsl_and_libraries_have_room_beside_torch(
    system: str, kernel: str, free_gib: float, limit_gib: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "uname", lambda: SimpleNamespace(release=kernel))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free_gib * 2**30), 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    assert spill_bytes(torch.device("cuda:0")) == (None if limit_gib is None else limit_gib * 2**30)
    assert spill_bytes(torch.device("cpu")) is None
