"""What it costs to save a run's state: bytes and milliseconds of one model call, written and read back, by video size.

python -m bench.state [--folder DIR] appends a row for 480p and one for 720p; DIR is on the disk to measure.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.world import append_row, describe
from wan_local.answers import Answers
from wan_local.geometry import Geometry, Size

CPU = torch.device("cpu")
CHANNELS, CALLS = 16, 9
SIZES = {"480p": Size(height=480, width=832), "720p": Size(height=720, width=1280)}


def measure(size: Size, folder: Path) -> dict[str, float]:
    """Keep calls of random velocities and read them back; every one must come back bit for bit."""
    geometry = Geometry(size, 81)
    latent = geometry.latent_size
    shape = (1, CHANNELS, geometry.latent_frames, latent.height, latent.width)
    latents, noise_pred, conditional = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind(0)
    answers = Answers(folder, print)
    read_ms = []
    for number in range(1, CALLS + 1):
        answers.keep(number, latents, 999.0, (noise_pred, conditional))
    for number in range(1, CALLS + 1):
        started = time.perf_counter()
        answer = answers.answer(number, latents, 999.0)
        read_ms.append((time.perf_counter() - started) * 1000)
        assert answer is not None and torch.equal(answer[0], noise_pred) and torch.equal(answer[1], conditional)
    written = [path.stat().st_size for path in folder.iterdir()]
    assert len(answers.write_ms) == len(written) == CALLS
    return {
        "bytes_a_call": written[0],
        "n": CALLS,
        "median_write_ms": round(statistics.median(answers.write_ms), 1),
        "most_write_ms": round(max(answers.write_ms), 1),
        "median_read_ms": round(statistics.median(read_ms), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary one unless given")
    options = parser.parse_args()
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            append_row("state", {"size": name, **measure(size, Path(folder)), "world": describe(CPU)})


if __name__ == "__main__":
    main()
