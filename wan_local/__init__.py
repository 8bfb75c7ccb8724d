"""Wan-2.1 first-last-frame-to-video on your own machine, behind the call of the hosted endpoint `fal-ai/wan-flf2v`.

`import wan_local as fal_client` for code that is written for the endpoint; `generate` and `Pipeline` for new code.
Importing does nothing: every public name is looked up in its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES_BY_MODULE = {
    "client": (
        "Completed", "InProgress", "Queued", "Status", "SyncClient", "SyncRequestHandle", "cancel", "configure",
        "encode", "encode_file", "encode_image", "result", "run", "status", "stream", "submit", "subscribe", "upload",
        "upload_file", "upload_image",
    ),
    "errors": (
        "Cancelled", "CorruptModel", "DoesNotFit", "InvalidRequest", "ModelNotFound", "NotAvailable", "NumericalError",
        "OutputError", "WanLocalError", "WrongModel",
    ),
    "pipeline": ("Pipeline", "generate"),
    "request": ("File", "Request", "Result", "Step"),
    "service": ("FalClientError", "FalClientHTTPError", "FalClientTimeoutError"),
    "settings": ("Settings", "load_settings"),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 - a test holds it to the imports below

if TYPE_CHECKING:
    from wan_local.client import Completed as Completed
    from wan_local.client import InProgress as InProgress
    from wan_local.client import Queued as Queued
    from wan_local.client import Status as Status
    from wan_local.client import SyncClient as SyncClient
    from wan_local.client import SyncRequestHandle as SyncRequestHandle
    from wan_local.client import cancel as cancel
    from wan_local.client import configure as configure
    from wan_local.client import encode as encode
    from wan_local.client import encode_file as encode_file
    from wan_local.client import encode_image as encode_image
    from wan_local.client import result as result
    from wan_local.client import run as run
    from wan_local.client import status as status
    from wan_local.client import stream as stream
    from wan_local.client import submit as submit
    from wan_local.client import subscribe as subscribe
    from wan_local.client import upload as upload
    from wan_local.client import upload_file as upload_file
    from wan_local.client import upload_image as upload_image
    from wan_local.errors import Cancelled as Cancelled
    from wan_local.errors import CorruptModel as CorruptModel
    from wan_local.errors import DoesNotFit as DoesNotFit
    from wan_local.errors import InvalidRequest as InvalidRequest
    from wan_local.errors import ModelNotFound as ModelNotFound
    from wan_local.errors import NotAvailable as NotAvailable
    from wan_local.errors import NumericalError as NumericalError
    from wan_local.errors import OutputError as OutputError
    from wan_local.errors import WanLocalError as WanLocalError
    from wan_local.errors import WrongModel as WrongModel
    from wan_local.pipeline import Pipeline as Pipeline
    from wan_local.pipeline import generate as generate
    from wan_local.request import File as File
    from wan_local.request import Request as Request
    from wan_local.request import Result as Result
    from wan_local.request import Step as Step
    from wan_local.service import FalClientError as FalClientError
    from wan_local.service import FalClientHTTPError as FalClientHTTPError
    from wan_local.service import FalClientTimeoutError as FalClientTimeoutError
    from wan_local.settings import Settings as Settings
    from wan_local.settings import load_settings as load_settings


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'wan_local' has no attribute {name!r}")
    value = getattr(import_module(f"wan_local.{_HOME[name]}"), name)
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
