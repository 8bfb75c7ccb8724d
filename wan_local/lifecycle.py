"""How long and for whom an upload lives, in fal_client's words. Checked as there; here uploads are kept as files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ObjectExpiration = Literal["never", "immediate", "1h", "1d", "7d", "30d", "1y"] | int
StorageACLDecision = Literal["hide", "forbid", "allow"]

_NAMED_EXPIRATIONS = ("never", "immediate", "1h", "1d", "7d", "30d", "1y")
_REPOSITORIES = ("fal_v3", "cdn", "fal")


@dataclass(frozen=True)
class StorageACLRule:
    """What one user may do with an upload."""

    user: str
    decision: StorageACLDecision


@dataclass(frozen=True)
class StorageACL:
    """Who may do what with an upload."""

    default: StorageACLDecision | None = None
    rules: list[StorageACLRule] | None = None


@dataclass(frozen=True)
class StorageSettings:
    """Expiry and access of an upload. Raises ValueError for an expiry that fal_client would refuse."""

    expires_in: ObjectExpiration | None = None
    initial_acl: StorageACL | None = None

    def __post_init__(self) -> None:
        given = self.expires_in
        if isinstance(given, bool):
            raise ValueError("Boolean values are not valid lifecycle expires_in values.")
        if isinstance(given, int):
            if given <= 0:
                raise ValueError("Integer lifecycle expires_in value must be greater than 0 seconds.")
        elif given is not None and given not in _NAMED_EXPIRATIONS:
            names = ", ".join(_NAMED_EXPIRATIONS)
            raise ValueError(
                f"Unsupported lifecycle expires_in value. Use one of: {names}, or an integer seconds value."
            )


def check_repositories(repository: Any, fallback_repository: Any) -> None:
    """Raise ValueError for a repository that fal_client does not know; all of them are one folder here."""
    fallback = fallback_repository if isinstance(fallback_repository, list) else [fallback_repository]
    for name in (repository, *fallback):
        if name is not None and name not in _REPOSITORIES:
            raise ValueError(f"Unsupported upload repository '{name}'")
