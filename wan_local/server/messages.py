"""What comes in and goes out: bodies read within bounds, answers in the hosted service's shapes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Send

from wan_local.errors import InvalidRequest
from wan_local.failure import Failure
from wan_local.jobs import Priority
from wan_local.request import as_json


class BodyTooLarge(Exception):
    """A body has more bytes than are accepted."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request's arguments, or what is wrong with the body that should hold them."""

    arguments: Any = None
    error: InvalidRequest | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a submission asks of the queue: headers and query of its request, and where that reached the server;
    `attached`: its client waits for it.
    """

    priority: Priority
    start_timeout: float | None
    webhook_url: str | None
    base_url: str
    attached: bool

    @classmethod
    def of(cls, request: HttpRequest, *, attached: bool) -> Wanted | Response:
        """Read it, or return the refusal."""
        priority = request.headers.get("x-fal-queue-priority", "normal").lower()
        if priority not in ("normal", "low"):
            return refusal(400, f"X-Fal-Queue-Priority is {priority[:50]!r}; it can be normal or low")
        timeout = request.headers.get("x-fal-request-timeout")
        seconds = None if timeout is None else _positive(timeout)
        if timeout is not None and seconds is None:
            return refusal(400, f"X-Fal-Request-Timeout is {timeout[:50]!r}; it is a number of seconds above 0")
        webhook = request.query_params.get("fal_webhook")
        if webhook is not None and not webhook.lower().startswith(("http://", "https://")):
            return refusal(400, f"fal_webhook is {webhook[:100]!r}; it is an http(s) address")
        return cls("low" if priority == "low" else "normal", seconds, webhook, base_url(request), attached)


class StreamFailed(Exception):
    """A stream of events must not end as if nothing were wrong."""


class Events(StreamingResponse):
    """Server-sent events about one request. After StreamFailed the connection is cut instead of ended, which every
    client notices.
    """

    def __init__(self, events: AsyncIterator[str], request_id: str) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no", "x-fal-request-id": request_id}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def stream_response(self, send: Send) -> None:
        with suppress(StreamFailed):
            await super().stream_response(send)


def failure_response(failure: Failure, request_id: str | None = None) -> Response:
    headers = dict(failure.headers) if request_id is None else {**failure.headers, "x-fal-request-id": request_id}
    return JSONResponse(failure.body, failure.status_code, headers=headers)


def refusal(status_code: int, detail: str) -> Response:
    return JSONResponse({"detail": detail}, status_code)


def base_url(request: HttpRequest) -> str:
    """Return the server's address as this client knows it; the gate has looked at the Host header."""
    return f"{request.url.scheme}://{request.headers['host']}"


async def read_body(request: HttpRequest, max_bytes: int) -> bytes:
    """Return the body. Raises BodyTooLarge at the first byte too many."""
    if int(request.headers.get("content-length") or 0) > max_bytes:
        raise BodyTooLarge
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise BodyTooLarge
    return bytes(content)


async def chunks_of(request: HttpRequest) -> AsyncIterator[bytes]:
    """Yield the body as it comes; a client that leaves in the middle is an OSError, so that nothing half is kept."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise ConnectionError("the client left before its upload was complete") from error


def parse(content: bytes, content_type: str) -> Body:
    """Read a body as FastAPI would: what is wrong with it has the endpoint's error types."""
    if not content:
        return Body(error=_invalid("missing", ["body"], "Field required", None))
    kind = content_type.partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        return Body(arguments=content)
    try:
        return Body(arguments=json.loads(content))
    except json.JSONDecodeError as error:
        entry = _invalid("json_invalid", ["body", error.pos], "JSON decode error", {}, error=error.msg)
    except UnicodeDecodeError as error:
        entry = _invalid("json_invalid", ["body", error.start], "JSON decode error", {}, error=error.reason)
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of more digits than Python reads
        entry = _invalid("json_invalid", ["body", 0], "JSON decode error", {}, error=str(error))
    return Body(error=entry)


def event(data: dict[str, Any], name: str | None = None) -> str:
    """Return one server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def _invalid(type_: str, loc: list[str | int], msg: str, value: object, **ctx: str) -> InvalidRequest:
    entry: dict[str, Any] = {"type": type_, "loc": loc, "msg": msg, "input": as_json(value)}
    return InvalidRequest([{**entry, "ctx": ctx} if ctx else entry])


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None
