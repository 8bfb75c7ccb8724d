"""The routes of uploads and files, as fal_client and @fal-ai/client use them.

fal_client posts to /files/upload with a token from /storage/auth/token, large files in parts below their own address;
both clients can also ask /storage/upload/initiate for two addresses, one to put the bytes to and one to read them at.
"""

from __future__ import annotations

import json
import mimetypes
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from wan_local.server.files import ServedFiles, Upload
from wan_local.server.messages import base_url, chunks_of, read_body, refusal
from wan_local.server.options import ServerOptions

_TOKEN_HOURS = 24
_MAX_WORDS_BYTES = 2**20  # of a body that holds a few words
_SHOWN = re.compile(r"(image/(png|jpeg|gif|webp|bmp|tiff|avif)|video/mp4)")  # the rest might be a page with a script
_UPLOADED = {"content-security-policy": "sandbox; default-src 'none'"}


def add_storage(app: FastAPI, files: ServedFiles, options: ServerOptions) -> None:
    """Add the routes to the application."""
    routes = Storage(files, options)
    app.add_api_route("/storage/auth/token", routes.token, methods=["POST"])
    app.add_api_route("/storage/upload/initiate", routes.initiate, methods=["POST"])
    app.add_api_route("/storage/upload/initiate-multipart", routes.initiate_parts, methods=["POST"])
    app.add_api_route("/files/upload", routes.upload, methods=["POST"])
    app.add_api_route("/files/upload/multipart", routes.begin_parts, methods=["POST"])
    app.add_api_route("/files/{token}/{name}", routes.file, methods=["GET", "HEAD"])
    for base in ("/mput/{token}/{name}", "/files/{token}/{name}/multipart/{_upload_id}"):
        app.add_api_route(f"{base}/complete", routes.complete, methods=["POST"])
        app.add_api_route(f"{base}/{{number}}", routes.put_part, methods=["PUT"])
    app.add_api_route("/put/{token}/{name}", routes.put, methods=["PUT"])


class Storage:
    """Uploads in each of the ways in which clients make them, and the files themselves."""

    def __init__(self, files: ServedFiles, options: ServerOptions) -> None:
        self._files = files
        self._options = options

    async def token(self, request: HttpRequest) -> Response:
        """Give the token that fal_client's uploads carry: the key, where there is one."""
        expires = datetime.now(UTC) + timedelta(hours=_TOKEN_HOURS)
        key = self._options.api_key or "local"
        told = {"token": key, "token_type": "Bearer", "base_url": base_url(request), "expires_at": expires.isoformat()}
        return JSONResponse(told)

    async def upload(self, request: HttpRequest) -> Response:
        upload = self._files.begin(request.headers.get("content-type", ""))
        await self._files.write(upload, chunks_of(request))
        return JSONResponse({"access_url": base_url(request) + self._files.upload_target(upload)})

    async def begin_parts(self, request: HttpRequest) -> Response:
        upload = self._files.begin(request.headers.get("content-type", ""))
        url = base_url(request) + self._files.upload_target(upload)
        return JSONResponse({"access_url": url, "uploadId": upload.token})

    async def initiate(self, request: HttpRequest) -> Response:
        return await self._initiate(request, "put")

    async def initiate_parts(self, request: HttpRequest) -> Response:
        return await self._initiate(request, "mput")

    async def put(self, token: str, name: str, request: HttpRequest) -> Response:
        upload = self._found(token, name)
        if upload is None:
            return refusal(404, "There is no such upload")
        etag = await self._files.write(upload, chunks_of(request))
        return JSONResponse({}, headers={"etag": etag})

    async def put_part(self, token: str, name: str, number: str, request: HttpRequest) -> Response:
        upload = self._found(token, name)
        if upload is None or not number.isdecimal() or len(number) > 9:
            return refusal(404, "There is no such upload")
        etag = await self._files.write_part(upload, int(number), chunks_of(request))
        return JSONResponse({"partNumber": int(number), "etag": etag}, headers={"etag": etag})

    async def complete(self, token: str, name: str, request: HttpRequest) -> Response:
        upload = self._found(token, name)
        if upload is None:
            return refusal(404, "There is no such upload")
        try:
            body = json.loads(await read_body(request, _MAX_WORDS_BYTES))
            numbers = sorted(int(part["partNumber"]) for part in body["parts"])
            await run_in_threadpool(self._files.join, upload, numbers)
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError) as error:
            return refusal(400, f"The parts of an upload are listed as partNumber and etag: {error}")
        return JSONResponse({"access_url": base_url(request) + self._files.upload_target(upload)})

    async def file(self, token: str, name: str, request: HttpRequest) -> Response:
        """Give a file out, whole or a range of it."""
        path = self._files.path_of(token, name)
        if path is None:
            return refusal(404, "Not Found")
        kind = mimetypes.guess_type(path.name)[0] or ""
        shown = _SHOWN.fullmatch(kind) is not None
        attached = not shown or request.query_params.get("download") == "1"
        return FileResponse(
            path,
            media_type=kind if shown else "application/octet-stream",
            filename=path.name if attached else None,
            headers={**_UPLOADED, "cache-control": "private, max-age=3600"},
        )

    async def _initiate(self, request: HttpRequest, verb: str) -> Response:
        try:
            body: Any = json.loads(await read_body(request, _MAX_WORDS_BYTES) or b"{}")
        except (ValueError, RecursionError) as error:
            return refusal(400, f"The body is not JSON: {error}")
        told = body.get("content_type") if isinstance(body, dict) else None
        upload = self._files.begin(told if isinstance(told, str) else "")
        upload_url = f"{base_url(request)}/{verb}/{upload.token}/{upload.path.name}"
        return JSONResponse(
            {"upload_url": upload_url, "file_url": base_url(request) + self._files.upload_target(upload)}
        )

    def _found(self, token: str, name: str) -> Upload | None:
        stem, dot, suffix = name.partition(".")
        return self._files.find(token, dot + suffix) if stem == token else None
