"""Whole files and locks on file systems that lack something: no finished work and no run is lost to that."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from wan_local import durable


def refused(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is another there")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_everyone_goes_on_with_one_warning(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise refused(code)

    durable._warn_of_no_locks.cache_clear()
    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):
        lock = durable.Lock(tmp_path / "lock")
        assert lock.acquire()
        lock.release()
    assert caplog.text.count("can be locked there") == 1


def test_a_lock_that_is_held_is_not_given_twice(tmp_path: Path) -> None:
    first, second = durable.Lock(tmp_path / "lock"), durable.Lock(tmp_path / "lock")
    assert first.acquire() and not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def fsync_of_folders_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.fsync

    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise refused(code)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(sys.platform == "win32", reason="no folder is flushed there")
def test_a_folder_that_cannot_be_flushed_fails_no_file_and_a_broken_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_of_folders_fails(monkeypatch, errno.EINVAL)
    durable.write(tmp_path / "x", [b"whole"])
    assert (tmp_path / "x").read_bytes() == b"whole"
    fsync_of_folders_fails(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        durable.write(tmp_path / "y", [b""])


def test_a_file_that_another_program_has_just_opened_is_put_in_place_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = os.replace, []

    def replace(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "a virus scanner looks at it")
        real(source, target)

    monkeypatch.setattr(durable, "_REPLACE_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "replace", replace)
    durable.write(tmp_path / "x", [b"whole"])
    assert (tmp_path / "x").read_bytes() == b"whole" and len(tries) == 3
    tries.clear()
    monkeypatch.setattr(durable, "_REPLACE_SECONDS", (0.0,))
    with pytest.raises(PermissionError, match="virus scanner"):
        durable.write(tmp_path / "y", [b""])
    assert not (tmp_path / "y").exists()


def test_a_partial_file_that_cannot_be_removed_keeps_the_others_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refuse_one(self: Path, missing_ok: bool = False) -> None:
        if "open" in self.name:
            raise PermissionError(errno.EACCES, "another process has it open")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_one)
    for folder, sweep in (
        (tmp_path / "records", lambda folder: durable.sweep(folder, older_than_seconds=0.0)),
        (tmp_path / "videos", lambda folder: durable.sweep_after("run", folder)),
    ):
        folder.mkdir()
        for ending in (".open", ".a", ".z"):
            (folder / durable.partial_name("run", ending)).touch()
        sweep(folder)
        assert [path.suffixes[-2] for path in folder.iterdir()] == [".open"]
