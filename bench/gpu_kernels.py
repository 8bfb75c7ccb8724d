"""The kernel stages of `bench/gpu.py`: right at real shapes on both matrix paths, and then how fast.

Hopper has two ways to multiply: its own, and with DISABLE_MMA_V3=1 the one that consumer cards have. Triton reads that
when it compiles, so each path runs in processes of its own with a cache of its own. Checks run side by side; nothing is
timed while anything else runs. One op that fails hides no other: its message is in the rows.

python -m bench.gpu_kernels checks DEVICE full|small FILE GROUP SKIP      what those processes run
python -m bench.gpu_kernels speeds DEVICE full|small FILE PATH SECONDS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.gpu_speeds import speed_rows
from bench.gpu_stage import Bench, CheckFailed, check
from wan_kernels import checks
from wan_kernels.language import KERNEL_ERRORS
from wan_local.home import temporary_folder

PATHS = {"own": {}, "consumer": {"DISABLE_MMA_V3": "1"}}
_CHECK_SECONDS = 100.0  # all checks of both paths, compilation included; half of it is expected
_SPEED_SECONDS = 42.0  # of measuring, for each path
_FIRST_SECONDS = 20.0  # that a process is expected to take before it measures
_START_SECONDS = 60.0  # more than a process takes to import torch, wake the card and end
_BEGUN_AGAIN = 4  # times a group's process may die before the rest of its ops is given up
_BROKEN_CARD = 3  # exit code of a process whose card answers nothing any more
_MESSAGE = 1500  # last characters of a traceback that a row keeps
_DONE = {"done": True}


def kernels(bench: Bench) -> None:
    """Every op against float64 at the 14B model's widths, on this card's own matrix path and on the consumer one."""
    seconds, started, paths = min(_CHECK_SECONDS, bench.seconds_left()), time.perf_counter(), _paths(bench.device)
    with ThreadPoolExecutor(len(paths) * len(checks.GROUPS)) as pool:
        waiting = {
            path: [pool.submit(_checked_apart, bench, path, group, started + seconds) for group in checks.GROUPS]
            for path in paths
        }
        found = {path: [row for group in groups for row in group.result()] for path, groups in waiting.items()}
    wrong = []
    for path, rows in found.items():
        errors = {row["op"]: row["error"] for row in rows if "error" in row}
        failed = {row["op"]: row["failed"] for row in rows if "failed" in row}
        bench.report("kernels", path=path, seconds=_since(started), errors=errors, failed=failed)
        wrong += [f"{path} path, {op}: {error:.3g} of the limit" for op, error in errors.items() if not error <= 1]
        wrong += [f"{path} path, {op}: {message.strip().splitlines()[-1]}" for op, message in failed.items()]
    print("\n".join(wrong), flush=True)
    check("ops that are wrong or failed, both paths", len(wrong), 0)


def kernel_speed(bench: Bench) -> None:
    """GB/s of fusions against a copy; int8 linears and attention against torch's at 480p and 720p, on both paths."""
    failed, paths = [], _paths(bench.device)
    for place, path in enumerate(paths):
        seconds = min(_SPEED_SECONDS, bench.seconds_left() / (len(paths) - place) - _FIRST_SECONDS)
        if seconds <= 0:
            bench.report("kernel_speed", path=path, op="all", skipped=f"{bench.seconds_left():.0f} s left")
            continue
        file = _folder(path) / "speeds.jsonl"
        file.unlink(missing_ok=True)
        command = ["speeds", str(bench.device), bench.size, str(file), path, str(seconds)]
        problem = _run(command, path, seconds + _START_SECONDS)
        rows = _rows(file)
        for row in rows:
            if row != _DONE:
                bench.report("kernel_speed", path=path, **row)
        failed += [f"{path} path, {row['op']}" for row in rows if "failed" in row]
        if _DONE not in rows:
            bench.report("kernel_speed", path=path, op="the process that times", failed=problem)
            failed.append(f"{path} path, after {len(rows)} rows: {problem[-200:]}")
    if failed:
        raise CheckFailed(f"not timed: {'; '.join(failed)}")


def _paths(device: torch.device) -> list[str]:
    """Return the matrix paths of a device: what is not Hopper has one."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return list(PATHS) if hopper else ["own"]


def _folder(path: str) -> Path:
    """Return where a path's compiled kernels are kept, and stand in for a home folder in which nothing was tuned."""
    folder = temporary_folder() / "bench" / path
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _checked_apart(bench: Bench, path: str, group: str, end: float) -> list[dict[str, Any]]:
    """Return a group's rows from a process of its own; one that dies is begun again behind the op it died of.

    end: of `time.perf_counter`.
    """
    file, rows = _folder(path) / f"{group}.jsonl", []
    file.unlink(missing_ok=True)
    for _ in range(1 + _BEGUN_AGAIN):
        left = end - time.perf_counter()
        if left <= 0:
            return [*rows, {"op": f"{group}, from the {len(rows) + 1}th on", "failed": "there was no time left"}]
        problem = _run(["checks", str(bench.device), bench.size, str(file), group, str(len(rows))], path, left)
        if len(_rows(file)) == len(rows):
            _append(file, {"op": f"{group}, the {len(rows) + 1}th", "failed": problem})
        rows = _rows(file)
        if _DONE in rows:
            return rows[:-1]
    return [*rows, {"op": f"{group}, from the {len(rows) + 1}th on", "failed": "its process died again and again"}]


def _run(arguments: list[str], path: str, seconds: float) -> str:
    """Run this module in a process of its own, and return what went wrong, or nothing."""
    folder = _folder(path)
    environment = {**os.environ, **PATHS[path], "TRITON_CACHE_DIR": str(folder / "cache"), "HOME": str(folder)}
    command = [sys.executable, "-m", "bench.gpu_kernels", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:.0f} s"
    return f"exit code {done.returncode}: {done.stderr[-_MESSAGE:]}" if done.returncode else ""


def _rows(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)


def check_rows(device: torch.device, size: str, group: str, skip: int) -> Iterator[dict[str, Any]]:
    """Yield how far each op of a group is from float64, or what it failed with; the first `skip` are known."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    at = checks.REAL if size == "full" else checks.SMALL
    for index, case in enumerate(checks.cases(device, at, dtype, group=group)):
        if index < skip:
            continue
        try:
            yield {"op": case.name, "error": round(checks.judge(case).error, 6)}
        except KERNEL_ERRORS:
            yield {"op": case.name, "failed": traceback.format_exc()[-_MESSAGE:]}
            _end_where_broken(device)
    yield _DONE


def _end_where_broken(device: torch.device) -> None:
    """End the process if the card is lost to it: after an illegal address nothing that follows would count."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        os._exit(_BROKEN_CARD)


def main(arguments: list[str]) -> None:
    what, name, size, file, *rest = arguments
    device = torch.device(name)
    torch.set_grad_enabled(False)
    if what == "checks":
        rows = check_rows(device, size, rest[0], int(rest[1]))
    else:
        rows = speed_rows(device, size, rest[0], float(rest[1]))
    for row in rows:
        _append(Path(file), row)
    if what == "speeds":
        _append(Path(file), _DONE)


if __name__ == "__main__":
    main(sys.argv[1:])
