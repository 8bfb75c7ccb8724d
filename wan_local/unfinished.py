"""A run's folder while its video is made: begun or taken over, and at the end removed or kept to be resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from wan_local import runs
from wan_local.answers import Answers
from wan_local.checkpoint import ModelFiles
from wan_local.errors import InvalidRequest, OutOfMemory
from wan_local.order import Order, describe, write_pictures
from wan_local.planner import Plan
from wan_local.settings import Settings

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


def _begin(
    order: Order, settings: Settings, files: ModelFiles, plan: Plan, run_id: str, note: Callable[[str], None]
) -> runs.RunFolder | None:
    about = describe(order, settings, files, torch.device(plan.device))
    folder: runs.RunFolder | None = None
    try:
        runs.prune(settings)
        folder = runs.begin(settings, run_id, {**about, "chunk_tokens": plan.chunk_tokens})
        write_pictures(order, folder.folder)
    except OSError as error:
        note(f"the state of this run cannot be saved in {runs.runs_folder(settings)}: {error.strerror or error}")
        if folder is not None:
            folder.release(remove=True)
        return None
    return folder


@contextmanager
def _held(folder: runs.RunFolder, *, keep: bool = False) -> Iterator[None]:
    """Remove the folder when the block ends well, or before anything was done unless `keep`; keep it otherwise."""
    done = False
    try:
        yield
        done = True
    except InvalidRequest:  # refused on second sight: going on would end no better
        done = True
        raise
    except OutOfMemory as error:
        if folder.worth_keeping:
            raise OutOfMemory(f"{error} What was done is kept: wan-local resume {folder.id}") from error
        raise
    finally:
        kept = not done and (keep or folder.worth_keeping)
        folder.release(remove=not kept)
        if kept:
            _log.info("the unfinished run %s is kept", folder.id)
