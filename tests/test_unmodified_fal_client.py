"""The unmodified fal_client against the server: redirected in its process, and by environment alone over TLS."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.live_server import live_server
from tests.stub_engine import StubEngine
from wan_local.jobs import Ticket
from wan_local.request import Request, Result, Step

pytest.importorskip("fal_client")
DRIVER = Path(__file__).parent / "unmodified_fal_client.py"


class PatientEngine(StubEngine):
    """ "slow" takes as long as it is let; the rest is quick and always the same bytes."""

    def __call__(self, request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        while request.prompt == "slow":
            ticket.check()
            time.sleep(0.02)
            yield Step("denoise", 1, 2, "slow", 0.1)
        yield from super().__call__(request, ticket)


@pytest.mark.parametrize("mode", ["redirect", "environment"])
def test_it_works_unmodified(mode: str, tmp_path: Path) -> None:
    frame = tmp_path / "frame.png"
    Image.linear_gradient("L").resize((80, 64)).convert("RGB").save(frame)
    options: dict[str, Any] = {"tls": mode == "environment"}
    with live_server(tmp_path, PatientEngine(tmp_path), **options) as live:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FAL_")}
        if mode == "environment":
            address = live.url.removeprefix("https://")
            environment |= {
                "FAL_KEY": "any",
                "FAL_RUN_HOST": f"{address}/run",
                "FAL_QUEUE_RUN_HOST": f"{address}/queue",
                "SSL_CERT_FILE": str(live.folder / "tls" / "bundle.pem"),
            }
        done = subprocess.run(
            [sys.executable, str(DRIVER), mode, live.url, str(frame)],
            capture_output=True, text=True, timeout=150, check=False, env=environment,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "every claim holds\n"), done.stderr
        assert live.service.queue.unfinished == 0
