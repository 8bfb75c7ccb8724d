"""The routes: run, queue, stream, uploads, files, and the page, with the hosted service's paths and answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from wan_local import __version__
from wan_local.errors import DeviceFailed, InvalidRequest, OutputError
from wan_local.failure import Failure, describe, unknown_application
from wan_local.jobs import Job
from wan_local.request import APPLICATION, Request
from wan_local.server.files import ServedFiles, TooLarge
from wan_local.server.guard import App, Guard
from wan_local.server.images import unpack
from wan_local.server.messages import (
    Body,
    BodyTooLarge,
    Events,
    StreamFailed,
    Wanted,
    base_url,
    event,
    failure_response,
    parse,
    read_body,
    refusal,
)
from wan_local.server.openapi import document
from wan_local.server.options import ServerOptions
from wan_local.server.page import add_page
from wan_local.server.storage import add_storage
from wan_local.service import Service

_LOOK_SECONDS = 0.05  # how often a waiting answer looks at its job
_ACCEPTED_AT_ONCE = 4  # whose images, up to a quarter of a GiB each, are decoded at the same time
_ALIVE_SECONDS = 15.0  # how often a silent stream shows that it is alive
_QUEUE_TARGET = re.compile(r"(?P<application>.+?)/requests/(?P<id>[^/]+)(?P<tail>(/[a-z]+)*)/?")
_NOT_FOUND = Failure(404, {"status": "NOT_FOUND"})


def create_app(service: Service, files: ServedFiles, options: ServerOptions) -> App:
    """Return the server as an ASGI application; `files` are those of the service."""
    app = FastAPI(title="wan_local", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    endpoint = Endpoint(service, files, options)
    app.add_api_route("/run/{target:path}", endpoint.run, methods=["POST"])
    app.add_api_route(f"/{APPLICATION}", endpoint.run_at_root, methods=["POST"])  # nothing but the host swapped
    app.add_api_route("/queue/{target:path}", endpoint.submit, methods=["POST"])
    app.add_api_route("/queue/{target:path}", endpoint.look, methods=["GET"])
    app.add_api_route("/queue/{target:path}", endpoint.cancel, methods=["PUT"])
    app.add_api_route("/health", endpoint.health, methods=["GET"])
    app.add_api_route("/openapi.json", lambda: JSONResponse(document(options.base_url)), methods=["GET"])
    add_storage(app, files, options)
    add_page(app)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(BodyTooLarge, lambda *_: refusal(413, "The request is too large."))
    app.add_exception_handler(TooLarge, lambda _, error: refusal(413, str(error)))
    app.add_exception_handler(DeviceFailed, lambda _, error: failure_response(describe(error)))
    app.add_exception_handler(OutputError, lambda _, error: failure_response(describe(error)))
    return Guard(cast("App", app), options)


def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for no other"
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)


class Endpoint:
    """The endpoint itself: its runs and its queue."""

    def __init__(self, service: Service, files: ServedFiles, options: ServerOptions) -> None:
        self._service = service
        self._files = files
        self._options = options
        self._accepting = asyncio.Semaphore(_ACCEPTED_AT_ONCE)

    async def run(self, target: str, request: HttpRequest) -> Response:
        """Make a video and answer with it; a client that leaves cancels its request."""
        stream = target.rstrip("/") == f"{APPLICATION}/stream"
        if failure := unknown_application(APPLICATION if stream else target, ""):
            return failure_response(failure)
        job = await self._submitted(request, attached=True)
        if isinstance(job, Response):
            return job
        if stream and not isinstance(job.error, InvalidRequest):
            return Events(self._steps(job, request), job.id)
        try:
            while not self._service.queue.wait(job, 0.0):
                if await request.is_disconnected():
                    return refusal(499, "Client disconnected")
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._service.queue.cancel(job)
        return self._outcome(job, request)

    async def run_at_root(self, request: HttpRequest) -> Response:
        """Run, for those who swapped the host of https://fal.run and nothing else."""
        return await self.run(APPLICATION, request)

    async def submit(self, target: str, request: HttpRequest) -> Response:
        """Queue a request. A wrong one is queued too: its result says so, as on the hosted service."""
        if failure := unknown_application(target, ""):
            return failure_response(failure)
        limit = request.query_params.get("fal_max_queue_length", "")
        most = min(int(limit) if limit.isdecimal() and len(limit) < 10 else self._options.max_waiting, 10**9)
        if self._service.queue.waiting >= min(most, self._options.max_waiting):
            return refusal(429, f"{self._service.queue.waiting} requests wait already")
        job = await self._submitted(request)
        if isinstance(job, Response):
            return job
        envelope = self._envelope(job, request, logs=None)
        envelope |= {"status": "IN_QUEUE", "queue_position": envelope.get("queue_position", 0), "metrics": {}}
        return JSONResponse(envelope, headers={"x-fal-request-id": job.id})

    async def look(self, target: str, request: HttpRequest) -> Response:
        """Answer with a request's status, its status as a stream, or its result."""
        found = self._find(target)
        if isinstance(found, Response):
            return found
        job, tail = found
        with_logs = request.query_params.get("logs", "").lower() in ("1", "true")
        if tail == "/status":
            envelope = self._envelope(job, request, logs=0 if with_logs else None)
            code = 200 if envelope["status"] == "COMPLETED" else 202
            return JSONResponse(envelope, code, headers={"x-fal-request-id": job.id})
        if tail == "/status/stream":
            return Events(self._statuses(job, request, with_logs=with_logs), job.id)
        if tail not in ("", "/response"):
            return refusal(404, f"Path {tail} not found")
        if not self._service.queue.wait(job, 0.0):
            return failure_response(Failure(400, {"detail": "Request is still in progress"}), job.id)
        return self._outcome(job, request)

    async def cancel(self, target: str, request: HttpRequest) -> Response:
        """Cancel: a waiting request never runs, a running one stops at its next step."""
        found = self._find(target)
        if isinstance(found, Response):
            return found
        job, tail = found
        if tail != "/cancel":
            return refusal(405, "Method Not Allowed")
        if self._service.queue.cancel(job):
            return failure_response(Failure(202, {"status": "CANCELLATION_REQUESTED"}), job.id)
        return failure_response(Failure(400, {"status": "ALREADY_COMPLETED"}), job.id)

    async def health(self) -> Response:
        queue = self._service.queue
        return JSONResponse({"status": "ok", "version": __version__, "unfinished": queue.unfinished})

    async def _submitted(self, request: HttpRequest, *, attached: bool = False) -> Job | Response:
        """Return the job that the request's body asks for, or the refusal."""
        wanted = Wanted.of(request, attached=attached)
        if isinstance(wanted, Response):
            return wanted
        content = await read_body(request, self._options.max_body_bytes)
        content_type = request.headers.get("content-type", "")
        async with self._accepting:
            return await run_in_threadpool(self._accepted, content, content_type, wanted)

    def _accepted(self, content: bytes, content_type: str, wanted: Wanted) -> Job:
        body = parse(content, content_type)
        try:
            arguments = unpack(_validated(body), self._files)
        except InvalidRequest as error:
            return self._service.queue.reject(error, webhook_url=wanted.webhook_url)
        return self._service.submit(
            arguments,
            priority=wanted.priority,
            start_timeout=wanted.start_timeout,
            webhook_url=wanted.webhook_url,
            base_url=wanted.base_url,
            attached=wanted.attached,
        )

    def _find(self, target: str) -> tuple[Job, str] | Response:
        match = _QUEUE_TARGET.fullmatch(target)
        if match is None:
            failure = unknown_application(target, "")
            return refusal(405, "Method Not Allowed") if failure is None else failure_response(failure)
        owner_and_alias = "/".join(match["application"].split("/")[:2])
        if failure := unknown_application(owner_and_alias, ""):
            return failure_response(failure)
        job = self._service.queue.find(match["id"])
        return failure_response(_NOT_FOUND) if job is None else (job, match["tail"])

    def _outcome(self, job: Job, request: HttpRequest) -> Response:
        if job.error is not None:
            return failure_response(describe(job.error), job.id)
        return JSONResponse(self._output(job, request), headers={"x-fal-request-id": job.id})

    def _output(self, job: Job, request: HttpRequest) -> dict[str, Any]:
        """Return the endpoint's output, the video's address by the name that the client knows this server by."""
        assert job.result is not None, "a job ends with a result or with an error"
        return self._service.described(job.result, base_url(request))

    def _envelope(self, job: Job, request: HttpRequest, *, logs: int | None) -> dict[str, Any]:
        """Return the status as the hosted service words it, with the logs from the `logs`-th on; None for none."""
        status = self._service.queue.status(job)
        url = f"{base_url(request)}/queue/{APPLICATION}/requests/{job.id}"
        envelope: dict[str, Any] = {
            "status": status.state,
            "request_id": job.id,
            "response_url": url,
            "status_url": f"{url}/status",
            "cancel_url": f"{url}/cancel",
            "logs": None if logs is None else status.logs[logs:],
            "metrics": status.metrics,
        }
        if status.position is not None:
            envelope["queue_position"] = status.position
        if status.error is not None and not isinstance(status.error, InvalidRequest):
            envelope["error"], envelope["error_type"] = describe(status.error).summary
        return envelope

    async def _statuses(self, job: Job, request: HttpRequest, *, with_logs: bool) -> AsyncIterator[str]:
        """Yield the status whenever it changes, until it is COMPLETED; each event carries the new logs only.

        With `?progress=1`, a local extension, events also carry the newest step and its preview.
        """
        told, silent, last = 0, 0.0, None
        with_progress = request.query_params.get("progress") == "1"
        while True:
            envelope = self._envelope(job, request, logs=told if with_logs else None)
            step = job.steps[-1] if with_progress and job.steps else None
            state = (envelope["status"], envelope.get("queue_position"), step)
            if last is None or state != last or envelope["logs"]:
                last, silent = state, 0.0
                told += len(envelope["logs"] or [])
                if step is not None and envelope["status"] == "IN_PROGRESS":
                    envelope["progress"] = await run_in_threadpool(step.as_event)
                yield event(envelope)
            if envelope["status"] == "COMPLETED":
                return
            if silent >= _ALIVE_SECONDS:
                silent = 0.0
                yield ": alive\n\n"
            await asyncio.sleep(_LOOK_SECONDS)
            silent += _LOOK_SECONDS

    async def _steps(self, job: Job, request: HttpRequest) -> AsyncIterator[str]:
        """Yield each step and last the output; a client that leaves cancels its request.

        After an error the stream breaks off, since clients take the last event of one that ends for the output.
        """
        seen, silent = 0, 0.0
        try:
            while True:
                ended = self._service.queue.wait(job, 0.0)
                for step in self._service.queue.steps_so_far(job, seen):
                    seen, silent = seen + 1, 0.0
                    yield event(await run_in_threadpool(step.as_event))
                if ended:
                    break
                if silent >= _ALIVE_SECONDS:
                    silent = 0.0
                    yield ": alive\n\n"
                await asyncio.sleep(_LOOK_SECONDS)
                silent += _LOOK_SECONDS
            if job.error is None:
                yield event(self._output(job, request))
            else:
                failure = describe(job.error)
                yield event({**failure.body, "status_code": failure.status_code}, "error")
                raise StreamFailed
        finally:
            self._service.queue.cancel(job)


def _validated(body: Body) -> Request:
    if body.error is not None:
        raise body.error
    return Request.from_arguments(body.arguments)
