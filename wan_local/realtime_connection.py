"""Realtime connections: fal_client has them, the endpoint does not. They are here to refuse in clear words."""

from __future__ import annotations

from typing import Any, NoReturn

from wan_local.service import FalClientError

REALTIME_TOKEN_EXPIRATION_SECONDS = 120


class RealtimeError(RuntimeError):
    """What fal_client raises for an error message of a realtime endpoint. Never raised here."""

    def __init__(self, error: str, reason: str | None = None, payload: dict[str, Any] | None = None) -> None:
        self.error = error
        self.reason = reason or ""
        self.payload = payload or {}
        super().__init__(f"{error}: {self.reason}" if self.reason else error)


class RealtimeNotSupported(FalClientError, NotImplementedError):
    """There is no realtime connection to this model."""


class RealtimeConnection:
    """fal_client's name, for type checks. It cannot be made here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        refuse_realtime(type(self).__name__)


class AsyncRealtimeConnection:
    """fal_client's name, for type checks. It cannot be made here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        refuse_realtime(type(self).__name__)


def refuse_realtime(name: str) -> NoReturn:
    raise RealtimeNotSupported(
        f"{name}: this model has no realtime endpoint, here or hosted: a video takes minutes. "
        "Use subscribe(on_queue_update=...) or stream() to follow a request."
    )
