"""Failures as the hosted service words them: status, body and headers of the answer that an error would get.

Takes errors and application ids; gives `Failure`s. Codes that the hosted service's clients retry are never given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from wan_local.errors import Cancelled, InvalidRequest, WanLocalError
from wan_local.request import APPLICATION

_NAMESPACES = ("workflows", "comfy")  # what may stand before an application's owner


class StartTimeout(WanLocalError, TimeoutError):
    """A job was still waiting for its turn when its start timeout ran out; it never ran."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the hosted service words it: what its HTTP response would hold."""

    status_code: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> tuple[str, str | None]:
        """The error in one sentence, and its type: what a status says of it."""
        detail = self.body.get("detail", "")
        text = detail if isinstance(detail, str) else str(detail[0]["msg"])
        return text, self.headers.get("x-fal-error-type")


class RecordedFailure(WanLocalError):
    """A failure of which only its wording is left: it happened to an earlier process."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.summary[0])


def describe(error: BaseException) -> Failure:
    """Word an error as the hosted service does. Codes that its clients retry (429, 502, 503) are never given."""
    if isinstance(error, RecordedFailure):
        return error.failure
    if isinstance(error, InvalidRequest):
        flagged = any(entry["type"] == "content_policy_violation" for entry in error.detail)
        return Failure(422, {"detail": error.detail}, {"x-fal-retryable": "false"} if flagged else {})
    if isinstance(error, Cancelled):
        body = {"detail": "Request was cancelled", "error_type": "client_cancelled"}
        return Failure(499, body, {"x-fal-error-type": "client_cancelled"})
    if isinstance(error, StartTimeout):
        body = {"detail": str(error), "error_type": "startup_timeout"}
        return Failure(504, body, {"x-fal-error-type": "startup_timeout", "x-fal-request-timeout-type": "user"})
    type_ = "internal_server_error"
    msg = str(error) if isinstance(error, WanLocalError) else f"{type(error).__name__}: {error}"
    msg = " ".join([msg, *getattr(error, "__notes__", ())])  # how to go on with the run, where it is kept
    entry = {"loc": ["body"], "msg": msg, "type": type_, "url": f"https://docs.fal.ai/errors#{type_}"}
    return Failure(500, {"detail": [entry]}, {"x-fal-error-type": type_})


def unknown_application(application: str, path: str) -> Failure | None:
    """Return the 404 for anything but our one application at its root."""
    owner, _, rest = application.partition("/")
    alias, _, below = rest.partition("/")
    if f"{owner}/{alias}" != APPLICATION:
        return Failure(404, {"detail": f'Application "{alias or owner}" not found'})
    below = "/".join(part.strip("/") for part in (below, path) if part.strip("/"))
    return Failure(404, {"detail": f"Path /{below} not found"}) if below else None


def owner_and_alias(application: str) -> tuple[str, str]:
    """Split an application id, its sub-path dropped. Raises ValueError for one that is not in owner/alias form."""
    legacy = re.fullmatch(r"([0-9]+)-([a-zA-Z0-9-]+)", application)
    parts = list(legacy.groups()) if legacy else application.split("/")
    if parts[0] in _NAMESPACES:
        parts = parts[1:]
    if len(parts) < 2:
        raise ValueError(f"Invalid app id: {application}. Must be in the format <appOwner>/<appId>")
    return parts[0], parts[1]
