"""What a server may be asked, by whom, and how much of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from wan_local.errors import NotAvailable

DEFAULT_PORT = 8787

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of one server.

    `host`, `port`: where it listens. `tls`: serve https with a certificate of its own.
    `allow_local_files`: take paths and file:// as images. `allow_private_urls`: fetch images from addresses that are
    not public. `cors_origins`: pages of other origins that may use it ("*": any). `api_key`: what clients must show.
    `max_body_bytes`: the longest request. `max_upload_bytes`, `max_uploads_bytes`: the largest upload, and all of them
    together. `max_waiting`: how many requests may wait.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    tls: bool = False
    allow_local_files: bool = False
    allow_private_urls: bool = False
    cors_origins: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = 64 * 2**20
    max_upload_bytes: int = 512 * 2**20
    max_uploads_bytes: int = 8 * 2**30
    max_waiting: int = 1000

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def base_url(self) -> str:
        """Where a client on this machine finds the server."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def check(self) -> None:
        """Raise NotAvailable for a port that there is not, and for a server that anybody in the network could use."""
        if not 0 <= self.port <= _MAX_PORT:
            raise NotAvailable(f"--port {self.port}: ports go from 1 to {_MAX_PORT}; 0 takes a free one.")
        if not self.loopback and not self.api_key:
            raise NotAvailable(
                f"--host {self.host} is open to the whole network, where anybody could make videos on this machine: "
                "give a key that clients must show (--api-key, or WAN_LOCAL_API_KEY), or stay on 127.0.0.1."
            )


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
