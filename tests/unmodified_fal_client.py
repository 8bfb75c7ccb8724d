"""Drives the installed fal_client against a server, in a process of its own; every claim is an assert.

python unmodified_fal_client.py redirect|environment URL FRAME. With "environment", the variables are set by the caller
and nothing of this project is imported. The prompt "slow" must take long, and every other three steps.
"""

from __future__ import annotations

import asyncio
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import fal_client
from PIL import Image

APPLICATION = "fal-ai/wan-flf2v"
mode, url, frame = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if mode == "redirect":
    import wan_local

    wan_local.redirect(url)

data_uri = fal_client.encode_file(frame)
arguments: dict[str, Any] = {
    "prompt": "a cat", "start_image_url": data_uri, "end_image_url": data_uri, "num_inference_steps": 3, "seed": 7,
}  # fmt: skip


def failure(call: Any, *given: Any, **more: Any) -> fal_client.FalClientHTTPError:
    try:
        call(*given, **more)
    except fal_client.FalClientHTTPError as error:
        return error
    raise AssertionError("no error")


# 1: the published example
messages: list[str] = []


def on_queue_update(update: fal_client.Status) -> None:
    if isinstance(update, fal_client.InProgress):
        messages.extend(log["message"] for log in update.logs or [])


result = fal_client.subscribe(APPLICATION, arguments=arguments, with_logs=True, on_queue_update=on_queue_update)

# 4: the output
assert set(result) == {"video", "seed"}
assert set(result["video"]) == {"url", "content_type", "file_name", "file_size"}
assert result["video"]["content_type"] == "video/mp4"
if mode == "redirect":
    assert len(urlopen(result["video"]["url"]).read()) == result["video"]["file_size"]

# 7, 14: wrong requests
error = failure(fal_client.run, APPLICATION, arguments | {"num_frames": 80})
assert error.status_code == 422
assert error.message[0]["type"] == "greater_than_equal" and error.message[0]["ctx"] == {"ge": 81}
assert error.message[0]["msg"] == "Input should be greater than or equal to 81"
error = failure(fal_client.run, APPLICATION, {})
assert [(entry["type"], entry["loc"][1]) for entry in error.message] == [
    ("missing", "prompt"), ("missing", "start_image_url"), ("missing", "end_image_url"),
]  # fmt: skip

# 22: uploads
if mode == "redirect":
    image = Image.open(frame)
    sources = [
        fal_client.upload_file(frame),
        fal_client.upload(frame.read_bytes(), "image/png", "a.png"),
        fal_client.upload(
            frame.read_bytes(), "image/png", repository="fal", lifecycle=fal_client.StorageSettings("1h")
        ),
        fal_client.upload_image(image, "png"),
        asyncio.run(fal_client.AsyncClient().upload_file(frame)),
        fal_client.encode_image(image, "png"),
    ]
    expected = urlopen(result["video"]["url"]).read()
    for source in sources:
        again = fal_client.run(APPLICATION, arguments | {"start_image_url": source})
        assert urlopen(again["video"]["url"]).read() == expected, source[:60]
    large = fal_client.upload(b"\0" * (101 * 2**20), "image/png")
    assert int(urlopen(large).headers["content-length"]) == 101 * 2**20

# 26: a wrong request is accepted, its result is the error
handle = fal_client.submit(APPLICATION, {"prompt": "x"})
status = None
while not isinstance(status, fal_client.Completed):
    status = handle.status()
assert status.error is None
error = failure(handle.get)
assert error.status_code == 422 and isinstance(error.message, list) and str(error) == str(error.message)
assert error.response.json()["detail"] == error.message
assert error.response_headers["x-fal-request-id"] == handle.request_id

# 27: events and logs
handle = fal_client.submit(APPLICATION, arguments)
events = list(handle.iter_events(with_logs=True, interval=0.02))
assert isinstance(events[-1], fal_client.Completed)
assert [log["message"] for log in events[-1].logs or []] == ["step 1", "step 2", "step 3"]
assert events[-1].metrics["inference_time"] > 0
assert handle.status().logs is None  # type: ignore[attr-defined]

# 28: by id
assert fal_client.result(APPLICATION, handle.request_id) == handle.get()
assert fal_client.status(f"{APPLICATION}/sub/path", handle.request_id) == handle.status()
for call in (fal_client.status, fal_client.cancel):
    error = failure(call, APPLICATION, "nothing")
    assert (error.status_code, error.message) == (404, '{"status":"NOT_FOUND"}'), error.message

# 29, 30, 33: the line, cancel, start timeout
slow = fal_client.submit(APPLICATION, arguments | {"prompt": "slow"})
while not isinstance(slow.status(), fal_client.InProgress):
    time.sleep(0.02)
low = fal_client.submit(APPLICATION, arguments, priority="low")
normal = fal_client.submit(APPLICATION, arguments)
assert (low.status(), normal.status()) == (fal_client.Queued(1), fal_client.Queued(0))
error = failure(fal_client.run, APPLICATION, arguments, start_timeout=1.1)
assert (error.status_code, error.error_type) == (504, "startup_timeout"), error
assert error.response_headers["x-fal-request-timeout-type"] == "user"
low.cancel()
error = failure(low.get)
assert (error.status_code, error.error_type) == (499, "client_cancelled")
slow.cancel()
assert failure(slow.get).status_code == 499
normal.get()
assert failure(normal.cancel).status_code == 400

# 31, 32: subscribe and its timeouts
seen: list[Any] = []
fal_client.subscribe(APPLICATION, arguments, on_enqueue=seen.append, on_queue_update=seen.append, interval=0.05)
assert isinstance(seen[0], str) and isinstance(seen[-1], fal_client.Completed)
try:
    fal_client.subscribe(APPLICATION, arguments | {"prompt": "slow"}, client_timeout=1.5)
except fal_client.FalClientTimeoutError as caught:
    timed_out: fal_client.FalClientTimeoutError | None = caught
else:
    timed_out = None
assert isinstance(timed_out, TimeoutError) and timed_out.timeout == 1.5 and timed_out.request_id
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    fal_client.subscribe(APPLICATION, arguments, client_timeout=60, start_timeout=61)
assert [entry.category for entry in warned if "start_timeout" in str(entry.message)] == [UserWarning]


# the asynchronous client, and the stream
async def asynchronously() -> None:
    client = fal_client.AsyncClient()
    both = await asyncio.gather(*(client.run(APPLICATION, arguments | {"seed": seed}) for seed in (1, 2)))
    assert [output["seed"] for output in both] == [1, 2]
    events = [event async for event in client.stream(APPLICATION, arguments)]
    assert set(events[-1]) == {"video", "seed"}


asyncio.run(asynchronously())
assert [event.get("index") for event in fal_client.stream(APPLICATION, arguments)] == [1, 2, 3, None]
print("every claim holds")
