"""When memory runs out: free what the attempt held, take one rung down, and do that piece of work again.

The planner makes the rungs, by planning the same stage for fewer bytes: fewer blocks stay on the device, then fewer
tokens go at a time; the VAE takes smaller tiles. The lowest of them is tried twice, since memory that others held may
be free by then; after that, on a card, what can be done on the CPU in reasonable time is done there, where the RAM that
is free by then suffices. Rungs are few; after the last one OutOfMemory says what was tried.

    for attempt in ladder.attempts("text"):
        with attempt as rung:  # takes running out of memory, and nothing else
            ...
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType

import torch

from wan_local.errors import OutOfMemory, WanLocalError
from wan_local.planner import Plan, StagePlan
from wan_local.request import Stage
from wan_local.stage import collect

_MOST_RUNGS = 12
_ON_CPU: tuple[Stage, ...] = ("text", "image", "condition", "decode")  # what can be done there in reasonable time
_OF_RAM = "DefaultCPUAllocator"  # torch names who could not
_NO_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    # what cuBLAS and cuDNN say where they get none; a wrong guess costs a few rungs
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
)


@dataclass(frozen=True, slots=True)
class Rung:
    """How a stage is tried: its part of the plan, how many tokens go at a time, and where."""

    plan: StagePlan
    chunk_tokens: int
    device: torch.device
    dtype: torch.dtype

    def describe(self) -> str:
        where, plan = f"on {self.device}", self.plan
        if plan.resident_blocks is not None:
            where += f" with {plan.resident_blocks} blocks resident, the others from {plan.source}"
        if plan.tiling.count > 1:
            where += f" in {plan.tiling} tiles"
        return where


class Ladder:
    """The rungs of one run. What a stage had to give up is given up for the rest of the run in that stage only.

    shrink: return the plan for fewer bytes in the named stage, or None where there is none.
    on_cpu: return the named stage as the CPU can do it in the RAM that is free now, or None where it can not.
    note: told of every step down.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        *,
        shrink: Callable[[Plan, str], Plan | None],
        on_cpu: Callable[[str], StagePlan | None],
        note: Callable[[str], None],
    ) -> None:
        self._plan, self._device, self._dtype = plan, device, dtype
        self._shrink, self._on_cpu, self._note = shrink, on_cpu, note
        self._current: dict[Stage, Iterator[Rung]] = {}
        self._rungs: dict[Stage, Rung] = {}
        self._from_file: set[Stage] = set()  # stages that RAM ran out in

    def planned(self, stage: Stage) -> StagePlan:
        """Return how a stage is tried first."""
        return self._plan.stage(stage)

    def attempts(self, stage: Stage) -> Iterator[Attempt]:
        """Yield attempts until one succeeds, each one rung lower; the first is on the rung that the last one was on."""
        if stage not in self._current:
            self._current[stage] = self._down_from_the_top(stage)
            self._rungs[stage] = next(self._current[stage])
        tried: list[str] = []
        while True:
            rung = self._rungs[stage]
            attempt = Attempt(rung)
            yield attempt
            if attempt.fault is None:
                return
            collect(self._device)
            tried.append(f"{rung.describe()}: {attempt.fault}")
            lower = self._below(stage, rung, in_ram=attempt.in_ram)
            if lower is None:
                raise OutOfMemory(
                    f"{stage} ran out of memory on every rung: {'; '.join(tried)}. Close what else holds memory, or "
                    "ask for resolution='480p'."
                )
            self._rungs[stage] = lower
            self._note(f"{stage} ran out of memory {rung.describe()}; it was done again {lower.describe()}")

    def _below(self, stage: Stage, rung: Rung, *, in_ram: bool) -> Rung | None:
        """Return the next rung. RAM that ran out beside a card is helped by reading blocks from the file, not by fewer
        of them on the card.
        """
        if in_ram and rung.plan.source == "ram":
            self._from_file.add(stage)
            return _from_file(rung)
        lower = next(self._current[stage], None)
        return _from_file(lower) if lower is not None and stage in self._from_file else lower

    def _down_from_the_top(self, stage: Stage) -> Iterator[Rung]:
        top = Rung(self._plan.stage(stage), self._plan.chunk_tokens, self._device, self._dtype)
        yield top
        plan, rungs = self._plan, 1
        while rungs < _MOST_RUNGS and (lesser := self._shrink(plan, stage)) is not None:
            plan, rungs = lesser, rungs + 1
            yield replace(top, plan=plan.stage(stage), chunk_tokens=plan.chunk_tokens)
        yield replace(top, plan=plan.stage(stage), chunk_tokens=plan.chunk_tokens)
        if self._device.type != "cpu" and stage in _ON_CPU and (there := self._on_cpu(stage)) is not None:
            yield replace(top, plan=there, device=torch.device("cpu"), dtype=torch.float32)


class Attempt:
    """One attempt on one rung. Running out of memory ends the `with` block and is kept as `fault`."""

    def __init__(self, rung: Rung) -> None:
        self.rung = rung
        self.fault: str | None = None
        self.in_ram = False  # whether it was RAM that ran out, not the card's memory

    def __enter__(self) -> Rung:
        return self.rung

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not ran_out_of_memory(error):
            return False
        self.in_ram = isinstance(error, MemoryError) or _OF_RAM in str(error)
        self.fault = str(error).partition("\n")[0] or type(error).__name__
        _clear(error)
        return True


def _from_file(rung: Rung) -> Rung:
    return replace(rung, plan=replace(rung.plan, source="file")) if rung.plan.source == "ram" else rung


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch, CUDA, a library of its or Python could not have memory; a refused plan is something else.

    After a fault that a card does not recover from a library may say the same: see `has_failed`.
    """
    if isinstance(error, WanLocalError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY_WORDS)


def has_failed(device: torch.device) -> bool:
    """Tell whether a card answers this process no more: after some faults every later call fails as the first did."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return not ran_out_of_memory(error)
    return False


def _clear(error: BaseException) -> None:
    """Let go of what the frames of an error hold: tensors that the next attempt needs the room of."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
