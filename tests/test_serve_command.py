"""`wan-local serve` as it is typed: what it says, what it refuses, how it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from wan_local import cli
from wan_local.cli.terminal import FAILED, WRONG_REQUEST
from wan_local.errors import DeviceFailed
from wan_local.jobs import Ticket
from wan_local.request import Request, Result, Step
from wan_local.server.options import ServerOptions
from wan_local.server.process import Server


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Start the command; give it and the lines that it has said, up to the last of its greeting."""
    command = [
        sys.executable,
        "-m",
        "wan_local",
        "serve",
        "--model",
        "tiny",
        "--port",
        "0",
        "--output-dir",
        str(folder),
    ]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        while not lines or "@fal-ai/client" not in lines[-1]:
            line = process.stderr.readline()
            assert line, f"it ended after {lines}"
            lines.append(line.rstrip())
        try:
            yield process, lines
        finally:
            process.kill()


def test_it_says_where_it_is_refuses_a_second_one_and_ends_on_sigterm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path) as (process, lines):
        url = re.findall(r"http://127\.0\.0\.1:[0-9]+", lines[0])[0]
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "ok"
        assert f'wan_local.redirect("{url}")' in "\n".join(lines)
        port = url.rpartition(":")[2]
        assert cli.main(["serve", "--port", port, "--output-dir", str(tmp_path / "other")]) == FAILED
        assert "choose another --port" in capsys.readouterr().err
        assert cli.main(["serve", "--port", "0", "--output-dir", str(tmp_path)]) == FAILED
        assert f"is held by process {process.pid}" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (-signal.SIGTERM, 143, 0)


def test_an_open_host_without_a_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--host", "0.0.0.0", "--port", "0", "--output-dir", str(tmp_path)]) == FAILED
    assert "--api-key" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert cli.main(["serve", "--port", port, "--output-dir", str(tmp_path)]) == FAILED
    assert f"--port {port}: ports go from 1 to 65535" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_told_before_anything_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--output-dir", str(tmp_path), "--kernels", "maybe"]) == WRONG_REQUEST
    assert "A setting is wrong: kernels is 'maybe'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan_local.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    assert cli.main(["serve", "--output-dir", str(tmp_path)]) == FAILED
    assert "needs uvicorn: pip install 'wan_local[server]'" in capsys.readouterr().err


def test_the_variables_that_tls_prints_lead_an_unmodified_client_here(tmp_path: Path) -> None:
    pytest.importorskip("fal_client")
    script = (
        "import fal_client\n"
        "try:\n"
        "    fal_client.subscribe('fal-ai/wan-flf2v', {'prompt': 'x'})\n"
        "except fal_client.FalClientHTTPError as error:\n"
        "    print(error.status_code, [entry['loc'][1] for entry in error.message])\n"
    )
    with serving(tmp_path, "--tls", "--api-key", "open sesame") as (_, lines):
        exported = next(line for line in lines if "export " in line).strip().removeprefix("export ")
        environment = dict(pair.split("=", 1) for pair in shlex.split(exported))
        assert environment["FAL_KEY"] == "open sesame"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert done.stdout.strip() == "422 ['start_image_url', 'end_image_url']", done.stderr
        key = tmp_path / "server" / "tls" / "server.key"
        assert key.stat().st_mode & 0o077 == 0


def test_a_card_that_answers_no_more_ends_the_server_with_an_error_and_its_queue_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        yield Step("denoise", 1, 1, "a step", 0.1)
        assert gate.wait(5.0)
        raise DeviceFailed("cuda:0 answers this process no more.")

    def submit(_: ServerOptions, server: Server) -> None:
        for _ in range(3):
            server.service.submit({"prompt": "x", "start_image_url": "data:,", "end_image_url": "data:,"})
        gate.set()

    gate = threading.Event()

    monkeypatch.setattr("wan_local.server.process.pipeline_engine", lambda _: engine)
    monkeypatch.setattr("wan_local.server.process.fetching", lambda engine, *_: engine)
    monkeypatch.setattr("wan_local.cli.serve._say_where", submit)
    assert cli.main(["serve", "--model", "tiny", "--port", "0", "--output-dir", str(tmp_path)]) == FAILED
    assert "no more. The server ends. What waited or ran is taken up again" in capsys.readouterr().err
    assert len([*tmp_path.glob("server/requests/*.request.json")]) == 3
