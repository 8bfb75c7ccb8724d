from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import layouts
from tests.layouts import TINY, tiny
from wan_local.checkpoint import find_model, open_model
from wan_local.cli import main
from wan_local.convert import Conversion, convert
from wan_local.errors import CorruptModel, ModelNotFound, NotAvailable, WrongModel
from wan_local.inspection import inspect
from wan_local.key_map import PARTS, Part
from wan_local.settings import load_settings
from wan_local.sources import Source, open_source
from wan_local.weight_format import WeightFormats


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_official(tmp_path_factory.mktemp("official") / "Wan2.1-FLF2V-tiny")


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_comfy(tmp_path_factory.mktemp("comfy") / "models", "fp16")


def assert_equal_to_the_tiny_model(source: Source, *, but_for: tuple[Part, ...] = ()) -> None:
    for part in PARTS:
        expected, got = tiny(part), source.part(part)
        assert set(got) == set(expected)
        for name, tensor in expected.items():
            assert got.shape(name) == tuple(tensor.shape)
            if part in but_for:
                continue
            read = got[name]
            assert read.dtype == got.dtype_of(name)
            assert torch.equal(read, tensor), f"{part} {name}"


def test_the_diffusers_layout_reads_as_it_is() -> None:
    source = open_source(TINY)
    assert_equal_to_the_tiny_model(source)
    assert source.kind.task == "flf2v" and source.config.embedded
    assert sum(source.files.values()) == sum(file.stat().st_size for file in TINY.rglob("*.safetensors"))
    assert source.tokenizer_folder == TINY / "tokenizer"


def test_the_official_layout_reads_as_ours(official: Path) -> None:
    source = open_source(official)
    assert_equal_to_the_tiny_model(source, but_for=("text_encoder",))
    for name, tensor in tiny("text_encoder").items():
        assert torch.equal(source.part("text_encoder")[name], tensor.bfloat16())
    assert source.kinds["vae"].dialect == "official"
    assert source.tokenizer_folder.name == "umt5-xxl"
    assert "visual.head" in source.part("image_encoder").ignored


def test_the_comfy_layout_reads_as_ours(comfy: Path) -> None:
    source = open_source(comfy)
    assert_equal_to_the_tiny_model(source)
    assert source.part("text_encoder").ignored == ("spiece_model",)


def test_parts_may_be_given_one_by_one(comfy: Path, tmp_path: Path) -> None:
    transformer = shutil.copy(next((comfy / "diffusion_models").iterdir()), tmp_path / "mine.safetensors")
    source = open_source(
        transformer,
        text_encoder=next((comfy / "text_encoders").iterdir()),
        image_encoder=comfy / "clip_vision",
        vae=TINY,
        tokenizer=comfy / "tokenizer" / "tokenizer.json",
    )
    assert_equal_to_the_tiny_model(source)
    assert source.weights["vae"].path == TINY / "vae"


def test_the_position_table_of_flf2v_is_never_lost(official: Path, comfy: Path) -> None:
    name = "condition_embedder.image_embedder.pos_embed"
    for folder in (official, comfy):
        assert open_source(folder).part("transformer")[name].abs().sum() > 0


def test_what_is_missing_is_named_with_where_to_get_it(comfy: Path, tmp_path: Path) -> None:
    transformer = shutil.copy(next((comfy / "diffusion_models").iterdir()), tmp_path / "mine.safetensors")
    with pytest.raises(ModelNotFound) as caught:
        open_source(transformer, vae=TINY / "vae")
    message = str(caught.value)
    assert "text_encoder, image_encoder, tokenizer missing" in message
    for place in ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "clip_vision_h.safetensors", "google/umt5-xxl"):
        assert place in message


def test_a_part_that_is_another_is_refused_by_name(comfy: Path) -> None:
    with pytest.raises(WrongModel, match=r"given as vae and is image encoder of .*Get the VAE"):
        open_source(comfy, vae=comfy / "clip_vision")


def test_files_of_other_things_in_a_folder_are_no_reason_to_refuse_it(comfy: Path, tmp_path: Path) -> None:
    """An upscaler and a textual inversion, as they lie in Comfy's folders, and what macOS leaves on other disks."""
    folder = Path(shutil.copytree(comfy, tmp_path / "models"))
    torch.save({"params_ema": {"conv.weight": torch.zeros(3, 3)}}, folder / "vae" / "RealESRGAN.pth")
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "x"}, folder / "embedding.pt")
    assert_equal_to_the_tiny_model(open_source(folder))
    found = inspect(folder)
    others = {part.path.name: part.problem for part in found.parts if part.kind.part == "other"}
    assert others.keys() == {"RealESRGAN.pth", "embedding.pt"} and "no dict of tensors" in others["embedding.pt"]
    assert not found.missing and found.layout == "files side by side" and main(["inspect", str(folder)]) == 1
    with pytest.raises(WrongModel, match="has to be converted once"):
        find_model(load_settings(model=str(folder)))
    (folder / "vae" / "wan_2.1_vae.safetensors").write_bytes(b"")
    with pytest.raises(CorruptModel, match=r"'wan_2\.1_vae\.safetensors' is empty.*needs: vae missing"):
        open_source(folder)


def test_a_store_in_the_folder_it_is_made_of_is_no_candidate(comfy: Path, tmp_path: Path) -> None:
    """Neither while it is made nor when it is complete; named itself, it is what it is."""
    folder = Path(shutil.copytree(comfy, tmp_path / "models"))

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    conversion = Conversion(open_source(folder), WeightFormats.converted("int8"))
    with pytest.raises(KeyboardInterrupt):
        convert(conversion, folder / "int8", stop)
    assert (folder / "int8.part").is_dir() and not inspect(folder).missing
    manifest = convert(Conversion(open_source(folder), conversion.formats), folder / "int8")
    assert convert(Conversion(open_source(folder), conversion.formats), folder / "int8") == manifest
    assert len(inspect(folder).parts) == 4
    assert inspect(folder / "int8").layout == "wan_local store" and inspect(folder / "int8" / "vae").parts
    Path(folder / "int8").rename(tmp_path / "int8")
    with pytest.raises(ModelNotFound, match=r"no weights beside the store 'int8'\. Give that folder"):
        inspect(Path(shutil.copytree(tmp_path / "int8", tmp_path / "stores" / "int8")).parent)


def test_hidden_files_are_no_weights(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    for place in ("vae/._diffusion_pytorch_model.safetensors", "vae/._x.safetensors.index.json", "tokenizer/._x.json"):
        (folder / place).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert_equal_to_the_tiny_model(open_source(folder))
    assert inspect(folder).usable and open_model(folder).folder == folder


def test_two_candidates_for_a_part_are_named(comfy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(comfy, tmp_path / "models"))
    shutil.copy(folder / "vae" / "wan_2.1_vae.safetensors", folder / "vae" / "other.safetensors")
    with pytest.raises(WrongModel, match=r"2 candidates for the vae.*Name the one to use"):
        open_source(folder)
    assert_equal_to_the_tiny_model(open_source(folder, vae=folder / "vae" / "other.safetensors"))


@pytest.mark.parametrize("form", ["bf16", "fp8", "fp8_scaled", "fp8_marked"])
def test_comfy_numbers_come_back_within_their_format(form: str, tmp_path: Path) -> None:
    source = open_source(layouts.write_comfy(tmp_path / "models", form))
    stored = load_file(next((tmp_path / "models" / "diffusion_models").iterdir()))
    scaled = sum(name.endswith(("scale_weight", "weight_scale")) for name in stored)
    assert (scaled > 40) == (form in ("fp8_scaled", "fp8_marked"))
    tensors = source.part("transformer")
    for name, expected in tiny("transformer").items():
        got, exact = tensors[name].float(), expected.float()
        assert tensors[name].dtype == tensors.dtype_of(name)
        if form == "bf16":
            assert torch.equal(got, expected.bfloat16().float()), name
        else:  # three bits of mantissa: 1/16 of the number, or half of the smallest step of 2^-9 times the scale
            step = 2.0**-10 * (float(exact.abs().max()) / 448 if scaled else 1.0)
            assert ((got - exact).abs() <= exact.abs() / 16 + step).all(), name


def test_rows_are_those_of_the_whole_tensor(official: Path, tmp_path: Path) -> None:
    scaled = open_source(layouts.write_comfy(tmp_path / "models", "fp8_scaled"))
    cases: list[tuple[Source, Part, str]] = [
        (open_source(TINY), "text_encoder", "shared.weight"),
        (open_source(official), "text_encoder", "shared.weight"),
        (open_source(official), "image_encoder", "encoder.layers.1.self_attn.k_proj.weight"),
        (scaled, "transformer", "blocks.3.ffn.net.2.weight"),
    ]
    for source, part, name in cases:
        tensors = source.part(part)
        assert torch.equal(tensors.row_range(name, 5, 17), tensors[name][5:17])
        assert torch.equal(tensors.rows(name, [3, 40, 3]), tensors[name][[3, 40, 3]])


def spoil(comfy: Path, tmp_path: Path, change: object) -> Path:
    folder = Path(shutil.copytree(comfy, tmp_path / "models"))
    file = next((folder / "diffusion_models").iterdir())
    state = load_file(file)
    change(state)  # type: ignore[operator]
    save_file(state, file)
    return folder


def test_a_missing_tensor_is_named(comfy: Path, tmp_path: Path) -> None:
    folder = spoil(comfy, tmp_path, lambda state: state.pop("model.diffusion_model.blocks.2.cross_attn.k_img.bias"))
    with pytest.raises(
        WrongModel, match=r"1 of its 216 tensors are missing, among them blocks\.2\.attn2\.add_k_proj\.bias"
    ):
        open_source(folder)


def test_a_tensor_too_many_is_named(comfy: Path, tmp_path: Path) -> None:
    extra = "model.diffusion_model.blocks.2.surprise.weight"
    folder = spoil(comfy, tmp_path, lambda state: state.update({extra: torch.ones(2)}))
    with pytest.raises(WrongModel, match=r"blocks\.2\.surprise\.weight"):
        open_source(folder)


def test_a_wrong_shape_is_named(comfy: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.blocks.2.ffn.0.bias"
    folder = spoil(comfy, tmp_path, lambda state: state.update({name: torch.ones(7)}))
    with pytest.raises(WrongModel, match=r"blocks\.2\.ffn\.net\.0\.proj\.bias.*\[7\] and should be \[512\]"):
        open_source(folder)


@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf"), -1.0])
def test_a_scale_that_is_no_number_is_damage(value: float, tmp_path: Path) -> None:
    folder = layouts.write_comfy(tmp_path / "made", "fp8_scaled")
    name = "model.diffusion_model.blocks.2.ffn.0.scale_weight"
    spoilt = spoil(folder, tmp_path, lambda state: state.update({name: torch.tensor(value)}))
    with pytest.raises(CorruptModel, match=r"blocks\.2\.ffn\.0\.weight.*NaN, infinite or zero"):
        open_source(spoilt).part("transformer")["blocks.2.ffn.net.0.proj.weight"]


def test_a_lost_scale_is_damage(tmp_path: Path) -> None:
    folder = layouts.write_comfy(tmp_path / "made", "fp8_scaled")
    name = "model.diffusion_model.blocks.2.ffn.0.scale_weight"
    with pytest.raises(CorruptModel, match=r"blocks\.2\.ffn\.0\.weight.*has no scale"):
        open_source(spoil(folder, tmp_path, lambda state: state.pop(name)))


def test_a_quantization_of_comfy_that_is_not_read_is_named(tmp_path: Path) -> None:
    folder = layouts.write_comfy(tmp_path / "made", "fp8_marked")
    mark = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    name = "model.diffusion_model.blocks.2.ffn.0.comfy_quant"
    with pytest.raises(NotAvailable, match="nvfp4"):
        open_source(spoil(folder, tmp_path, lambda state: state.update({name: mark})))


def test_comfys_plain_int8_is_read(tmp_path: Path) -> None:
    folder = layouts.write_comfy(tmp_path / "made", "fp8_marked")
    file = next((folder / "diffusion_models").iterdir())
    state = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".comfy_quant")}
    name = "model.diffusion_model.blocks.2.ffn.0.weight"
    state[name] = torch.randint(-127, 128, state[name].shape, dtype=torch.int8)
    state[f"{name}_scale"] = torch.rand(state[name].shape[0], 1) + 0.1
    layers = {name.removesuffix(".weight"): {"format": "int8_tensorwise"}}
    save_file(state, file, {"_quantization_metadata": json.dumps({"layers": layers})})
    read = open_source(folder).part("transformer")["blocks.2.ffn.net.0.proj.weight"]
    assert torch.equal(read, state[name].float() * state[f"{name}_scale"])


@pytest.mark.parametrize("bits", ["int8", "int4", "int4 that keeps zero", "fp8"])
def test_what_quanto_saved_reads_as_quanto_reads_it(bits: str, tmp_path: Path) -> None:
    """Its int4 in groups of 128 inputs, as it makes them itself; the numbers are quanto's, bit for bit."""
    from optimum.quanto import MaxOptimizer, freeze, qfloat8_e4m3fn, qint4, qint8, quantize

    from wan_local.models.transformer import Transformer
    from wan_local.settings import known_models

    class Zeropoint(MaxOptimizer):  # type: ignore[misc]
        """Quanto's own, told to make shifts that are whole numbers."""

        def __call__(self, *args: object, **named: object) -> object:
            return super().__call__(*args, **named, zeropoint=True)

    with torch.device("meta"):
        shapes = Transformer(known_models()[1].transformer)
    state = tiny("transformer")
    whole = torch.nn.Module()
    linears = [
        name for name, _ in shapes.named_modules() if f"{name}.weight" in state and state[f"{name}.weight"].dim() == 2
    ]
    linears = [name for name in linears if name.startswith("blocks.")]
    for name in linears:
        weight = state[f"{name}.weight"].float()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"].float()})
        whole.add_module(name.replace(".", "/"), linear)
    kind = {"int8": qint8, "fp8": qfloat8_e4m3fn}.get(bits, qint4)
    quantize(whole, weights=kind, optimizer=Zeropoint() if "zero" in bits else None)
    freeze(whole)
    stored = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in linears}
    stored |= {name.replace("/", "."): tensor for name, tensor in whole.state_dict().items()}
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()},
        next((folder / "transformer").glob("*.safetensors")),
    )
    tensors = open_source(folder).part("transformer")
    for name in linears:
        expected = whole.get_submodule(name.replace(".", "/")).weight.dequantize()
        got = tensors[f"{name}.weight"]
        stored_as = tensors.stored(f"{name}.weight")
        assert stored_as.scale is not None and ("zero" in bits) == (getattr(stored_as.shift, "dtype", "") == "U8")
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
        assert torch.equal(tensors.row_range(f"{name}.weight", 3, 9), got[3:9])


def test_an_embedding_in_plain_8_bits_beside_scaled_linears_is_read(tmp_path: Path) -> None:
    folder = layouts.write_comfy(tmp_path / "made", "fp8_scaled")
    file = next((folder / "text_encoders").iterdir())
    state = load_file(file)
    state["shared.weight"] = state["shared.weight"].to(torch.float8_e4m3fn)
    save_file(state, file)
    read = open_source(folder).part("text_encoder")["shared.weight"]
    assert torch.equal(read, state["shared.weight"].bfloat16())


def scaled(part: Part, *, rows: bool, dtype: torch.dtype = torch.int8) -> layouts.State:
    """Return a part as LightX2V's files of 8 bits have it: a scale for each row, or one for a tensor."""
    most = 127 if dtype == torch.int8 else 448
    state = layouts.official(part)
    for name in [
        name for name, tensor in state.items() if tensor.dim() == 2 and re.search(r"blocks|transformer", name)
    ]:
        numbers = state[name].float()
        scale = (numbers.abs().amax(1, keepdim=True) if rows else numbers.abs().max().view(1)) / most
        rounded = (numbers / scale).round() if dtype == torch.int8 else numbers / scale
        state[name], state[f"{name}_scale"] = rounded.to(dtype), scale
    return state


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("part", ["text_encoder", "image_encoder"])
def test_scales_in_a_pickle_are_those_of_its_safetensors_twin(
    part: Part, rows: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = scaled(part, rows=rows, dtype=dtype)
    torch.save(state, tmp_path / "model.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert inspect(tmp_path / "model.pth").parts[0].quantization.endswith(", scaled")
    got, expected = (
        open_source(TINY, **{part: tmp_path / f"model.{end}"}).part(part)  # type: ignore[arg-type]
        for end in ("pth", "safetensors")
    )
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
        assert torch.equal(got.row_range(name, 1, 3), expected.row_range(name, 1, 3)), name


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_scale_in_a_pickle_that_is_none_is_damage(value: float, tmp_path: Path) -> None:
    state = scaled("text_encoder", rows=True)
    state["blocks.0.ffn.fc1.weight_scale"][2] = value
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CorruptModel, match=r"blocks\.0\.ffn\.fc1\.weight_scale.* is negative, NaN"):
        inspect(tmp_path / "model.pth")
    with pytest.raises(CorruptModel, match=r"a scale of 'blocks\.0\.ffn\.fc1\.weight'.* is negative, NaN"):
        open_source(TINY, text_encoder=tmp_path / "model.pth").part("text_encoder")[
            "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
        ]


def test_what_a_pickle_holds_of_other_tensors_and_turned_round_is_read(tmp_path: Path) -> None:
    """As `t()`, rows of a larger tensor and a memory format leave them: not row by row, or not from the first on."""
    state = layouts.official("vae")
    for name, tensor in state.items():
        larger = torch.cat((tensor.flatten(), torch.ones(5)))
        state[name] = larger[: tensor.numel()].view(tensor.shape)
        if tensor.dim() == 5:
            state[name] = state[name].to(memory_format=torch.channels_last_3d)
    state["conv1.bias"] = torch.stack((torch.zeros(32), state["conv1.bias"]), dim=1)[:, 1]
    torch.save(state, tmp_path / "model.pth")
    tensors = open_source(TINY, vae=tmp_path / "model.pth").part("vae")
    for name, expected in tiny("vae").items():
        assert torch.equal(tensors[name], expected), name
        assert torch.equal(tensors.row_range(name, 2, 5), expected[2:5]), name


def test_a_pickle_that_is_replaced_while_it_is_read_is_an_error(official: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(official, tmp_path / "model"))
    tensors = open_source(folder).part("vae")
    torch.save(layouts.official("vae"), folder / "Wan2.1_VAE.pth")
    with pytest.raises(CorruptModel, match="was changed while it was in use"):
        tensors["encoder.conv_in.weight"]
