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
        "SyncClient", "cancel", "configure", "realtime", "result", "run", "set_get_current_app", "status", "stream",
        "submit", "subscribe", "sync_client", "upload", "upload_file", "upload_image", "version_tuple", "ws_connect",
    ),
    "client_async": (
        "AsyncClient", "async_client", "cancel_async", "realtime_async", "result_async", "run_async", "status_async",
        "stream_async", "submit_async", "subscribe_async", "upload_async", "upload_file_async", "upload_image_async",
        "ws_connect_async",
    ),
    "encoding": ("encode", "encode_file", "encode_image"),
    "errors": (
        "Busy", "Cancelled", "CorruptModel", "DeviceFailed", "DoesNotFit", "InvalidRequest", "ModelNotFound",
        "NotAvailable", "NotResumable", "NumericalError", "OutOfMemory", "OutputError", "WanLocalError", "WrongModel",
        "WrongSetting",
    ),
    "handle": ("AsyncRequestHandle", "Completed", "InProgress", "Queued", "Status", "SyncRequestHandle"),
    "lifecycle": ("ObjectExpiration", "StorageACL", "StorageACLDecision", "StorageACLRule", "StorageSettings"),
    "pipeline": ("Pipeline", "generate", "resume"),
    "realtime_connection": ("AsyncRealtimeConnection", "RealtimeConnection", "RealtimeNotSupported"),
    "request": ("File", "Request", "Result", "Step"),
    "service": ("FalClientError", "FalClientHTTPError", "FalClientTimeoutError"),
    "settings": ("Settings", "load_settings"),
    "stand_in": ("install", "redirect"),
}  # fmt: skip
_SUBMODULES = ("auth", "client")  # `fal_client.client`, as code for the endpoint writes it
_HOME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 - a test holds it to the imports below

if TYPE_CHECKING:
    from wan_local.client import SyncClient as SyncClient
    from wan_local.client import cancel as cancel
    from wan_local.client import configure as configure
    from wan_local.client import realtime as realtime
    from wan_local.client import result as result
    from wan_local.client import run as run
    from wan_local.client import set_get_current_app as set_get_current_app
    from wan_local.client import status as status
    from wan_local.client import stream as stream
    from wan_local.client import submit as submit
    from wan_local.client import subscribe as subscribe
    from wan_local.client import sync_client as sync_client
    from wan_local.client import upload as upload
    from wan_local.client import upload_file as upload_file
    from wan_local.client import upload_image as upload_image
    from wan_local.client import version_tuple as version_tuple
    from wan_local.client import ws_connect as ws_connect
    from wan_local.client_async import AsyncClient as AsyncClient
    from wan_local.client_async import async_client as async_client
    from wan_local.client_async import cancel_async as cancel_async
    from wan_local.client_async import realtime_async as realtime_async
    from wan_local.client_async import result_async as result_async
    from wan_local.client_async import run_async as run_async
    from wan_local.client_async import status_async as status_async
    from wan_local.client_async import stream_async as stream_async
    from wan_local.client_async import submit_async as submit_async
    from wan_local.client_async import subscribe_async as subscribe_async
    from wan_local.client_async import upload_async as upload_async
    from wan_local.client_async import upload_file_async as upload_file_async
    from wan_local.client_async import upload_image_async as upload_image_async
    from wan_local.client_async import ws_connect_async as ws_connect_async
    from wan_local.encoding import encode as encode
    from wan_local.encoding import encode_file as encode_file
    from wan_local.encoding import encode_image as encode_image
    from wan_local.errors import Busy as Busy
    from wan_local.errors import Cancelled as Cancelled
    from wan_local.errors import CorruptModel as CorruptModel
    from wan_local.errors import DeviceFailed as DeviceFailed
    from wan_local.errors import DoesNotFit as DoesNotFit
    from wan_local.errors import InvalidRequest as InvalidRequest
    from wan_local.errors import ModelNotFound as ModelNotFound
    from wan_local.errors import NotAvailable as NotAvailable
    from wan_local.errors import NotResumable as NotResumable
    from wan_local.errors import NumericalError as NumericalError
    from wan_local.errors import OutOfMemory as OutOfMemory
    from wan_local.errors import OutputError as OutputError
    from wan_local.errors import WanLocalError as WanLocalError
    from wan_local.errors import WrongModel as WrongModel
    from wan_local.errors import WrongSetting as WrongSetting
    from wan_local.handle import AsyncRequestHandle as AsyncRequestHandle
    from wan_local.handle import Completed as Completed
    from wan_local.handle import InProgress as InProgress
    from wan_local.handle import Queued as Queued
    from wan_local.handle import Status as Status
    from wan_local.handle import SyncRequestHandle as SyncRequestHandle
    from wan_local.lifecycle import ObjectExpiration as ObjectExpiration
    from wan_local.lifecycle import StorageACL as StorageACL
    from wan_local.lifecycle import StorageACLDecision as StorageACLDecision
    from wan_local.lifecycle import StorageACLRule as StorageACLRule
    from wan_local.lifecycle import StorageSettings as StorageSettings
    from wan_local.pipeline import Pipeline as Pipeline
    from wan_local.pipeline import generate as generate
    from wan_local.pipeline import resume as resume
    from wan_local.realtime_connection import AsyncRealtimeConnection as AsyncRealtimeConnection
    from wan_local.realtime_connection import RealtimeConnection as RealtimeConnection
    from wan_local.realtime_connection import RealtimeNotSupported as RealtimeNotSupported
    from wan_local.request import File as File
    from wan_local.request import Request as Request
    from wan_local.request import Result as Result
    from wan_local.request import Step as Step
    from wan_local.service import FalClientError as FalClientError
    from wan_local.service import FalClientHTTPError as FalClientHTTPError
    from wan_local.service import FalClientTimeoutError as FalClientTimeoutError
    from wan_local.settings import Settings as Settings
    from wan_local.settings import load_settings as load_settings
    from wan_local.stand_in import install as install
    from wan_local.stand_in import redirect as redirect


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"wan_local.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'wan_local' has no attribute {name!r}")
    value = getattr(import_module(f"wan_local.{_HOME[name]}"), name)
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
