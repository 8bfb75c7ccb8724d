"""Let the linears of a network on meta hold quantized weights: those that files have, or those of a format.

Which linears these are is in the tensors' names: beside `X.weight` there is `X.weight_scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wan_local.checkpoint import ModelFiles, PartTensors
from wan_local.errors import CorruptModel
from wan_local.key_map import Part, canonical
from wan_local.layers import Linear
from wan_local.quantize import SCALE, SHIFT, STORED_DTYPES, block_number, is_block_linear, stored_shapes
from wan_local.weight_format import Int8Arithmetic, WeightFormat, WeightFormats

_META = torch.device("meta")
_DATA_DTYPES = {format_: dtype for dtype, format_ in STORED_DTYPES.items()}


def hold_quantized(
    module: nn.Module, files: ModelFiles, part: Part, tensors: PartTensors, arithmetic: Int8Arithmetic
) -> None:
    """Let every linear of `module`, on meta, hold what the files have of it. Raises CorruptModel for a wrong shape."""
    for name, linear in module.named_modules():
        if not isinstance(linear, Linear) or canonical(part, f"{name}.{SCALE}") not in tensors:
            continue
        stored = {leaf: canonical(part, f"{name}.{leaf}") for leaf in ("weight", SCALE, SHIFT)}
        held = {
            leaf: torch.empty(tensors.shape(source), dtype=tensors.dtype_of(source), device=_META)
            for leaf, source in stored.items()
            if source in tensors
        }
        _check(name, held, *linear.weight.shape)
        linear.hold(held, rotated=name.endswith(files.rotated), arithmetic=arithmetic)


def _check(name: str, held: dict[str, Tensor], rows: int, columns: int) -> None:
    format_ = STORED_DTYPES.get(held["weight"].dtype) if "weight" in held else None
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in held.items()}
    if format_ is None or shapes != stored_shapes(format_, rows, columns):
        raise CorruptModel(
            f"{name!r} should be a quantized weight of {rows} x {columns}; it is {format_ or 'of no known format'} "
            f"with {shapes}"
        )


def hold_in_format(module: nn.Module, part: Part, formats: WeightFormats) -> None:
    """Let every block linear of `module`, on meta, hold what a store of these formats has of it."""
    linears = {name: linear for name, linear in module.named_modules() if isinstance(linear, Linear)}
    blocks = {name: block_number(name) for name in linears if is_block_linear(part, f"{name}.weight")}
    for name, index in blocks.items():
        format_ = formats.of_block(part, index, max(blocks.values()) + 1)
        if format_ != "bf16":
            linears[name].hold(_empty(format_, linears[name]), rotated=False, arithmetic="weight-only")


def _empty(format_: WeightFormat, linear: Linear) -> dict[str, Tensor]:
    rows, columns = linear.weight.shape
    few = torch.bfloat16 if format_ == "int4" else torch.float32
    return {
        leaf: torch.empty(shape, dtype=_DATA_DTYPES[format_] if leaf == "weight" else few, device=_META)
        for leaf, shape in stored_shapes(format_, rows, columns).items()
    }
