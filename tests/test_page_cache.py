from __future__ import annotations

import errno
import os
import sys
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_local import page_cache
from wan_local.errors import CorruptModel
from wan_local.extent import read_once
from wan_local.header import TensorInfo, read_header
from wan_local.page_cache import BLOCK, Appender, aligned_bytes, read_past_cache

NUMBERS = 2**21
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has O_DIRECT")


@pytest.fixture
def expected() -> torch.Tensor:
    return torch.arange(NUMBERS, dtype=torch.int32).view(torch.uint8)


@pytest.fixture
def info(tmp_path: Path, expected: torch.Tensor) -> TensorInfo:
    """Return a tensor of 8 MiB in a file that the page cache does not hold; it begins in the midst of a block."""
    file = tmp_path / "weights.safetensors"
    save_file({"weight": expected.view(torch.int32)}, file)
    forget(file)
    return read_header(file)["weight"]


def forget(file: Path) -> None:
    if sys.platform != "linux":
        return
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def past_cache(file: Path, offset: int, count: int) -> int:
    with file.open("rb") as stream:
        return read_past_cache(stream.fileno(), offset, aligned_bytes(count))


@pytest.mark.parametrize(
    ("begin", "count"),
    [(0, 2**20), (4, 2**20), (2**20 + 12, 2**20 + 4), (2**22, 2**22), (4096, 400_000), (8, 100), (2**22, 0)],
)
def test_any_bytes_are_read_whether_cached_or_not(
    info: TensorInfo, expected: torch.Tensor, begin: int, count: int
) -> None:
    for _ in range(2):
        content = read_once(info, info.offset + begin, count)
        assert torch.equal(content, expected[begin : begin + count])
        content.view(torch.int32)
        info.file.read_bytes()


def test_numbers_at_an_odd_place_can_be_looked_at_as_numbers(info: TensorInfo, expected: torch.Tensor) -> None:
    content = read_once(info, info.offset + 3, 2**20)
    assert torch.equal(content, expected[3 : 3 + 2**20])
    content.view(torch.int32)


@LINUX
def test_the_end_of_a_file_is_read_past_the_cache_too(info: TensorInfo) -> None:
    if past_cache(info.file, BLOCK, 2**20) == 0:
        pytest.skip("this file system has no reading past the cache")
    begin = 7 * 2**20
    assert past_cache(info.file, begin, 2**21) == info.file.stat().st_size - begin < 2**21


@LINUX
def test_what_is_read_once_does_not_fill_the_cache_and_what_is_cached_comes_from_there(info: TensorInfo) -> None:
    if past_cache(info.file, BLOCK, 2**20) == 0:
        pytest.skip("this file system has no reading past the cache")
    read_once(info, info.offset, 2**22)
    assert past_cache(info.file, BLOCK, 2**20) == 2**20, "reading filled the cache"
    info.file.read_bytes()
    assert past_cache(info.file, BLOCK, 2**20) == 0, "a cached file was read from the disk again"


@LINUX
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_refuses_is_read_plainly(
    info: TensorInfo, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = []

    def refuse(*_: object) -> int:
        calls.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(page_cache.os, "preadv", refuse)
    monkeypatch.setattr(page_cache, "_is_cached", lambda *_: False)
    assert torch.equal(read_once(info, info.offset, 2**20), expected[: 2**20])
    assert calls


def test_elsewhere_all_is_read_and_written_as_always(
    info: TensorInfo, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(page_cache.mmap, "MAP_SHARED", raising=False)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert torch.equal(read_once(info, info.offset, 2**20), expected[: 2**20])
    with (tmp_path / "new").open("w+b", buffering=0) as stream:
        output = Appender(stream, 0)
        for some in (b"abc", bytes(5000), b"xyz"):
            output.append(some)
            output.hand_over()
        stream.truncate(output.end)
    assert (tmp_path / "new").read_bytes() == b"abc" + bytes(5000) + b"xyz"


@LINUX
def test_a_disk_that_fails_is_an_error(info: TensorInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(page_cache.os, "preadv", fail)
    monkeypatch.setattr(page_cache, "_is_cached", lambda *_: False)
    with pytest.raises(OSError, match="Input/output"):
        read_once(info, info.offset, 2**20)


@pytest.mark.parametrize("stamped", [True, False])
def test_a_file_that_is_cut_short_or_changed_is_an_error(info: TensorInfo, *, stamped: bool) -> None:
    if not stamped:
        info = TensorInfo(info.dtype, info.shape, info.file, info.nbytes, info.offset)
    os.truncate(info.file, 2**20 + 5)
    forget(info.file)
    for begin in (0, 2**20 - 2**19, 2**22):
        with pytest.raises(CorruptModel, match="changed while it was in use" if stamped else "cut short"):
            read_once(info, info.offset + begin, 2**20)


class Slow(FileIO):
    """A file that takes fewer bytes at a time than it is given, and none where `refused` says why not."""

    refused: OSError | None = None

    def write(self, content: memoryview) -> int:  # type: ignore[override]
        if self.refused is not None:
            error, self.refused = self.refused, None
            raise error
        return super().write(content[: 3 * BLOCK])


@pytest.mark.parametrize("refused", [None, errno.EINVAL])
def test_what_was_handed_over_is_good_whatever_follows_and_is_gone_on_with_at_any_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor, refused: int | None
) -> None:
    monkeypatch.setattr(page_cache, "_WRITE_BYTES", 4 * BLOCK)
    content, file, end = expected.numpy().tobytes(), tmp_path / "store", 0
    file.touch()
    for lengths in ((8, 5000, 40_000), (BLOCK - 1, 1, 0), (3 * BLOCK, 4 * BLOCK, 100_001)):
        with Slow(file, "r+b") as stream:
            output = Appender(stream, end)
            if refused is not None and output._past_cache:
                stream.refused = OSError(refused, os.strerror(refused))
            for length in lengths:
                output.append(memoryview(content)[output.end : output.end + length])
                if length % 2:
                    output.hand_over()
                    end = output.end
                assert file.read_bytes()[:end] == content[:end]
            output.hand_over()
            end = output.end
            stream.truncate(end)
        assert file.read_bytes() == content[:end]
    assert end == 8 + 5000 + 40_000 + BLOCK + 7 * BLOCK + 100_001


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    with Slow(tmp_path / "store", "w+b") as stream:
        output = Appender(stream, 0)
        output.append(b"some")
        stream.refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            output.hand_over()


@LINUX
def test_what_is_appended_does_not_fill_the_cache(info: TensorInfo, tmp_path: Path) -> None:
    if past_cache(info.file, BLOCK, 2**20) == 0:
        pytest.skip("this file system has no writing past the cache")
    with (tmp_path / "store").open("w+b", buffering=0) as stream:
        output = Appender(stream, 0)
        output.append(bytes(2**21))
        output.hand_over()
    assert past_cache(tmp_path / "store", 0, 2**20) == 2**20
