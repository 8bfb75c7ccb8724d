"""Whatever a client sends, within its own schema and beyond, the server answers, and never with a 5xx.

Schemathesis draws the requests from our /openapi.json; the rest is what an enemy would try by hand.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.live_server import APPLICATION, Live, live_server
from tests.stub_engine import StubEngine

EXAMPLES = 15


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("fuzz")
    with live_server(folder, StubEngine(folder)) as live:
        yield live


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_requests_drawn_from_our_schema_and_against_it_get_no_5xx(live: Live) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_dict(live.http.get("/openapi.json").json())
    codes: dict[str, set[int]] = {}

    for operation in schema.get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @given(case=operation.ok().as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate],
            )  # fmt: skip
            def answers(case: Any) -> None:
                response = case.call(base_url=live.url)
                assert response.status_code < 500, f"{case.as_curl_command()}: {response.status_code} {response.text}"
                assert response.headers["x-fal-request-id"]
                codes.setdefault(case.path, set()).add(response.status_code)

            with suppress(Unsatisfiable):  # nothing about it can be wrong: a path of any text, say
                answers()
    assert codes[f"/run/{APPLICATION}"] >= {422}
    assert codes[f"/queue/{APPLICATION}"] >= {200}
    for tail in ("", "/status", "/cancel"):
        assert codes[f"/queue/{APPLICATION}/requests/{{request_id}}{tail}"] >= {404}


HOSTILE = [
    ("GET", "/files/..%2f..%2fetc/passwd", None),
    ("GET", "/files/%00/%00", None),
    ("GET", f"/queue/{APPLICATION}/requests/..%2f..%2f/status", None),
    ("GET", f"/queue/{APPLICATION}/requests/%F0%9F%98%80/status?logs=%00", None),
    ("GET", f"/queue/{APPLICATION}/requests/{'x' * 5000}", None),
    ("PUT", "/put/%2e%2e/%2e%2e", b"x"),
    ("PUT", f"/put/{'A' * 32}/{'A' * 32}.{'b' * 300}", b"x"),
    ("PUT", f"/mput/{'A' * 32}/{'A' * 32}.png/99999999999999999999", b"x"),
    ("PUT", f"/mput/{'A' * 32}/{'A' * 32}.png/-1", b"x"),
    ("POST", f"/mput/{'A' * 32}/{'A' * 32}.png/complete", b'{"parts": [{"partNumber": 1e999}]}'),
    ("POST", f"/mput/{'A' * 32}/{'A' * 32}.png/complete", b'{"parts": [{"partNumber": "../../x"}]}'),
    ("POST", f"/mput/{'A' * 32}/{'A' * 32}.png/complete", b"[" * 100_000),
    ("POST", "/storage/upload/initiate", b'"text"'),
    ("POST", "/storage/upload/initiate", b'{"content_type": "../../x/\\u0000", "file_name": "../../../x"}'),
    ("POST", "/storage/upload/initiate", b'{"content_type": 5}'),
    ("POST", f"/run/{APPLICATION}", b'{"prompt": "\\ud800", "start_image_url": "data:,", "end_image_url": "\\u0000"}'),
    (
        "POST",
        f"/run/{APPLICATION}",
        b'{"prompt": "x", "start_image_url": "http://[", "end_image_url": "http://\\u0000"}',
    ),
    ("POST", f"/run/{APPLICATION}", b'{"prompt": "x", "start_image_url": "http://a:99999/", "end_image_url": "x"}'),
    ("POST", f"/run/{APPLICATION}", b'{"prompt": "x", "seed": 1e400, "shift": NaN, "num_frames": -Infinity}'),
    ("POST", f"/queue/{APPLICATION}?fal_max_queue_length=99999999999999999999", b"{}"),
    ("POST", f"/queue/{APPLICATION}?fal_webhook=http://[", b"{}"),
    ("POST", f"/queue/{APPLICATION}?fal_webhook=http://169.254.169.254/", b"{}"),
    ("DELETE", f"/queue/{APPLICATION}", None),
    ("TRACE", "/", None),
]


@pytest.mark.parametrize(("method", "path", "content"), HOSTILE)
def test_hostile_requests_are_answered_calmly(live: Live, method: str, path: str, content: bytes | None) -> None:
    answer = live.http.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    assert live.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "content-length: -5", "content-length: x", "content-length: 99999999999999999999", "content-type: \x7f",
        "x-fal-request-timeout: nan", "x-fal-request-timeout: 1e999", "range: bytes=" + "0-0," * 1000,
        "x-fal-target-url: http://[::1", "transfer-encoding: gzip", "authorization: \xff", "origin: \xff", "no colon",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [f"/run/{APPLICATION}", f"/queue/{APPLICATION}", "/api/fal/proxy"])
def test_hostile_headers_are_answered_calmly(live: Live, header: str, path: str) -> None:
    host = live.url.removeprefix("http://")
    length = "" if header.startswith(("content-length", "transfer")) else "content-length: 2\r\n"
    lines = f"POST {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{length}{header}\r\n\r\n{{}}"
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=10) as connection:
        connection.sendall(lines.encode("latin-1"))
        answer = connection.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 ") and answer[9:10] in b"24", answer
    assert live.http.get("/health").status_code == 200
