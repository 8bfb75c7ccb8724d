"""A run's folder while its video is made: begun or taken over, and at the end removed or kept to be resumed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wan_local import runs
from wan_local.answers import Answers
from wan_local.checkpoint import ModelFiles
from wan_local.errors import InvalidRequest, NotResumable, OutOfMemory
from wan_local.ladder import ran_out_of_memory
from wan_local.order import Order, describe, write_pictures
from wan_local.planner import Plan
from wan_local.settings import Settings
from wan_local.tiling import Tiling

_log = logging.getLogger(__name__)


@contextmanager
def begun(
    order: Order, settings: Settings, files: ModelFiles, plan: Plan, run_id: str, note: Callable[[str], None]
) -> Iterator[Answers | None]:
    """Begin a new run under `run_id` and hand out its answers; None where no state is or can be kept."""
    folder = _begin(order, settings, files, plan, run_id, note) if settings.save_state else None
    if folder is None:
        yield None
    else:
        with _held(folder):
            yield Answers(folder.folder, note)


@contextmanager
def taken(settings: Settings, run_id: str) -> Iterator[runs.RunFolder]:
    """Take over an unfinished run. Raises NotResumable."""
    folder = runs.take(settings, run_id)
    with _held(folder, keep=True):
        yield folder


def sent_to(folder: runs.RunFolder, output: Path, note: Callable[[str], None]) -> None:
    """Write down where the video of a run goes now; where that cannot be, it goes there all the same."""
    try:
        folder.send_to(output)
    except OSError as error:
        reason = error.strerror or error
        note(f"the run's new output could not be saved ({reason}); if it is stopped again, name it again")


def _begin(
    order: Order, settings: Settings, files: ModelFiles, plan: Plan, run_id: str, note: Callable[[str], None]
) -> runs.RunFolder | None:
    about = describe(order, settings, files, torch.device(plan.device))
    folder: runs.RunFolder | None = None
    try:
        runs.prune(settings)
        folder = runs.begin(settings, run_id, {**about, **_cut_as(plan)})
        write_pictures(order, folder.folder)
    except OSError as error:
        note(f"the state of this run cannot be saved in {runs.runs_folder(settings)}: {error.strerror or error}")
        if folder is not None:
            folder.release(remove=True)
        return None
    return folder


def as_begun(plan: Plan, about: Mapping[str, Any], note: Callable[[str], None]) -> Plan:
    """Return the plan with the chunks and tiles of the run's beginning, which its bits depend on, where these fit."""
    began = {name: Tiling(*cut) for name, cut in about.get("tilings", {}).items()}
    stages = []
    for stage in plan.stages:
        tiling = began.get(stage.name, stage.tiling)
        stages.append(replace(stage, tiling=tiling) if tiling.count >= stage.tiling.count else stage)
    chunk = min(plan.chunk_tokens, int(about["chunk_tokens"]))
    as_it_was = replace(plan, chunk_tokens=chunk, stages=tuple(stages))
    if _cut_as(as_it_was) != {name: about.get(name) for name in ("chunk_tokens", "tilings")}:
        note("less memory is free than when the run was begun: the video may differ from it in its last bits")
    return as_it_was


def _cut_as(plan: Plan) -> dict[str, Any]:
    """Return what of a plan the last bits of a video depend on, as JSON has it."""
    tilings = {stage.name: [stage.tiling.rows, stage.tiling.columns] for stage in plan.stages if stage.tiling.count > 1}
    return {"chunk_tokens": plan.chunk_tokens, "tilings": tilings}


@contextmanager
def _held(folder: runs.RunFolder, *, keep: bool = False) -> Iterator[None]:
    """Remove the folder when the block ends well, or before anything was done unless `keep`; keep it otherwise.

    Every error that leaves it says in a note how to go on.
    """
    done = False
    try:
        yield
        done = True
    except InvalidRequest:  # refused on second sight: going on would end no better
        done = True
        raise
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error) and folder.worth_keeping:
            raise OutOfMemory(str(error)) from error
        raise
    finally:
        kept = not done and (keep or folder.worth_keeping)
        folder.release(remove=not kept)
        if kept:
            _log.info("the unfinished run %s is kept", folder.id)
            _say_how_to_go_on(sys.exception(), folder)


def _say_how_to_go_on(error: BaseException | None, folder: runs.RunFolder) -> None:
    if error is not None and not isinstance(error, NotResumable):  # that says itself what is to be done
        error.add_note(f"What was done is kept. Go on with: wan-local resume {folder.id}")
