"""Downloads: bounded, and kept away from what only this machine can reach."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.stub_engine import SOON
from wan_local.download import DownloadError, TooManyBytes, check_public, download
from wan_local.errors import Cancelled


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        target = {"/loop": "/loop", "/there": "/file", "/file-scheme": "file:///etc/passwd"}.get(self.path)
        self.send_response(302 if target else 200)
        if target:
            self.send_header("location", target)
        body = self.headers["host"].encode()
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_redirects_are_followed_and_bounded(port: int) -> None:
    base = f"http://127.0.0.1:{port}"
    assert download(f"{base}/there", max_bytes=100) == f"127.0.0.1:{port}".encode()
    with pytest.raises(DownloadError, match="more than 5 redirects"):
        download(f"{base}/loop", max_bytes=100)
    with pytest.raises(DownloadError, match="file:// is not supported"):
        download(f"{base}/file-scheme", max_bytes=100)
    with pytest.raises(TooManyBytes):
        download(f"{base}/there", max_bytes=3)


@pytest.fixture
def slow() -> Iterator[Callable[[bytes], str]]:
    """Give the maker of an address that answers with these bytes, and then with one byte more each 20 ms."""
    listening = socket.create_server(("127.0.0.1", 0))
    gone = threading.Event()

    def serve(head: bytes) -> None:
        with listening.accept()[0] as connection, contextlib.suppress(OSError):
            connection.sendall(head)
            while not gone.wait(0.02):
                connection.sendall(b"x")

    def address(head: bytes) -> str:
        threading.Thread(target=serve, args=(head,), daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield address
    gone.set()
    listening.close()


DRIPS = pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nx-a: ", b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"],
    ids=["headers", "body"],
)


def no_thread_is_left() -> bool:
    deadline = time.monotonic() + SOON
    while any(thread.name == "wan-local-download" for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@DRIPS
def test_a_server_that_drips_is_left_at_the_deadline(
    slow: Callable[[bytes], str], head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_local.download._DOWNLOAD_SECONDS", 0.3)
    begun = time.monotonic()
    with pytest.raises(DownloadError, match="not done after"):
        download(slow(head), max_bytes=10**6)
    assert time.monotonic() - begun < 2
    assert no_thread_is_left()


@DRIPS
def test_what_check_raises_ends_the_download_at_once(slow: Callable[[bytes], str], head: bytes) -> None:
    def check() -> None:
        raise Cancelled("Request was cancelled")

    begun = time.monotonic()
    with pytest.raises(Cancelled):
        download(slow(head), max_bytes=10**6, check=check)
    assert time.monotonic() - begun < 2
    assert no_thread_is_left()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
        "2130706433", "0x7f.1", "0177.0.0.1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused(host: str) -> None:
    for scheme in ("http", "https"):
        with pytest.raises(DownloadError, match=r"not a public address|not known|InvalidURL"):
            download(f"{scheme}://{host}/latest/meta-data", max_bytes=100, allow_private=False)


def test_a_name_with_one_private_address_among_public_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _answers("93.184.216.34", "127.0.0.1"))
    with pytest.raises(httpx.UnsupportedProtocol, match="not a public address"):
        check_public("http://rebind.example/")


def test_the_connection_goes_to_the_address_that_was_checked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is asked for once; the request carries the name, the socket the number."""
    monkeypatch.setattr("wan_local.download._is_public", lambda _: True)
    monkeypatch.setattr(socket, "getaddrinfo", _answers("127.0.0.1", only="pictures.example"))
    url = f"http://pictures.example:{port}/there"
    assert download(url, max_bytes=100, allow_private=False) == f"pictures.example:{port}".encode()


def _answers(*addresses: str, only: str | None = None) -> object:
    asked = socket.getaddrinfo

    def getaddrinfo(host: str, *rest: object, **more: object) -> object:
        if only is not None and host != only:
            return asked(host, *rest, **more)  # type: ignore[arg-type]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]

    return getaddrinfo
