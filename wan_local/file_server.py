"""A loopback-only file server, so that a result's url works with anything that downloads over http.

Takes paths; gives urls below an unguessable token. It serves the files it was given and nothing else, and starts with
the first of them.
"""

from __future__ import annotations

import hashlib
import logging
import mimetypes
import os
import re
import secrets
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from wan_local.errors import OutputError
from wan_local.settings import UrlScheme

HOST = "127.0.0.1"

_CHUNK_BYTES = 2**18
_IDLE_SECONDS = 30  # how long a connection is kept open for its next request
_MAX_FILES = 10_000  # of which the oldest is forgotten first

_log = logging.getLogger(__name__)


class FileServer:
    """Serves registered files on 127.0.0.1, at a port that the system chooses, in daemon threads.

    `uploads` is the folder for what is handed in; with `url_scheme="file"` urls are file:// and nothing is served.
    """

    def __init__(self, *, uploads: Path, url_scheme: UrlScheme = "http") -> None:
        self._uploads = uploads
        self._url_scheme = url_scheme
        self._lock = threading.Lock()
        self._paths: OrderedDict[str, Path] = OrderedDict()
        self._tokens: dict[Path, str] = {}
        self._server: ThreadingHTTPServer | None = None

    def url_of(self, path: Path) -> str:
        """Return the url of a file, good for as long as this process lives; the same for the same file."""
        path = path.resolve()
        if self._url_scheme == "file":
            return path.as_uri()
        with self._lock:
            if self._server is None:
                self._server = self._start()
            token = self._tokens.get(path)
            if token is None:
                token = self._register(path)
            return f"http://{HOST}:{self._server.server_port}/files/{token}/{quote(path.name)}"

    def path_of(self, target: str) -> Path | None:
        """Return the registered file that a request's target names, or None."""
        parts = urlsplit(target).path.split("/")
        if len(parts) != 4 or parts[:2] != ["", "files"]:
            return None
        with self._lock:
            path = self._paths.get(parts[2])
        return path if path is not None and unquote(parts[3]) == path.name else None

    def upload(self, data: bytes, content_type: str) -> str:
        """Keep a copy, named by its content and never by its sender, and return its url. Raises OutputError."""
        suffix = mimetypes.guess_extension(content_type.partition(";")[0].strip().lower()) or ".bin"
        path = self._uploads / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        try:
            self._uploads.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                part.write_bytes(data)
                part.replace(path)
        except OSError as error:
            message = f"the upload of {len(data)} bytes could not be kept in {self._uploads}: {error}"
            raise OutputError(message) from error
        finally:
            with suppress(OSError):  # there is none unless writing failed
                part.unlink()
        return self.url_of(path)

    def close(self) -> None:
        """Stop serving; the urls that were given out are dead."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _register(self, path: Path) -> str:
        token = secrets.token_urlsafe(24)
        self._paths[token] = path
        self._tokens[path] = token
        if len(self._paths) > _MAX_FILES:
            _, oldest = self._paths.popitem(last=False)
            del self._tokens[oldest]
        return token

    def _start(self) -> ThreadingHTTPServer:
        server = _Server(self)
        threading.Thread(target=server.serve_forever, args=(0.1,), name="wan-local-files", daemon=True).start()
        return server


class _Server(ThreadingHTTPServer):
    """Carries the files to its handlers."""

    daemon_threads = True

    def __init__(self, files: FileServer) -> None:
        super().__init__((HOST, 0), _Handler)
        self.files = files

    def server_bind(self) -> None:
        """Bind without the parent's reverse lookup of the address, which can take seconds without a network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]


@dataclass(frozen=True, slots=True)
class _Span:
    """The bytes of a file that are asked for: `length` of them from `start` on."""

    start: int
    length: int


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for registered files, whole or one range of them."""

    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    server: _Server

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if not self._host_is_ours():
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        path = self.server.files.path_of(self.path)
        if path is None or not path.is_file():
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        try:
            with path.open("rb") as file:
                self._send(path, file, with_body=with_body)
        except ConnectionError:
            self.close_connection = True  # the client has left
        except OSError as error:
            _log.warning("%s could not be served: %s", path, error)
            self.close_connection = True

    def _host_is_ours(self) -> bool:
        """Tell a request for this server from one that a foreign name was pointed here for (DNS rebinding)."""
        port = self.server.server_port
        return self.headers.get("Host", "").lower() in (f"{HOST}:{port}", f"localhost:{port}")

    def _send(self, path: Path, file: BinaryIO, *, with_body: bool) -> None:
        status = os.fstat(file.fileno())
        tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        whole = _Span(0, status.st_size)
        span = self._span(whole, tag)
        if span is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{whole.length}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(HTTPStatus.OK if span is whole else HTTPStatus.PARTIAL_CONTENT)
        if span is not whole:
            self.send_header("Content-Range", f"bytes {span.start}-{span.start + span.length - 1}/{whole.length}")
        self.send_header("Content-Type", mimetypes.guess_type(path.name)[0] or "application/octet-stream")
        self.send_header("Content-Length", str(span.length))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", tag)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self._copy(file, span)

    def _span(self, whole: _Span, tag: str) -> _Span | None:
        """Return the range that is asked for; `whole` for none or one not understood, None for one beyond the end."""
        match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", self.headers.get("Range", "").replace(" ", ""))
        if match is None or match.group() == "bytes=-" or self.headers.get("If-Range", tag) != tag:
            return whole
        first, last = match.groups()
        if first == "":
            length = min(int(last), whole.length)
            return _Span(whole.length - length, length) if length else None
        start, end = int(first), min(int(last or whole.length), whole.length - 1)
        if last and int(last) < start:
            return whole
        return _Span(start, end - start + 1) if start < whole.length else None

    def _copy(self, file: BinaryIO, span: _Span) -> None:
        file.seek(span.start)
        left = span.length
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            self.wfile.write(chunk)
            left -= len(chunk)
        if left:
            self.close_connection = True  # the file became shorter: the client must not wait for the rest

    def _refuse(self, status: HTTPStatus) -> None:
        body = f'{{"detail": "{status.phrase}"}}'.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name for it
        _log.debug(format, *args)
