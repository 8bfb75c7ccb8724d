"""The transformer as the sampling loop sees it: loaded when first asked, and on a lower rung when memory runs out.

A call that ran out of memory is made again, so the loop goes on from the step it had reached and knows nothing of it.
"""

from __future__ import annotations

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


class Denoiser:
    """A predictor that owns the transformer's stage; use it in a `with` block, whose end frees it.

    guided: makes the predictor of a loaded transformer on a rung, for as long as its context lasts.
    """

    def __init__(self, space: Workspace, guided: Callable[[Transformer, Rung], AbstractContextManager[Guided]]) -> None:
        self._space, self._guided = space, guided
        self._stage = ExitStack()
        self._loaded: Guided | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free()

    def predict(self, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """Return the guided velocity and the prompt's own. Raises OutOfMemory after the last rung."""
        for attempt in self._space.attempts("denoise"):
            with attempt as rung:
                return self._finite(self._on(rung), latents, timestep)
            self._free()
        raise AssertionError("the last attempt raises")

    def _finite(self, guided: Guided, latents: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        """Return the prediction; one that is not finite is made again, exactly, where it was not exact before."""
        answer = guided.predict(latents, timestep)
        if not guided.choice.approximates or torch.isfinite(answer[0]).all():
            return answer
        self._space.report.note(
            f"timestep {timestep:g} was not finite ({guided.choice.reason}) and was computed again, exactly"
        )
        return replace(guided, choice=EXACT_KERNELS).predict(latents, timestep)

    def _on(self, rung: Rung) -> Guided:
        if self._loaded is None:
            transformer = self._stage.enter_context(self._space.open("transformer", rung))
            self._loaded = self._stage.enter_context(self._guided(transformer, rung))
        return self._loaded

    def _free(self) -> None:
        self._loaded = None
        self._stage.close()
