"""Images: fetched from wherever they are, decoded to upright sRGB, fitted to the video's size.

Takes a URL, a data URI, a path, bytes or a PIL image; gives an RGB `PIL.Image.Image`. Size and format are checked
before a pixel is decoded. Whatever is wrong with an image is an InvalidRequest that names the field. No torch.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from wan_local.errors import InvalidRequest
from wan_local.geometry import Size
from wan_local.request import Check, ImageSource, as_json, unchecked

MAX_BYTES = 50 * 2**20  # as the hosted service
MAX_PIXELS = 89_478_485  # a quarter of a GiB of 24-bit RGB: where Pillow, too, begins to suspect a bomb
MIN_SIDE = 64
MAX_ASPECT = 16  # `fit` scales all of the image before it crops
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

_FEWER_PIXELS = f"At most {MAX_PIXELS / 1e6:.1f} million pixels are accepted; make it smaller first."
_WHITE = (255, 255, 255, 255)
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# What Pillow's decoders raise on damaged files; it has no common root for them. RuntimeError is libavif's.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError, struct.error,
    zlib.error,
)  # fmt: skip
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_TRANSPOSE = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, start=2)}  # by EXIF
_UNSUPPORTED = {
    "an SVG drawing": rb"\s*(<\?xml.{,100}\?>\s*)?(<!.*>\s*)?<svg",
    "a PDF document": rb"%PDF-",
    "a HEIC image": rb"....ftyp(hei|hev|mif1|msf1)",
    "a Photoshop document": rb"8BPS",
    "a JPEG XL image": rb"\xff\x0a|....JXL ",
    "a JPEG 2000 image": rb"....jP  ",
}
_NO_IMAGE = {
    "an empty file": rb"\Z",
    "an HTML page": rb"\s*<(!doctype html|html|head)",
    "a git-lfs pointer": rb"version https://git-lfs",
    "a video": rb"....ftyp",
    "a text file": rb"[\x20-\x7e\s]+\Z",
}

_log = logging.getLogger(__name__)


def load_image(source: ImageSource, *, field: str, allow_local: bool = True) -> Image.Image:
    """Return the image at `source` as RGB: upright, sRGB, alpha composited on white, the first frame of an animation.

    `allow_local=False` refuses paths and file:// URLs, for callers that speak for somebody else.
    Raises InvalidRequest with loc ["body", `field`] and type file_download_error, file_too_large, image_load_error,
    unsupported_image_format, image_too_small or image_too_large.
    """
    refusal = _Refusal(field, source)
    if isinstance(source, Image.Image):
        image = source
    else:
        image = _open(_read(source, refusal, allow_local=allow_local), refusal)
    _check_size(Size(image.height, image.width), refusal)
    try:
        if getattr(image, "is_animated", False):
            _log.warning("%s has several frames; the first is used", field)
        image.load()
        return _to_srgb(_upright(image), field)
    except Image.DecompressionBombError:
        raise refusal.because("image_load_error", "The image holds a part that is larger than it says.") from None
    except _BROKEN as error:
        raise refusal.because("image_load_error", f"The image is damaged or of an unknown kind ({error}).") from error


def fetch(
    source: str | Path | bytes,
    *,
    field: str,
    allow_local: bool = True,
    allow_private: bool = True,
    check: Check = unchecked,
) -> bytes:
    """Return the bytes of the image file at `source`, undecoded; `allow_private=False` and `check` as in `download`.

    Raises InvalidRequest as `load_image` does.
    """
    return _read(source, _Refusal(field, source), allow_local=allow_local, allow_private=allow_private, check=check)


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Return `image` resized (Lanczos) to cover `size` and cropped around its centre to exactly `size`."""
    width, height = image.size
    if size.width * height >= size.height * width:  # in integers: a float scale can be one pixel off
        cover = Size(height=-(-height * size.width // width), width=size.width)
    else:
        cover = Size(height=size.height, width=-(-width * size.height // height))
    resized = image.resize((cover.width, cover.height), Image.Resampling.LANCZOS)
    left, top = (cover.width - size.width) // 2, (cover.height - size.height) // 2
    return resized.crop((left, top, left + size.width, top + size.height))


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Builds the InvalidRequest for one field and its value."""

    field: str
    source: ImageSource

    def because(self, type_: str, msg: str, **ctx: Any) -> InvalidRequest:
        return InvalidRequest.field(self.field, type_, msg, value=as_json(self.source), ctx=ctx)

    def unreachable(self, reason: str) -> InvalidRequest:
        msg = "Failed to download the file. Please check if the URL is accessible and try again."
        return self.because("file_download_error", f"{msg} ({reason})")

    def unreadable(self, reason: str) -> InvalidRequest:
        return self.because("file_download_error", f"Failed to read the file: {reason}.")

    def too_large(self) -> InvalidRequest:
        msg = f"The file is too large; at most {MAX_BYTES // 2**20} MiB ({MAX_BYTES} bytes) are accepted."
        return self.because("file_too_large", msg, max_size=MAX_BYTES)


def _read(
    source: str | Path | bytes,
    refusal: _Refusal,
    *,
    allow_local: bool,
    allow_private: bool = True,
    check: Check = unchecked,
) -> bytes:
    """Return the file's bytes, at most MAX_BYTES of them."""
    if isinstance(source, bytes):
        if len(source) > MAX_BYTES:
            raise refusal.too_large()
        return source
    if isinstance(source, str):
        scheme = source.partition(":")[0].lower() if ":" in source else ""
        if scheme in ("http", "https"):
            return _download(source, refusal, allow_private=allow_private, check=check)
        if scheme == "data":
            return _decode_data_uri(source, refusal)
        if scheme != "file" and "://" in source:
            raise refusal.unreachable(f"{scheme}:// is not supported; http, https, data and file are")
    if not allow_local:
        raise refusal.unreachable("only http(s) URLs and data URIs are accepted here, no local files")
    return _read_local(source, refusal)


def _download(url: str, refusal: _Refusal, *, allow_private: bool, check: Check) -> bytes:
    from wan_local.download import DownloadError, TooManyBytes, download  # here, not above: most images are local

    try:
        return download(url, max_bytes=MAX_BYTES, allow_private=allow_private, check=check)
    except DownloadError as error:
        raise refusal.unreachable(str(error)) from error
    except TooManyBytes:
        raise refusal.too_large() from None


def _decode_data_uri(uri: str, refusal: _Refusal) -> bytes:
    """Decode `data:[type][;parameters][;base64],payload`, base64 or percent-encoded."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise refusal.because("image_load_error", "The data URI is malformed: it has no comma before its data.")
    if len(payload) > 3 * MAX_BYTES:  # no encoding is longer
        raise refusal.too_large()
    if header.rpartition(";")[2].strip().lower() != "base64":
        content = unquote_to_bytes(payload)
    else:
        text = re.sub(r"\s+", "", unquote(payload)).rstrip("=").translate(str.maketrans("-_", "+/"))
        try:
            content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise refusal.because("image_load_error", f"The data URI's base64 is malformed ({error}).") from error
    if len(content) > MAX_BYTES:
        raise refusal.too_large()
    return content


def _read_local(source: str | Path, refusal: _Refusal) -> bytes:
    if isinstance(source, str) and source[:5].lower() == "file:":
        source = _path_of_file_url(source, refusal)
    if not str(source) or "\0" in str(source):
        raise refusal.unreadable("give a path, an http(s) address or a data URI; this is none")
    try:
        path = Path(source).expanduser()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there" if not path.exists() else "is no plain file"
            raise refusal.unreadable(f"{str(path.absolute())[:200]!r} {what}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory for ~
        raise refusal.unreadable(str(error)[:300]) from error
    if len(content) > MAX_BYTES:
        raise refusal.too_large()
    return content


def _path_of_file_url(url: str, refusal: _Refusal) -> str:
    """Return the path of `file:///home/a%20b.png` or, as Windows writes it, `file:///C:/a%20b.png`."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise refusal.unreadable(str(error)) from error
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or path.startswith("//"):
        raise refusal.unreadable("it names another machine; write file:///its/whole/path, or just the path")
    return path[1:] if re.match(r"/[A-Za-z]:", path) else path


def _open(content: bytes, refusal: _Refusal) -> Image.Image:
    """Open the image: its header is read, no pixel is decoded."""
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise refusal.because("image_too_large", f"{_FEWER_PIXELS} ({error})", **_largest(Size(1, 1))) from error
    except UnidentifiedImageError:
        pass
    except _BROKEN as error:
        raise refusal.because("image_load_error", f"The image's header is damaged ({error}).") from error
    if kind := _kind(content, _UNSUPPORTED):
        msg = f"This is {kind}; supported are {', '.join(FORMATS)}."
        raise refusal.because("unsupported_image_format", msg, supported_formats=list(FORMATS))
    kind = _kind(content, _NO_IMAGE) or "not an image that is known here"
    raise refusal.because("image_load_error", f"Failed to load the image: this is {kind}.")


def _kind(content: bytes, heads: Mapping[str, bytes]) -> str | None:
    """Return the name, among `heads`, of what the file begins like."""
    matches = (name for name, head in heads.items() if re.match(head, content[:512], re.IGNORECASE | re.DOTALL))
    return next(matches, None)


def _check_size(size: Size, refusal: _Refusal) -> None:
    """Refuse by the header alone what is too small, too large or too long and thin."""
    if size.height * size.width > MAX_PIXELS:
        msg = f"The image is {size}. {_FEWER_PIXELS}"
        raise refusal.because("image_too_large", msg, **_largest(size))
    shorter = max(MIN_SIDE, math.ceil(max(size.height, size.width) / MAX_ASPECT))
    if min(size.height, size.width) < shorter:
        landscape = size.width >= size.height
        least = Size(height=shorter if landscape else MIN_SIDE, width=MIN_SIDE if landscape else shorter)
        msg = (
            f"The image is {size}; both sides must have at least {MIN_SIDE} pixels, "
            f"and the longer at most {MAX_ASPECT} times those of the shorter."
        )
        raise refusal.because("image_too_small", msg, min_height=least.height, min_width=least.width)


def _largest(size: Size) -> dict[str, int]:
    """Return the largest accepted size of the same aspect."""
    scale = math.sqrt(MAX_PIXELS / (size.height * size.width))
    return {"max_height": int(size.height * scale), "max_width": int(size.width * scale)}


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation says; damaged EXIF data says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        return image
    method = _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)


def _to_srgb(image: Image.Image, field: str) -> Image.Image:
    """Return 8-bit RGB: palette and depth resolved, the embedded profile applied, alpha composited on white."""
    profile = image.info.get("icc_profile")
    image = _to_8_bit(image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert({"La": "LA", "PA": "RGBA"}.get(image.mode, "RGBA")).convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        image = _apply_profile(image, profile, field)
    image = image.convert("RGB")
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits (Pillow's own conversion clips it)."""
    if image.mode == "F":
        raise ValueError("floating-point values of unknown range; save it with 8 or 16 bits a channel")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integers; save it with 8 or 16 bits a channel")
    if image.mode == "I" and values.max() <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes, field: str) -> Image.Image:
    """Convert from the embedded ICC profile to sRGB; a profile that does not fit the image is ignored, and said so."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space, "")
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if mode == image.mode:
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            assert converted is not None, "profileToProfile returns an image unless it works in place"
            return converted
        reason = f"is for {source.profile.xcolor_space.strip()}, the image is {image.mode}"
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        reason = f"is damaged ({error})"
    _log.warning("%s: its colour profile %s; it is read as sRGB", field, reason)
    return image
