"""The asynchronous twin of `client`: the same calls as coroutines, none of which blocks the event loop."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from wan_local.encoding import content_type_of, image_bytes
from wan_local.handle import POLL_SECONDS, AsyncRequestHandle, Status, ended
from wan_local.jobs import Priority
from wan_local.lifecycle import check_repositories
from wan_local.realtime_connection import (
    REALTIME_TOKEN_EXPIRATION_SECONDS,
    AsyncRealtimeConnection,
    refuse_realtime,
)
from wan_local.request import APPLICATION
from wan_local.service import FalClientTimeoutError, Service, check_application, default_service
from wan_local.submission import submit_job, within_client_timeout

if TYPE_CHECKING:
    from PIL import Image


@dataclass(unsafe_hash=True)
class AsyncClient:
    """fal_client's asynchronous client; `key` and `default_timeout` are accepted and not needed.

    A call that is cancelled (`task.cancel()`, `asyncio.timeout`) cancels its request. Accepted and without a meaning
    here: `hint`, `headers`, `method`, and an upload's `repository` and `lifecycle`.
    """

    key: str | None = field(default=None, repr=False)
    default_timeout: float = 120.0
    _service: Callable[[], Service] = field(default=default_service, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, service: Service) -> AsyncClient:
        """Return a client of another service than this process's own."""
        client = cls()
        client._service = lambda: service
        return client

    async def run(
        self, application: str, arguments: Any, *, method: str = "POST", path: str = "", timeout: float | None = None,
        start_timeout: float | None = None, hint: str | None = None, headers: dict[str, str] = {},  # noqa: B006
    ) -> dict[str, Any]:  # fmt: skip
        """Make a video and return the output. Cancelled, or after `timeout` seconds, the request is cancelled."""
        service = self._service()
        job = submit_job(service, application, arguments, path=path, start_timeout=start_timeout)
        try:
            async with asyncio.timeout(timeout):
                await ended(service, job)
        except TimeoutError as error:
            message = f"Request {job.id} took more than {timeout} seconds; it was cancelled"
            raise httpx.ReadTimeout(message) from error
        finally:
            service.queue.cancel(job)
        return service.output(job)

    async def submit(
        self, application: str, arguments: Any, *, path: str = "", hint: str | None = None,
        webhook_url: str | None = None, priority: Priority | None = None, headers: dict[str, str] = {},  # noqa: B006
        start_timeout: float | None = None,
    ) -> AsyncRequestHandle:  # fmt: skip
        """Queue a request and return its handle at once; a wrong request is reported by the handle's `get`."""
        job = submit_job(
            self._service(), application, arguments, path=path, priority=priority, start_timeout=start_timeout,
            webhook_url=webhook_url,
        )  # fmt: skip
        return await self.get_handle(APPLICATION, job.id)

    async def subscribe(
        self, application: str, arguments: Any, *, path: str = "", hint: str | None = None, with_logs: bool = False,
        interval: float = POLL_SECONDS, on_enqueue: Callable[[str], Awaitable[None] | None] | None = None,
        on_queue_update: Callable[[Status], Awaitable[None] | None] | None = None, priority: Priority | None = None,
        headers: dict[str, str] = {}, start_timeout: float | None = None,  # noqa: B006
        client_timeout: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Make a video and return the output, calling `on_queue_update` with the status every `interval` seconds."""
        start_timeout = within_client_timeout(start_timeout, client_timeout)
        now = asyncio.get_running_loop().time()
        limit = asyncio.timeout_at(None if client_timeout is None else now + client_timeout)
        service = self._service()
        job = submit_job(service, application, arguments, path=path, priority=priority, start_timeout=start_timeout)
        handle = await self.get_handle(APPLICATION, job.id)

        async def follow() -> dict[str, Any]:
            if on_enqueue is not None:
                await _called(on_enqueue(handle.request_id))
            if on_queue_update is not None:
                async for status in handle.iter_events(with_logs=with_logs, interval=interval):
                    await _called(on_queue_update(status))
            return await handle.get(interval=interval)

        try:
            async with limit:
                return await follow()
        except asyncio.CancelledError:
            service.queue.cancel(job)
            raise
        except TimeoutError as error:
            if client_timeout is None or not limit.expired():  # a callback's own
                raise
            if service.queue.cancel(job):
                raise FalClientTimeoutError(client_timeout, job.id) from error
        return service.output(job)  # it had ended while the last look at it was awaited

    async def get_handle(self, application: str, request_id: str) -> AsyncRequestHandle:
        return AsyncRequestHandle.from_request_id(self, application, request_id)

    async def status(self, application: str, request_id: str, *, with_logs: bool = False) -> Status:
        self._service().find(application, request_id)
        return await (await self.get_handle(application, request_id)).status(with_logs=with_logs)

    async def result(self, application: str, request_id: str) -> dict[str, Any]:
        self._service().find(application, request_id)
        return await (await self.get_handle(application, request_id)).get()

    async def cancel(self, application: str, request_id: str) -> None:
        self._service().find(application, request_id)
        await (await self.get_handle(application, request_id)).cancel()

    async def stream(
        self, application: str, arguments: Any, *, path: str = "/stream", timeout: float | None = None,
        headers: dict[str, str] = {},  # noqa: B006
    ) -> AsyncIterator[dict[str, Any]]:  # fmt: skip
        """Yield a dict for each step (with a preview as data URI, where there is one), and last the output.

        A local extension: the hosted endpoint has no stream. Closing the iterator cancels the request.
        """
        check_application(application, "" if path.strip("/") == "stream" else path or "/")
        service = self._service()
        job = service.submit(arguments)
        seen = 0
        try:
            while True:
                done = service.queue.wait(job, 0.0)
                fresh = service.queue.steps_so_far(job, seen)
                for step in fresh:
                    yield step.as_event()
                seen += len(fresh)
                if done:
                    break
                await asyncio.sleep(POLL_SECONDS)
            yield service.output(job)
        finally:
            service.queue.cancel(job)

    async def upload(
        self, data: str | bytes, content_type: str, file_name: str | None = None, *,
        repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None,
    ) -> str:  # fmt: skip
        """Copy the data below the output directory; return a url that `start_image_url` accepts."""
        check_repositories(repository, fallback_repository)
        content = data.encode() if isinstance(data, str) else data
        return await asyncio.to_thread(self._service().files.upload, content, content_type)

    async def upload_file(
        self, path: os.PathLike[str], *, repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None
    ) -> str:
        content = await asyncio.to_thread(Path(path).read_bytes)
        return await self.upload(
            content, content_type_of(path), repository=repository, fallback_repository=fallback_repository
        )

    async def upload_image(
        self, image: Image.Image, format: str = "jpeg", *,  # noqa: A002 - fal_client's name
        repository: Any = None, fallback_repository: Any = None, lifecycle: Any = None,
    ) -> str:  # fmt: skip
        content = await asyncio.to_thread(image_bytes, image, format)
        return await self.upload(
            content, f"image/{format}", repository=repository, fallback_repository=fallback_repository
        )

    def realtime(
        self, application: str, *, use_jwt: bool = True, path: str = "/realtime", max_buffering: int | None = None,
        token_expiration: int = REALTIME_TOKEN_EXPIRATION_SECONDS,
        encode_message: Callable[[Any], bytes] | None = None, decode_message: Callable[[bytes], Any] | None = None,
    ) -> AbstractAsyncContextManager[AsyncRealtimeConnection]:  # fmt: skip
        """Refuse: there is no realtime endpoint of this model. Raises RealtimeNotSupported."""
        refuse_realtime("realtime_async")

    def ws_connect(
        self, application: str, *, use_jwt: bool = True, path: str = "", max_buffering: int | None = None,
        token_expiration: int = REALTIME_TOKEN_EXPIRATION_SECONDS,
    ) -> AbstractAsyncContextManager[Any]:  # fmt: skip
        """Refuse: there is no websocket of this model. Raises RealtimeNotSupported."""
        refuse_realtime("ws_connect_async")


async def _called(outcome: Awaitable[None] | None) -> None:
    """Wait for what a callback returned, if it can be waited for."""
    if inspect.isawaitable(outcome):
        await outcome


async_client = AsyncClient()
run_async = async_client.run
submit_async = async_client.submit
subscribe_async = async_client.subscribe
status_async = async_client.status
result_async = async_client.result
cancel_async = async_client.cancel
stream_async = async_client.stream
realtime_async = async_client.realtime
ws_connect_async = async_client.ws_connect
upload_async = async_client.upload
upload_file_async = async_client.upload_file
upload_image_async = async_client.upload_image
