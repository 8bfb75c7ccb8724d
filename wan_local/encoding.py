"""Data URIs, and what a file's or an image's bytes and type are: what `encode*` and `upload*` share."""

from __future__ import annotations

import base64
import io
import mimetypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def encode(data: str | bytes, content_type: str) -> str:
    """Return the data as a data URI."""
    content = data.encode() if isinstance(data, str) else data
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


def encode_file(path: os.PathLike[str]) -> str:
    """Return the file as a data URI, its type guessed from its name."""
    return encode(Path(path).read_bytes(), content_type_of(path))


def encode_image(image: Image.Image, format: str = "jpeg") -> str:  # noqa: A002 - fal_client's name for it
    """Return the image as a data URI."""
    return encode(image_bytes(image, format), f"image/{format}")


def content_type_of(path: os.PathLike[str]) -> str:
    return mimetypes.guess_type(os.fspath(path))[0] or "application/octet-stream"


def image_bytes(image: Image.Image, format: str) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()
