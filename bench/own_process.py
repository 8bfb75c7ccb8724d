"""Work that is measured in a process of its own: its seconds, and the RAM that it takes beside mapped files.

A process that did other work before holds memory of that, and hides what comes next below it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_local.device import own_ram_bytes

_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Work:
    """What is timed, and what it was predicted to hold; None where nobody predicts."""

    run: Callable[[], Tensor]
    predicted_bytes: int | None = None


Contender = Callable[[Path], AbstractContextManager[Work]]  # prepares its work from files in a folder, frees it after


@contextmanager
def most_ram() -> Iterator[Callable[[], int]]:
    """Give what tells the most bytes held since the block began, mapped files not counted."""
    most, over = [own_ram_bytes()], threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            most[0] = max(most[0], own_ram_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(most[0], own_ram_bytes())
    finally:
        over.set()
        watcher.join()


def in_own_process(module: str, name: str, scratch: Path, runs: int) -> dict[str, Any]:
    """Measure the contender `name` of a bench's module, which calls `measure_here` when it is given `--only`."""
    command = [sys.executable, "-m", module, f"--only={name}", f"--scratch={scratch}", f"--runs={runs}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_here(name: str, contender: Contender, scratch: Path, runs: int) -> None:
    """Measure a contender, print what was measured, and leave what it computed for `result_of`.

    Bytes are what the process took from before the weights were read until the last run had ended.
    """
    before = own_ram_bytes()
    with most_ram() as most, contender(scratch) as work:
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            result = work.run()
            seconds.append(time.perf_counter() - started)
        taken = most() - before
        torch.save(result, _file(scratch, name))
        row = {
            "n": runs, "median_seconds": round(statistics.median(seconds), 2),
            "spread_seconds": [round(min(seconds), 2), round(max(seconds), 2)],
            "taken_bytes": taken, "predicted_bytes": work.predicted_bytes,
        }  # fmt: skip
    print(json.dumps(row), flush=True)


def result_of(scratch: Path, name: str) -> Tensor:
    """Return what a contender computed."""
    result: Tensor = torch.load(_file(scratch, name), weights_only=True)
    return result


def _file(scratch: Path, name: str) -> Path:
    return scratch / f"{''.join(letter if letter.isalnum() else '_' for letter in name)}.pt"
