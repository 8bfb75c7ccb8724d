"""The face with fal_client's names: code for the hosted endpoint runs here after `import wan_local as fal_client`.

Names, signatures and behaviour are those of fal_client 1.0.3. Takes an application id and arguments; gives the
endpoint's output as a dict, from one local engine behind one queue. No key is needed, and no network.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import httpx

from wan_local.errors import InvalidRequest, NotAvailable
from wan_local.jobs import Failure, Job, Priority, describe, owner_and_alias
from wan_local.request import APPLICATION

# the errors are names of this module too, as they are of `fal_client.client`
from wan_local.service import FalClientError as FalClientError  # noqa: PLC0414
from wan_local.service import FalClientHTTPError as FalClientHTTPError  # noqa: PLC0414
from wan_local.service import FalClientTimeoutError as FalClientTimeoutError  # noqa: PLC0414
from wan_local.service import Service, check_application, default_service, raise_failure

if TYPE_CHECKING:
    from PIL import Image

_POLL_SECONDS = 0.1
_MIN_TIMEOUT_SECONDS = 1


@dataclass
class Status:
    """Where a request stands."""


@dataclass
class Queued(Status):
    """It waits; `position` others wait before it."""

    position: int


@dataclass
class InProgress(Status):
    """It runs; `logs` are all so far, or None if they were not asked for."""

    logs: list[dict[str, Any]] | None


@dataclass
class Completed(Status):
    """It has ended, with a result or with an error; `metrics` holds `inference_time` in seconds."""

    logs: list[dict[str, Any]] | None
    metrics: dict[str, Any]
    error: str | None = None
    error_type: str | None = None


@dataclass(frozen=True)
class SyncRequestHandle:
    """A request that was submitted."""

    request_id: str
    response_url: str = field(repr=False)
    status_url: str = field(repr=False)
    cancel_url: str = field(repr=False)
    client: SyncClient = field(repr=False)

    @classmethod
    def from_request_id(cls, client: SyncClient, application: str, request_id: str) -> SyncRequestHandle:
        owner, alias = owner_and_alias(application)
        url = f"wan-local://{owner}/{alias}/requests/{request_id}"
        return cls(request_id, url, f"{url}/status", f"{url}/cancel", client)

    def status(self, *, with_logs: bool = False) -> Status:
        """Return Queued, InProgress or Completed, the latter two with the logs if `with_logs`."""
        service = self.client._service()
        status = service.queue.status(self._job())
        logs = status.logs if with_logs else None
        if status.position is not None:
            return Queued(status.position)
        if status.state == "IN_PROGRESS":
            return InProgress(logs)
        if status.error is None or isinstance(status.error, InvalidRequest):
            return Completed(logs, status.metrics)
        failure = describe(status.error)
        detail = failure.body["detail"]
        text = detail if isinstance(detail, str) else detail[0]["msg"]
        return Completed(logs, status.metrics, text, failure.headers["x-fal-error-type"])

    def iter_events(self, *, with_logs: bool = False, interval: float = _POLL_SECONDS) -> Iterator[Status]:
        """Yield the status every `interval` seconds; the last one is Completed."""
        yield from self._events(with_logs=with_logs, interval=interval, deadline=float("inf"))

    def get(self, *, interval: float = _POLL_SECONDS) -> dict[str, Any]:
        """Wait for the end; return the output or raise the error. (Nothing is polled, so `interval` has no effect.)"""
        service = self.client._service()
        job = self._job()
        service.queue.wait(job)
        return service.output(job)

    def cancel(self) -> None:
        """Cancel: a waiting request never runs, a running one stops at its next step."""
        if not self.client._service().queue.cancel(self._job()):
            raise_failure(Failure(400, {"status": "ALREADY_COMPLETED"}), self.request_id)

    def _events(self, *, with_logs: bool, interval: float, deadline: float) -> Iterator[Status]:
        """Yield the status until it is Completed or the deadline has passed."""
        while True:
            status = self.status(with_logs=with_logs)
            yield status
            left = deadline - time.monotonic()
            if isinstance(status, Completed) or left <= 0:
                return
            time.sleep(min(interval, left))

    def _job(self) -> Job:
        return self.client._service().find(APPLICATION, self.request_id)


@dataclass(frozen=True)
class SyncClient:
    """fal_client's client. `key` and `default_timeout` are accepted and not needed; all clients share one engine.

    Accepted and without a meaning here: `hint`, `headers`, `method`, and an upload's `repository` and `lifecycle`.
    """

    key: str | None = field(default=None, repr=False)
    default_timeout: float = 120.0
    _service: Callable[[], Service] = field(default=default_service, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, service: Service) -> SyncClient:
        """Return a client of another service than this process's own."""
        client = cls()
        object.__setattr__(client, "_service", lambda: service)
        return client

    def run(
        self, application: str, arguments: Any, *, method: str = "POST", path: str = "", timeout: float | None = None,
        start_timeout: float | None = None, hint: str | None = None, headers: dict[str, str] = {},  # noqa: B006
    ) -> dict[str, Any]:  # fmt: skip
        """Make a video and return the output. Interrupted, or after `timeout` seconds, the request is cancelled."""
        handle = self.submit(application, arguments, path=path, start_timeout=start_timeout)
        service = self._service()
        job = service.find(APPLICATION, handle.request_id)
        try:
            if not service.queue.wait(job, timeout):
                raise httpx.ReadTimeout(f"Request {job.id} took more than {timeout} seconds; it was cancelled")
        finally:
            service.queue.cancel(job)
        return service.output(job)

    def submit(
        self, application: str, arguments: Any, *, path: str = "", hint: str | None = None,
        webhook_url: str | None = None, priority: Priority | None = None, headers: dict[str, str] = {},  # noqa: B006
        start_timeout: float | None = None,
    ) -> SyncRequestHandle:  # fmt: skip
        """Queue a request and return its handle at once; a wrong request is reported by the handle's `get`."""
        if priority is not None and priority not in get_args(Priority):
            raise ValueError(f"Priority must be one of {get_args(Priority)}, got '{priority}'")
        start_timeout = None if start_timeout is None else float(start_timeout)
        if start_timeout is not None and not start_timeout > _MIN_TIMEOUT_SECONDS:
            raise ValueError(f"Timeout must be greater than {_MIN_TIMEOUT_SECONDS} seconds")
        if webhook_url is not None:
            raise NotAvailable("webhook_url: no webhook is sent from here; use `subscribe` or the handle's `get`")
        check_application(application, path)
        job = self._service().submit(arguments, priority=priority or "normal", start_timeout=start_timeout)
        return self.get_handle(APPLICATION, job.id)

    def subscribe(
        self, application: str, arguments: Any, *, path: str = "", hint: str | None = None, with_logs: bool = False,
        interval: float = _POLL_SECONDS, on_enqueue: Callable[[str], None] | None = None,
        on_queue_update: Callable[[Status], None] | None = None, priority: Priority | None = None,
        headers: dict[str, str] = {}, start_timeout: float | None = None,  # noqa: B006
        client_timeout: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Make a video and return the output, calling `on_queue_update` with the status every `interval` seconds."""
        start_timeout = _within_client_timeout(start_timeout, client_timeout)
        deadline = float("inf") if client_timeout is None else time.monotonic() + client_timeout
        handle = self.submit(application, arguments, path=path, priority=priority, start_timeout=start_timeout)
        if on_enqueue is not None:
            on_enqueue(handle.request_id)
        queue, job = self._service().queue, handle._job()
        try:
            if on_queue_update is None:
                queue.wait(job, deadline - time.monotonic())
            else:
                for status in handle._events(with_logs=with_logs, interval=interval, deadline=deadline):
                    on_queue_update(status)
        except KeyboardInterrupt:
            queue.cancel(job)
            raise
        if client_timeout is not None and queue.cancel(job):
            raise FalClientTimeoutError(client_timeout, handle.request_id)
        return handle.get()

    def get_handle(self, application: str, request_id: str) -> SyncRequestHandle:
        return SyncRequestHandle.from_request_id(self, application, request_id)

    def status(self, application: str, request_id: str, *, with_logs: bool = False) -> Status:
        self._service().find(application, request_id)
        return self.get_handle(application, request_id).status(with_logs=with_logs)

    def result(self, application: str, request_id: str) -> dict[str, Any]:
        self._service().find(application, request_id)
        return self.get_handle(application, request_id).get()

    def cancel(self, application: str, request_id: str) -> None:
        self._service().find(application, request_id)
        self.get_handle(application, request_id).cancel()

    def stream(
        self, application: str, arguments: Any, *, path: str = "/stream", timeout: float | None = None,
        headers: dict[str, str] = {},  # noqa: B006
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Yield a dict for each step (with a preview as data URI, where there is one), and last the output.

        A local extension: the hosted endpoint has no stream. Closing the iterator cancels the request.
        """
        check_application(application, "" if path.strip("/") == "stream" else path or "/")
        service = self._service()
        job = service.submit(arguments)
        try:
            for step in service.queue.steps(job):
                yield step.as_event()
            yield service.output(job)
        finally:
            service.queue.cancel(job)

    def upload(
        self, data: str | bytes, content_type: str, file_name: str | None = None, *,
        repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None,
    ) -> str:  # fmt: skip
        """Copy the data below the output directory; return a url that `start_image_url` accepts."""
        return self._service().files.upload(data.encode() if isinstance(data, str) else data, content_type)

    def upload_file(
        self, path: os.PathLike[str], *, repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None
    ) -> str:
        return self.upload(Path(path).read_bytes(), _content_type(path))

    def upload_image(
        self, image: Image.Image, format: str = "jpeg", *,  # noqa: A002 - fal_client's name
        repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None,
    ) -> str:  # fmt: skip
        return self.upload(_image_bytes(image, format), f"image/{format}")


def encode(data: str | bytes, content_type: str) -> str:
    """Return the data as a data URI."""
    content = data.encode() if isinstance(data, str) else data
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


def encode_file(path: os.PathLike[str]) -> str:
    """Return the file as a data URI, its type guessed from its name."""
    return encode(Path(path).read_bytes(), _content_type(path))


def encode_image(image: Image.Image, format: str = "jpeg") -> str:  # noqa: A002 - fal_client's name for it
    """Return the image as a data URI."""
    return encode(_image_bytes(image, format), f"image/{format}")


def configure(**overrides: Any) -> None:
    """Set what this process's engine runs on: any field of `Settings` (model, device, output_dir, ...).

    It holds from the next request on; requests that have ended are forgotten. Raises NotAvailable while one has not.
    """
    default_service.configure(overrides)


def _within_client_timeout(start_timeout: float | None, client_timeout: float | None) -> float | None:
    """Return the start timeout: the client's, if none was given."""
    if client_timeout is None or start_timeout is None:
        return client_timeout if start_timeout is None else start_timeout
    if start_timeout > client_timeout:
        warnings.warn(
            f"start_timeout ({start_timeout}s) is longer than client_timeout ({client_timeout}s): "
            "the client gives up before the request could be refused.",
            UserWarning,
            stacklevel=3,
        )
    return start_timeout


def _content_type(path: os.PathLike[str]) -> str:
    return mimetypes.guess_type(os.fspath(path))[0] or "application/octet-stream"


def _image_bytes(image: Image.Image, format: str) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


sync_client = SyncClient()
run = sync_client.run
submit = sync_client.submit
subscribe = sync_client.subscribe
status = sync_client.status
result = sync_client.result
cancel = sync_client.cancel
stream = sync_client.stream
upload = sync_client.upload
upload_file = sync_client.upload_file
upload_image = sync_client.upload_image
