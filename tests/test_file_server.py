"""The file server: what it was given it serves whole or in ranges, to this machine alone, and nothing else."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import httpx
import pytest

from wan_local import file_server
from wan_local.errors import OutputError
from wan_local.file_server import FileServer
from wan_local.image import load_image

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileServer]:
    server = FileServer(uploads=tmp_path / "uploads")
    yield server
    server.close()


@pytest.fixture
def url(files: FileServer, tmp_path: Path) -> str:
    path = tmp_path / "my video ü.mp4"
    path.write_bytes(CONTENT)
    return files.url_of(path)


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()}, trust_env=False)


def raw(url: str, target: str, *, method: str = "GET", host: str | None = None) -> tuple[int, bytes]:
    """Send a target exactly as written, where httpx would tidy it up."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    connection.putrequest(method, target, skip_host=True)
    connection.putheader("Host", host or parts.netloc)
    connection.endheaders()
    response = connection.getresponse()
    result = response.status, response.read()
    connection.close()
    return result


def test_a_file_arrives_whole_with_its_type_and_length(url: str) -> None:
    response = get(url)
    assert (response.status_code, response.content) == (200, CONTENT)
    assert response.headers["content-type"] == "video/mp4"
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["accept-ranges"] == "bytes"
    with urlopen(url) as stream:
        assert stream.read() == CONTENT


def test_head_says_the_same_without_the_bytes(url: str) -> None:
    response = httpx.head(url, trust_env=False)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(CONTENT))


def test_the_url_is_loopback_unguessable_and_stable(url: str, files: FileServer, tmp_path: Path) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/files/[\w-]{32}/my%20video%20%C3%BC\.mp4", url)
    assert files.url_of(tmp_path / "my video ü.mp4") == url
    assert FileServer(uploads=tmp_path).url_of(tmp_path / "my video ü.mp4") != url


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-99", 0, 99),
        ("bytes=1000-", 1000, 1023),
        ("bytes=-24", 1000, 1023),
        ("bytes=-5000", 0, 1023),
        ("bytes=1000-99999", 1000, 1023),
        ("bytes=5-5", 5, 5),
    ],
)
def test_a_range_arrives_alone(url: str, asked: str, start: int, end: int) -> None:
    response = get(url, range=asked)
    assert (response.status_code, response.content) == (206, CONTENT[start : end + 1])
    assert response.headers["content-range"] == f"bytes {start}-{end}/1024"
    assert response.headers["content-length"] == str(end - start + 1)


@pytest.mark.parametrize("asked", ["bytes=1024-", "bytes=5000-6000", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused(url: str, asked: str) -> None:
    response = get(url, range=asked)
    assert (response.status_code, response.headers["content-range"]) == (416, "bytes */1024")


@pytest.mark.parametrize(
    "asked", ["bytes=5-2", "bytes=0-1,5-6", "lines=1-2", "bytes=-", "bytes=x", "bytes=" + "9" * 500]
)
def test_a_range_that_is_not_understood_gives_the_whole_file(url: str, asked: str) -> None:
    assert get(url, range=asked).status_code == 200


def test_if_range_holds_only_for_the_same_file(url: str) -> None:
    tag = get(url).headers["etag"]
    assert get(url, range="bytes=0-1", if_range=tag).status_code == 206
    assert get(url, range="bytes=0-1", if_range='"other"').status_code == 200


def test_nothing_but_the_registered_file_is_served(url: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    path = urlsplit(url).path
    folder = path.rpartition("/")[0]
    targets = [
        "/",
        "/files/",
        folder,
        f"{folder}/",
        f"{folder}/secret.txt",
        f"{folder}/../secret.txt",
        f"{folder}/%2e%2e%2fsecret.txt",
        f"{path}/../../secret.txt",
        "/files/" + "A" * 32 + "/" + path.rpartition("/")[2],
        "/../../../../etc/passwd",
        "//etc/passwd",
        f"{folder}/..%5csecret.txt",
    ]
    for target in targets:
        status, body = raw(url, target)
        assert (status, b"secret" in body, b"root" in body) == (404, False, False), target


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1"])
def test_a_foreign_host_header_is_refused(url: str, host: str) -> None:
    assert raw(url, urlsplit(url).path, host=host)[0] == 403


def test_localhost_is_this_host(url: str) -> None:
    assert raw(url, urlsplit(url).path, host=f"localhost:{urlsplit(url).port}") == (200, CONTENT)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_reading_is_possible(url: str, method: str) -> None:
    assert raw(url, urlsplit(url).path, method=method)[0] == 501


def test_a_file_that_is_gone_is_not_found(url: str, tmp_path: Path) -> None:
    (tmp_path / "my video ü.mp4").unlink()
    assert get(url).status_code == 404


def test_one_connection_serves_many_requests(url: str) -> None:
    with httpx.Client(trust_env=False) as client:
        for asked in ("bytes=0-9", "bytes=2000-", "bytes=5-", "bytes=0-0"):
            assert client.get(url, headers={"Range": asked}).status_code in (206, 416)
        assert client.get(url).content == CONTENT


def test_nothing_listens_before_the_first_file_and_after_close(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(CONTENT)
    server = FileServer(uploads=tmp_path)
    server.close()
    assert server._server is None
    url = server.url_of(path)
    server.close()
    with pytest.raises(httpx.ConnectError):
        get(url)


def test_file_urls_need_no_server(tmp_path: Path) -> None:
    path = tmp_path / "a b.mp4"
    path.write_bytes(CONTENT)
    server = FileServer(uploads=tmp_path, url_scheme="file")
    url = server.url_of(path)
    assert url.startswith("file:///")
    assert unquote(urlsplit(url).path) == str(path)
    assert server._server is None


def test_the_oldest_of_too_many_files_is_forgotten(
    files: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_server, "_MAX_FILES", 2)
    paths = [tmp_path / f"{index}.mp4" for index in range(3)]
    for path in paths:
        path.write_bytes(CONTENT)
    urls = [files.url_of(path) for path in paths]
    assert [get(url).status_code for url in urls] == [404, 200, 200]


def test_an_upload_is_kept_by_content_and_its_url_opens(files: FileServer, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "x.png"
    Image.new("RGB", (80, 64), (1, 2, 3)).save(picture)
    url = files.upload(picture.read_bytes(), "image/png")
    assert files.upload(picture.read_bytes(), "image/png; charset=x") == url
    (kept,) = (tmp_path / "uploads").iterdir()
    assert re.fullmatch(r"[0-9a-f]{32}\.png", kept.name)
    assert load_image(url, field="start_image_url").getpixel((0, 0)) == (1, 2, 3)


def test_an_upload_of_unknown_type_keeps_no_foreign_name(files: FileServer, tmp_path: Path) -> None:
    files.upload(b"x", "../../etc/passwd")
    (kept,) = (tmp_path / "uploads").iterdir()
    assert kept.suffix == ".bin"


def test_an_upload_that_cannot_be_kept_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="could not be kept"):
        FileServer(uploads=tmp_path / "file" / "uploads").upload(b"x", "image/png")
