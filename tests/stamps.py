"""The embedded model on canvases the size of a stamp: the whole story is there, in a tenth of the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wan_local import checkpoint, kinds
from wan_local.geometry import Canvas, Size
from wan_local.request import Request
from wan_local.settings import Settings, known_models, load_settings

IMAGES = Path(__file__).parent / "images"
START, END = IMAGES / "first_frame.png", IMAGES / "last_frame.png"


def stamp(area: int, long: int, short: int, square: int) -> Canvas:
    wide, tall = Size(height=short, width=long), Size(height=long, width=short)
    return Canvas(area, {"16:9": wide, "9:16": tall, "1:1": Size(square, square)})


STAMPS = {"480p": stamp(32 * 48, 48, 32, 32), "720p": stamp(48 * 64, 64, 48, 48)}


def stamp_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Settings:
    """Return settings for the embedded model on stamps, with everything it writes below `folder`."""
    small = tuple(replace(config, canvases=STAMPS) for config in known_models())
    for module in (checkpoint, kinds):
        monkeypatch.setattr(module, "known_models", lambda: small)
    return load_settings(model="tiny", device="cpu", output_dir=folder / "outputs", **changes)


def stamp_request(**changes: Any) -> Request:
    arguments = {
        "prompt": "a small blue bird takes off",
        "start_image_url": START,
        "end_image_url": END,
        "resolution": "480p",
        "num_inference_steps": 2,
        "seed": 42,
    }
    return Request(**{**arguments, **changes})
