from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import checkpoint_kinds as kinds
from tests import layouts
from tests.checkpoint_kinds import Header, fp8, of, official, transformer
from wan_local.cli import main
from wan_local.convert import Conversion, convert
from wan_local.errors import CorruptModel, ModelNotFound, NotAvailable
from wan_local.header import read_safetensors
from wan_local.inspection import Inspection, PartReport, inspect
from wan_local.sources import open_part, open_source
from wan_local.weight_files import read_weights
from wan_local.weight_format import WeightFormat, WeightFormats

FLF2V = "Wan2.1 FLF2V 14B 720P"


def flf2v() -> dict[str, tuple[int, ...]]:
    return official("transformer", transformer(table=True))


def one(path: Path) -> PartReport:
    """Inspect a file within the time that is promised, and return its one part."""
    started = time.monotonic()
    found = inspect(path)
    assert time.monotonic() - started < 2
    (part,) = found.parts
    assert json.loads(json.dumps(found.as_json()))["parts"][0]["name"] == part.kind.name
    return part


def wan_lora(width: int) -> Header:
    blocks = range(40 if width == 5120 else 30)
    linears = {f"blocks.{index}.self_attn.{letter}": (width, width) for index in blocks for letter in "qkvo"}
    return kinds.pairs("diffusion_model.", linears)


TEXT_TO_VIDEO = {  # of folders and files, and what the transformer in them is called
    "low_vram/wan2.1_t2v_14B_fp8.safetensors": "Wan2.1 T2V 14B",
    "low_vram/t2v_14B.safetensors": "Wan2.1 T2V 14B",
    "highres/Wan2_1-T2V-14B_high.safetensors": "Wan2.1 T2V 14B",
    "wan2.2/wan2.1_t2v_14B.safetensors": "Wan2.1 T2V 14B",
    "x/wan_t2v_lownoise.safetensors": "Wan2.2 T2V A14B (low noise)",
    "x/Wan2_2-T2V-A14B-HIGH_fp8.safetensors": "Wan2.2 T2V A14B (high noise)",
    "x/T2V-A14B-slow.safetensors": "Wan2.2 T2V A14B",
    "x/wan22_t2v_14B.safetensors": "Wan2.2 T2V A14B",
}
OTHER_LORAS: dict[str, Callable[[], Header]] = {
    "ltx": lambda: kinds.pairs("transformer.", {"transformer_blocks.3.attn1.to_q": (2048, 2048)}),
    "ltx, comfy": lambda: kinds.pairs("diffusion_model.", {"transformer_blocks.3.attn1.to_q": (2048, 2048)}),
    "cogvideox": lambda: kinds.pairs("transformer.", {"transformer_blocks.3.attn1.to_q": (3072, 3072)}),
    "cosmos": lambda: kinds.pairs("diffusion_model.", {"blocks.3.self_attn.q_proj": (2048, 2048)}),
    "sdxl": lambda: kinds.pairs(
        "unet.", {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640)}, "lora.down lora.up"
    ),
    "flux, with a name of ours": lambda: kinds.pairs(
        "transformer.", {"single_transformer_blocks.0.attn.to_q": (3072, 3072), "proj_out": (64, 3072)}
    ),
}


# file name, header, what it is called, whether it can be used, and layers
Case = tuple[str, Callable[[], Header], str, bool, int | None]
CASES: dict[str, Case] = {
    "flf2v, official names": ("model.safetensors", lambda: of("BF16", flf2v()), FLF2V, True, 40),
    "flf2v, diffusers names": ("model.safetensors", lambda: of("F32", transformer(table=True)), FLF2V, True, 40),
    "flf2v, comfy": (
        "wan2.1_flf2v_720p_14B_fp16.safetensors",
        lambda: of("F16", flf2v(), "model.diffusion_model."),
        FLF2V,
        True,
        40,
    ),
    "flf2v, comfy fp8": ("flf2v_fp8.safetensors", lambda: fp8(flf2v()), FLF2V, True, 40),
    "flf2v that lost its table": (
        "wan2.1-flf2v-14B.safetensors",
        lambda: of("BF16", official("transformer", transformer())),
        "Wan2.1 FLF2V 14B that has lost its image position table",
        False,
        40,
    ),
    "i2v, unknown": (
        "model.safetensors",
        lambda: of("BF16", official("transformer", transformer())),
        "Wan2.1 I2V 14B (480P or 720P)",
        False,
        40,
    ),
    "i2v 480": (
        "wan2.1_i2v_480p_14B.safetensors",
        lambda: of("BF16", official("transformer", transformer())),
        "Wan2.1 I2V 14B 480P",
        False,
        40,
    ),
    "i2v 720": (
        "wan2.1_i2v_720p_14B.safetensors",
        lambda: of("BF16", transformer()),
        "Wan2.1 I2V 14B 720P",
        False,
        40,
    ),
    "fun-inp 14B": (
        "Wan2.1-Fun-14B-InP.safetensors",
        lambda: of("BF16", official("transformer", transformer())),
        "Wan2.1 Fun-InP 14B",
        False,
        40,
    ),
    "fun-inp 1.3B": (
        "model.safetensors",
        lambda: of("BF16", official("transformer", transformer(size="1.3B"))),
        "Wan2.1 Fun-InP 1.3B",
        False,
        30,
    ),
    "fun-control": (
        "model.safetensors",
        lambda: of("BF16", official("transformer", transformer(channels=48))),
        "Wan2.1 Fun-Control 14B",
        False,
        40,
    ),
    "t2v 14B": (
        "model.safetensors",
        lambda: of("BF16", official("transformer", transformer(channels=16, images=False))),
        "Wan2.1 T2V 14B",
        False,
        40,
    ),
    "t2v 1.3B": (
        "model.safetensors",
        lambda: of("BF16", transformer(size="1.3B", channels=16, images=False)),
        "Wan2.1 T2V 1.3B",
        False,
        30,
    ),
    **{
        f"named {place}": (place, lambda: of("BF16", transformer(channels=16, images=False)), name, False, 40)
        for place, name in TEXT_TO_VIDEO.items()
    },
    "2.2 vace-fun high": (
        "high_noise_model/model.safetensors",
        lambda: of("BF16", kinds.vace("14B")),
        "Wan2.2 VACE-Fun A14B (high noise)",
        False,
        40,
    ),
    "2.2 vace-fun": (
        "Wan2.2-VACE-Fun-A14B.safetensors",
        lambda: of("BF16", kinds.vace("14B")),
        "Wan2.2 VACE-Fun A14B",
        False,
        40,
    ),
    "vace module": (
        "Wan2_1-VACE_module_14B_bf16.safetensors",
        lambda: {name: entry for name, entry in of("BF16", kinds.vace("14B")).items() if name.startswith("vace_")},
        "the VACE blocks of Wan2.1 VACE 14B",
        False,
        8,
    ),
    "2.2 vace module": (
        "Wan2_2_Fun_VACE_module_A14B_HIGH_bf16.safetensors",
        lambda: {name: entry for name, entry in of("BF16", kinds.vace("14B")).items() if name.startswith("vace_")},
        "the VACE blocks of Wan2.2 VACE-Fun A14B (high noise)",
        False,
        8,
    ),
    "2.2 fun-inp 5B": (
        "model.safetensors",
        lambda: of("BF16", official("transformer", transformer(size="5B", channels=100, images=False, out=48))),
        "Wan2.2 Fun-InP 5B",
        False,
        30,
    ),
    "2.2 fun-control 5B": (
        "model.safetensors",
        lambda: (
            of("BF16", official("transformer", transformer(size="5B", channels=148, images=False, out=48)))
            | {"ref_conv.weight": ("BF16", (3072, 48, 2, 2))}
        ),
        "Wan2.2 Fun-Control 5B",
        False,
        30,
    ),
    "vace 14B": ("model.safetensors", lambda: of("BF16", kinds.vace("14B")), "Wan2.1 VACE 14B", False, 40),
    "vace 1.3B": ("model.safetensors", lambda: of("BF16", kinds.vace("1.3B")), "Wan2.1 VACE 1.3B", False, 30),
    "2.2 i2v high": (
        "wan2.2_i2v_high_noise_14B_fp16.safetensors",
        lambda: of("BF16", official("transformer", transformer(images=False))),
        "Wan2.2 I2V A14B (high noise)",
        False,
        40,
    ),
    "2.2 i2v": (
        "model.safetensors",
        lambda: of("BF16", transformer(images=False)),
        "Wan2.2 I2V A14B",
        False,
        40,
    ),
    "2.2 t2v low": (
        "wan2.2_t2v_low_noise_14B.safetensors",
        lambda: of("BF16", official("transformer", transformer(channels=16, images=False))),
        "Wan2.2 T2V A14B (low noise)",
        False,
        40,
    ),
    "2.2 ti2v 5B": (
        "model.safetensors",
        lambda: of("BF16", official("transformer", transformer(size="5B", channels=48, images=False, out=48))),
        "Wan2.2 TI2V 5B",
        False,
        30,
    ),
    "vae 2.1, official": (
        "wan_2.1_vae.safetensors",
        lambda: of("BF16", official("vae", kinds.vae())),
        "Wan2.1 VAE",
        True,
        None,
    ),
    "vae 2.1, diffusers": ("model.safetensors", lambda: of("F32", kinds.vae()), "Wan2.1 VAE", True, None),
    "vae 2.2": (
        "model.safetensors",
        lambda: of("F32", kinds.vae_2_2()),
        "Wan2.2 VAE (48 channels, of TI2V 5B)",
        False,
        None,
    ),
    "umt5, official": (
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        lambda: of("BF16", official("text_encoder", kinds.text_encoder())),
        "UMT5-XXL",
        True,
        24,
    ),
    "umt5, comfy": (
        "umt5_xxl_fp16.safetensors",
        lambda: of("F16", kinds.text_encoder()) | {"spiece_model": ("U8", (4_548_313,))},
        "UMT5-XXL",
        True,
        24,
    ),
    "umt5, whole": (
        "model.safetensors",
        lambda: (
            of("F32", kinds.text_encoder())
            | {"decoder.final_layer_norm.weight": ("F32", (4096,)), "lm_head.weight": ("F32", (256384, 4096))}
        ),
        "UMT5-XXL",
        True,
        24,
    ),
    "t5 of flux": (
        "t5xxl_fp16.safetensors",
        lambda: of("F16", kinds.text_encoder() | {"shared.weight": (32128, 4096)}),
        "T5 v1.1 XXL, the text encoder of FLUX and SD3",
        False,
        24,
    ),
    "clip, official": (
        "clip.safetensors",
        lambda: (
            of("F16", official("image_encoder", kinds.image_encoder()))
            | {"textual.head.0.weight": ("F16", (1024, 1024)), "log_scale": ("F16", ())}
        ),
        "CLIP ViT-H/14",
        True,
        32,
    ),
    "clip, comfy": (
        "clip_vision_h.safetensors",
        lambda: of("F16", kinds.image_encoder(), "vision_model.") | {"visual_projection.weight": ("F16", (1024, 1280))},
        "CLIP ViT-H/14",
        True,
        32,
    ),
    "lora, original": (
        "lora.safetensors",
        lambda: kinds.lora("original"),
        "a LoRA for Wan I2V 14B",
        True,
        40,
    ),
    "lora, diffusers": (
        "lora.safetensors",
        lambda: kinds.lora("diffusers", images=False),
        "a LoRA for Wan T2V 14B",
        True,
        40,
    ),
    "lora, kohya, attention": (
        "lora.safetensors",
        lambda: kinds.lora("kohya", images=False, attention_only=True),
        "a LoRA for Wan T2V 14B",
        True,
        40,
    ),
    "lora of flux": (
        "lora.safetensors",
        lambda: {
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": ("BF16", (16, 3072)),
            "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": ("BF16", (3072, 16)),
        },
        "a LoRA for another network",
        False,
        None,
    ),
    **{
        f"lora of {network}": ("lora.safetensors", header, "a LoRA for another network", False, None)
        for network, header in OTHER_LORAS.items()
    },
    "lora of 1.3B": ("lora.safetensors", lambda: wan_lora(1536), "a LoRA for Wan T2V 1.3B", False, 30),
    "lora of 5B": ("lora.safetensors", lambda: wan_lora(3072), "a LoRA for Wan TI2V 5B", False, 30),
    "dora of peft": (
        "lora.safetensors",
        lambda: wan_lora(5120) | {"diffusion_model.blocks.0.self_attn.q.lora_magnitude_vector": ("F32", (5120,))},
        "an adapter of the kind DoRA",
        False,
        None,
    ),
    "lokr": (
        "lora.safetensors",
        lambda: {"lycoris_blocks_0_self_attn_q.lokr_w1": ("BF16", (16, 16))},
        "an adapter of the kind LoKr",
        False,
        None,
    ),
    "flux": (
        "flux1-dev.safetensors",
        lambda: {"double_blocks.0.img_attn.qkv.weight": ("BF16", (9216, 3072))},
        "FLUX or HunyuanVideo",
        False,
        None,
    ),
    "all in one": (
        "wan-aio.safetensors",
        lambda: {
            **of("BF16", flf2v(), "model.diffusion_model."),
            "first_stage_model.conv1.weight": ("BF16", (32, 32, 1, 1, 1)),
        },
        "an all-in-one checkpoint",
        False,
        None,
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_checkpoint_is_called_by_its_name(case: str, tmp_path: Path) -> None:
    name, header, expected, usable, layers = CASES[case]
    file = kinds.write(tmp_path / "x" / name, header())
    part = one(file)
    assert (part.kind.name, part.usable, part.kind.layers) == (expected, usable, layers)
    assert not part.problem
    assert usable or any(words in part.kind.advice for words in ("Get ", "only", "names", "does not fit"))
    assert part.nbytes == sum(part.dtypes.values())


def test_a_lora_that_does_not_fit_says_where(tmp_path: Path) -> None:
    file = kinds.write(tmp_path / "lora.safetensors", wan_lora(1536))
    assert "changes a tensor of [1536, 1536], and 'blocks.0.attn1.to_q.weight' is [5120, 5120]" in one(file).kind.advice
    half = kinds.write(tmp_path / "half.safetensors", dict(list(wan_lora(5120).items())[:-1]))
    assert not one(half).usable and "its other half is missing" in one(half).kind.advice
    assert main(["inspect", str(file)]) == 1


def test_a_lora_in_a_pickle_is_not_usable(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, (_, shape) in wan_lora(5120).items()}
    torch.save(dict(list(tensors.items())[:2]), tmp_path / "lora.pt")
    part = one(tmp_path / "lora.pt")
    assert part.kind.usable and not part.usable and "as .safetensors only" in part.problem


def test_twins_are_said_to_be_twins(tmp_path: Path) -> None:
    i2v = one(kinds.write(tmp_path / "a" / "model.safetensors", of("BF16", transformer())))
    assert "can't be told from the header" in i2v.kind.notes[0]
    t2v = one(kinds.write(tmp_path / "a" / "t.safetensors", of("BF16", transformer(channels=16, images=False))))
    assert "Wan2.2 T2V A14B" in t2v.kind.notes[0]
    vace = one(kinds.write(tmp_path / "a" / "v.safetensors", of("BF16", kinds.vace("14B"))))
    assert "Wan2.2 VACE-Fun A14B" in vace.kind.notes[1]
    vae = one(kinds.write(tmp_path / "a" / "vae.safetensors", of("BF16", kinds.vae())))
    assert vae.usable and "Qwen-Image" in vae.kind.notes[0]


def test_bytes_of_the_loop_are_a_quarter_less_than_all(tmp_path: Path) -> None:
    part = one(kinds.write(tmp_path / "a" / "model.safetensors", of("BF16", flf2v())))
    assert part.nbytes / 2 == part.parameters == pytest.approx(16.4e9, rel=0.01)
    assert (part.nbytes - part.once_bytes) / 2 == pytest.approx(11.95e9, rel=0.005)


def test_an_official_repository_of_80_gigabytes_is_known_in_two_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.1-FLF2V-14B-720P"
    folder.mkdir()
    kinds.write_shards(folder, "diffusion_pytorch_model", of("F32", flf2v()), 7)
    torch.save(layouts.official("vae"), folder / "Wan2.1_VAE.pth")
    started = time.monotonic()
    found = inspect(folder)
    assert time.monotonic() - started < 2
    assert found.layout == "official" and found.nbytes > 65e9
    assert {part.kind.part: part.files for part in found.parts} == {"transformer": 7, "vae": 1}
    assert list(found.missing) == ["text_encoder", "image_encoder", "tokenizer"]
    assert "umt5" in found.missing["text_encoder"]


def test_a_diffusers_folder_is_whole() -> None:
    found = inspect(layouts.TINY)
    assert (found.layout, found.missing, found.usable) == ("diffusers", {}, True)
    assert {part.kind.part for part in found.parts} == {"transformer", "vae", "text_encoder", "image_encoder"}


@pytest.mark.parametrize(("form", "words"), [("fp8", "fp8 e4m3, unscaled"), ("fp8_scaled", "fp8 e4m3, scaled")])
def test_comfys_files_side_by_side_are_whole(form: str, words: str, tmp_path: Path) -> None:
    found = inspect(layouts.write_comfy(tmp_path / "models", form))
    assert found.usable and not found.missing and found.layout == "files side by side"
    assert next(part for part in found.parts if part.kind.part == "transformer").quantization == words


def test_a_gguf_tells_its_blocks(tmp_path: Path) -> None:
    def fits(name: str, tensor: torch.Tensor) -> bool:
        return "blocks." in name and tensor.dim() == 2

    file = layouts.write_gguf(tmp_path / "flf2v.gguf", layouts.official("transformer"), "Q5_1", where=fits)
    found = inspect(file)
    assert found.layout == "GGUF" and found.usable
    assert found.parts[0].quantization == "GGUF Q5_1" and "tiny FLF2V" in found.parts[0].kind.name


def quanto(shapes: dict[str, tuple[int, ...]], *, bits: int) -> Header:
    header: Header = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.startswith("blocks.") or not name.endswith(".weight"):
            header[name] = ("BF16", shape)
            continue
        packed = ("I8", shape) if bits == 8 else ("U8", (shape[0] // 2, shape[1]))
        header[f"{name}._data" + ("._data" if bits == 4 else "")] = packed
        header[f"{name}._scale"] = ("BF16", (shape[0], 1))
        if bits == 4:
            header[f"{name}._shift"] = ("BF16", (shape[0], 1))
        header[f"{name.removesuffix('weight')}input_scale"] = ("BF16", ())
    return header


@pytest.mark.parametrize("bits", [8, 4])
def test_what_quanto_saved_is_known(bits: int, tmp_path: Path) -> None:
    file = kinds.write(tmp_path / "q" / "model.safetensors", quanto(transformer(table=True), bits=bits))
    part = one(file)
    assert (part.kind.name, part.quantization) == (FLF2V, f"quanto int{bits}")
    assert (
        part.usable
        and part.parameters
        == one(kinds.write(tmp_path / "plain" / "model.safetensors", of("BF16", transformer(table=True)))).parameters
    )


def comfy(dtype: str, form: object, place: str) -> tuple[Header, dict[str, str]]:
    """Return a header of Comfy's with a scale for each row, and its metadata; the form of all layers is `form`."""
    header, layers = of("BF16", flf2v(), "model.diffusion_model."), {}
    for name, (_, shape) in list(header.items()):
        if len(shape) == 2 and ".blocks." in name and name.endswith(".weight"):
            header |= {name: (dtype, shape), f"{name}_scale": ("F32", (shape[0], 1))}
            layers[name.removesuffix(".weight")] = form
    if place == "metadata":
        return header, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    mark = ("U8", (len(json.dumps(form)),))
    return header | {f"{layer}.comfy_quant": mark for layer in layers}, {}


COMFY: list[tuple[str, dict[str, object], str]] = [
    ("F8_E4M3", {"format": "float8_e4m3fn"}, ""),
    ("F8_E4M3", {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, ""),
    ("I8", {"format": "int8_tensorwise"}, ""),
    ("I8", {"format": "int8_tensorwise", "convrot": False}, ""),
    ("I8", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "'int8_tensorwise' with convrot"),
    ("I8", {"format": "int8_blockwise", "group_size": 128}, "quantized as 'int8_blockwise', which"),
    ("U8", {"format": "float8_e4m3fn"}, "stored as U8 without a shift"),
    ("F8_E4M3", {}, "quantized as 'None'"),
]


@pytest.mark.parametrize("place", ["metadata", "tensors"])
@pytest.mark.parametrize(("dtype", "form", "problem"), COMFY)
def test_what_comfy_says_of_its_layers_counts_wherever_it_says_it(
    dtype: str, form: dict[str, object], problem: str, place: str, tmp_path: Path
) -> None:
    header, metadata = comfy(dtype, form, place)
    file = kinds.write(tmp_path / "c" / "model.safetensors", header, metadata)
    with file.open("r+b") as stream:
        for name, info in read_safetensors(file).tensors.items():
            if name.endswith(".comfy_quant"):
                stream.seek(info.offset)
                stream.write(json.dumps(form).encode())
    part = one(file)
    assert part.kind.name == FLF2V and part.usable == (not problem) and problem in part.problem
    if problem:
        with pytest.raises(NotAvailable, match=re.escape(problem)):
            open_part("transformer", read_weights(file), part.kind, kinds.REAL)


@pytest.mark.parametrize("text", ["{", '"layers"', "[]", '{"layers": []}', "[" * 100_000], ids=lambda text: text[:16])
def test_a_damaged_table_of_comfys_layers_is_damage(text: str, tmp_path: Path) -> None:
    header, _ = comfy("F8_E4M3", {}, "metadata")
    with pytest.raises(CorruptModel, match=r"_quantization_metadata of 'model\.safetensors' "):
        inspect(kinds.write(tmp_path / "c" / "model.safetensors", header, {"_quantization_metadata": text}))


def test_the_table_of_every_shard_counts(tmp_path: Path) -> None:
    header, metadata = comfy("I8", {"format": "int8_tensorwise", "convrot": True}, "metadata")
    names = list(header)
    for number, said in ((1, {"_quantization_metadata": '{"layers": {}}'}), (2, metadata)):
        some = {name: header[name] for name in names[number - 1 :: 2]}
        kinds.write(tmp_path / f"model-{number:05d}-of-00002.safetensors", some, said)
    assert "with convrot" in one(tmp_path / "model-00001-of-00002.safetensors").problem


@pytest.mark.parametrize(("dtype", "usable"), [("U8", True), ("I8", True), ("I32", False)])
def test_quantos_shifts_may_be_whole_numbers_of_a_byte(dtype: str, usable: bool, tmp_path: Path) -> None:
    header = quanto(transformer(table=True), bits=4)
    header = {name: (dtype if name.endswith("._shift") else kind, shape) for name, (kind, shape) in header.items()}
    part = one(kinds.write(tmp_path / "q" / "model.safetensors", header))
    assert part.usable == usable and usable == ("stored as I32" not in part.problem)


def test_a_transformer_with_tensors_missing_is_not_usable_and_says_which(tmp_path: Path) -> None:
    shapes = flf2v()
    del shapes["blocks.7.ffn.0.bias"]
    part = one(kinds.write(tmp_path / "a" / "model.safetensors", of("BF16", shapes)))
    assert not part.usable and "blocks.7.ffn.net.0.proj.bias" in part.problem


def with_one(**changed: tuple[str, tuple[int, ...]]) -> Header:
    return of("BF16", flf2v()) | {name.replace("__", "."): entry for name, entry in changed.items()}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (
            lambda: with_one(blocks__3__ffn__0__weight=("BF16", (13824, 5119))),
            r"[13824, 5119] and should be [13824, 5120]",
        ),
        (lambda: with_one(blocks__3__ffn__0__weight=("I32", (13824, 5120))), "stored as I32, which wan_local does not"),
        (lambda: with_one(blocks__3__ffn__0__weight=("I8", (13824, 5120))), "stored as I8 without a scale"),
        (lambda: with_one(blocks__3__surprise=("BF16", (4,))), "do not belong to the transformer"),
        (lambda: {n: e for n, e in with_one().items() if ".17." not in n}, "32 of its 1304 tensors are missing"),
    ],
    ids=["shape", "dtype", "no scales", "too many", "a block lost"],
)
def test_what_could_not_be_converted_is_not_said_to_be_usable(
    header: Callable[[], Header], says: str, tmp_path: Path
) -> None:
    part = one(kinds.write(tmp_path / "a" / "model.safetensors", header()))
    assert part.kind.name == FLF2V and not part.usable and says in part.problem


@pytest.mark.parametrize("format_", ["int8", "int4", "fp8"])
def test_a_store_is_known_in_every_format(format_: WeightFormat, tmp_path: Path) -> None:
    convert(Conversion(open_source(layouts.TINY), WeightFormats(format_)), tmp_path / "store")
    found = inspect(tmp_path / "store")
    assert (found.layout, found.usable, found.missing) == ("wan_local store", True, {})
    assert found.parts[0].quantization == ("fp8 e4m3, scaled" if format_ == "fp8" else f"{format_}, scaled")


def test_scales_that_are_zero_are_damage(tmp_path: Path) -> None:
    file = kinds.write(tmp_path / "a" / "model.safetensors", fp8(flf2v(), scaled=True))  # its data is a hole: zeros
    with pytest.raises(CorruptModel, match=r"scale_weight.*NaN, infinite or zero"):
        inspect(file)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no weights"):
        inspect(tmp_path)
    with pytest.raises(ModelNotFound, match="there is no file or folder"):
        inspect(tmp_path / "nowhere")


def test_the_command_prints_json_and_says_by_its_code_whether_it_is_of_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(layouts.TINY), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "diffusers"
    wrong = kinds.write(
        tmp_path / "a" / "model.safetensors", of("BF16", transformer(size="1.3B", channels=16, images=False))
    )
    assert main(["inspect", str(wrong)]) == 1
    said = capsys.readouterr().out
    assert "Wan2.1 T2V 1.3B" in said and "Get Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers" in said


def test_the_command_imports_no_torch() -> None:
    program = (
        "import sys; from wan_local.cli import main; code = main(['inspect', sys.argv[1]]); "
        "assert 'torch' not in sys.modules, 'torch'; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(layouts.TINY)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_inspection_is_plain_data(tmp_path: Path) -> None:
    found: Inspection = inspect(layouts.TINY)
    table = found.as_json()
    assert table["parts"][0]["loop_bytes"] < table["parts"][0]["bytes"]
    assert table["bytes"] == found.nbytes
