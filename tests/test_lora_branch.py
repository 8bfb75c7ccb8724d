"""LoRAs beside loaded weights: what they compute is what merging them first would, whatever holds the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_lora import diffusers, full_differences, kohya, linears, pairs, save
from tests.test_quantized_networks import CPU, quantized_copy, streamed, velocity
from tests.test_quantized_networks import parameters as parameters_of
from wan_local.checkpoint import ModelFiles, find_model, open_model
from wan_local.cli.flags import settings_from
from wan_local.errors import ModelNotFound
from wan_local.fusions import takes_int8
from wan_local.identity import part_identity
from wan_local.layers import Linear
from wan_local.lora import apply_all
from wan_local.planner import StagePlan
from wan_local.report import Report
from wan_local.settings import LoraSetting, load_settings
from wan_local.stage import Network, load_network, network_sizes

FILE = "diffusion_pytorch_model.safetensors"
EXACT = StagePlan("denoise", 0, 0, int8_arithmetic="weight-only")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraSetting, ...]:
    """Two LoRAs: low-rank pairs of every linear, and low-rank pairs of some with full differences of all kinds."""
    folder = tmp_path_factory.mktemp("loras")
    save(folder / "a.safetensors", diffusers(pairs(linears())))
    some = [name for name in linears() if ".attn" in name]
    differences = {name: 0.1 * tensor for name, tensor in full_differences().items()}
    save(folder / "b.safetensors", {**kohya(pairs(some)), **differences})
    return LoraSetting(folder / "a.safetensors", 0.3), LoraSetting(folder / "b.safetensors", -0.2)


@pytest.fixture(scope="module")
def tiny() -> ModelFiles:
    return find_model(load_settings(model="tiny"))


@pytest.fixture(scope="module")
def branched(loras: tuple[LoraSetting, ...]) -> ModelFiles:
    return find_model(load_settings(model="tiny", loras=loras))


def merged_copy(files: ModelFiles, source: Path, target: Path) -> ModelFiles:
    """Copy a model with LoRAs added to its weights in float32."""
    shutil.copytree(source, target)
    file = target / "transformer" / FILE
    save_file({name: apply_all(files.loras, name, tensor.float()) for name, tensor in load_file(file).items()}, file)
    return open_model(target)


def test_branches_compute_what_merged_weights_compute(tiny: ModelFiles, branched: ModelFiles, tmp_path: Path) -> None:
    expected = velocity(merged_copy(branched, tiny.folder, tmp_path / "merged"), None)
    got = velocity(branched, None)
    assert float((expected - velocity(tiny, None)).abs().max()) > 0.05  # the LoRAs do something
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("resident", [0, 2, 6])
def test_streamed_blocks_take_their_branches_along_bit_for_bit(branched: ModelFiles, resident: int) -> None:
    assert torch.equal(velocity(branched, streamed(resident)), velocity(branched, None))


@pytest.mark.parametrize("format_", ["int8", "int4", "fp8"])
def test_branches_beside_quantized_weights_add_the_whole_change(
    format_: str, tiny: ModelFiles, loras: tuple[LoraSetting, ...], tmp_path: Path
) -> None:
    """Merged after rounding, in float32: nothing of the LoRA is lost, where requantizing loses up to all of it."""
    quantized = quantized_copy(tiny.folder, tmp_path / "quantized", format_)  # type: ignore[arg-type]
    rounded = quantized_copy(tiny.folder, tmp_path / "rounded", format_, dequantized=True)  # type: ignore[arg-type]
    opened = find_model(load_settings(model=str(quantized.folder), loras=loras))
    expected = velocity(merged_copy(opened, rounded.folder, tmp_path / "merged"), None)
    torch.testing.assert_close(velocity(opened, EXACT), expected, atol=5e-5, rtol=1e-4)
    assert torch.equal(velocity(opened, streamed(0)), velocity(opened, None))


@pytest.mark.parametrize("network", ["context_embedder", "transformer"])
def test_branches_are_counted_with_their_network(network: Network, branched: ModelFiles) -> None:
    sizes = network_sizes(branched.config, branched)[network]
    held = {p.data_ptr(): p.nbytes for p in parameters_of(branched, network) if p.numel()}
    assert sizes.weight_bytes(2) == sum(held.values())
    plain = replace(branched, loras=())
    assert sizes.weight_bytes(2) > network_sizes(plain.config, plain)[network].weight_bytes(2)


def test_several_low_rank_changes_of_a_linear_are_one_branch(branched: ModelFiles) -> None:
    module = load_network("transformer", branched, CPU, torch.bfloat16)
    linear = module.get_submodule("blocks.0.attn1.to_q")
    assert isinstance(linear, Linear) and linear.lora_down is not None and linear.lora_up is not None
    assert linear.lora_down.shape == (8, 128) and linear.lora_up.shape == (128, 8)
    assert linear.lora_down.dtype == torch.bfloat16


def test_a_full_difference_of_a_plain_weight_is_in_the_weight(branched: ModelFiles) -> None:
    linear = load_network("transformer", branched, CPU, torch.bfloat16).get_submodule("blocks.1.ffn.net.0.proj")
    assert isinstance(linear, Linear) and linear.lora_down is None and linear.lora_delta is None


def test_a_lora_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nowhere\.safetensors"):
        find_model(load_settings(model="tiny", loras=[str(tmp_path / "nowhere.safetensors")]))


def test_settings_take_loras_from_the_environment_and_from_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().loras == ()
    monkeypatch.setenv("WAN_LOCAL_LORAS", "a.safetensors:0.5;b.safetensors")
    assert load_settings().loras == (
        str(Path.cwd() / "a.safetensors") + ":0.5",
        str(Path.cwd() / "b.safetensors") + ":1.0",
    )
    assert settings_from({"loras": ["c.safetensors:-2"]}).loras == (str(Path.cwd() / "c.safetensors") + ":-2.0",)


def test_a_report_names_the_loras_and_what_took_effect(branched: ModelFiles) -> None:
    from wan_local.pipeline import _report_loras

    report = Report(CPU)
    _report_loras(branched, report)
    first, second = report.as_dict()["loras"]
    assert (first["file"], first["strength"], first["applied"]) == ("a.safetensors", 0.3, len(linears()))
    assert second["applied"] > 12 and not report.notes


def test_a_run_that_is_gone_on_with_has_its_loras(loras: tuple[LoraSetting, ...], tmp_path: Path) -> None:
    from wan_local.order import _public_settings

    settings = load_settings(model="tiny", loras=loras)
    stored = json.loads(json.dumps(_public_settings(settings)))
    assert load_settings(loras=stored["loras"]).loras == settings.loras
    assert [LoraSetting.parse(text) for text in settings.loras] == list(loras)


def test_another_lora_or_strength_is_another_transformer_to_resume(loras: tuple[LoraSetting, ...]) -> None:
    variants = [(), loras[:1], loras, (replace(loras[0], strength=0.4),)]
    identities = {
        part_identity(find_model(load_settings(model="tiny", loras=some)), "transformer") for some in variants
    }
    assert len(identities) == len(variants)


def test_a_fused_kernel_leaves_a_linear_with_a_branch_alone() -> None:
    linear = Linear(64, 64)
    linear.hold(
        {"weight": torch.zeros(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64)},
        rotated=False,
        arithmetic="w8a8",
    )
    assert takes_int8(linear)
    linear.branch(4)
    assert linear.branched and not takes_int8(linear)
