"""Locks between processes: who holds a device or a queue's folder, and since when.

A lock is a file that its holder keeps locked by the operating system, so that it ends with the process, whatever ended
that; what is written in it (pid, name, since) is for people to read.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from wan_local.errors import Busy

_LOCKED_BYTE = 2**20  # far behind what is written: on Windows, nobody can read what is locked


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock; `since` is local time, to the second."""

    pid: int
    name: str
    since: str

    def __str__(self) -> str:
        itself = ", which is this process" if self.pid == os.getpid() else ""
        return f"process {self.pid} ({self.name}, since {self.since}){itself}"


@contextmanager
def holding(path: Path, *, what: str, way_out: str) -> Iterator[None]:
    """Hold the lock at `path` for as long as the block runs. Raises Busy, which names who holds `what` already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not _take(file):
            raise Busy(f"{what} is held by {_read(path)}. {way_out}")
        try:
            _write(file)
            yield
        finally:
            file.truncate(0)
            _release(file)


def device_lock_path(device: str) -> Path:
    """Return where the lock of a device lies: one place for all processes of this user."""
    user = os.getuid() if sys.platform != "win32" else os.getlogin()
    return Path(tempfile.gettempdir()) / f"wan_local-{user}" / f"{device.replace(':', '-')}.lock"


def _write(file: BinaryIO) -> None:
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    name = Path(sys.argv[0]).name or "python"
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "name": name, "since": since}).encode())
    file.flush()


def _read(path: Path) -> str:
    try:
        told = json.loads(path.read_bytes())
        return str(Holder(int(told["pid"]), str(told["name"]), str(told["since"])))
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"  # it is just beginning or ending


def _take(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _release(file: BinaryIO) -> None:
    """Let go; closing the file would, but on Windows only some time later."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
