"""Both ways between a store and optimum-quanto's own files, against optimum-quanto itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn

from wan_local.checkpoint import PartTensors, find_model, open_model
from wan_local.convert import Conversion, convert
from wan_local.errors import CorruptModel, NotAvailable, OutputError
from wan_local.quantize import QuantizedWeight, dequantize
from wan_local.quanto import QMAP, export_quanto, is_quanto, quanto_weight
from wan_local.settings import load_settings
from wan_local.sources import open_source
from wan_local.weight_format import WeightFormat, WeightFormats

quanto = pytest.importorskip("optimum.quanto")
TINY = find_model(load_settings(model="tiny")).folder


@pytest.mark.parametrize("format_", ["int8", "fp8"])
def test_quanto_loads_an_exported_store_to_the_same_weights(tmp_path: Path, format_: WeightFormat) -> None:
    convert(Conversion(open_source(TINY), WeightFormats(format_)), tmp_path / "store")
    store = open_model(tmp_path / "store")
    export_quanto(store, tmp_path / "exported")
    assert is_quanto(tmp_path / "exported")
    config = WanTransformer3DModel.load_config(tmp_path / "exported")
    model = WanTransformer3DModel.from_config(config)  # on the CPU: on meta quanto leaves its rotary table unset
    qmap = json.loads((tmp_path / "exported" / QMAP).read_text())
    quanto.requantize(model, load_file(tmp_path / "exported" / "diffusion_pytorch_model.safetensors"), qmap)
    stored = PartTensors(store, "transformer")
    assert len(qmap) == 6 * 12
    for name, module in model.named_modules():
        if name in qmap:
            ours = QuantizedWeight(stored[f"{name}.weight"], stored[f"{name}.weight_scale"])
            assert torch.equal(module.weight.dequantize(), dequantize(ours, torch.float32)), name
            assert torch.equal(module.bias.float(), stored[f"{name}.bias"].float())
    assert torch.equal(model.proj_out.weight, stored["proj_out.weight"].float())


def test_what_quanto_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = open_source(TINY)
    convert(Conversion(source, WeightFormats("int4")), tmp_path / "int4")
    with pytest.raises(NotAvailable, match="groups of 128 for 4 bits"):
        export_quanto(open_model(tmp_path / "int4"), tmp_path / "exported")
    convert(Conversion(source, WeightFormats("int8"), rotate=True), tmp_path / "rotated")
    with pytest.raises(NotAvailable, match="rotated"):
        export_quanto(open_model(tmp_path / "rotated"), tmp_path / "exported")
    convert(Conversion(source, WeightFormats("int8")), tmp_path / "int8")
    with pytest.raises(OutputError, match="there already"):
        export_quanto(open_model(tmp_path / "int8"), tmp_path / "int4")
    assert not (tmp_path / "exported").exists()


KINDS = [(kind, dtype) for kind in ("qint8", "qfloat8_e4m3fn") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), [*KINDS, ("qint4", torch.float32)], ids=str)  # in bfloat16 quanto repacks
@pytest.mark.parametrize("shape", [(96, 256), (64, 192), (33, 1024), (16, 320)])
def test_what_quanto_saved_is_read_number_for_number(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(shape[1], shape[0]).to(dtype))
    quanto.quantize(model, weights=quanto.qtypes[kind])
    quanto.freeze(model)
    if kind == "qint4" and model[0].weight._group_size % 64:
        with pytest.raises(CorruptModel, match="which do not make up"):
            quanto_weight(model.state_dict(), "0", shape)
        return
    weight = quanto_weight(model.state_dict(), "0", shape)
    theirs = model[0].weight
    assert weight.shape == shape
    assert torch.equal(dequantize(weight, torch.float32).to(dtype), theirs.dequantize())


def test_shifts_that_are_whole_numbers_are_refused_by_name() -> None:
    linear = {"0.weight._data._data": torch.zeros(8, 128, dtype=torch.uint8), "0.weight._scale": torch.ones(16, 1)}
    linear["0.weight._shift"] = torch.ones(16, 1, dtype=torch.uint8)
    with pytest.raises(NotAvailable, match=r"shifts of '0' are torch\.uint8"):
        quanto_weight(linear, "0", (16, 128))
