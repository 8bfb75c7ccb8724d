"""The unmodified @fal-ai/client and the page in a browser, against a server on loopback.

Skipped without Node or without the packages (`npm ci --prefix tests/js`, which `make test` runs where there is npm).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.live_server import Live, live_server
from tests.stub_engine import StubEngine
from wan_local.geometry import Size
from wan_local.image import load_image
from wan_local.jobs import Ticket
from wan_local.request import File, Request, Result, Step
from wan_local.video import VideoWriter

SCRIPTS = Path(__file__).parent / "js"
IMAGES = Path(__file__).parent / "images"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="no Node"),
    pytest.mark.skipif(not (SCRIPTS / "node_modules").is_dir(), reason="no packages: npm ci --prefix tests/js"),
]


class PlayableEngine(StubEngine):
    """Makes a real, short video of the two images; "slow" takes as long as it is let, "crash" fails."""

    def __call__(self, request: Request, ticket: Ticket) -> Iterator[Step | Result]:
        pictures = [
            np.asarray(load_image(getattr(request, field), field=field).resize((160, 96)), np.float32)
            for field in ("start_image_url", "end_image_url")
        ]
        if request.prompt == "crash":
            raise RuntimeError("CUDA out of memory")
        steps = 400 if request.prompt == "slow" else request.num_inference_steps
        for index in range(1, steps + 1):
            ticket.check()
            self.gate.wait(0.03)
            preview = (pictures[0] * (1 - index / steps) + pictures[1] * index / steps).astype(np.uint8)
            yield Step("denoise", index, steps, f"step {index}", 0.1, 0.1 * (steps - index), preview[::4, ::4])
        path = self.folder / f"{ticket.id}.mp4"
        with VideoWriter(
            path, size=Size(height=96, width=160), frames_per_second=16, metadata={}, embed_metadata=False
        ) as writer:
            shares = np.linspace(0, 1, 16)
            writer.write(np.stack([pictures[0] * (1 - s) + pictures[1] * s for s in shares]).astype(np.uint8))
            report = writer.finish()
        file = File(url=path.as_uri(), file_name=path.name, file_size=report.file_bytes, path=path)
        yield Result(video=file, seed=5 if request.seed is None else request.seed)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    engine = PlayableEngine(tmp_path)
    engine.gate.clear()
    with live_server(tmp_path, engine) as live:
        yield live


def run(script: str, *arguments: object, seconds: float) -> None:
    assert NODE is not None
    done = subprocess.run(
        [NODE, str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "every claim holds\n"), done.stderr


def test_the_unmodified_javascript_client_works(live: Live, tmp_path: Path) -> None:
    Image.new("RGB", (160, 96), "navy").save(tmp_path / "frame.png")
    run("fal_client.mjs", live.url, tmp_path / "frame.png", seconds=120)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.slow
def test_the_page_works_in_a_browser(live: Live, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "locked").mkdir()
    engine = PlayableEngine(tmp_path / "locked")
    with live_server(tmp_path / "locked", engine, api_key="open sesame") as locked:
        run(
            "playground.mjs", live.url, IMAGES / "first_frame.png", IMAGES / "last_frame.png", tmp_path / "bad.png",
            CHROMIUM, locked.url, "open sesame", seconds=180,
        )  # fmt: skip
