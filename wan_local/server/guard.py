"""Who may use the server: the gate before every route.

A server on loopback is reached by every program and every web page on this machine. Programs are trusted; pages are
not: one of another origin must be allowed by name, and one whose name was pointed here (DNS rebinding) shows a foreign
Host header. Beyond loopback, a key is asked for. The gate also turns what the JavaScript client sends to its proxy
into the route that was meant.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from wan_local.server.options import ServerOptions

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PROXY_PATH = "/api/fal/proxy"

_PREFIX_BY_HOST = {"fal.run": "/run", "queue.fal.run": "/queue", "rest.fal.ai": "", "rest.alpha.fal.ai": ""}
_OPEN_PATHS = ("/", "/health", "/openapi.json", "/favicon.ico")
_OPEN_PREFIXES = ("/files/", "/put/", "/mput/")  # their addresses cannot be guessed: `ServedFiles` signs them
_UPLOADS = "/files/upload"  # except where something new is begun
_CORS = {
    b"access-control-allow-methods": b"GET, HEAD, POST, PUT, OPTIONS",
    b"access-control-allow-headers": b"*, authorization",
    b"access-control-expose-headers": b"x-fal-request-id, x-fal-error-type, etag, content-range",
    b"access-control-max-age": b"600",
}
_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"cross-origin"),
]


class Guard:
    """The gate, as an ASGI application around another."""

    def __init__(self, app: App, options: ServerOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "no realtime endpoint"})
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        extra = [*_SECURITY, *self._cors(origin, headers)]
        if refusal := self._refusal(scope, headers):
            await _answer(send, *refusal, extra)
        elif scope["method"] == "OPTIONS":
            await _answer(send, 204, None, extra)
        elif scope["path"].rstrip("/") == PROXY_PATH and (refusal := _unwrap(scope, headers)):
            await _answer(send, *refusal, extra)
        else:
            await self._app(scope, receive, _adding(send, extra))

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        if not self._host_is_ours(host):
            here = self._options.base_url
            return 403, f"Host {host[:100]!r} is not this server: open it by its address, such as {here}"
        origin = headers.get(b"origin")
        if origin is not None and not self._same_origin(origin, host) and not self._allows(origin):
            return 403, f"Origin {origin[:100]!r} may not use this server: start it with --cors-origin {origin[:100]}"
        path = scope["path"]
        closed = path not in _OPEN_PATHS and (path.startswith(_UPLOADS) or not path.startswith(_OPEN_PREFIXES))
        if self._options.api_key and closed and scope["method"] != "OPTIONS" and not self._knows_key(headers):
            return 401, "invalid key credentials"
        return None

    def _host_is_ours(self, host: str) -> bool:
        """Tell whether the Host header can be ours: a loopback name here, any plain address beyond.

        A rebound name is a name; an address cannot be rebound.
        """
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port
        except ValueError:
            return False
        if port not in (self._options.port, None) or parts.path or parts.username is not None:
            return False
        if name in ("127.0.0.1", "localhost", "::1", self._options.host.lower()):
            return True
        return not self._options.loopback and _is_address(name)

    def _same_origin(self, origin: str, host: str) -> bool:
        return origin.lower() == f"{'https' if self._options.tls else 'http'}://{host}".lower()

    def _allows(self, origin: str) -> bool:
        return "*" in self._options.cors_origins or origin.lower() in self._options.cors_origins

    def _knows_key(self, headers: dict[bytes, str]) -> bool:
        shown = headers.get(b"authorization", "")
        scheme, _, key = shown.partition(" ")
        expected = self._options.api_key or ""
        return scheme.lower() in ("key", "bearer") and hmac.compare_digest(key.strip().encode(), expected.encode())

    def _cors(self, origin: str | None, headers: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
        if origin is None or not self._allows(origin):
            return []
        cors = dict(_CORS)
        if wanted := headers.get(b"access-control-request-headers"):
            cors[b"access-control-allow-headers"] = re.sub(r"[^a-zA-Z0-9_, *-]", "", wanted).encode()
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"), *cors.items()]


def _unwrap(scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
    """Change the scope into that of the request that the proxy's client means; return a refusal if there is none."""
    target = headers.get(b"x-fal-target-url")
    if target is None:
        return 400, "Missing the x-fal-target-url header"
    try:
        parts = urlsplit(target)
        prefix = _PREFIX_BY_HOST.get(parts.hostname or "")
    except ValueError:
        prefix = None
    if prefix is None or not parts.path.isascii():
        return 412, f"Invalid x-fal-target-url: {target[:200]!r} is not an address of the endpoint"
    path = prefix + (parts.path or "/")
    scope["path"], scope["raw_path"] = path, path.encode()
    scope["query_string"] = parts.query.encode("latin-1", "replace")
    return None


def _adding(send: Send, extra: list[tuple[bytes, bytes]]) -> Send:
    """Return a `send` that adds headers to the response, and a request id where the route gave none."""

    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = list(message.get("headers", []))
            names = {name.lower() for name, _ in given}
            if b"x-fal-request-id" not in names:
                given.append((b"x-fal-request-id", str(uuid.uuid4()).encode()))
            message = {**message, "headers": [*given, *(pair for pair in extra if pair[0] not in names)]}
        await send(message)

    return adding


async def _answer(send: Send, status: int, detail: str | None, extra: list[tuple[bytes, bytes]]) -> None:
    body = b"" if detail is None else json.dumps({"detail": detail}).encode()
    headers = [(b"content-length", str(len(body)).encode()), (b"x-fal-request-id", str(uuid.uuid4()).encode())]
    if body:
        headers.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *extra]})
    await send({"type": "http.response.body", "body": body})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
