from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import layouts
from tests.gguf_encoders import encode
from wan_local.dequantize import dequantize_blocks
from wan_local.errors import CorruptModel, NotAvailable, WanLocalError, WrongModel
from wan_local.gguf_header import READABLE, TYPES, read_gguf_header
from wan_local.inspection import inspect
from wan_local.sources import open_source
from wan_local.weight_files import read_file_header

BLOCKS = tuple(name for name in READABLE if name not in ("F32", "F16", "BF16"))
SIZES = {kind.name: kind for kind in TYPES.values()}
# largest error over the largest number of a block: half a step of its grid, and what rounding of the scales adds
BOUNDS = {"Q8_0": 0.57 / 127, "Q6_K": 0.8 / 31, "Q5_K": 0.8 / 15, "Q4_K": 0.8 / 7, "F16": 2**-11, "BF16": 2**-8}
BOUNDS |= {"Q5_0": 1 / 15, "Q5_1": 0.6 / 15, "Q4_0": 1 / 7, "Q4_1": 0.6 / 7, "F32": 0}


def write(file: Path, block: str, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the tiny transformer with all block linears that have room for it as `block`, the others as F32."""
    items = SIZES[block].items
    state = state or layouts.official("transformer")

    def fits(name: str, tensor: torch.Tensor) -> bool:
        return "blocks." in name and name.endswith(".weight") and tensor.dim() == 2 and not tensor.shape[1] % items

    return layouts.write_gguf(file, state, block, where=fits)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything but a transformer."""
    folder = layouts.write_comfy(tmp_path_factory.mktemp("others") / "models", "fp16")
    next((folder / "diffusion_models").iterdir()).unlink()
    return folder


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_dequantize_bit_for_bit_as_the_gguf_package_does(block: str) -> None:
    generator = np.random.default_rng(5)
    content = generator.integers(0, 256, (300, SIZES[block].nbytes), dtype=np.uint8)
    places = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(block, [0])
    for place in places:  # any bits but for the scales, which shall be numbers
        halves = generator.standard_normal((300, 1)).astype(np.float16)
        content[:, place : place + 2] = halves.view(np.uint8)
    expected = gguf.quants.dequantize(content, gguf.GGMLQuantizationType[block])
    got = dequantize_blocks(block, torch.from_numpy(content.reshape(-1)))
    assert torch.equal(got, torch.from_numpy(expected.reshape(-1)))


@pytest.mark.parametrize("block", READABLE)
def test_a_gguf_of_every_type_reads_within_its_bounds(block: str, others: Path, tmp_path: Path) -> None:
    write(tmp_path / f"flf2v-{block}.gguf", block)
    source = open_source(
        tmp_path / f"flf2v-{block}.gguf", vae=others / "vae", image_encoder=others / "clip_vision",
        text_encoder=others / "text_encoders", tokenizer=others / "tokenizer",
    )  # fmt: skip
    tensors, blocks = source.part("transformer"), 0
    for name, expected in layouts.tiny("transformer").items():
        got, exact, info = tensors[name].float(), expected.float(), tensors.stored(name).info
        assert tensors[name].dtype == tensors.dtype_of(name) and got.shape == exact.shape
        blocks += info.dtype == block and "ffn.net.2.weight" in name
        items = SIZES[info.dtype].items
        largest = exact.view(-1, items).abs().amax(1) if items > 1 else exact.view(-1, 1).abs().amax(1)
        errors = (got - exact).abs().reshape(largest.shape[0], -1).amax(1)
        assert (errors <= BOUNDS[info.dtype] * largest + 1e-6).all(), name
    assert blocks == source.config.transformer.num_layers


def test_five_axes_folded_into_two_come_back(others: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", "F16")
    header = read_gguf_header(file)
    assert header.tensors["patch_embedding.weight"].shape == (128, 36, 1, 2, 2)
    assert header.metadata["general.architecture"] == "wan"


def test_rows_of_blocks_are_those_of_the_whole_tensor(others: Path, tmp_path: Path) -> None:
    source = open_source(
        write(tmp_path / "model.gguf", "Q4_K"), vae=others / "vae", image_encoder=others / "clip_vision",
        text_encoder=others / "text_encoders", tokenizer=others / "tokenizer",
    )  # fmt: skip
    tensors = source.part("transformer")
    for name in ("blocks.0.ffn.net.2.weight", "patch_embedding.weight", "proj_out.bias"):
        assert torch.equal(tensors.row_range(name, 3, 9), tensors[name][3:9])


def test_a_text_encoder_under_llamas_names_reads_as_ours(others: Path, tmp_path: Path) -> None:
    state = layouts.llama(layouts.tiny("text_encoder")) | {"dec.output_norm.weight": torch.ones(64)}
    file = layouts.write_gguf(
        tmp_path / "umt5.gguf", state, "Q8_0", where=lambda _, t: t.dim() == 2 and not t.shape[1] % 32
    )
    source = open_source(
        layouts.TINY / "transformer", text_encoder=file, vae=others / "vae", image_encoder=others / "clip_vision",
        tokenizer=others / "tokenizer",
    )  # fmt: skip
    for name, expected in layouts.tiny("text_encoder").items():
        error = (source.part("text_encoder")[name] - expected.float()).abs().max()
        assert error <= expected.abs().max() * 0.57 / 127, name


def test_a_type_that_is_not_read_is_refused_by_name(others: Path, tmp_path: Path) -> None:
    content = bytearray(write(tmp_path / "model.gguf", "Q4_0").read_bytes())
    name = b"blocks.0.ffn.2.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    content[place : place + 4] = struct.pack("<I", 20)  # IQ4_NL: blocks as long as those of Q4_0
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(NotAvailable, match=r"blocks\.0\.ffn\.2\.weight.*IQ4_NL.*Q4_K"):
        open_source(tmp_path / "model.gguf", vae=others / "vae", image_encoder=others / "clip_vision",
                    text_encoder=others / "text_encoders", tokenizer=others / "tokenizer")  # fmt: skip


def test_a_scale_that_is_nan_is_damage() -> None:
    content = torch.from_numpy(np.array(encode("Q8_0", np.ones((4, 32), np.float32)))).reshape(-1).clone()
    content[34:36] = torch.tensor([0, 0x7E], dtype=torch.uint8)
    with pytest.raises(CorruptModel, match="1 of 4 Q8_0 blocks"):
        dequantize_blocks("Q8_0", content)


def counts(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + struct.pack("<Q", value) + content[at + 8 :]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: b"", "empty: 0 bytes"),
        (lambda content: b"GGML" + content[4:], "begins with b'GGML'"),
        (lambda content: content[:4], "left|ends at"),
        (lambda content: content[:20], "left|ends at"),
        (lambda content: content[:300], "announced|ends at|left"),
        (lambda content: content[:-1], r"needs bytes \d+"),
        (lambda content: counts(content, 8, 2**60), "tensors are announced"),
        (lambda content: counts(content, 16, 2**60), "keys are announced"),
        (lambda content: counts(content, 24, 2**60), "a text of"),
        (lambda content: content.replace(b"blocks.0.ffn.0.bias", b"blocks.1.ffn.0.bias"), "twice"),
        (lambda content: b"<!DOCTYPE html><html>login</html>", "HTML"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "git-lfs"),
    ],
)
def test_a_damaged_gguf_is_one_clear_error_and_fast(damage: object, says: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", "Q4_0")
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    started = time.monotonic()
    with pytest.raises(CorruptModel, match=says) as caught:
        read_file_header(file)
    assert "model.gguf" in str(caught.value)
    assert time.monotonic() - started < 1


def test_an_unknown_version_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", "Q4_0")
    content = file.read_bytes()
    file.write_bytes(content[:4] + struct.pack(">I", 3) + content[8:])
    with pytest.raises(NotAvailable, match="big-endian GGUF of version 3"):
        read_gguf_header(file)


def test_a_vocabulary_in_the_header_costs_little(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "t5encoder")
    writer.add_token_list([f"token{number}" for number in range(256_384)])
    writer.add_token_scores([0.0] * 256_384)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    started = time.monotonic()
    header = read_gguf_header(tmp_path / "vocabulary.gguf")
    assert time.monotonic() - started < 2
    assert header.metadata["tokenizer.ggml.tokens"] is None and header.tensors["token_embd.weight"].shape == (4, 32)


def test_leading_axes_of_one_that_a_writer_left_out_are_no_misfit(others: Path, tmp_path: Path) -> None:
    """As ggml counts axes: [1, 34, 64] of positions is [34, 64], and [1, 6, 128] of a block's modulation [6, 128]."""
    whole = layouts.official("transformer")
    bare = {name: tensor.squeeze(0) if tensor.shape[0] == 1 else tensor for name, tensor in whole.items()}
    assert sum(tensor.dim() != whole[name].dim() for name, tensor in bare.items()) > 2
    files = write(tmp_path / "whole.gguf", "Q8_0"), write(tmp_path / "bare.gguf", "Q8_0", bare)
    assert inspect(files[1]).usable
    expected, got = (
        open_source(
            file, vae=others / "vae", image_encoder=others / "clip_vision",
            text_encoder=others / "text_encoders", tokenizer=others / "tokenizer",
        ).part("transformer")
        for file in files
    )  # fmt: skip
    assert expected.keys() == got.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


SMALL = {"a.weight": torch.ones(2, 256), "b.weight": torch.ones(3)}


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_change_of_bytes_is_anything_but_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    original = folder / "fuzz-original.gguf"
    if not original.exists():
        layouts.write_gguf(original, SMALL, "Q4_K", where=lambda _, tensor: tensor.dim() == 2)
    content = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    file = folder / "fuzzed.gguf"
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 40, 200]))])
    try:
        header = read_file_header(file)
    except WanLocalError:
        return
    size = os.path.getsize(file)
    assert all(info.offset + info.nbytes <= size for info in header.tensors.values())
    json.dumps(header.metadata, default=str)


def test_another_network_in_a_gguf_is_refused_by_name(tmp_path: Path) -> None:
    state = {"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 32), "img_in.weight": torch.ones(4, 32)}
    with pytest.raises(WrongModel, match="FLUX or HunyuanVideo"):
        open_source(layouts.write_gguf(tmp_path / "flux.gguf", state, "Q8_0", where=lambda *_: True))


def test_a_type_that_is_not_read_is_named_by_inspect(tmp_path: Path) -> None:
    state = layouts.official("transformer")
    file = write(tmp_path / "flf2v.gguf", "Q4_0", state)
    content = bytearray(file.read_bytes())
    number = {kind.name: number for number, kind in TYPES.items()}
    for name, tensor in state.items():  # IQ4_NL has the size of Q4_0
        place = content.index(name.encode()) + len(name) + 4 + 8 * (2 if tensor.dim() == 5 else tensor.dim())
        if content[place] == number["Q4_0"]:
            content[place] = number["IQ4_NL"]
    file.write_bytes(content)
    (part,) = inspect(file).parts
    assert part.quantization == "GGUF IQ4_NL" and not part.usable
    assert "stored as IQ4_NL, which wan_local does not read. Of GGUF it reads F32, F16, BF16, Q8_0" in part.problem
