"""What the transformer answered, call by call, on disk: with it, sampling comes to the same point again bit for bit.

All else that sampling holds (the solver's history, the policy's measurements, the latents themselves) follows from the
noise, which is a seed, and from these answers, by arithmetic that takes milliseconds. So a run's state is its answers:
the same loop is gone through with them, and calls the transformer where they end.

A call is one file: the guided velocity and, where the policy measures it, the prompt's alone; 19.4 MB each for
81 frames at 720p, 8.4 MB at 480p. Once denoising is done the final latents take the calls' place.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_local.denoise import Predictor
from wan_local.record import fingerprint, read_record, write_record
from wan_local.runs import CALLS, EXPANSION, LATENTS

_LEAST_FREE_BYTES = 500_000_000  # the video and everyone else need room, too


@dataclass(frozen=True, slots=True)
class Latents:
    """The final latents [1, 16, T, H, W] float32, after how many model calls, and what the policy decided."""

    latents: Tensor
    calls: int
    acceleration: dict[str, Any]


class Answers:
    """The calls in one run's folder. note: told what the caller should know. `write_ms`: what each write took."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self._note = folder, note
        self._writes = self._same_bits = True
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
        """Write the `number`-th call; where that fails, say so once and keep no more."""
        noise_pred, conditional = answer
        tensors = {"noise_pred": noise_pred}
        if conditional is not noise_pred:
            tensors["conditional"] = conditional
        self._write(self._path(number), tensors, {"timestep": timestep, "latents": fingerprint([latents])})

    def finish(self, final: Latents) -> None:
        """Put the final latents in the calls' place."""
        header = {"calls": final.calls, "acceleration": final.acceleration}
        if self._write(self.folder / LATENTS, {"latents": final.latents}, header):
            self._forget_from(1)

    def keep_expansion(self, expansion: Mapping[str, Any]) -> None:
        """Keep what the prompt was expanded to, so that a run that is gone on with asks no language model again."""
        self._write(self.folder / EXPANSION, {}, dict(expansion))

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

    def _write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> bool:
        if not self._writes:
            return False
        started = time.perf_counter()
        needed = sum(tensor.nbytes for tensor in tensors.values())
        try:
            free = shutil.disk_usage(self.folder).free
            if free < needed + _LEAST_FREE_BYTES:
                raise OSError(f"{free / 1e6:.0f} MB is free on that disk")
            write_record(path, tensors, header)
        except OSError as error:
            self._writes = False
            self._note(
                f"the state of this run is not saved any more ({error.strerror or error}); the run itself goes on"
            )
            return False
        self.write_ms.append((time.perf_counter() - started) * 1000)
        return True

    def _forget_from(self, number: int) -> None:
        for path in self.folder.glob(CALLS):
            if path >= self._path(number):
                path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / CALLS.replace("*", f"{number:04d}")


class Remembering:
    """A predictor that gives the kept answers while there are any, and asks `predictor` beyond, keeping what that says.

    both: whether the prompt's own velocity is needed again, too.
    """

    def __init__(self, predictor: Predictor, answers: Answers, *, both: bool) -> None:
        self._predictor, self._answers, self._both = predictor, answers, both
        self._calls, self._replays = 0, True

    def predict(self, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        self._calls += 1
        if self._replays:
            known = self._answers.answer(self._calls, latents, timestep)
            if known is not None:
                return known
            self._replays = False
        noise_pred, conditional = self._predictor.predict(latents, timestep)
        kept = (noise_pred, conditional if self._both else noise_pred)
        if bool(noise_pred.isfinite().all()):
            self._answers.keep(self._calls, latents, timestep, kept)
        return noise_pred, conditional
