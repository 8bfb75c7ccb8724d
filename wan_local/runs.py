"""Unfinished runs on disk: a folder each, from a run's first moment until its video is complete. No torch.

    <state_dir>/runs/<run id>/
        run.json                 request, settings, seed, sizes, versions, the model's identity
        start.png end.png        both images at the video's size
        text-... image-... condition-...   the encodings that the run uses (see `cache`)
        call-0001.safetensors    what the transformer answered, one file a model call (see `answers`)
        latents.safetensors      the final latents, once there are some; the calls are gone then
        expansion.safetensors    what the prompt was expanded to, where that was asked for
        lock                     held by the process that makes the video

A run that ends well, or before its first step, removes its folder; any other leaves it, to be resumed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from wan_local import durable
from wan_local.errors import Busy, NotResumable
from wan_local.settings import Settings, in_environment

State = Literal["running", "waiting"]

FORMAT = 1  # of what is in the folder; another version's folders are not read
CALLS, LATENTS, EXPANSION = "call-*.safetensors", "latents.safetensors", "expansion.safetensors"
PICTURES = {"start_image_url": "start.png", "end_image_url": "end.png"}  # field, and its file
_ABOUT, _LOCK = "run.json", "lock"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_GIGABYTE = 10**9
# What a run is; the rest is how it is made, and a variable of the environment may say that anew.
_ITS_OWN = ("model", "profile", "loras", "acceleration_policy", "acceleration_file")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """One run's folder as it is now. `calls` model calls of at most `steps` are done, or all where it is `denoised`."""

    id: str
    folder: Path
    state: State
    about: Mapping[str, Any]
    calls: int
    denoised: bool
    file_bytes: int
    changed: float

    @property
    def steps(self) -> int:
        return int(self.about.get("request", {}).get("num_inference_steps", 0))

    @property
    def worth_keeping(self) -> bool:
        return self.calls > 0 or self.denoised

    def describe(self) -> str:
        """Say how far the run is."""
        if self.denoised:
            return "denoised, to be decoded"
        return f"{self.calls} model calls done, at most {self.steps} needed"


class RunFolder:
    """A run's folder in the hands of the process that makes the video; made or taken over by `begin` and `take`."""

    def __init__(self, folder: Path, lock: durable.Lock, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about
        self._lock = lock

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def worth_keeping(self) -> bool:
        """Whether a step is done: before that, beginning anew costs nothing more."""
        return _look_at(self.folder).worth_keeping

    def send_to(self, output: Path) -> None:
        """Let the video go to `output` from now on: there the next one sweeps a part of it. Raises OSError."""
        if self.about.get("output") != str(output):
            about = {**self.about, "output": str(output)}
            _write_about(self.folder, about)
            self.about = about

    def release(self, *, remove: bool) -> None:
        """Give the folder up, and remove it if it is of no more use."""
        self._lock.release()
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)


def new_id() -> str:
    """Return an id that sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def runs_folder(settings: Settings) -> Path:
    return settings.state_dir / "runs"


def begin(settings: Settings, run_id: str, about: Mapping[str, Any]) -> RunFolder:
    """Make a new run's folder, locked until it is released. Raises OSError; NotResumable for a bad id; Busy."""
    folder = _folder(settings, run_id)
    durable.make_folder(folder)
    lock = _locked(folder)
    about = {"format": FORMAT, "id": run_id, "began": time.time(), **about}
    begun = RunFolder(folder, lock, about)
    with ExitStack() as undo:
        undo.callback(begun.release, remove=True)
        _write_about(folder, about)
        undo.pop_all()
    return begun


def take(settings: Settings, run_id: str) -> RunFolder:
    """Take over a run that was left. Raises NotResumable: none is there, or of another format; Busy: it is running."""
    run = find(settings, run_id)
    if run is None:
        raise _not_there(settings, run_id)
    lock = _locked(run.folder)
    if run.about.get("format") != FORMAT:
        lock.release()
        raise NotResumable(
            f"the run {run_id!r} was left by another version of wan_local; this one cannot go on with it"
        )
    with ExitStack() as undo:
        undo.callback(lock.release)
        _sweep_after(run)
        undo.pop_all()
    return RunFolder(run.folder, lock, run.about)


def _write_about(folder: Path, about: Mapping[str, Any]) -> None:
    durable.write(folder / _ABOUT, [json.dumps(about, indent=1).encode()])


def find(settings: Settings, run_id: str) -> Run | None:
    """Return a run by its id, or None."""
    folder = _folder(settings, run_id)
    return _look_at(folder) if os.path.isfile(folder / _ABOUT) else None  # no error where it may not look


def kept_pictures(settings: Settings, run_id: str) -> dict[str, bytes]:
    """Return the images of an unfinished run, by field, fitted to its size, as PNG; of another id, none."""
    run = find(settings, run_id)
    if run is None:
        return {}
    with suppress(OSError):  # half of them are of no use: then they are fetched again
        return {field: (run.folder / name).read_bytes() for field, name in PICTURES.items()}
    return {}


def list_runs(settings: Settings) -> list[Run]:
    """Return every unfinished run, the newest first."""
    folder = runs_folder(settings)
    found = [_look_at(path.parent) for path in folder.glob(f"*/{_ABOUT}")] if os.path.isdir(folder) else []
    return sorted(found, key=lambda run: run.changed, reverse=True)


def remove(settings: Settings, run_id: str) -> Run:
    """Remove an unfinished run. Raises NotResumable where there is none, Busy where it is being made."""
    run = find(settings, run_id)
    if run is None:
        raise _not_there(settings, run_id)
    held = RunFolder(run.folder, _locked(run.folder), run.about)
    try:
        _sweep_after(run)
    finally:
        held.release(remove=True)
    return run


def prune(settings: Settings) -> list[Run]:
    """Remove what is beyond the settings' bounds: runs killed before their first step first, then the oldest."""
    removed, count, held_bytes = [], 0, 0
    for run in sorted(list_runs(settings), key=lambda run: run.worth_keeping, reverse=True):
        if run.state == "running":
            continue
        count, held_bytes = count + 1, held_bytes + run.file_bytes
        within = count <= settings.keep_runs and held_bytes <= settings.keep_runs_gigabytes * _GIGABYTE
        if not within:
            with suppress(NotResumable, Busy):  # someone has just taken it
                removed.append(remove(settings, run.id))
            count, held_bytes = count - 1, held_bytes - run.file_bytes
    for run in removed:
        if run.worth_keeping:
            _log.warning("the unfinished run %s (%s) was removed: more are not kept", run.id, run.describe())
    return removed


def settings_of(run_id: str, settings: Settings) -> Settings:
    """Return the settings that a run was begun with, itself found by `settings`. Raises NotResumable.

    Where a variable of the environment gives one that may be another, that of `settings` precedes: so an error's way
    out such as WAN_LOCAL_SHARE_DEVICE=yes is one for a run that was begun without it.
    """
    run = find(settings, run_id)
    if run is None:
        raise _not_there(settings, run_id)
    stored: dict[str, Any] = {}
    for field in fields(Settings):
        value = run.about.get("settings", {}).get(field.name, getattr(settings, field.name))
        if isinstance(value, list):
            stored[field.name] = tuple(value)
        else:
            stored[field.name] = Path(value) if value is not None and "Path" in str(field.type) else value
    anew = {"state_dir", *in_environment()}.difference(_ITS_OWN)
    return replace(Settings(**stored), **{name: getattr(settings, name) for name in anew})


def _folder(settings: Settings, run_id: str) -> Path:
    if not _ID.fullmatch(run_id):
        raise NotResumable(f"{run_id!r} is no id of a run: letters, digits, dots and dashes, at most 100")
    return runs_folder(settings) / run_id


def _locked(folder: Path) -> durable.Lock:
    lock = durable.Lock(folder / _LOCK)
    if not lock.acquire():
        raise Busy(f"the run {folder.name!r} is being made at this moment, by this process or another")
    return lock


def _not_there(settings: Settings, run_id: str) -> NotResumable:
    known = ", ".join(run.id for run in list_runs(settings)[:5]) or "none"
    return NotResumable(f"there is no unfinished run {run_id!r} in {runs_folder(settings)}; there are: {known}")


def _look_at(folder: Path) -> Run:
    files = list(_files(folder))
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    lock = durable.Lock(folder / _LOCK)
    try:
        free = lock.acquire()
    except OSError:  # the folder has just gone
        free = True
    lock.release()
    return Run(
        id=folder.name,
        folder=folder,
        state="waiting" if free else "running",
        about=about,
        calls=sum(Path(name).match(CALLS) for name, _, _ in files),
        denoised=any(name == LATENTS for name, _, _ in files),
        file_bytes=sum(size for _, size, _ in files),
        changed=max((changed for _, _, changed in files), default=0.0),
    )


def _files(folder: Path) -> Iterator[tuple[str, int, float]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            status = path.stat()
            yield path.name, status.st_size, status.st_mtime


def _sweep_after(run: Run) -> None:
    """Remove the partial files of the process that died: its records, and its video if it had begun one."""
    durable.sweep(run.folder, older_than_seconds=0.0)
    output = run.about.get("output")
    if isinstance(output, str):
        durable.sweep_after(run.id, Path(output).parent)
