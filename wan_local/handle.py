"""Handles and statuses: how a caller follows a request that was submitted. Names and behaviour are fal_client's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from wan_local.errors import InvalidRequest
from wan_local.failure import Failure, describe, owner_and_alias
from wan_local.jobs import Job
from wan_local.request import APPLICATION
from wan_local.service import Service, raise_failure

POLL_SECONDS = 0.1


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


class HasService(Protocol):
    """A client: what knows the service that its requests go to."""

    @property
    def _service(self) -> Callable[[], Service]: ...


def status_of(service: Service, job: Job, *, with_logs: bool) -> Status:
    """Return Queued, InProgress or Completed, the latter two with the logs if `with_logs`."""
    status = service.queue.status(job)
    logs = status.logs if with_logs else None
    if status.position is not None:
        return Queued(status.position)
    if status.state == "IN_PROGRESS":
        return InProgress(logs)
    if status.error is None or isinstance(status.error, InvalidRequest):
        return Completed(logs, status.metrics)
    return Completed(logs, status.metrics, *describe(status.error).summary)


def cancel(service: Service, job: Job) -> None:
    """Cancel the job. Raises the 400 of one that has ended."""
    if not service.queue.cancel(job):
        raise_failure(Failure(400, {"status": "ALREADY_COMPLETED"}), job.id)


@dataclass(frozen=True)
class _Handle:
    request_id: str
    response_url: str = field(repr=False)
    status_url: str = field(repr=False)
    cancel_url: str = field(repr=False)


def _urls(application: str, request_id: str) -> tuple[str, str, str]:
    owner, alias = owner_and_alias(application)
    url = f"wan-local://{owner}/{alias}/requests/{request_id}"
    return url, f"{url}/status", f"{url}/cancel"


@dataclass(frozen=True)
class SyncRequestHandle(_Handle):
    """A request that was submitted."""

    client: HasService = field(repr=False)

    @classmethod
    def from_request_id(cls, client: HasService, application: str, request_id: str) -> SyncRequestHandle:
        return cls(request_id, *_urls(application, request_id), client)

    def status(self, *, with_logs: bool = False) -> Status:
        """Return Queued, InProgress or Completed, the latter two with the logs if `with_logs`."""
        return status_of(self.client._service(), self._job(), with_logs=with_logs)

    def iter_events(self, *, with_logs: bool = False, interval: float = POLL_SECONDS) -> Iterator[Status]:
        """Yield the status every `interval` seconds; the last one is Completed."""
        yield from self._events(with_logs=with_logs, interval=interval, deadline=float("inf"))

    def get(self, *, interval: float = POLL_SECONDS) -> dict[str, Any]:
        """Wait for the end; return the output or raise the error. (Nothing is polled, so `interval` has no effect.)"""
        service, job = self.client._service(), self._job()
        service.queue.wait(job)
        return service.output(job)

    def cancel(self) -> None:
        """Cancel: a waiting request never runs, a running one stops at its next step."""
        cancel(self.client._service(), self._job())

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
class AsyncRequestHandle(_Handle):
    """A request that was submitted; its methods are coroutines and never block the loop."""

    client: HasService = field(repr=False)

    @classmethod
    def from_request_id(cls, client: HasService, application: str, request_id: str) -> AsyncRequestHandle:
        return cls(request_id, *_urls(application, request_id), client)

    async def status(self, *, with_logs: bool = False) -> Status:
        """Return Queued, InProgress or Completed, the latter two with the logs if `with_logs`."""
        return status_of(self.client._service(), self._job(), with_logs=with_logs)

    async def iter_events(self, *, with_logs: bool = False, interval: float = POLL_SECONDS) -> AsyncIterator[Status]:
        """Yield the status every `interval` seconds; the last one is Completed."""
        while True:
            status = await self.status(with_logs=with_logs)
            yield status
            if isinstance(status, Completed):
                return
            await asyncio.sleep(interval)

    async def get(self, *, interval: float = POLL_SECONDS) -> dict[str, Any]:
        """Wait for the end; return the output or raise the error."""
        service, job = self.client._service(), self._job()
        await ended(service, job, interval=interval)
        return service.output(job)

    async def cancel(self) -> None:
        """Cancel: a waiting request never runs, a running one stops at its next step."""
        cancel(self.client._service(), self._job())

    def _job(self) -> Job:
        return self.client._service().find(APPLICATION, self.request_id)


async def ended(service: Service, job: Job, *, interval: float = POLL_SECONDS) -> None:
    """Return when the job has ended, looking every `interval` seconds: no thread waits."""
    while not service.queue.wait(job, 0.0):
        await asyncio.sleep(interval)
