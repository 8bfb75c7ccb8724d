"""What all commands share on the terminal: words to stderr, exit codes, the progress of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan_local.request import Step

DONE, FAILED, WRONG_REQUEST, INTERRUPTED, UNREAD, TERMINATED = 0, 1, 2, 130, 141, 143


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Callable[[Step], None]]:
    """Give a function that shows a step: a bar for each stage on a terminal, a line for each step elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: say(f"{step.stage} {step.index}/{step.total}, {_clock(step)}: {step.message}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    stage = TextColumn("{task.description}", markup=False, table_column=Column(min_width=9, no_wrap=True))
    bar = BarColumn(bar_width=24, table_column=Column(min_width=24))
    words = TextColumn(
        "{task.fields[words]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
    )
    with Progress(stage, bar, TimeElapsedColumn(), words, console=Console(stderr=True), expand=True) as bars:
        tasks: dict[str, Any] = {}

        def show(step: Step) -> None:
            if step.stage == "plan":  # said in full: it names the model, the size and the memory
                bars.console.print(step.message, markup=False, highlight=False)
                return
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, words="")
            text = f"{step.index}/{step.total}, {_clock(step)}: {step.message}"
            bars.update(tasks[step.stage], completed=step.index, total=step.total, words=text)

        yield show


def _clock(step: Step) -> str:
    ended = step.eta_seconds is None or step.index == step.total
    return f"{_minutes(step.elapsed_seconds)} gone" + (
        "" if ended else f", about {_minutes(step.eta_seconds or 0)} left"
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
