"""Damaged, forged and mistaken weight files: each is one clear error, soon, and without memory."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import layouts
from wan_local.cli import main
from wan_local.errors import CorruptModel, ModelNotFound, WanLocalError
from wan_local.header import read_safetensors
from wan_local.inspection import inspect
from wan_local.pickle_header import read_pickle_header
from wan_local.stored_tensor import StoredTensor
from wan_local.tensor_reader import read_stored
from wan_local.weight_files import read_file_header

MOST_BYTES = 32 * 2**20  # of memory that a refusal may take


@pytest.fixture(scope="module")
def sound() -> bytes:
    """A transformer's file that is as it should be."""
    return (layouts.TINY / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


def refused(path: Path, says: str) -> None:
    """Check that a path is refused with one clear error, within its time and memory."""
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(CorruptModel, match=says) as caught:
            inspect(path)
        assert time.monotonic() - started < 1.5
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert main(["inspect", str(path)]) == 1


def header_length(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def with_header(content: bytes, change: Callable[[dict[str, object]], object]) -> bytes:
    """Return a file with another header; its data stays."""
    length = header_length(content)
    table = json.loads(content[8 : 8 + length])
    changed = change(table) or table
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def entry(name: str, **fields: object) -> Callable[[dict[str, object]], None]:
    def change(table: dict[str, object]) -> None:
        table[name] = {**table[name], **fields}  # type: ignore[dict-item]

    return change


BIAS = "blocks.0.ffn.net.2.bias"  # F16 [128]


# fmt: off
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "is empty: 0 bytes"),
    "four bytes": (lambda c: c[:4], "cut short or forged.*: 4 bytes"),
    "eight bytes": (lambda c: c[:8], "cut short or forged"),
    "cut in the header": (lambda c: c[:1000], "cut short or forged.*1000 bytes"),
    "cut behind the header": (lambda c: c[: 8 + header_length(c)], r"should hold \d+ bytes of tensors and holds 0"),
    "cut in the data": (lambda c: c[: len(c) // 2], r"should hold \d+ bytes of tensors.*Download it again"),
    "last byte missing": (lambda c: c[:-1], "cut short or was changed"),
    "a byte too many": (lambda c: c + b"\0", "cut short or was changed"),
    "header of 2^60 bytes": (lambda c: (2**60).to_bytes(8, "little") + c[8:], "1152921504606846976 announced"),
    "header as long as the file": (lambda c: (len(c) - 8).to_bytes(8, "little") + c[8:], "is not JSON"),
    "header a byte longer": (lambda c: (header_length(c) + 1).to_bytes(8, "little") + c[8:], "is not JSON|lies|hold"),
    "header a byte shorter": (lambda c: (header_length(c) - 1).to_bytes(8, "little") + c[8:], "is not JSON|hold"),
    "no JSON": (lambda c: with_header(c, lambda _: b"{this is no JSON at all!}"), "is not JSON"),
    "no UTF-8": (lambda c: with_header(c, lambda _: b'{"\xff\xfe": 1}'), "is not JSON"),
    "a thousand brackets": (lambda c: with_header(c, lambda _: b'{"a":' + b"[" * 100_000), "is not JSON"),
    "a list": (lambda c: with_header(c, lambda _: b' [1, 2, {"a": 1}]'), "no table of tensors"),
    "metadata a list": (lambda c: with_header(c, lambda t: {**t, "__metadata__": []}), "metadata that is no table"),
    "an entry that is a number": (lambda c: with_header(c, lambda t: {**t, BIAS: 5}), "lacks dtype, shape"),
    "an entry without offsets": (lambda c: with_header(c, lambda t: {**t, BIAS: {"dtype": "F16"}}), "lacks"),
    "overlapping": (lambda c: with_header(c, entry(BIAS, data_offsets=[0, 256])), r"lies at \d+\.\.\d+, where"),
    "out of range": (
        lambda c: with_header(c, entry(BIAS, data_offsets=[2**50, 2**50 + 256])),
        r"lies at 1125899906842624\.\.\d+, where|lies at",
    ),
    "negative": (lambda c: with_header(c, entry(BIAS, data_offsets=[-256, 0])), "no sizes"),
    "a float for a length": (lambda c: with_header(c, entry(BIAS, shape=[128.0])), "no sizes"),
    "infinity for a length": (lambda c: with_header(c, entry(BIAS, shape=[float("inf")])), "no sizes"),
    "a length of 2^80": (lambda c: with_header(c, entry(BIAS, shape=[2**80])), "no sizes"),
    "a truth for a length": (lambda c: with_header(c, entry(BIAS, shape=[True])), "no sizes"),
    "a shape that does not fit": (lambda c: with_header(c, entry(BIAS, shape=[127])), r"F16 \[127\] and has 256 bytes"),
    "a dtype that is none": (lambda c: with_header(c, entry(BIAS, dtype="F17")), "dtype that does not exist: 'F17'"),
    "a name twice": (
        lambda c: with_header(
            c, lambda t: json.dumps(t).replace("blocks.1.ffn.net.2.bias", BIAS).encode()
        ),
        f"names '{BIAS}' twice",
    ),
    "git-lfs pointer": (
        lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9975\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "git-xet pointer": (lambda c: b"# xet version 0\nfilesize = 9975\nhash = 'ab'\n", "git-xet pointer.*hf download"),
    "HTML page": (lambda c: b"\n<!DOCTYPE html><html><body>Login</body></html>", "HTML or XML page.*log in"),
    "XML of a bucket": (lambda c: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML or XML page"),
    "JSON": (lambda c: b'{"error": "Repository not found"}', "is a JSON text, not the weights"),
    "text of a server": (lambda c: b"Invalid username or password.", "is a text.*Invalid username or password"),
    "gzip": (lambda c: b"\x1f\x8b\x08\x00" + c[:5000], "is compressed, or an archive. Unpack it first"),
    "picture": (lambda c: b"\x89PNG\r\n\x1a\n" + bytes(500), "is an image, a video or a document"),
    "place reserved": (lambda c: bytes(len(c)), "is full of zeros: a download that has reserved its place"),
    "no tensors": (lambda c: with_header(c, lambda t: {"__metadata__": {}}), "holds no tensors at all"),
    "old pickle": (lambda c: pickle.dumps({"a": 1}, protocol=2) * 9, "pickle of an old format"),
}
# fmt: on


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_is_one_clear_error(damage: str, sound: bytes, tmp_path: Path) -> None:
    spoil, says = DAMAGE[damage]
    content = spoil(sound)
    assert content != sound
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    refused(file, says)
    refused(file, "weights.safetensors")


def test_an_80_gigabyte_hole_behind_a_forged_length_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with file.open("wb") as stream:
        stream.write((70 * 10**9).to_bytes(8, "little") + b"{")
        stream.truncate(80 * 10**9)
    refused(file, "70000000000 announced")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_file_or_can_not_be_read_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelNotFound, match=r"there is no file .*pipe\.safetensors"):
        inspect(tmp_path / "pipe.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelNotFound, match=r"weights\.safetensors' can't be read: Permission denied"):
        inspect(file)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_to_what_is_gone_are_said_to_be(tmp_path: Path) -> None:
    folder = shards(tmp_path / "vae")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "blobs" / "9f3a")
    refused(folder, r"lacks model-00002-of-00002\.safetensors \(a link to what is not there\)")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights.safetensors").symlink_to(tmp_path / "blobs" / "9f3a")
    with pytest.raises(ModelNotFound, match=r"weights\.safetensors' is a link to .*9f3a', which is not there"):
        inspect(tmp_path / "cache" / "weights.safetensors")
    with pytest.raises(ModelNotFound, match=r"holds no weights.*'weights\.safetensors' in it is a link to"):
        inspect(tmp_path / "cache")


def shards(folder: Path) -> Path:
    folder.mkdir()
    state = load_file(layouts.TINY / "vae" / "diffusion_pytorch_model.safetensors")
    names = sorted(state)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def of_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    change(table["weight_map"])
    index.write_text(json.dumps(table))


def test_shards_are_one_by_folder_and_by_any_of_them(tmp_path: Path) -> None:
    folder = shards(tmp_path / "vae")
    for path in (folder, folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"):
        assert [part.files for part in inspect(path).parts] == [2]


@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_shard_is_named(number: int, tmp_path: Path) -> None:
    folder = shards(tmp_path / "vae")
    (folder / f"model-0000{number}-of-00002.safetensors").unlink()
    refused(folder, rf"lacks model-0000{number}-of-00002\.safetensors \(1 of 2 files")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, rf"lacks model-0000{number}-of-00002\.safetensors \(1 of 2 files")


INDICES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor that is nowhere": (
        lambda f: of_index(f, lambda m: m.update({"never.stored": "model-00001-of-00002.safetensors"})),
        "differ in 1 tensors, e.g. 'never.stored'",
    ),
    "a tensor left out": (lambda f: of_index(f, lambda m: m.pop("quant_conv.bias") and None), "e.g. 'quant_conv.bias'"),
    "a file elsewhere": (
        lambda f: of_index(f, lambda m: m.update({"quant_conv.bias": "../../etc/passwd"})),
        "no file beside it",
    ),
    "a tensor in the wrong file": (
        lambda f: of_index(f, lambda m: m.update({sorted(m)[1]: "model-00001-of-00002.safetensors"})),
        "is in another file",
    ),
    "no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("<html>"), "is not JSON"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not a table"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(INDICES))
def test_an_index_that_is_wrong_is_said_to_be(case: str, tmp_path: Path) -> None:
    folder = shards(tmp_path / "vae")
    change, says = INDICES[case]
    change(folder)
    refused(folder, says)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("-inf"), -1.0])
def test_a_scale_that_is_no_number_is_damage(value: float, tmp_path: Path) -> None:
    file = next((layouts.write_comfy(tmp_path / "models", "fp8_scaled") / "diffusion_models").iterdir())
    state = load_file(file)
    state["model.diffusion_model.blocks.1.ffn.2.scale_weight"] = torch.tensor(value)
    save_file(state, file)
    refused(file, r"blocks\.1\.ffn\.2\.scale_weight.*NaN, infinite or zero")


SCALE = "model.diffusion_model.blocks.1.ffn.2.scale_weight"
WEIGHT = SCALE.replace("scale_weight", "weight")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop(SCALE), r"blocks\.1\.ffn\.2\.weight.*has no scale, where other weights"),
        (lambda state: state.pop(WEIGHT), r"is the scale of 'blocks\.1\.ffn\.2\.weight', which is not there"),
        (lambda state: state.update({SCALE: torch.ones(3)}), r"scale of .*is F32 \[3\]; one number, or one for each"),
    ],
    ids=["no scale", "no weight", "too few scales"],
)
def test_scales_that_fit_no_weights_are_damage(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, tmp_path: Path
) -> None:
    file = next((layouts.write_comfy(tmp_path / "models", "fp8_scaled") / "diffusion_models").iterdir())
    state = load_file(file)
    change(state)
    save_file(state, file)
    refused(file, says)


def test_a_table_of_positions_needs_no_scale_where_linears_have_one(tmp_path: Path) -> None:
    file = next((layouts.write_comfy(tmp_path / "models", "fp8_scaled") / "text_encoders").iterdir())
    state = load_file(file)
    [table] = [name for name in state if name.endswith("relative_attention_bias.weight")]
    state[table] = state[table].to(torch.float8_e4m3fn)
    state.pop(table.replace("bias.weight", "bias.scale_weight"), None)
    assert any(name.endswith("scale_weight") for name in state)
    save_file(state, file)
    assert inspect(file).parts[0].problem == ""


class Attack:
    """Runs a command when it is unpickled by anyone who runs pickles."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch attacked",)


def pth(file: Path, content: object) -> Path:
    torch.save(content, file)
    return file


def repacked(file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Rewrite a zip file with other members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def some_state() -> dict[str, torch.Tensor]:
    return layouts.official("vae")


def test_a_pickle_that_holds_code_is_refused_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 4):
        torch.save({**some_state(), "x": Attack()}, tmp_path / "Wan2.1_VAE.pth", pickle_protocol=protocol)
        refused(tmp_path / "Wan2.1_VAE.pth", r"holds code \((posix|nt)\.system\)")
    assert not (tmp_path / "attacked").exists()


def test_a_pickle_of_other_things_is_refused(tmp_path: Path) -> None:
    refused(pth(tmp_path / "w.pth", {"epoch": 3, "lr": 0.1}), "'epoch' is a int")
    refused(pth(tmp_path / "w.pth", [torch.ones(2)]), "no dict of tensors")
    refused(pth(tmp_path / "w.pth", {}), "no dict of tensors")


@pytest.mark.parametrize("cut", [10, 3000, 100_000, -30, -1])
def test_a_pth_that_is_cut_short_is_refused(cut: int, tmp_path: Path) -> None:
    file = pth(tmp_path / "Wan2.1_VAE.pth", some_state())
    file.write_bytes(file.read_bytes()[:cut])
    refused(file, r"Wan2\.1_VAE\.pth.*cut short or damaged")


def test_a_zip_that_is_no_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(file, "without torch's data.pkl")


def test_a_pth_that_lacks_a_tensors_bytes_is_refused(tmp_path: Path) -> None:
    file = repacked(pth(tmp_path / "w.pth", some_state()), lambda members: members.pop("w/data/3") and None)
    refused(file, r"needs \d+ bytes and has 0")


def test_a_pth_with_a_directory_of_a_forged_length_is_refused(tmp_path: Path) -> None:
    file = pth(tmp_path / "w.pth", some_state())
    content = bytearray(file.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 2**32 - 2)
    file.write_bytes(content)
    refused(file, "a list of contents of 4294967294 bytes is announced")


def test_a_pth_whose_directory_points_elsewhere_is_refused(tmp_path: Path) -> None:
    file = pth(tmp_path / "w.pth", some_state())
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"w/data/3") - 46
    content[entry + 42 : entry + 46] = struct.pack("<I", 7)
    file.write_bytes(content)
    refused(file, r"'w/data/3\d*' is not where its list of contents says")


def test_a_pth_that_is_compressed_is_refused(tmp_path: Path) -> None:
    file = pth(tmp_path / "w.pth", some_state())
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(file, "is compressed, as torch never writes it")


def test_a_pickle_bomb_is_refused(tmp_path: Path) -> None:
    file = pth(tmp_path / "w.pth", some_state())

    def bomb(members: dict[str, bytes]) -> None:
        members["w/data.pkl"] = b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b"j" + struct.pack("<I", 5) + b"."

    refused(repacked(file, bomb), "pickle in 'w.pth' is damaged")


def test_what_torch_saves_reads_as_torch_reads_it(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    base = torch.arange(24.0).view(4, 6)
    cases: list[dict[str, object]] = [
        dict(module.state_dict()),
        {"state_dict": module.state_dict()},
        {"a": base[1:3], "b": base.t(), "c": torch.ones((), dtype=torch.bfloat16), "d": torch.zeros(0, 5).half()},
        {"p": torch.nn.Parameter(torch.ones(2, 2))},
        {"e4": base[1:, 2:].to(torch.float8_e4m3fn), "e5": base.to(torch.float8_e5m2).t(), "b": base.bfloat16()},
    ]
    for protocol, case in itertools.product((2, 4), cases):
        torch.save(case, tmp_path / "w.pth", pickle_protocol=protocol)
        header = read_pickle_header(tmp_path / "w.pth")
        table = case.get("state_dict", case)
        assert isinstance(table, dict)
        assert {n: i.shape for n, i in header.tensors.items()} == {n: tuple(t.shape) for n, t in table.items()}
        for name, info in header.tensors.items():
            assert torch.equal(read_stored(StoredTensor(name, info, info.shape)), table[name].float()), name
    file = tmp_path / "ordered.pth"
    torch.save(module.state_dict(), file)  # an OrderedDict with an attribute
    assert read_pickle_header(file).tensors["0.weight"].dtype == "F32"


def small() -> bytes:
    stream = io.BytesIO()
    from safetensors.torch import save

    stream.write(save({"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, {"format": "pt"}))
    return stream.getvalue()


SMALL = small()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    changes=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.sampled_from([len(SMALL), 7, 40, len(SMALL) - 1]),
)
@settings(max_examples=250, deadline=None)
def test_no_change_of_bytes_is_anything_but_read_or_refused(
    changes: list[tuple[int, int]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(SMALL)
    for place, value in changes:
        content[place] = value
    check_like_safetensors(bytes(content[:length]), tmp_path_factory.getbasetemp() / "fuzzed.safetensors")


@given(table=st.dictionaries(st.text(max_size=8), JSON, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_header_is_anything_but_read_or_refused(
    table: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = json.dumps(table).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(34)
    check_like_safetensors(content, tmp_path_factory.getbasetemp() / "invented.safetensors")


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "F4"]),
        "shape": st.lists(st.integers(-1, 6), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
    }
)


@given(table=st.dictionaries(st.text(max_size=4), ENTRY, max_size=3), size=st.integers(0, 60))
@settings(max_examples=250, deadline=None)
def test_no_entry_is_anything_but_read_or_refused(
    table: dict[str, object], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = json.dumps(table).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(size)
    check_like_safetensors(content, tmp_path_factory.getbasetemp() / "entries.safetensors")


def check_like_safetensors(content: bytes, file: Path) -> None:
    """Check that a file is read or refused, and never read where the safetensors library itself refuses it."""
    file.write_bytes(content)
    try:
        tensors = read_file_header(file).tensors if file.suffix != ".safetensors" else read_safetensors(file).tensors
    except WanLocalError:
        return
    assert all(info.offset + info.nbytes <= len(content) for info in tensors.values())
    with safe_open(file, framework="pt") as theirs:
        assert set(theirs.keys()) == set(tensors)


@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5),
    keep=st.floats(0.2, 1),
    protocol=st.sampled_from((2, 4)),
)
@settings(max_examples=150, deadline=None)
def test_no_change_of_a_pickle_is_anything_but_read_or_refused(
    changes: list[tuple[int, int]], keep: float, protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stream = io.BytesIO()
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(5).bfloat16(), "c": torch.ones(4, 2).to(torch.float8_e4m3fn).t()}
    torch.save(tensors, stream, pickle_protocol=protocol)
    with zipfile.ZipFile(stream) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    content = bytearray(members[name])
    for place, value in changes:
        content[place % len(content)] = value
    members[name] = bytes(content[: max(1, int(keep * len(content)))])
    file = tmp_path_factory.getbasetemp() / "fuzzed.pth"
    with zipfile.ZipFile(file, "w") as archive:
        for member, inside in members.items():
            archive.writestr(member, inside)
    try:
        read_pickle_header(file)
    except WanLocalError:
        return
