from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import layouts
from tests.parity import relative_error
from wan_local.block_reader import BlockReader
from wan_local.checkpoint import PartTensors, find_model, open_model
from wan_local.errors import CorruptModel, ModelNotFound, NotAvailable, WrongModel
from wan_local.header import read_header
from wan_local.inspection import inspect
from wan_local.key_map import Part
from wan_local.settings import load_settings
from wan_local.stage import load_network
from wan_local.weight_files import read_part

TINY = Path(str(resources.files("wan_local"))) / "tiny_model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, file, {"format": "pt"})
    return file


def test_header_tells_shapes_dtypes_and_bytes(weights: Path) -> None:
    infos = read_header(weights)
    assert (infos["a"].dtype, infos["a"].shape, infos["a"].nbytes) == ("F32", (2, 3), 24)
    assert (infos["b"].dtype, infos["b"].shape, infos["b"].nbytes) == ("BF16", (5,), 10)


def cut(at: Callable[[int, int], int]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        header = int.from_bytes(content[:8], "little")
        return content[: at(len(content), header)]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut(lambda size, header: 0),
        cut(lambda size, header: 4),
        cut(lambda size, header: 8),
        cut(lambda size, header: 8 + header // 2),
        cut(lambda size, header: 8 + header),
        cut(lambda size, header: size - 7),
        cut(lambda size, header: size - 1),
        lambda content: content + b"\0",
        lambda content: (2**63).to_bytes(8, "little") + content[8:],
        lambda content: content.replace(b"[0,24]", b"[0,25]"),
        lambda content: content.replace(b"[24,34]", b"[20,34]"),
        lambda content: content.replace(b"[2,3]", b"[3,3]"),
        lambda content: content.replace(b'"F32"', b'"F99"'),
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
        lambda content: b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>",
        lambda content: b"\x10\0\0\0\0\0\0\0not json at all!",
    ],
)
def test_a_damaged_file_is_one_clear_error_and_fast(weights: Path, damage: Callable[[bytes], bytes]) -> None:
    content = weights.read_bytes()
    spoilt = damage(content)
    assert spoilt != content
    weights.write_bytes(spoilt)
    started = time.monotonic()
    with pytest.raises(CorruptModel, match=r"weights\.safetensors"):
        read_header(weights)
    assert time.monotonic() - started < 2


def test_without_weights_the_error_says_what_to_download_how_much_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("WAN_LOCAL_MODEL", raising=False)
    with pytest.raises(ModelNotFound) as caught:
        find_model(load_settings(models_dir=tmp_path))
    message = str(caught.value)
    for part in (
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        "80 GB",
        "wan-local download",
        'model="tiny"',
        str(tmp_path),
    ):
        assert part in message


def test_a_downloaded_model_is_found_in_the_models_folder_and_in_the_hub_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny files stand in for the large ones; where they lie is what matters."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("WAN_LOCAL_MODEL", raising=False)
    snapshot = tmp_path / "hub" / "models--Wan-AI--Wan2.1-FLF2V-14B-720P-diffusers" / "snapshots" / "0a1b"
    shutil.copytree(model, snapshot)
    assert find_model(load_settings(models_dir=tmp_path / "none")).folder == snapshot
    shutil.copytree(model, tmp_path / "Wan2.1-FLF2V-14B-720P-diffusers")
    assert find_model(load_settings(models_dir=tmp_path)).folder == tmp_path / "Wan2.1-FLF2V-14B-720P-diffusers"


def test_a_folder_that_is_none_is_an_error_that_names_it() -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        find_model(load_settings(model="/nowhere"))


def test_a_repositorys_cache_given_as_the_model_is_refused_with_the_snapshot_to_give(tmp_path: Path) -> None:
    cache = tmp_path / "models--Wan-AI--Wan2.1-FLF2V-14B-720P-diffusers"
    for name in ("refs", "blobs", "snapshots/17c3/transformer"):
        (cache / name).mkdir(parents=True)
    with pytest.raises(ModelNotFound, match=r"It is a repository's cache: give '.*snapshots.17c3'\."):
        find_model(load_settings(model=str(cache)))
    with pytest.raises(ModelNotFound, match=r"It is a repository's cache: give '.*snapshots.17c3'\."):
        inspect(cache)


def test_a_folder_with_parts_missing_names_them(model: Path) -> None:
    shutil.rmtree(model / "image_encoder")
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(ModelNotFound, match="image_encoder, tokenizer"):
        open_model(model)


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def test_an_image_to_video_transformer_is_named_and_refused(model: Path) -> None:
    rewrite(model, lambda state: state.pop("condition_embedder.image_embedder.pos_embed"))
    with pytest.raises(WrongModel, match=r"image-to-video.*no image position embedding"):
        open_model(model)


def test_a_text_to_video_transformer_is_named_and_refused(model: Path) -> None:
    def to_t2v(state: dict[str, torch.Tensor]) -> None:
        state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16].clone()

    rewrite(model, to_t2v)
    with pytest.raises(WrongModel, match="text-to-video"):
        open_model(model)


def test_a_file_that_is_no_transformer_is_refused(model: Path) -> None:
    shutil.copy(
        model / "vae" / "diffusion_pytorch_model.safetensors",
        model / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(WrongModel, match="no Wan transformer"):
        open_model(model)


def test_an_flf2v_transformer_of_unknown_size_is_refused(model: Path) -> None:
    def without_the_last_block(state: dict[str, torch.Tensor]) -> None:
        last = max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        for name in [name for name in state if name.startswith(f"blocks.{last}.")]:
            del state[name]

    rewrite(model, without_the_last_block)
    with pytest.raises(WrongModel, match="no known size"):
        open_model(model)


def shard(folder: Path) -> dict[str, str]:
    """Split a part's one file into two shards with an index, as large models come."""
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    file.unlink()
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_read_as_one(model: Path) -> None:
    whole = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    shard(model / "vae")
    tensors = PartTensors(open_model(model), "vae")
    assert set(tensors) == set(whole)
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


def test_a_missing_shard_is_named(model: Path) -> None:
    shard(model / "vae")
    (model / "vae" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptModel, match=r"model-00002-of-00002\.safetensors"):
        read_part(model / "vae")


def test_a_tensor_in_two_shards_is_named(model: Path) -> None:
    weight_map = shard(model / "vae")
    first = model / "vae" / "model-00001-of-00002.safetensors"
    state = load_file(first)
    stray = next(name for name, file in weight_map.items() if file != first.name)
    save_file({**state, stray: torch.zeros(1)}, first)
    with pytest.raises(CorruptModel, match="in two files"):
        read_part(model / "vae")


def test_an_index_that_disagrees_with_its_files_is_refused(model: Path) -> None:
    weight_map = shard(model / "vae")
    weight_map["never.stored"] = "model-00001-of-00002.safetensors"
    (model / "vae" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptModel, match=r"never\.stored"):
        read_part(model / "vae")


def test_weights_in_another_layout_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = layouts.write_comfy(tmp_path / "models", "fp16")
    for place in (folder, next((folder / "diffusion_models").iterdir())):
        with pytest.raises(WrongModel, match=r"has to be converted once: run `wan-local convert .*models"):
            find_model(load_settings(model=str(place)))


def test_a_lora_given_as_the_model_is_refused_with_the_flag_it_belongs_to(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    names = ("blocks.0.self_attn.q.lora_down.weight", "blocks.0.self_attn.q.lora_up.weight")
    save_file({names[0]: torch.ones(4, 128), names[1]: torch.ones(128, 4)}, file)
    with pytest.raises(WrongModel, match=r"a LoRA for Wan.*--lora .*lora\.safetensors:1\.0"):
        find_model(load_settings(model=str(file)))


def test_a_pickle_under_the_name_of_a_safetensors_file_is_refused(model: Path) -> None:
    file = model / "image_encoder" / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is mapped
    torch.save(state, file)
    with pytest.raises(NotAvailable, match=r"model\.safetensors.* is a pickle file under the name"):
        open_model(model)


def retyped(file: Path, dtype: torch.dtype) -> None:
    """Store the linears of a part in 8 bits, without scales."""
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is mapped
    linears = [name for name in state if ".layers." in name and name.endswith("proj.weight")]
    save_file(state | {name: state[name].to(dtype) for name in linears}, file, {"format": "pt"})


def test_floats_of_8_bits_without_scales_are_computed_with_as_what_they_are(model: Path) -> None:
    before = load_network("image_encoder", open_model(model), torch.device("cpu"), torch.float32)
    retyped(model / "image_encoder" / "model.safetensors", torch.float8_e4m3fn)
    encoder = load_network("image_encoder", open_model(model), torch.device("cpu"), torch.float32)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    got, expected = (net(picture).last_hidden_state for net in (encoder, before))
    assert 0 < relative_error(got, expected) < 0.2


def test_integers_without_scales_are_refused(model: Path) -> None:
    retyped(model / "image_encoder" / "model.safetensors", torch.int8)
    with pytest.raises(CorruptModel, match=r"is stored as torch\.int8 and has no scale"):
        load_network("image_encoder", open_model(model), torch.device("cpu"), torch.float32)


def replaced(file: Path) -> None:
    """Put a file of the same size and other content in its place, as a copy or a download does."""
    new = file.with_name("new")
    new.write_bytes(file.read_bytes()[:-8] + bytes(8))
    os.utime(new, ns=(0, file.stat().st_mtime_ns + 1))
    new.replace(file)


def test_weights_that_are_replaced_while_they_are_in_use_are_an_error_not_garbage(model: Path, tmp_path: Path) -> None:
    files = open_model(model)
    encoder, transformer = PartTensors(files, "text_encoder"), PartTensors(files, "transformer")
    reader, name = BlockReader(transformer, "blocks"), "attn1.to_q.weight"
    views = {name: torch.empty(transformer.shape(f"blocks.0.{name}"), dtype=torch.float32)}
    reader.fill(0, views)
    for file in [*model.glob("t*/*.safetensors")]:
        replaced(file)
    changed = pytest.raises(CorruptModel, match="was changed while it was in use")
    with changed:
        reader.fill(0, views)
    with changed:
        _ = transformer[f"blocks.1.{name}"]
    with changed:
        encoder.rows("shared.weight", [3])
    PartTensors(open_model(model), "text_encoder").rows("shared.weight", [3])


def test_a_tensor_in_another_dtype_comes_through_a_few_mib_and_not_through_a_copy_of_it(tmp_path: Path) -> None:
    stored = torch.randn(2300, 1025, generator=torch.Generator().manual_seed(3))  # 9.4 MB: more than come at a time
    file = tmp_path / "weights.safetensors"
    save_file({"blocks.0.attn1.to_q.weight": stored, "blocks.0.attn1.to_q.bias": stored[0].clone()}, file)
    part: Part = "transformer"
    reader = BlockReader(PartTensors(replace(open_model(TINY), tensors={part: read_header(file)}), part), "blocks")
    views = {"attn1.to_q.weight": stored.bfloat16().zero_(), "attn1.to_q.bias": stored[0].bfloat16().zero_()}
    reader.fill(0, views)
    assert torch.equal(views["attn1.to_q.weight"], stored.bfloat16())
    assert torch.equal(views["attn1.to_q.bias"], stored[0].bfloat16())
    assert reader._staging.nbytes <= 2**23 < stored.nbytes


def test_rows_of_a_table_are_read_without_room_for_the_table(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how much address space is taken")
    file, rows = tmp_path / "table.safetensors", 2**20
    header = json.dumps({"shared.weight": {"dtype": "BF16", "shape": [rows, 2048], "data_offsets": [0, rows * 4096]}})
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header.encode())
        stream.seek(7 * 4096, os.SEEK_CUR)
        stream.write(torch.full((2048,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        stream.truncate(8 + len(header) + rows * 4096)  # 4 GiB, of which the disk has a page or two
    part: Part = "text_encoder"
    table = PartTensors(replace(open_model(TINY), tensors={part: read_header(file)}), part)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    try:
        read = table.rows("shared.weight", [7, 0, 7])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert read.float().mean(1).tolist() == [1.5, 0.0, 1.5]
    with pytest.raises(CorruptModel, match=f"row {rows} is needed of a table of {rows}"):
        table.rows("shared.weight", [rows])
