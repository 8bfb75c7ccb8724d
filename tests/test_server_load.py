"""The server under load and under the knife: nothing is lost, the order holds, memory stays flat."""

from __future__ import annotations

import base64
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

APPLICATION = "fal-ai/wan-flf2v"
SCRIPT = Path(__file__).parent / "stub_server.py"
CLIENTS, EACH = 16, 13  # 208 requests
MAX_GROWTH_BYTES = 24 * 2**20


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, str(SCRIPT), str(folder), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        try:
            yield process, url
        finally:
            process.kill()


def data_uri() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def submit_all(url: str, name: str, image: str, each: int = EACH) -> dict[str, str]:
    """Submit from all clients at once; return the prompt of each id."""
    ids: dict[str, str] = {}
    images = {"start_image_url": image, "end_image_url": image}

    def client(number: int) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            for index in range(each):
                prompt = f"{name} {number} {index}"
                told = http.post(f"/queue/{APPLICATION}", json={**images, "prompt": prompt})
                assert told.status_code == 200, told.text
                ids[told.json()["request_id"]] = prompt

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == CLIENTS * each
    return ids


def wait_until_idle(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while httpx.get(f"{url}/health", trust_env=False).json()["unfinished"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_order(begun: list[str]) -> None:
    """Each client's requests began in the order in which it sent them (each waits for its answer)."""
    for number in range(CLIENTS):
        mine = [int(line.split()[2]) for line in begun if line.split()[1] == str(number)]
        assert mine == sorted(mine)


def resident_bytes(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_two_hundred_requests_of_sixteen_clients_are_all_served_in_order_and_memory_is_flat(tmp_path: Path) -> None:
    with server(tmp_path) as (process, url):
        ids = submit_all(url, "warm", data_uri(), each=4)
        wait_until_idle(url)
        before = resident_bytes(process)
        ids |= submit_all(url, "more", data_uri())
        wait_until_idle(url)
        assert resident_bytes(process) - before < MAX_GROWTH_BYTES
        begun = (tmp_path / "begun.txt").read_text().splitlines()
        assert sorted(begun) == sorted(ids.values())
        for name in ("warm", "more"):
            check_order([line for line in begun if line.startswith(name)])
        with httpx.Client(base_url=url, trust_env=False) as http:
            for request_id in ids:
                assert http.get(f"/queue/{APPLICATION}/requests/{request_id}").json()["seed"] == 1


@pytest.mark.slow
def test_a_killed_server_loses_nothing_and_runs_nothing_twice_but_what_ran(tmp_path: Path) -> None:
    with server(tmp_path) as (process, url):
        ids = submit_all(url, "kill", data_uri())
        begun = tmp_path / "begun.txt"
        while len(begun.read_text().splitlines()) < len(ids) // 3:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    done_before = len(begun.read_text().splitlines())
    assert done_before < len(ids), "the kill came too late to prove anything"
    with server(tmp_path) as (process, url):
        wait_until_idle(url)
        lines = begun.read_text().splitlines()
        assert set(lines) == set(ids.values())
        assert len(lines) <= len(ids) + 1  # the one that ran at the kill ran again
        check_order(lines[:done_before])
        check_order(lines[done_before:])
        with httpx.Client(base_url=url, trust_env=False) as http:
            for request_id in ids:
                result = http.get(f"/queue/{APPLICATION}/requests/{request_id}")
                assert result.status_code == 200, result.text
            video = result.json()["video"]["url"]
            assert http.get(video).content == b"a video"
        with pytest.raises(subprocess.CalledProcessError) as second:  # the folder has one server at a time
            subprocess.run(
                [sys.executable, str(SCRIPT), str(tmp_path), "0"],
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            )
        assert f"is held by process {process.pid}" in second.value.stderr
