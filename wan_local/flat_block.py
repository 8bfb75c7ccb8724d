"""How a block's tensors lie in one flat buffer, so that moving it is one copy, and in which pieces it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan_local.planner import SPAN_BYTES
from wan_local.quantize import stays_as_stored

Fill = Callable[[int, Mapping[str, Tensor]], None]  # write some of block i's tensors into views, converting dtypes

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbours among a block's tensors: their names, and where they begin and end in its buffer."""

    names: tuple[str, ...]
    begin: int
    end: int


class FlatBlock:
    """The layout of one block's tensors in a flat buffer of bytes.

    dtype_of: what a plain parameter is on the device; quantized ones stay as they are. order: a key to sort names by,
    so that the buffer looks as the file does; the module's own order unless given.
    """

    def __init__(
        self,
        block: nn.Module,
        dtype_of: Callable[[str], torch.dtype],
        order: Callable[[str], tuple[str, int]] | None = None,
    ) -> None:
        self._fields: list[tuple[str, torch.dtype, torch.Size, int]] = []
        offset = 0
        parameters = dict(block.named_parameters())
        for name in parameters if order is None else sorted(parameters, key=order):
            parameter = parameters[name]
            dtype = parameter.dtype if stays_as_stored(name, parameter.dtype) else dtype_of(name)
            self._fields.append((name, dtype, parameter.shape, offset))
            nbytes = parameter.numel() * dtype.itemsize
            offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = offset

    def views(self, flat: Tensor, span: Span | None = None) -> dict[str, Tensor]:
        """Return each tensor of the block as a view of `flat`, uint8 [nbytes]; those of a span, where that is given.

        `flat` then begins where the span does.
        """
        begin = 0 if span is None else span.begin
        return {
            name: flat[offset - begin :][: shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, dtype, shape, offset in self._fields
            if span is None or name in span.names
        }

    def spans(self) -> list[Span]:
        """Cut the block between tensors into spans of at most `SPAN_BYTES`; a larger tensor is one of its own."""
        spans: list[Span] = []
        begins = [offset for *_, offset in self._fields]
        for (name, *_), begin, end in zip(self._fields, begins, [*begins, self.nbytes][1:], strict=True):
            if spans and end - spans[-1].begin <= SPAN_BYTES:
                spans[-1] = Span((*spans[-1].names, name), spans[-1].begin, end)
            else:
                spans.append(Span((name,), begin, end))
        return spans

    def onto(self, block: nn.Module, flat: Tensor) -> nn.Module:
        """Let `block`'s parameters be views of `flat`."""
        block.load_state_dict(self.views(flat), strict=True, assign=True)
        return block.eval().requires_grad_(False)
