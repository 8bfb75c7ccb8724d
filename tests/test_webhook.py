"""Webhooks: the outcome reaches the address, failures are tried again, and not for ever."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.live_server import live_server
from tests.stub_engine import SOON, StubEngine
from wan_local.client import SyncClient
from wan_local.encoding import encode_file
from wan_local.server.options import ServerOptions
from wan_local.server.process import _webhook_check
from wan_local.service import Service
from wan_local.webhook import Webhooks

APPLICATION = "fal-ai/wan-flf2v"


class Receiver(ThreadingHTTPServer):
    """Notes every body; answers with the next of `answers`, then with 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[Any] = []
        self.hosts: list[str] = []
        self.answers: list[int] = []
        self.url = f"http://127.0.0.1:{self.server_port}/hook"

    def wait_for(self, count: int) -> list[Any]:
        deadline = time.monotonic() + SOON
        while len(self.bodies) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.bodies


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.hosts.append(self.headers["host"])
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.send_header("content-length", "0")
        self.send_header("location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_result_and_a_wrong_request_are_both_told(receiver: Receiver, tmp_path: Path) -> None:
    Image.new("RGB", (80, 64)).save(tmp_path / "frame.png")
    frame = str(tmp_path / "frame.png")
    service = Service(StubEngine(tmp_path), output_dir=tmp_path)
    client = SyncClient.of(service)
    arguments = {"prompt": "x", "start_image_url": frame, "end_image_url": frame, "num_inference_steps": 2}
    good = client.submit(APPLICATION, arguments, webhook_url=receiver.url)
    output = good.get()
    (body,) = receiver.wait_for(1)
    assert body == {
        "request_id": good.request_id, "gateway_request_id": good.request_id, "status": "OK", "payload": output,
    }  # fmt: skip
    bad = client.submit(APPLICATION, {"prompt": "x"}, webhook_url=receiver.url)
    body = receiver.wait_for(2)[1]
    assert (body["request_id"], body["status"], body["error"]) == (
        bad.request_id,
        "ERROR",
        "Invalid status code: 422",
    )
    assert body["payload"]["detail"][0]["type"] == "missing"
    service.close()


def test_a_failed_delivery_is_tried_again_and_a_redirect_is_one(receiver: Receiver) -> None:
    receiver.answers = [500, 302]
    hooks = Webhooks(retry_seconds=(0.01, 0.01))
    hooks.send(receiver.url, lambda: {"n": 1})
    assert receiver.wait_for(3) == [{"n": 1}] * 3
    time.sleep(0.1)
    assert len(receiver.bodies) == 3
    hooks.close()


def test_it_gives_up_after_the_last_attempt_and_goes_on_with_others(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Webhooks(retry_seconds=(0.01,))
    hooks.send("http://127.0.0.1:1/nobody", dict)
    hooks.send("no address at all", dict)
    hooks.send(receiver.url, lambda: {"n": 2})
    assert receiver.wait_for(1) == [{"n": 2}]
    deadline = time.monotonic() + SOON
    while caplog.text.count("given up after 2 attempts") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert caplog.text.count("given up after 2 attempts") == 2
    hooks.close()


def test_a_check_may_refuse_an_address(receiver: Receiver) -> None:
    def check(url: str) -> str:
        raise httpx.UnsupportedProtocol(f"{url} is not public")

    hooks = Webhooks(retry_seconds=(), check=check)
    hooks.send(receiver.url, lambda: {"n": 3})
    time.sleep(0.1)
    assert receiver.bodies == []
    hooks.close()


def test_a_body_goes_to_the_address_that_was_checked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is not asked for again: it could mean something else by then. Nor does a proxy ask."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    hooks = Webhooks(retry_seconds=(), check=lambda _: "127.0.0.1")
    hooks.send(f"http://hooks.invalid:{receiver.server_port}/hook", lambda: {"n": 4})
    assert receiver.wait_for(1) == [{"n": 4}]
    assert receiver.hosts == [f"hooks.invalid:{receiver.server_port}"]
    hooks.close()


def test_a_server_on_loopback_posts_to_this_machine_and_to_public_addresses() -> None:
    check = _webhook_check(ServerOptions())
    assert check is not None and _webhook_check(ServerOptions(allow_private_urls=True)) is None
    assert [check(f"http://{host}:3000/hook") for host in ("127.0.0.1", "localhost", "[::1]")] == [None] * 3
    assert check("https://1.1.1.1/hook") == "1.1.1.1"
    with pytest.raises(httpx.UnsupportedProtocol, match="not a public address"):
        check("http://10.1.2.3/hook")
    beyond = _webhook_check(ServerOptions(host="0.0.0.0", api_key="x"))
    assert beyond is not None
    with pytest.raises(httpx.UnsupportedProtocol, match="not a public address"):
        beyond("http://localhost:3000/hook")


def test_a_webhook_names_the_video_as_its_caller_reaches_the_server(receiver: Receiver, tmp_path: Path) -> None:
    Image.new("RGB", (80, 64)).save(tmp_path / "frame.png")
    frame = encode_file(tmp_path / "frame.png")
    body = {"prompt": "x", "start_image_url": frame, "end_image_url": frame, "num_inference_steps": 2}
    with live_server(tmp_path, StubEngine(tmp_path)) as live:
        caller = f"localhost:{live.url.rpartition(':')[2]}"
        live.http.post(live.queue, json=body, params={"fal_webhook": receiver.url}, headers={"host": caller})
        (told,) = receiver.wait_for(1)
        assert told["payload"]["video"]["url"].startswith(f"http://{caller}/files/")
        assert live.http.get(told["payload"]["video"]["url"]).status_code == 200
