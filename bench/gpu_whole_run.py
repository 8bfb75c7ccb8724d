"""The whole run of `bench/gpu.py`: the 14B model's int8 store, made of noise, through the real pipeline under a cap.

Each video is made in a process of its own, so that its memory is its own; what it tells is kept as it comes, also where
it does not reach its end. The cap is the settings' own: `wan-local generate --vram 4GiB --ram 4GiB`.

python -m bench.gpu_whole_run STORE RESOLUTION DEVICE VRAM RAM GUIDE_SCALE KERNELS      what those processes run
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu_stage import Bench, check
from bench.random_store import write_random_store

# GiB that torch may take above what the context holds; the shorter run first, so that a budget does not leave it out
CAPS = (("480p", 2.8), ("720p", 4.0))
RAM_GIBIBYTES = 4.0  # too little for the blocks: they stream from their file
STEPS = 3  # the third is the first that the solver makes of two before it
_SECONDS = {"480p": 110.0, "720p": 200.0}  # after which a run is stopped
_LEAST_SECONDS = {"480p": 30.0, "720p": 75.0}  # without which it is not begun
_STORE_BYTES = 26 * 10**9
_SAMPLES_A_SECOND = 20
_QUIET_SECONDS = 5.0


def whole_run(bench: Bench) -> None:
    """Two images to an mp4 by the 14B model in int8 at 480p within 2.8 GiB and at 720p within 4: bytes by stage."""
    with tempfile.TemporaryDirectory(dir=_scratch(), prefix="wan_local-bench-") as scratch:
        store = Path(scratch) / "store"
        started = time.perf_counter()
        nbytes = write_random_store(store, bench.config)
        bench.report("whole_run", who="store", bytes=nbytes, seconds=round(time.perf_counter() - started, 1))
        failed = [resolution for resolution, cap in CAPS if not _one(bench, store, resolution, cap)]
    check(f"runs that did not end well: {failed}", len(failed), 0)


def _scratch() -> str | None:
    """Return where a store has room: memory before a disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * _STORE_BYTES
    return str(memory) if roomy else None


def _one(bench: Bench, store: Path, resolution: str, cap: float) -> bool:
    """Make one video and report it; tell whether it is whole."""
    who = f"{resolution} within {cap} GiB"
    if bench.size == "full" and not bench.has_time("whole_run", who, _LEAST_SECONDS[resolution]):
        return True
    place = [str(store), resolution, str(bench.device), str(cap), str(RAM_GIBIBYTES)]
    arguments = [*place, str(bench.guide_scale), bench.kernels]
    limit = min(_SECONDS[resolution], max(bench.seconds_left(), _LEAST_SECONDS[resolution]))
    started, told = time.perf_counter(), dict[str, Any]()
    with _child(arguments, limit) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(f"  {line}", end="", flush=True)
            with suppress(json.JSONDecodeError):
                told |= json.loads(line)
    told["wall_seconds"] = round(time.perf_counter() - started, 1)
    told["exit_code"] = child.returncode
    bench.report("whole_run", who=who, guide_scale=bench.guide_scale, kernels=bench.kernels, **told)
    return child.returncode == 0 and bool(told.get("complete"))


@contextmanager
def _child(arguments: list[str], seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Run this module's `main` in a process whose lines come as they are printed, and stop it after so long."""
    command = [sys.executable, "-m", "bench.gpu_whole_run", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        alarm = threading.Timer(seconds, child.kill)
        alarm.start()
        try:
            yield child
        finally:
            alarm.cancel()
            if child.poll() is None:
                child.wait()


class Resident(threading.Thread):
    """Samples this process's anonymous memory, which is what it holds beyond the page cache and mapped libraries.

    `most`: of all samples. by_stage: the most while each stage worked.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = self._since = 0
        self.by_stage: dict[str, int] = {}
        self._ended, self._lock = threading.Event(), threading.Lock()

    def run(self) -> None:
        while not self._ended.wait(1 / _SAMPLES_A_SECOND):
            self.sample()

    def sample(self) -> None:
        with self._lock:
            self._since = max(self._since, anonymous_bytes())
            self.most = max(self.most, self._since)

    def worked(self, stage: str) -> int:
        """Count what was held since this was last called as the stage's, and return the most that it held so far."""
        self.sample()
        with self._lock:
            self.by_stage[stage] = max(self.by_stage.get(stage, 0), self._since)
            self._since = 0
        return self.by_stage[stage]

    def end(self) -> None:
        self._ended.set()
        self.join()


def anonymous_bytes() -> int:
    """Return this process's anonymous resident bytes; all resident ones where the system does not tell them apart."""
    rows = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if ":" in line
    )
    return int(rows.get("RssAnon", rows["VmRSS"]).split()[0]) * 1024


def main(arguments: list[str]) -> int:
    store, resolution, device, vram, ram, guide_scale, kernels = arguments
    from wan_local.pipeline import Pipeline
    from wan_local.request import Request, Result
    from wan_local.settings import load_settings

    with tempfile.TemporaryDirectory(prefix="wan_local-bench-") as folder:
        settings = load_settings(
            model=store, device=device, vram_gibibytes=vram, ram_gibibytes=ram, state_dir=folder,
            cache_dir=f"{folder}/cache", kernels=kernels,
        )  # fmt: skip
        request = Request.from_arguments(_request(resolution, float(guide_scale)))
        output, resident = Path(folder) / "out.mp4", Resident()
        began, stages, quiet_until = anonymous_bytes(), dict[str, dict[str, int]](), 0.0
        steps_at: list[float] = []
        resident.start()
        for event in Pipeline(settings).generate(request, output=output):
            if isinstance(event, Result):
                told = _told(event)
                stages["decode"]["anonymous_bytes"] = resident.worked("decode")  # the video's end is written by then
                break
            if event.stage == "denoise" and event.index:
                steps_at.append(round(event.elapsed_seconds, 2))
            news = event.stage not in stages or time.monotonic() > quiet_until
            stages[event.stage] = {**_torch_holds(device), "anonymous_bytes": resident.worked(event.stage)}
            if news:
                quiet_until = time.monotonic() + _QUIET_SECONDS
                at = [event.stage, event.index, round(event.elapsed_seconds, 1), event.message]
                print(json.dumps({f"held_{event.stage}": stages[event.stage], "at": at}), flush=True)
        resident.end()
        told |= {"steps_done_at_seconds": steps_at} | {f"held_{stage}": held for stage, held in stages.items()}
        told |= {"rss_before": began, "peak_anonymous_bytes": resident.most, **_looked_at(output, told)}
        print(json.dumps(told), flush=True)
    return 0


def _request(resolution: str, guide_scale: float) -> dict[str, Any]:
    from PIL import Image

    images = [Image.radial_gradient("L").resize((320, 180)).convert("RGB").rotate(turn) for turn in (0, 180)]
    return {
        "prompt": "a small blue bird takes off from a branch", "start_image_url": images[0], "end_image_url": images[1],
        "resolution": resolution, "aspect_ratio": "16:9", "num_inference_steps": STEPS, "acceleration": "none",
        "guide_scale": guide_scale, "seed": 1,
    }  # fmt: skip


def _torch_holds(device: str) -> dict[str, int]:
    """Return the most that torch held since the stage began, in use and in all."""
    import torch

    if not device.startswith("cuda"):
        return {}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _told(result: Any) -> dict[str, Any]:
    report = result.report
    kept = ("seconds", "memory", "weights", "kernels", "notes", "width", "height", "num_frames", "state")
    return {"report": {name: report[name] for name in kept}}


def _looked_at(output: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Read the video back: whole, and of the size that was asked for."""
    from wan_local.geometry import Size
    from wan_local.video import read_video

    frames = read_video(output)
    size = Size(told["report"]["height"], told["report"]["width"])
    complete = frames.shape == (told["report"]["num_frames"], size.height, size.width, 3)
    return {"complete": complete, "frames": list(frames.shape), "video": asdict(size)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
