"""An engine that makes no video: for tests of everything around one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wan_local.image import load_image
from wan_local.jobs import Ticket
from wan_local.request import File, Request, Result, Step

SOON = 5.0


class StubEngine:
    """Writes a few bytes that depend on the request; `hold` keeps it at its first step until `gate` is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.fault: BaseException | None = None
        self.pause = 0.0
        self.gate = threading.Event()
        self.gate.set()

    def hold(self) -> None:
        self.gate.clear()

    def __call__(self, request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        self.requests.append(request)
        first = load_image(request.start_image_url, field="start_image_url")
        load_image(request.end_image_url, field="end_image_url")
        if self.fault is not None:
            raise self.fault
        for index in range(1, request.num_inference_steps + 1):
            assert self.gate.wait(SOON)
            time.sleep(self.pause)
            preview = np.zeros((4, 4, 3), np.uint8) if index == request.num_inference_steps else None
            yield Step("denoise", index, request.num_inference_steps, f"step {index}", 0.0, 0.0, preview)
        seed = len(self.requests) if request.seed is None else request.seed
        path = self.folder / f"{len(self.requests)}.mp4"
        path.write_bytes(first.tobytes() + f"{seed} {request.num_frames}".encode())
        video = File(url=path.as_uri(), file_name=path.name, file_size=path.stat().st_size, path=path)
        yield Result(video=video, seed=seed)
