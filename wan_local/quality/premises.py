"""What a study's rows hold for, kept beside them: no row of another model, size or picture is taken for one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wan_local import __version__, durable
from wan_local.checkpoint import ModelFiles
from wan_local.device import card_model
from wan_local.errors import NotResumable
from wan_local.identity import part_identity
from wan_local.key_map import PARTS
from wan_local.preparation import Job
from wan_local.quality.subject import Clip

FILE = "study.json"
_COMPARED = "the compared model"


@dataclass(frozen=True, slots=True)
class Premises:
    """facts: what a page tells. digests: of weights, and of each pair with its prompt."""

    facts: Mapping[str, Any]
    digests: Mapping[str, str]

    def describe(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.facts.items())

    def changes_to(self, now: Premises) -> list[str]:
        """Say what rows of these premises do not hold for any more. What `now` adds, a pair say, changes nothing.

        A model that was only compared need not be named again.
        """
        facts = [
            f"{name} {value} is now {now.facts.get(name)}"
            for name, value in self.facts.items()
            if now.facts.get(name) != value
        ]
        digests = [
            f"{name} is {'another' if name in now.digests else 'gone'}"
            for name, digest in self.digests.items()
            if now.digests.get(name, digest if name.startswith(_COMPARED) else None) != digest
        ]
        return facts + digests


def premises_of(exact: Job, clips: Sequence[Clip], compared: Mapping[Path, ModelFiles]) -> Premises:
    """Return what rows of a study hold for. exact: any exact run of it. compared: other models, by where they are."""
    files, settings, request = exact.files, exact.settings, exact.request
    formats = "as in the files" if files.manifest is None else ", ".join(sorted(set(files.manifest.formats.values())))
    facts = {
        "wan_local": __version__,
        "model": f"{files.config.title} (weights: {formats})",
        "LoRAs": ", ".join(f"{lora.file.name} at {lora.strength:g}" for lora in files.loras) or "none",
        "profile": settings.profile or "none",
        "resolution": request.resolution,
        "aspect_ratio": request.aspect_ratio,
        "num_frames": request.num_frames,
        "guide_scale": request.guide_scale,
        "precision": settings.precision,
        "attention": settings.attention,
        "kernels": settings.kernels,
        "int8_arithmetic": exact.plan.stage("denoise").int8_arithmetic or "none",
        "device": card_model(exact.device) or "cpu",
    }
    digests = {f"the {part}": part_identity(files, part) for part in PARTS}
    digests |= {f"{_COMPARED} {path}": _whole(other) for path, other in compared.items()}
    digests |= {f"the pair {clip.name}": _pair(clip) for clip in clips}
    return Premises(facts, digests)


def keep(premises: Premises, folder: Path, *, measured: bool) -> None:
    """Write premises beside a study's rows. measured: there are rows, which have to be of the same.

    Raises NotResumable where they are not.
    """
    if measured:
        before = _read(folder / FILE)
        changes = ["it is not told what they hold for"] if before is None else before.changes_to(premises)
        if changes:
            raise NotResumable(
                f"the rows in {folder} are of another study: {', '.join(changes)}. Name another --output, or remove "
                f"{folder} to measure everything anew"
            )
        if before is not None:
            premises = Premises(premises.facts, {**before.digests, **premises.digests})
    durable.write(folder / FILE, [json.dumps(asdict(premises), indent=1).encode()])


def _read(file: Path) -> Premises | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Premises(dict(kept["facts"]), dict(kept["digests"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _whole(files: ModelFiles) -> str:
    return " ".join(part_identity(files, part) for part in PARTS)


def _pair(clip: Clip) -> str:
    state = hashlib.blake2b(digest_size=20)
    for picture in (clip.start, clip.end):
        state.update(f"{picture.mode} {picture.size};".encode())
        state.update(picture.tobytes())
    state.update(clip.prompt.encode())
    return state.hexdigest()
