"""The server's files: uploads that it is given, videos that it gives out, each at an address that cannot be guessed.

An upload's name is drawn here and never taken from its sender, and signed with a secret of this folder, so that bytes
are taken for what was begun here and nothing else; a video's address follows from its path and that secret. Both are
good across restarts. Nothing else can be reached.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import mimetypes
import os
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from wan_local.errors import OutputError, WanLocalError

_TOKEN = re.compile(r"[A-Za-z0-9_-]{32}")
_NONCE_BYTES = 12  # half of an upload's token, whose other half signs it
_UNFINISHED = (".part", ".parts")
_MAX_VIDEOS = 100_000  # of which the oldest is forgotten first
_MAX_PARTS = 1000
_YOUNG_SECONDS = 3600.0  # an upload that is younger is not removed to make room
_STALE_SECONDS = 24 * 3600.0  # what was begun that long ago will not be ended


class TooLarge(WanLocalError):
    """An upload is larger than it may be, or there is no room for it."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload: its token and where its bytes will lie."""

    token: str
    path: Path


class ServedFiles:
    """Uploads below `folder`, and videos wherever they are; addresses below `base_url`."""

    def __init__(self, folder: Path, *, base_url: str, max_upload_bytes: int, max_uploads_bytes: int) -> None:
        self._folder = folder
        self._base_url = base_url
        self._max_upload_bytes = max_upload_bytes
        self._max_uploads_bytes = max_uploads_bytes
        self._videos: OrderedDict[str, Path] = OrderedDict()
        self._coming_bytes = 0  # of what is being written
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._secret = _secret(folder / ".secret")
        self._remove_stale()
        self._total_bytes = sum(entry.size for entry in _sizes(folder))

    def target_of(self, path: Path) -> str:
        """Return the path of the address at which a video is served."""
        path = path.resolve()
        token = self._token(str(path).encode("utf-8", "surrogatepass"))
        with self._lock:
            self._videos[token] = path
            if len(self._videos) > _MAX_VIDEOS:
                self._videos.popitem(last=False)
        return f"/files/{token}/{quote(path.name)}"

    def url_of(self, path: Path) -> str:
        return self._base_url + self.target_of(path)

    def path_of(self, token: str, name: str) -> Path | None:
        """Return the file at /files/token/name, or None. The name is compared and never used as a path."""
        with self._lock:
            path = self._videos.get(token)
        if path is None and _TOKEN.fullmatch(token):
            found = [entry for entry in self._folder.glob(f"{token}.*") if entry.suffix not in _UNFINISHED]
            path = found[0] if found else None
        return path if path is not None and path.name == name and path.is_file() else None

    def path_of_url(self, url: str) -> Path | None:
        """Return the file that one of our own addresses means, whatever name the server was reached by."""
        try:
            parts = urlsplit(url)
        except ValueError:
            return None
        segments = parts.path.split("/")
        if parts.scheme not in ("http", "https") or len(segments) != 4 or segments[:2] != ["", "files"]:
            return None
        return self.path_of(segments[2], unquote(segments[3]))

    def is_upload(self, path: Path) -> bool:
        return path.parent == self._folder

    def begin(self, content_type: str) -> Upload:
        """Return a new upload; the file appears when `write` or `join` has ended. Raises TooLarge without room."""
        self._make_room()
        suffix = mimetypes.guess_extension(content_type.partition(";")[0].strip().lower()) or ".bin"
        token = self._signed(secrets.token_urlsafe(_NONCE_BYTES), suffix)
        return Upload(token, self._folder / f"{token}{suffix}")

    def find(self, token: str, suffix: str) -> Upload | None:
        """Return the upload that was begun here, by whatever process, under this token; None for any other."""
        if not _TOKEN.fullmatch(token) or not re.fullmatch(r"\.[a-z0-9]{1,10}", suffix):
            return None
        if not hmac.compare_digest(token, self._signed(token[: len(token) // 2], suffix)):
            return None
        return Upload(token, self._folder / f"{token}{suffix}")

    def upload_target(self, upload: Upload) -> str:
        return f"/files/{upload.token}/{upload.path.name}"

    def upload(self, data: bytes, content_type: str) -> str:
        """Keep a copy and return its address. Raises OutputError and TooLarge."""
        return self._base_url + self.upload_target(self.keep(data, content_type))

    def keep(self, data: bytes, content_type: str) -> Upload:
        """Keep a copy, the same one for the same bytes. Raises OutputError and TooLarge."""
        token = self._token(hashlib.sha256(data).digest())
        known = next(self._folder.glob(f"{token}.*"), None)
        if known is not None and known.suffix not in _UNFINISHED:
            with suppress(FileNotFoundError):  # removed just now, to make room
                os.utime(known)
                return Upload(token, known)
        upload = Upload(token, self.begin(content_type).path.with_stem(token))
        part = upload.path.with_name(f"{upload.path.name}.{secrets.token_hex(4)}.part")
        try:
            part.write_bytes(data)
            part.replace(upload.path)
        except OSError as error:
            raise OutputError(f"the upload of {len(data)} bytes could not be kept: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        self._count(len(data))
        return upload

    async def write(self, upload: Upload, chunks: AsyncIterator[bytes]) -> str:
        """Write an upload as it comes; return its etag. Raises TooLarge, and then nothing is left."""
        return await self._stream(upload.path, chunks, self._max_upload_bytes)

    async def write_part(self, upload: Upload, number: int, chunks: AsyncIterator[bytes]) -> str:
        """Write one part of an upload; return its etag. Raises TooLarge when all parts together are too much."""
        if not 1 <= number <= _MAX_PARTS:
            raise TooLarge(f"part {number}: an upload has 1 to {_MAX_PARTS} parts")
        folder = self._parts(upload)
        folder.mkdir(exist_ok=True)
        others = sum(entry.stat().st_size for entry in folder.iterdir() if entry.name != str(number))
        return await self._stream(folder / str(number), chunks, self._max_upload_bytes - others)

    def join(self, upload: Upload, numbers: Sequence[int]) -> None:
        """Put the parts together in this order. Raises LookupError for a part that was not uploaded or is named twice,
        and TooLarge when all together are too much.
        """
        folder = self._parts(upload)
        if len(set(numbers)) < len(numbers):
            raise LookupError("a part is named twice")
        missing = [number for number in numbers if not (folder / str(number)).is_file()]
        if missing or not numbers:
            raise LookupError(f"parts {missing} were not uploaded" if missing else "an upload has at least one part")
        size = sum((folder / str(number)).stat().st_size for number in numbers)
        if size > self._max_upload_bytes:
            raise TooLarge(f"the parts are {size} bytes; an upload has at most {self._max_upload_bytes}")
        part = upload.path.with_name(f"{upload.path.name}.{secrets.token_hex(4)}.part")
        os.utime(folder)  # so that room is not made by removing it
        with self._coming() as coming:
            coming(size)
            try:
                with part.open("wb") as whole:
                    for number in numbers:
                        with (folder / str(number)).open("rb") as piece:
                            shutil.copyfileobj(piece, whole)
                part.replace(upload.path)
            finally:
                part.unlink(missing_ok=True)
            shutil.rmtree(folder)

    def close(self) -> None:
        """Nothing is held."""

    def _token(self, what: bytes) -> str:
        """Return the token that this folder's secret gives to `what`."""
        digest = hmac.new(self._secret, what, hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest[:24]).decode()

    def _signed(self, nonce: str, suffix: str) -> str:
        """Return the token of an upload: a nonce, and as many characters that only this folder's secret gives."""
        return nonce + self._token(f"upload {nonce}{suffix}".encode())[: len(nonce)]

    def _count(self, size: int) -> None:
        with self._lock:
            self._total_bytes += size

    @contextmanager
    def _coming(self) -> Iterator[Callable[[int], None]]:
        """Give what bytes are counted with before they are written; it makes room for them, or raises TooLarge."""
        counted = 0

        def coming(size: int) -> None:
            nonlocal counted
            counted += size
            with self._lock:
                self._coming_bytes += size
            self._make_room()

        try:
            yield coming
        finally:
            with self._lock:
                self._coming_bytes -= counted

    def _parts(self, upload: Upload) -> Path:
        return self._folder / f"{upload.token}.parts"

    async def _stream(self, path: Path, chunks: AsyncIterator[bytes], max_bytes: int) -> str:
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        digest, size = hashlib.md5(usedforsecurity=False), 0
        with self._coming() as coming:
            try:
                with part.open("wb") as file:
                    async for chunk in chunks:
                        size += len(chunk)
                        if size > max_bytes:
                            raise TooLarge(f"an upload has at most {self._max_upload_bytes} bytes")
                        coming(len(chunk))
                        digest.update(chunk)
                        file.write(chunk)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            self._count(size)
        return f'"{digest.hexdigest()}"'

    def _make_room(self) -> None:
        """Remove the oldest uploads while all together, with those that are coming, are too many bytes."""
        with self._lock:
            most = self._max_uploads_bytes - self._coming_bytes
            if self._total_bytes <= most:
                return
            entries = sorted(_sizes(self._folder), key=lambda entry: entry.modified)
            self._total_bytes = sum(entry.size for entry in entries)
            for entry in entries:
                if self._total_bytes <= most or time.time() - entry.modified < _YOUNG_SECONDS:
                    break
                entry.remove()
                self._total_bytes -= entry.size
            if self._total_bytes > most:
                raise TooLarge(
                    f"the uploads here are {self._total_bytes + self._coming_bytes} bytes, and the oldest less than an "
                    f"hour old; at most {self._max_uploads_bytes} are kept"
                )

    def _remove_stale(self) -> None:
        """Remove what an earlier process left unfinished."""
        for part in self._folder.rglob("*.part"):
            part.unlink(missing_ok=True)
        for parts in self._folder.glob("*.parts"):
            if time.time() - parts.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(parts, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Kept:
    """An upload that lies in the folder, or its parts: how many bytes, and when it was last written or used."""

    path: Path
    size: int
    modified: float

    def remove(self) -> None:
        if self.path.suffix == ".parts":
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def _sizes(folder: Path) -> list[_Kept]:
    """Return the uploads, whole or in parts, that are not being written; one that vanishes while we look is none."""
    kept = []
    for path in folder.iterdir():
        if path.suffix != ".part" and path.name != ".secret":
            with suppress(FileNotFoundError):
                files = path.iterdir() if path.suffix == ".parts" else [path]
                size = sum(file.stat().st_size for file in files if file.suffix != ".part")
                kept.append(_Kept(path, size, path.stat().st_mtime))
    return kept


def _secret(path: Path) -> bytes:
    """Return this folder's secret, drawn at its first use and readable by this user only."""
    with suppress(FileNotFoundError):
        content = path.read_bytes()
        if len(content) == hashlib.sha256().digest_size:
            return content
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_bytes(hashlib.sha256().digest_size))
    return path.read_bytes()
