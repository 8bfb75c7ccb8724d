"""What of an unfinished store lies safely on disk: one line for each run of tensors, written after the run was synced.

A line says up to which byte a file is good and what the SHA-256 is up to there. Whoever goes on reads what is there
again and trusts nothing else. A line that was cut off by the end of the process does not count.
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
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        if not lines:  # it ended before its first line was whole
            self._file.unlink()
            self._append({"fingerprint": fingerprint})
            return
        if json.loads(lines[0]).get("fingerprint") != fingerprint:
            raise OutputError(
                f"{str(self._file.parent)!r} holds an unfinished conversion of other weights or into other formats. "
                "Delete it, or choose another target."
            )
        for line in lines[1:]:
            written = Written(**json.loads(line))
            self._written.setdefault(written.file, []).append(written)
        if not content.endswith(b"\n"):
            with self._file.open("r+b") as stream:
                stream.truncate(content.rfind(b"\n") + 1)


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
