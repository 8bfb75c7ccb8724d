"""fal_client's credentials, by name: no key is needed here, so what asks for one gets a stand-in."""

from __future__ import annotations

from dataclasses import dataclass

FAL_RUN_HOST = "fal.run"
FAL_QUEUE_RUN_HOST = "queue.fal.run"


class MissingCredentialsError(Exception):
    """fal_client's error where no key is set. Never raised here."""


@dataclass(frozen=True)
class AuthCredentials:
    """The value of an authorization header."""

    scheme: str
    token: str

    @property
    def header_value(self) -> str:
        return f"{self.scheme} {self.token}"

    def as_headers(self) -> dict[str, str]:
        return {"Authorization": self.header_value}


def fetch_auth_credentials() -> AuthCredentials:
    """Return credentials that open nothing: the environment is not read, and no key is needed."""
    return AuthCredentials("Key", "local")


async def fetch_auth_credentials_async() -> AuthCredentials:
    """Return what `fetch_auth_credentials` returns."""
    return fetch_auth_credentials()


def fetch_credentials() -> str:
    """Return the key alone, as fal_client's older helper does."""
    return fetch_auth_credentials().token
