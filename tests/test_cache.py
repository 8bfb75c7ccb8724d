"""A second run with the same inputs reads no encoder and gives the same bits; nothing stale, nothing half, no end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stamps import END, START, stamp_request, stamp_settings
from wan_local import encoders, pipeline, preparation
from wan_local.cache import EncodingCache, make_key
from wan_local.checkpoint import ModelFiles, PartTensors, find_model
from wan_local.convert import Conversion, convert
from wan_local.identity import folder_identity, part_identity, part_times
from wan_local.planner import Plan
from wan_local.record import fingerprint, read_record, write_record
from wan_local.settings import Settings, load_settings
from wan_local.sources import open_source
from wan_local.weight_format import WeightFormats
from wan_local.workspace import Workspace

ENCODERS = {"text_encoder", "image_encoder"}


@dataclass(frozen=True)
class Stamps:
    """Settings whose cache is warm with what one request needs, and that request's video."""

    settings: Settings
    video: bytes


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stamps]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stamps")
        settings = stamp_settings(folder, patch, state_dir=folder / "state", cache_dir=folder / "cache")
        pipeline.generate(stamp_request(), settings=settings, output=folder / "x.mp4")
        yield Stamps(settings, (folder / "x.mp4").read_bytes())


@pytest.fixture
def settings(stamps: Stamps, tmp_path: Path) -> Settings:
    """Settings with a copy of the warm cache."""
    shutil.copytree(stamps.settings.cache_dir, tmp_path / "cache")
    return replace(stamps.settings, cache_dir=tmp_path / "cache", state_dir=tmp_path / "state", output_dir=tmp_path)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The networks that were loaded, in order."""
    names: list[str] = []
    opening = Workspace.open

    def recorded(self: Workspace, network: Any, rung: Any) -> Any:
        names.append(network)
        return opening(self, network, rung)

    monkeypatch.setattr(Workspace, "open", recorded)
    return names


def make(settings: Settings, folder: Path, **changes: Any) -> bytes:
    pipeline.generate(stamp_request(**changes), settings=settings, output=folder / "made.mp4")
    return (folder / "made.mp4").read_bytes()


def test_on_a_full_hit_no_weight_of_an_encoder_is_read_and_the_video_is_the_same(
    settings: Settings, stamps: Stamps, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[str] = []
    begin, read = PartTensors.__init__, PartTensors.__getitem__

    def begun(self: PartTensors, files: ModelFiles, part: Any, *rest: Any, **options: Any) -> None:
        begin(self, files, part, *rest, **options)
        self.part = part  # type: ignore[attr-defined]

    def recorded(self: PartTensors, name: str) -> torch.Tensor:
        parts.append(self.part)  # type: ignore[attr-defined]
        return read(self, name)

    monkeypatch.setattr(PartTensors, "__init__", begun)
    monkeypatch.setattr(PartTensors, "__getitem__", recorded)
    monkeypatch.setattr(encoders, "load_tokenizer", lambda _: pytest.fail("the tokenizer was loaded"))
    assert make(settings, tmp_path) == stamps.video
    assert opened == ["context_embedder", "transformer", "vae_decoder"]
    assert parts and not ENCODERS & set(parts)


def test_only_what_changed_is_encoded_again_and_nothing_stale_is_used(
    settings: Settings, stamps: Stamps, opened: list[str], tmp_path: Path
) -> None:
    """A, B, A: each gives what a fresh machine gives."""
    cold = replace(settings, cache_gigabytes=0.0)
    for change, loaded in (
        ({"prompt": "a red square falls"}, ["text_encoder"]),
        ({"end_image_url": START, "start_image_url": END}, ["image_encoder", "vae_encoder"]),
        ({"num_frames": 85}, ["vae_encoder"]),
        ({"guide_scale": 1}, []),
        ({"seed": 7}, []),
        ({"prompt": "  a small   blue bird takes off "}, []),  # the same prompt once it is cleaned
    ):
        fresh = make(cold, tmp_path, **change)
        opened.clear()
        assert make(settings, tmp_path, **change) == fresh, change
        assert opened[: len(loaded)] == loaded and opened[len(loaded)] == "context_embedder", change
        opened.clear()
        assert make(settings, tmp_path) == stamps.video
        assert opened[0] == "context_embedder"


def test_a_cut_prompt_is_told_on_a_hit_too(settings: Settings, tmp_path: Path) -> None:
    for _ in range(2):
        result = pipeline.generate(
            stamp_request(prompt="red square moving " * 300), settings=settings, output=tmp_path / "x.mp4"
        )
        assert "beyond 512 were left out" in result.report["notes"][0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_entry_is_made_again(
    settings: Settings, stamps: Stamps, opened: list[str], tmp_path: Path, damage: str
) -> None:
    [entry] = settings.cache_dir.glob("image-*")
    whole, record = entry.read_bytes(), read_record(entry)
    flipped = bytearray(whole)
    flipped[-3] ^= 0x10
    entry.write_bytes({"flipped": bytes(flipped), "cut": whole[:-100], "empty": b""}[damage])
    assert make(settings, tmp_path) == stamps.video
    made = read_record(entry)
    assert opened[0] == "image_encoder" and made is not None and record is not None
    assert made.header == record.header and fingerprint(made.tensors.values()) == fingerprint(record.tensors.values())


def test_an_encoding_that_is_not_finite_is_not_kept(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encoders.embed_images
    monkeypatch.setattr(encoders, "embed_images", lambda *args: encode(*args) * float("nan"))
    swapped = {"start_image_url": END, "end_image_url": START}
    before = sorted(path.name for path in settings.cache_dir.glob("image-*"))
    with pytest.raises(ArithmeticError):
        make(settings, tmp_path, **swapped)
    assert sorted(path.name for path in settings.cache_dir.glob("image-*")) == before


def test_off_means_nothing_is_written_and_a_folder_that_cannot_be_written_is_no_error(
    settings: Settings, stamps: Stamps, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    off = replace(settings, cache_dir=tmp_path / "none", cache_gigabytes=0.0)
    assert make(off, tmp_path) == stamps.video
    assert not off.cache_dir.exists()
    (tmp_path / "file").write_text("in the way")
    assert make(replace(settings, cache_dir=tmp_path / "file"), tmp_path) == stamps.video
    assert "could not be kept" in caplog.text


# The cache itself


def test_the_least_recently_used_go_first_and_the_bound_holds(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, 9000)
    for index, key in enumerate(("text-a", "text-b", "text-c")):
        cache.put(key, {"x": torch.full((700,), float(index))})
        os.utime(tmp_path / f"{key}.safetensors", (index, index))
    assert cache.get("text-a") is not None  # used just now, so b is the oldest
    cache.put("text-d", {"x": torch.zeros(700)})
    assert {entry.path.stem for entry in cache.entries()} == {"text-a", "text-d"} | {"text-c"} - set()
    assert sum(entry.file_bytes for entry in cache.entries()) <= 9000
    cache.put("text-huge", {"x": torch.zeros(10_000)})
    assert cache.get("text-huge") is None, "what is larger than the bound is not kept"
    assert EncodingCache(tmp_path, 9000).clear() == 0


def test_several_threads_and_processes_share_a_folder(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
import torch
from pathlib import Path
from wan_local.cache import EncodingCache
cache = EncodingCache(Path({str(tmp_path)!r}), 40_000)
print("ready", flush=True)
for turn in range(150):
    name = turn % 8
    record = cache.get(f"text-{{name}}")
    assert record is None or bool((record.tensors["x"] == name).all())
    cache.put(f"text-{{name}}", {{"x": torch.full((1000,), float(name))}})
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    cache, wrong = EncodingCache(tmp_path, 40_000), []

    def work() -> None:
        for turn in range(60):
            name = turn % 8
            record = cache.get(f"text-{name}")
            if record is not None and not bool((record.tensors["x"] == name).all()):
                wrong.append(name)
            cache.put(f"text-{name}", {"x": torch.full((1000,), float(name))})

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 0, errors
    assert not wrong and not list(tmp_path.glob("*.part"))
    assert sum(entry.file_bytes for entry in cache.entries()) <= 40_000


def test_a_key_tells_every_input_apart() -> None:
    keys = {make_key("text", prompt=p, length=n) for p in ("a", "b", "\ud800") for n in (1, 2)} | {make_key("image")}
    assert len(keys) == 7 and all(key.startswith(("text-", "image-")) for key in keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_a_record_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randint(0, 99, (3, 4, 5)).to(dtype),
        "scalar": torch.tensor(7).to(dtype),
        "none": torch.empty(0),
    }
    write_record(tmp_path / "r", tensors, {"words": "ä", "number": 0.1})
    record = read_record(tmp_path / "r")
    assert record is not None and record.header == {"words": "ä", "number": 0.1}
    assert record.tensors.keys() == tensors.keys()
    assert all(torch.equal(record.tensors[name], tensor) for name, tensor in tensors.items())
    assert fingerprint(tensors.values()) == fingerprint(record.tensors[name] for name in tensors)


def test_every_flipped_byte_of_a_record_is_noticed(tmp_path: Path) -> None:
    write_record(tmp_path / "r", {"a": torch.arange(40.0)}, {"timestep": 999})
    whole = (tmp_path / "r").read_bytes()
    for position in range(len(whole)):
        if whole[position : position + 1] == b" ":
            continue  # the padding of safetensors' header says nothing
        flipped = bytearray(whole)
        flipped[position] ^= 0x02
        (tmp_path / "r").write_bytes(flipped)
        record = read_record(tmp_path / "r")
        unharmed = record is not None and torch.equal(record.tensors.get("a", torch.empty(0)), torch.arange(40.0))
        assert record is None or (unharmed and record.header == {"timestep": 999}), position


def test_identity_stays_with_the_content_and_not_with_the_place(tmp_path: Path) -> None:
    files = find_model(load_settings(model="tiny"))
    shutil.copytree(files.folder, tmp_path / "copy")
    copy = find_model(load_settings(model=str(tmp_path / "copy")))
    assert part_identity(files, "vae") == part_identity(copy, "vae")
    assert folder_identity(files.folder / "tokenizer") == folder_identity(copy.folder / "tokenizer")
    [weights] = (tmp_path / "copy" / "vae").glob("*.safetensors")
    times, content = part_times(copy, "vae"), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1, 1))
    assert part_identity(copy, "vae") != part_identity(files, "vae")
    assert part_times(copy, "vae") != times
    assert part_identity(copy, "text_encoder") == part_identity(files, "text_encoder")


def test_identity_reads_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = find_model(load_settings(model="tiny"))
    large = tmp_path / "large.bin"
    with large.open("wb") as stream:
        stream.truncate(20 * 2**30)  # sparse: takes no room
    infos = {"w": replace(next(iter(files.tensors["vae"].values())), file=large)}
    huge = ModelFiles(files.folder, files.config, {**files.tensors, "vae": infos})
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("a whole file was read"))
    assert part_identity(huge, "vae")


def test_what_int8_weights_are_used_by_tells_encodings_apart_and_is_the_same_in_every_run(
    settings: Settings, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outliers of T5 are too far out for int8 inputs: the encoders' are never rounded, whatever the loop's are."""
    make_plan = preparation.make_plan
    store = tmp_path / "store"
    convert(Conversion(open_source(find_model(settings).folder), WeightFormats("bf16", "int8", "int8")), store)
    for arithmetic, encoded in (("w8a8", ENCODERS), ("weight-only", set())):
        opened.clear()
        run = replace(settings, model=str(store), int8_arithmetic=arithmetic)
        result = pipeline.generate(stamp_request(), settings=run, output=tmp_path / "made.mp4")
        assert ENCODERS & set(opened) == encoded
        assert result.report["weights"]["int8_arithmetic"] == {"text": "weight-only", "image": "weight-only"}

    def rounding(*args: Any, **kwargs: Any) -> Plan:
        plan = make_plan(*args, **kwargs)
        return replace(plan, stages=tuple(replace(stage, int8_arithmetic="w8a8") for stage in plan.stages))

    opened.clear()
    monkeypatch.setattr(preparation, "make_plan", rounding)
    make(replace(settings, model=str(store)), tmp_path)
    assert set(opened) >= ENCODERS
