"""Networks that hold quantized weights: loaded as they are stored, streamed or resident, counted in bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_local.checkpoint import ModelFiles, find_model, open_model
from wan_local.errors import CorruptModel
from wan_local.key_map import Part, canonical
from wan_local.planner import StagePlan
from wan_local.quantize import STORED_DTYPES, dequantize, is_block_linear, quantize_weight
from wan_local.settings import load_settings
from wan_local.stage import Network, load_network, network_sizes, stage
from wan_local.weight_format import WeightFormat, WeightFormats

CPU = torch.device("cpu")
PARTS: list[Part] = ["transformer", "text_encoder", "image_encoder"]
QUANTIZED: list[Network] = ["text_encoder", "image_encoder", "context_embedder", "transformer"]
FORMATS: list[WeightFormat] = ["int8", "fp8", "int4"]


def quantized_copy(source: Path, target: Path, format_: WeightFormat, *, dequantized: bool = False) -> ModelFiles:
    """Copy a model with its block linears quantized, or rounded as quantizing does; one tensor after the other."""
    shutil.copytree(source, target)
    for part in PARTS:
        [file] = sorted((target / part).glob("*.safetensors"))
        state: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if not is_block_linear(part, canonical(part, name)):
                state[name] = tensor
                continue
            quantized = quantize_weight(tensor.float(), format_)
            if dequantized:
                state[name] = dequantize(quantized, torch.float32)
                continue
            state |= {name: quantized.data, f"{name}_scale": quantized.scale}
            state |= {} if quantized.shift is None else {f"{name}_shift": quantized.shift}
        save_file(state, file)
    return open_model(target)


@pytest.fixture(scope="module", params=FORMATS)
def copies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, ModelFiles]:
    """The tiny model quantized, and rounded in the same way but stored in float32."""
    folder, tiny = tmp_path_factory.mktemp(request.param), find_model(load_settings(model="tiny")).folder
    quantized = quantized_copy(tiny, folder / "quantized", request.param)
    return quantized, quantized_copy(tiny, folder / "rounded", request.param, dequantized=True)


def streamed(resident: int) -> StagePlan:
    return StagePlan("denoise", 0, 0, resident_blocks=resident, source="file")


def velocity(files: ModelFiles, plan: StagePlan | None) -> Tensor:
    config = files.config.transformer
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(1, config.text_tokens, config.text_dim, generator=generator)
    images = torch.randn(1, config.image_tokens, config.image_dim, generator=generator)
    with stage("context_embedder", files, CPU, torch.float32, plan=plan) as embedder:
        context, modulations = embedder(text, images), embedder.modulations(torch.tensor([500]))
    with stage("transformer", files, CPU, torch.float32, plan=plan) as transformer:
        [result] = transformer(latents, modulations[500], [context])
    assert isinstance(result, Tensor)
    return result


def test_quantized_weights_compute_what_the_same_numbers_in_float32_compute(
    copies: tuple[ModelFiles, ModelFiles],
) -> None:
    quantized, rounded = copies
    exact = StagePlan("denoise", 0, 0, int8_arithmetic="weight-only")
    assert torch.allclose(velocity(quantized, exact), velocity(rounded, None), atol=1e-5)


@pytest.mark.parametrize("resident", [0, 3, 4])
def test_streamed_quantized_blocks_are_bit_equal_to_resident_ones(
    copies: tuple[ModelFiles, ModelFiles], resident: int
) -> None:
    files, _ = copies
    assert torch.equal(velocity(files, streamed(resident)), velocity(files, None))


@pytest.mark.parametrize("network", QUANTIZED)
def test_quantized_weights_stay_quantized_on_the_device_and_are_counted_so(
    copies: tuple[ModelFiles, ModelFiles], network: Network
) -> None:
    files, _ = copies
    format_ = next(iter({STORED_DTYPES[p.dtype] for p in parameters(files, network) if p.dtype in STORED_DTYPES}))
    sizes = network_sizes(files.config, files)[network]
    assert sizes == network_sizes(files.config, WeightFormats(format_, format_, format_))[network]
    held = {p.data_ptr(): p.nbytes for p in parameters(files, network)}
    assert sizes.packed > 0 and sizes.weight_bytes(2) == sum(held.values())
    assert sizes.weight_bytes(2) < network_sizes(files.config)[network].weight_bytes(2)


def parameters(files: ModelFiles, network: Network) -> list[Tensor]:
    return list(load_network(network, files, CPU, torch.bfloat16).parameters())


def test_a_quantized_weight_of_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    tiny = find_model(load_settings(model="tiny")).folder
    quantized_copy(tiny, tmp_path / "model", "int8")
    [file] = (tmp_path / "model" / "transformer").glob("*.safetensors")
    state = load_file(file)
    state["blocks.2.attn1.to_q.weight_scale"] = torch.ones(1)
    save_file(state, file)
    with (
        pytest.raises(CorruptModel, match=r"'blocks\.2\.attn1\.to_q' should be a quantized weight of 128 x 128"),
        stage("transformer", open_model(tmp_path / "model"), CPU, torch.float32),
    ):
        pass


def test_a_scale_that_is_no_number_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    quantized_copy(find_model(load_settings(model="tiny")).folder, tmp_path / "model", "int8")
    [file] = (tmp_path / "model" / "transformer").glob("*.safetensors")
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    state["blocks.2.attn1.to_q.weight_scale"][3] = float("nan")
    save_file(state, file)
    with (
        pytest.raises(CorruptModel, match=r"the scale 'blocks\.2\.attn1\.to_q\.weight_scale'.* is negative, NaN"),
        stage("transformer", open_model(tmp_path / "model"), CPU, torch.float32, plan=streamed(0)),
    ):
        pass
