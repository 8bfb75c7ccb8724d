"""The protocol on a person's own weights and image pairs, and thresholds of their own as its result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_local.attention import names
from wan_local.errors import InvalidRequest, NotAvailable
from wan_local.image import load_image
from wan_local.preparation import Job
from wan_local.quality.decision import EVEN, OWN, winner
from wan_local.quality.decision import candidates as against_the_bar
from wan_local.quality.subject import EXACT, Clip, Variant
from wan_local.quality.summary import Summary
from wan_local.settings import Settings

FIRST, LAST = "_first", "_last"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_TAUS = (0.03, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way that `regular` could be, as tables for the setting `acceleration_file`."""

    label: str
    tables: Mapping[str, Mapping[str, Any]]

    @property
    def policy(self) -> str:
        policy: str = self.tables["regular"]["policy"]
        return policy

    def as_toml(self) -> str:
        lines = []
        for name, table in self.tables.items():
            lines.append(f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        return "\n".join(lines) + "\n"


def candidates() -> tuple[Candidate, ...]:
    """Return the ways that are compared: merging at three thresholds, the static plan, reuse at two."""
    merging = [
        Candidate(f"regular, tau {tau:g}", {"regular": {"policy": "merge"}, "merge": {"tau": tau}}) for tau in _TAUS
    ]
    reuse = [
        Candidate(f"reuse, threshold {value:g}", {"regular": {"policy": "reuse"}, "reuse": {"threshold": value}})
        for value in (0.05, 0.1)
    ]
    return (*merging, Candidate("static plan", {"regular": {"policy": "static"}}), *reuse)


def variants(folder: Path, steps: int, guide_scale: float, other_models: Sequence[Path] = ()) -> list[Variant]:
    """Return what is compared in a cell of so many steps; the candidates' thresholds are written into `folder`.

    other_models: the same weights in other formats, as stores or checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, candidate in enumerate(candidates()):
        path = folder / f"candidate_{number}.toml"
        path.write_text(candidate.as_toml(), encoding="utf-8")
        settings = {"acceleration_file": path, "acceleration_policy": candidate.policy}
        made.append(Variant(candidate.label, {"acceleration": "regular"}, settings))
    numbers = (steps // 2, round(steps * 2 / 3), math.ceil(steps * 4 / 5))  # the candidates' calls lie between these
    fewer = sorted({max(2, number) for number in numbers} - {steps})
    made += [Variant(f"{few} {EVEN}", {"num_inference_steps": few}) for few in fewer]
    if guide_scale != 1:
        made.append(Variant("guide_scale 1", {"guide_scale": 1}))
    made += [Variant(f"model {path}", settings={"model": str(path)}) for path in other_models]
    return [*made, Variant("another seed", seed_offset=1000)]


def exactly(settings: Settings) -> Settings:
    """Return settings by which every run of a study computes, but for what a variant changes: in plain PyTorch."""
    return replace(settings, attention="sdpa", kernels="off")


def computations(settings: Settings, plan: Callable[[Variant], Job], left_out: Callable[[str], None]) -> list[Variant]:
    """Return a variant for what the settings compute with, where it is not exact, and for each attention that can run.

    plan: plans a variant's run. left_out: is told which cannot run, and why.
    """
    found = []
    own = {"attention": settings.attention, "kernels": settings.kernels}
    used = plan(Variant(EXACT, settings=own)).kernels
    if used.approximates:
        how = "fused kernels" if used.fused else "float16 sums" if used.half_sums else "plain linears"
        found.append(Variant(f"as these settings compute: attention {used.attention}, {how}", settings=own))
    for name in names():
        if name == "sdpa":
            continue
        variant = Variant(f"attention {name}", settings={"attention": name})
        try:
            plan(variant)
        except NotAvailable as problem:
            left_out(f"{variant.label} is left out: {problem}")
        else:
            found.append(variant)
    return found


def recommended(summaries: Sequence[Summary]) -> Candidate | None:
    """Return the candidate that the figures of a cell speak for, or None where every step is better."""
    by_label = {candidate.label: candidate for candidate in candidates()}
    chosen = winner(against_the_bar(summaries, bar=OWN))
    return None if chosen is None else by_label[chosen.summary.variant]


def environment(chosen: Candidate, thresholds: Path, settings: Settings) -> str:
    """Return the variables that make a candidate what `regular` is, beside those that `settings` came from."""
    variables = f"WAN_LOCAL_ACCELERATION_FILE={thresholds.absolute()}"
    if settings.acceleration_policy not in (None, chosen.policy):  # it goes before the file's
        variables += f" WAN_LOCAL_ACCELERATION_POLICY={chosen.policy}"
    return variables


def read_pairs(folder: Path) -> list[Clip]:
    """Return the pairs of a folder: `NAME_first.png` and `NAME_last.png` (or jpg, webp), with a prompt in `NAME.txt`.

    Raises InvalidRequest for a folder without pairs or a picture without its partner.
    """
    pictures = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in _PICTURES}
    clips = []
    for stem, first in pictures.items():
        if not stem.endswith(FIRST):
            continue
        name = stem.removesuffix(FIRST)
        partner = pictures.get(name + LAST)
        if partner is None:
            raise _pairs_error(f"{first} has no partner {name}{LAST}.png", folder)
        words = folder / f"{name}.txt"
        prompt = words.read_text(encoding="utf-8").strip() if words.exists() else ""
        start, end = (load_image(path, field="pairs") for path in (first, partner))
        clips.append(Clip(name, start, end, prompt))
    if not clips:
        raise _pairs_error(f"{folder} holds no pair", folder)
    return clips


def _pairs_error(what: str, folder: Path) -> InvalidRequest:
    message = f"{what}. A pair is NAME{FIRST}.png and NAME{LAST}.png, with its prompt in NAME.txt if it has one."
    return InvalidRequest.field("pairs", "value_error", message, value=str(folder))
