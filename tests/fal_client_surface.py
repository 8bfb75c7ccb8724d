"""What can be seen of fal_client from outside: its names, and what each takes. Annotations are a matter of taste."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

EXTRA_NAMES = [
    "sync_client", "async_client", "ws_connect", "ws_connect_async", "upload", "upload_async", "upload_file",
    "upload_file_async", "upload_image", "upload_image_async", "client", "auth",
]  # fmt: skip
CLIENT_NAMES = ["FalClientHTTPError", "FalClientTimeoutError", "RealtimeError", "SyncRequestHandle", "encode_image"]
METHODS = {
    "SyncClient": ["get_handle", "realtime", "ws_connect"],
    "AsyncClient": ["get_handle", "realtime", "ws_connect"],
    "SyncRequestHandle": ["status", "iter_events", "get", "cancel", "from_request_id"],
    "AsyncRequestHandle": ["status", "iter_events", "get", "cancel", "from_request_id"],
}
WITHOUT_SIGNATURE = ("RealtimeConnection", "AsyncRealtimeConnection")  # no caller makes one


def surface(module: ModuleType, names: list[str]) -> dict[str, str | None]:
    """Return the signature of each name, and of the methods of classes; None for what is no callable."""
    found: dict[str, str | None] = {}
    for name in names:
        value = getattr(module, name)
        callable_ = (inspect.isroutine(value) or inspect.isclass(value)) and name not in WITHOUT_SIGNATURE
        found[name] = signature(value) if callable_ else None
        for method in METHODS.get(name, []):
            found[f"{name}.{method}"] = signature(getattr(value, method))
    return found


def signature(value: Any) -> str | None:
    """Return names, kinds and defaults of the parameters; None for a class that takes what its parent takes."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return None
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare))[1:-1]
