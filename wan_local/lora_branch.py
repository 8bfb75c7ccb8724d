"""LoRAs at load, beside weights of any format: side branches on linears, and what is added to all other tensors.

A low-rank change stays two thin matrices in the compute dtype: y += up (down x). Nothing quantized is taken apart and
quantized again. A full difference is added where the weight is plain, in float32 before the cast; beside a quantized
weight it is a branch of its own. Branches are parameters of their linear, so they stream and count with its block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from wan_local.checkpoint import PartTensors
from wan_local.key_map import Part
from wan_local.layers import DELTA, DOWN, Linear
from wan_local.lora import Lora, apply_all


class AdaptedTensors(Mapping[str, Tensor]):
    """A part's tensors with LoRAs in them: those that are changed, and those of the branches."""

    def __init__(self, tensors: PartTensors, loras: Sequence[Lora], branches: Mapping[str, tuple[int, ...]]) -> None:
        """branches: the shape of each tensor of a branch, by name."""
        self._tensors, self._loras, self._branches = tensors, loras, branches
        branched = {name.rpartition(".")[0] for name in branches}
        targets = {name for lora in loras for name in lora.targets}
        self._changed = {name for name in targets if name in tensors and name.removesuffix(".weight") not in branched}

    def special(self, name: str) -> bool:
        """Tell whether a tensor is not, or not as it is here, in the files."""
        return name in self._branches or name in self._changed

    def is_branch(self, name: str) -> bool:
        return name in self._branches

    def shape(self, name: str) -> tuple[int, ...]:
        return self._branches[name] if name in self._branches else self._tensors.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._branches:
            tensor = self._tensors[name]
            return apply_all(self._loras, name, tensor) if name in self._changed else tensor
        linear, _, leaf = name.rpartition(".")
        weight = f"{linear}.weight"
        if leaf == DELTA:
            deltas = [lora.delta(weight, self._branches[name]) for lora in self._loras if weight in lora.targets]
            return torch.stack(deltas).sum(0)
        pairs = [pair for lora in self._loras for pair in lora.low_rank(weight) or ()]
        return torch.cat([pair.down for pair in pairs]) if leaf == DOWN else torch.cat([pair.up for pair in pairs], 1)

    def __contains__(self, name: object) -> bool:
        return name in self._branches or name in self._tensors

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._branches

    def __len__(self) -> int:
        return len(self._tensors) + len(self._branches)


def adapt(module: nn.Module, part: Part, tensors: PartTensors, loras: Sequence[Lora]) -> AdaptedTensors:
    """Put branches on the linears of `module`, on meta, that LoRAs change; return its tensors with LoRAs in them."""
    branches: dict[str, tuple[int, ...]] = {}
    for name, linear in module.named_modules() if part == "transformer" and loras else ():
        weight = f"{name}.weight"
        changing = [lora for lora in loras if weight in lora.targets]
        if not isinstance(linear, Linear) or not changing:
            continue
        ranks = [lora.rank(weight) for lora in changing]
        if None not in ranks:
            shapes = linear.branch(sum(rank or 0 for rank in ranks))
        elif linear.weight_scale is not None:
            shapes = linear.branch(None)
        else:
            continue  # a plain weight takes the difference itself
        branches |= {f"{name}.{leaf}": shape for leaf, shape in shapes.items()}
    return AdaptedTensors(tensors, loras if part == "transformer" else (), branches)
