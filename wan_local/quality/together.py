"""Several runs at a time: each in a thread of its own, their calls of a network as one batch.

A call waits until every run that is still going has called. What is in a batch, and in which order, follows from the
runs alone, so that the same runs together give the same bits. The runs may be at different steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from wan_local.models.transformer import ContextKV, Modulation, Transformer

_T = TypeVar("_T")


@dataclass
class _Call:
    """One run's call of a transformer: inputs [1, ...], its modulation, one context a branch, and how to compute."""

    place: int
    transformer: Transformer
    inputs: Tensor
    modulation: Modulation
    contexts: Sequence[Sequence[ContextKV]]
    options: dict[str, Any]
    answer: list[Tensor] | None = None
    error: Exception | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return what calls must share to be a batch."""
        return (id(self.transformer), self.inputs.shape, len(self.contexts), *self.options.items())


class Together:
    """Runs pieces of work in threads and makes one batch of what they ask a transformer at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting: list[_Call] = []
        self._place = threading.local()
        self._joined: dict[tuple[int, ...], ContextKV] = {}  # by the contexts' ids, which live as long as their runs

    def run(self, works: Sequence[Callable[[], _T]]) -> list[_T]:
        """Return what each piece of work gives; raise the first error there was, after all have ended."""
        self._running = len(works)
        with ThreadPoolExecutor(len(works)) as pool:
            futures = [pool.submit(self._one, place, work) for place, work in enumerate(works)]
        self._joined.clear()
        return [future.result() for future in futures]

    def _one(self, place: int, work: Callable[[], _T]) -> _T:
        self._place.number = place
        try:
            return work()
        finally:
            with self._changed:
                self._running -= 1
                self._answer_if_all_wait()

    def batching(self, transformer: Transformer) -> Callable[..., list[Tensor]]:
        """Return what is called as `transformer` is, from within the work of `run`."""

        def call(
            inputs: Tensor, modulation: Modulation, contexts: Sequence[Iterable[ContextKV]], **options: Any
        ) -> list[Tensor]:
            lists = [list(context) for context in contexts]
            return self._ask(_Call(self._place.number, transformer, inputs, modulation, lists, options))

        return call

    def _ask(self, call: _Call) -> list[Tensor]:
        with self._changed:
            self._waiting.append(call)
            self._answer_if_all_wait()
            self._changed.wait_for(lambda: call.answer is not None or call.error is not None)
        if call.error is not None:
            raise call.error
        assert call.answer is not None
        return call.answer

    def _answer_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._running:
            return
        batches: dict[tuple[Any, ...], list[_Call]] = {}
        for call in sorted(self._waiting, key=lambda call: call.place):
            batches.setdefault(call.kind, []).append(call)
        self._waiting.clear()
        for batch in batches.values():
            try:
                self._answer(batch)
            except RuntimeError as error:  # torch's, out of memory included: the runs end with it, not this thread
                for call in batch:
                    call.error = error
        self._changed.notify_all()

    def _answer(self, batch: Sequence[_Call]) -> None:
        modulations = [call.modulation for call in batch]
        modulation = Modulation(
            torch.cat([m.embedding for m in modulations]), torch.cat([m.projection for m in modulations])
        )
        branches = zip(*(call.contexts for call in batch), strict=True)
        contexts = [[self._of_block(contexts) for contexts in zip(*branch, strict=True)] for branch in branches]
        inputs = torch.cat([call.inputs for call in batch])
        velocities = batch[0].transformer(inputs, modulation, contexts, **batch[0].options)
        for number, call in enumerate(batch):
            call.answer = [velocity[number : number + 1] for velocity in velocities]

    def _of_block(self, contexts: Sequence[ContextKV]) -> ContextKV:
        key = tuple(map(id, contexts))
        if key not in self._joined:
            self._joined[key] = joined(contexts)
        return self._joined[key]


def joined(contexts: Sequence[ContextKV]) -> ContextKV:
    """Return one block's keys and values of several runs as a batch, in which no padding is folded."""
    if len(contexts) == 1:
        return contexts[0]
    whole = [unfolded(context) for context in contexts]
    k, v, k_image, v_image = (
        torch.cat([getattr(context, name) for context in whole]) for name in ("k", "v", "k_image", "v_image")
    )
    return ContextKV(k, v, k_image, v_image, None)


def unfolded(context: ContextKV) -> ContextKV:
    """Return a context whose last text key, which stands for many equal ones, is there that many times."""
    if context.text_bias is None:
        return context
    count = round(float(context.text_bias[-1].exp()))
    k, v = (torch.cat((x[:, :-1], x[:, -1:].expand(-1, count, -1, -1)), dim=1) for x in (context.k, context.v))
    return ContextKV(k, v, context.k_image, context.v_image, None)
