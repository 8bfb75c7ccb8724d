"""Keys and values of cross-attention that wait in RAM: each block's are brought to the device when its turn comes.

They are as large as six streamed blocks of int8 weights, and a block needs only its own. They go the way of streamed
weights: two slots on the device, the next one copied while the block before computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from wan_local.flat_block import FlatBlock
from wan_local.models.transformer import ContextKV
from wan_local.offload import Residency, StreamedBlocks

_FIELDS = ("k", "v", "k_image", "v_image")


class ParkedContext:
    """Stands for the list of every block's `ContextKV`; iterate as often as wanted, from start to end."""

    def __init__(self, context: Sequence[ContextKV], device: torch.device) -> None:
        """Take keys and values in RAM for use on `device`."""
        first = context[0]
        self._bias = None if first.text_bias is None else first.text_bias.to(device)
        modules = [_Fields(first) for _ in context]
        layout = FlatBlock(modules[0], lambda _: first.k.dtype)

        def fill(index: int, views: Mapping[str, Tensor]) -> None:
            for name, view in views.items():
                view.copy_(getattr(context[index], name))

        # through a small page-locked ring, as from a file: a slab of all of them would be a second copy in RAM
        self._blocks = StreamedBlocks(modules, [layout] * len(modules), fill, Residency(frozenset(), "file"), device)

    def __iter__(self) -> Iterator[ContextKV]:
        for fields in self._blocks:
            k, v, k_image, v_image = (fields.get_parameter(name) for name in _FIELDS)
            yield ContextKV(k, v, k_image, v_image, self._bias)

    def close(self) -> None:
        """Free the slots and the ring; idempotent."""
        self._blocks.close()


class _Fields(nn.Module):
    """One block's keys and values as a module without weights, of the shapes of `example`."""

    def __init__(self, example: ContextKV) -> None:
        super().__init__()
        for name in _FIELDS:
            self.register_parameter(name, nn.Parameter(getattr(example, name).to("meta"), requires_grad=False))


@contextmanager
def placed(contexts: list[list[ContextKV]], parked: bool, device: torch.device) -> Iterator[list[Iterable[ContextKV]]]:
    """Give `contexts` on the device or, `parked`, stand-ins that bring them from RAM; free these at the end.

    What was elsewhere goes there for good: `contexts` is changed. What both branches share, the images', stays shared.
    """
    where = torch.device("cpu") if parked else device
    by_block = [_moved(of_block, where) for of_block in zip(*contexts, strict=True)]
    contexts[:] = [list(context) for context in zip(*by_block, strict=True)]
    if not parked:
        yield list(contexts)
        return
    with ExitStack() as stack:
        stands: list[Iterable[ContextKV]] = []
        for context in contexts:
            stand = ParkedContext(context, device)
            stack.callback(stand.close)
            stands.append(stand)
        yield stands


def _moved(contexts: Sequence[ContextKV], device: torch.device) -> list[ContextKV]:
    """Return each branch's keys and values of one block on a device, every tensor once; itself where it is there."""
    tensors = {id(tensor): tensor for context in contexts for tensor in _tensors(context)}
    there = {key: tensor.to(device) for key, tensor in tensors.items()}
    made = []
    for context in contexts:
        k, v, k_image, v_image = (there[id(tensor)] for tensor in _tensors(context))
        made.append(ContextKV(k, v, k_image, v_image, context.text_bias))
    return made


def _tensors(context: ContextKV) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return context.k, context.v, context.k_image, context.v_image
