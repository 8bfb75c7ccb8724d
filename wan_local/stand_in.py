"""Standing in for fal_client: for code whose imports cannot be changed, and for code that keeps the real client."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from wan_local.auth import AuthCredentials, fetch_auth_credentials
from wan_local.errors import NotAvailable

_ALIASES = {
    "fal_client": "wan_local",
    "fal_client.client": "wan_local.client",
    "fal_client.auth": "wan_local.auth",
}


def install() -> None:
    """Let `import fal_client` mean this package, in every module of this process that imports it from now on.

    Raises NotAvailable if the real one has been imported already: its users would go on calling the hosted service.
    """
    ours = {alias: import_module(name) for alias, name in _ALIASES.items()}
    for alias, module in ours.items():
        if sys.modules.get(alias, module) is not module:
            raise NotAvailable(
                f"{alias} was imported before wan_local.install(): what imported it would still call the hosted "
                "service. Call install() first, at the top of the program, or use wan_local.redirect(url)."
            )
    sys.modules.update(ours)


def redirect(url: str, *, key: str | None = None) -> None:
    """Point the real fal_client of this process at a wan_local server, such as http://127.0.0.1:8787.

    Runs, queue and uploads go there, and the hosted service's key stays here: `key` is what the server was started with
    (--api-key), and without one a stand-in is sent, except by clients that were made with a key of their own. Call it
    before the first request. Raises NotAvailable where fal_client is not installed, or is this package.
    """
    base = url.rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no address of a server; it begins with http:// or https://")
    real = _real_client()
    credentials = fetch_auth_credentials() if key is None else AuthCredentials("Key", key)

    async def credentials_async() -> AuthCredentials:
        return credentials

    targets = {
        "RUN_URL_FORMAT": f"{base}/run/",
        "QUEUE_URL_FORMAT": f"{base}/queue/",
        "REALTIME_URL_FORMAT": f"ws{base.removeprefix('http')}/run/",
        "REST_URL": base,
        "CDN_URL": base,
        "fetch_auth_credentials": lambda: credentials,
        "fetch_auth_credentials_async": credentials_async,
    }
    missing = sorted(name for name in targets if not hasattr(real, name))
    if missing:
        raise NotAvailable(f"this version of fal_client has no {', '.join(missing)}; 1.0.3 is known to work")
    for name, value in targets.items():
        setattr(real, name, value)


def _real_client() -> ModuleType:
    try:
        real = import_module("fal_client.client")
    except ImportError as error:
        raise NotAvailable("fal_client is not installed: pip install fal-client") from error
    if real.__name__ != "fal_client.client":
        raise NotAvailable("fal_client is this package since wan_local.install(): there is no real one to redirect")
    return real
