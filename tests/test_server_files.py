"""The server's folder of uploads: addresses that last, the same bytes once, room that is made, nothing half."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from wan_local.server.files import ServedFiles, TooLarge

BASE = "http://127.0.0.1:8787"


def files_in(folder: Path, **bounds: int) -> ServedFiles:
    return ServedFiles(folder, base_url=BASE, **{"max_upload_bytes": 1000, "max_uploads_bytes": 10_000, **bounds})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".secret")


async def chunks(*given: bytes | Exception) -> AsyncIterator[bytes]:
    for chunk in given:
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


def test_the_same_bytes_are_kept_once_under_an_address_that_lasts(tmp_path: Path) -> None:
    first, again = files_in(tmp_path).upload(b"x", "image/png"), files_in(tmp_path).upload(b"x", "image/png")
    assert first == again
    assert first != files_in(tmp_path).upload(b"y", "image/png")
    assert len(names(tmp_path)) == 2
    path = files_in(tmp_path).path_of_url(first)
    assert path is not None and path.read_bytes() == b"x"


def test_a_videos_address_follows_from_its_path_and_a_secret(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    video = tmp_path / "a video.mp4"
    video.write_bytes(b"x")
    target = files_in(tmp_path / "a").target_of(video)
    assert target == files_in(tmp_path / "a").target_of(video)
    assert target != files_in(tmp_path / "b").target_of(video)
    assert target.endswith("/a%20video.mp4")
    assert files_in(tmp_path / "a").path_of_url(BASE + target) is None  # nobody gave it out in this process
    assert (tmp_path / "a" / ".secret").stat().st_mode & 0o077 == 0 or os.name == "nt"


@pytest.mark.parametrize(
    "url",
    ["", "x", f"{BASE}/files", f"{BASE}/files/a/b/c", f"{BASE}/files/*/*", "file:///files/a/b", f"{BASE}/files/../x",
     f"{BASE}/files/.secret/.secret", "http://[::1/files/a/b"],
)  # fmt: skip
def test_what_is_none_of_our_addresses_is_no_file(tmp_path: Path, url: str) -> None:
    files = files_in(tmp_path)
    files.upload(b"x", "image/png")
    assert files.path_of_url(url) is None


def test_an_upload_that_breaks_off_or_is_too_large_leaves_nothing(tmp_path: Path) -> None:
    files = files_in(tmp_path)

    def write(*given: bytes | Exception) -> str:
        return asyncio.run(files.write(files.begin("image/png"), chunks(*given)))

    with pytest.raises(ConnectionError):
        write(b"half", ConnectionError("gone"))
    with pytest.raises(TooLarge, match="at most 1000 bytes"):
        write(b"x" * 600, b"x" * 401)
    assert names(tmp_path) == []
    assert write(b"x" * 600, b"x" * 400).startswith('"')
    assert len(names(tmp_path)) == 1


def test_parts_are_joined_in_their_order_and_missing_ones_are_named(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    upload = files.begin("image/png")
    for number, content in ((2, b"second"), (1, b"first ")):
        asyncio.run(files.write_part(upload, number, chunks(content)))
    with pytest.raises(LookupError, match=r"parts \[3\] were not uploaded"):
        files.join(upload, [1, 2, 3])
    files.join(upload, [1, 2])
    assert upload.path.read_bytes() == b"first second"
    assert names(tmp_path) == [upload.path.name]


def test_old_uploads_make_room_for_new_ones_and_young_ones_do_not(tmp_path: Path) -> None:
    files = files_in(tmp_path, max_uploads_bytes=2500)
    kept = [files.keep(bytes([number]) * 1000, "image/png").path for number in range(3)]
    with pytest.raises(TooLarge, match="less than an hour old"):
        files.keep(b"more", "image/png")
    long_ago = time.time() - 7200
    os.utime(kept[1], (long_ago, long_ago))
    files.keep(b"more", "image/png")
    assert [path.exists() for path in kept] == [True, False, True]


def test_what_an_earlier_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    upload = files.begin("image/png")
    asyncio.run(files.write_part(upload, 1, chunks(b"x")))
    (tmp_path / "cut.png.part").write_bytes(b"x")
    (tmp_path / f"{upload.token}.parts" / "2.ab.part").write_bytes(b"x")
    files_in(tmp_path)
    assert names(tmp_path) == [f"{upload.token}.parts"]  # it may go on
    assert names(tmp_path / f"{upload.token}.parts") == ["1"]
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / f"{upload.token}.parts", (long_ago, long_ago))
    files_in(tmp_path)
    assert names(tmp_path) == []


def test_only_what_was_begun_on_this_folder_can_be_found(tmp_path: Path) -> None:
    files = files_in(tmp_path / "a")
    upload = files.begin("image/png")
    assert files_in(tmp_path / "a").find(upload.token, ".png") == upload  # by a later process
    kept = files.keep(b"x", "image/png")
    for token, suffix in (
        ("A" * 32, ".png"), (upload.token[::-1], ".png"), (upload.token, ".html"), (upload.token[:16] * 2, ".png"),
        (kept.token, ".png"), (files_in(tmp_path / "b").begin("image/png").token, ".png"),
    ):  # fmt: skip
        assert files.find(token, suffix) is None, (token, suffix)


def test_parts_that_are_named_twice_or_together_too_much_are_not_joined(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    upload = files.begin("image/png")
    asyncio.run(files.write_part(upload, 1, chunks(b"x" * 600)))
    with pytest.raises(LookupError, match="named twice"):
        files.join(upload, [1, 1])
    (tmp_path / f"{upload.token}.parts" / "2").write_bytes(b"x" * 600)  # as of two that came at the same time
    with pytest.raises(TooLarge, match="1200 bytes"):
        files.join(upload, [1, 2])
    assert names(tmp_path) == [f"{upload.token}.parts"]


@pytest.mark.parametrize("earlier", [False, True])
def test_parts_count_and_no_upload_goes_beyond_the_bound(tmp_path: Path, earlier: bool) -> None:
    files = files_in(tmp_path, max_uploads_bytes=2500)
    begun = [files.begin("image/png") for _ in range(4)]
    for upload in begun[:2]:
        asyncio.run(files.write_part(upload, 1, chunks(b"x" * 1000)))
    if earlier:
        files = files_in(tmp_path, max_uploads_bytes=2500)
    with pytest.raises(TooLarge, match="at most 2500 are kept"):
        asyncio.run(files.write(begun[2], chunks(b"x" * 400, b"x" * 400)))
    asyncio.run(files.write(begun[2], chunks(b"x" * 400)))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and path.name != ".secret") == 2400
    long_ago = time.time() - 7200
    os.utime(tmp_path / f"{begun[0].token}.parts", (long_ago, long_ago))
    asyncio.run(files.write(begun[3], chunks(b"x" * 800)))
    assert names(tmp_path) == sorted([f"{begun[1].token}.parts", begun[2].path.name, begun[3].path.name])


def test_names_never_come_from_the_sender(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    given: list[Any] = ["../../x", "image/../../x", "text/html", "", "image/png; name=../x"]
    for content_type in given:
        path = files.begin(content_type).path
        assert path.parent == tmp_path
        assert path.suffix in (".png", ".html", ".bin", ".htm")
    for token, suffix in (("x", ".png"), ("A" * 32, "/../x"), ("A" * 32, ".p/g"), ("A" * 31 + "/", ".png")):
        assert files.find(token, suffix) is None
