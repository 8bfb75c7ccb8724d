"""Files that are whole or not there, and a lock that ends with its process. No torch.

A file is written under a temporary name beside its own, flushed to the disk, and renamed: whoever reads it, now or
after a power cut, finds all of it or nothing.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from wan_local.errors import OutputError

PARTIAL = ".part"
_STALE_SECONDS = 3600.0  # a partial file this old has no writer any more
_PATIENCE_SECONDS = (0.0, 0.01, 0.04)
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # the last two as Windows says it
_REPLACE_SECONDS = (0.05, 0.2, 0.5)  # a virus scanner on Windows looks at a new file for about so long
# a file system that has no such thing, or a folder that may be written to and not read
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM)
TOO_LARGE = "no file there may grow as large (FAT32: 4 GB at most)"
_log = logging.getLogger(__name__)


def write(path: Path, chunks: Iterable[bytes]) -> None:
    """Put a file in place at once. Raises OSError; whatever was there before is then untouched."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        replace(partial, path)
        flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace(partial: Path, path: Path) -> None:
    """Rename a complete file to its name, patiently where another program has just opened it. Raises OSError."""
    for pause in _REPLACE_SECONDS:
        try:
            os.replace(partial, path)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    os.replace(partial, path)


def flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where a folder can be flushed at all (not on Windows)."""
    if sys.platform == "win32":
        return
    try:
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def reason(error: OSError) -> str:
    """Return what went wrong, for a sentence of which the way out is the rest."""
    return TOO_LARGE if error.errno == errno.EFBIG else error.strerror or str(error)


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
        with suppress(OSError):  # its writer has just finished, or on Windows someone is reading it
            if time.time() - partial.stat().st_mtime >= older_than_seconds:
                partial.unlink(missing_ok=True)


def partial_name(owner: str, suffix: str) -> str:
    """Return a new name for a file that `owner`, a run or a process, is about to make: `sweep_after` knows it again."""
    return f".wan_local-{owner}-{secrets.token_hex(4)}{suffix}{PARTIAL}"


def sweep_after(owner: str, folder: Path) -> None:
    """Remove what `owner`, who writes no more, left in `folder` under partial names."""
    for partial in folder.glob(f".wan_local-{owner}-{'[0-9a-f]' * 8}.*{PARTIAL}"):
        with suppress(OSError):  # a file that someone is reading on Windows keeps nobody from the run
            partial.unlink(missing_ok=True)


class Lock:
    """An exclusive lock on a file; the system lets go of it when its process ends, however that ends.

    On a file system that has no locks, everyone is told that it is free, with one warning.
    """

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
            except OSError as error:
                if error.errno in _HELD:
                    continue
                _warn_of_no_locks(error.strerror or str(error))
            self._number = number
            return True
        os.close(number)
        return False

    def release(self) -> None:
        """Let go; idempotent."""
        if self._number is not None:
            os.close(self._number)
            self._number = None


@functools.lru_cache(maxsize=8)
def _warn_of_no_locks(reason: str) -> None:
    """Say once in a process that nothing is locked."""
    _log.warning("no file can be locked there (%s): see to it that no two processes do the same work", reason)


def _lock(number: int) -> None:
    """Lock an open file without waiting; OSError where another has it, or where there are no locks."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
