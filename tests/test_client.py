"""The client face: code written for fal_client runs here with nothing but its import changed."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlretrieve

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.stub_engine import SOON, StubEngine
from wan_local import client as face
from wan_local.client import (
    Completed,
    InProgress,
    Queued,
    Status,
    SyncClient,
)
from wan_local.errors import DoesNotFit, InvalidRequest, NotAvailable
from wan_local.jobs import Ticket
from wan_local.request import DEFAULT_NEGATIVE_PROMPT, Request, Result, Step
from wan_local.service import DefaultService, FalClientHTTPError, FalClientTimeoutError, Service

APPLICATION = "fal-ai/wan-flf2v"


@pytest.fixture
def engine(tmp_path: Path) -> StubEngine:
    return StubEngine(tmp_path)


@pytest.fixture
def service(engine: StubEngine, tmp_path: Path) -> Iterator[Service]:
    service = Service(engine, output_dir=tmp_path / "outputs")
    yield service
    engine.gate.set()
    service.close()


@pytest.fixture
def client(service: Service) -> SyncClient:
    return SyncClient.of(service)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "first frame.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def arguments(picture: Path) -> dict[str, Any]:
    return {"prompt": "a cat", "start_image_url": str(picture), "end_image_url": str(picture), "num_inference_steps": 3}


def failure(call: Callable[[], object]) -> FalClientHTTPError:
    with pytest.raises(FalClientHTTPError) as caught:
        call()
    error = caught.value
    assert str(error) == str(error.message)
    assert isinstance(error.response, httpx.Response)
    assert error.response.status_code == error.status_code
    assert re.fullmatch(r"[0-9a-f-]{36}", error.response_headers["x-fal-request-id"])
    return error


def test_an_unknown_keyword_is_a_type_error(client: SyncClient, arguments: dict[str, Any]) -> None:
    for call in (client.run, client.submit, client.subscribe):
        with pytest.raises(TypeError):
            call(APPLICATION, arguments, priorty="low")  # type: ignore[call-arg]


def test_importing_the_face_imports_no_torch() -> None:
    script = (
        "import sys, wan_local.client; assert 'torch' not in sys.modules; wan_local.client.encode('x', 'text/plain')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Running


def test_the_published_example_runs_with_nothing_but_the_import_changed(
    service: Service, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fal_client = SimpleNamespace(subscribe=SyncClient.of(service).subscribe, InProgress=InProgress)

    def on_queue_update(update: Status) -> None:
        if isinstance(update, fal_client.InProgress):
            for log in update.logs or []:
                print(log["message"])

    result = fal_client.subscribe(
        "fal-ai/wan-flf2v", arguments=arguments, with_logs=True, on_queue_update=on_queue_update
    )
    print(result)
    assert '"url"' in json.dumps(result)
    assert "http://127.0.0.1" in capsys.readouterr().out


def test_run_returns_the_endpoints_output_and_nothing_else(client: SyncClient, arguments: dict[str, Any]) -> None:
    output = client.run(APPLICATION, arguments)
    assert set(output) == {"video", "seed"}
    assert set(output["video"]) == {"url", "content_type", "file_name", "file_size"}
    assert output["video"]["content_type"] == "video/mp4"
    json.dumps(output)


def test_the_video_can_be_downloaded_with_urllib_and_httpx(
    client: SyncClient, arguments: dict[str, Any], tmp_path: Path
) -> None:
    video = client.run(APPLICATION, arguments)["video"]
    by_urllib, _ = urlretrieve(video["url"], tmp_path / "copy.mp4")
    by_httpx = httpx.get(video["url"], trust_env=False)
    assert Path(by_urllib).read_bytes() == by_httpx.content
    assert len(by_httpx.content) == video["file_size"]
    assert by_httpx.headers["content-type"] == "video/mp4"


def test_the_video_can_be_downloaded_with_requests(client: SyncClient, arguments: dict[str, Any]) -> None:
    requests = pytest.importorskip("requests")
    video = client.run(APPLICATION, arguments)["video"]
    with requests.Session() as session:
        session.trust_env = False
        assert len(session.get(video["url"], timeout=SOON).content) == video["file_size"]


def test_file_urls_are_given_where_they_are_asked_for(engine: StubEngine, arguments: dict[str, Any]) -> None:
    service = Service(engine, output_dir=engine.folder, url_scheme="file")
    url = SyncClient.of(service).run(APPLICATION, arguments)["video"]["url"]
    service.close()
    assert url == (engine.folder / "1.mp4").as_uri()


@pytest.mark.parametrize(("seed", "echoed"), [(42, 42), (0, 0), (-1, -1), ("42", 42), (2**63, 2**63)])
def test_a_seed_is_echoed(client: SyncClient, arguments: dict[str, Any], seed: Any, echoed: int) -> None:
    assert client.run(APPLICATION, arguments | {"seed": seed})["seed"] == echoed


def test_what_is_left_out_reaches_the_engine_as_its_default(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    client.run(APPLICATION, arguments | {"cfg": 6, "guidance_scale": 3, "foo": None})
    (request,) = engine.requests
    assert request.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    assert (request.prompt, request.num_frames, request.enable_prompt_expansion) == ("a cat", 81, False)


def test_what_a_caller_changes_after_submit_does_not_reach_the_engine(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    engine.hold()
    handle = client.submit(APPLICATION, arguments)
    arguments["prompt"] = "changed"
    engine.gate.set()
    handle.get()
    assert engine.requests[0].prompt == "a cat"


def test_accepted_and_meaningless_options_are_accepted(client: SyncClient, arguments: dict[str, Any]) -> None:
    headers = {"X-Fal-Store-IO": "0"}
    client.run(APPLICATION, arguments, method="GET", path="/", hint="x", headers=headers)
    client.subscribe(APPLICATION, arguments, path="/", hint="x", headers=headers)
    assert headers == {"X-Fal-Store-IO": "0"}


def test_eight_threads_share_one_engine(client: SyncClient, engine: StubEngine, arguments: dict[str, Any]) -> None:
    outputs: list[Any] = []

    def work(seed: int) -> None:
        outputs.append((seed, client.run(APPLICATION, arguments | {"seed": seed})["seed"]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outputs) == [(seed, seed) for seed in range(8)]


# Images in every spelling


def test_encoded_and_uploaded_images_give_the_same_video_as_the_file(
    client: SyncClient, service: Service, arguments: dict[str, Any], picture: Path
) -> None:
    image = Image.open(picture)
    sources = {
        "path": picture,
        "file url": picture.as_uri(),
        "bytes": picture.read_bytes(),
        "image": image,
        "encode": face.encode(picture.read_bytes(), "image/png"),
        "encode_file": face.encode_file(picture),
        "encode_image": face.encode_image(image, "png"),
        "upload": client.upload(picture.read_bytes(), "image/png", "../../name.png"),
        "upload_file": client.upload_file(picture, lifecycle=None, repository="fal"),
        "upload_image": client.upload_image(image, "png"),
    }

    def video(source: Any) -> bytes:
        output = client.run(APPLICATION, arguments | {"start_image_url": source, "seed": 1})
        return httpx.get(output["video"]["url"], trust_env=False).content

    expected = video(str(picture))
    assert {name: video(source) == expected for name, source in sources.items()} == dict.fromkeys(sources, True)
    assert client.upload_file(picture) == sources["upload"]  # named by content


def test_encoding_guesses_types_as_fal_client_does(tmp_path: Path) -> None:
    unknown = tmp_path / "x.qqq"
    unknown.write_text("hi")
    assert face.encode("hi", "text/plain") == "data:text/plain;base64,aGk="
    assert face.encode_file(unknown) == "data:application/octet-stream;base64,aGk="
    assert face.encode_image(Image.new("RGB", (8, 8))).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("field", ["start_image_url", "end_image_url"])
def test_a_bad_image_is_a_422_that_names_its_field_and_value(
    client: SyncClient, arguments: dict[str, Any], field: str
) -> None:
    error = failure(lambda: client.run(APPLICATION, arguments | {field: "no/such.png"}))
    assert error.status_code == 422
    assert error.message[0]["type"] == "file_download_error"
    assert (error.message[0]["loc"], error.message[0]["input"]) == (["body", field], "no/such.png")


# Wrong requests


def test_run_raises_a_wrong_request_at_once_and_the_engine_never_sees_it(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    engine.hold()
    client.submit(APPLICATION, arguments)
    error = failure(lambda: client.run(APPLICATION, {"num_frames": 80}))
    assert error.status_code == 422
    assert [entry["loc"][1] for entry in error.message] == ["prompt", "start_image_url", "end_image_url", "num_frames"]
    assert error.message[0]["input"] == {"num_frames": 80}
    assert error.error_type is None
    assert isinstance(error.__cause__, InvalidRequest)


def test_submit_gives_a_handle_for_a_wrong_request_and_get_raises_it(client: SyncClient) -> None:
    handle = client.submit(APPLICATION, {"prompt": "x"})
    assert handle.status() == Completed(logs=None, metrics={})
    error = failure(handle.get)
    assert error.status_code == 422
    assert isinstance(error.message, list)
    assert error.response.json()["detail"] == error.message
    assert error.response_headers["x-fal-request-id"] == handle.request_id
    assert error.args[:2] == (error.message, 422)
    assert failure(handle.get).message == error.message


def test_what_json_cannot_carry_is_described_in_the_errors_body(client: SyncClient) -> None:
    error = failure(
        lambda: client.run(APPLICATION, {"prompt": "\ud800", "start_image_url": b"x", "shift": float("nan")})
    )
    assert error.response.json()["detail"] == error.message


@pytest.mark.parametrize(
    ("application", "path", "detail"),
    [
        ("fal-ai/wan-i2v", "", 'Application "wan-i2v" not found'),
        ("nope", "", 'Application "nope" not found'),
        (APPLICATION, "upscale", "Path /upscale not found"),
    ],
)
def test_another_application_or_path_is_a_404(client: SyncClient, application: str, path: str, detail: str) -> None:
    for call in (client.run, client.submit, client.subscribe):
        error = failure(lambda call=call: call(application, {}, path=path))  # type: ignore[misc]
        assert (error.status_code, error.message) == (404, detail)


# Handles


def test_events_go_from_queued_to_in_progress_to_completed_with_cumulative_logs(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    engine.hold()
    client.submit(APPLICATION, arguments)
    while not engine.requests:
        time.sleep(0.001)
    handle = client.submit(APPLICATION, arguments)
    threading.Timer(0.1, engine.gate.set).start()
    events = list(handle.iter_events(with_logs=True, interval=0.01))
    order = [Queued, InProgress, Completed]
    ranks = [order.index(type(event)) for event in events]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    assert ranks.count(2) == 1
    assert isinstance(events[0], Queued)
    assert events[0].position == 0
    logs = [event.logs for event in events if isinstance(event, InProgress | Completed)]
    for earlier, later in itertools.pairwise(logs):
        assert earlier is not None
        assert later is not None
        assert later[: len(earlier)] == earlier
    last = events[-1]
    assert isinstance(last, Completed)
    assert last.metrics["inference_time"] > 0
    assert [entry["message"] for entry in last.logs or []] == ["step 1", "step 2", "step 3"]
    assert all(event.logs is None for event in handle.iter_events() if isinstance(event, Completed))


def test_a_request_can_be_asked_for_by_its_id(client: SyncClient, arguments: dict[str, Any]) -> None:
    handle = client.submit(APPLICATION, arguments)
    output = handle.get()
    assert client.result(APPLICATION, handle.request_id) == output
    assert client.result(f"{APPLICATION}/sub/path", handle.request_id) == output
    assert client.status(APPLICATION, handle.request_id, with_logs=True) == handle.status(with_logs=True)
    assert client.get_handle(APPLICATION, handle.request_id) == handle
    assert repr(handle) == f"SyncRequestHandle(request_id='{handle.request_id}')"


def test_an_unknown_id_is_a_404_and_an_id_without_owner_a_value_error(client: SyncClient) -> None:
    for call in (client.status, client.result, client.cancel):
        error = failure(lambda call=call: call(APPLICATION, "nöthing\n"))  # type: ignore[misc]
        assert (error.status_code, error.message) == (404, '{"status": "NOT_FOUND"}')
        with pytest.raises(ValueError, match=r"Invalid app id: nope\. Must be in the format <appOwner>/<appId>"):
            call("nope", "nothing")


def test_priority_low_runs_after_later_normal_ones(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    engine.hold()
    handles = [client.submit(APPLICATION, arguments | {"prompt": "first"})]
    while not engine.requests:
        time.sleep(0.001)
    handles.append(client.submit(APPLICATION, arguments | {"prompt": "low"}, priority="low"))
    handles.append(client.submit(APPLICATION, arguments | {"prompt": "normal"}, priority="normal"))
    assert [handle.status() for handle in handles[1:]] == [Queued(1), Queued(0)]
    engine.gate.set()
    for handle in handles:
        handle.get()
    assert [request.prompt for request in engine.requests] == ["first", "normal", "low"]


def test_a_wrong_priority_or_timeout_is_a_value_error(client: SyncClient, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Priority must be one of \('normal', 'low'\), got 'high'$"):
        client.submit(APPLICATION, arguments, priority="high")  # type: ignore[arg-type]
    message = "^Timeout must be greater than 1 seconds$"
    with pytest.raises(ValueError, match=message):
        client.run(APPLICATION, arguments, start_timeout=1)
    with pytest.raises(ValueError, match=message):
        client.subscribe(APPLICATION, arguments, client_timeout=1)


# Cancel, timeouts, failure


def test_cancel_ends_waiting_and_running_requests_with_a_499(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    engine.hold()
    running, waiting, last = (client.submit(APPLICATION, arguments) for _ in range(3))
    while not engine.requests:
        time.sleep(0.001)
    client.cancel(APPLICATION, waiting.request_id)
    running.cancel()
    engine.gate.set()
    last.get()
    for handle in (running, waiting):
        status = handle.status()
        assert isinstance(status, Completed)
        assert (status.error, status.error_type) == ("Request was cancelled", "client_cancelled")
        error = failure(handle.get)
        assert (error.status_code, error.message, error.error_type) == (
            499,
            "Request was cancelled",
            "client_cancelled",
        )
    assert len(engine.requests) == 2
    error = failure(last.cancel)
    assert (error.status_code, error.message) == (400, '{"status": "ALREADY_COMPLETED"}')


def test_a_request_not_started_in_time_is_a_504(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    engine.hold()
    client.submit(APPLICATION, arguments)
    error = failure(lambda: client.run(APPLICATION, arguments, start_timeout=1.01))
    assert (error.status_code, error.error_type) == (504, "startup_timeout")
    assert error.response_headers["x-fal-request-timeout-type"] == "user"


@pytest.mark.parametrize("callback", [None, lambda status: None])
def test_client_timeout_cancels_and_raises(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any], callback: Any
) -> None:
    engine.hold()
    ids: list[str] = []
    began = time.monotonic()
    with pytest.raises(FalClientTimeoutError) as caught:
        client.subscribe(
            APPLICATION, arguments, client_timeout=1.1, on_enqueue=ids.append, on_queue_update=callback, interval=30
        )
    assert time.monotonic() - began < 5
    assert isinstance(caught.value, TimeoutError)
    assert (caught.value.timeout, [caught.value.request_id]) == (1.1, ids)
    assert str(caught.value) == f"Request {ids[0]} timed out after 1.1 seconds"
    engine.gate.set()
    assert failure(lambda: client.result(APPLICATION, ids[0])).status_code == 499


def test_a_start_timeout_beyond_the_client_timeout_is_warned_of(client: SyncClient, arguments: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="start_timeout") as caught:
        client.subscribe(APPLICATION, arguments, client_timeout=30, start_timeout=40)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.subscribe(APPLICATION, arguments, client_timeout=30, start_timeout=20)


def test_run_that_takes_too_long_is_cancelled(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any], service: Service
) -> None:
    engine.hold()
    with pytest.raises(httpx.ReadTimeout):
        client.run(APPLICATION, arguments, timeout=0.05)
    engine.gate.set()
    client.run(APPLICATION, arguments)
    assert service.queue.unfinished == 0


@pytest.mark.parametrize("face_call", ["run", "subscribe"])
def test_ctrl_c_cancels_the_request(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any], service: Service,
    monkeypatch: pytest.MonkeyPatch, face_call: str,
) -> None:  # fmt: skip
    engine.hold()

    def interrupted(job: Any, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(service.queue, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(client, face_call)(APPLICATION, arguments)
    monkeypatch.undo()
    engine.gate.set()
    client.run(APPLICATION, arguments)
    assert service.queue.unfinished == 0
    assert len(engine.requests) <= 2


@pytest.mark.parametrize(
    ("fault", "msg"),
    [
        (DoesNotFit("needs 5.1 GiB; 3.2 GiB is free"), "needs 5.1 GiB; 3.2 GiB is free"),
        (MemoryError("no room"), "MemoryError: no room"),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
    ],
)
def test_a_crash_is_a_500_and_the_next_request_runs(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any], fault: BaseException, msg: str
) -> None:
    engine.fault = fault
    handle = client.submit(APPLICATION, arguments)
    error = failure(handle.get)
    assert (error.status_code, error.error_type) == (500, "internal_server_error")
    assert (error.message[0]["type"], error.message[0]["msg"]) == ("internal_server_error", msg)
    assert error.__cause__ is fault
    status = handle.status()
    assert isinstance(status, Completed)
    assert (status.error, status.error_type) == (msg, "internal_server_error")
    engine.fault = None
    client.run(APPLICATION, arguments)


# Subscribe and stream


def test_subscribe_reports_the_id_once_and_the_status_at_every_poll(
    client: SyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    engine.hold()
    seen: list[Any] = []
    times: list[float] = []

    def update(status: Status) -> None:
        seen.append(status)
        times.append(time.monotonic())

    threading.Timer(0.3, engine.gate.set).start()
    output = client.subscribe(
        APPLICATION, arguments, on_enqueue=seen.append, on_queue_update=update, interval=0.05, with_logs=True
    )
    assert set(output) == {"video", "seed"}
    assert isinstance(seen[0], str)
    assert all(isinstance(event, Status) for event in seen[1:])
    assert [type(event) for event in seen].count(Completed) == 1
    assert isinstance(seen[-1], Completed)
    assert len(times) >= 4
    assert all(later - earlier >= 0.045 for earlier, later in itertools.pairwise(times))


def test_an_error_in_a_callback_reaches_the_caller(client: SyncClient, arguments: dict[str, Any]) -> None:
    def callback(_: object) -> None:
        raise LookupError("mine")

    for name in ("on_enqueue", "on_queue_update"):
        with pytest.raises(LookupError, match="mine"):
            client.subscribe(APPLICATION, arguments, **{name: callback})  # type: ignore[arg-type]


def test_stream_gives_a_dict_for_each_step_and_last_the_output(client: SyncClient, arguments: dict[str, Any]) -> None:
    events = list(client.stream(APPLICATION, arguments))
    assert [event.get("index") for event in events] == [1, 2, 3, None]
    assert events[0]["message"] == "step 1"
    assert set(events[-1]) == {"video", "seed"}
    json.dumps(events)


def test_stream_of_an_unknown_path_or_a_wrong_request_is_an_error(
    client: SyncClient, arguments: dict[str, Any]
) -> None:
    assert failure(lambda: list(client.stream(APPLICATION, arguments, path="/other"))).status_code == 404
    assert failure(lambda: list(client.stream(APPLICATION, {}))).status_code == 422


def test_a_stream_that_is_closed_cancels_its_request(tmp_path: Path) -> None:
    gate, closed = threading.Event(), threading.Event()

    def engine(_: Request, ticket: Ticket) -> Iterator[Step | Result]:
        try:
            yield Step("denoise", 1, 2, "", 0.0)
            assert gate.wait(SOON)
            yield Step("denoise", 2, 2, "", 0.0)
            pytest.fail("the engine was not closed")
        finally:
            closed.set()

    service = Service(engine, output_dir=tmp_path)
    arguments = {"prompt": "x", "start_image_url": "a", "end_image_url": "b"}
    events = SyncClient.of(service).stream(APPLICATION, arguments)
    next(events)
    events.close()  # type: ignore[attr-defined]
    gate.set()
    assert closed.wait(SOON)
    service.close()


# The process's own client


def test_configure_refuses_an_unknown_setting() -> None:
    with pytest.raises(ValueError, match="unknown settings"):
        face.configure(colour="blue")


def test_the_default_client_runs_the_pipeline_with_the_configured_settings(tmp_path: Path) -> None:
    """In a process of its own, with a pipeline that is none."""
    script = f"""
import io, pathlib, sys, types
from PIL import Image
from wan_local.request import File, Result, Step
made = []
class Pipeline:
    def __init__(self, settings):
        made.append(settings)
    def generate(self, request, **_):
        yield Step("plan", 1, 1, "planned", 0.0)
        path = made[-1].output_dir / "x.mp4"
        path.write_bytes(b"video")
        yield Result(video=File(url=path.as_uri(), path=path), seed=3)
sys.modules["wan_local.pipeline"] = types.SimpleNamespace(Pipeline=Pipeline)
import wan_local.client as fal_client
arguments = dict(prompt="x", start_image_url="a", end_image_url="b")
fal_client.configure(output_dir={str(tmp_path)!r}, model="tiny", url_scheme="file")
assert not made
for _ in range(2):
    assert fal_client.run("fal-ai/wan-flf2v", arguments)["video"]["url"].endswith("/x.mp4")
assert [settings.model for settings in made] == ["tiny"]
fal_client.configure(output_dir={str(tmp_path)!r}, model="other")
assert fal_client.subscribe("fal-ai/wan-flf2v", arguments)["video"]["url"].startswith("http://127.0.0.1")
assert [settings.model for settings in made] == ["tiny", "other"]
assert fal_client.SyncClient(key="x").run("fal-ai/wan-flf2v", arguments)["seed"] == 3
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_configure_is_refused_while_a_request_has_not_ended(
    monkeypatch: pytest.MonkeyPatch, service: Service, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    default = DefaultService()
    monkeypatch.setattr(default, "_service", service)
    engine.hold()
    service.submit(arguments)
    with pytest.raises(NotAvailable, match="1 jobs have not ended"):
        default.configure({})


def test_upload_image_writes_the_format_that_it_says(client: SyncClient) -> None:
    url = client.upload_image(Image.new("RGB", (64, 64)))
    content = httpx.get(url, trust_env=False).content
    assert Image.open(io.BytesIO(content)).format == "JPEG"
