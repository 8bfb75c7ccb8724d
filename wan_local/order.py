"""What is to be made, to the last detail: a request with all that was drawn for it, and how a later process is told.

An unfinished run is this on disk, and the transformer's answers so far (`answers`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wan_local import __version__, durable
from wan_local.acceleration_config import AccelerationConfig, MergingConfig, ReuseConfig
from wan_local.checkpoint import ModelFiles
from wan_local.errors import NotResumable
from wan_local.geometry import Geometry, Size
from wan_local.identity import part_identity
from wan_local.key_map import PARTS
from wan_local.metadata import public
from wan_local.request import Request, as_json
from wan_local.runs import PICTURES
from wan_local.settings import Profile, Settings, load_profile

_COMPUTED_BY = ("precision", "attention", "kernels", "int8_arithmetic")  # settings that change what a call gives


@dataclass(frozen=True, slots=True)
class Order:
    """A request with its seed, its size, its pictures at that size, its thresholds, and where the video goes.

    words: the request as the video's metadata tells of it. remarks: what was changed in it. profile: what it is sampled
    by, None for the request's own steps.
    """

    request: Request
    seed: int
    geometry: Geometry
    pictures: tuple[Image.Image, Image.Image]
    acceleration: AccelerationConfig
    output: Path
    words: Mapping[str, Any]
    remarks: tuple[str, ...] = ()
    profile: Profile | None = None


def words_of(request: Request) -> dict[str, Any]:
    """Return every field of a request as metadata may tell of it: no folders, no image data, no keys."""
    return public({name: as_json(getattr(request, name)) for name in type(request).model_fields})


def describe(order: Order, settings: Settings, files: ModelFiles, device: torch.device) -> dict[str, Any]:
    """Return all of an order but its pictures as JSON, with what it must be made with to be the same video."""
    plain = order.request.model_dump(mode="json", exclude=set(PICTURES))
    size = order.geometry.size
    return {
        "request": plain,
        "seed": order.seed,
        "size": [size.height, size.width],
        "output": str(order.output),
        "words": dict(order.words),
        "remarks": list(order.remarks),
        "acceleration": asdict(order.acceleration),
        "profile": order.profile,
        "settings": _public_settings(settings),
        "model": {part: part_identity(files, part) for part in PARTS},
        "made_with": _made_with(device),
    }


def write_pictures(order: Order, folder: Path) -> None:
    """Put both pictures into a run's folder, without loss. Raises OSError."""
    for picture, name in zip(order.pictures, PICTURES.values(), strict=True):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        durable.write(folder / name, [buffer.getvalue()])


def read_order(folder: Path, about: Mapping[str, Any], *, output: Path | None) -> Order:
    """Return the order that `describe` and `write_pictures` told of. Raises NotResumable where it is damaged."""
    try:
        pictures = tuple(
            Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB") for name in PICTURES.values()
        )
        sources = {field: folder / name for field, name in PICTURES.items()}
        height, width = about["size"]
        request = Request(**about["request"], **sources)
        given = about["acceleration"]
        acceleration = AccelerationConfig(
            given["policy"], MergingConfig(**given["merge"]), ReuseConfig(**given["reuse"])
        )
        return Order(
            request=request,
            seed=about["seed"],
            geometry=Geometry(Size(height=height, width=width), request.num_frames),
            pictures=(pictures[0], pictures[1]),
            acceleration=acceleration,
            output=output or Path(about["output"]),
            words=about["words"],
            remarks=tuple(about["remarks"]),
            profile=_profile_of(about),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise NotResumable(
            f"the run in {folder} is damaged or was left by another version ({error}); remove it with "
            f"`wan-local runs --remove {folder.name}` and begin anew"
        ) from error


def _profile_of(about: Mapping[str, Any]) -> Profile | None:
    """Return the profile a run was begun with; runs that do not tell have it among their settings."""
    profile: Profile | None = about["profile"] if "profile" in about else about["settings"].get("profile")
    if profile is not None:
        load_profile(profile)
    return profile


def check_model(about: Mapping[str, Any], files: ModelFiles) -> None:
    """Raise NotResumable where the weights are not those that the run was begun with."""
    for part, identity in about["model"].items():
        if part_identity(files, part) != identity:
            raise NotResumable(
                f"the run {about['id']!r} was begun with another {part} than the one in {str(files.folder)!r}; name "
                "the model it was begun with (--model, or settings), or begin anew"
            )


def changes_since(about: Mapping[str, Any], settings: Settings, device: torch.device) -> list[str]:
    """Say what is different now from when the run was begun, where that may change the video."""
    made = _changed(about["made_with"], _made_with(device))
    chosen = about.get("settings", {})
    computed = _changed(chosen, {name: getattr(settings, name) for name in _COMPUTED_BY if name in chosen})
    notes = []
    if made:
        notes.append(f"since the run was begun {made}: the video may differ from it in its last bits")
    if computed:
        notes.append(f"since the run was begun {computed}: what is left of it is computed otherwise")
    return notes


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changes = (f"{name} {before.get(name)} is now {value}" for name, value in now.items() if before.get(name) != value)
    return ", ".join(changes)


def _made_with(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"wan_local": __version__, "torch": torch.__version__, "device": name}


def _public_settings(settings: Settings) -> dict[str, object]:
    """Return the settings as JSON, without what is a secret."""
    values = {field.name: getattr(settings, field.name) for field in fields(Settings) if field.repr}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
