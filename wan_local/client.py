"""The face with fal_client's names: code for the hosted endpoint runs here after `import wan_local as fal_client`.

Names, signatures and behaviour are those of fal_client 1.0.3. Takes an application id and arguments; gives the
endpoint's output as a dict, from one local engine behind one queue. No key is needed, and no network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from wan_local import __version__
from wan_local.client_async import AsyncClient as AsyncClient  # noqa: PLC0414
from wan_local.encoding import content_type_of, image_bytes

# these are names of this module too, as they are of `fal_client.client`
from wan_local.encoding import encode as encode  # noqa: PLC0414
from wan_local.encoding import encode_file as encode_file  # noqa: PLC0414
from wan_local.encoding import encode_image as encode_image  # noqa: PLC0414
from wan_local.handle import POLL_SECONDS, SyncRequestHandle
from wan_local.handle import AsyncRequestHandle as AsyncRequestHandle  # noqa: PLC0414
from wan_local.handle import Completed as Completed  # noqa: PLC0414
from wan_local.handle import InProgress as InProgress  # noqa: PLC0414
from wan_local.handle import Queued as Queued  # noqa: PLC0414
from wan_local.handle import Status as Status  # noqa: PLC0414
from wan_local.jobs import Priority
from wan_local.lifecycle import ObjectExpiration as ObjectExpiration  # noqa: PLC0414
from wan_local.lifecycle import StorageACL as StorageACL  # noqa: PLC0414
from wan_local.lifecycle import StorageACLDecision as StorageACLDecision  # noqa: PLC0414
from wan_local.lifecycle import StorageACLRule as StorageACLRule  # noqa: PLC0414
from wan_local.lifecycle import StorageSettings as StorageSettings  # noqa: PLC0414
from wan_local.lifecycle import check_repositories
from wan_local.realtime_connection import REALTIME_TOKEN_EXPIRATION_SECONDS, refuse_realtime
from wan_local.realtime_connection import AsyncRealtimeConnection as AsyncRealtimeConnection  # noqa: PLC0414
from wan_local.realtime_connection import RealtimeConnection as RealtimeConnection  # noqa: PLC0414
from wan_local.realtime_connection import RealtimeError as RealtimeError  # noqa: PLC0414
from wan_local.request import APPLICATION
from wan_local.service import FalClientError as FalClientError  # noqa: PLC0414
from wan_local.service import FalClientHTTPError as FalClientHTTPError  # noqa: PLC0414
from wan_local.service import FalClientTimeoutError as FalClientTimeoutError  # noqa: PLC0414
from wan_local.service import Service, check_application, default_service
from wan_local.submission import submit_job, within_client_timeout

if TYPE_CHECKING:
    from PIL import Image

version_tuple = tuple(int(part) for part in __version__.split("."))


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
        job = submit_job(
            self._service(), application, arguments, path=path, priority=priority, start_timeout=start_timeout,
            webhook_url=webhook_url,
        )  # fmt: skip
        return self.get_handle(APPLICATION, job.id)

    def subscribe(
        self, application: str, arguments: Any, *, path: str = "", hint: str | None = None, with_logs: bool = False,
        interval: float = POLL_SECONDS, on_enqueue: Callable[[str], None] | None = None,
        on_queue_update: Callable[[Status], None] | None = None, priority: Priority | None = None,
        headers: dict[str, str] = {}, start_timeout: float | None = None,  # noqa: B006
        client_timeout: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Make a video and return the output, calling `on_queue_update` with the status every `interval` seconds."""
        start_timeout = within_client_timeout(start_timeout, client_timeout)
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
        check_repositories(repository, fallback_repository)
        return self._service().files.upload(data.encode() if isinstance(data, str) else data, content_type)

    def upload_file(
        self, path: os.PathLike[str], *, repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None
    ) -> str:
        return self.upload(
            Path(path).read_bytes(),
            content_type_of(path),
            repository=repository,
            fallback_repository=fallback_repository,
        )

    def upload_image(
        self, image: Image.Image, format: str = "jpeg", *,  # noqa: A002 - fal_client's name
        repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None,
    ) -> str:  # fmt: skip
        return self.upload(
            image_bytes(image, format),
            f"image/{format}",
            repository=repository,
            fallback_repository=fallback_repository,
        )

    def realtime(
        self, application: str, *, use_jwt: bool = True, path: str = "/realtime", max_buffering: int | None = None,
        token_expiration: int = REALTIME_TOKEN_EXPIRATION_SECONDS,
        encode_message: Callable[[Any], bytes] | None = None, decode_message: Callable[[bytes], Any] | None = None,
    ) -> AbstractContextManager[RealtimeConnection]:  # fmt: skip
        """Refuse: there is no realtime endpoint of this model. Raises RealtimeNotSupported."""
        refuse_realtime("realtime")

    def ws_connect(
        self, application: str, *, use_jwt: bool = True, path: str = "", max_buffering: int | None = None,
        token_expiration: int = REALTIME_TOKEN_EXPIRATION_SECONDS,
    ) -> AbstractContextManager[Any]:  # fmt: skip
        """Refuse: there is no websocket of this model. Raises RealtimeNotSupported."""
        refuse_realtime("ws_connect")


def configure(**overrides: Any) -> None:
    """Set what this process's engine runs on: any field of `Settings` (model, device, output_dir, ...).

    It holds from the next request on; requests that have ended are forgotten. Raises NotAvailable while one has not.
    """
    default_service.configure(overrides)


def set_get_current_app(func: Callable[[], Any]) -> None:
    """Accept fal_client's hook for code that runs inside a hosted app; nothing here runs inside one."""


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
realtime = sync_client.realtime
ws_connect = sync_client.ws_connect
