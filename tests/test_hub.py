from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import layouts
from wan_local.checkpoint import find_model
from wan_local.cli import download as command
from wan_local.cli import main
from wan_local.errors import Busy, CorruptModel, ModelNotFound, NotAvailable, OutputError
from wan_local.hub import (
    DownloadConfig,
    DownloadSource,
    FaceHub,
    RemoteFile,
    load_downloads,
    plan_download,
    run_download,
)
from wan_local.settings import load_settings

COMMIT = "c" * 40
REPOSITORY = "Some-Org/some-model"
CONFIG = DownloadConfig("some model", 1, True, (DownloadSource(REPOSITORY, ("*.json", "big/*")),))


class FakeHub:
    """Speaks the hub's HTTP for one repository, on loopback; can refuse, break off and lie."""

    def __init__(self) -> None:
        self.contents = {
            "config.json": b'{"a": 1}',
            "big/weights.safetensors": bytes(range(256)) * 4000,
            "README.md": b"#",
        }
        self.status = 200
        self.error_code = ""
        self.break_off_after: int | None = None
        self.status_after_break = 503
        self.resumes = True
        self.lie = False
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = urlsplit(request.path).path
        self.requests.append((request.command, path, request.headers.get("Range")))
        if self.status != 200:
            request.send_response(self.status)
            request.send_header("Content-Length", "0")
            if self.error_code:
                request.send_header("X-Error-Code", self.error_code)
            request.end_headers()
        elif path.startswith("/api/models/"):
            self._send(request, json.dumps(self._listing()).encode(), {"Content-Type": "application/json"}, body=body)
        else:
            self._send_file(request, path.split(f"/resolve/{COMMIT}/", 1)[1], body=body)

    def _listing(self) -> dict[str, object]:
        siblings = []
        for name, content in self.contents.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if name.startswith("big/"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": []}

    def _send_file(self, request: BaseHTTPRequestHandler, name: str, *, body: bool) -> None:
        content = self.contents[name]
        etag = hashlib.sha256(content).hexdigest() if name.startswith("big/") else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.lie:
            content = content[:-1] + b"?"
        if self.resumes and (given := request.headers.get("Range")):
            start = int(given.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        self._send(request, content, headers, body=body)

    def _send(self, request: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        request.send_response(206 if "Content-Range" in headers else 200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body and self.break_off_after is not None and len(content) > self.break_off_after:
            request.wfile.write(content[: self.break_off_after])
            self.status, self.break_off_after = self.status_after_break, None
            request.close_connection = True
        elif body:
            request.wfile.write(content)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeHub()
    yield fake
    fake.close()


def quiet(_: object) -> None:
    pass


def test_a_plan_tells_bytes_before_anything_is_written(hub: FakeHub, tmp_path: Path) -> None:
    plan = plan_download(CONFIG, tmp_path / "model", FaceHub(hub.endpoint))
    assert {file.path: file.nbytes for file in plan.files} == {"config.json": 8, "big/weights.safetensors": 1_024_000}
    assert (plan.nbytes, plan.left_bytes, plan.present) == (1_024_008, 1_024_008, ())
    assert plan.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert not (tmp_path / "model").exists()


def test_a_download_is_verified_and_a_second_one_fetches_nothing(hub: FakeHub, tmp_path: Path) -> None:
    target, face = tmp_path / "model", FaceHub(hub.endpoint)
    run_download(plan_download(CONFIG, target, face), face, quiet)
    for name in ("config.json", "big/weights.safetensors"):
        assert (target / name).read_bytes() == hub.contents[name]
    assert not (target / "README.md").exists()
    hub.requests.clear()
    plan = plan_download(CONFIG, target, face)
    assert plan.left_bytes == 0 and len(plan.present) == 2
    run_download(plan, face, quiet)
    assert [path for _, path, _ in hub.requests] == [f"/api/models/{REPOSITORY}"]


def test_a_file_that_was_changed_is_found_and_fetched_anew(hub: FakeHub, tmp_path: Path) -> None:
    target, face = tmp_path / "model", FaceHub(hub.endpoint)
    run_download(plan_download(CONFIG, target, face), face, quiet)
    spoilt = target / "big" / "weights.safetensors"
    spoilt.write_bytes(b"!" + spoilt.read_bytes()[1:])
    with pytest.raises(CorruptModel, match=r"weights\.safetensors.*It was removed: run the command again"):
        run_download(plan_download(CONFIG, target, face), face, quiet)
    run_download(plan_download(CONFIG, target, face), face, quiet)
    assert spoilt.read_bytes() == hub.contents["big/weights.safetensors"]


def test_a_hub_that_sends_other_bytes_is_found_out(hub: FakeHub, tmp_path: Path) -> None:
    hub.lie = True
    face = FaceHub(hub.endpoint)
    with pytest.raises(CorruptModel, match=r"config\.json.*run the command again"):
        run_download(plan_download(CONFIG, tmp_path, face), face, quiet)
    assert not (tmp_path / "config.json").exists()


def fetched_from(hub: FakeHub) -> list[int]:
    """Return where each answer to a request for the large file began."""
    asked = [given for method, path, given in hub.requests if path.endswith("weights.safetensors")]
    return [int((given or "bytes=0-").removeprefix("bytes=").split("-")[0]) for given in asked]


def test_a_download_that_broke_off_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    face = FaceHub(hub.endpoint)
    plan = plan_download(CONFIG, tmp_path, face)
    hub.break_off_after = 300_000
    with pytest.raises(NotAvailable, match="goes on where it stopped"):
        run_download(plan, face, quiet, sleep=quiet)
    big = tmp_path / "big" / "weights.safetensors"
    assert not big.exists() and (tmp_path / "big" / "weights.safetensors.part").stat().st_size == 300_000
    hub.status = 200
    hub.requests.clear()
    run_download(plan_download(CONFIG, tmp_path, face), face, quiet)
    assert big.read_bytes() == hub.contents["big/weights.safetensors"]
    assert fetched_from(hub) == [300_000]
    assert not list(tmp_path.rglob("*.part"))


def test_a_connection_that_breaks_is_taken_up_again_at_once(hub: FakeHub, tmp_path: Path) -> None:
    face = FaceHub(hub.endpoint)
    hub.break_off_after, hub.status_after_break = 300_000, 200
    run_download(plan_download(CONFIG, tmp_path, face), face, quiet, sleep=quiet)
    assert fetched_from(hub) == [0, 300_000]


def test_a_server_that_does_not_resume_sends_it_all_again(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "weights.safetensors.part").write_bytes(b"junk of a try before")
    hub.resumes = False
    face = FaceHub(hub.endpoint)
    run_download(plan_download(CONFIG, tmp_path, face), face, quiet)
    assert (tmp_path / "big" / "weights.safetensors").read_bytes() == hub.contents["big/weights.safetensors"]


@pytest.mark.parametrize(
    ("status", "code", "type_", "says"),
    [
        (401, "GatedRepo", NotAvailable, "conditions to be accepted.*hf auth login"),
        (404, "RepoNotFound", ModelNotFound, "no repository Some-Org/some-model"),
        (500, "", NotAvailable, "the hub refused.*again later"),
        (429, "", NotAvailable, "the hub refused"),
    ],
)
def test_what_the_hub_refuses_is_a_typed_error(
    status: int, code: str, type_: type[Exception], says: str, hub: FakeHub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status, hub.error_code = status, code
    with pytest.raises(type_, match=says):
        plan_download(CONFIG, tmp_path, FaceHub(hub.endpoint))


def test_no_network_is_a_typed_error(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.close()
    with pytest.raises(NotAvailable, match="the hub can't be reached"):
        plan_download(CONFIG, tmp_path, FaceHub(hub.endpoint))


def test_a_file_that_is_gone_is_a_typed_error(hub: FakeHub, tmp_path: Path) -> None:
    del hub.contents["big/weights.safetensors"]
    with pytest.raises(ModelNotFound, match=r"no file 'big/\*' any more"):
        plan_download(CONFIG, tmp_path, FaceHub(hub.endpoint))


class StubHub:
    """A hub without HTTP."""

    def __init__(self, files: list[RemoteFile], stream: Callable[[], Iterator[bytes]]) -> None:
        self._files, self._stream = files, stream

    def files(self, repository: str) -> list[RemoteFile]:
        return self._files

    @contextmanager
    def stream(self, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        yield start, self._stream()


def never() -> Iterator[bytes]:
    raise AssertionError("nothing was to be fetched")


def remote(path: str, nbytes: int) -> RemoteFile:
    return RemoteFile(REPOSITORY, COMMIT, path, nbytes, "0" * 64, None)


def test_a_disk_that_is_too_small_is_said_before_it_begins(tmp_path: Path) -> None:
    hub = StubHub([remote("a.json", 10**15), remote("big/b", 5)], never)
    with pytest.raises(OutputError, match=r"1000000\.0 GB are to come, and .* GB are free at .*--to"):
        plan_download(CONFIG, tmp_path / "new" / "folder", hub)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, r"the disk is full.*goes on where it stopped"),
        (errno.EFBIG, r"can't be written: no file there .*FAT32: 4 GB.*on another disk with --to"),
        (errno.EIO, r"can't be written: Input/output error.*--to"),
        (errno.ETIMEDOUT, r"can't be written: Connection timed out.*--to"),  # of a disk in the network
    ],
)
def test_a_disk_that_takes_no_more_is_a_typed_error(
    code: int, says: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fails)
    face = FaceHub(hub.endpoint)
    with pytest.raises(OutputError, match=says):
        run_download(plan_download(CONFIG, tmp_path, face), face, quiet)


def test_a_folder_that_is_none_is_a_typed_error(tmp_path: Path) -> None:
    hub = StubHub([remote("a.json", 5), remote("big/b", 5)], never)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"can't be written: .*--to"):
        run_download(plan_download(CONFIG, tmp_path / "file", hub), hub, quiet)
    with pytest.raises(OutputError, match=r"can't be written: File name too long.*--to"):
        plan_download(CONFIG, tmp_path / ("n" * 300), hub)


def test_output_that_nobody_reads_is_no_error_of_the_network(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(text: str) -> None:
        if "left" in text:
            raise BrokenPipeError

    monkeypatch.setattr("wan_local.hub._TELL_SECONDS", -1.0)
    face = FaceHub(hub.endpoint)
    with pytest.raises(BrokenPipeError):
        run_download(plan_download(CONFIG, tmp_path, face), face, say, sleep=quiet)


def test_a_file_that_ends_too_soon_is_a_typed_error_and_no_endless_loop(tmp_path: Path) -> None:
    hub = StubHub([remote("a.json", 5), remote("big/b", 5)], lambda: iter([b""]))
    with pytest.raises(CorruptModel, match=r"ended 'a\.json' at byte 0 of 5"):
        run_download(plan_download(CONFIG, tmp_path, hub), hub, quiet)


def stored(path: str, content: bytes) -> RemoteFile:
    return RemoteFile(REPOSITORY, COMMIT, path, len(content), hashlib.sha256(content).hexdigest(), None)


def test_a_second_download_to_a_folder_is_refused_and_the_first_one_ends_well(tmp_path: Path) -> None:
    """Both appended to one partial file, and then removed what did not have its hash."""
    files = [stored("a.json", b"abcde"), stored("big/b", b"abcde")]
    (tmp_path / "link").symlink_to(tmp_path)

    def slow() -> Iterator[bytes]:
        yield b"ab"
        other = StubHub(files, never)
        with pytest.raises(Busy, match=r"the download to .*, which is this process.*Wait until it has ended"):
            run_download(plan_download(CONFIG, tmp_path / "link", other), other, quiet)
        yield b"cde"

    hub = StubHub(files, slow)
    run_download(plan_download(CONFIG, tmp_path, hub), hub, quiet)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "big" / "b").read_bytes() == b"abcde"


def test_a_hub_that_sends_on_and_on_fills_no_disk(tmp_path: Path) -> None:
    hub = StubHub([stored("a.json", b"abcde"), stored("big/b", b"abcde")], lambda: itertools.cycle([b"abc", b"de!"]))
    run_download(plan_download(CONFIG, tmp_path, hub), hub, quiet)
    assert (tmp_path / "a.json").read_bytes() == b"abcde"


@pytest.mark.parametrize("path", ["big/../../x", "big//etc/../../../x", "big/C:\\x"])
def test_a_path_that_leads_out_of_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    hub = StubHub([remote("a.json", 5), remote(path, 5)], never)
    with pytest.raises(CorruptModel, match="leads out of the folder"):
        plan_download(CONFIG, tmp_path, hub)


def test_the_command_asks_first_and_says_what_next(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = dict.fromkeys(load_downloads(), CONFIG)
    monkeypatch.setattr("wan_local.hub.load_downloads", lambda: choices)
    monkeypatch.setattr("wan_local.hub.FaceHub", lambda: FaceHub(hub.endpoint))
    target = tmp_path / "model"
    assert main(["download", "--to", str(target)]) == 2  # no terminal to ask on, and no --yes
    said = capsys.readouterr().err
    assert "big/weights.safetensors" in said and "GB to come, into" in said and "--yes" in said
    assert not target.exists()
    assert main(["download", "--to", str(target), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 1_024_008
    assert main(["download", "--to", str(target), "--yes"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(target) and f"generate --model {target}" in printed.err
    assert (target / "config.json").exists()


def test_every_choice_of_the_table_is_whole() -> None:
    downloads = load_downloads()
    assert downloads["diffusers"].runs and not downloads["gguf-q8_0"].runs
    for name, config in downloads.items():
        patterns = [pattern for source in config.sources for pattern in source.patterns]
        assert any("tokenizer" in pattern or "umt5-xxl/" in pattern for pattern in patterns), name
        assert 10 < config.gigabytes < 100


def test_the_folder_it_goes_to_is_where_a_run_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = load_settings(models_dir=tmp_path)
    with pytest.raises(ModelNotFound, match="wan-local download"):
        find_model(settings)
    shutil.copytree(layouts.TINY, tmp_path / command._folder("diffusers"))
    assert find_model(settings).folder == tmp_path / command._folder("diffusers")


def test_a_language_model_for_prompt_expansion_is_fetched_to_where_a_run_looks(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wan_local.hub.FaceHub", lambda: FaceHub(hub.endpoint))
    monkeypatch.setenv("WAN_LOCAL_MODELS_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["download", "--expansion", "--yes"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "Qwen3-VL-4B-Instruct") and "expansion" in printed.err
    assert (tmp_path / "Qwen3-VL-4B-Instruct" / "config.json").exists()
    assert main(["download", "--expansion", "Qwen3-VL-2B-Instruct", "--dry-run"]) == 0
    assert "Qwen3-VL-2B-Instruct" in capsys.readouterr().err


def test_what_an_earlier_try_has_brought_needs_no_room_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = StubHub([remote("a.json", 5), remote("big/b", 1000)], never)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "b.part").write_bytes(bytes(900))
    monkeypatch.setattr("wan_local.hub._free_bytes", lambda _: 200)
    assert plan_download(CONFIG, tmp_path, hub).left_bytes == 105
    (tmp_path / "big" / "b.part").unlink()
    with pytest.raises(OutputError):
        plan_download(CONFIG, tmp_path, hub)
