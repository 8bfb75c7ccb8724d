from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import layouts
from wan_local.cli import main
from wan_local.errors import CorruptModel, NotAvailable, WanLocalError, WrongModel
from wan_local.inspection import inspect
from wan_local.key_map import to_official
from wan_local.lora import apply_all, open_lora
from wan_local.settings import LoraSetting, known_models

REAL, TINY = known_models()
RANK = 4
State = dict[str, Tensor]


@functools.cache
def ours() -> State:
    return {name: tensor.float() for name, tensor in layouts.tiny("transformer").items()}


def linears(*, images: bool = True, feed_forward: bool = True) -> list[str]:
    """Return our names of the weights that LoRAs are trained on."""
    names = [name for name, tensor in ours().items() if tensor.dim() == 2 and name.startswith("blocks.")]
    names = [name for name in names if images or not ("add_k" in name or "add_v" in name)]
    return [name for name in names if feed_forward or ".ffn." not in name]


def pairs(names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a low-rank pair (down, up) for each linear."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: ours()[name].shape for name in names}
    return {
        name: (
            torch.randn(RANK, shape[1], generator=generator) * 0.1,
            torch.randn(shape[0], RANK, generator=generator) * 0.1,
        )
        for name, shape in shapes.items()
    }


def diffusers(changes: dict[str, tuple[Tensor, Tensor]]) -> State:
    state = {}
    for name, (down, up) in changes.items():
        module = name.removesuffix(".weight")
        state |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    return state


def original(changes: dict[str, tuple[Tensor, Tensor]]) -> State:
    state = {}
    official = to_official("transformer", changes)
    for name, (down, up) in changes.items():
        module = "diffusion_model." + official[name].removesuffix(".weight")
        state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return state


def kohya(changes: dict[str, tuple[Tensor, Tensor]], alpha: float = 2.0) -> State:
    state = {}
    official = to_official("transformer", changes)
    for name, (down, up) in changes.items():
        module = "lora_unet_" + official[name].removesuffix(".weight").replace(".", "_")
        state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        state[f"{module}.alpha"] = torch.tensor(alpha)
    return state


def save(file: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata)
    return file


@pytest.mark.parametrize(("dialect", "scale"), [(diffusers, 1.0), (original, 1.0), (kohya, 2.0 / RANK)])
def test_every_dialect_makes_the_same_changes(
    dialect: Callable[[dict[str, tuple[Tensor, Tensor]]], State], scale: float, tmp_path: Path
) -> None:
    changes = pairs(linears())
    lora = open_lora(save(tmp_path / "lora.safetensors", dialect(changes)), 0.7, TINY)
    assert lora.targets == set(changes)
    for name, weight in ours().items():
        merged = lora.apply(name, weight.bfloat16())
        if name not in changes:
            assert merged.dtype == torch.bfloat16
            continue
        down, up = changes[name]
        torch.testing.assert_close(merged, weight.bfloat16().float() + 0.7 * scale * (up @ down))
    report = lora.report
    assert (report.applied, report.zero, report.unmatched, report.missing_images) == (len(changes), 0, (), 0)


RENAMED: dict[str, Callable[[State], State]] = {
    "VideoX-Fun": lambda state: {name.replace("lora_unet_", "lora_unet__"): t for name, t in state.items()},
    "LyCORIS": lambda state: {name.replace("lora_unet_", "lycoris_"): t for name, t in state.items()},
}
PREFIXES = ("", "diffusion_model.", "model.diffusion_model.", "model.", "pipe.dit.", "base_model.model.")


@pytest.mark.parametrize("tool", list(RENAMED))
def test_names_of_other_tools_are_known(tool: str, tmp_path: Path) -> None:
    changes = pairs(linears())
    file = save(tmp_path / "lora.safetensors", RENAMED[tool](kohya(changes)))
    report = open_lora(file, 1.0, TINY).report
    assert (report.applied, report.unmatched) == (len(changes), ())
    assert inspect(file).parts[0].kind.dialect == "kohya/musubi" and inspect(file).usable


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("adapter", ["", ".default", ".style"])
def test_prefixes_and_adapters_names_are_known(prefix: str, adapter: str, tmp_path: Path) -> None:
    changes = pairs(linears()[:4])
    state = {
        name.replace("transformer.", prefix).replace(".weight", f"{adapter}.weight"): tensor
        for name, tensor in diffusers(changes).items()
    }
    file = save(tmp_path / "lora.safetensors", state)
    report = open_lora(file, 1.0, TINY).report
    assert (report.applied, report.unmatched) == (4, ())
    assert inspect(file).parts[0].kind.dialect == "diffusers/PEFT" and inspect(file).usable


def test_two_changes_under_one_name_are_refused(tmp_path: Path) -> None:
    state = diffusers(pairs(linears()[:1]))
    named = [(adapter, name, tensor) for adapter in ("a", "b") for name, tensor in state.items()]
    twice = {name.replace(".weight", f".{adapter}.weight"): tensor.clone() for adapter, name, tensor in named}
    with pytest.raises(CorruptModel, match=r"lora_A\.b\.weight'.* are the same piece of the change"):
        open_lora(save(tmp_path / "lora.safetensors", twice), 1.0, TINY)


def test_low_rank_pairs_multiply_to_the_change(tmp_path: Path) -> None:
    changes = pairs(linears())
    lora = open_lora(save(tmp_path / "lora.safetensors", kohya(changes)), 0.7, TINY)
    for name in changes:
        (pair,) = lora.low_rank(name) or []
        torch.testing.assert_close(pair.up @ pair.down, lora.delta(name, tuple(ours()[name].shape)))
    assert lora.low_rank("patch_embedding.weight") == []


def full_differences() -> State:
    """Return what distilled LoRAs hold beside low-rank pairs: differences of weights, biases, norms and modulations."""
    generator = torch.Generator().manual_seed(4)
    shapes = {name: tensor.shape for name, tensor in layouts.official("transformer").items()}
    endings = {
        "blocks.1.ffn.0.weight": "blocks.1.ffn.0.diff", "blocks.1.ffn.0.bias": "blocks.1.ffn.0.diff_b",
        "blocks.2.norm3.weight": "blocks.2.norm3.diff", "blocks.2.norm3.bias": "blocks.2.norm3.diff_b",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.3.modulation": "blocks.3.diff_m", "head.modulation": "head.modulation.diff_m",
        "patch_embedding.weight": "patch_embedding.diff", "patch_embedding.bias": "patch_embedding.diff_b",
        "time_projection.1.bias": "time_projection.1.diff_b", "head.head.weight": "head.head.diff",
        "img_emb.emb_pos": "img_emb.emb_pos.diff",
    }  # fmt: skip
    return {
        f"diffusion_model.{ending}": torch.randn(shapes[name], generator=generator) for name, ending in endings.items()
    }


def test_full_differences_reach_weights_biases_norms_and_modulations(tmp_path: Path) -> None:
    state = full_differences()
    lora = open_lora(save(tmp_path / "lora.safetensors", state), 0.5, TINY)
    assert lora.report.applied == len(state) == len(lora.targets)
    modulation = "blocks.3.scale_shift_table"
    expected = ours()[modulation] + 0.5 * state["diffusion_model.blocks.3.diff_m"]
    torch.testing.assert_close(lora.apply(modulation, ours()[modulation]), expected)
    table = "condition_embedder.image_embedder.pos_embed"
    assert not torch.equal(lora.apply(table, ours()[table]), ours()[table])
    assert lora.low_rank("blocks.1.ffn.net.0.proj.weight") is None


def test_an_attention_only_lora_without_alpha_is_whole(tmp_path: Path) -> None:
    names = linears(feed_forward=False)
    lora = open_lora(save(tmp_path / "lora.safetensors", original(pairs(names))), 1.0, TINY)
    assert lora.report.applied == len(names) and not any(".ffn." in name for name in lora.targets)


def test_a_text_to_video_lora_counts_the_image_linears_it_lacks(tmp_path: Path) -> None:
    lora = open_lora(save(tmp_path / "lora.safetensors", diffusers(pairs(linears(images=False)))), 1.0, TINY)
    assert lora.report.missing_images == 2 * TINY.transformer.num_layers
    assert "12 image linears" in lora.report.describe()


def test_a_patch_embedding_of_text_to_video_changes_the_latents_channels(tmp_path: Path) -> None:
    narrow = torch.randn(128, 16, 1, 2, 2)
    lora = open_lora(save(tmp_path / "lora.safetensors", {"diffusion_model.patch_embedding.diff": narrow}), 1.0, TINY)
    weight = ours()["patch_embedding.weight"]
    merged = lora.apply("patch_embedding.weight", weight)
    torch.testing.assert_close(merged[:, :16], weight[:, :16] + narrow)
    assert torch.equal(merged[:, 16:], weight[:, 16:]) and lora.report.widened == 1


def test_two_loras_add_up(tmp_path: Path) -> None:
    changes = pairs(linears())
    first = open_lora(save(tmp_path / "a.safetensors", diffusers(changes)), 1.0, TINY)
    second = open_lora(save(tmp_path / "b.safetensors", kohya(changes)), -2.0, TINY)
    for name in linears():
        torch.testing.assert_close(apply_all([first, second], name, ours()[name]), ours()[name], atol=1e-6, rtol=1e-5)


def test_what_is_zero_unmatched_or_of_the_text_encoder_is_counted(tmp_path: Path) -> None:
    changes = pairs(linears()[:6])
    first = next(iter(changes))
    changes[first] = (changes[first][0], torch.zeros_like(changes[first][1]))
    state = original(changes)
    state |= {"diffusion_model.vace_blocks.0.self_attn.q.lora_down.weight": torch.ones(4, 128)}
    state |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}
    report = open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY).report
    assert (report.applied, report.zero, len(report.unmatched), len(report.ignored)) == (5, 1, 1, 1)
    described = report.describe()
    assert "5 changes applied, 1 zero, 1 names unmatched (e.g. diffusion_model.vace_blocks" in described


def test_a_lora_of_another_network_is_an_error(tmp_path: Path) -> None:
    state = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)}
    with pytest.raises(WrongModel, match=r"nothing in 'lora\.safetensors' changes.*single_transformer_blocks"):
        open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY)


def test_a_lora_of_another_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WrongModel, match=r"\[128, 128\].*\[5120, 5120\].*another size"):
        open_lora(save(tmp_path / "lora.safetensors", diffusers(pairs(linears()))), 1.0, REAL)


NOT_SQUARE = "blocks.0.ffn.net.0.proj.weight"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("form", ["diff", "pair"])
def test_a_change_whose_axes_are_in_another_order_is_refused(form: str, turned: bool, tmp_path: Path) -> None:
    rows, columns = ours()[NOT_SQUARE].shape
    if turned:
        rows, columns = columns, rows
    name = "diffusion_model.blocks.0.ffn.0"
    state = {f"{name}.diff": torch.randn(rows, columns)}
    if form == "pair":
        state = {
            f"{name}.lora_down.weight": torch.ones(RANK, columns),
            f"{name}.lora_up.weight": torch.ones(rows, RANK),
        }
    file = save(tmp_path / "lora.safetensors", state)
    if not turned:
        assert open_lora(file, 1.0, TINY).targets == {NOT_SQUARE}
        return
    with pytest.raises(WrongModel, match=rf"\[{rows}, {columns}\].*in another order"):
        open_lora(file, 1.0, TINY)


def test_axes_of_length_one_may_be_added_and_dropped(tmp_path: Path) -> None:
    name = "blocks.2.scale_shift_table"
    flat, more = torch.randn(ours()[name].shape[1:]), torch.randn(*ours()[NOT_SQUARE].shape, 1, 1)
    state = {"blocks.2.diff_m": flat, "blocks.0.ffn.0.diff": more}
    lora = open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY)
    assert torch.equal(lora.delta(name, (1, *flat.shape)), flat[None])
    assert torch.equal(lora.delta(NOT_SQUARE, tuple(more.shape[:2])), more[..., 0, 0])


def test_a_convolution_may_be_stored_flat_but_not_turned(tmp_path: Path) -> None:
    shape = ours()["patch_embedding.weight"].shape
    flat = torch.randn(shape[0], math.prod(shape[1:]))
    down, up = torch.randn(4, flat.shape[1]), torch.randn(shape[0], 4)
    pair = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    for state, change in (({"patch_embedding.diff": flat}, flat), (pair, up @ down)):
        lora = open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY)
        assert torch.allclose(lora.delta("patch_embedding.weight", tuple(shape)), change.view(shape))
    with pytest.raises(WrongModel):
        open_lora(save(tmp_path / "turned.safetensors", {"patch_embedding.diff": flat.T.contiguous()}), 1.0, TINY)


def test_strength_zero_is_an_error_that_says_that_all_is_zero(tmp_path: Path) -> None:
    with pytest.raises(WrongModel, match=rf"{len(linears())} changes are zero"):
        open_lora(save(tmp_path / "lora.safetensors", diffusers(pairs(linears()))), 0.0, TINY)


def test_half_a_pair_is_damage(tmp_path: Path) -> None:
    state = diffusers(pairs(linears()))
    del state["transformer.blocks.0.attn1.to_q.lora_B.weight"]
    with pytest.raises(CorruptModel, match=r"blocks\.0\.attn1\.to_q.*one half of a pair"):
        open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY)


def test_a_nan_is_damage(tmp_path: Path) -> None:
    state = diffusers(pairs(linears()))
    state["transformer.blocks.0.attn1.to_q.lora_B.weight"][3, 2] = float("nan")
    with pytest.raises(CorruptModel, match=r"to_q\.lora_B\.weight.*NaN"):
        open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY)


NOT_LORA = ["blocks.0.attn1.to_q.dora_scale", "lora_unet_blocks_0_self_attn_q.lokr_w1"]
NOT_LORA += ["blocks.0.self_attn.q.lora_mid.weight"]


@pytest.mark.parametrize("name", NOT_LORA)
def test_other_adapters_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotAvailable, match=r"DoRA|LoKr|middle matrix"):
        open_lora(save(tmp_path / "lora.safetensors", {name: torch.ones(2, 2)}), 1.0, TINY)


def test_alpha_in_the_metadata_counts(tmp_path: Path) -> None:
    changes = pairs(linears())
    table = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.use_rslora": False})
    file = save(tmp_path / "lora.safetensors", diffusers(changes), {"lora_adapter_metadata": table})
    name = linears()[0]
    down, up = changes[name]
    torch.testing.assert_close(
        open_lora(file, 1.0, TINY).delta(name, tuple(ours()[name].shape)), 8 / RANK * (up @ down)
    )


def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    """The file that peft and diffusers write themselves, names and all."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    layers = {name.removeprefix("transformer."): tensor for name, tensor in diffusers(pairs(linears())).items()}
    LoraBaseMixin.write_lora_layers(
        state_dict=LoraBaseMixin.pack_weights(layers, "transformer"), save_directory=str(tmp_path),
        is_main_process=True, weight_name="lora.safetensors", save_function=None, safe_serialization=True,
    )  # fmt: skip
    assert open_lora(tmp_path / "lora.safetensors", 1.0, TINY).report.applied == len(linears())


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1.0),
        ("C:\\loras\\a.safetensors:1e-1", "C:\\loras\\a.safetensors", 0.1),
    ],
)
def test_an_argument_is_a_file_and_a_strength(text: str, file: str, strength: float) -> None:
    assert LoraSetting.parse(text) == LoraSetting(Path(file), strength)


@pytest.mark.parametrize("command", ["generate", "convert"])
@pytest.mark.parametrize("strength", ["inf", "nan", "1e999"])
def test_a_strength_that_is_no_number_is_an_error_in_words(
    command: str, strength: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(tmp_path / "l.safetensors", diffusers(pairs(linears()[:1])))
    arguments = {"convert": [str(layouts.TINY), str(tmp_path / "store"), "--format", "int8"]}
    arguments["generate"] = ["--model", "tiny", "--prompt", "x", "--start-image", "a.png", "--end-image", "b.png"]
    assert main([command, *arguments[command], "--lora", f"{tmp_path / 'l.safetensors'}:{strength}"]) == 1
    assert f"there is no file '{tmp_path / 'l.safetensors'}:{strength}'" in capsys.readouterr().err


NAMES = st.sampled_from(
    [
        "blocks.0.self_attn.q.lora_down.weight", "blocks.0.self_attn.q.lora_up.weight", "blocks.0.self_attn.q.alpha",
        "lora_unet_blocks_1_ffn_0.lora_down.weight", "lora_unet_blocks_1_ffn_0.diff_b", "blocks.0.diff_m",
        "head.head.diff", "patch_embedding.diff", "x.lora_A.weight", "lora_te.alpha",
    ]
)  # fmt: skip


@given(table=st.dictionaries(NAMES, st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_no_mixture_of_names_and_shapes_is_anything_but_read_or_refused(
    table: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed-lora.safetensors"
    save_file({name: torch.ones(shape) for name, shape in table.items()}, file)
    assert load_file(file)
    try:
        open_lora(file, 1.0, TINY)
    except WanLocalError:
        return


def test_an_alpha_may_be_a_whole_number_and_other_pieces_may_not(tmp_path: Path) -> None:
    changes, name = pairs(linears()), linears()[0]
    state = {n: t.long() if n.endswith(".alpha") else t for n, t in kohya(changes, alpha=2.0).items()}
    down, up = changes[name]
    lora = open_lora(save(tmp_path / "musubi.safetensors", state), 1.0, TINY)
    torch.testing.assert_close(lora.delta(name, tuple(ours()[name].shape)), 2 / RANK * (up @ down))
    whole = {n: t.to(torch.int32) for n, t in diffusers(changes).items()}
    with pytest.raises(NotAvailable, match="is stored as I32; LoRAs are read as"):
        open_lora(save(tmp_path / "whole.safetensors", whole), 1.0, TINY)


@pytest.mark.parametrize(("rank_stabilized", "factor"), [(False, 8 / RANK), (True, 8 / RANK**0.5)])
def test_peft_keeps_alpha_beside_its_own_file(tmp_path: Path, rank_stabilized: bool, factor: float) -> None:
    changes, name = pairs(linears()), linears()[0]
    state = {n.replace("transformer.", "base_model.model."): t for n, t in diffusers(changes).items()}
    file = save(tmp_path / "adapter_model.safetensors", state)
    config = {"r": RANK, "lora_alpha": 8, "use_rslora": rank_stabilized, "alpha_pattern": {}, "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    down, up = changes[name]
    delta = open_lora(file, 1.0, TINY).delta(name, tuple(ours()[name].shape))
    torch.testing.assert_close(delta, factor * (up @ down))
    (tmp_path / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CorruptModel, match=r"adapter_config\.json.*no table with r and lora_alpha"):
        open_lora(file, 1.0, TINY)
    (tmp_path / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 128}', encoding="utf-8")  # another's
    with pytest.raises(WrongModel, match=rf"adapter_config\.json.* tells rank 64, and the pairs .* have rank {RANK}:"):
        open_lora(file, 1.0, TINY)


def test_a_table_beside_pairs_that_have_their_alpha_does_not_count(tmp_path: Path) -> None:
    changes, name = pairs(linears()), linears()[0]
    state = {n.replace("transformer.", "base_model.model."): t for n, t in diffusers(changes).items()}
    state |= {n.replace(".lora_A.weight", ".alpha"): torch.tensor(2.0) for n in state if ".lora_A." in n}
    (tmp_path / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 128}', encoding="utf-8")
    lora = open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY)
    down, up = changes[name]
    torch.testing.assert_close(lora.delta(name, tuple(ours()[name].shape)), 2 / RANK * (up @ down))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused_before_anything_is_applied(tmp_path: Path, alpha: float) -> None:
    state = kohya(pairs(linears()))
    state[next(name for name in state if name.endswith(".alpha"))] = torch.tensor(alpha)
    with pytest.raises(CorruptModel, match=r"alpha' in .* holds NaN or infinity"):
        open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY)


def test_an_alpha_of_zero_is_counted_as_a_change_of_nothing(tmp_path: Path) -> None:
    state = kohya(pairs(linears()))
    state[next(name for name in state if name.endswith(".alpha"))] = torch.tensor(0.0)
    report = open_lora(save(tmp_path / "lora.safetensors", state), 1.0, TINY).report
    assert (report.applied, report.zero) == (len(linears()) - 1, 1)
