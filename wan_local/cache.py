"""Encodings kept by content: the same prompt, the same pictures and the same encoder are not encoded twice.

One file an entry, named by the digest of all that its content depends on: the input, the encoder's weights, dtype, kind
of device, torch's version. Nothing of the input itself is stored. Entries are written whole or not at all, checked
when they are read, and the least recently used go first; several processes may use one folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_local import durable
from wan_local.record import Record, read_record, write_record

_SUFFIX = ".safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the cache: what it is an encoding of, its bytes, and when it was last used (seconds since 1970)."""

    path: Path
    kind: str
    file_bytes: int
    used: float


class EncodingCache:
    """Encodings in `folder`, at most `limit_bytes` of them; a limit of 0 switches it off.

    private: the folder of one run, where everything that the run uses is kept, too: whatever the bound lets go or the
    cache is switched to, the run can be gone on with from the same bits.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, private: Path | None = None) -> None:
        self._folder, self._limit_bytes, self._private = folder, limit_bytes, private

    def get(self, key: str) -> Record | None:
        """Return what was put under `key`, or None. A damaged entry is removed."""
        if self._private is None:
            return self._shared(key)
        record = read_record(self._private / f"{key}{_SUFFIX}")
        if record is None and (record := self._shared(key)) is not None:
            self._write(self._private / f"{key}{_SUFFIX}", record)
        return record

    def _shared(self, key: str) -> Record | None:
        path = self._path(key)
        if not self._limit_bytes or not os.path.exists(path):  # unlike Path's, no error where it may not look
            return None
        record = read_record(path)
        with suppress(OSError):  # another process may have removed it
            if record is None:
                _log.warning("a damaged encoding was removed from %s; it is made again", self._folder)
                path.unlink(missing_ok=True)
            else:
                os.utime(path)
        return record

    def put(
        self, key: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None, *, shared: bool = True
    ) -> None:
        """Keep an encoding. Where that is not possible, say so in the log and go on: it can be made again.

        shared: also for other runs than the one whose private folder this is.
        """
        record = Record(tensors, header or {})
        if self._private is not None:
            self._write(self._private / f"{key}{_SUFFIX}", record)
        if shared and self._limit_bytes and self._write(self._path(key), record):
            self._evict()

    def _write(self, path: Path, record: Record) -> bool:
        try:
            durable.make_folder(path.parent)
            write_record(path, record.tensors, record.header)
        except OSError as error:
            _log.warning("an encoding could not be kept in %s: %s", path.parent, error.strerror or error)
            return False
        return True

    def entries(self) -> list[Entry]:
        """Return every entry, the least recently used first."""
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}") if os.path.isdir(self._folder) else ():
            with suppress(OSError):  # another process has removed it since
                status = path.stat()
                found.append(Entry(path, path.name.partition("-")[0], status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def clear(self) -> int:
        """Remove every entry and return how many bytes that freed."""
        entries = self.entries()
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        if os.path.isdir(self._folder):
            durable.sweep(self._folder, older_than_seconds=0.0)
        return sum(entry.file_bytes for entry in entries)

    def _evict(self) -> None:
        entries = self.entries()
        excess = sum(entry.file_bytes for entry in entries) - self._limit_bytes
        for entry in entries:
            if excess <= 0:
                break
            with suppress(OSError):  # on Windows another process may be reading it
                entry.path.unlink(missing_ok=True)
                excess -= entry.file_bytes
        durable.sweep(self._folder)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def make_key(kind: str, **depends_on: object) -> str:
    """Return the key of an encoding from everything that its content depends on."""
    text = json.dumps({name: str(value) for name, value in depends_on.items()}, sort_keys=True)
    return f"{kind}-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=20).hexdigest()}"
