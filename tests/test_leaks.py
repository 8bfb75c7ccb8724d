"""Twenty runs of mixed sizes, failures and cancels in one process: memory, threads and open files stay as they were."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stamps import stamp_request, stamp_settings
from wan_local import preparation
from wan_local.errors import Cancelled, OutOfMemory
from wan_local.models import transformer, vae
from wan_local.pipeline import Pipeline
from wan_local.planner import Plan
from wan_local.request import Step
from wan_local.settings import Settings

RUNS, WARM = 20, 5
MOST_GROWTH_BYTES = 64 * 2**20

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what is held")


def held_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the one that lists
            continue
    return sorted(name for name in found if name.startswith("/") and "/dev/" not in name)


def live_tensors() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum(tensor.numel() > 1000 for tensor in tensors)


def streams(plan: Plan) -> Plan:
    named = ("text", "context", "denoise")
    return replace(
        plan,
        stages=tuple(
            replace(stage, resident_blocks=0, source="file") if stage.name in named else stage for stage in plan.stages
        ),
    )


def one_run(number: int, settings: Settings, folder: Path) -> str:
    """Make a video or fail to, each time in another way; return how it ended."""
    kind = number % 5
    changes: dict[str, Any] = {"seed": number, "resolution": ("480p", "720p")[number % 2], "prompt": f"bird {number}"}
    if number % 3 == 0:
        changes |= {"num_frames": 85, "aspect_ratio": "16:9"}
    output = folder / "x.mp4"
    with pytest.MonkeyPatch.context() as patch:
        if number % 4 == 0:
            make_plan = preparation.make_plan
            patch.setattr(preparation, "make_plan", lambda *args, **kwargs: streams(make_plan(*args, **kwargs)))
        running = Pipeline(settings).generate(stamp_request(**changes), output=output)
        if kind == 1:  # cancelled in any stage
            stage = ("text", "image", "condition", "context", "denoise", "decode")[number // 5 % 6]
            next(event for event in running if isinstance(event, Step) and event.stage == stage and event.index)
            running.close()
            return "closed"
        if kind == 2:  # cancelled in the middle of a block

            def check() -> None:
                raise Cancelled("stop")

            with pytest.raises(Cancelled):
                list(Pipeline(settings).generate(stamp_request(**changes), output=output, check=check))
            return "cancelled"
        if kind == 3:  # a fault in a block, or memory that never suffices
            error: BaseException = torch.OutOfMemoryError("none left") if number % 2 else ZeroDivisionError()
            owner = transformer.TransformerBlock if number % 4 else vae.ResidualBlock

            def broken(*_: Any, **__: Any) -> None:
                raise error

            patch.setattr(owner, "forward", broken)
            with pytest.raises((OutOfMemory, ZeroDivisionError)):
                list(running)
            return "failed"
        list(running)
        return "done"


@pytest.mark.slow
def test_twenty_runs_of_all_kinds_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stamp_settings(
        tmp_path, monkeypatch, state_dir=tmp_path / "state", cache_dir=tmp_path / "cache", keep_runs=2,
        cache_gigabytes=0.001,
    )  # fmt: skip
    ended, bytes_after, before = [], [], (0, [""], 0)
    for number in range(RUNS):
        ended.append(one_run(number, settings, tmp_path))
        if number == 0:
            gc.freeze()  # what the libraries made that it imported: each search goes through all of it
        if number + 1 == WARM:  # by then each way to end was taken once
            before = (threading.active_count(), open_files(), live_tensors())
        bytes_after.append(held_bytes())
    assert {"done", "closed", "cancelled", "failed"} == set(ended)
    assert threading.active_count() <= before[0], [thread.name for thread in threading.enumerate()]
    assert open_files() == before[1]
    assert live_tensors() <= before[2]
    growth = max(bytes_after[-5:]) - max(bytes_after[: 2 * WARM])
    assert growth < MOST_GROWTH_BYTES, [round(count / 2**20) for count in bytes_after]
    assert not list(tmp_path.rglob("*.part"))
    if torch.cuda.is_available():
        assert torch.cuda.memory_allocated() == 0
