"""Files that are whole or not there, and a lock that ends with its process. No torch.

A file is written under a temporary name beside its own, flushed to the disk, and renamed: whoever reads it, now or
after a power cut, finds all of it or nothing.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from wan_local.errors import OutputError

PARTIAL = ".part"
_STALE_SECONDS = 3600.0  # a partial file this old has no writer any more
_PATIENCE_SECONDS = (0.0, 0.01, 0.04)


def write(path: Path, chunks: Iterable[bytes]) -> None:
    """Put a file in place at once. Raises OSError; whatever was there before is then untouched."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents that no other user of the machine can look into."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def make_output_dir(folder: Path) -> None:
    """Create the folder of the videos and its parents. Raises OutputError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        way_out = "Choose another: --output-dir of `serve`, --output of `generate`, or WAN_LOCAL_OUTPUT_DIR."
        raise OutputError(f"the folder {folder} cannot be made: {error.strerror or error}. {way_out}") from error


def sweep(folder: Path, *, older_than_seconds: float = _STALE_SECONDS) -> None:
    """Remove what a killed writer left in `folder`."""
    for partial in folder.glob(f".*{PARTIAL}"):
        try:
            if time.time() - partial.stat().st_mtime >= older_than_seconds:
                partial.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # its writer has just finished


def partial_name(owner: str, suffix: str) -> str:
    """Return a new name for a file that `owner`, a run or a process, is about to make: `sweep_after` knows it again."""
    return f".wan_local-{owner}-{secrets.token_hex(4)}{suffix}{PARTIAL}"


def sweep_after(owner: str, folder: Path) -> None:
    """Remove what `owner`, who writes no more, left in `folder` under partial names."""
    for partial in folder.glob(f".wan_local-{owner}-{'[0-9a-f]' * 8}.*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where a folder can be flushed at all (not on Windows)."""
    if sys.platform != "win32":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


class Lock:
    """An exclusive lock on a file; the system lets go of it when its process ends, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number: int | None = None

    def acquire(self) -> bool:
        """Take the lock and tell whether it was free. Raises OSError where there can be no such file."""
        number = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        for pause in _PATIENCE_SECONDS:  # someone may be looking whether it is free
            time.sleep(pause)
            try:
                _lock(number)
            except OSError:
                continue
            self._number = number
            return True
        os.close(number)
        return False

    def release(self) -> None:
        """Let go; idempotent."""
        if self._number is not None:
            os.close(self._number)
            self._number = None


def _lock(number: int) -> None:
    """Lock an open file without waiting; OSError where another has it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
