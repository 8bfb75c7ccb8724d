"""Fetching a file over http(s): bounded in bytes, time and redirects, and on request only from public addresses.

Whoever makes requests for somebody else must not reach what only this machine can reach. With `allow_private=False`
every hop's name is resolved here, all its addresses must be public, and the connection goes to the very address that
was checked, so that a name cannot change its mind between check and use. The transfer runs in a thread of its own: no
server, however slow, holds its caller beyond the deadline or keeps a cancelled job.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from wan_local.request import Check, unchecked

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 30.0
_DOWNLOAD_SECONDS = 120.0
_LOOK_SECONDS = 0.2  # how often a caller that waits looks whether it should
_MAX_REDIRECTS = 5
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = {"accept": "image/*,*/*;q=0.5", "accept-encoding": "identity"}
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in IPv6 clothes


class DownloadError(Exception):
    """The file cannot be had; the message says why."""


class TooManyBytes(Exception):
    """The file is larger than it may be."""


def download(url: str, *, max_bytes: int, allow_private: bool = True, check: Check = unchecked) -> bytes:
    """Return what lies at `url`, following redirects. Raises DownloadError, and TooManyBytes beyond `max_bytes`.

    `check` is called a few times a second, and what it raises ends the download.
    """
    transfer = _Transfer(url, max_bytes, allow_private, time.monotonic() + _DOWNLOAD_SECONDS)
    threading.Thread(target=transfer.run, name="wan-local-download", daemon=True).start()
    try:
        while not transfer.done.wait(_LOOK_SECONDS):
            check()
            transfer.check_time()
    finally:
        transfer.leave()
    if transfer.content is None:
        raise transfer.error or DownloadError("the transfer broke off")
    return transfer.content


@dataclass(slots=True)
class _Transfer:
    """One download, run in a thread that may outlive its caller's patience; `done` is set when it has ended."""

    url: str
    max_bytes: int
    allow_private: bool
    deadline: float
    left: bool = False
    content: bytes | None = None
    error: DownloadError | TooManyBytes | None = None
    done: threading.Event = field(default_factory=threading.Event)
    connection: socket.socket | None = None

    def run(self) -> None:
        try:
            self.content = self._followed()
        except (DownloadError, TooManyBytes) as error:
            self.error = error
        finally:
            self.done.set()

    def leave(self) -> None:
        """Let a thread that still waits end. (To close its socket would give the number to others while it reads.)"""
        self.left = True
        if self.connection is not None:
            with contextlib.suppress(OSError):  # it is closed
                self.connection.shutdown(socket.SHUT_RDWR)

    def check_time(self) -> None:
        if self.left or time.monotonic() > self.deadline:
            raise DownloadError(f"not done after {_DOWNLOAD_SECONDS:.0f} s")

    def _followed(self) -> bytes:
        try:
            target = httpx.URL(self.url)
            # a proxy cannot reach this machine's loopback, and it would resolve names by itself
            trust_env = self.allow_private and target.host not in LOOPBACK
            timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
            with httpx.Client(timeout=timeout, trust_env=trust_env) as client:
                for _ in range(_MAX_REDIRECTS + 1):
                    if target.scheme not in ("http", "https"):
                        raise httpx.UnsupportedProtocol(f"{target.scheme}:// is not supported; http and https are")
                    address = None if self.allow_private else check_public(str(target))
                    request = bound_request(client, "GET", target, address, headers=_HEADERS)
                    request.extensions["trace"] = self._watch
                    with contextlib.closing(client.send(request, stream=True)) as response:
                        if not response.has_redirect_location:
                            return self._read(response)
                        target = target.join(response.headers["location"])
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise DownloadError(f"{type(error).__name__}: {error}") from error
        raise DownloadError(f"more than {_MAX_REDIRECTS} redirects")

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """Note the connection as it is made; called by the client at each of its steps."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self.connection = info["return_value"].get_extra_info("socket")
            self.check_time()

    def _read(self, response: httpx.Response) -> bytes:
        if not response.is_success:
            raise DownloadError(f"HTTP {response.status_code} {response.reason_phrase}")
        content = bytearray()
        for chunk in response.iter_bytes():  # as they come: a slow one must not hide behind its first 64 KiB
            content += chunk
            if len(content) > self.max_bytes:
                raise TooManyBytes
            self.check_time()
        return bytes(content)


def check_public(url: str) -> str:
    """Return the public address that the url's host has now. Raises httpx.UnsupportedProtocol for any other."""
    target = httpx.URL(url)
    if target.scheme not in ("http", "https"):
        raise httpx.UnsupportedProtocol(f"{target.scheme}:// is not supported; http and https are")
    try:
        found = socket.getaddrinfo(target.host, target.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.UnsupportedProtocol(f"{target.host} is not known ({error})") from error
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not all(_is_public(address) for address in addresses):
        raise httpx.UnsupportedProtocol(f"{target.host} is not a public address")
    return str(addresses[0])


def bound_request(
    client: httpx.Client,
    method: str,
    target: httpx.URL,
    address: str | None,
    *,
    headers: dict[str, str],
    content: str | None = None,
) -> httpx.Request:
    """Return a request for `target` that goes to `address`, whatever its name may mean by then; None: as it is."""
    if address is None:
        return client.build_request(method, target, headers=headers, content=content)
    return client.build_request(
        method,
        target.copy_with(host=address),
        headers={**headers, "host": target.netloc.decode("ascii")},
        content=content,
        extensions={"sni_hostname": target.host},  # the certificate must be that of the name, not of the number
    )


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address.sixtofour or address.teredo or address in _TRANSLATED:
            return False
    return address.is_global and not address.is_multicast
