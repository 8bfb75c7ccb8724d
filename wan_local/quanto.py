"""optimum-quanto's own files: a store's transformer written so that quanto and diffusers load it, and such files read.

quanto writes a quantized linear `X` as

    8 bits   X.weight._data [N, K] int8 or float8_e4m3fn     X.weight._scale [N, 1]
    4 bits   X.weight._data._data uint8 [G/2, g]             X.weight._scale [G, 1]     X.weight._shift [G, 1]

with `X.input_scale` and `X.output_scale` (1, unused without quantized inputs) beside it, and `quanto_qmap.json`, which
says which linears these are. G = N K / g groups of g inputs; a packed row holds group i in its low and group G/2 + i in
its high nibbles. quanto chooses g itself: 128 where that divides K, so a 4-bit store, whose groups are of 64, cannot be
written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_local.checkpoint import ModelFiles, PartTensors
from wan_local.durable import reason
from wan_local.errors import CorruptModel, NotAvailable, OutputError
from wan_local.extent import DTYPES
from wan_local.quantize import GROUP, SCALE, STORED_DTYPES, QuantizedWeight, pack_int4
from wan_local.weight_format import WeightFormat

QMAP = "quanto_qmap.json"
_QTYPES: Mapping[WeightFormat, str] = {"int8": "qint8", "fp8": "qfloat8_e4m3fn", "int4": "qint4"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_quanto(store: ModelFiles, target: Path) -> None:
    """Write the transformer of an int8 or fp8 store to the folder `target` in quanto's format, number for number.

    Raises NotAvailable for what quanto cannot hold, OutputError where `target` is there already or writing fails.
    """
    formats = {} if store.manifest is None else store.manifest.formats
    if formats.get("transformer") not in ("int8", "fp8"):
        raise NotAvailable(
            f"{str(store.folder)!r} is no store in int8 or fp8. quanto chooses groups of 128 for 4 bits, where a store "
            "has 64; convert into --format int8 or fp8 and export that."
        )
    if store.rotated:
        raise NotAvailable(f"{str(store.folder)!r} is rotated, which quanto does not know; convert without --rotate.")
    if target.exists() or target.is_symlink():
        raise OutputError(f"{str(target)!r} is there already. Choose another target.")
    part = target.with_name(f"{target.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        tensors = PartTensors(store, "transformer")
        quantized = sorted(name.removesuffix(f".{SCALE}") for name in tensors if name.endswith(f".{SCALE}"))
        dtype = _QTYPES[formats["transformer"]]
        qmap = {name: {"weights": dtype, "activations": "none"} for name in quantized}
        (part / QMAP).write_text(json.dumps(qmap, indent=4), encoding="utf-8")
        (part / "config.json").write_bytes((store.folder / "transformer" / "config.json").read_bytes())
        _write(part / _WEIGHTS, list(_entries(tensors)), tensors)
        part.rename(target)
    except OSError as error:
        raise OutputError(
            f"{str(target)!r} could not be written: {reason(error)}. Make room, or name another."
        ) from error


def _entries(tensors: PartTensors) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], str | None]]:
    """Yield name, dtype, shape and the store's name of each tensor of quanto's file; None stands for a 1."""
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        shape, dtype = tensors.shape(name), tensors.dtype_of(name)
        if leaf == SCALE:
            yield f"{stem}.weight._scale", dtype, (shape[0], 1), name
            yield f"{stem}.input_scale", dtype, (), None
            yield f"{stem}.output_scale", dtype, (), None
        else:
            yield (f"{name}._data" if dtype in STORED_DTYPES else name), dtype, shape, name


def _write(
    file: Path, entries: list[tuple[str, torch.dtype, tuple[int, ...], str | None]], tensors: Mapping[str, Tensor]
) -> None:
    """Write a safetensors file one tensor after the other."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", "quantization_format": "quanto"}}
    end = 0
    for name, dtype, shape, _ in entries:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for _, dtype, _, source in entries:
            tensor = torch.ones(1, dtype=dtype) if source is None else tensors[source]
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def is_quanto(folder: Path) -> bool:
    """Tell whether a transformer's folder was written by quanto."""
    return (folder / QMAP).is_file()


def quanto_weight(tensors: Mapping[str, Tensor], linear: str, shape: tuple[int, int]) -> QuantizedWeight:
    """Return linear `linear` of a file of quanto's as plain tensors, number for number. Raises CorruptModel, and
    NotAvailable for shifts that are whole numbers, which such tensors cannot hold.

    shape: [N, K] of its weight. Groups larger than 64 have their scale and shift repeated.
    """
    rows, columns = shape
    scale = tensors[f"{linear}.weight._scale"]
    if f"{linear}.weight._data" in tensors:
        data = tensors[f"{linear}.weight._data"]
        if data.shape != shape or scale.numel() != rows:
            raise CorruptModel(f"{linear!r} is {list(data.shape)} with {scale.numel()} scales, not {list(shape)}")
        return QuantizedWeight(data, scale.float().reshape(rows))
    packed, shift = tensors[f"{linear}.weight._data._data"], tensors[f"{linear}.weight._shift"]
    if not shift.is_floating_point():
        raise NotAvailable(f"the shifts of {linear!r} are {shift.dtype}; convert its file instead, which reads them.")
    groups, group = scale.numel(), packed.shape[1]
    if groups * group != rows * columns or group % GROUP or shift.numel() != groups:
        raise CorruptModel(f"{linear!r} has {groups} groups of {group} inputs, which do not make up {list(shape)}")
    numbers = torch.cat((packed & 15, packed >> 4))[:groups].reshape(shape)
    repeat = group // GROUP
    scales, shifts = (x.reshape(rows, -1).repeat_interleave(repeat, dim=1) for x in (scale, shift))
    return QuantizedWeight(pack_int4(numbers), scales, shifts)
