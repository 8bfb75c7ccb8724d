"""Fetching a file over http(s): bounded in bytes, time and redirects, and on request only from public addresses.

Whoever makes requests for somebody else must not reach what only this machine can reach. With `allow_private=False`
every hop's name is resolved here, all its addresses must be public, and the connection goes to the very address that
was checked, so that a name cannot change its mind between check and use.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time

import httpx

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 30.0
_DOWNLOAD_SECONDS = 120.0
_MAX_REDIRECTS = 5
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = {"accept": "image/*,*/*;q=0.5", "accept-encoding": "identity"}
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in IPv6 clothes


class DownloadError(Exception):
    """The file cannot be had; the message says why."""


class TooManyBytes(Exception):
    """The file is larger than it may be."""


def download(url: str, *, max_bytes: int, allow_private: bool = True) -> bytes:
    """Return what lies at `url`, following redirects. Raises DownloadError, and TooManyBytes beyond `max_bytes`."""
    deadline = time.monotonic() + _DOWNLOAD_SECONDS
    try:
        target = httpx.URL(url)
        # a proxy cannot reach this machine's loopback, and it would resolve names by itself
        trust_env = allow_private and target.host not in _LOOPBACK
        with httpx.Client(
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS), trust_env=trust_env
        ) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                request = _request(client, target, allow_private=allow_private)
                with contextlib.closing(client.send(request, stream=True)) as response:
                    if not response.has_redirect_location:
                        return _read(response, max_bytes, deadline)
                    target = target.join(response.headers["location"])
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise DownloadError(f"{type(error).__name__}: {error}") from error
    raise DownloadError(f"more than {_MAX_REDIRECTS} redirects")


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


def _request(client: httpx.Client, target: httpx.URL, *, allow_private: bool) -> httpx.Request:
    """Return the request for the target: as it is, or bound to the address that was checked."""
    if target.scheme not in ("http", "https"):
        raise httpx.UnsupportedProtocol(f"{target.scheme}:// is not supported; http and https are")
    if allow_private:
        return client.build_request("GET", target, headers=_HEADERS)
    address = check_public(str(target))
    headers = {**_HEADERS, "host": target.netloc.decode("ascii")}
    extensions = {"sni_hostname": target.host}  # the certificate must be that of the name, not of the number
    return client.build_request("GET", target.copy_with(host=address), headers=headers, extensions=extensions)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address.sixtofour or address.teredo or address in _TRANSLATED:
            return False
    return address.is_global and not address.is_multicast


def _read(response: httpx.Response, max_bytes: int, deadline: float) -> bytes:
    if not response.is_success:
        raise DownloadError(f"HTTP {response.status_code} {response.reason_phrase}")
    content = bytearray()
    for chunk in response.iter_bytes(2**16):
        content += chunk
        if len(content) > max_bytes:
            raise TooManyBytes
        if time.monotonic() > deadline:
            raise DownloadError(f"not done after {_DOWNLOAD_SECONDS:.0f} s")
    return bytes(content)
