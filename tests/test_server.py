"""The server: the hosted service's paths, codes and shapes, on loopback, with a stub engine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.live_server import APPLICATION, Live, live_server
from tests.stub_engine import SOON, StubEngine
from wan_local.encoding import encode_file
from wan_local.server.guard import Guard, Receive, Scope, Send
from wan_local.server.options import ServerOptions


@pytest.fixture
def engine(tmp_path: Path) -> StubEngine:
    return StubEngine(tmp_path)


@pytest.fixture
def live(engine: StubEngine, tmp_path: Path) -> Iterator[Live]:
    with live_server(tmp_path, engine) as live:
        yield live
        engine.gate.set()


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    path = tmp_path / "frame.png"
    Image.linear_gradient("L").resize((80, 64)).convert("RGB").save(path)
    return path


@pytest.fixture
def body(frame: Path) -> dict[str, Any]:
    uri = encode_file(frame)
    return {"prompt": "a cat", "start_image_url": uri, "end_image_url": uri, "num_inference_steps": 3}


def begun(engine: StubEngine, count: int = 1) -> None:
    deadline = time.monotonic() + SOON
    while len(engine.requests) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(engine.requests) >= count


# Run


def test_run_answers_with_the_output_and_a_request_id(live: Live, body: dict[str, Any]) -> None:
    answer = live.http.post(live.run, json=body)
    assert answer.status_code == 200
    output = answer.json()
    assert set(output) == {"video", "seed"}
    assert set(output["video"]) == {"url", "content_type", "file_name", "file_size"}
    assert len(answer.headers["x-fal-request-id"]) == 36
    assert output["video"]["url"].startswith(f"{live.url}/files/")
    video = live.http.get(output["video"]["url"])
    assert len(video.content) == output["video"]["file_size"]
    assert video.headers["content-type"] == "video/mp4"


@pytest.mark.parametrize(
    ("content", "content_type", "type_", "loc"),
    [
        (b"{bad", "application/json", "json_invalid", ["body", 1]),
        (b"\xff{}", "application/json", "json_invalid", ["body", 0]),
        (b"", "application/json", "missing", ["body"]),
        (b"null", "application/json", "model_attributes_type", ["body"]),
        (b"[1]", "application/json", "model_attributes_type", ["body"]),
        (b"{}", "text/plain", "model_attributes_type", ["body"]),
        (b"[" * 100_000, "application/json", "json_invalid", ["body", 0]),
        (
            b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b', "start_image_url": "a", "end_image_url": "b"}',
            "application/json",
            "string_type",
            ["body", "prompt"],
        ),
        (
            b'{"\\ud800": 1, "prompt": "x", "start_image_url": "a"}',
            "application/json",
            "missing",
            ["body", "end_image_url"],
        ),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", "json_invalid", ["body", 0]),
    ],
    ids=[
        "bad json",
        "not utf-8",
        "empty",
        "null",
        "list",
        "text",
        "deep",
        "deep value",
        "surrogate key",
        "long number",
    ],
)
def test_a_wrong_body_is_a_422(live: Live, content: bytes, content_type: str, type_: str, loc: list[Any]) -> None:
    answer = live.http.post(live.run, content=content, headers={"content-type": content_type})
    assert answer.status_code == 422
    (entry,) = answer.json()["detail"]
    assert (entry["type"], entry["loc"]) == (type_, loc)


def test_a_client_that_leaves_cancels_its_run(live: Live, engine: StubEngine, body: dict[str, Any]) -> None:
    engine.hold()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(live.url + live.run, json=body, timeout=0.3, trust_env=False)
    begun(engine)
    deadline = time.monotonic() + SOON
    while not next(iter(live.service.queue._jobs.values())).cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.gate.set()
    live.http.post(live.run, json=body)
    assert live.service.queue.unfinished == 0
    assert len(engine.requests) == 2


def test_stream_gives_each_step_and_last_the_output(live: Live, body: dict[str, Any]) -> None:
    answer = live.http.post(f"{live.run}/stream", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [event.get("index") for event in events] == [1, 2, 3, None]
    assert set(events[-1]) == {"video", "seed"}
    assert live.http.post(f"{live.run}/stream", json={}).status_code == 422


def test_a_stream_whose_run_fails_tells_the_error_and_breaks_off(
    live: Live, engine: StubEngine, body: dict[str, Any]
) -> None:
    engine.fault = RuntimeError("CUDA out of memory")
    lines: list[str] = []
    with (
        live.http.stream("POST", f"{live.run}/stream", json=body) as answer,
        pytest.raises(httpx.RemoteProtocolError, match="incomplete"),
    ):
        lines.extend(answer.iter_lines())
    assert lines[0] == "event: error"
    told = json.loads(lines[1].removeprefix("data: "))
    assert (told["status_code"], told["detail"][0]["type"]) == (500, "internal_server_error")


def test_a_run_whose_client_waits_is_not_kept_for_a_later_server(
    live: Live, engine: StubEngine, body: dict[str, Any]
) -> None:
    engine.hold()
    waiting = threading.Thread(target=lambda: live.http.post(live.run, json=body))
    waiting.start()
    begun(engine)
    requests = live.folder / "requests"
    assert list(requests.iterdir()) == []
    told = live.http.post(live.queue, json=body).json()
    assert [told["request_id"] in path.name for path in requests.iterdir()] == [True]
    engine.gate.set()
    waiting.join()


def test_a_stream_that_is_left_cancels_its_request(live: Live, engine: StubEngine, body: dict[str, Any]) -> None:
    engine.pause = 0.05
    with live.http.stream("POST", f"{live.run}/stream", json=body | {"num_inference_steps": 40}) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + SOON
    while live.service.queue.unfinished and time.monotonic() < deadline:
        time.sleep(0.02)
    assert live.service.queue.unfinished == 0


# Queue


def test_the_queue_goes_from_submit_to_result(live: Live, engine: StubEngine, body: dict[str, Any]) -> None:
    engine.hold()
    live.http.post(live.queue, json=body)
    begun(engine)
    told = live.http.post(live.queue, json=body)
    assert told.status_code == 200
    envelope = told.json()
    assert envelope["status"] == "IN_QUEUE"
    assert envelope["queue_position"] == 0
    assert envelope["logs"] is None
    assert envelope["metrics"] == {}
    base = f"{live.url}{live.queue}/requests/{envelope['request_id']}"
    assert (envelope["response_url"], envelope["status_url"], envelope["cancel_url"]) == (
        base, f"{base}/status", f"{base}/cancel",
    )  # fmt: skip
    assert live.http.get(envelope["status_url"]).status_code == 202
    early = live.http.get(envelope["response_url"])
    assert (early.status_code, early.json()) == (400, {"detail": "Request is still in progress"})
    engine.gate.set()
    status = live.ended(envelope["request_id"])
    assert [entry["message"] for entry in status["logs"]] == ["step 1", "step 2", "step 3"]
    assert status["metrics"]["inference_time"] > 0
    assert "queue_position" not in status
    assert live.http.get(f"{base}/status").json()["logs"] is None
    for path in (base, f"{base}/response", base.replace("/requests", "/sub/path/requests")):
        result = live.http.get(path)
        assert result.status_code == 200
        assert set(result.json()) == {"video", "seed"}
        assert result.headers["x-fal-request-id"] == envelope["request_id"]


def test_a_wrong_request_is_accepted_and_its_result_is_the_422(live: Live) -> None:
    for content in ({"json": {"prompt": "x", "num_frames": 80}}, {"content": b"{bad"}):
        told = live.http.post(live.queue, **content, headers={"content-type": "application/json"})  # type: ignore[arg-type]
        assert told.status_code == 200
        status = live.ended(told.json()["request_id"])
        assert "error" not in status
        result = live.http.get(told.json()["response_url"])
        assert result.status_code == 422
        assert isinstance(result.json()["detail"], list)


def test_cancel_answers_as_the_hosted_service(live: Live, engine: StubEngine, body: dict[str, Any]) -> None:
    engine.hold()
    ids = [live.http.post(live.queue, json=body).json()["request_id"] for _ in range(2)]
    begun(engine)
    for request_id in ids:
        answer = live.http.put(f"{live.queue}/requests/{request_id}/cancel")
        assert (answer.status_code, answer.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    engine.gate.set()
    for request_id in ids:
        status = live.ended(request_id)
        assert (status["error"], status["error_type"]) == ("Request was cancelled", "client_cancelled")
        result = live.http.get(f"{live.queue}/requests/{request_id}")
        assert (result.status_code, result.headers["x-fal-error-type"]) == (499, "client_cancelled")
        again = live.http.put(f"{live.queue}/requests/{request_id}/cancel")
        assert (again.status_code, again.json()) == (400, {"status": "ALREADY_COMPLETED"})
    assert len(engine.requests) == 1


def test_the_status_stream_carries_each_log_once(live: Live, engine: StubEngine, body: dict[str, Any]) -> None:
    engine.hold()
    request_id = live.http.post(live.queue, json=body).json()["request_id"]
    threading.Timer(0.2, engine.gate.set).start()
    answer = live.http.get(f"{live.queue}/requests/{request_id}/status/stream?logs=1&progress=1")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [entry["message"] for event in events for entry in event["logs"]] == ["step 1", "step 2", "step 3"]
    assert events[-1]["status"] == "COMPLETED"
    assert all(event["status"] != "COMPLETED" for event in events[:-1])


@pytest.mark.parametrize(
    ("method", "path", "code", "answer"),
    [
        ("POST", "/run/fal-ai/wan-i2v", 404, {"detail": 'Application "wan-i2v" not found'}),
        ("POST", f"/run/{APPLICATION}/upscale", 404, {"detail": "Path /upscale not found"}),
        ("POST", f"/queue/{APPLICATION}/upscale", 404, {"detail": "Path /upscale not found"}),
        ("GET", f"/queue/{APPLICATION}/requests/nothing", 404, {"status": "NOT_FOUND"}),
        ("GET", f"/queue/{APPLICATION}/requests/nothing/status", 404, {"status": "NOT_FOUND"}),
        ("PUT", f"/queue/{APPLICATION}/requests/nothing/cancel", 404, {"status": "NOT_FOUND"}),
        ("GET", f"/queue/{APPLICATION}", 405, {"detail": "Method Not Allowed"}),
        ("GET", f"/run/{APPLICATION}", 405, {"detail": "Method Not Allowed"}),
        ("GET", "/nowhere", 404, {"detail": "Not Found"}),
    ],
)
def test_what_is_not_there_says_so(live: Live, method: str, path: str, code: int, answer: dict[str, str]) -> None:
    told = live.http.request(method, path)
    assert (told.status_code, told.json()) == (code, answer)
    assert told.headers["x-fal-request-id"]


def test_headers_and_query_ask_for_priority_timeout_and_length(
    live: Live, engine: StubEngine, body: dict[str, Any]
) -> None:
    engine.hold()
    live.http.post(live.queue, json=body)
    begun(engine)
    low = live.http.post(live.queue, json=body, headers={"x-fal-queue-priority": "low"}).json()
    normal = live.http.post(live.queue, json=body, headers={"x-fal-queue-priority": "normal"}).json()
    assert live.http.get(low["status_url"]).json()["queue_position"] == 1
    assert live.http.get(normal["status_url"]).json()["queue_position"] == 0
    late = live.http.post(live.run, json=body, headers={"x-fal-request-timeout": "0.2"})
    assert late.status_code == 504
    assert late.headers["x-fal-request-timeout-type"] == "user"
    assert late.json()["error_type"] == "startup_timeout"
    assert live.http.post(f"{live.queue}?fal_max_queue_length=2", json=body).status_code == 429
    for headers in ({"x-fal-queue-priority": "high"}, {"x-fal-request-timeout": "soon"}):
        assert live.http.post(live.queue, json=body, headers=headers).status_code == 400
    assert live.http.post(f"{live.queue}?fal_webhook=ftp://x", json=body).status_code == 400


def test_an_engines_crash_is_a_500_and_the_next_request_runs(
    live: Live, engine: StubEngine, body: dict[str, Any]
) -> None:
    engine.fault = RuntimeError("CUDA out of memory")
    answer = live.http.post(live.run, json=body)
    assert answer.status_code == 500
    assert answer.json()["detail"][0]["type"] == "internal_server_error"
    engine.fault = None
    assert live.http.post(live.run, json=body).status_code == 200


# Images


def test_every_way_to_send_an_image_gives_the_same_video(live: Live, frame: Path, body: dict[str, Any]) -> None:
    content = frame.read_bytes()
    one = live.http.post("/files/upload", content=content, headers={"content-type": "image/png"}).json()["access_url"]
    two = live.http.post("/storage/upload/initiate?storage_type=gcs", json={"content_type": "image/png"}).json()
    assert live.http.put(two["upload_url"], content=content).status_code == 200
    three = live.http.post("/storage/upload/initiate-multipart", json={"content_type": "image/png"}).json()
    parts = [live.http.put(f"{three['upload_url']}/{n}", content=content[(n - 1) * 100 : n * 100 if n < 3 else None])
             for n in (1, 2, 3)]  # fmt: skip
    assert [part.json()["partNumber"] for part in parts] == [1, 2, 3]
    done = live.http.post(f"{three['upload_url']}/complete", json={"parts": [part.json() for part in parts]})
    assert done.status_code == 200
    four = live.http.post("/files/upload/multipart", headers={"content-type": "image/png"}).json()
    part = live.http.put(f"{four['access_url']}/multipart/{four['uploadId']}/1", content=content)
    listed = {"parts": [{"partNumber": 1, "etag": part.headers["etag"]}]}
    assert live.http.post(f"{four['access_url']}/multipart/{four['uploadId']}/complete", json=listed).is_success

    def video(source: str) -> bytes:
        output = live.http.post(live.run, json=body | {"start_image_url": source, "seed": 1})
        assert output.status_code == 200, output.text
        return live.http.get(output.json()["video"]["url"]).content

    expected = video(body["start_image_url"])
    for source in (one, two["file_url"], three["file_url"], four["access_url"]):
        assert video(source) == expected
        assert live.http.get(source).content == content
        assert live.http.get(source).headers["content-type"] == "image/png"


@pytest.mark.parametrize("field", ["start_image_url", "end_image_url"])
@pytest.mark.parametrize(
    ("source", "type_"),
    [
        ("file:///etc/passwd", "file_download_error"),
        ("/etc/passwd", "file_download_error"),
        ("../../x", "file_download_error"),
        ("\\\\host\\share\\x.png", "file_download_error"),
        ("http://169.254.169.254/latest/meta-data", "file_download_error"),
        ("http://127.0.0.1:1/x.png", "file_download_error"),
        ("http://localhost/x.png", "file_download_error"),
        ("ftp://example.com/x.png", "file_download_error"),
        ("", "file_download_error"),
        ("data:image/png;base64,!!!", "image_load_error"),
        ("data:text/plain,hello", "image_load_error"),
    ],
)
def test_an_image_that_may_not_be_opened_is_a_422_with_its_value(
    live: Live, body: dict[str, Any], field: str, source: str, type_: str
) -> None:
    answer = live.http.post(live.run, json=body | {field: source})
    assert answer.status_code == 422
    (entry,) = answer.json()["detail"]
    assert (entry["type"], entry["loc"], entry["input"]) == (type_, ["body", field], source)


def test_a_bad_upload_is_named_by_its_address_and_not_by_its_place(live: Live, body: dict[str, Any]) -> None:
    url = live.http.post("/files/upload", content=b"hello", headers={"content-type": "image/png"}).json()["access_url"]
    answer = live.http.post(live.run, json=body | {"end_image_url": url})
    (entry,) = answer.json()["detail"]
    assert (entry["type"], entry["input"]) == ("image_load_error", url)
    assert str(live.folder) not in answer.text


def test_local_files_are_opened_where_that_is_allowed(
    tmp_path: Path, engine: StubEngine, frame: Path, body: dict[str, Any]
) -> None:
    with live_server(tmp_path, engine, allow_local_files=True) as live:
        for source in (str(frame), frame.as_uri()):
            assert live.http.post(live.run, json=body | {"start_image_url": source}).status_code == 200


def test_a_job_that_is_cancelled_while_an_image_is_fetched_ends_as_cancelled(
    tmp_path: Path, engine: StubEngine, body: dict[str, Any]
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        live_server(tmp_path, engine, allow_private_urls=True) as live,
    ):
        body["start_image_url"] = f"http://127.0.0.1:{silent.getsockname()[1]}/x.png"
        request_id = live.http.post(live.queue, json=body).json()["request_id"]
        connection, _ = silent.accept()
        live.http.put(f"{live.queue}/requests/{request_id}/cancel")
        assert live.ended(request_id, 2)["error_type"] == "client_cancelled"
        assert live.http.get(f"{live.queue}/requests/{request_id}").status_code == 499
        assert engine.requests == []
        connection.close()


# Files


def test_files_are_given_whole_or_in_ranges_and_cannot_be_guessed(live: Live, body: dict[str, Any]) -> None:
    video = live.http.post(live.run, json=body).json()["video"]
    whole = live.http.get(video["url"]).content
    part = live.http.get(video["url"], headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert live.http.head(video["url"]).headers["content-length"] == str(len(whole))
    assert live.http.get(video["url"], headers={"range": f"bytes={len(whole)}-"}).status_code == 416
    saved = live.http.get(video["url"] + "?download=1")
    assert saved.headers["content-disposition"].startswith("attachment")
    token, name = video["url"].split("/files/")[1].split("/")
    for path in (
        f"/files/{token}/other.mp4", f"/files/{token[::-1]}/{name}", "/files/../../etc/passwd",
        "/files/%2e%2e/%2e%2e", f"/files/{token}/..%2f..%2fetc%2fpasswd", f"/files/{token}/%2e%2e",
        "/files/*/*", "/files/.secret/.secret", "/put/x/../../y", f"/files/{token}/{name}%00",
    ):  # fmt: skip
        assert live.http.get(path).status_code in (404, 405), path


def test_an_uploaded_page_is_never_shown_as_one(live: Live) -> None:
    url = live.http.post(
        "/files/upload", content=b"<script>alert(1)</script>", headers={"content-type": "text/html"}
    ).json()["access_url"]
    answer = live.http.get(url)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in answer.headers["content-security-policy"]


def test_uploads_and_bodies_are_bounded_and_leave_nothing_half(
    tmp_path: Path, engine: StubEngine, body: dict[str, Any]
) -> None:
    with live_server(tmp_path, engine, max_upload_bytes=1000, max_body_bytes=500) as live:
        big = {"content": b"x" * 1001, "headers": {"content-type": "image/png"}}
        assert live.http.post("/files/upload", **big).status_code == 413  # type: ignore[arg-type]
        ticket = live.http.post("/storage/upload/initiate", json={"content_type": "image/png"}).json()
        assert live.http.put(ticket["upload_url"], content=b"x" * 1001).status_code == 413
        assert live.http.get(ticket["file_url"]).status_code == 404
        many = live.http.post("/storage/upload/initiate-multipart", json={}).json()
        assert live.http.put(f"{many['upload_url']}/1", content=b"x" * 600).is_success
        assert live.http.put(f"{many['upload_url']}/2", content=b"x" * 600).status_code == 413
        assert live.http.put(f"{many['upload_url']}/1001", content=b"x").status_code == 413
        assert live.http.post(f"{many['upload_url']}/complete", json={"parts": []}).status_code == 400
        twice = {"parts": [{"partNumber": 1}, {"partNumber": 1}]}
        assert live.http.post(f"{many['upload_url']}/complete", json=twice).status_code == 400
        assert live.http.post(live.run, json={"prompt": "x" * 1000}).status_code == 413
        assert not list(live.folder.rglob("*.part"))


# Who may


def test_a_foreign_host_or_origin_is_refused(live: Live, body: dict[str, Any]) -> None:
    port = live.url.rpartition(":")[2]
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1:1", f"127.0.0.1.evil.example:{port}", "a:b:c", ""):
        assert live.http.get("/health", headers={"host": host}).status_code in (400, 403), host
    assert live.http.get("/health", headers={"host": f"localhost:{port}"}).status_code == 200
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
        answer = live.http.post(live.queue, json=body, headers={"origin": origin})
        assert answer.status_code == 403, origin
        assert "access-control-allow-origin" not in answer.headers
    assert live.http.post(live.queue, json=body, headers={"origin": live.url}).status_code == 200


def test_a_host_is_ours_in_capitals_too() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not asked")

    guard = Guard(app, ServerOptions(host="Studio.Local", port=8787, api_key="x"))
    assert all(guard._host_is_ours(host) for host in ("Studio.Local:8787", "studio.local:8787", "STUDIO.LOCAL"))


def test_an_origin_that_was_named_may_use_it(tmp_path: Path, engine: StubEngine, body: dict[str, Any]) -> None:
    origin = "http://localhost:3000"
    with live_server(tmp_path, engine, cors_origins=(origin,)) as live:
        asked = live.http.options(
            live.queue,
            headers={
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "content-type, x-fal-target-url",
            },
        )
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == origin
        assert "x-fal-target-url" in asked.headers["access-control-allow-headers"]
        told = live.http.post(live.queue, json=body, headers={"origin": origin})
        assert told.headers["access-control-allow-origin"] == origin
        assert "x-fal-request-id" in told.headers["access-control-expose-headers"]
        assert live.http.get("/health", headers={"origin": "http://localhost:3001"}).status_code == 403


def test_with_a_key_only_those_who_show_it_get_in(tmp_path: Path, engine: StubEngine, body: dict[str, Any]) -> None:
    with live_server(tmp_path, engine, api_key="open sesame") as live:
        refused = live.http.post(live.run, json=body)
        assert (refused.status_code, refused.json()) == (401, {"detail": "invalid key credentials"})
        for wrong in ("Key open", "Basic open sesame", "open sesame", ""):
            assert live.http.post(live.queue, json=body, headers={"authorization": wrong}).status_code == 401
        for path in ("/files/upload", "/files/upload/multipart", "/storage/upload/initiate", "/api/fal/proxy"):
            assert live.http.post(path, content=b"x").status_code == 401, path
        invented = f"{'A' * 32}/{'A' * 32}.png"
        for path in (f"/put/{invented}", f"/mput/{invented}/1", f"/files/{invented}/multipart/x/1"):
            assert live.http.put(path, content=b"x").status_code == 404, path
        assert [path.name for path in (live.folder / "uploads").iterdir()] == [".secret"]
        assert live.http.get("/health").status_code == 200
        assert live.http.get("/").status_code == 200
        key = {"authorization": "Key open sesame"}
        output = live.http.post(live.run, json=body, headers=key).json()
        assert live.http.get(output["video"]["url"]).status_code == 200
        token = live.http.post("/storage/auth/token", headers=key).json()
        bearer = {"authorization": f"{token['token_type']} {token['token']}"}
        assert live.http.post("/files/upload", content=b"x", headers=bearer).status_code == 200


def test_the_proxy_goes_to_the_endpoint_and_nowhere_else(live: Live, body: dict[str, Any]) -> None:
    def proxied(method: str, target: str, **more: Any) -> httpx.Response:
        return live.http.request(method, "/api/fal/proxy", headers={"x-fal-target-url": target}, **more)

    assert proxied("POST", f"https://fal.run/{APPLICATION}", json=body).status_code == 200
    told = proxied("POST", f"https://queue.fal.run/{APPLICATION}?fal_webhook=", json=body)
    assert told.status_code == 400  # the query came along
    told = proxied("POST", f"https://queue.fal.run/{APPLICATION}", json=body).json()
    status = proxied("GET", f"https://queue.fal.run/{APPLICATION}/requests/{told['request_id']}/status?logs=1")
    assert status.json()["request_id"] == told["request_id"]
    ticket = proxied("POST", "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3", json={})
    assert ticket.json()["upload_url"].startswith(live.url)
    assert live.http.post("/api/fal/proxy").status_code == 400
    for target in ("https://evil.example/x", "http://127.0.0.1:1/", "nonsense", "https://[", "https://fal.run.evil/x"):
        assert proxied("GET", target).status_code == 412, target


def test_health_and_page_are_there(live: Live) -> None:
    assert live.http.get("/health").json()["status"] == "ok"
    page = live.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
