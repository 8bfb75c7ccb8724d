"""The transformer as the sampling loop sees it: loaded when first asked, and on a lower rung when memory runs out.

A call that ran out of memory is made again, so the loop goes on from the step it had reached and knows nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from wan_local.attention import EXACT_KERNELS
from wan_local.denoise import Guided
from wan_local.ladder import Rung
from wan_local.models.transformer import Transformer
from wan_local.workspace import Workspace

_TOO_SLOW = 4.0
_STAYS_EXACT = 2  # after so many calls in a row that were not finite nothing but exact ones are made


class Pace:
    """Watches the time from call to call and says once that the card is far slower than it should be.

    expected_seconds: of one call, None where that is not known: then it says nothing.
    """

    def __init__(self, expected_seconds: float | None, note: Callable[[str], None]) -> None:
        self._expected, self._note = expected_seconds, note
        self._began: float | None = None

    def call(self) -> None:
        """Begin a call, and with that end the one before."""
        self.pause()
        self._began = time.perf_counter()

    def pause(self) -> None:
        """End the call that was begun, which the card has done by now, and judge it: what follows is others' time."""
        taken = 0.0 if self._began is None else time.perf_counter() - self._began
        if self._expected is not None and taken > _TOO_SLOW * self._expected:
            self._note(
                f"a model call took {taken:.1f} s where about {self._expected:.1f} s were expected: either another "
                "program uses the card, or its driver uses RAM for what does not fit (on Windows and in WSL: 'CUDA - "
                "Sysmem Fallback Policy'). Give the run less with --vram, or make a smaller or shorter video."
            )
            self._expected = None
        self._began = None

    def rest(self) -> None:
        """Forget the call that was begun: it is mostly loading."""
        self._began = None

    def stop(self) -> None:
        """Judge no more: what is expected was modelled for another plan."""
        self._began = self._expected = None


class Denoiser:
    """A predictor that owns the transformer's stage; use it in a `with` block, whose end frees it.

    guided: makes the predictor of a loaded transformer on a rung, for as long as its context lasts.
    expected_seconds: see `Pace`.
    """

    def __init__(
        self,
        space: Workspace,
        guided: Callable[[Transformer, Rung], AbstractContextManager[Guided]],
        *,
        expected_seconds: float | None = None,
    ) -> None:
        self._space, self._guided = space, guided
        self._stage = ExitStack()
        self._loaded: Guided | None = None
        self._pace = Pace(expected_seconds, space.report.note)
        self._failures = 0  # calls in a row that were not finite
        self._failed_at: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free()

    def predict(self, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """Return the guided velocity and the prompt's own. Raises OutOfMemory after the last rung."""
        self._pace.call()
        for attempt in self._space.attempts("denoise"):
            with attempt as rung:
                return self._finite(self._on(rung), latents, timestep)
            self._pace.stop()  # the next rung is slower
            self._free()
        raise AssertionError("the last attempt raises")

    def _finite(self, guided: Guided, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """Return the prediction; one that is not finite is made again, exactly, where it was not exact before.

        What failed is not tried again: neither after the exact call ran out of memory, nor for ever.
        """
        if not guided.choice.approximates:
            return guided.predict(latents, timestep)
        if self._failures < _STAYS_EXACT and timestep != self._failed_at:
            answer = guided.predict(latents, timestep)
            if torch.isfinite(answer[0]).all():
                self._failures = 0
                return answer
            self._failures, self._failed_at = self._failures + 1, timestep
            self._space.report.note(_not_finite(timestep, guided.choice.reason, stays=self._failures == _STAYS_EXACT))
        self._pace.rest()  # it is slower
        return replace(guided, choice=EXACT_KERNELS).predict(latents, timestep)

    def _on(self, rung: Rung) -> Guided:
        if self._loaded is None:
            transformer = self._stage.enter_context(self._space.open("transformer", rung))
            self._loaded = self._stage.enter_context(self._guided(transformer, rung))
            self._pace.rest()
        return self._loaded

    def pause(self) -> None:
        """Say that the last call is done and that others have their turn now; see `Pace`."""
        self._pace.pause()

    def _free(self) -> None:
        self._loaded = None
        self._stage.close()


def _not_finite(timestep: float, reason: str, *, stays: bool) -> str:
    if stays:
        return f"timestep {timestep:g} was not finite either ({reason}): from it on, all were computed exactly"
    return f"timestep {timestep:g} was not finite ({reason}) and was computed again, exactly"
