from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.random_model import random_source, write_random_model
from tests import layouts
from tests.parity import relative_error
from wan_local import convert as convert_module
from wan_local import store_file
from wan_local.checkpoint import ModelFiles, PartTensors, find_model, open_model
from wan_local.convert import Conversion, Progress, convert, is_complete
from wan_local.errors import CorruptModel, NotAvailable, OutputError
from wan_local.identity import folder_identity
from wan_local.manifest import JOURNAL, MANIFEST, read_manifest, sha256, verify
from wan_local.planner import StagePlan
from wan_local.quantize import QuantizedWeight, dequantize, is_block_linear, quantize_weight
from wan_local.settings import ImageEncoderConfig, TextEncoderConfig, load_model_config, load_settings
from wan_local.sources import Source, open_source
from wan_local.stage import Network, load_network, stage
from wan_local.store_file import Producer
from wan_local.store_layout import ROTATED
from wan_local.weight_format import WeightFormat, WeightFormats

CPU = torch.device("cpu")
TINY = find_model(load_settings(model="tiny")).folder
FORMATS: list[WeightFormat] = ["bf16", "int8", "fp8", "int4"]
# of one prediction of the embedded model against float32; each is about twice what was measured
BOUNDS: dict[WeightFormat, float] = {"bf16": 0.02, "int8": 0.05, "fp8": 0.1, "int4": 0.3}


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(TINY)


def all_in(format_: WeightFormat, *, keep_edges: bool = False) -> WeightFormats:
    return WeightFormats(format_, "int8" if format_ == "int4" else format_, format_, keep_edges)


@pytest.fixture(scope="module", params=FORMATS)
def store(request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The embedded model, converted."""
    target = tmp_path_factory.mktemp("stores") / request.param
    convert(Conversion(source, all_in(request.param)), target)
    return open_model(target)


def velocity(files: ModelFiles, plan: StagePlan | None, dtype: torch.dtype = torch.float32) -> Tensor:
    config = files.config.transformer
    latents, text, images = inputs(files)
    with stage("context_embedder", files, CPU, dtype, plan=plan) as embedder:
        context, modulations = embedder(text, images), embedder.modulations(torch.tensor([500]))
    with stage("transformer", files, CPU, dtype, plan=plan) as transformer:
        [result] = transformer(latents, modulations[500], [context])
    assert isinstance(result, Tensor) and result.shape[1] == config.out_channels
    return result


def inputs(files: ModelFiles) -> tuple[Tensor, Tensor, Tensor]:
    config = files.config.transformer
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(1, config.text_tokens, config.text_dim, generator=generator)
    return latents, text, torch.randn(1, config.image_tokens, config.image_dim, generator=generator)


def test_a_store_holds_every_tensor_in_the_format_that_was_asked_for(store: ModelFiles, source: Source) -> None:
    manifest = store.manifest
    assert manifest is not None and manifest.model == source.config.name
    format_ = manifest.formats["transformer"]
    for part in ("transformer", "text_encoder", "image_encoder", "vae"):
        stored, original = PartTensors(store, part), source.part(part)
        wanted = manifest.formats.get(part, "bf16")
        for name in original:
            if wanted == "bf16" or not is_block_linear(part, name):
                assert torch.equal(stored[name], original[name].to(stored.dtype_of(name))), name
                continue
            expected = quantize_weight(original[name].float(), wanted)
            assert torch.equal(stored[name].view(torch.uint8), expected.data.view(torch.uint8)), name
            assert torch.equal(stored[f"{name}_scale"], expected.scale)
            assert expected.shift is None or torch.equal(stored[f"{name}_shift"], expected.shift)
    verify(store.folder, manifest)
    assert format_ == "bf16" or sum(file.bytes for file in manifest.files.values()) < 14e6


def test_a_block_is_one_stretch_of_its_file_in_the_order_of_the_loop(store: ModelFiles) -> None:
    tensors = store.tensors["transformer"]
    ends = []
    for index in range(store.config.transformer.num_layers):
        infos = sorted(
            (
                info
                for name, info in tensors.items()
                if name.startswith(f"blocks.{index}.") and "00001" in info.file.name
            ),
            key=lambda info: info.offset,
        )
        assert infos[-1].offset + infos[-1].nbytes - infos[0].offset == sum(info.nbytes for info in infos)
        ends.append((infos[0].offset, infos[-1].offset + infos[-1].nbytes))
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ends))
    assert not any("attn2.to_k" in name for name, info in tensors.items() if "00001" in info.file.name)


def test_a_store_predicts_what_diffusers_predicts_from_the_source(store: ModelFiles) -> None:
    peer = WanTransformer3DModel.from_pretrained(TINY / "transformer", torch_dtype=torch.float32).eval()
    latents, text, images = inputs(store)
    with torch.no_grad():
        rows = images.reshape(2, images.shape[1] // 2, -1)
        expected = peer(latents, torch.tensor([500]), text, rows, return_dict=False)[0]
    assert store.manifest is not None
    assert relative_error(velocity(store, None), expected) < BOUNDS[store.manifest.formats["transformer"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resident", [0, 3])
def test_a_streamed_store_is_bit_equal_to_a_resident_one(store: ModelFiles, resident: int, dtype: torch.dtype) -> None:
    plan = StagePlan("denoise", 0, 0, resident_blocks=resident, source="file")
    assert torch.equal(velocity(store, plan, dtype), velocity(store, None, dtype))


@pytest.mark.parametrize("network", ["text_encoder", "image_encoder", "vae", "context_embedder", "transformer"])
def test_a_bf16_store_loads_to_the_bits_that_the_source_loads_to(
    source: Source, tmp_path: Path, network: Network
) -> None:
    convert(Conversion(source, WeightFormats()), tmp_path / "store")
    expected = load_network(network, open_model(TINY), CPU, torch.bfloat16).state_dict()
    got = load_network(network, open_model(tmp_path / "store"), CPU, torch.bfloat16).state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_diffusers_opens_a_bf16_store_as_it_is(source: Source, tmp_path: Path) -> None:
    convert(Conversion(source, WeightFormats()), tmp_path / "store")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "store" / "transformer", torch_dtype=torch.float32)
    state, original = model.state_dict(), source.part("transformer")
    assert set(state) == set(original)
    assert all(torch.equal(state[name].bfloat16(), original[name].bfloat16()) for name in original)


def test_edges_can_be_kept_and_blocks_that_differ_stream(source: Source, tmp_path: Path) -> None:
    convert(Conversion(source, all_in("int8", keep_edges=True)), tmp_path / "store")
    files = open_model(tmp_path / "store")
    dtypes = [files.tensors["transformer"][f"blocks.{i}.attn1.to_q.weight"].dtype for i in range(6)]
    assert dtypes == ["BF16", "BF16", "I8", "BF16", "BF16", "BF16"]
    resident = velocity(files, None)
    for count in (0, 2, 4):
        plan = StagePlan("denoise", 0, 0, resident_blocks=count, source="file")
        assert torch.equal(velocity(files, plan), resident)


@pytest.mark.parametrize("arithmetic", ["w8a8", "weight-only"])
def test_rotated_linears_are_noted_and_turned_back(source: Source, tmp_path: Path, arithmetic: str) -> None:
    convert(Conversion(source, all_in("int8"), rotate=True), tmp_path / "store")
    files = open_model(tmp_path / "store")
    assert files.rotated == ROTATED
    network = load_network("transformer", files, CPU, torch.float32)
    rotated = [name for name, part in network.named_modules() if getattr(part, "rotated", False)]
    assert len(rotated) == 6 * 3 and all(name.endswith(ROTATED) for name in rotated)
    plan = StagePlan("denoise", 0, 0, int8_arithmetic=arithmetic)  # type: ignore[arg-type]
    assert relative_error(velocity(files, plan), velocity(open_model(TINY), None)) < 0.06


def test_the_source_is_not_touched_and_a_complete_store_is_left_alone(source: Source, tmp_path: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in TINY.rglob("*")}
    first = convert(Conversion(source, all_in("int8")), tmp_path / "store")
    changed = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    assert is_complete(tmp_path / "store") and convert(Conversion(source, all_in("int8")), tmp_path / "store") == first
    assert changed == {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in TINY.rglob("*")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_a_target_that_is_something_else_is_refused(source: Source, tmp_path: Path) -> None:
    convert(Conversion(source, all_in("int8")), tmp_path / "store")
    with pytest.raises(OutputError, match=r"is a store of wan_local-flf2v-tiny .*made of other files"):
        convert(Conversion(source, all_in("fp8")), tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(OutputError, match="is no store of wan_local"):
        convert(Conversion(source, all_in("int8")), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_files_of_the_same_name_in_folders_of_the_same_name_all_count(tmp_path: Path) -> None:
    files: dict[str, Path] = {}
    for part in ("text_encoder", "image_encoder"):
        (tmp_path / part / "x").mkdir(parents=True)
        files[part] = shutil.copy(TINY / part / "model.safetensors", tmp_path / part / "x")
    accounts = []
    for changed in (None, *files.values()):
        if changed is not None:
            os.utime(changed, (0, 0))
        source = open_source(TINY, **files)  # type: ignore[arg-type]
        accounts.append(Conversion(source, all_in("int8")).account()["source"]["files"])
    assert accounts[0] != accounts[1] != accounts[2]
    assert accounts[0].keys() == {
        "text_encoder: x/model.safetensors", "image_encoder: x/model.safetensors",
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")),
    }  # fmt: skip


def test_another_tokenizer_is_another_store(source: Source, tmp_path: Path) -> None:
    """What was begun takes the tokenizer of the last call; what is complete says that it has another."""
    other = Path(shutil.copytree(TINY / "tokenizer", tmp_path / "other"))
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (other / "added_tokens.json").write_text("{}")
    begun = tmp_path / "store.part" / "tokenizer"
    begun.mkdir(parents=True)
    shutil.copy(other / "added_tokens.json", begun)
    convert(Conversion(source, all_in("int8")), tmp_path / "store")
    assert folder_identity(tmp_path / "store" / "tokenizer") == folder_identity(TINY / "tokenizer")
    with pytest.raises(OutputError, match=r"of these weights with another tokenizer than that in '.*other'"):
        convert(Conversion(open_source(TINY, tokenizer=other), all_in("int8")), tmp_path / "store")


@pytest.mark.parametrize("there", [True, False])
def test_a_target_that_is_a_link_is_the_folder_that_it_names(source: Source, tmp_path: Path, *, there: bool) -> None:
    """The store grew beside the link, on the small disk, and could not take its place at the end."""
    disk = tmp_path / "disk"
    (disk / "store" if there else disk).mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk / "store")
    with pytest.raises(KeyboardInterrupt):
        convert(Conversion(source, all_in("int8")), tmp_path / "link", stop_at(0.1))
    assert (disk / "store.part" / JOURNAL).is_file()
    convert(Conversion(source, all_in("int8")), tmp_path / "link" / ".." / "store")
    assert is_complete(tmp_path / "link") and is_complete(disk / "store")
    assert [path.name for path in disk.iterdir()] == ["store"] and (tmp_path / "link").is_symlink()


def test_a_target_whose_place_no_store_can_take_is_refused_at_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="is there already and is no store"):
        convert(Conversion(source, all_in("int8")), tmp_path / "loop")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(OutputError, match=r"mounted at .*volume'.*Choose a folder within it, such as .*store'"):
        convert(Conversion(source, all_in("int8")), tmp_path / "volume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "volume"]


def test_a_target_that_cannot_be_is_told_to_be_chosen_anew(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Not a directory\. Choose another target"):
        convert(Conversion(source, all_in("int8")), tmp_path / "file" / "store")
    with pytest.raises(OutputError, match=r"File name too long\. Choose another target"):
        is_complete(tmp_path / ("n" * 300))


@pytest.mark.usefixtures("folders_that_cannot_be_flushed")
def test_a_file_system_that_cannot_flush_folders_holds_a_store(source: Source, tmp_path: Path) -> None:
    convert(Conversion(source, all_in("int8")), tmp_path / "store")
    assert is_complete(tmp_path / "store")


def test_too_little_disk_is_refused_before_anything_is_written(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs 0\.0 GB at .*, where 0\.0 GB is free.*smaller format"):
        convert(Conversion(source, all_in("int8")), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_says_so_and_the_same_call_goes_on(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = store_file._write, [60]

    def filling(*arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store_file, "_write", filling)
    with pytest.raises(OutputError, match=r"No space left on device.*the same command goes on from there"):
        convert(Conversion(source, all_in("int8")), tmp_path / "store")
    assert not (tmp_path / "store").exists() and (tmp_path / "store.part").is_dir()
    with pytest.raises(OutputError, match="unfinished conversion of other weights or into other formats"):
        convert(Conversion(source, all_in("fp8")), tmp_path / "store")
    convert(Conversion(source, all_in("int8")), tmp_path / "store")
    assert_equal_to_fresh(source, tmp_path)


def test_a_file_system_with_a_largest_file_is_named(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(store_file, "_write", too_large)
    with pytest.raises(OutputError, match=r"no file there may grow as large \(FAT32: 4 GB.*on another disk"):
        convert(Conversion(source, all_in("int8")), tmp_path / "store")


def assert_equal_to_fresh(source: Source, folder: Path) -> None:
    fresh = convert(Conversion(source, all_in("int8")), folder / "fresh")
    manifest = read_manifest(folder / "store")
    assert manifest is not None and manifest.files == fresh.files
    verify(folder / "store", manifest)
    assert not (folder / "store" / JOURNAL).exists()


_KILLED = """
import os, signal, sys
from pathlib import Path
from wan_local.convert import Conversion, convert
from wan_local.weight_format import WeightFormats
from wan_local.sources import open_source

def show(progress):
    if progress.done_bytes > float(sys.argv[3]) * progress.total_bytes:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Conversion(open_source(sys.argv[1]), WeightFormats("int8", "int8", "int8")), Path(sys.argv[2]), show)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_conversion_that_is_killed_again_and_again_ends_in_the_same_bytes(source: Source, tmp_path: Path) -> None:
    for share in ("0.05", "0.3", "0.4", "0.6"):
        command = [sys.executable, "-c", _KILLED, str(TINY), str(tmp_path / "store"), share]
        ended = subprocess.run(command, check=False, capture_output=True, timeout=300)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert not (tmp_path / "store").exists()
    done = sorted(line for line in (tmp_path / "store.part" / JOURNAL).read_text().splitlines() if "runs" in line)
    assert done, "nothing was noted before the last kill"
    convert(Conversion(source, all_in("int8")), tmp_path / "store")
    assert_equal_to_fresh(source, tmp_path)


def stop_at(share: float) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        if progress.done_bytes > share * progress.total_bytes:
            raise KeyboardInterrupt

    return show


@pytest.mark.parametrize(
    "damage",
    [
        "torn journal",
        "zeros in the journal",
        "other entry",
        "journal of zeros",
        "empty journal",
        "longer file",
        "shorter file",
        "other bytes",
    ],
)
def test_what_a_crash_left_is_not_trusted_beyond_what_was_noted(source: Source, tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(Conversion(source, all_in("int8")), tmp_path / "store", stop_at(0.5))
    part = tmp_path / "store.part"
    loop = part / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    if damage == "torn journal":
        (part / JOURNAL).write_bytes((part / JOURNAL).read_bytes() + b'{"file": "transf')
    elif damage in ("zeros in the journal", "other entry"):
        lines = (part / JOURNAL).read_bytes().splitlines(keepends=True)
        lines[2] = b'{"runs": 1}\n' if damage == "other entry" else bytes(len(lines[2]) - 1) + b"\n"
        (part / JOURNAL).write_bytes(b"".join(lines))
    elif damage == "longer file":
        loop.write_bytes(loop.read_bytes() + b"x" * 1000)
    elif damage == "shorter file":
        loop.write_bytes(loop.read_bytes()[:-1000])
    elif damage == "other bytes":
        content = bytearray(loop.read_bytes()[:-1])
        content[len(content) // 2] ^= 1
        loop.write_bytes(content)
    else:
        (part / JOURNAL).write_bytes(b"" if damage == "empty journal" else bytes(300) + b"\n")
    convert(Conversion(source, all_in("int8")), tmp_path / "store")
    assert_equal_to_fresh(source, tmp_path)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("format_", FORMATS)
def test_numbers_that_are_none_are_refused(tmp_path: Path, format_: WeightFormat, poison: float) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    [file] = (tmp_path / "source" / "transformer").glob("*.safetensors")
    state = load_file(file)
    state["blocks.3.ffn.net.2.weight"][5, 7] = poison
    save_file(state, file)
    with pytest.raises(
        CorruptModel, match=r"'blocks\.3\.ffn\.net\.2\.weight' of the transformer holds NaN or infinity"
    ):
        convert(Conversion(open_source(tmp_path / "source"), all_in(format_)), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", ["blocks.3.ffn.net.2.weight", "shared.weight"])
def test_a_tensor_that_never_arrived_is_refused(tmp_path: Path, format_: WeightFormat, name: str) -> None:
    """A file whose place was reserved has its length, and zeros where its content should be."""
    shutil.copytree(TINY, tmp_path / "source")
    part = "text_encoder" if name == "shared.weight" else "transformer"
    [file] = (tmp_path / "source" / part).glob("*.safetensors")
    state = load_file(file)
    state[name].zero_()
    save_file(state, file)
    with pytest.raises(CorruptModel, match=rf"'{re.escape(name)}' of the {part} is nothing but zeros"):
        convert(Conversion(open_source(tmp_path / "source"), all_in(format_)), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_store_is_a_source_too_unless_its_weights_are_turned(source: Source, tmp_path: Path) -> None:
    convert(Conversion(source, all_in("int4")), tmp_path / "int4")
    read, files = open_source(tmp_path / "int4").part("transformer"), open_model(tmp_path / "int4")
    name = "blocks.1.attn1.to_v.weight"
    stored = PartTensors(files, "transformer")
    weight = QuantizedWeight(stored[name], stored[f"{name}_scale"], stored[f"{name}_shift"])
    assert torch.equal(read[name], dequantize(weight, torch.float32))
    assert torch.equal(read.row_range(name, 5, 9), read[name][5:9])
    convert(Conversion(source, all_in("int8"), rotate=True), tmp_path / "rotated")
    with pytest.raises(NotAvailable, match=r"made with --rotate, which is not undone"):
        open_source(tmp_path / "rotated")
    parts = {part: tmp_path / "rotated" / part for part in ("text_encoder", "image_encoder", "vae", "tokenizer")}
    for part in ("", "diffusion_pytorch_model-00001-of-00002.safetensors"):
        with pytest.raises(NotAvailable, match=r"made with --rotate, which is not undone"):
            open_source(tmp_path / "rotated" / "transformer" / part, **parts)
    (tmp_path / "rotated" / MANIFEST).unlink()
    with pytest.raises(CorruptModel, match=r"rotated weights without manifest\.json"):
        open_model(tmp_path / "rotated")


def test_what_is_synced_was_opened_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to sync anything else."""
    (tmp_path / "file").touch()
    flags: list[int] = []
    open_ = os.open
    monkeypatch.setattr(os, "open", lambda path, how: (flags.append(how), open_(path, how))[1])
    convert_module._flush_to_disk(tmp_path / "file")
    assert flags == [os.O_RDWR]


def test_progress_counts_the_bytes_that_lie_on_disk(tmp_path: Path) -> None:
    source = open_source(layouts.write_comfy(tmp_path / "models", "fp8_scaled"))
    shown: list[Progress] = []
    convert(Conversion(source, all_in("int8")), tmp_path / "store", shown.append)
    read = sum(source.part(part).nbytes(name) for part in source.parts for name in source.part(part))
    files = sum(info.nbytes for weights in source.weights.values() for info in weights.tensors.values())
    assert files * 0.97 < read <= files  # but for what is not used: the tokenizer's text, marks
    written = sum(run.nbytes for file in Conversion(source, all_in("int8")).files() for run in file.runs)
    assert shown[-1].done_bytes == shown[-1].total_bytes == read + written


def test_a_damaged_store_is_told_from_a_sound_one(source: Source, tmp_path: Path) -> None:
    manifest = convert(Conversion(source, all_in("int8")), tmp_path / "store")
    loop = tmp_path / "store" / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    sound = loop.read_bytes()
    flipped = bytearray(sound)
    flipped[-100] ^= 1
    loop.write_bytes(flipped)
    with pytest.raises(CorruptModel, match=r"00001-of-00002\.safetensors has other content"):
        verify(tmp_path / "store", manifest)
    loop.write_bytes(sound[:-100])
    with pytest.raises(CorruptModel, match=r"00001-of-00002\.safetensors has \d+ bytes and should have \d+"):
        verify(tmp_path / "store", manifest)
    with pytest.raises(CorruptModel, match="cut short"):
        open_model(tmp_path / "store")
    loop.write_bytes(sound)
    save_file({name: tensor.clone() for name, tensor in load_file(loop).items()}, loop, {"from": "another store"})
    with pytest.raises(CorruptModel, match=r"00001-of-00002\.safetensors has \d+ bytes and should have \d+"):
        open_model(tmp_path / "store")
    loop.unlink()
    with pytest.raises(CorruptModel, match="lacks"):
        open_model(tmp_path / "store")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"kind": "other"}', b'{"kind": "wan_local store", "version": 1}'])
def test_a_damaged_manifest_is_an_error(source: Source, tmp_path: Path, content: bytes) -> None:
    convert(Conversion(source, all_in("int8")), tmp_path / "store")
    (tmp_path / "store" / MANIFEST).write_bytes(content)
    with pytest.raises(CorruptModel, match=r"manifest\.json"):
        open_model(tmp_path / "store")


@dataclass(frozen=True)
class Added:
    """A LoRA that adds a number to one tensor."""

    name: str
    report: object
    file: Path = TINY / "model_index.json"

    @property
    def targets(self) -> frozenset[str]:
        return frozenset({self.name})

    def apply(self, _: str, weight: Tensor) -> Tensor:
        return weight.float() + 0.25


@dataclass(frozen=True)
class Account:
    file: str = "style.safetensors"
    strength: float = 0.5
    applied: int = 1


def test_loras_are_merged_in_float32_before_quantization_and_noted(source: Source, tmp_path: Path) -> None:
    name = "blocks.1.attn1.to_v.weight"
    conversion = Conversion(source, all_in("int8"), loras=[Added(name, Account()), Added(name, Account())])
    manifest = convert(conversion, tmp_path / "store")
    stored = PartTensors(open_model(tmp_path / "store"), "transformer")
    expected = quantize_weight(source.part("transformer")[name].float() + 0.5, "int8")
    assert torch.equal(stored[name], expected.data) and torch.equal(stored[f"{name}_scale"], expected.scale)
    account = {"file": "style.safetensors", "strength": 0.5, "applied": 1}
    assert manifest.loras == [{**account, "sha256": sha256(TINY / "model_index.json")}] * 2


def test_a_lora_that_changed_under_its_name_is_no_finished_work(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"one")
    conversion = Conversion(source, all_in("int8"), loras=[Added("blocks.1.attn1.to_v.weight", Account(), file)])
    made = convert(conversion, tmp_path / "store")
    assert convert(conversion, tmp_path / "store") == made
    file.write_bytes(b"two")
    with pytest.raises(OutputError, match="made of other files or in another way"):
        convert(conversion, tmp_path / "store")


MIDDLE = replace(
    load_model_config("flf2v_tiny"),
    transformer=replace(
        load_model_config("flf2v_14b").transformer, num_layers=14, num_attention_heads=8, ffn_dim=4096, text_dim=512
    ),
    text_encoder=TextEncoderConfig(vocab_size=60_000, d_model=1024, d_kv=64, d_ff=2048, num_layers=2, num_heads=16),
    image_encoder=ImageEncoderConfig(1280, 2560, 2, 16, 224, 14, "gelu"),
)

_MEASURED = """
import resource, sys
from pathlib import Path
import torch
from bench.random_model import random_source
from tests.test_convert import MIDDLE
from wan_local.convert import Conversion, convert
from wan_local.weight_format import WeightFormats
source = random_source(Path(sys.argv[1]), MIDDLE)
before = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS:")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
convert(Conversion(source, WeightFormats("int8", "int8", "int8")), Path(sys.argv[2]))
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1])
print(before, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 740 MB, one table of which has 123 MB, is converted in less than 250 MB."""
    write_random_model(tmp_path / "source", MIDDLE)
    assert sum(random_source(tmp_path / "source", MIDDLE).files.values()) > 600e6
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "source"), str(tmp_path / "store")]
    root = Path(__file__).parents[1]
    ended = subprocess.run(command, check=True, capture_output=True, timeout=600, cwd=root, text=True)
    before, peak = (int(number) * 1024 for number in ended.stdout.split()[-2:])
    assert peak - before < 250e6, f"{(peak - before) / 1e6:.0f} MB beyond the {before / 1e6:.0f} MB that were there"


def test_the_producer_gives_rows_in_order_whatever_their_number(
    monkeypatch: pytest.MonkeyPatch, source: Source
) -> None:
    conversion = Conversion(source, all_in("int4"))
    [loop, *_] = conversion.files()
    contents = []
    for at_once in (2**22, 5000):
        monkeypatch.setattr(store_file, "_NUMBERS_AT_ONCE", at_once)
        with Producer(source.part, []) as producer:
            pieces = [tensor for run in loop.runs for tensor, _ in producer.run(loop.part, run)]
        contents.append(b"".join(piece.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for piece in pieces))
    assert contents[0] == contents[1] and len(contents[0]) == loop.nbytes - len(loop.header())
