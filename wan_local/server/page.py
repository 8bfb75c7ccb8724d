"""The page at `/`: one static file, with a policy that lets it load nothing from anywhere else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def add_page(app: FastAPI) -> None:
    """Add the page to the application."""
    app.add_api_route("/", _page, methods=["GET"])
    app.add_api_route("/favicon.ico", lambda: Response(status_code=204), methods=["GET"])


async def _page() -> Response:
    html, policy = _read()
    return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})


@functools.cache
def _read() -> tuple[str, str]:
    """Return the page and its content security policy, which names its one script and its one style by hash."""
    html = (resources.files("wan_local.server") / "playground.html").read_text(encoding="utf-8")
    hashes = {kind: _hash(text) for kind, text in _INLINE.findall(html)}
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return html, policy


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
