"""Submitting: the checks of a call that come before its request, the same for both clients."""

from __future__ import annotations

import warnings
from typing import Any, get_args

from wan_local.jobs import Job, Priority
from wan_local.service import Service, check_application

MIN_TIMEOUT_SECONDS = 1


def submit_job(
    service: Service,
    application: str,
    arguments: Any,
    *,
    path: str = "",
    priority: Priority | None = None,
    start_timeout: float | None = None,
    webhook_url: str | None = None,
) -> Job:
    """Queue a request. Raises ValueError for a wrong priority or timeout, a 404 for another application."""
    if priority is not None and priority not in get_args(Priority):
        raise ValueError(f"Priority must be one of {get_args(Priority)}, got '{priority}'")
    seconds = None if start_timeout is None else checked_timeout(start_timeout)
    check_application(application, path)
    return service.submit(arguments, priority=priority or "normal", start_timeout=seconds, webhook_url=webhook_url)


def checked_timeout(timeout: Any) -> float:
    """Return the timeout in seconds. Raises ValueError, in fal_client's words, for none and for one too short."""
    try:
        seconds = float(timeout)
    except ValueError:
        raise ValueError(f"Timeout must be a number, got {timeout}") from None
    if not seconds > MIN_TIMEOUT_SECONDS:
        raise ValueError(f"Timeout must be greater than {MIN_TIMEOUT_SECONDS} seconds")
    return seconds


def within_client_timeout(start_timeout: float | None, client_timeout: float | None) -> float | None:
    """Return the start timeout: the client's, if none was given. A longer one is warned of, in the caller's line."""
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
