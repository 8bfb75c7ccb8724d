"""What a video tells of how it was made: the settings as JSON, without a trace of the machine or its user.

Takes what the pipeline used; gives what is written into the mp4 and beside it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import PurePath, PureWindowsPath
from urllib.parse import unquote

from wan_local.request import as_json

_TITLE_CHARACTERS = 80
_FREE_TEXT = ("prompt", "negative_prompt", "expanded_prompt")  # may begin with a slash and be no path
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/@]*@")


def public(settings: Mapping[str, object]) -> dict[str, object]:
    """Return `settings` for JSON: paths cut to their last part, addresses without names and keys, no image data."""
    return {str(name): _public(str(name), value) for name, value in settings.items()}


def to_json(settings: Mapping[str, object], *, indent: int | None = None) -> str:
    """Return readable JSON: any alphabet as it is, and nothing that other readers refuse (NaN, lone surrogates)."""
    text = json.dumps(settings, ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def title(settings: Mapping[str, object]) -> str:
    """Return the beginning of the prompt, in one line."""
    prompt = str(settings.get("prompt", "")).replace("\0", " ")
    return textwrap.shorten(prompt, _TITLE_CHARACTERS, placeholder=" ...")


def _public(name: str, value: object) -> object:
    if isinstance(value, Mapping):
        return public(value)
    if isinstance(value, list | tuple):
        return [_public(name, entry) for entry in value]
    if isinstance(value, PurePath):
        return value.name
    if not isinstance(value, str) or name in _FREE_TEXT:
        return as_json(value)
    return _public_source(value, named_as_source=name.endswith("_url"))


def _public_source(text: str, *, named_as_source: bool) -> str:
    """Return what may be told of a text that may be an address, a path or image data."""
    beginning = text[:8].lower()
    if beginning.startswith("data:"):
        return text.partition(",")[0] + ",..."
    if beginning.startswith("file://"):
        return PureWindowsPath(unquote(text[len("file://") :])).name
    if beginning.startswith(("http://", "https://")):
        return _USER_IN_ADDRESS.sub("", re.split(r"[?#]", text, maxsplit=1)[0])
    if named_as_source or text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name  # knows both kinds of slash
    return text
