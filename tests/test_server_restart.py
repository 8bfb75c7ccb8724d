"""A server that is followed by another on its folder: what ran goes on from its last step, what waited waits again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live_server import Live, live_server
from tests.stamps import END, START, stamp_settings
from tests.stub_engine import StubEngine
from wan_local.denoise import Guided
from wan_local.encoding import encode_file
from wan_local.errors import InvalidRequest
from wan_local.jobs import Engine, Ticket
from wan_local.request import Request, Result, Step
from wan_local.server.files import ServedFiles
from wan_local.server.images import fetching
from wan_local.server.options import ServerOptions
from wan_local.service import pipeline_engine

STEPS = 8


def slowly(engine: Engine, seconds: float) -> Engine:
    def run(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        for item in engine(request, ticket):
            yield item
            time.sleep(seconds)

    return run


def submit(live: Live, **changes: object) -> str:
    body = {
        "prompt": "a small blue bird", "start_image_url": encode_file(START), "end_image_url": encode_file(END),
        "resolution": "480p", "num_inference_steps": STEPS, "seed": 42, "acceleration": "none", **changes,
    }  # fmt: skip
    told = live.http.post(live.queue, json=body)
    assert told.status_code == 200
    return str(told.json()["request_id"])


@pytest.mark.slow
def test_a_run_goes_on_from_its_last_step_to_the_same_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stamp_settings(tmp_path, monkeypatch, state_dir=tmp_path / "state", cache_dir=tmp_path / "cache")
    engine = pipeline_engine(settings)
    with live_server(tmp_path, slowly(engine, 0.2)) as live:
        running, waiting = submit(live), submit(live, num_inference_steps=2)
        while sum(log["message"].startswith("step ") for log in _logs(live, running)) < 3:
            time.sleep(0.02)
    calls: list[float] = []
    predict = Guided.predict

    def counted(self: Guided, latents: Any, timestep: float) -> Any:
        calls.append(timestep)
        return predict(self, latents, timestep)

    monkeypatch.setattr(Guided, "predict", counted)
    with live_server(tmp_path, engine) as live:
        assert "error" not in live.ended(running, 120)
        assert "error" not in live.ended(waiting, 120)
        assert len(calls) <= (STEPS - 3) + 2, "it began anew"
        result = live.http.get(f"{live.queue}/requests/{running}").json()
        resumed = live.http.get(result["video"]["url"]).content
        calm = submit(live)
        live.ended(calm, 120)
        whole = live.http.get(live.http.get(f"{live.queue}/requests/{calm}").json()["video"]["url"]).content
    assert resumed == whole


def _logs(live: Live, request_id: str) -> list[dict[str, str]]:
    return live.http.get(f"{live.queue}/requests/{request_id}/status?logs=1").json()["logs"] or []


def test_outcomes_and_their_addresses_outlive_the_server(tmp_path: Path) -> None:
    engine = StubEngine(tmp_path)
    with live_server(tmp_path, engine) as live:
        request_id = submit(live)
        live.ended(request_id)
        before = live.http.get(f"{live.queue}/requests/{request_id}").json()["video"]["url"]
        content = live.http.get(before).content
        upload = live.http.post("/files/upload", content=b"x", headers={"content-type": "image/png"}).json()[
            "access_url"
        ]
        bad = live.http.post(live.queue, json={}).json()["request_id"]
    with live_server(tmp_path, engine) as live:
        after = live.http.get(f"{live.queue}/requests/{request_id}").json()["video"]["url"]
        assert after.split("/files/")[1] == before.split("/files/")[1]
        assert live.http.get(after).content == content
        assert live.http.get(f"{live.url}/files/{upload.split('/files/')[1]}").content == b"x"
        assert live.http.get(f"{live.queue}/requests/{bad}").status_code == 422
        status = live.http.get(f"{live.queue}/requests/{request_id}/status?logs=1").json()
        assert len(status["logs"]) == STEPS and status["metrics"]["inference_time"] > 0


def test_a_run_that_goes_on_needs_its_addresses_no_more(tmp_path: Path) -> None:
    """Signed addresses expire, and a machine that comes up again may be offline."""
    seen = []

    def engine(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        seen.append((request.start_image_url, request.end_image_url))
        yield from ()

    files = ServedFiles(tmp_path, base_url="http://here", max_upload_bytes=10**6, max_uploads_bytes=10**7)
    kept = {"run": {"start_image_url": b"start", "end_image_url": b"end"}}
    run = fetching(engine, files, ServerOptions(), lambda run_id: kept.get(run_id, {}))
    request = Request(prompt="p", start_image_url="http://127.0.0.1:9/a.png", end_image_url="http://127.0.0.1:9/b.png")
    assert list(run(request, Ticket("run", lambda: None))) == [] and seen == [(b"start", b"end")]
    with pytest.raises(InvalidRequest):  # nothing is kept of this one
        list(run(request, Ticket("another", lambda: None)))
