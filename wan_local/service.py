"""What stands in for the hosted service: an engine behind its queue, its files, and errors as fal_client's."""

from __future__ import annotations

import functools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol
from urllib.parse import urlsplit

import httpx

from wan_local.errors import Busy, InvalidRequest, NotAvailable
from wan_local.failure import Failure, describe, owner_and_alias, unknown_application
from wan_local.file_server import FileServer
from wan_local.jobs import Engine, Job, Priority, Queue, Records, Ticket
from wan_local.request import APPLICATION, Request, Result, Step
from wan_local.settings import Settings, UrlScheme, load_settings
from wan_local.webhook import Webhooks, failed, succeeded

_LOOK_SECONDS = 1.0  # how often a card that another process holds is looked at


class FalClientError(Exception):
    """Root of what this face raises."""


@dataclass(eq=False)
class FalClientHTTPError(FalClientError):
    """The answer was an error. `message` is its `detail`: a list of dicts for a wrong request, else mostly a text."""

    message: Any
    status_code: int
    response_headers: dict[str, str]
    response: httpx.Response
    error_type: str | None = None

    def __str__(self) -> str:
        return f"{self.message}"


@dataclass(eq=False)
class FalClientTimeoutError(FalClientError, TimeoutError):
    """`client_timeout` ran out; the request was cancelled."""

    timeout: float
    request_id: str | None = None

    def __str__(self) -> str:
        request = "Request" if self.request_id is None else f"Request {self.request_id}"
        return f"{request} timed out after {self.timeout} seconds"


class Files(Protocol):
    """What serves the videos and keeps the uploads: a `FileServer`, or the server's own."""

    def url_of(self, path: Path) -> str: ...

    def upload(self, data: bytes, content_type: str) -> str: ...

    def close(self) -> None: ...


class Service:
    """What stands in for the hosted service: an engine behind its queue, and the files that it makes and is given."""

    def __init__(
        self,
        engine: Engine,
        *,
        output_dir: Path,
        url_scheme: UrlScheme = "http",
        files: Files | None = None,
        webhooks: Webhooks | None = None,
        records: Records | None = None,
    ) -> None:
        self.webhooks = webhooks or Webhooks()
        self.queue = Queue(engine, on_end=self._tell, records=records)
        self.files = files or FileServer(uploads=output_dir / "uploads", url_scheme=url_scheme)

    def submit(
        self,
        arguments: object,
        *,
        priority: Priority = "normal",
        start_timeout: float | None = None,
        webhook_url: str | None = None,
        base_url: str | None = None,
        attached: bool = False,
    ) -> Job:
        """Queue a request. A wrong one gives a job too: as on the hosted service, it is the result that says so.

        `webhook_url` is sent the outcome, as the hosted service does, but not signed. `base_url`, `attached`: see
        `Queue.submit`.
        """
        try:
            request = Request.from_arguments(arguments)
        except InvalidRequest as error:
            return self.queue.reject(error, webhook_url=webhook_url)
        return self.queue.submit(
            request,
            priority=priority,
            start_timeout=start_timeout,
            webhook_url=webhook_url,
            base_url=base_url,
            attached=attached,
        )

    def find(self, application: str, request_id: str) -> Job:
        check_application("/".join(owner_and_alias(application)), "")
        job = self.queue.find(request_id)
        if job is None:
            raise_failure(Failure(404, {"status": "NOT_FOUND"}))
        return job

    def output(self, job: Job) -> dict[str, Any]:
        """Return the endpoint's output of a job that has ended, or raise its error."""
        if job.error is not None:
            raise_failure(describe(job.error), job.id, cause=job.error)
        assert job.result is not None, "a job ends with a result or with an error"
        return self.described(job.result)

    def described(self, result: Result, base_url: str | None = None) -> dict[str, Any]:
        """Return a result as the endpoint's output, with a url at which its video is served: below `base_url` for a
        caller who knows the server by that.
        """
        output = result.model_dump()
        if result.video.path is not None:
            url = self.files.url_of(result.video.path)
            output["video"]["url"] = url if base_url is None else base_url + urlsplit(url).path
        return output

    def close(self) -> None:
        """Cancel all jobs, let the engine clean up, and stop serving files."""
        self.queue.close()
        self.webhooks.close()
        self.files.close()

    def _tell(self, job: Job) -> None:
        if job.webhook_url is not None:
            self.webhooks.send(job.webhook_url, functools.partial(self._outcome, job))

    def _outcome(self, job: Job) -> dict[str, Any]:
        if job.result is not None:
            return succeeded(job.id, self.described(job.result, job.base_url))
        assert job.error is not None, "a job ends with a result or with an error"
        return failed(job.id, describe(job.error))


class DefaultService:
    """This process's one service, made at its first use from what `configure` was given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._overrides: dict[str, Any] = {}
        self._service: Service | None = None

    def __call__(self) -> Service:
        with self._lock:
            if self._service is None:
                settings = load_settings(**self._overrides)
                engine = pipeline_engine(settings)
                self._service = Service(engine, output_dir=settings.output_dir, url_scheme=settings.url_scheme)
            return self._service

    def configure(self, overrides: dict[str, Any]) -> None:
        load_settings(**overrides)  # a wrong name or value is an error here and now
        with self._lock:
            if self._service is not None:
                if unfinished := self._service.queue.unfinished:
                    raise NotAvailable(f"{unfinished} jobs have not ended; wait for them or cancel them first")
                self._service.queue.close()  # its files stay: their urls were given out
            self._overrides, self._service = overrides, None


def pipeline_engine(settings: Settings) -> Engine:
    """Return the pipeline as an engine that is built, and imports torch, when its first job runs."""

    @functools.cache
    def pipeline() -> Any:
        from wan_local.pipeline import Pipeline

        return Pipeline(settings)

    def generate(request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        run = functools.partial(pipeline().generate, request, run_id=ticket.id, check=ticket.check)
        yield from once_free(run, ticket)

    return generate


def once_free(run: Callable[[], Iterator[Step | Result]], ticket: Ticket) -> Iterator[Step | Result]:
    """Yield from the run; while another process holds its card, say so once, and wait."""
    begun, told = time.perf_counter(), ""
    while True:
        steps = run()
        try:
            first = next(steps)
        except Busy as busy:
            if str(busy) != told:
                told = str(busy)
                yield Step("plan", 0, 1, told, time.perf_counter() - begun)
            ticket.check()
            time.sleep(_LOOK_SECONDS)
            continue
        yield first
        yield from steps
        return


def check_application(application: str, path: str) -> None:
    """Raise the 404 for anything but our one application at its root."""
    if failure := unknown_application(application, path):
        raise_failure(failure)


def raise_failure(failure: Failure, request_id: str | None = None, cause: BaseException | None = None) -> NoReturn:
    """Raise the failure as fal_client does when it has read it from a response."""
    request_id = request_id or str(uuid.uuid4())
    headers = {"content-type": "application/json", "x-fal-request-id": request_id, **failure.headers}
    request = httpx.Request("GET", f"https://wan-local/{APPLICATION}/requests/{request_id}")
    response = httpx.Response(failure.status_code, headers=headers, text=json.dumps(failure.body), request=request)
    raise FalClientHTTPError(
        failure.body.get("detail", response.text),
        failure.status_code,
        dict(response.headers),
        response,
        error_type=failure.body.get("error_type") or failure.headers.get("x-fal-error-type"),
    ) from cause


default_service = DefaultService()
