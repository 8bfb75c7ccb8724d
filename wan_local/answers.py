"""What the transformer answered, call by call, on disk: with it, sampling comes to the same point again bit for bit.

All else that sampling holds (the solver's history, the policy's measurements, the latents themselves) follows from the
noise, which is a seed, and from these answers, by arithmetic of a tenth of a second a step. So a run's state is its
answers: the same loop is gone through with them, and calls the transformer where they end.

A call is one file: the guided velocity and, where the policy measures it, the prompt's alone; 19.4 MB each for
81 frames at 720p, 8.4 MB at 480p. Once denoising is done the final latents take the calls' place.

Calls are of use in one unbroken row from the first: what follows a gap is never read. So one that could not be written
waits in RAM for the next attempt, with the next call; when too many wait, the row ends there, and what it has is kept.
The final latents need no row, and are tried in any case.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_local.denoise import Predictor
from wan_local.record import fingerprint, read_record, write_record
from wan_local.runs import CALLS, EXPANSION, LATENTS

_LEAST_FREE_BYTES = 500_000_000  # the video and everyone else need room, too
_MOST_WAITING = 2  # calls in RAM, up to 39 MB each


@dataclass(frozen=True, slots=True)
class Latents:
    """The final latents [1, 16, T, H, W] float32, after how many model calls, and what the policy decided."""

    latents: Tensor
    calls: int
    acceleration: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Unwritten:
    """A record that waits to be written; its tensors are on the CPU and nobody else's."""

    path: Path
    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]


class Answers:
    """The calls in one run's folder. note: told what the caller should know. `write_ms`: what each write took."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self._note = folder, note
        self._same_bits, self._told, self._row_ended = True, False, False
        self._waiting: list[_Unwritten] = []
        self.write_ms: list[float] = []

    def answer(self, number: int, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor] | None:
        """Return the `number`-th call's velocities on the device of `latents`, or None where it is not known.

        A call that is damaged, or was made at another timestep, is forgotten with all after it.
        """
        path = self._path(number)
        record = read_record(path)
        if record is None or record.header.get("timestep") != timestep:
            self._forget_from(number)
            return None
        if self._same_bits and record.header.get("latents") != fingerprint([latents]):
            self._same_bits = False
            self._note(
                "this machine or its software computes other last bits than the one that began the run: the video "
                "will be as good, but not bit for bit the one it would have been"
            )
        noise_pred = record.tensors["noise_pred"].to(latents.device)
        conditional = record.tensors.get("conditional")
        return noise_pred, noise_pred if conditional is None else conditional.to(latents.device)

    def keep(self, number: int, latents: Tensor, timestep: float, answer: tuple[Tensor, Tensor]) -> None:
        """Write the `number`-th call; where that fails, say so once and try again with the next ones."""
        if self._row_ended:
            return
        noise_pred, conditional = answer
        tensors = {"noise_pred": noise_pred}
        if conditional is not noise_pred:
            tensors["conditional"] = conditional
        self._await(self._path(number), tensors, {"timestep": timestep, "latents": fingerprint([latents])})
        self._write_or_tell()
        if len(self._waiting) > _MOST_WAITING:
            self._row_ended, first = True, self._waiting[0].path.stem
            self._only_expansion_waits()
            self._note(f"the state of this run is saved no further than before {first}, but for its final latents")

    def finish(self, final: Latents) -> None:
        """Put the final latents in the calls' place, whatever became of those."""
        self._only_expansion_waits()
        header = {"calls": final.calls, "acceleration": final.acceleration}
        self._await(self.folder / LATENTS, {"latents": final.latents}, header)
        if reason := self._write_waiting(0):
            self._note(f"the final latents could not be saved ({reason}); the run itself goes on")
        else:
            self._forget_from(1)
        self._waiting.clear()

    def keep_expansion(self, expansion: Mapping[str, Any]) -> None:
        """Keep what the prompt was expanded to, so that a run that is gone on with asks no language model again."""
        self._await(self.folder / EXPANSION, {}, dict(expansion))  # in the row: no call is of use without it
        self._write_or_tell()

    def expansion(self) -> dict[str, Any] | None:
        """Return what `keep_expansion` was given, if it was."""
        record = read_record(self.folder / EXPANSION)
        return None if record is None else dict(record.header)

    def final(self) -> Latents | None:
        """Return the final latents, on the CPU, if denoising was done."""
        record = read_record(self.folder / LATENTS)
        if record is None:
            return None
        return Latents(record.tensors["latents"], record.header["calls"], record.header["acceleration"])

    def cost(self) -> dict[str, float]:
        """Return what saving took, for the report: how many writes, and their median in milliseconds."""
        median = statistics.median(self.write_ms) if self.write_ms else 0.0
        return {"writes": len(self.write_ms), "median_write_ms": round(median, 1)}

    def _await(self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._waiting.append(_Unwritten(path, own, header))

    def _only_expansion_waits(self) -> None:
        self._waiting = [entry for entry in self._waiting if entry.path.name == EXPANSION]

    def _write_or_tell(self) -> None:
        reason = self._write_waiting(_LEAST_FREE_BYTES)
        if reason and not self._told:
            self._told, name = True, self._waiting[0].path.stem
            self._note(f"{name} of this run's state could not be saved ({reason}); it is tried again, the run goes on")

    def _write_waiting(self, least_free_bytes: int) -> str:
        """Write what waits, in its order, and return why that ended early, or nothing. `least_free_bytes` stay free."""
        while self._waiting:
            entry, started = self._waiting[0], time.perf_counter()
            try:
                needed = sum(tensor.nbytes for tensor in entry.tensors.values())
                free = shutil.disk_usage(self.folder).free
                if free < needed + least_free_bytes:
                    raise OSError(f"{free / 1e6:.0f} MB is free on that disk")
                write_record(entry.path, entry.tensors, entry.header)
            except OSError as error:
                return error.strerror or str(error)
            self.write_ms.append((time.perf_counter() - started) * 1000)
            del self._waiting[0]
        return ""

    def _forget_from(self, number: int) -> None:
        for path in self.folder.glob(CALLS):
            if path >= self._path(number):
                with suppress(OSError):  # where someone is reading it on Windows; its place is written over
                    path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / CALLS.replace("*", f"{number:04d}")


class Remembering:
    """A predictor that gives the kept answers while there are any, and asks `predictor` beyond, keeping what that says.

    both: whether the prompt's own velocity is needed again, too. `replays`: every answer so far was a kept one.
    """

    def __init__(self, predictor: Predictor, answers: Answers, *, both: bool) -> None:
        self._predictor, self._answers, self._both = predictor, answers, both
        self._calls, self.replays = 0, True

    def predict(self, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        self._calls += 1
        if self.replays:
            known = self._answers.answer(self._calls, latents, timestep)
            if known is not None:
                return known
            self.replays = False
        noise_pred, conditional = self._predictor.predict(latents, timestep)
        kept = (noise_pred, conditional if self._both else noise_pred)
        if bool(noise_pred.isfinite().all()):
            self._answers.keep(self._calls, latents, timestep, kept)
        return noise_pred, conditional
