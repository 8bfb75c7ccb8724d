"""Who holds what among processes: a card, or a folder. No torch.

A lock ends with its process, whatever ended that (see `durable.Lock`); beside it lies who took it, for people to read.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from wan_local import durable
from wan_local.errors import Busy, OutputError
from wan_local.home import temporary_folder


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
    """Hold the lock at `path` for as long as the block runs.

    Raises Busy, which names who holds `what` already; OutputError where there can be no file at `path`.
    """
    lock, beside = durable.Lock(path), path.with_name(f"{path.name}.holder")
    if not _taken(lock, path, what):
        raise Busy(f"{what} is held by {_told(beside)}. {way_out}")
    try:
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        holder = Holder(os.getpid(), Path(sys.argv[0]).name or "python", since)
        with suppress(OSError):  # for people to read: nothing depends on it
            durable.write(beside, [json.dumps(asdict(holder)).encode()])
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that someone is reading
            beside.unlink(missing_ok=True)
        lock.release()


def _taken(lock: durable.Lock, path: Path, what: str) -> bool:
    try:
        durable.make_folder(path.parent)
        return lock.acquire()
    except OSError as error:
        raise OutputError(
            f"{what} can't be taken for this process alone: no file can be made at {str(path)!r}: "
            f"{durable.reason(error)}. Let this user write there, or name another folder for such files as TMPDIR."
        ) from error


@contextmanager
def holding_card(card: str, *, shared: bool) -> Iterator[None]:
    """Hold a card for as long as the block runs, or with `shared` use it beside others. Raises Busy."""
    if shared:
        yield
        return
    way_out = (
        "Wait until it is done, end it, choose another --device, or plan with the memory that it leaves: "
        "WAN_LOCAL_SHARE_DEVICE=yes."
    )
    with holding(device_lock_path(card), what=f"the card {card}", way_out=way_out):
        yield


def device_lock_path(name: str) -> Path:
    """Return where the lock of a card, or of what else has a name, lies: one place for all processes of this user.

    Raises OutputError where nothing can be written to any folder for temporary files.
    """
    try:
        folder = temporary_folder()
    except FileNotFoundError as error:
        raise OutputError(f"there is no place for a lock: {error}. Name a folder to write to as TMPDIR.") from error
    return folder / f"{name.replace(':', '-')}.lock"


def folder_lock_path(purpose: str, folder: Path) -> Path:
    """Return where the lock of a folder that is written to lies: outside it, and one by whatever path it is named."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    return device_lock_path(f"{purpose}-{name[:16]}")


def _told(beside: Path) -> str:
    try:
        return str(Holder(**json.loads(beside.read_bytes())))
    except (OSError, ValueError, TypeError):
        return "another process"  # it is just beginning or ending
