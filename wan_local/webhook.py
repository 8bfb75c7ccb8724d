"""Webhooks: the outcome of a request, posted to the address that its caller gave.

Takes an address and a body; posts it from one daemon thread, and again after a failure, a few times. Best effort: what
has not been delivered when the process ends is lost, and nothing is signed.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import httpx

from wan_local.download import LOOPBACK, bound_request
from wan_local.failure import Failure

RETRY_SECONDS = (1.0, 5.0, 25.0, 125.0)  # the waits before the second and each later attempt

_TIMEOUT_SECONDS = 15.0  # as the hosted service
_MAX_WAITING = 1000

Body = Callable[[], dict[str, Any]]

_log = logging.getLogger(__name__)


def succeeded(request_id: str, output: dict[str, Any]) -> dict[str, Any]:
    """Return the body for a request that has a result."""
    return {"request_id": request_id, "gateway_request_id": request_id, "status": "OK", "payload": output}


def failed(request_id: str, failure: Failure) -> dict[str, Any]:
    """Return the body for a request that failed: the payload is what its result would have answered."""
    return {
        "request_id": request_id,
        "gateway_request_id": request_id,
        "status": "ERROR",
        "error": f"Invalid status code: {failure.status_code}",
        "payload": failure.body,
    }


class Webhooks:
    """Delivers bodies in the order in which they are due. `check` may raise httpx.HTTPError to refuse a url, or return
    the address that its host has, to which the body then goes; None leaves the host to be looked up.
    """

    def __init__(
        self, *, retry_seconds: Sequence[float] = RETRY_SECONDS, check: Callable[[str], str | None] | None = None
    ) -> None:
        self._retry_seconds = retry_seconds
        self._check = check
        self._due: list[tuple[float, int, str, Body, int]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, url: str, body: Callable[[], dict[str, Any]]) -> None:
        """Post what `body` returns, soon and from another thread; return at once."""
        self._schedule(time.monotonic(), url, body, 0)

    def close(self) -> None:
        """Give up on what has not been delivered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _schedule(self, when: float, url: str, body: Body, attempt: int) -> None:
        with self._changed:
            if len(self._due) >= _MAX_WAITING:
                _log.error("webhook %s is dropped: %d others wait already", url, len(self._due))
                return
            heapq.heappush(self._due, (when, next(self._numbers), url, body, attempt))
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver, name="wan-local-webhooks", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
                if self._closed:
                    return
                _, _, url, body, attempt = heapq.heappop(self._due)
            problem = self._post(url, body)
            if problem is None:
                continue
            if attempt < len(self._retry_seconds):
                _log.warning("webhook %s: %s; it is tried again in %g s", url, problem, self._retry_seconds[attempt])
                self._schedule(time.monotonic() + self._retry_seconds[attempt], url, body, attempt + 1)
            else:
                _log.error("webhook %s: %s; given up after %d attempts", url, problem, attempt + 1)

    def _post(self, url: str, body: Body) -> str | None:
        """Return None, or what went wrong. Redirects are not followed: they would lead past the check."""
        try:
            target = httpx.URL(url)
            address = None if self._check is None else self._check(url)
            trust_env = address is None and target.host not in LOOPBACK
            content, headers = json.dumps(body()), {"content-type": "application/json"}
            with httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=trust_env) as client:
                request = bound_request(client, "POST", target, address, headers=headers, content=content)
                with closing(client.send(request, stream=True)) as response:  # its body is of no interest
                    done, status = response.is_success, response.status_code
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None if done else f"HTTP {status}"
