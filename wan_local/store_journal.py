"""What of an unfinished store lies safely on disk: one line for each run of tensors, written after the run was synced.

A line says up to which byte a file is good and what the SHA-256 is up to there. Whoever goes on reads what is there
again and trusts nothing else. A line that was cut off by the end of the process, or is damaged, does not count, nor do
those after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from wan_local.errors import OutputError
from wan_local.manifest import JOURNAL

_READ_BYTES = 2**22
_ENTRY = {"file": str, "runs": int, "end": int, "sha256": str}


@dataclass(frozen=True, slots=True)
class Written:
    """A file is good up to byte `end`, where its SHA-256 is `sha256`, after `runs` whole runs."""

    file: str
    runs: int
    end: int
    sha256: str


class Journal:
    """The journal of one unfinished store. `fingerprint` is of all that decides what its bytes will be."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open or begin it. Raises OutputError where `folder` has that of another conversion."""
        self._file = folder / JOURNAL
        self._written: dict[str, list[Written]] = {}
        if self._file.exists():
            self._read(fingerprint)
        else:
            self._append({"fingerprint": fingerprint})

    def of(self, file: str) -> list[Written]:
        """Return what is good of a file, the most last."""
        return self._written.get(file, [])

    def record(self, written: Written) -> None:
        """Note it, durably. The bytes themselves must be on disk."""
        self._append({name: getattr(written, name) for name in ("file", "runs", "end", "sha256")})
        self._written.setdefault(written.file, []).append(written)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._file.open("ab") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, fingerprint: str) -> None:
        content = self._file.read_bytes()
        entries, end = _whole_entries(content)
        if not entries:  # it ended before its first line was whole
            self._file.unlink()
            self._append({"fingerprint": fingerprint})
            return
        if entries[0].get("fingerprint") != fingerprint:
            raise OutputError(
                f"{str(self._file.parent)!r} holds an unfinished conversion of other weights or into other formats. "
                "Delete it, or choose another target."
            )
        for entry in entries[1:]:
            written = Written(**entry)
            self._written.setdefault(written.file, []).append(written)
        if end < len(content):
            with self._file.open("r+b") as stream:
                stream.truncate(end)


def _whole_entries(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return what the lines say before the first one that is cut off or damaged, and the byte at which that begins."""
    entries: list[dict[str, Any]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # not JSON, or no text at all
            break
        if not isinstance(entry, dict) or (entries and {name: type(value) for name, value in entry.items()} != _ENTRY):
            break
        entries.append(entry)
        end += len(line)
    return entries, end


def good_part(stream: BinaryIO, noted: list[Written]) -> tuple[Written | None, Any]:
    """Return the last note that the file's bytes agree with, and the digest up to there.

    stream: the file, open for reading, at its begin.
    """
    digest, good, good_digest = hashlib.sha256(), None, hashlib.sha256()
    position, buffer = 0, bytearray(_READ_BYTES)
    for written in noted:
        while position < written.end:
            count = stream.readinto(memoryview(buffer)[: min(len(buffer), written.end - position)])  # type: ignore[attr-defined]
            if not count:
                return good, good_digest
            digest.update(memoryview(buffer)[:count])
            position += count
        if digest.hexdigest() != written.sha256:
            return good, good_digest
        good, good_digest = written, digest.copy()
    return good, good_digest
