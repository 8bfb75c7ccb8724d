"""The endpoint's schema: what a caller asks for, what comes back, and what happens in between.

Takes keywords (`Request(...)`) or a dict as a client sends it (`Request.from_arguments(...)`); gives a validated,
frozen `Request`. Names, defaults, ranges, coercions and error bodies are those of the hosted `fal-ai/wan-flf2v`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticKnownError

from wan_local.errors import InvalidRequest

APPLICATION = "fal-ai/wan-flf2v"

DEFAULT_NEGATIVE_PROMPT = (
    "bright colors, overexposed, static, blurred details, subtitles, style, artwork, painting, picture, still, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn "
    "hands, poorly drawn faces, deformed, disfigured, malformed limbs, fused fingers, still picture, cluttered "
    "background, three legs, many people in the background, walking backwards"
)

Check = Callable[[], None]  # called often while something long runs; raises Cancelled to end it

Stage = Literal["plan", "safety", "expansion", "text", "image", "condition", "context", "denoise", "decode"]

_DEFAULT_FRAMES = 81
_DEFAULT_RATE = 16
_MAX_DEPTH = 100  # of lists and dicts in one another that an error shows
_SEED_MIN, _SEED_MAX = -(2**63), 2**64 - 1  # what torch.Generator.manual_seed takes


def unchecked() -> None:
    """Be a `Check` that never asks to stop."""


def _unicode(value: str) -> str:
    """Refuse lone surrogates, which no tokenizer, file name or JSON body can carry."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise PydanticKnownError("string_unicode")
    return value


def _image_source(value: object) -> object:
    """Take what `image.load_image` can open: a string as the endpoint does; in process a path, bytes or image too."""
    if isinstance(value, str):
        return _unicode(value)
    if isinstance(value, Path | bytes | Image.Image):
        return value
    raise PydanticKnownError("string_type")


def _null_is(default: int) -> BeforeValidator:
    """Let null stand for the default, as the endpoint's `integer | null` fields do."""
    return BeforeValidator(lambda value: default if value is None else value)


Text = Annotated[str, AfterValidator(_unicode)]
ImageSource = Annotated[
    str | Path | bytes | Image.Image, PlainValidator(_image_source), WithJsonSchema({"type": "string"})
]
FrameCount = Annotated[int, Field(ge=81, le=100), _null_is(_DEFAULT_FRAMES)]
FrameRate = Annotated[int, Field(ge=5, le=24), _null_is(_DEFAULT_RATE)]
Seed = Annotated[int, Field(ge=_SEED_MIN, le=_SEED_MAX)]
Scale = Annotated[float, Field(ge=1, le=10)]


class Request(BaseModel):
    """One video to make. Raises pydantic's ValidationError; `from_arguments` raises the endpoint's error instead."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: Text
    negative_prompt: Text = DEFAULT_NEGATIVE_PROMPT
    start_image_url: ImageSource
    end_image_url: ImageSource
    num_frames: FrameCount = _DEFAULT_FRAMES
    frames_per_second: FrameRate = _DEFAULT_RATE
    seed: Seed | None = None
    resolution: Literal["480p", "720p"] = "720p"
    num_inference_steps: int = Field(default=30, ge=2, le=40)
    guide_scale: Scale = 5.0
    shift: Scale = 5.0
    enable_safety_checker: bool = False
    enable_prompt_expansion: bool = False
    acceleration: Literal["none", "regular"] = "regular"
    aspect_ratio: Literal["auto", "16:9", "9:16", "1:1"] = "auto"

    @classmethod
    def from_arguments(cls, arguments: object) -> Request:
        """Validate a request's body. Raises InvalidRequest, whose `detail` lists every wrong field."""
        if isinstance(arguments, Request):
            return arguments
        body = dict(arguments) if isinstance(arguments, Mapping) else arguments
        try:
            # from_attributes gives what is not a dict at all the endpoint's error type
            return cls.model_validate(body, from_attributes=True)
        except ValidationError as error:
            raise InvalidRequest(_detail(error)) from None


def _detail(error: ValidationError) -> list[dict[str, Any]]:
    """Return the errors in FastAPI's shape: type, loc from "body" on, msg, input and, where there is one, ctx."""
    detail = []
    for entry in error.errors(include_url=False):
        shaped: dict[str, Any] = {
            "type": entry["type"],
            "loc": ["body", *entry["loc"]],
            "msg": entry["msg"],
            "input": as_json(entry["input"]),
        }
        if "ctx" in entry:
            shaped["ctx"] = as_json(entry["ctx"])
        detail.append(shaped)
    return detail


def as_json(value: object, *, depth: int = 0) -> Any:
    """Return `value` as JSON can carry it; an image, bytes, NaN or a lone surrogate becomes a few words.

    Lists and dicts more than 100 deep in one another become "...".
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping | list | tuple) and depth >= _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {as_json(str(key)): as_json(item, depth=depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, depth=depth + 1) for item in value]
    if isinstance(value, bytes):
        return f"<binary {len(value)} bytes>"
    if isinstance(value, Image.Image):
        return f"<image {value.width}x{value.height} {value.mode}>"
    return as_json(str(value))


class File(BaseModel):
    """A file as the endpoint describes it; `path` is where it lies on this machine and is never dumped."""

    model_config = ConfigDict(frozen=True)

    url: str
    content_type: str | None = "video/mp4"
    file_name: str | None = None
    file_size: int | None = None
    path: Path | None = Field(default=None, exclude=True)


class Result(BaseModel):
    """What the endpoint returns; `report` (timings, peaks, what made the video) is local and never dumped."""

    model_config = ConfigDict(frozen=True)

    video: File
    seed: int
    report: dict[str, Any] = Field(default_factory=dict, exclude=True)


@dataclass(frozen=True, slots=True)
class Step:
    """One sign of progress: step `index` of `total` (counted from 1) within `stage` is done.

    `preview` is a uint8 array [height, width, 3] of what the video looks like so far, or None.
    """

    stage: Stage
    index: int
    total: int
    message: str
    elapsed_seconds: float
    eta_seconds: float | None = None
    preview: Any = None

    def as_event(self) -> dict[str, Any]:
        """Return the step as JSON can carry it, the preview as a data URI (PNG)."""
        event = {name: getattr(self, name) for name in self.__slots__}
        if self.preview is not None:
            buffer = io.BytesIO()
            Image.fromarray(self.preview).save(buffer, "PNG")
            event["preview"] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return event
