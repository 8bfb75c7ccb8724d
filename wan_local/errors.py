"""The errors a caller can meet.

    WanLocalError
    |-- InvalidRequest (ValueError)        the request is wrong; `detail` is the endpoint's 422 body
    |-- WrongSetting (ValueError)          a setting is wrong; the message names it and what it can be
    |-- ModelNotFound (FileNotFoundError)  no weights where they were looked for
    |-- WrongModel (ValueError)            the files are sound, but of another model
    |-- CorruptModel (ValueError)          the files are damaged
    |-- NotAvailable (RuntimeError)        asked for by name, and not installed or not supported here
    |-- Busy (RuntimeError)                another process holds what is needed; the message names it
    |-- DoesNotFit (MemoryError)           the plan needs more memory than there is
    |-- OutOfMemory (MemoryError)          memory ran out during the run, on every rung that was tried
    |-- DeviceFailed (RuntimeError)        the card answers no more; the process has to be restarted
    |-- NotResumable (ValueError)          no such unfinished run, or not one that can be gone on with here
    |-- NumericalError (ArithmeticError)   NaN, infinity or one flat colour where a picture should be
    |-- OutputError (OSError)              the video could not be written
    `-- Cancelled                          the caller asked to stop

Every message names the value, the limit and the way out.
"""

from __future__ import annotations

import itertools
from typing import Any

_KEPT_CHARACTERS, _KEPT_ENTRIES = 2000, 100  # of a text, and of a list or an object, in an error that is kept


class WanLocalError(Exception):
    """Root of everything that wan_local raises on purpose."""


class InvalidRequest(WanLocalError, ValueError):
    """One or more fields of a request are wrong.

    `detail` lists every one of them as the endpoint does: dicts with `loc`, `msg`, `type`, `input` and, where it has
    one, `ctx` and `url`.
    """

    status_code = 422

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        assert detail, "an InvalidRequest without a detail says nothing"
        self.detail = detail
        super().__init__(
            "; ".join(f"{'.'.join(map(str, entry['loc'][1:])) or 'body'}: {entry['msg']}" for entry in detail)
        )

    @classmethod
    def field(
        cls, name: str, type_: str, msg: str, *, value: object, ctx: dict[str, Any] | None = None
    ) -> InvalidRequest:
        """Build the error for one field, raised by us and not by the schema (so with the `url` that those carry)."""
        entry: dict[str, Any] = {"loc": ["body", name], "msg": msg, "type": type_}
        entry["url"] = f"https://docs.fal.ai/errors#{type_}"
        if ctx:
            entry["ctx"] = ctx
        entry["input"] = value
        return cls([entry])

    def shortened(self) -> InvalidRequest:
        """Return the error as it is kept: without its traceback, and long texts in `input` and `ctx`, such as an image
        as a data URI, cut after their first 2,000 characters, lists and objects after their first 100 entries.
        """
        return InvalidRequest(
            [
                {name: _shortened(value) if name in ("input", "ctx") else value for name, value in entry.items()}
                for entry in self.detail
            ]
        )


class WrongSetting(WanLocalError, ValueError):
    """A setting, from a call, a flag, the environment or a file, has a name or a value that does not exist."""


class ModelNotFound(WanLocalError, FileNotFoundError):
    """No weights were found; the message says what to download, how large it is, and the command."""


class WrongModel(WanLocalError, ValueError):
    """The files hold another model than the one that is needed; the message names it."""


class CorruptModel(WanLocalError, ValueError):
    """A weight file is truncated, forged, incomplete or not a weight file at all."""


class NotAvailable(WanLocalError, RuntimeError):
    """Something was asked for by name that this installation or machine cannot do."""


class Busy(WanLocalError, RuntimeError):
    """Another process holds the device or the folder that is needed; the message says which one, and since when."""


class DoesNotFit(WanLocalError, MemoryError):
    """The request does not fit into the memory there is; the message names the nearest that does."""


class OutOfMemory(WanLocalError, MemoryError):
    """Memory ran out during the run and going on with less did not help; the message says what was tried."""


class DeviceFailed(WanLocalError, RuntimeError):
    """A fault left this process's hold of the card unusable: nothing runs on it until the process is restarted."""


class NotResumable(WanLocalError, ValueError):
    """An unfinished run is not there, is being made, is damaged, or was begun with another model; or a study was."""


class NumericalError(WanLocalError, ArithmeticError):
    """A tensor holds NaN or infinity, or all frames one colour; no video is written from it."""


class OutputError(WanLocalError, OSError):
    """The video or its sidecar could not be written; nothing lies under the final name."""


class Cancelled(WanLocalError):
    """The caller stopped the run. No part of a video was left; steps that were done are kept, to be resumed."""


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _KEPT_CHARACTERS:
        return f"{value[:_KEPT_CHARACTERS]}... ({len(value)} characters)"
    if isinstance(value, dict):
        kept = dict(itertools.islice(value.items(), _KEPT_ENTRIES))
        rest = {"...": f"{len(value)} entries"} if len(value) > _KEPT_ENTRIES else {}
        return {_shortened(key): _shortened(item) for key, item in kept.items()} | rest
    if isinstance(value, list):
        more = [f"... ({len(value)} entries)"] if len(value) > _KEPT_ENTRIES else []
        return [_shortened(item) for item in value[:_KEPT_ENTRIES]] + more
    return value
