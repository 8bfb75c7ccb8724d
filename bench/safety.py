"""What the safety checker's classifier says about harmless pictures, and how long a picture takes.

python -m bench.safety [--pictures FOLDER ...] [--runs 20]

Scores the example pair, scikit-image's photographs, flat and shaded skin tones of the Monk scale, greys and noise; more
folders with pictures of your own can be named. It needs the extra `safety` and scikit-image, no network and no card.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.world import append_row, describe, measure
from wan_local.safety import Checker, load_checker
from wan_local.settings import load_safety_config, load_settings

Picture = NDArray[np.uint8]
MONK = ("f6ede4", "f3e7db", "f7ead0", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420")
PAIR = Path(__file__).parents[1] / "tests" / "images"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def folder_pictures(folder: Path) -> Iterator[tuple[str, Picture]]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            yield path.name, np.asarray(Image.open(path).convert("RGB"))


def flat(color: bytes, side: int = 256) -> Picture:
    return np.ascontiguousarray(np.broadcast_to(np.frombuffer(color, np.uint8), (side, side, 3)))


def shaded(picture: Picture) -> Picture:
    """Light a flat colour as a curved surface would be lit."""
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]] - 128
    light = 0.75 + 0.25 * np.cos(columns / 80) * np.cos(rows / 100)
    return (picture * light[..., None]).astype(np.uint8)


def groups(more: list[Path]) -> Iterator[tuple[str, list[tuple[str, Picture]]]]:
    import skimage

    noise = np.random.default_rng(0)
    yield "example pair", list(folder_pictures(PAIR))
    yield "scikit-image photographs", list(folder_pictures(Path(skimage.__file__).parent / "data"))
    yield "flat skin tones", [(tone, flat(bytes.fromhex(tone))) for tone in MONK]
    yield "shaded skin tones", [(tone, shaded(flat(bytes.fromhex(tone)))) for tone in MONK]
    yield "flat greys", [(str(grey), flat(bytes([grey] * 3))) for grey in (0, 64, 128, 192, 255)]
    yield "noise", [(str(n), noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for n in range(5)]
    for folder in more:
        yield folder.name, list(folder_pictures(folder))


def judge(checker: Checker, name: str, pictures: list[tuple[str, Picture]]) -> dict[str, object]:
    scores = {label: checker.score(picture) for label, picture in pictures}
    worst = max(scores, key=lambda label: scores[label])
    return {
        "group": name,
        "pictures": len(scores),
        "median_score": round(statistics.median(scores.values()), 4),
        "highest_score": round(scores[worst], 4),
        "highest_is": worst,
        "flagged": sum(score >= checker.config.flag_one for score in scores.values()),
        "near": sum(score >= checker.config.flag_two for score in scores.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, nargs="*", default=[], help="more folders of pictures")
    parser.add_argument("--runs", type=int, default=20, help="times a frame is scored for the timing")
    options = parser.parse_args()
    cpu = torch.device("cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checker = load_checker(load_settings())
    world = {"who": checker.name, "flag_one": load_safety_config().flag_one, "world": describe(cpu)}
    for name, pictures in groups(options.pictures):
        append_row("safety", {**judge(checker, name, pictures), **world})
    for height, width in ((480, 832), (720, 1280)):
        frame = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
        timed = measure(lambda frame=frame: checker.score(frame), cpu, runs=options.runs).row()
        append_row("safety", {"shape": f"{width}x{height}", **timed, **world})
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    append_row("safety", {"resident_mib_added": added, **world})


if __name__ == "__main__":
    main()
