"""The world a number was measured in, and how rows are measured and kept."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wan_kernels import TRITON_VERSION

RESULTS = Path(__file__).parent / "results"


def describe(device: torch.device) -> dict[str, Any]:
    """Return device, driver and versions; what cannot be known is None."""
    world: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "driver": None,
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        world |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"sm_{major}{minor}",
            "cuda": torch.version.cuda,
            "triton": TRITON_VERSION,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return world


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


@dataclass(frozen=True)
class Measured:
    """Seconds of n runs after one that warms up, and the most bytes held during them (card only)."""

    seconds: list[float]
    peak_bytes: int | None

    def row(self) -> dict[str, Any]:
        return {
            "n": len(self.seconds),
            "median_seconds": round(statistics.median(self.seconds), 5),
            "spread_seconds": [round(min(self.seconds), 5), round(max(self.seconds), 5)],
            "peak_bytes": self.peak_bytes,
        }


def measure(work: Callable[[], Any], device: torch.device, *, runs: int = 3, warm: bool = True) -> Measured:
    """Run `work` once to warm up, unless that was done, then `runs` times on the clock, each until the card is done."""
    if warm:
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Measured(seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)


def append_row(file: str, row: dict[str, Any], folder: Path = RESULTS) -> None:
    """Print a row and append it to `<file>.jsonl` in `folder`, `bench/results` unless given."""
    line = json.dumps(row, ensure_ascii=False)
    print(line, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{file}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
