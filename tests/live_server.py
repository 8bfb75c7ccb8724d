"""A server on loopback in a thread, for tests that speak http to it."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from wan_local.jobs import Engine
from wan_local.server.options import ServerOptions
from wan_local.server.process import _config, _listen, opened
from wan_local.server.tls import ensure_certificate
from wan_local.service import Service

APPLICATION = "fal-ai/wan-flf2v"


@dataclass(frozen=True)
class Live:
    """A running server: its address, its service, and a client for it."""

    url: str
    service: Service
    http: httpx.Client
    folder: Path

    @property
    def run(self) -> str:
        return f"/run/{APPLICATION}"

    @property
    def queue(self) -> str:
        return f"/queue/{APPLICATION}"

    def ended(self, request_id: str, seconds: float = 10.0) -> dict[str, Any]:
        """Wait for the request's end and return its last status."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.http.get(f"{self.queue}/requests/{request_id}/status?logs=1")
            if status.status_code == 200:
                return dict(status.json())
            assert status.status_code == 202, status.text
            time.sleep(0.02)
        raise AssertionError(f"{request_id} did not end in {seconds} s")


@contextmanager
def live_server(folder: Path, engine: Engine, **wanted: Any) -> Iterator[Live]:
    """Give a running server on the folder; it ends with the block."""
    options = ServerOptions(port=0, **wanted)
    listening = _listen(options)
    options = replace(options, port=listening.getsockname()[1])
    certificate = ensure_certificate(folder / "server" / "tls", options.host) if options.tls else None
    with listening, opened(folder, engine, options) as server:
        running = uvicorn.Server(_config(server.app, certificate))
        thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.005)
        verify: Any = True if certificate is None else ssl.create_default_context(cafile=certificate.bundle)
        with httpx.Client(base_url=options.base_url, trust_env=False, verify=verify, timeout=20) as http:
            yield Live(options.base_url, server.service, http, server.folder)
        running.should_exit = True
        thread.join(10)
